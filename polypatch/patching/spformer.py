"""SPFormer: soft superpixels as tokens (Mei, Chen, Yuille and Xie, TMLR 2025, arXiv 2401.02931).

A convolutional stem makes a map of pixels; every token starts as the mean of one cell of it and is
refined by local cross attention, in which a token gathers from the pixels around it and a pixel
reads from the nine tokens around it. The tokens go through plain transformer blocks; between
stages they are spread back onto the pixels, and the next stage refines them again.

**Superpixel cross attention** (SCA). Pixels I (h × w, width Cp), superpixels S (R × S, width Cs),
each at home in a cell of p × q pixels. A pixel meets the 3 × 3 superpixels around its own cell, a
superpixel the 9pq pixels of the 3 × 3 cells around its own::

    q, k, v of S  =  LN(W_S (S + dw(S))),  widths Cp, Cp, Cp      q, k, v of I alike: Cp, Cp, Cs
    a[i, s]  =  q_s · k_i / sqrt(d)      ΔS_s = Σ_i softmax over the 9pq pixels of s (a) v_i
    b[i, s]  =  q_i · k_s / sqrt(d)      ΔI_i = Σ_s softmax over the 9 superpixels of i (b) v_s
    S ← S + γ_S ΔS ,   I ← I + γ_I ΔI    both from the old S and I; neighbours outside: -inf

with dw a depthwise 3 × 3 convolution (a conditional position code), one layer norm over the
concatenated q, k, v, no bias, no output projection, heads as contiguous groups of channels. It runs
t = 2 times per stage with separate weights. A stage ends with I ← I_in + γ · spread(LN(W tokens)),
spread by the softmax over nine of the stage's last a, and the next stage starts from the tokens.

**How it is computed here.** The softmax of a superpixel runs over pixels of nine cells. Instead of
turning the logits round to the superpixel's view (copies of nine times the pixel map), the maximum
and the sum of each cell are folded onto the superpixels: ΔS = fold(eᵀ v) / fold(Σ e) with
e = exp(a - max). What is copied nine-fold are superpixels only, which are pq times fewer.

**Paper and code.** The authors released no code; the definitions follow research code of the first
author that a later project carries, and which of its variants are the published T/S/B is inferred
from widths, depths and parameter counts. Facts that one would not guess: the last iteration of a
stage updates no pixels (``updates_pixels``; its unused parts of q, k, v still take part in the
layer norm); spreading starts from the pixels that *entered* the stage (``carries_pixels`` gives the
updated ones); γ starts at 1e-5, so an untrained network is a ViT of pooled patches; strided
convolutions pad as TensorFlow's "same" (a 3 × 3 stride-2 convolution on an even side only at the
bottom and on the right); the stem's norm and activation are a layer norm and GELU here, batch norm
and ReLU in some versions of the code (``norm="batch"``).

**Traps.** The two softmax axes; the borders, which are -inf before both; the attention width is Cp
and its scale that of one head of it. Regions (:func:`hard_labels`) are the argmax of the logits,
heads merged, with 1e-5 added to a pixel's own cell, so that equal logits stay at home.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..hosts.vit import Block, Context, InputRequirements, Prefix, ViT
from ..nn import Attention, LayerScale, LearnedPosition, Mlp
from ..tokens import Tokens, raster_geometry

__all__ = [
    "VARIANTS",
    "SPFormer",
    "Segmentation",
    "SuperpixelCrossAttention",
    "SuperpixelPatching",
    "Variant",
    "assign_weights",
    "build",
    "from_cells",
    "from_official",
    "hard_labels",
    "layer_from_official",
    "neighbours",
    "plug",
    "recognise",
    "similarities",
    "spread",
    "to_cells",
    "update",
    "update_weights",
]

OWN = 4  # a cell's own superpixel among its neighbours n = 3 (dy + 1) + (dx + 1)
_STEPS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


# ---- the algorithm, on tensors -------------------------------------------------------------------


def to_cells(
    pixels: Shaped[Tensor, "batch height width dim"], grid: tuple[int, int], heads: int = 1
) -> Shaped[Tensor, "batch rows columns heads cell head_dim"]:
    """Pixels sorted by the cell that they lie in, and channels by head."""
    batch, height, width, dim = pixels.shape
    rows, columns = grid
    split = pixels.reshape(
        batch, rows, height // rows, columns, width // columns, heads, dim // heads
    )
    return split.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)


def from_cells(
    cells: Shaped[Tensor, "batch rows columns heads cell head_dim"], cell: tuple[int, int]
) -> Shaped[Tensor, "batch height width dim"]:
    """Inverse of :func:`to_cells`; ``cell`` is (p, q)."""
    batch, rows, columns, heads, _, dim = cells.shape
    split = cells.unflatten(4, cell).permute(0, 1, 4, 2, 5, 3, 6)
    return split.reshape(batch, rows * cell[0], columns * cell[1], heads * dim)


def neighbours(
    x: Float[Tensor, "batch rows columns *rest"], *, axis: int = -2, outside: float = 0.0
) -> Tensor:
    """The 3 × 3 neighbourhood of every place of a map, stacked along a new ``axis``."""
    rows, columns = x.shape[1:3]
    padded = F.pad(x, (0, 0) * (x.ndim - 3) + (1, 1, 1, 1), value=outside)
    shifted = [padded[:, 1 + dy : 1 + dy + rows, 1 + dx : 1 + dx + columns] for dy, dx in _STEPS]
    return torch.stack(shifted, dim=axis)


def fold(y: Tensor, *, axis: int = -2, largest: bool = False) -> Tensor:
    """Adjoint of :func:`neighbours`: what every place gave to its nine neighbours, summed (or the
    ``largest`` of it) at the receiver."""
    rows, columns = y.shape[1:3]
    empty = float("-inf") if largest else 0.0
    padded = F.pad(y, (0, 0) * (y.ndim - 3) + (1, 1, 1, 1), value=empty)
    total = None
    for (dy, dx), given in zip(_STEPS, padded.unbind(axis), strict=True):
        part = given[:, 1 - dy : 1 - dy + rows, 1 - dx : 1 - dx + columns]
        if total is None:
            total = part
        else:
            total = torch.maximum(total, part) if largest else total + part
    assert total is not None
    return total


def border(
    grid: tuple[int, int], like: Tensor, outside: float
) -> Float[Tensor, "1 rows columns 9"]:
    """0 for the neighbours of a cell that exist, ``outside`` for those beyond the image."""
    return neighbours(like.new_zeros(1, *grid), axis=-1, outside=outside)


def similarities(
    pixels: Float[Tensor, "batch rows columns heads cell head_dim"],
    superpixels: Float[Tensor, "batch rows columns heads head_dim"],
) -> Float[Tensor, "batch rows columns heads cell 9"]:
    """Scaled dot products of every pixel with the nine superpixels around its cell. Those outside
    of the image have 0 here; every function that normalises takes them out."""
    around = neighbours(superpixels * superpixels.shape[-1] ** -0.5)
    return pixels @ around.transpose(-1, -2)


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """e = exp(logits - the receiving superpixel's maximum), 0 outside, and each superpixel's sum.

    The maximum cancels in the softmax, so no gradient has to pass through it.
    """
    top = fold(logits.detach().amax(-2), axis=-1, largest=True)
    e = (logits - neighbours(top, axis=-1, outside=float("inf"))[..., None, :]).exp()
    return e, fold(e.sum(-2), axis=-1)


def update(
    logits: Float[Tensor, "batch rows columns heads cell 9"],
    values: Float[Tensor, "batch rows columns heads cell head_dim"],
) -> Float[Tensor, "batch rows columns heads head_dim"]:
    """Superpixels gather from pixels: softmax over the 9pq pixels around each superpixel."""
    e, total = _exponentials(logits)
    return fold(e.to(values.dtype).transpose(-1, -2) @ values) / total[..., None].to(values.dtype)


def assign_weights(
    logits: Float[Tensor, "batch rows columns heads cell 9"],
) -> Float[Tensor, "batch rows columns heads cell 9"]:
    """How each pixel divides itself among the nine superpixels around its cell."""
    grid = (logits.shape[1], logits.shape[2])
    outside = border(grid, logits, float("-inf"))[:, :, :, None, None]
    return (logits + outside).softmax(-1)


def spread(
    logits: Float[Tensor, "batch rows columns heads cell 9"],
    values: Float[Tensor, "batch rows columns heads head_dim"],
) -> Float[Tensor, "batch rows columns heads cell head_dim"]:
    """Pixels read from superpixels: softmax over the nine superpixels around each pixel's cell."""
    return assign_weights(logits).to(values.dtype) @ neighbours(values)


def update_weights(
    logits: Float[Tensor, "batch rows columns heads cell 9"],
) -> Float[Tensor, "batch rows columns heads 9 cell"]:
    """The weights in :func:`update` from the superpixels' side: how much each one takes from every
    pixel of the nine cells around it (raster order). For looking at; :func:`update` needs no such
    array."""
    e, total = _exponentials(logits)
    share = e / neighbours(total, axis=-1, outside=1.0)[..., None, :]
    # The cell that lies at step c from a superpixel has that superpixel as neighbour 8 - c.
    around = neighbours(share.flip(-1), axis=4)  # (batch, rows, columns, heads, 9, cell, 9)
    return around.diagonal(dim1=4, dim2=6).transpose(-1, -2)


def merge_heads(
    logits: Float[Tensor, "batch rows columns heads cell 9"],
) -> Float[Tensor, "batch rows columns 1 cell 9"]:
    """Logits of one head that has all channels: the sum, with the scale of the wider head."""
    return logits.sum(3, keepdim=True) / math.sqrt(logits.shape[3])


def enlarge(
    logits: Float[Tensor, "batch rows columns heads cell 9"], cell: tuple[int, int], factor: int
) -> Float[Tensor, "batch rows columns heads larger_cell 9"]:
    """Logits of a finer pixel map, bilinear inside of each cell. Across cells the same entry means
    another superpixel, so cells are never mixed."""
    if factor == 1:
        return logits
    maps = logits.transpose(-1, -2).reshape(-1, 9, *cell)
    maps = F.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2).unflatten(0, logits.shape[:4])


