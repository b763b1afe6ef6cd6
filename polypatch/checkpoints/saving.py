"""Checkpoints of ours: the authors' tensors under their own names, and all facts about them.

A folder with ``model.safetensors`` and ``config.json``. Other tools can read the tensors, and
:func:`polypatch.load` needs nothing else: the same facts stand in the tensor file's metadata, so
that the file alone is enough.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import catalogue
from ..errors import PolypatchError
from ..nn import Preprocessing
from .reading import read_state, unwrap
from .recognising import recognise_inside, weights_module

if TYPE_CHECKING:
    from . import Loaded

__all__ = ["Facts", "convert", "facts_of", "save"]

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What ``config.json`` says. ``config`` has the authors' argument names."""

    paper: str
    task: str = "classify"
    config: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    assumed: Sequence[str] = ()
    classes: Sequence[str] = ()
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    licence: str = ""
    title: str = ""
    arxiv: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


def facts_of(values: Mapping[str, Any]) -> Facts:
    """Read what :meth:`Facts.to_dict` wrote.

    Raises:
        PolypatchError: a newer format.
    """
    values = dict(values)
    version = values.pop("format", None)
    if version != FORMAT:
        raise PolypatchError(
            f"this file has format {version} and polypatch reads format {FORMAT}; update polypatch"
        )
    looks: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.pop("preprocessing").items()
    }
    return Facts(**values, preprocessing=Preprocessing(**looks))


def convert(
    path: str | Path,
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
) -> Path:
    """Write a checkpoint as safetensors with its facts; the tensors stay bit for bit.

    Args:
        path: whatever :func:`polypatch.load` takes.
        folder: made here; it must not be there yet, or be empty.
        config: arguments by the authors' names, where shapes don't tell them.
        classes: names of the classes, to be kept in the file.

    Raises:
        PolypatchError: a file that doesn't load, or a folder that has something in it.
    """
    from . import load

    loaded = load(path, config=config)
    if loaded.paper == "polypatch":
        raise PolypatchError(
            f"{path} was trained here and is safetensors with its configuration already"
        )
    if isinstance(path, str) and path.startswith("hub:"):
        from .hub import download

        path = download(path[4:])[0]
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    state = unwrap(read_state(file)[0])
    found = recognise_inside({name: tuple(value.shape) for name, value in state.items()})
    prefix = found.prefix if found is not None else ""
    state = {n[len(prefix) :]: v for n, v in state.items() if n.startswith(prefix)}
    return _write(state, _facts(loaded, classes=classes or loaded.classes), folder)


def save(model: nn.Module, folder: Path, *, classes: Sequence[str] = ()) -> Path:
    """Write a network of the library (created here, fine-tuned or not) under its authors' keys.

    Raises:
        PolypatchError: a network whose authors' layout isn't known, such as a plain ViT with
            techniques plugged in, or a folder that has something in it.
    """
    name = type(model).__module__.rsplit(".", 1)[-1].replace("_", "-")
    slugs = [p.slug for p in catalogue.papers(peers=True) if name.startswith(p.slug)]
    slug = max(slugs, key=len, default="")
    module = weights_module(slug) if slug else None
    if module is None or not hasattr(module, "official_config"):
        raise PolypatchError(
            f"{type(model).__name__} has no authors' layout to be saved in; "
            "what `polypatch train` leaves in its run's folder loads as it is"
        )
    from . import Loaded
    from .recognising import variant_of

    config = module.official_config(model)
    looks = getattr(model, "preprocessing", Preprocessing())
    loaded = Loaded(
        model, slug, "classify", config, variant=variant_of(slug, config), preprocessing=looks
    )
    return _write(module.to_official(model), _facts(loaded, classes=classes), folder)


def _facts(loaded: Loaded, *, classes: Sequence[str]) -> Facts:
    entry = catalogue.paper(loaded.paper)
    return Facts(
        paper=loaded.paper,
        task=loaded.task,
        config=loaded.config,
        variant=loaded.variant,
        assumed=loaded.assumed,
        classes=tuple(classes),
        preprocessing=loaded.preprocessing,
        licence=entry.licence,
        title=entry.title,
        arxiv=entry.arxiv,
    )


def _write(state: Mapping[str, Tensor], facts: Facts, folder: Path) -> Path:
    """Both files or none: they are written beside and moved."""
    from safetensors.torch import save_file

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PolypatchError(f"{folder} is there already; name a folder that isn't")
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        about = facts.to_dict()
        tensors = {n: v.detach().cpu().contiguous().clone() for n, v in state.items()}
        save_file(tensors, beside / "model.safetensors", metadata={"polypatch": json.dumps(about)})
        text = json.dumps({"polypatch": about}, indent=2) + "\n"
        (beside / "config.json").write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder
