"""What every complete encoder offers, whatever is inside: logits, dense maps, its needs.

:class:`Backbone` holds the parts that are the same everywhere. An encoder adds ``pooled`` and
``features``; dense heads, commands and tests know nothing but this surface.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import PolypatchError
from .patches import IMAGENET_MEAN, IMAGENET_STD

__all__ = [
    "Backbone",
    "FeatureInfo",
    "FeatureMap",
    "InputRequirements",
    "Preprocessing",
    "pad_to",
    "sample_shape",
]


# Not Self: what checks shapes while the program runs can't read it.
SomeBackbone = TypeVar("SomeBackbone", bound="Backbone")


@dataclass(frozen=True)
class InputRequirements:
    """What sizes a network takes; callers pad and crop by it. ``exact``: (height, width) if it
    takes no other size."""

    multiple_of: int = 1
    minimum: int = 1
    square: bool = False
    exact: tuple[int, int] | None = None

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """The smallest size that is permitted and not below the given one (``exact`` may be)."""
        if self.exact is not None:
            return self.exact
        up = [-(-max(n, self.minimum) // self.multiple_of) * self.multiple_of
              for n in (height, width)]  # fmt: skip
        return (max(up), max(up)) if self.square else (up[0], up[1])

    def check(self, image: Tensor, *, name: str = "this network") -> None:
        """
        Raises:
            PolypatchError: a size that isn't permitted, with the nearest one that is.
        """
        height, width = image.shape[-2:]
        right = self.nearest(height, width)
        if (height, width) == right:
            return
        rules = [
            f"{self.exact[0]}×{self.exact[1]}" if self.exact else "",
            f"multiples of {self.multiple_of}" if self.multiple_of > 1 else "",
            f"at least {self.minimum}" if self.minimum > 1 else "",
            "square" if self.square else "",
        ]
        raise PolypatchError(
            f"the input is {height}×{width}; {name} takes sides that are "
            f"{', '.join(r for r in rules if r)}, such as {right[0]}×{right[1]}"
        )


class FeatureMap(NamedTuple):
    """A dense map for dense heads, and how many pixels lie between its cells."""

    map: Float[Tensor, "batch dim height width"]
    stride: int


class FeatureInfo(NamedTuple):
    """Of a map that ``features`` gives, known before any image is seen."""

    dim: int
    stride: int


@dataclass(frozen=True)
class Preprocessing:
    """What the authors evaluate their weights on: the shorter side is resized to
    ``resolution / crop`` by ``interpolation``, the middle square of ``resolution`` pixels taken,
    RGB in [0, 1] shifted by ``mean`` and divided by ``std``."""

    resolution: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop: float = 0.875
    interpolation: str = "bicubic"


def pad_to(
    image: Float[Tensor, "batch channels height width"], requirements: InputRequirements
) -> Float[Tensor, "batch channels tall wide"]:
    """Pad below and to the right, by copies of the border, to the next permitted size.

    Raises:
        PolypatchError: a network that takes one smaller size only.
    """
    height, width = image.shape[-2:]
    tall, wide = requirements.nearest(height, width)
    if tall < height or wide < width:
        raise PolypatchError(f"the input is {height}×{width}; this network takes {tall}×{wide}")
    if (tall, wide) == (height, width):
        return image
    return F.pad(image, (0, wide - width, 0, tall - height), mode="replicate")


def sample_shape(model: nn.Module) -> tuple[int, ...]:
    """What a network's input has before height and width: (channels,), of a network for video
    (channels, frames)."""
    return tuple(getattr(model, "sample_shape", (3,)))


class Backbone(nn.Module):
    """Base of the complete encoders.

    A subclass sets ``dim`` (of what the head reads), ``head``, ``feature_info``, where they differ
    ``input_requirements`` and ``preprocessing``, and writes :meth:`pooled`, :meth:`features` and
    ``init_weights``. Blocks are called through :meth:`through`, so that :meth:`checkpointed` works.
    """

    dim: int
    head: nn.Module
    feature_info: tuple[FeatureInfo, ...]
    input_requirements = InputRequirements()
    preprocessing = Preprocessing()
    #: of the input, before height and width; (channels, frames) of a network for video
    sample_shape: tuple[int, ...] = (3,)
    #: substrings of names of matrices and tables that weight decay leaves alone
    undecayed: tuple[str, ...] = ()
    _checkpointed = False

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        """What the head reads."""
        raise TypeError(f"{type(self).__name__} defines no pooled()")

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """Maps for dense heads, finest first, as ``feature_info`` announces them. A map has
        ceil(side / stride) cells a side, or floor where the network drops the rest."""
        raise TypeError(f"{type(self).__name__} defines no features()")

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        return self.head(self.pooled(image))

    def reset_head(self, classes: int) -> None:
        """A fresh linear classifier; 0: none, the pooled features come out."""
        like = next(self.parameters())
        self.head = nn.Linear(self.dim, classes) if classes else nn.Identity()
        self.head.to(device=like.device, dtype=like.dtype)
        self.init_head()

    def init_head(self) -> None:
        """Fill a fresh head: normal, std 0.02; zero bias."""
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def checkpointed(self: SomeBackbone, on: bool = True) -> SomeBackbone:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self._checkpointed = on
        return self

    def channels_last(self: SomeBackbone) -> SomeBackbone:
        """Keep the weights of convolutions in the layout of channels-last maps, so that they aren't
        reordered in every call."""
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def through(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """``block(*inputs)``, recomputed in the backward pass where that was asked for."""
        if self._checkpointed and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def no_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone: vectors, and :attr:`undecayed`."""
        return {
            name
            for name, value in self.named_parameters()
            if value.ndim <= 1 or any(part in name for part in self.undecayed)
        }