@torch.no_grad()
def hard_labels(
    logits: Float[Tensor, "batch rows columns heads cell 9"], cell: tuple[int, int]
) -> Int64[Tensor, "batch height width"]:
    """The superpixel (raster index) that each pixel is most similar to; a pixel's own cell has a
    lead of 1e-5, so ties stay at home; further ties go to the first in raster order."""
    rows, columns = logits.shape[1:3]
    lead = torch.zeros(9, device=logits.device, dtype=torch.float32)
    lead[OWN] = 1e-5
    outside = border((rows, columns), lead, float("-inf"))[:, :, :, None]
    best = (merge_heads(logits)[:, :, :, 0].float() + outside + lead).argmax(-1)
    home = torch.arange(rows * columns, device=logits.device).view(1, rows, columns, 1)
    # Step (dy, dx) of n is (n // 3 - 1, n % 3 - 1).
    labels = home + (best // 3 - 1) * columns + best % 3 - 1
    return from_cells(labels[:, :, :, None, :, None], cell)[..., 0]


@torch.no_grad()
def region_geometry(
    labels: Int64[Tensor, "batch height width"],
    grid: tuple[int, int],
    step: tuple[float, float],
) -> tuple[Float[Tensor, "batch tokens 2"], Float[Tensor, "batch tokens 2"]]:
    """Centroid and size of the bounding box of every region, in input pixels; a superpixel that
    won no pixel lies at its cell and has no size. ``step`` is the side of a label's pixel."""
    batch, height, width = labels.shape
    count = grid[0] * grid[1]
    device = labels.device
    y = (torch.arange(height, device=device) + 0.5).view(-1, 1).expand(height, width)
    x = (torch.arange(width, device=device) + 0.5).expand(height, width)
    at = torch.stack([torch.ones_like(y), y, x], dim=-1).flatten(0, 1).expand(batch, -1, -1)
    index = labels.flatten(1)[..., None]
    sums = at.new_zeros(batch, count, 3).scatter_add(1, index.expand(-1, -1, 3), at)
    # One reduction gives both ends of the box: the smallest of (y, x, -y, -x).
    ends = torch.cat([at[..., 1:], -at[..., 1:]], dim=-1)
    low = at.new_full((batch, count, 4), float("inf"))
    low = low.scatter_reduce(1, index.expand(-1, -1, 4), ends, "amin")
    pixel = torch.tensor(step, device=device)
    home, _ = raster_geometry(grid, (height, width), device=device)
    won = sums[..., :1] > 0
    centre = torch.where(won, sums[..., 1:] / sums[..., :1].clamp_min(1), home) * pixel
    extent = torch.where(won, -low[..., 2:] - low[..., :2] + 1, 0.0) * pixel
    return centre, extent


# ---- modules -------------------------------------------------------------------------------------


class Refined(NamedTuple):
    """What one :class:`SuperpixelCrossAttention` gives. ``pixels`` are the old ones where it
    updates none; then ``pixel_similarities`` is None unless it was asked to compare."""

    pixels: Float[Tensor, "batch height width pixel_dim"]
    superpixels: Float[Tensor, "batch rows columns superpixel_dim"]
    similarities: Float[Tensor, "batch rows columns heads cell 9"]
    pixel_similarities: Float[Tensor, "batch rows columns heads cell 9"] | None


class SuperpixelCrossAttention(nn.Module):
    """One refinement of pixels and superpixels by each other, see above.

    Args:
        pixel_dim, superpixel_dim: widths Cp and Cs.
        heads: of the superpixels' gathering; ``pixel_heads`` of the pixels' reading, default equal.
        update_width, assign_width: widths of queries and keys of the two, default Cp.
        position: ``"depthwise"``, ``"learned"`` or ``"none"``.
        gamma: start of the residual gains γ; None: no gains.
        updates_pixels: False in the last iteration of a stage.
        compares_pixels: gives the pixels' similarities even where it updates no pixels.
        tables: for ``"learned"``: sizes of the tables of pixels and superpixels, each resized
            bilinearly to the map.
    """

    def __init__(
        self,
        *,
        pixel_dim: int,
        superpixel_dim: int,
        heads: int,
        pixel_heads: int | None = None,
        update_width: int | None = None,
        assign_width: int | None = None,
        position: str = "depthwise",
        gamma: float | None = 1e-5,
        updates_pixels: bool = True,
        compares_pixels: bool = False,
        tables: tuple[tuple[int, int], tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.pixel_heads = pixel_heads or heads
        update_width = update_width or pixel_dim
        assign_width = assign_width or pixel_dim
        for what, width, count in (
            ("superpixels' queries", update_width, heads),
            ("superpixels", superpixel_dim, heads),
            ("pixels' queries", assign_width, self.pixel_heads),
            ("pixels", pixel_dim, self.pixel_heads),
        ):
            if width % count:
                raise PolypatchError(
                    f"{width} channels of the {what} don't divide into {count} heads; "
                    f"use heads={math.gcd(width, count)} or another width"
                )
        self.updates_pixels = updates_pixels
        self.compares_pixels = compares_pixels or updates_pixels
        self.superpixel_parts = (update_width, assign_width, pixel_dim)
        self.pixel_parts = (assign_width, update_width, superpixel_dim)
        self.superpixel_qkv = nn.Linear(superpixel_dim, sum(self.superpixel_parts), bias=False)
        self.superpixel_norm = nn.LayerNorm(sum(self.superpixel_parts), eps=1e-6)
        self.pixel_qkv = nn.Linear(pixel_dim, sum(self.pixel_parts), bias=False)
        self.pixel_norm = nn.LayerNorm(sum(self.pixel_parts), eps=1e-6)
        self.superpixel_place = _place(position, superpixel_dim, tables and tables[1])
        self.pixel_place = _place(position, pixel_dim, tables and tables[0])
        self.superpixel_scale: nn.Module = nn.Identity()
        self.pixel_scale: nn.Module = nn.Identity()
        if gamma is not None:
            self.superpixel_scale = LayerScale(dim=superpixel_dim, init=gamma)
            if updates_pixels:
                self.pixel_scale = LayerScale(dim=pixel_dim, init=gamma)

    def init_weights(self) -> None:
        """Projections normal with std 0.02, cut at 2 (not at 2 std); depthwise convolutions normal
        by fan out; gains at their start."""
        for layer in (self.superpixel_qkv, self.pixel_qkv):
            nn.init.trunc_normal_(layer.weight, std=0.02)
        for norm in (self.superpixel_norm, self.pixel_norm):
            norm.reset_parameters()
        for scale in (self.superpixel_scale, self.pixel_scale):
            if isinstance(scale, LayerScale):
                nn.init.constant_(scale.gamma, scale.init)

    def forward(
        self,
        pixels: Float[Tensor, "batch height width pixel_dim"],
        superpixels: Float[Tensor, "batch rows columns superpixel_dim"],
    ) -> Refined:
        grid = (superpixels.shape[1], superpixels.shape[2])
        cell = (pixels.shape[1] // grid[0], pixels.shape[2] // grid[1])
        parts = self.superpixel_norm(self.superpixel_qkv(self.superpixel_place(superpixels)))
        query, key, value = parts.split(self.superpixel_parts, dim=-1)
        parts = self.pixel_norm(self.pixel_qkv(self.pixel_place(pixels)))
        pixel_query, pixel_key, pixel_value = parts.split(self.pixel_parts, dim=-1)

        logits = similarities(to_cells(pixel_key, grid, self.heads), _by_head(query, self.heads))
        taken = update(logits, to_cells(pixel_value, grid, self.heads)).flatten(3)
        superpixels = superpixels + self.superpixel_scale(taken)
        if not self.compares_pixels:
            return Refined(pixels, superpixels, logits, None)

        pixel_logits = similarities(
            to_cells(pixel_query, grid, self.pixel_heads), _by_head(key, self.pixel_heads)
        )
        if not self.updates_pixels:
            return Refined(pixels, superpixels, logits, pixel_logits)
        read = from_cells(spread(pixel_logits, _by_head(value, self.pixel_heads)), cell)
        return Refined(pixels + self.pixel_scale(read), superpixels, logits, pixel_logits)


def _by_head(x: Float[Tensor, "batch rows columns dim"], heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


class DepthwisePlace(nn.Module):
    """x + depthwise 3 × 3 convolution of x: a position code that the surroundings write."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def init_weights(self) -> None:
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Tensor:
        return x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class TablePlace(nn.Module):
    """x + a learned map, resized bilinearly."""

    def __init__(self, *, dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, dim, *size))

    def init_weights(self) -> None:
        nn.init.zeros_(self.table)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Tensor:
        size = (x.shape[1], x.shape[2])
        table = F.interpolate(self.table, size=size, mode="bilinear", align_corners=False)
        return x + table.permute(0, 2, 3, 1)


def _place(kind: str, dim: int, size: tuple[int, int] | None) -> nn.Module:
    if kind == "depthwise":
        return DepthwisePlace(dim=dim)
    if kind == "none":
        return nn.Identity()
    if kind == "learned":
        if size is None or min(size) < 2:
            raise PolypatchError("position='learned' needs tables of at least 2×2 (tables=...)")
        return TablePlace(dim=dim, size=size)
    known = ("depthwise", "learned", "none")
    raise PolypatchError(f"there is no position={kind!r}{suggest(kind, known)}")


@dataclass(frozen=True)
class StemLayer:
    """One layer of the stem. ``kind``: ``"conv"`` (convolution, norm, activation), ``"patch"``
    (without the activation), ``"lift-pool"`` (1 × 1 convolution, norm, activation, mean pooling)
    or ``"pool-lift"``."""

    channels: int
    kernel: int
    stride: int
    kind: str = "conv"


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
        lifted = self.norm(self.lift(to_cells(pixels, grid)[:, :, :, 0].flatten(3)))
        return F.gelu(lifted) if self.kind == "conv" else lifted


def _pool(x: Float[Tensor, "batch height width dim"], grid: tuple[int, int]) -> Tensor:
    batch, height, width, dim = x.shape
    split = x.reshape(batch, grid[0], height // grid[0], grid[1], width // grid[1], dim)
    return split.mean((2, 4))


def _padded(image: Tensor, multiple: int) -> Tensor:
    height, width = image.shape[-2:]
    if height < multiple or width < multiple:
        raise PolypatchError(
            f"the input is {height}×{width}, smaller than one superpixel of {multiple}×{multiple}; "
            f"use inputs of at least {multiple} pixels a side or smaller cells"
        )
    bottom, right = -height % multiple, -width % multiple
    return F.pad(image, (0, right, 0, bottom)) if bottom or right else image


def _as_tokens(
    superpixels: Float[Tensor, "batch rows columns dim"],
    logits: Float[Tensor, "batch rows columns heads cell 9"],
    *,
    cell: int,
    stride: int,
    canvas: tuple[int, int],
) -> Tokens:
    """Superpixels with their places: hard regions at the resolution of the pixel map (at the
    input's where it had to be padded), their centroids and bounding boxes."""
    grid = (superpixels.shape[1], superpixels.shape[2])
    labels = hard_labels(logits, (cell, cell))
    step = float(stride)
    if (labels.shape[1] * stride, labels.shape[2] * stride) != canvas:
        labels = labels.repeat_interleave(stride, 1).repeat_interleave(stride, 2)
        labels, step = labels[:, : canvas[0], : canvas[1]], 1.0
    centre, extent = region_geometry(labels, grid, (step, step))
    return Tokens(
        x=superpixels.flatten(1, 2),
        centre=centre,
        extent=extent,
        canvas=canvas,
        regions=labels,
        grid=grid,
    )


class SuperpixelPatching(nn.Module):
    """The tokenizer by itself: stem, first superpixels, ``iterations`` of cross attention.

    Image (batch, channels, height, width) → :class:`Tokens` in the raster order of their cells,
    with ``regions``; sides that don't divide are padded with zeros at the bottom and on the right.
    ``patch`` = stride of the stem times ``cell``: one token is at home in patch × patch pixels.
    """

    def __init__(
        self, *, stem: Stem, init: SuperpixelInit, layers: list[SuperpixelCrossAttention]
    ) -> None:
        super().__init__()
        self.stem = stem
        self.init = init
        self.layers = nn.ModuleList(layers)
        self.patch = stem.stride * init.cell

    @property
    def input_requirements(self) -> InputRequirements:
        return InputRequirements(minimum=self.patch)

    def init_weights(self) -> None:
        """Parts of it initialise themselves; this is for calling on a part just built."""
        for module in self.modules():
            if module is not self and callable(getattr(module, "init_weights", None)):
                module.init_weights()  # type: ignore[operator]

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        canvas = (image.shape[-2], image.shape[-1])
        pixels = self.stem(_padded(image, self.patch))
        superpixels = self.init(pixels)
        refined = _refine(self.layers, pixels, superpixels)
        return _as_tokens(
            refined.superpixels,
            refined.similarities,
            cell=self.init.cell,
            stride=self.stem.stride,
            canvas=canvas,
        )


def _refine(layers: nn.ModuleList, pixels: Tensor, superpixels: Tensor) -> Refined:
    refined = None
    for layer in layers:
        refined = layer(pixels, superpixels)
        pixels, superpixels = refined.pixels, refined.superpixels
    assert refined is not None
    return refined


# ---- the complete network ------------------------------------------------------------------------


class HandOver(nn.Module):
    """Tokens back onto pixels between two stages: I + γ · spread(LN(W tokens))."""

    def __init__(
        self,
        *,
        pixel_dim: int,
        superpixel_dim: int,
        gamma: float | None,
        activation: bool,
        carries_pixels: bool,
        pixel_view: bool,
    ) -> None:
        super().__init__()
        self.activation, self.carries_pixels = activation, carries_pixels
        self.pixel_view = pixel_view
        self.project = nn.Linear(superpixel_dim, pixel_dim, bias=False)
        self.norm = nn.LayerNorm(pixel_dim, eps=1e-6)
        self.scale = nn.Identity() if gamma is None else LayerScale(dim=pixel_dim, init=gamma)

    def init_weights(self) -> None:
        nn.init.kaiming_normal_(self.project.weight, mode="fan_out", nonlinearity="relu")
        self.norm.reset_parameters()
        if isinstance(self.scale, LayerScale):
            nn.init.constant_(self.scale.gamma, self.scale.init)

    def forward(
        self,
        entered: Float[Tensor, "batch height width pixel_dim"],
        refined: Refined,
        superpixels: Float[Tensor, "batch rows columns superpixel_dim"],
    ) -> Float[Tensor, "batch height width pixel_dim"]:
        logits = refined.pixel_similarities if self.pixel_view else refined.similarities
        assert logits is not None
        values = self.norm(self.project(superpixels))
        if self.activation:
            values = F.gelu(values)
        grid = (superpixels.shape[1], superpixels.shape[2])
        cell = (entered.shape[1] // grid[0], entered.shape[2] // grid[1])
        given = from_cells(spread(logits, _by_head(values, logits.shape[3])), cell)
        return (refined.pixels if self.carries_pixels else entered) + self.scale(given)


class Stage(nn.Module):
    """Cross attention, position, transformer blocks and, but for the last stage, the hand-over."""

    def __init__(
        self,
        *,
        layers: list[SuperpixelCrossAttention],
        position: LearnedPosition | None,
        prefix: Prefix | None,
        blocks: list[Block],
        hand_over: HandOver | None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.position = position
        self.prefix = prefix
        self.blocks = nn.ModuleList(blocks)
        self.hand_over = hand_over

    def forward(
        self, pixels: Tensor, superpixels: Tensor, canvas: tuple[int, int]
    ) -> tuple[Tensor, Tokens, Refined]:
        """Pixels for the next stage, the tokens behind the blocks, and the refinement itself."""
        refined = _refine(self.layers, pixels, superpixels)
        # Blocks see no place but the learned one, so the geometry is added at the very end.
        tokens = Tokens.from_grid(refined.superpixels.permute(0, 3, 1, 2), canvas=canvas)
        if self.position is not None:
            tokens = self.position(tokens)
        if self.prefix is not None:
            tokens = self.prefix(tokens)
        for block in self.blocks:
            tokens = block(tokens, Context(None, None, None))
        if self.hand_over is not None:
            grid = refined.superpixels.shape[1:3]
            pixels = self.hand_over(pixels, refined, tokens.placed.unflatten(1, grid))
        return pixels, tokens, refined


class Segmentation(NamedTuple):
    """Class logits of the superpixels, and spread over the pixels."""

    superpixels: Float[Tensor, "batch classes rows columns"]
    pixels: Float[Tensor, "batch classes height width"]


class SPFormer(nn.Module):
    """The network of section 3: stem, superpixels, stages, mean of the tokens, norm, classifier.

    Args:
        stem, init, stages: the parts; :func:`build` passes the published ones.
        head: classifier; ``segmentation`` classifies single tokens for :meth:`segment`.
        class_token: the last stage has a class token, which the head reads behind a norm of all
            tokens, instead of the mean of the tokens in front of a norm.
    """

    def __init__(
        self,
        *,
        dim: int,
        stem: Stem,
        init: SuperpixelInit,
        stages: list[Stage],
        classes: int,
        segmentation: int = 0,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.stem = stem
        self.init = init
        self.stages = nn.ModuleList(stages)
        self.class_token = class_token
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head: nn.Module = nn.Linear(dim, classes) if classes else nn.Identity()
        self.seg_norm = nn.LayerNorm(dim, eps=1e-6) if segmentation else None
        self.seg_head = nn.Linear(dim, segmentation) if segmentation else None
        self.patch = stem.stride * init.cell

    def _run(self, image: Tensor) -> tuple[list[Tokens], list[Refined]]:
        canvas = (image.shape[-2], image.shape[-1])
        pixels = self.stem(_padded(image, self.patch))
        superpixels = self.init(pixels)
        behind, refinements = [], []
        for stage in self.stages:
            pixels, tokens, refined = stage(pixels, superpixels, canvas)
            grid = superpixels.shape[1:3]
            superpixels = tokens.placed.unflatten(1, grid)
            behind.append(tokens)
            refinements.append(refined)
        return behind, refinements

    def forward_features(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        """The last stage's tokens, without a final norm, with the regions that they won."""
        behind, refinements = self._run(image)
        last = refinements[-1]
        placed = _as_tokens(
            last.superpixels,
            last.similarities,
            cell=self.init.cell,
            stride=self.stem.stride,
            canvas=(image.shape[-2], image.shape[-1]),
        )
        if behind[-1].prefix:
            placed = placed.with_prefix(behind[-1].x[:, : behind[-1].prefix])
        return placed.with_x(behind[-1].x)

    def pool(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        if self.class_token:
            return self.norm(tokens.x)[:, 0]
        return self.norm(tokens.placed.mean(1))

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        return self.head(self.pool(self._run(image)[0][-1]))

    def segment(
        self, image: Float[Tensor, "batch channels height width"], *, stride: int | None = None
    ) -> Segmentation:
        """Class logits of the superpixels and of the pixels, these at ``stride`` (a divisor of the
        stem's, which is the default): similarities are enlarged inside of each cell, their heads
        merged, and each pixel mixes the logits of its nine superpixels.

        Raises:
            PolypatchError: a network without segmentation head, or a stride that doesn't divide.
        """
        if self.seg_head is None or self.seg_norm is None:
            raise PolypatchError(
                "this network has no segmentation head; build it with segmentation="
            )
        stride = stride or self.stem.stride
        if self.stem.stride % stride:
            raise PolypatchError(
                f"stride={stride} does not divide the stem's stride of {self.stem.stride}"
            )
        behind, refinements = self._run(image)
        tokens, last = behind[-1], refinements[-1]
        logits = self.seg_head(self.seg_norm(tokens.placed))
        logits = logits.unflatten(1, last.superpixels.shape[1:3])
        factor, cell = self.stem.stride // stride, self.init.cell
        finer = enlarge(merge_heads(last.similarities), (cell, cell), factor)
        pixels = from_cells(spread(finer, logits[:, :, :, None]), (cell * factor, cell * factor))
        return Segmentation(logits.permute(0, 3, 1, 2), pixels.permute(0, 3, 1, 2))

    @torch.no_grad()
    def hard_maps(
        self, image: Float[Tensor, "batch channels height width"], *, stride: int | None = None
    ) -> list[Int64[Tensor, "batch tall wide"]]:
        """Every stage's superpixels as label maps at ``stride`` (default: the stem's)."""
        factor, cell = self.stem.stride // (stride or self.stem.stride), self.init.cell
        return [
            hard_labels(
                enlarge(merge_heads(refined.similarities), (cell, cell), factor),
                (cell * factor, cell * factor),
            )
            for refined in self._run(image)[1]
        ]

    @property
    def input_requirements(self) -> InputRequirements:
        return InputRequirements(minimum=self.patch)

    def reset_head(self, classes: int) -> None:
        """A fresh classifier; 0: none, the pooled features come out."""
        device = self.norm.weight.device
        self.head = nn.Linear(self.dim, classes, device=device) if classes else nn.Identity()
        _init_linear(self.head)

    def no_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone."""
        special = ("position.table", "prefix.", "init.table")
        return {
            name
            for name, value in self.named_parameters()
            if value.ndim <= 1 or any(part in name for part in special)
        }

    def init_weights(self) -> None:
        """The authors' initialisation.

        | layer                       | weight                        | bias |
        |-----------------------------|-------------------------------|------|
        | Linear of blocks and heads  | normal, std 0.02, cut         | 0    |
        | q, k, v of cross attention  | normal, std 0.02, cut         |      |
        | other convolutions          | normal, std sqrt(2 / fan out) | 0    |
        | positions                   | normal, std 0.02, cut         |      |
        | class token                 | normal, std 1e-6              |      |
        | gains γ                     | their start, 1e-5             |      |
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for part in (self.head, self.seg_head, *(stage.blocks for stage in self.stages)):
            for module in part.modules() if isinstance(part, nn.Module) else ():
                _init_linear(module)
        for module in self.modules():
            if module is not self and callable(getattr(module, "init_weights", None)):
                module.init_weights()  # type: ignore[operator]


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Sizes of a network. ``heads`` are the blocks', ``cross_heads`` those of cross attention."""

    stem: tuple[StemLayer, ...]
    dim: int
    heads: int
    cross_heads: int = 2
    depths: tuple[int, ...] = (2, 10)
    iterations: int = 2
    cell: int = 4
    init: str = "lift-pool"
    position: str = "depthwise"
    norm: str = "layer"


_TINY = Variant(stem=(StemLayer(32, 4, 4),), dim=192, heads=3)
_SMALL = Variant(stem=(StemLayer(64, 4, 4),), dim=384, heads=6)
_BASE = Variant(stem=(StemLayer(96, 4, 4),), dim=768, heads=12, cross_heads=3)


def _stacked(*channels: int) -> tuple[StemLayer, ...]:
    return tuple(StemLayer(width, 3, 2) for width in channels)


#: T, S, B as DeiT's; the others are named after what they change: "-stacked" stems of 3 × 3
#: convolutions, "-32": stem of stride 8, so 49 superpixels of 224 px, "-cross4": heads of cross
#: attention, "-once": one iteration, "-stage": all twelve blocks in one stage.
VARIANTS: dict[str, Variant] = {
    "spformer-tiny": _TINY,
    "spformer-small": _SMALL,
    "spformer-base": _BASE,
    "spformer-tiny-cross1": replace(_TINY, cross_heads=1),
    "spformer-tiny-stacked": replace(_TINY, stem=_stacked(16, 32)),
    "spformer-small-32": replace(_SMALL, stem=(StemLayer(64, 8, 8),)),
    "spformer-small-stacked": replace(_SMALL, stem=_stacked(32, 64)),
    "spformer-small-stacked-32": replace(_SMALL, stem=_stacked(16, 32, 64)),
    "spformer-small-cross4": replace(_SMALL, cross_heads=4),
    "spformer-small-once": replace(_SMALL, cross_heads=4, iterations=1),
    "spformer-small-stage": replace(_SMALL, cross_heads=1, depths=(12,)),
    "spformer-base-stacked": replace(_BASE, stem=_stacked(48, 96)),
}


def assemble(
    variant: Variant,
    *,
    classes: int,
    grid: tuple[int, int],
    channels: int = 3,
    segmentation: int = 0,
    drop_path: float | int = 0.0,
    gamma: float | None = 1e-5,
    handover_gamma: float | None = 1e-5,
    class_token: bool = False,
    positioned_class: bool = True,
    positions: bool = True,
    activated_handover: bool = False,
    carries_pixels: bool = False,
    pixel_view: bool = False,
    fixed_pixels: bool = False,
    table_strides: tuple[int, int] = (4, 4),
) -> SPFormer:
    """Wire a network from numbers, without filling the weights.

    Args:
        grid: superpixels (rows, columns) that learned positions are made for.
        positioned_class: the class token has a row of its own in the position table.
        carries_pixels: the hand-over starts from the pixels that the stage has updated; then the
            last iteration updates them as well.
        pixel_view: the hand-over spreads by the pixels' own similarities (needs the former).
        fixed_pixels: no iteration updates pixels.
        table_strides: for ``position="learned"``, of the pixels' and the superpixels' table.
    """
    pixel_dim, depths = variant.stem[-1].channels, variant.depths
    if pixel_view and (fixed_pixels or not carries_pixels):
        raise PolypatchError(
            "the pixels' own similarities of the last iteration exist only where it updates "
            "pixels; pixel_view needs carries_pixels and no fixed_pixels"
        )
    sides = tuple(n * variant.cell for n in grid)
    tables = None
    if variant.position == "learned":
        tables = (
            (-(-sides[0] // table_strides[0]), -(-sides[1] // table_strides[0])),
            (-(-grid[0] // table_strides[1]), -(-grid[1] // table_strides[1])),
        )
    total = sum(depths)

    def block(number: int) -> Block:
        return Block(
            dim=variant.dim,
            mixing=Attention(dim=variant.dim, heads=variant.heads),
            mlp=Mlp(dim=variant.dim, hidden=4 * variant.dim),
            norm=lambda width: nn.LayerNorm(width, eps=1e-6),
            drop_path=drop_path * number / max(1, total - 1),
        )

    def stage(index: int) -> Stage:
        last = index == len(depths) - 1
        with_class = class_token and last
        positioned = int(with_class and positions and positioned_class)
        first = sum(depths[:index])
        return Stage(
            layers=[
                SuperpixelCrossAttention(
                    pixel_dim=pixel_dim,
                    superpixel_dim=variant.dim,
                    heads=variant.cross_heads,
                    position=variant.position,
                    gamma=gamma,
                    updates_pixels=not fixed_pixels
                    and (turn < variant.iterations - 1 or (carries_pixels and not last)),
                    tables=tables,
                )
                for turn in range(variant.iterations)
            ],
            position=LearnedPosition(grid=grid, dim=variant.dim) if positions else None,
            prefix=Prefix(dim=variant.dim, count=1, positioned=positioned) if with_class else None,
            blocks=[block(number) for number in range(first, first + depths[index])],
            hand_over=None
            if last
            else HandOver(
                pixel_dim=pixel_dim,
                superpixel_dim=variant.dim,
                gamma=handover_gamma,
                activation=activated_handover,
                carries_pixels=carries_pixels,
                pixel_view=pixel_view,
            ),
        )

    return SPFormer(
        dim=variant.dim,
        stem=Stem(layers=variant.stem, channels=channels, norm=variant.norm),
        init=SuperpixelInit(
            pixel_dim=pixel_dim,
            superpixel_dim=variant.dim,
            cell=variant.cell,
            kind=variant.init,
            grid=grid,
        ),
        stages=[stage(index) for index in range(len(depths))],
        classes=classes,
        segmentation=segmentation,
        class_token=class_token,
    )


def build(
    variant: str = "spformer-small",
    *,
    classes: int = 1000,
    resolution: int = 224,
    channels: int = 3,
    segmentation: int = 0,
    drop_path: float | int = 0.0,
    gamma: float | int = 1e-5,
    class_token: bool = False,
) -> SPFormer:
    """A named network, initialised.

    Args:
        variant: a row of :data:`VARIANTS`.
        resolution: sets the grid of the learned positions; any other input works, too.
        segmentation: classes of the head for :meth:`SPFormer.segment`; 0: none.
        drop_path: rate of the last block, growing linearly from 0 (the published runs: 0.1).
        gamma: start of all residual gains of cross attention and hand-over.

    Raises:
        PolypatchError: an unknown variant, or a resolution below one superpixel.
    """
    if variant not in VARIANTS:
        raise PolypatchError(f"there is no {variant}{suggest(variant, VARIANTS, kind='variants')}")
    sizes = VARIANTS[variant]
    patch = sizes.cell * math.prod(layer.stride for layer in sizes.stem)
    if resolution < patch:
        raise PolypatchError(
            f"a resolution of {resolution} holds no superpixel of {patch}×{patch} pixels"
        )
    cells = -(-resolution // patch)
    model = assemble(
        sizes,
        classes=classes,
        grid=(cells, cells),
        channels=channels,
        segmentation=segmentation,
        drop_path=drop_path,
        gamma=gamma,
        handover_gamma=gamma,
        class_token=class_token,
    )
    if not model.norm.weight.is_meta:
        model.init_weights()
    return model


# ---- as a part of another network ----------------------------------------------------------------


def plug(
    host: ViT,
    *,
    cell: int | None = None,
    iterations: int = 2,
    pixel_dim: int | None = None,
    heads: int | None = None,
    stem: str = "single",
    init: str = "lift-pool",
    position: str = "depthwise",
    gamma: float | int = 0.1,
) -> ViT:
    """Put stem and superpixel cross attention in the place of the host's patches; its blocks stay.

    As many superpixels as the host had patches: stride of the stem × ``cell`` = the host's patch.

    Args:
        cell: pixels of the stem's map along a superpixel's home cell. Default: the smallest
            divisor of the patch from 4 on (patch 16: stem of stride 4, cells of 4 × 4, as
            published; patch 4: stem of stride 1), else the patch.
        iterations: of cross attention (published: 2).
        pixel_dim: width of the pixels. Default: a sixth of the host's width up to 384, an eighth
            above, rounded up to a multiple of 16 (published: 32, 64, 96 for 192, 384, 768).
        heads: of cross attention; default: one for 32 channels, at least 2.
        stem: ``"single"``: one convolution as large as its stride (3 × 3 at stride 1);
            ``"stacked"``: 3 × 3 convolutions of stride 2.
        init: first superpixels, see :class:`SuperpixelInit`.
        position: ``"depthwise"`` or ``"none"``.
        gamma: start of the residual gains. The authors' 1e-5, made for 300 epochs, leaves
            the superpixels at pooled patches for the first thousands of steps; 0.1 lets a short
            training use them and keeps the start close to pooled patches.

    Raises:
        PolypatchError: a cell that doesn't divide the patch, or options that don't exist.
    """
    patch = host.patch
    if cell is None:
        cell = next((n for n in range(4, patch) if patch % n == 0), patch)
    if cell < 1 or patch % cell:
        raise PolypatchError(f"cell={cell} does not divide the host's patch of {patch}")
    if iterations < 1:
        raise PolypatchError(f"iterations={iterations}; superpixels need at least one")
    if position not in ("depthwise", "none"):
        raise PolypatchError(f"there is no position={position!r}; use 'depthwise' or 'none'")
    if pixel_dim is None:
        pixel_dim = -(-(host.dim // (6 if host.dim <= 384 else 8)) // 16) * 16
    stride = patch // cell
    old = host.patching
    weight = next(old.parameters(), None)
    if weight is None or weight.ndim != 4:
        raise PolypatchError(
            "spformer replaces a host's patches by superpixels and needs a host that cuts images "
            f"by a convolution; this one cuts with {type(old).__name__}"
        )
    if stem == "single":
        layers = (StemLayer(pixel_dim, stride if stride > 1 else 3, stride),)
    elif stem == "stacked":
        halvings = int(math.log2(stride))
        if stride < 2 or 2**halvings != stride:
            raise PolypatchError(
                f"stem='stacked' halves the image and can't make a stride of {stride} "
                f"(patch {patch} / cell {cell}); use stem='single' or another cell"
            )
        layers = _stacked(*(max(8, pixel_dim >> k) for k in range(halvings - 1, -1, -1)))
    else:
        raise PolypatchError(f"there is no stem={stem!r}; use 'single' or 'stacked'")
    cells = -(-host.resolution // patch)
    patching = SuperpixelPatching(
        stem=Stem(layers=layers, channels=weight.shape[1]),
        init=SuperpixelInit(
            pixel_dim=pixel_dim,
            superpixel_dim=host.dim,
            cell=cell,
            kind=init,
            grid=(cells, cells),
        ),
        layers=[
            SuperpixelCrossAttention(
                pixel_dim=pixel_dim,
                superpixel_dim=host.dim,
                heads=heads or max(2, pixel_dim // 32),
                position=position,
                gamma=gamma,
                updates_pixels=turn < iterations - 1,
            )
            for turn in range(iterations)
        ],
    ).to(device=weight.device, dtype=weight.dtype)
    if not weight.is_meta:
        patching.init_weights()
    host.patching = patching
    return host.plugged("spformer")


# ---- the authors' weights ------------------------------------------------------------------------

#: Their names → ours: patterns, replaced one after the other. ``conv`` and ``norm`` in the first
#: three stand for the numbers of a sequence, which are told apart by what they hold.
NAMES: dict[str, str] = {
    r"^stem\.conv_layers\.(\d+)\.(conv|norm)": r"stem.\2s.\1",
    r"^sp_init\.conv": "init.lift",
    r"^sp_init\.norm": "init.norm",
    r"\.patch_embed\.blocks\.": ".layers.",
    r"\._sp_qkv\.conv": ".superpixel_qkv",
    r"\._sp_qkv\.bn": ".superpixel_norm",
    r"\._pixel_qkv\.conv": ".pixel_qkv",
    r"\._pixel_qkv\.bn": ".pixel_norm",
    r"\.sp_pos_conv": ".superpixel_place.conv",
    r"\.pixel_pos_conv": ".pixel_place.conv",
    r"\.sp_pos_embed": ".superpixel_place.table",
    r"\.pixel_pos_embed": ".pixel_place.table",
    r"\.sp_ls1": ".superpixel_scale",
    r"\.pixel_ls1": ".pixel_scale",
    r"\.sp_project\.0": ".hand_over.project",
    r"\.sp_project\.1": ".hand_over.norm",
    r"\.pixel_delta_ls": ".hand_over.scale",
    r"^(stages\.\d+)\.pos_embed": r"\1.position.table",
    r"\.cls_token": ".prefix.tokens",
    r"\.attn\.": ".mixing.",
    r"^fc_norm": "norm",
    r"^seg_head_conv": "seg_head",
}

#: Kinds of stem layers and of first superpixels.
_KINDS = {
    "conv": "conv",
    "patch": "patch",
    "lift_avgpool": "lift-pool",
    "avgpool_lift": "pool-lift",
}
_POSITIONS = {"depthwise": "depthwise", "learnable": "learned", "none": "none"}

_KNOWN = {
    "img_size", "in_channels", "num_classes", "stem_channels_list", "stem_kernel_sizes",
    "stem_strides", "stem_conv_types", "depths", "dims", "heads", "strides", "sp_sizes",
    "sp_heads", "sp_method", "sp_iter", "sp_features_init_methods", "sp_global_init_method",
    "sp_position_embedding_method", "sp_position_embedding_stride",
    "sp_sp_position_embedding_stride", "sp_pixel_features_update_method", "sp_kwargs",
    "drop_rate", "drop_path_rate", "attn_drop_rate", "ls_init_value", "sp_ls_init_value",
    "pre_norm_pixel", "pixel_refine_method", "sp_embed_method", "sp_project_method",
    "class_token_position_method", "pos_embed_position_method", "no_embed_class", "weight_init",
    "use_pixel_similarities", "use_middle_pixel_features", "seg_specific_classifier",
    "seg_num_classes", "stem_as_stored",
}  # fmt: skip

#: Arguments whose other values belong to other experiments than this paper's.
_ONLY: dict[str, tuple[Any, ...]] = {
    "sp_method": ("sp_cross_asymmetry",),
    "pre_norm_pixel": (False, None),
    "pixel_refine_method": ("identity", None),
    "sp_embed_method": ("identity", None),
    "sp_project_method": ("noact", "act"),
    "sp_pixel_features_update_method": ("residual", "fixed"),
    "class_token_position_method": ("none", "last_stage"),
    "pos_embed_position_method": ("none", "every_stage"),
    "seg_specific_classifier": (None, "Linear", "Conv", ""),
}


def _known_value(config: Mapping[str, Any], name: str, table: Mapping[str, str]) -> str:
    value = config[name]
    if value not in table:
        raise PolypatchError(f"{name}={value!r} is none of {', '.join(table)}")
    return table[value]


def assemble_official(config: Mapping[str, Any]) -> SPFormer:
    """A network without weights from the authors' arguments, all of them.

    ``stem_as_stored``: whether the stem has batch norm and ReLU. Takes ``sp_kwargs`` with
    ``return_similarities_final`` False only: their other setting compares pixels with superpixels
    of another width and fails.

    Raises:
        PolypatchError: an unknown argument, or a value of another method's experiments.
    """
    unknown = sorted(name for name in config if name not in _KNOWN and not name.startswith("_"))
    if unknown:
        raise PolypatchError(f"unknown arguments of an SPFormer: {', '.join(unknown)}")
    for name, allowed in _ONLY.items():
        if name in config and config[name] not in allowed:
            raise PolypatchError(
                f"{name}={config[name]!r} is not part of SPFormer; it has {allowed[0]!r}"
            )
    if (config.get("sp_kwargs") or {}).get("return_similarities_final"):
        raise PolypatchError(
            "return_similarities_final=True compares pixels and superpixels of unequal width"
        )
    dims, cells = set(config["dims"]), set(config["sp_sizes"])
    crossing, heads = set(config["sp_heads"]), set(config["heads"])
    if max(len(dims), len(cells), len(crossing), len(heads)) > 1:
        raise PolypatchError("SPFormer's stages share dims, heads, sp_sizes and sp_heads")
    if set(config.get("strides", (1,))) != {1}:
        raise PolypatchError("SPFormer's stages keep the stride: strides are 1")
    if set(config.get("sp_features_init_methods", ("from_feature",))) != {"from_feature"}:
        raise PolypatchError("SPFormer's stages start from features (sp_features_init_methods)")
    kinds = [
        _known_value({"stem_conv_types": kind}, "stem_conv_types", _KINDS)
        for kind in config["stem_conv_types"]
    ]
    sizes = zip(
        config["stem_channels_list"],
        config["stem_kernel_sizes"],
        config["stem_strides"],
        kinds,
        strict=True,
    )
    stem = tuple(StemLayer(*row) for row in sizes)
    variant = Variant(
        stem=stem,
        dim=dims.pop(),
        heads=heads.pop(),
        cross_heads=crossing.pop(),
        depths=tuple(config["depths"]),
        iterations=config["sp_iter"],
        cell=cells.pop(),
        init=_known_value(config, "sp_global_init_method", _KINDS),
        position=_known_value(config, "sp_position_embedding_method", _POSITIONS),
        norm="batch" if config.get("stem_as_stored") else "layer",
    )
    image = config["img_size"]
    height, width = (image, image) if isinstance(image, int) else image
    patch = variant.cell * math.prod(layer.stride for layer in stem)
    pixel_table = config.get("sp_position_embedding_stride", -1)
    superpixel_table = config.get("sp_sp_position_embedding_stride") or pixel_table
    return assemble(
        variant,
        classes=config.get("num_classes", 1000),
        grid=(height // patch, width // patch),
        channels=config.get("in_channels", 3),
        segmentation=config["seg_num_classes"] if config.get("seg_specific_classifier") else 0,
        drop_path=config.get("drop_path_rate", 0.0),
        gamma=config.get("sp_ls_init_value", 1e-5),
        handover_gamma=config.get("ls_init_value", 1e-5),
        class_token=config.get("class_token_position_method", "none") == "last_stage",
        positioned_class=not config.get("no_embed_class", False),
        positions=config.get("pos_embed_position_method", "every_stage") == "every_stage",
        activated_handover=config.get("sp_project_method", "noact") == "act",
        carries_pixels=bool(config.get("use_middle_pixel_features", False)),
        pixel_view=bool(config.get("use_pixel_similarities", False)),
        fixed_pixels=config.get("sp_pixel_features_update_method", "residual") == "fixed",
        table_strides=(max(1, pixel_table), max(1, superpixel_table)),
    )


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> SPFormer:
    """A network with the authors' weights, in eval mode.

    Args:
        config: their constructor's arguments; what :func:`recognise` finds may be left out.
        state: the state dict with their keys.

    Raises:
        PolypatchError: unknown arguments; unknown, missing or misfitting keys, each named.
    """
    found = recognise({name: tuple(value.shape) for name, value in state.items()}) or {}
    model = assemble_official({**found, **config})
    stages = len(model.stages)
    positions: dict[str, Tensor] = {}
    renamed = _renamed(state)
    names = dict(zip(renamed, state, strict=True))
    for name in [n for n in renamed if n.endswith("position.table")]:
        stage = model.stages[min(int(name.split(".")[1]), stages - 1)]
        table: LearnedPosition = stage.position  # type: ignore[assignment]
        rows = renamed.pop(name)
        if table is None:
            raise PolypatchError(f"these weights have {name}, the configuration no positions")
        count = math.prod(table.table.shape[1:3])
        if rows.shape[1] == count + 1:
            positions[name.replace("position.table", "prefix.position")] = rows[:, :1]
            rows = rows[:, 1:]
        if rows.shape[1] != count:
            raise PolypatchError(
                f"a position table of {rows.shape[1]} rows does not fit {count} superpixels"
            )
        positions[name] = rows.reshape(table.table.shape)
    return _load(model, renamed | positions, names)


def layer_from_official(
    config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> SuperpixelCrossAttention:
    """One layer of cross attention with the authors' weights, in eval mode; ``config`` by the
    names of their layer (``in_channels_pixel``, ``pixel_qkv_channels``, …).

    Raises:
        PolypatchError: keys that don't fit, widths of q and k that don't pair, other norms.
    """
    pixel, superpixel = config["pixel_qkv_channels"], config["sp_qkv_channels"]
    pairs = (
        (superpixel[0], pixel[1]),
        (pixel[0], superpixel[1]),
        (pixel[2], config["in_channels_sp"]),
        (superpixel[2], config["in_channels_pixel"]),
    )
    if any(a != b for a, b in pairs):
        raise PolypatchError(f"widths {pixel} of pixels don't pair with {superpixel}")
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    tables = None
    if "pixel_pos_embed" in shapes:
        pixels, supers = shapes["pixel_pos_embed"], shapes["sp_pos_embed"]
        tables = ((pixels[2], pixels[3]), (supers[2], supers[3]))
    layer = SuperpixelCrossAttention(
        pixel_dim=config["in_channels_pixel"],
        superpixel_dim=config["in_channels_sp"],
        heads=config.get("num_heads_sp", 1),
        pixel_heads=config.get("num_heads_pixel", 1),
        update_width=superpixel[0],
        assign_width=pixel[0],
        position=_known_value(
            {"position_embedding_method": "none", **config},
            "position_embedding_method",
            _POSITIONS,
        ),
        gamma=config.get("ls_init_value"),
        updates_pixels=config.get("pixelify", True),
        compares_pixels=config.get("always_return_similarity_pixel", False),
        tables=tables,
    )
    # Their patterns begin at the dot behind the layer's own name.
    renamed = _renamed({f".{name}": value for name, value in state.items()})
    renamed = {name[1:]: value for name, value in renamed.items()}
    return _load(layer, renamed, dict(zip(renamed, state, strict=True)))


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        kind = "conv" if value.ndim == 4 else "norm"
        ours = re.sub(r"^(stem\.conv_layers\.\d+|sp_init)\.\d+\.", rf"\1.{kind}.", name)
        for theirs, replacement in NAMES.items():
            ours = re.sub(theirs, replacement, ours)
        renamed[ours] = value
    return renamed


Module = TypeVar("Module", bound=nn.Module)


def _load(model: Module, renamed: Mapping[str, Tensor], names: Mapping[str, str]) -> Module:
    """Load; ``names`` give the authors' name of each of ours, for the error."""
    wanted = model.state_dict()
    given = {}
    for name, value in renamed.items():
        target = wanted.get(name)
        if target is not None and value.ndim == 4 and target.ndim == 2:
            # 1 × 1 convolutions are linear maps of channels-last features; cell-sized ones read
            # (row, column, channel), as the pixels of a cell lie here.
            value = value.permute(0, 2, 3, 1).flatten(1)
        given[name] = value
    wrong = [
        f"{names.get(n, n)}: {tuple(given[n].shape)} for {tuple(wanted[n].shape)}"
        for n in wanted
        if n in given and given[n].shape != wanted[n].shape
    ]
    said = [
        f"{label} {', '.join(listed[:6])}{' …' if len(listed) > 6 else ''}"
        for label, listed in (
            ("lack", sorted(set(wanted) - set(given))),
            ("have unexpected", sorted(names.get(n, n) for n in set(given) - set(wanted))),
            ("misfit in", wrong),
        )
        if listed
    ]
    if said:
        raise PolypatchError("these weights don't fit their configuration: " + "; ".join(said))
    model.load_state_dict(given)
    return model.eval()


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The authors' arguments, as far as names and shapes tell; None if these are no SPFormer's.

    Assumed, as in every published variant: cells of 4 × 4, a convolution's stride equal to its
    kernel (3 × 3: 2), blocks with 64 channels a head, 2 heads of cross attention (3 at width 768),
    a square input, first superpixels lifted and then pooled.
    """
    if "stages.0.patch_embed.blocks.0._sp_qkv.conv.weight" not in shapes:
        return None
    stem = [shapes[f"stem.conv_layers.{i}.0.weight"] for i in range(99)
            if f"stem.conv_layers.{i}.0.weight" in shapes]  # fmt: skip
    if not stem:
        return None
    dim = shapes["stages.0.patch_embed.blocks.0._sp_qkv.conv.weight"][1]

    def count(pattern: str) -> int:
        found = [int(m[1]) for name in shapes if (m := re.match(pattern, name))]
        return 1 + max(found, default=-1)

    stages = count(r"stages\.(\d+)\.")
    kernels = [shape[-1] for shape in stem]
    strides = [2 if kernel == 3 else kernel for kernel in kernels]
    init = "lift_avgpool"
    if "sp_init.1.weight" in shapes and len(shapes["sp_init.1.weight"]) == 4:
        init = "avgpool_lift"
    elif shapes.get("sp_init.0.weight", (0,))[-1] > 1:
        init = "conv"
    last = f"stages.{stages - 1}."
    class_token = f"{last}cls_token" in shapes
    rows = shapes.get("stages.0.pos_embed", (1, 196, dim))[1]
    if class_token and stages == 1 and math.isqrt(rows) ** 2 != rows:
        rows -= 1
    cell = shapes["sp_init.0.weight"][-1] if init == "conv" else 4
    side = math.isqrt(rows) * cell * math.prod(strides)
    layer = "stages.0.patch_embed.blocks.0."
    depthwise, table = f"{layer}sp_pos_conv.weight" in shapes, f"{layer}sp_pos_embed" in shapes
    iterations = count(r"stages\.0\.patch_embed\.blocks\.(\d+)\.")
    final = f"stages.0.patch_embed.blocks.{iterations - 1}.pixel_ls1.gamma"
    segmentation = shapes.get("seg_head.weight", shapes.get("seg_head_conv.weight"))
    config: dict[str, Any] = {
        "img_size": [side, side],
        "in_channels": stem[0][1],
        "num_classes": shapes.get("head.weight", (0,))[0],
        "stem_channels_list": [shape[0] for shape in stem],
        "stem_kernel_sizes": kernels,
        "stem_strides": strides,
        "stem_conv_types": ["conv"] * len(stem),
        "depths": [count(rf"stages\.{i}\.blocks\.(\d+)\.") for i in range(stages)],
        "dims": [dim] * stages,
        "heads": [max(1, dim // 64)] * stages,
        "sp_sizes": [cell] * stages,
        "sp_heads": [3 if dim == 768 else 2] * stages,
        "sp_iter": iterations,
        "sp_global_init_method": init,
        "sp_position_embedding_method": "depthwise"
        if depthwise
        else "learnable"
        if table
        else "none",
        "ls_init_value": 1e-5 if stages == 1 or "stages.0.pixel_delta_ls.gamma" in shapes else None,
        "sp_ls_init_value": 1e-5 if f"{layer}sp_ls1.gamma" in shapes else None,
        "class_token_position_method": "last_stage" if class_token else "none",
        "pos_embed_position_method": "every_stage" if "stages.0.pos_embed" in shapes else "none",
        "use_middle_pixel_features": stages > 1 and final in shapes,
        "stem_as_stored": "stem.conv_layers.0.1.running_mean" in shapes,
    }
    if class_token:
        first = shapes.get("stages.0.pos_embed", (1, 0, 0))[1]
        own = shapes.get(f"{last}pos_embed", (1, 0, 0))[1]
        config["no_embed_class"] = own == (first if stages > 1 else rows)
    if segmentation is not None:
        kind = "Conv" if "seg_head_conv.weight" in shapes else "Linear"
        config |= {"seg_specific_classifier": kind, "seg_num_classes": segmentation[0]}
    return config
