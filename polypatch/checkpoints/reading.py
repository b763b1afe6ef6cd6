"""Reading files of weights, safely: nothing in a file is ever executed.

``.safetensors``; ``.npz`` without pickles; torch files with ``weights_only=True``. What comes out
is plain tensors by name, without the wrappers of training scripts.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PolypatchError

__all__ = ["check_values", "read_state", "unwrap"]

#: names under which training scripts keep the weights, in order of preference
WRAPPERS = ("params_ema", "model_ema", "state_dict_ema", "ema", "state_dict", "model_state_dict",
            "model_state", "model", "params", "net", "teacher")  # fmt: skip
_PREFIXES = ("module.", "_orig_mod.", "model.")


def read_state(path: Path, *, values: bool = True) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors of a file, as they lie in it, and its metadata.

    Args:
        values: if not, tensors come on the meta device: names, shapes and types alone.

    Raises:
        PolypatchError: missing, empty, truncated, of an unknown kind, or wanting to run code.
    """
    if path.is_dir():
        raise PolypatchError(f"{path} is a folder without model.safetensors in it")
    if not path.is_file():
        raise PolypatchError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise PolypatchError(f"{path} is empty (0 bytes)")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path, values=values)
        if path.suffix == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as arrays:
                read = {k.replace("/", "."): torch.from_numpy(arrays[k]) for k in arrays.files}
                return (read if values else {k: v.to("meta") for k, v in read.items()}), {}
        with path.open("rb") as file:
            start = file.read(4)
        if not start.startswith((b"PK", b"\x80")):  # a zip archive, or a pickle of old torch
            raise PolypatchError(
                f"{path} can't be read: it is neither safetensors, npz nor a torch file"
            )
        if start.startswith(b"PK") and not zipfile.is_zipfile(path):
            raise PolypatchError(f"{path} is cut off: the end of the archive is missing")
        with warnings.catch_warnings():  # of newer pickles: what can't be read raises
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            value = torch.load(path, map_location="cpu" if values else "meta", weights_only=True)
    except PolypatchError:
        raise
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):  # no pickle at all, or a broken one
            raise PolypatchError(f"{path} can't be read: {_first_line(error)}") from error
        raise PolypatchError(
            f"{path} wants to run code when it is read, so it was not read; in an environment "
            "that you trust it in, load it with torch and save only its state dict: "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise PolypatchError(f"{path} can't be read: {_first_line(error)}") from error
    except Exception as error:  # safetensors and broken pickles raise whatever they stumble over
        raise PolypatchError(f"{path} is damaged: {_first_line(error)}") from error
    if not isinstance(value, Mapping):
        raise PolypatchError(f"{path} holds a {type(value).__name__}, not a state dict")
    return {str(name): inner for name, inner in value.items()}, {}


def _read_safetensors(path: Path, *, values: bool) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        if values:
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
        # A slice knows its shape without reading its values.
        shapes = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {
            key: torch.empty(
                part.get_shape(), dtype=_TYPES.get(part.get_dtype(), torch.float32), device="meta"
            )
            for key, part in shapes.items()
        }, metadata


_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def unwrap(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights out of what a training script saved: inner dicts and common prefixes removed.

    Raises:
        PolypatchError: no tensors in it.
    """
    value: Mapping[str, Any] = state
    for _ in range(3):
        inner = next((w for w in WRAPPERS if isinstance(value.get(w), Mapping)), None)
        if inner is None:
            break
        value = value[inner]
    tensors = {str(name): v for name, v in value.items() if isinstance(v, Tensor)}
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: v for name, v in tensors.items()}
    if not tensors:
        raise PolypatchError("there are no tensors in this file")
    return tensors


def check_values(state: Mapping[str, Tensor], *, what: str) -> None:
    """Weights that can't work are named before they do harm.

    Infinities pass: masks are stored with them.

    Raises:
        PolypatchError: NaNs, or values that are no plain numbers (complex, quantised, sparse).
    """
    strange = [
        name
        for name, value in state.items()
        if value.is_complex() or value.is_quantized or value.layout != torch.strided
    ]
    if strange:
        raise PolypatchError(
            f"{what}: {_some(strange)} {'is' if len(strange) == 1 else 'are'} complex, quantised "
            "or sparse; networks here take plain real weights"
        )
    broken = [n for n, v in state.items() if v.is_floating_point() and bool(v.isnan().any())]
    if broken:
        raise PolypatchError(
            f"{what}: {_some(broken)} hold{'s' if len(broken) == 1 else ''} NaNs; "
            "the training that wrote this file has diverged, take an earlier checkpoint"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
