"""The whole network: logits, and the maps behind the stages."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from polypatch.backbones import dat

from ..goldens import Case
from ..test_parity import backbone_run, plain_count


def run(case: Case) -> dict[str, Tensor]:
    model = dat.from_official(case.config, case.state)
    (image,) = case.inputs.values()
    outputs = backbone_run(model, image, {*case.outputs, "features.0"})
    return outputs | {
        name.replace("features.", "stage"): value
        for name, value in outputs.items()
        if name.startswith("features.")
    }


def count(name: str, config: dict[str, Any]) -> int:
    return plain_count(dat, config)
