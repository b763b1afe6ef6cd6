"""The whole network: logits, what the head reads, and the offsets of the mergings as the authors'
convolution gives them, (batch, 8, rows, columns)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from polypatch.backbones import lit

from ..goldens import Case
from ..test_parity import backbone_run, plain_count


def run(case: Case) -> dict[str, Tensor]:
    model = lit.from_official(case.config, case.state)
    (image,) = case.inputs.values()
    outputs = backbone_run(model, image, set(case.outputs))
    if any(name.startswith("offsets") for name in case.outputs):
        outputs |= {
            f"offsets.{number}": value.flatten(3).permute(0, 3, 1, 2)
            for number, value in enumerate(model.offsets(image))
        }
    return outputs


def count(name: str, config: dict[str, Any]) -> int:
    return plain_count(lit, config)
