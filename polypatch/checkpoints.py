"""A file of weights → which paper, which configuration → a model.

Reading executes nothing: ``.safetensors``, ``.npz`` without pickles, and torch files with
``weights_only=True``. A file's family is recognised by its names and shapes; each paper's module
says what its own look like (``recognise``) and rebuilds the network (``from_official``).
"""

from __future__ import annotations

import importlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import catalogue
from .errors import PolypatchError
from .hosts import ViT
from .nn import IMAGENET_MEAN, IMAGENET_STD, GridPatching, LearnedPosition, check_fit, load_exactly
from .nn.positions import resample_grid

__all__ = ["Loaded", "load", "load_weights", "read_state", "recognise", "resize", "unwrap"]

#: names under which training scripts keep the weights, in order of preference
WRAPPERS = ("params_ema", "model_ema", "state_dict_ema", "ema", "state_dict", "model_state_dict",
            "model", "params", "net", "teacher")  # fmt: skip
_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and what is known about it.

    ``assumed`` names what the file doesn't say and the library took from the authors' published
    variants; ``input_range`` and ``mean``/``std`` say what inputs the weights expect.
    """

    model: nn.Module
    paper: str
    task: str
    config: dict[str, Any]
    assumed: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    scale: int = 1
    input_range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    metadata: Mapping[str, str] = field(default_factory=dict)


def load(
    path: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    patch: int | None = None,
    resolution: int | None = None,
) -> Loaded:
    """Load a checkpoint, whatever paper it is from.

    Args:
        path: a file, a run's folder, or ``hub:owner/name`` for a Hugging Face repository.
        config: arguments by the authors' names, where shapes don't tell them.
        patch, resolution: of a plain ViT: resize its weights to these, see :func:`resize`.

    Raises:
        PolypatchError: no such file, an unreadable or unsafe one, or weights of no known paper.
    """
    given = dict(config or {})
    if isinstance(path, str) and path.startswith("hub:"):
        path, hub_config = _from_hub(path[4:])
        given = hub_config | given
    path = Path(path)
    if (path / "model.safetensors").is_file():
        path = path / "model.safetensors"
    state, metadata = read_state(path)
    if "polypatch" in metadata:
        return _load_own(state, metadata)
    state = unwrap(state)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    found = recognise(shapes)
    if found is None:
        names = ", ".join(list(shapes)[:5])
        raise PolypatchError(
            f"{path} holds the weights of no network that polypatch knows; its first keys are "
            f"{names}; `polypatch papers` lists what is known"
        )
    slug, inferred = found
    module = importlib.import_module(_weights_module(slug))
    used = inferred | given
    # What recognising had to take from the authors' variants: everything beyond names of layouts
    # that the caller didn't say. What shapes do tell is assumed harmlessly.
    assumed = tuple(
        f"{name}={value}"
        for name, value in inferred.items()
        if name not in given and name not in ("layout", "class", "cls")
    )
    model = module.from_official(used, state)
    if patch is not None or resolution is not None:
        if not isinstance(model, ViT):
            raise PolypatchError(f"only plain ViTs can be resized, this is {slug}")
        model = resize(model, patch=patch, resolution=resolution)
    return Loaded(model, slug, "classify", used, assumed, metadata=metadata)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, dict[str, Any]] | None:
    """Which paper's network has tensors of these names and shapes: its slug and configuration by
    the authors' names. The most particular paper wins over the plain ViT that it builds on."""
    entries = sorted(catalogue.papers(peers=True), key=lambda p: p.slug == "vit")
    for entry in entries:
        if not entry.works:
            continue
        name = _weights_module(entry.slug)
        if not _defines_recognise(name):
            continue
        config = importlib.import_module(name).recognise(shapes)
        if config is not None:
            return entry.slug, config
    return None


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors of a file, as they lie in it, and its metadata. Nothing in the file is executed.

    Raises:
        PolypatchError: missing, empty, truncated, of an unknown kind, or wanting to run code.
    """
    if not path.is_file():
        raise PolypatchError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise PolypatchError(f"{path} is empty (0 bytes)")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
                return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})
        if path.suffix == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as arrays:
                return {k.replace("/", "."): torch.from_numpy(arrays[k]) for k in arrays.files}, {}
        value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PolypatchError(
            f"{path} wants to run code when it is read, so it was not read; in an environment "
            "that you trust it in, load it with torch and save only its state dict: "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise PolypatchError(f"{path} can't be read: {str(error).splitlines()[0]}") from error
    except Exception as error:  # safetensors raises a type of its own
        raise PolypatchError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise PolypatchError(f"{path} holds a {type(value).__name__}, not a state dict")
    return value, {}


def unwrap(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights out of what a training script saved: inner dicts and common prefixes removed."""
    value: Mapping[str, Any] = state
    for _ in range(3):
        inner = next((w for w in WRAPPERS if isinstance(value.get(w), Mapping)), None)
        if inner is None:
            break
        value = value[inner]
    tensors = {name: v for name, v in value.items() if isinstance(v, Tensor)}
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: v for name, v in tensors.items()}
    if not tensors:
        raise PolypatchError("there are no tensors in this file")
    return tensors


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Put a run's or a checkpoint's weights into a model of the same architecture.

    Foreign ViT weights are renamed, the patch embedding and the positions resized to the model's;
    a classifier of another size keeps its fresh weights. Returns what was left fresh.

    Raises:
        PolypatchError: anything but the classifier doesn't fit.
    """
    if path.is_dir():
        path = path / "model.safetensors"
    state = unwrap(read_state(path)[0])
    found = recognise({name: tuple(value.shape) for name, value in state.items()})
    if found is not None:
        slug, config = found
        state = importlib.import_module(_weights_module(slug)).from_official(config, state)
        state = dict(state.state_dict())
    own = model.state_dict()
    state = _resized(state, own)
    fresh = [
        name
        for name, value in own.items()
        if name.startswith("head.") and (name not in state or state[name].shape != value.shape)
    ]
    check_fit(
        {name: value for name, value in own.items() if name not in fresh},
        {name: value for name, value in state.items() if name not in fresh},
        what=f"the model to start ({path} is of another architecture)",
    )
    model.load_state_dict({n: v for n, v in state.items() if n not in fresh}, strict=False)
    return fresh


def resize(model: ViT, *, patch: int | None = None, resolution: int | None = None) -> ViT:
    """A plain ViT's weights for another patch size or native resolution; changes and returns it.

    The patch embedding is resized by the pseudo-inverse (FlexiViT), so that tokens of images
    enlarged in proportion stay what they were; the positions are interpolated. Without
    ``resolution`` the number of tokens at the native resolution changes with the patch.

    Raises:
        PolypatchError: a host whose tokenizer or positions aren't the plain ones.
    """
    if not isinstance(model.patching, GridPatching):
        raise PolypatchError(
            f"only a plain grid of patches can be resized, not {type(model.patching).__name__}"
        )
    patch = model.patch if patch is None else patch
    resolution = model.resolution if resolution is None else resolution
    conv = model.patching.proj
    fresh = GridPatching(
        dim=model.dim, patch=patch, channels=conv.in_channels, bias=conv.bias is not None
    )
    cells = -(-resolution // patch)
    wanted = dict(model.state_dict())
    wanted["patching.proj.weight"] = fresh.proj.weight
    if isinstance(model.position, LearnedPosition):
        wanted["position.table"] = torch.empty(1, cells, cells, model.dim)
    state = _resized(dict(model.state_dict()), wanted)
    model.patching = fresh.to(conv.weight)
    model.patch, model.resolution = patch, resolution
    if isinstance(model.position, LearnedPosition):
        model.position.table = nn.Parameter(state["position.table"])
    model.load_state_dict(state)
    return model


def _resized(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Patch embeddings and position tables in the sizes that a model has."""
    from .patching.flexivit import resample_patch_embed

    state = dict(state)
    kernel, table = "patching.proj.weight", "position.table"
    if kernel in state and kernel in own and state[kernel].ndim == own[kernel].ndim == 4:
        height, width = own[kernel].shape[2:]
        state[kernel] = resample_patch_embed(state[kernel], (height, width))
    if table in state and table in own and state[table].ndim == own[table].ndim == 4:
        rows, columns = own[table].shape[1:3]
        state[table] = resample_grid(state[table], (rows, columns))
    return state


