"""Single pixels as tokens: a plain transformer without any locality built in.

Nguyen, Assran, Jain, Oswald, Snoek, Chen: *An Image is Worth More Than 16x16 Patches: Exploring
Transformers on Individual Pixels*, ICLR 2025, arXiv 2406.09415. A ViT has two sources of locality,
the patches and two-dimensional positions; this one has neither::

    tokens = W pixel + b + position[pixel]        one per pixel, W: channels → dim
    class token, pre-norm blocks with global attention, as ever

with a learned position for every pixel that starts random (no two-dimensional prior). So nothing
changes when the pixels are shuffled and the positions are shuffled alike; without positions and
with mean pooling the network is a function of a set. :func:`pixel_permutation` and
:func:`shuffle_pixels` are the paper's study of how much patches suffer from that.

Self-supervised, the paper uses masked autoencoding (:mod:`polypatch.pretraining.mae`) with three
quarters of the pixels hidden: :func:`masked_autoencoder`. Its third case, generation, runs a
diffusion transformer with patches of 1 on latents and is not in this file.

Traps:

* Attention costs the square of height × width. Inputs of more than ``limit`` pixels are refused;
  ``limit=None`` lifts that.
* Positions are never interpolated, which would be a two-dimensional prior: an input must have the
  size that the table was made for. ``position="sincos"`` and ``"none"`` take any size.
* A norm over a pixel's 3 values (Dual PatchNorm; MAE's normalised targets) destroys its intensity.

Not verified: the authors published no code. Depths, widths and the parameter count of the smallest
network (5,555,812 with 100 classes at 32 × 32 pixels) are known from accounts of the paper; that
tiny and small have 12 heads, less surely. Pooling is by class token, which has a position of its
own (the count says so).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..errors import PolypatchError, suggest
from ..hosts.vit import ViT, assemble_vit
from ..nn import (
    GridPatching,
    LearnedPosition,
    NoPosition,
    Position,
    SinCosPosition,
    init_transformer_weights,
)
from ..pretraining.mae import MaskedAutoencoder
from ..tokens import Tokens

__all__ = [
    "POSITIONS",
    "VARIANTS",
    "PixelPatching",
    "PixelPosition",
    "build",
    "masked_autoencoder",
    "pixel_permutation",
    "plug",
    "shuffle_pixels",
]

POSITIONS = ("learned", "sincos", "none")

#: 64 × 64 pixels: four times the tokens of the paper's largest inputs (32 × 32).
LIMIT = 4096


class PixelPatching(GridPatching):
    """A token per pixel: a 1 × 1 convolution, which is a linear map of its channels.

    Raises:
        PolypatchError: the image has more than ``limit`` pixels.
    """

    def __init__(self, *, dim: int, channels: int = 3, limit: int | None = LIMIT) -> None:
        super().__init__(dim=dim, patch=1, channels=channels)
        self.limit = limit

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        _refuse_large(image.shape[-2], image.shape[-1], self.limit)
        return super().forward(image)


class PixelPosition(LearnedPosition):
    """A learned position for every pixel of one image size.

    Raises:
        PolypatchError: the input has another size.
    """

    def forward(self, tokens: Tokens) -> Tokens:
        grid = (self.table.shape[1], self.table.shape[2])
        if tokens.grid != grid:
            raise PolypatchError(
                f"this network has positions for {grid[0]}×{grid[1]} pixels, the input has "
                f"{' × '.join(map(str, tokens.grid or tokens.canvas))}; resize it, or use "
                "position=sincos or none, which take any size"
            )
        return super().forward(tokens)


def _refuse_large(height: int, width: int, limit: int | None) -> None:
    if limit is not None and height * width > limit:
        raise PolypatchError(
            f"{height}×{width} pixels are {height * width} tokens, and attention costs their "
            f"square; use at most {limit} pixels (the paper: 28×28, 32×32) or set limit=None"
        )


def plug(
    host: ViT,
    *,
    position: str = "learned",
    resolution: int | Sequence[int] | None = None,
    limit: int | None = LIMIT,
) -> ViT:
    """Give the host one token per pixel; its blocks, class token, pooling and head stay.

    Args:
        position: "learned" (random at first, one per pixel), "sincos" (fixed, two-dimensional) or
            "none".
        resolution: size that learned positions are made for, a side or (height, width); default:
            the host's.
        limit: most pixels that an input may have; None: any number.

    Raises:
        PolypatchError: a host with another tokenizer than plain patches, an unknown option, or more
            pixels than ``limit``.
    """
    if not isinstance(host.patching, GridPatching):
        raise PolypatchError(
            "pixel-transformer replaces plain patches; this host's patching is "
            f"{type(host.patching).__name__} already"
        )
    if position not in POSITIONS:
        raise PolypatchError(
            f"there is no position={position!r}{suggest(str(position), POSITIONS)}"
        )
    size = host.resolution if resolution is None else resolution
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(height, width) < 1:
        raise PolypatchError(f"an image has at least one pixel a side, got {height}×{width}")
    _refuse_large(height, width, limit)
    reference = host.patching.proj.weight
    patching = PixelPatching(dim=host.dim, channels=reference.shape[1], limit=limit)
    new: Position
    if position == "learned":
        new = PixelPosition(grid=(height, width), dim=host.dim)
    else:
        new = SinCosPosition(dim=host.dim, patch=1.0) if position == "sincos" else NoPosition()
    host.patching = patching.to(device=reference.device, dtype=reference.dtype)
    host.position = new.to(device=reference.device, dtype=reference.dtype)
    if not reference.is_meta:
        init_transformer_weights(host.patching)
        host.position.init_weights()
    host.patch, host.resolution = 1, max(height, width)
    return host.plugged("pixel-transformer")


class Size(NamedTuple):
    dim: int
    depth: int
    heads: int
    hidden: int


#: The paper's table of model sizes: T, S, B, L.
VARIANTS: dict[str, Size] = {
    "pixel-transformer-tiny": Size(192, 12, 12, 768),
    "pixel-transformer-small": Size(384, 12, 12, 1536),
    "pixel-transformer-base": Size(768, 12, 12, 3072),
    "pixel-transformer-large": Size(1024, 24, 16, 4096),
}


def build(
    variant: str,
    *,
    classes: int = 1000,
    resolution: int = 28,
    channels: int = 3,
    position: str = "learned",
    pooling: str = "class",
    drop_path: float = 0.0,
    limit: int | None = LIMIT,
) -> ViT:
    """One of the paper's networks, initialised; it is a host with sockets.

    Args:
        resolution: input side; the paper has 28 (ImageNet, shrunk) and 32 (CIFAR-100).
        position: "learned", "sincos" or "none".
        pooling: "class" or "mean"; "mean" without positions makes a function of a set.
        drop_path: stochastic depth rate of the last block.
        limit: most pixels that an input may have; None: any number.

    Raises:
        PolypatchError: unknown variant or option, or more pixels than ``limit``.
    """
    if variant not in VARIANTS:
        raise PolypatchError(f"there is no {variant}{suggest(variant, VARIANTS, kind='variants')}")
    if pooling not in ("class", "mean"):
        raise PolypatchError(
            f"there is no pooling={pooling!r}{suggest(pooling, ['class', 'mean'])}"
        )
    dim, depth, heads, hidden = VARIANTS[variant]
    by_class = pooling == "class"
    _refuse_large(resolution, resolution, limit)
    model = assemble_vit(
        dim=dim,
        depth=depth,
        heads=heads,
        hidden=hidden,
        patch=1,
        grid=(1, 1),  # plug brings the positions
        classes=classes,
        channels=channels,
        pooling=pooling,
        prefix=int(by_class),
        positioned=int(by_class and position == "learned"),
        norm_pooled=not by_class,
        drop_path=drop_path,
    )
    model = plug(model, position=position, resolution=resolution, limit=limit)
    if not next(model.parameters()).is_meta:
        model.init_weights()
    return model


def masked_autoencoder(host: ViT, *, mask_ratio: float = 0.75, **decoder: Any) -> MaskedAutoencoder:
    """Masked autoencoding on the host's pixels. Targets are the pixels as they are: normalising the
    3 values of a "patch" would leave one number of two possible meanings.

    Args:
        decoder: ``width``, ``depth``, ``heads`` and ``masking`` of
            :class:`~polypatch.pretraining.mae.MaskedAutoencoder`.

    Raises:
        PolypatchError: the host's tokens aren't single pixels.
    """
    if host.patch != 1:
        raise PolypatchError(
            f"this host has patches of {host.patch} pixels; plug pixel-transformer into it first"
        )
    return MaskedAutoencoder(encoder=host, mask_ratio=mask_ratio, norm_pix=False, **decoder)


# ---- the paper's study of locality ---------------------------------------------------------------


def pixel_permutation(
    size: tuple[int, int],
    *,
    swaps: int,
    distance: int | None = None,
    generator: torch.Generator | None = None,
) -> Int64[Tensor, " pixels"]:
    """One permutation of an image's pixels, for a whole dataset: ``swaps`` random pairs, one after
    the other, exchange their places.

    Args:
        size: (height, width).
        distance: the farthest that the two places of a swap may lie apart in either direction;
            None: anywhere. (A pixel that is swapped twice can get farther.)

    Returns:
        For each place in raster order the place that its new pixel comes from.
    """
    height, width = size
    if height * width < 2:
        raise PolypatchError(f"there is nothing to swap in an image of {height}×{width}")
    if swaps < 0 or (distance is not None and distance < 1):
        raise PolypatchError(f"swaps={swaps} or distance={distance} is out of range")
    reach = max(size) if distance is None else distance
    first = torch.randint(height * width, (swaps,), generator=generator)
    y, x = first // width, first % width
    top, left = (y - reach).clamp_min(0), (x - reach).clamp_min(0)
    tall = (y + reach).clamp_max(height - 1) - top + 1
    wide = (x + reach).clamp_max(width - 1) - left + 1
    # A uniform place in the window around the first pixel, other than itself.
    itself = (y - top) * wide + (x - left)
    drawn = torch.rand(swaps, generator=generator, dtype=torch.float64)
    pick = (drawn * (tall * wide - 1)).long()
    pick = pick + (pick >= itself)
    second = (top + pick // wide) * width + left + pick % wide
    order = list(range(height * width))
    # Swaps build on each other, so this is a loop; it runs once per dataset.
    for a, b in zip(first.tolist(), second.tolist()):
        order[a], order[b] = order[b], order[a]
    return torch.tensor(order)


def shuffle_pixels(
    image: Float[Tensor, "*batch height width"], permutation: Int64[Tensor, " pixels"]
) -> Float[Tensor, "*batch height width"]:
    """The image with its pixels moved by :func:`pixel_permutation`."""
    if permutation.numel() != image.shape[-2] * image.shape[-1]:
        raise PolypatchError(
            f"a permutation of {permutation.numel()} pixels does not fit {image.shape[-2]}×"
            f"{image.shape[-1]}"
        )
    return image.flatten(-2)[..., permutation.to(image.device)].view(image.shape)
