"""Cutting images into a regular grid of patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError
from ..tokens import Tokens, raster_geometry

#: What images are normalised with, everywhere in the library: weights that go round expect it, and
#: parts that need the pixels themselves know how to get them back.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "GridPatching",
    "linear_of",
    "normalise",
    "patchify",
    "unpatchify",
]


def normalise(
    images: Float[Tensor, "*batch channels height width"],
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Float[Tensor, "*batch channels height width"]:
    """(images - mean) / std, per channel."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def patchify(
    image: Float[Tensor, "batch channels height width"], patch: tuple[int, int]
) -> Float[Tensor, "batch patches values"]:
    """Non-overlapping patches in raster order, each flattened as (row, column, channel)."""
    return rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=patch[0], q=patch[1])


def unpatchify(
    patches: Float[Tensor, "batch patches values"], patch: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "batch channels height width"]:
    """Inverse of :func:`patchify`."""
    return rearrange(
        patches,
        "b (h w) (p q c) -> b c (h p) (w q)",
        p=patch[0],
        q=patch[1],
        h=grid[0],
        w=grid[1],
    )


def linear_of(conv: nn.Conv2d) -> nn.Linear:
    """The linear layer on flattened (row, column, channel) patches that a patch convolution is."""
    linear = nn.Linear(
        conv.weight[0].numel(),
        conv.out_channels,
        bias=conv.bias is not None,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    with torch.no_grad():
        linear.weight.copy_(conv.weight.permute(0, 2, 3, 1).flatten(1))
        if conv.bias is not None:
            linear.bias.copy_(conv.bias)
    return linear.requires_grad_(conv.weight.requires_grad)


class GridPatching(nn.Module):
    """The plain ViT's tokenizer: equal square patches, one linear map (Dosovitskiy et al. 2021,
    eq. 1). Inputs that don't divide are padded with zeros at the bottom and on the right; a token
    on the border keeps the centre of its whole patch.

    Raises:
        PolypatchError: where the image is smaller than one patch.
    """

    def __init__(self, *, dim: int, patch: int, channels: int = 3, bias: bool = True) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch, bias=bias)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        height, width = image.shape[-2:]
        patch = self.patch
        if height < patch or width < patch:
            raise PolypatchError(
                f"the input is {height}×{width}, smaller than one patch of {patch}×{patch}; "
                f"use inputs of at least {patch} pixels a side or a smaller patch"
            )
        bottom, right = -height % patch, -width % patch
        if bottom or right:
            image = F.pad(image, (0, right, 0, bottom))
        features = self.proj(image)
        grid = (features.shape[-2], features.shape[-1])
        covered = (grid[0] * patch, grid[1] * patch)
        centre, extent = raster_geometry(grid, covered, device=image.device)
        return Tokens(
            x=features.flatten(2).transpose(1, 2),
            centre=centre[None],
            extent=extent[None],
            canvas=(height, width),
            grid=grid,
        )