def _load_own(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Loaded:
    from .spec import create

    config = json.loads(metadata["polypatch"])
    model = create(config["spec"], classes=config["classes"], resolution=config["resolution"])
    load_exactly(model, state, what=config["spec"])
    extra = json.loads(metadata.get("data", "{}"))
    return Loaded(
        model.eval(),
        "polypatch",
        "classify",
        config,
        classes=tuple(extra.get("classes", ())),
        mean=tuple(extra.get("mean", Loaded.mean)),
        std=tuple(extra.get("std", Loaded.std)),
        metadata=metadata,
    )


def _weights_module(slug: str) -> str:
    return "polypatch.hosts.layouts" if slug == "vit" else catalogue.paper(slug).module


def _defines_recognise(module: str) -> bool:
    file = Path(catalogue.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return "\ndef recognise(" in file.read_text(encoding="utf-8")


def _from_hub(name: str) -> tuple[Path, dict[str, Any]]:
    """Weights and ``config.json`` of a Hugging Face repository, through the local cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    config: dict[str, Any] = {}
    try:
        for file in ("model.safetensors", "pytorch_model.bin"):
            try:
                path = Path(hf_hub_download(name, file))
                break
            except EntryNotFoundError:
                continue
        else:
            raise PolypatchError(f"hub:{name} has no model.safetensors and no pytorch_model.bin")
        raw = json.loads(Path(hf_hub_download(name, "config.json")).read_text())
    except PolypatchError:
        raise
    except Exception as error:  # the hub's client raises many kinds, all about not getting it
        reason = str(error).splitlines()[0]
        raise PolypatchError(f"hub:{name} can't be had: {reason}") from error
    known = ("hidden_size", "num_attention_heads", "image_size", "patch_size", "layer_norm_eps",
             "hidden_act", "num_hidden_layers", "intermediate_size")  # fmt: skip
    config |= {key: raw[key] for key in known if key in raw}
    if raw.get("architectures"):
        config["class"] = raw["architectures"][0]
    return path, config
