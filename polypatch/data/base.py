"""What every source of labelled images looks like to the rest of the library.

A source is two :class:`Split` objects. A split is *random access and pure*: ``read(indices)``
depends on the indices alone, never on what was read before. That one rule is what makes exact
resume, several processes and prefetching simple: a training step is named by its sample indices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int64
from torch import Tensor

from ..nn import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["ImageData", "Split"]


@runtime_checkable
class Split(Protocol):
    """Random-access labelled images, all of one size."""

    def __len__(self) -> int:
        """Number of samples (of an endless source: the size of one epoch)."""
        ...

    def read(
        self, indices: Int64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch 3 height width"], Int64[Tensor, "batch ..."]]:
        """RGB images in [0, 1] and their class indices; for the task ``segment`` one for each
        pixel, (batch, height, width), with -1 where none counts. Indices past ``len(self)`` are
        further draws where :attr:`ImageData.endless` says so, an ``IndexError`` elsewhere."""
        ...


@dataclass(frozen=True)
class ImageData:
    """A source of labelled images.

    ``name`` is what the user wrote, ``fingerprint`` changes whenever the samples would change (it
    addresses runs), ``notes`` are sentences to show once: what was skipped and why.
    """

    name: str
    fingerprint: str
    classes: tuple[str, ...]
    resolution: int
    train: Split
    test: Split
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    endless: bool = False
    flippable: bool = True  # a mirrored image keeps its label (not so for digits)
    notes: tuple[str, ...] = field(default=())
    task: str = "classify"  # or "segment"
