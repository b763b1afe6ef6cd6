"""MViT's goldens: beside the logits, probabilities of eval mode and all tokens."""

from __future__ import annotations

from torch import Tensor

from polypatch.backbones import mvit

from ..goldens import Case


def run(case: Case) -> dict[str, Tensor]:
    model = mvit.from_official(case.config, case.state)
    (image,) = case.inputs.values()
    probabilities = model.probabilities(image)
    return {
        "": probabilities,
        "probs": probabilities,
        "logits": model(image),
        "features": model.pooled(image),
        "tokens": model.tokens(image),
    } | {f"features.{n}": found.map for n, found in enumerate(model.features(image))}
