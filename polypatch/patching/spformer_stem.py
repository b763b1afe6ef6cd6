"""What stands in front of SPFormer's cross attention: the map of pixels, the first superpixels.

Parts of :mod:`polypatch.patching.spformer` (Mei et al. 2025, arXiv 2401.02931). Maps are channels
last, (batch, height, width, channels), from the stem's output on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest

__all__ = ["INITS", "Stem", "StemLayer", "SuperpixelInit", "stacked"]


@dataclass(frozen=True)
class StemLayer:
    """One layer of the stem. ``kind``: ``"conv"`` (convolution, norm, activation), ``"patch"``
    (without the activation), ``"lift-pool"`` (1 × 1 convolution, norm, activation, mean pooling)
    or ``"pool-lift"``."""

    channels: int
    kernel: int
    stride: int
    kind: str = "conv"


def stacked(*channels: int) -> tuple[StemLayer, ...]:
    """3 × 3 convolutions of stride 2."""
    return tuple(StemLayer(width, 3, 2) for width in channels)


class Stem(nn.Module):
    """Image → (batch, height / stride, width / stride, channels), convolution by convolution."""

    def __init__(
        self, *, layers: tuple[StemLayer, ...], channels: int = 3, norm: str = "layer"
    ) -> None:
        super().__init__()
        if norm not in ("layer", "batch"):
            raise PolypatchError(f"there is no norm={norm!r}; use 'layer' or 'batch'")
        self.layers = layers
        self.stride = math.prod(layer.stride for layer in layers)
        self.activation = F.gelu if norm == "layer" else F.relu
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for layer in layers:
            if layer.kind not in ("conv", "patch", "lift-pool", "pool-lift"):
                raise PolypatchError(f"a stem has no layers of kind {layer.kind!r}")
            strided = layer.kind in ("conv", "patch")
            kernel, stride = (layer.kernel, layer.stride) if strided else (1, 1)
            self.convs.append(nn.Conv2d(channels, layer.channels, kernel, stride, bias=False))
            batch = norm == "batch"
            width = layer.channels
            self.norms.append(nn.BatchNorm2d(width) if batch else nn.LayerNorm(width, eps=1e-6))
            channels = layer.channels

    def init_weights(self) -> None:
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # type: ignore
        for norm in self.norms:
            norm.reset_parameters()  # type: ignore[operator]

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tensor:
        x = image
        for layer, conv, norm in zip(self.layers, self.convs, self.norms, strict=True):
            if layer.kind == "pool-lift":
                x = F.avg_pool2d(x, layer.stride)
            kernel, stride = int(conv.kernel_size[0]), int(conv.stride[0])  # type: ignore
            pad = [max(0, (-(-n // stride) - 1) * stride + kernel - n) for n in x.shape[-2:]]
            if any(pad):  # "same": the odd pixel goes to the bottom and to the right
                top, left = pad[0] // 2, pad[1] // 2
                x = F.pad(x, (left, pad[1] - left, top, pad[0] - top))
            x = conv(x)
            if isinstance(norm, nn.LayerNorm):
                x = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            else:
                x = norm(x)
            if layer.kind != "patch":
                x = self.activation(x)
            if layer.kind == "lift-pool":
                x = F.avg_pool2d(x, layer.stride)
        return x.permute(0, 2, 3, 1)


INITS = ("lift-pool", "pool-lift", "conv", "patch", "learned")


class SuperpixelInit(nn.Module):
    """The first superpixels, one a cell.

    ``"lift-pool"``: mean over the cell of GELU(LN(W I)); ``"pool-lift"``: GELU(LN(W mean));
    ``"conv"``, ``"patch"``: a convolution as large as the cell and LN, with and without GELU;
    ``"learned"``: a table (std 0.02) that does not look at the image, resized bilinearly.
    """

    def __init__(
        self,
        *,
        pixel_dim: int,
        superpixel_dim: int,
        cell: int,
        kind: str = "lift-pool",
        grid: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        if kind not in INITS:
            raise PolypatchError(f"there is no init={kind!r}{suggest(kind, INITS)}")
        self.kind, self.cell = kind, cell
        self.table = self.lift = self.norm = None
        if kind == "learned":
            self.table = nn.Parameter(torch.zeros(1, superpixel_dim, *grid))
            return
        inputs = pixel_dim * cell**2 if kind in ("conv", "patch") else pixel_dim
        self.lift = nn.Linear(inputs, superpixel_dim, bias=False)
        self.norm = nn.LayerNorm(superpixel_dim, eps=1e-6)

    def init_weights(self) -> None:
        if self.table is not None:
            nn.init.normal_(self.table, std=0.02)
        if self.lift is not None and self.norm is not None:
            # A convolution of the cell's size counts its taps into the fan out as well.
            taps = self.cell**2 if self.kind in ("conv", "patch") else 1
            nn.init.normal_(self.lift.weight, std=math.sqrt(2 / (len(self.lift.weight) * taps)))
            self.norm.reset_parameters()

    def forward(
        self, pixels: Float[Tensor, "batch height width pixel_dim"]
    ) -> Float[Tensor, "batch rows columns superpixel_dim"]:
        grid = (pixels.shape[1] // self.cell, pixels.shape[2] // self.cell)
        if self.table is not None:
            table = self.table
            if table.shape[-2:] != grid:
                table = F.interpolate(table, size=grid, mode="bilinear", align_corners=False)
            return table.permute(0, 2, 3, 1).expand(len(pixels), -1, -1, -1)
        assert self.lift is not None
        assert self.norm is not None
        if self.kind == "lift-pool":
            return _pool(F.gelu(self.norm(self.lift(pixels))), grid)
        if self.kind == "pool-lift":
            return F.gelu(self.norm(self.lift(_pool(pixels, grid))))
        cells = rearrange(pixels, "b (r p) (c q) d -> b r c (p q d)", p=self.cell, q=self.cell)
        lifted = self.norm(self.lift(cells))
        return F.gelu(lifted) if self.kind == "conv" else lifted


def _pool(x: Float[Tensor, "batch height width dim"], grid: tuple[int, int]) -> Tensor:
    batch, height, width, dim = x.shape
    split = x.reshape(batch, grid[0], height // grid[0], grid[1], width // grid[1], dim)
    return split.mean((2, 4))
