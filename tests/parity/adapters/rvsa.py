"""RVSA's goldens: logits, the maps for dense tasks, and single attentions on given tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polypatch.backbones import rvsa
from polypatch.backbones.rvsa_weights import ARGUMENTS

from ..goldens import Case


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Without words about how the case was run."""
    return {key: value for key, value in config.items() if key in ARGUMENTS}


def run(case: Case) -> dict[str, Tensor]:
    model = rvsa.from_official(arguments(case.config), case.state)
    outputs: dict[str, Tensor] = {}
    inputs = case.inputs
    image = inputs.get("image", inputs.get("x"))
    if image is not None:
        outputs[""] = outputs["logits"] = model(image)
        outputs["features"] = model.pooled(image)
        if any(name.startswith("features.") for name in case.outputs):
            maps = model.features(image)
            outputs |= {f"features.{n}": found.map for n, found in enumerate(maps)}
    if "tokens" in inputs:
        height, width = case.config["H"], case.config["W"]
        maps = inputs["tokens"].unflatten(1, (height, width))
        for name in case.outputs:
            kind, _, number = name.rpartition("block")
            if kind and number.isdigit():
                outputs[name] = model.blocks[int(number)].attention(maps).flatten(1, 2)
    return outputs


def count(name: str, config: dict[str, Any]) -> int:
    with torch.device("meta"):
        model = rvsa.network(arguments(config))
    return sum(p.numel() for p in model.parameters())
