"""How a technique takes part in training without the training loop knowing its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from .vit import ViT

__all__ = ["TrainingHook"]


class TrainingHook:
    """What a technique does while its host is trained; every method has a neutral default.

    A hook keeps no state that matters from one step to the next: what it draws, it draws from the
    generator it is given, which is seeded by run and step. So a resumed run and every process of a
    distributed one see the same draws.
    """

    def before_step(self, host: ViT, *, step: int, total: int, generator: torch.Generator) -> None:
        """Called before each training step: set what this step draws (a patch size, a mask)."""

    def targets(
        self, host: ViT, targets: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, "batch classes"]:
        """Class probabilities to train towards, where the technique mixes samples."""
        return targets

    def loss(
        self,
        host: ViT,
        images: Float[Tensor, "batch channels height width"],
        logits: Float[Tensor, "batch classes"],
    ) -> Float[Tensor, ""] | None:
        """A further term of the loss, of the forward pass just made on ``images``."""
        return None

    def after_training(self, host: ViT) -> None:
        """Called before evaluation: leave the host in its normal state."""
