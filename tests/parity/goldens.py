"""Reads golden cases: what the authors' code computed, and the weights that it had.

A case is ``<slug>/<case>.json`` (configuration, shapes, notes) beside ``<case>.safetensors``
(values). Weights that were drawn at random are not stored but drawn again from name, shape and
seed, see :func:`redraw`.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor


def redraw(name: str, shape: list[int], draw: str, seed: int) -> Tensor:
    """The weight that the goldens' maker drew for this name."""
    state = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    r = state.standard_normal(shape)
    value = {
        "matrix": lambda: r / math.sqrt(max(1, math.prod(shape[1:]))),
        "gain": lambda: 1 + 0.2 * r,
        "vector": lambda: 0.1 * r,
        "running_mean": lambda: 0.1 * r,
        "running_var": lambda: 0.5 + np.abs(r),
    }[draw]()
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


@dataclass(frozen=True)
class Case:
    slug: str
    name: str
    path: Path

    def __str__(self) -> str:
        return f"{self.slug}/{self.name}"

    @cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())

    @property
    def config(self) -> dict[str, Any]:
        return self.meta["config"]

    @property
    def variants(self) -> dict[str, Any]:
        return self.meta.get("variants") or {}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        file = self.path.with_suffix(".safetensors")
        return load_file(file) if file.exists() else {}

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The authors' state dict."""
        state: dict[str, Tensor] = {}
        entries = self.meta.get("state") or {}
        for name, entry in entries.items():
            if entry.get("same_as"):
                continue
            if entry.get("draw"):
                drawn = redraw(name, entry["shape"], entry["draw"], entry["seed"])
                state[name] = drawn.to(getattr(torch, str(entry["dtype"]).removeprefix("torch.")))
            else:
                state[name] = self.tensors[f"state.{name}"]
        for name, entry in entries.items():
            if entry.get("same_as"):
                state[name] = state[entry["same_as"]]
        return {name: state[name] for name in entries}

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """Inputs by name, in the order of the case's file."""
        return {name: self.tensors[f"input.{name}"] for name in self.meta["inputs"]}

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        """Outputs by name without ``output.``; a lone ``output`` has the name ``""``."""
        return {
            name.removeprefix("output").removeprefix("."): self.tensors[name]
            for name in self.meta["outputs"]
        }


def find_cases(folder: Path) -> list[Case]:
    return [Case(p.parent.name, p.stem, p) for p in sorted(folder.glob("*/*.json"))]
