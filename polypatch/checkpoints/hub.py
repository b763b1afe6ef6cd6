"""Hugging Face repositories: ``hub:owner/name`` to read from, :func:`push_to_hub` to write to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import PolypatchError

__all__ = ["download", "push_to_hub"]

#: what transformers' configurations say and shapes don't
_KNOWN = ("hidden_size", "num_attention_heads", "image_size", "patch_size", "layer_norm_eps",
          "hidden_act", "num_hidden_layers", "intermediate_size")  # fmt: skip


def download(name: str) -> tuple[Path, dict[str, Any]]:
    """Weights and ``config.json`` of a repository, through the local cache.

    Raises:
        PolypatchError: no such repository, no weights in it, or no way to reach it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        for file in ("model.safetensors", "pytorch_model.bin"):
            try:
                path = Path(hf_hub_download(name, file))
                break
            except LocalEntryNotFoundError:  # one, too, but it says that the hub wasn't reached
                raise
            except EntryNotFoundError:
                continue
        else:
            raise PolypatchError(f"hub:{name} has no model.safetensors and no pytorch_model.bin")
        try:
            raw = json.loads(Path(hf_hub_download(name, "config.json")).read_text())
        except EntryNotFoundError:
            raw = {}
    except PolypatchError:
        raise
    except Exception as error:  # the hub's client raises many kinds, all about not getting it
        reason = str(error).splitlines()[0]
        raise PolypatchError(f"hub:{name} can't be had: {reason}") from error
    config = {key: raw[key] for key in _KNOWN if key in raw}
    if raw.get("architectures"):
        config["class"] = raw["architectures"][0]
    return path, config


def push_to_hub(folder: Path, name: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a converted checkpoint or a finished run to the Hugging Face hub.

    Args:
        folder: with ``model.safetensors``, as :func:`~polypatch.checkpoints.saving.convert` and
            ``polypatch train`` leave it.
        name: ``owner/name``; the repository is made if it isn't there.
        token: default: the one that ``hf auth login`` stored.

    Returns:
        The commit's address.

    Raises:
        PolypatchError: no weights in the folder, no permission, or no way to reach the hub.
    """
    from huggingface_hub import HfApi

    if not (folder / "model.safetensors").is_file():
        raise PolypatchError(
            f"there is no model.safetensors in {folder}; `polypatch convert FILE FOLDER` makes one"
        )
    api = HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if not (folder / "README.md").exists():
            card = _card(folder, name).encode()
            api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=name)
        done = api.upload_folder(
            folder_path=folder,
            repo_id=name,
            allow_patterns=["model.safetensors", "config.json", "result.json", "README.md"],
            commit_message="Weights, written by polypatch",
        )
    except Exception as error:  # see above
        reason = str(error).splitlines()[0]
        raise PolypatchError(f"{name} can't be written to: {reason}") from error
    return str(getattr(done, "commit_url", done))


def _card(folder: Path, name: str) -> str:
    """The model card: what it is, how to load it, under which licence."""
    file = folder / "config.json"
    about = json.loads(file.read_text()).get("polypatch", {}) if file.is_file() else {}
    licence = about.get("licence", "")
    head = ["---", "library_name: polypatch", *([f"license: {licence.lower()}"] if licence else [])]
    head += ["---", "", f"# {name.split('/')[-1]}", ""]
    if about.get("title"):
        source = f" (arXiv {about['arxiv']})" if about.get("arxiv") else ""
        head += [f"{about.get('variant') or about['paper']} of *{about['title']}*{source}.", ""]
    return "\n".join(
        [*head, "```python", "import polypatch", "", f'model = polypatch.load("hub:{name}").model',
         "```", ""]
    )  # fmt: skip
