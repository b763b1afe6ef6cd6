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

Stem and first superpixels stand in ``spformer_stem.py``, the complete network in
``spformer_network.py``, the layout of the research code's weights in ``spformer_weights.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..hosts import InputRequirements, ViT
from ..nn import LayerScale, init_parts
from ..tokens import Tokens, raster_geometry
from .spformer_stem import Stem, StemLayer, SuperpixelInit, stacked

if TYPE_CHECKING:
    from .spformer_network import SPFormer

__all__ = [
    "VARIANTS",
    "SuperpixelCrossAttention",
    "SuperpixelPatching",
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
    *,
    step: float,
    cell: int,
) -> tuple[Float[Tensor, "batch tokens 2"], Float[Tensor, "batch tokens 2"]]:
    """Centroid and size of the bounding box of every region, in input pixels; a superpixel that
    won no pixel lies at its cell and has no size. ``step`` is the side of a label's pixel,
    ``cell`` that of a cell in labels' pixels (cropped labels hold only a part of the last ones)."""
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
    home, _ = raster_geometry(grid, (grid[0] * cell, grid[1] * cell), device=device)
    won = sums[..., :1] > 0
    centre = torch.where(won, sums[..., 1:] / sums[..., :1].clamp_min(1), home) * step
    extent = torch.where(won, -low[..., 2:] - low[..., :2] + 1, 0.0) * step
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

        logits = similarities(to_cells(pixel_key, grid, self.heads), by_head(query, self.heads))
        taken = update(logits, to_cells(pixel_value, grid, self.heads)).flatten(3)
        superpixels = superpixels + self.superpixel_scale(taken)
        if not self.compares_pixels:
            return Refined(pixels, superpixels, logits, None)

        pixel_logits = similarities(
            to_cells(pixel_query, grid, self.pixel_heads), by_head(key, self.pixel_heads)
        )
        if not self.updates_pixels:
            return Refined(pixels, superpixels, logits, pixel_logits)
        read = from_cells(spread(pixel_logits, by_head(value, self.pixel_heads)), cell)
        return Refined(pixels + self.pixel_scale(read), superpixels, logits, pixel_logits)


def by_head(x: Float[Tensor, "batch rows columns dim"], heads: int) -> Tensor:
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


def padded(image: Tensor, multiple: int) -> Tensor:
    """Zeros at the bottom and on the right, up to the next multiple."""
    height, width = image.shape[-2:]
    if height < multiple or width < multiple:
        raise PolypatchError(
            f"the input is {height}×{width}, smaller than one superpixel of {multiple}×{multiple}; "
            f"use inputs of at least {multiple} pixels a side or smaller cells"
        )
    bottom, right = -height % multiple, -width % multiple
    return F.pad(image, (0, right, 0, bottom)) if bottom or right else image


def as_tokens(
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
    step, side = float(stride), cell
    if (labels.shape[1] * stride, labels.shape[2] * stride) != canvas:
        labels = labels.repeat_interleave(stride, 1).repeat_interleave(stride, 2)
        labels, step, side = labels[:, : canvas[0], : canvas[1]], 1.0, cell * stride
    centre, extent = region_geometry(labels, grid, step=step, cell=side)
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

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        canvas = (image.shape[-2], image.shape[-1])
        pixels = self.stem(padded(image, self.patch))
        superpixels = self.init(pixels)
        refined = refine(self.layers, pixels, superpixels)
        return as_tokens(
            refined.superpixels,
            refined.similarities,
            cell=self.init.cell,
            stride=self.stem.stride,
            canvas=canvas,
        )


def refine(layers: nn.ModuleList, pixels: Tensor, superpixels: Tensor) -> Refined:
    """What the last of the layers gives, each one starting from the features of the one before."""
    refined = None
    for layer in layers:
        refined = layer(pixels, superpixels)
        pixels, superpixels = refined.pixels, refined.superpixels
    assert refined is not None
    return refined


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
    gamma: float = 0.1,
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
        layers = stacked(*(max(8, pixel_dim >> k) for k in range(halvings - 1, -1, -1)))
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
        init_parts(patching)
    host.patching = patching
    return host.plugged("spformer")


# ---- complete networks ---------------------------------------------------------------------------

_TINY: dict[str, Any] = dict(stem=(StemLayer(32, 4, 4),), dim=192, heads=3)
_SMALL: dict[str, Any] = dict(stem=(StemLayer(64, 4, 4),), dim=384, heads=6)
_BASE: dict[str, Any] = dict(stem=(StemLayer(96, 4, 4),), dim=768, heads=12, cross_heads=3)

#: Sizes, by the fields of ``Variant`` in ``spformer_network.py``, which has what they share. T, S
#: and B as DeiT's; the others are named after what they change: "-stacked" stems of 3 × 3
#: convolutions, "-32": stem of stride 8, so 49 superpixels of 224 px, "-cross4": heads of cross
#: attention, "-once": one iteration, "-stage": all twelve blocks in one stage.
VARIANTS: dict[str, dict[str, Any]] = {
    "spformer-tiny": _TINY,
    "spformer-small": _SMALL,
    "spformer-base": _BASE,
    "spformer-tiny-cross1": _TINY | dict(cross_heads=1),
    "spformer-tiny-stacked": _TINY | dict(stem=stacked(16, 32)),
    "spformer-small-32": _SMALL | dict(stem=(StemLayer(64, 8, 8),)),
    "spformer-small-stacked": _SMALL | dict(stem=stacked(32, 64)),
    "spformer-small-stacked-32": _SMALL | dict(stem=stacked(16, 32, 64)),
    "spformer-small-cross4": _SMALL | dict(cross_heads=4),
    "spformer-small-once": _SMALL | dict(cross_heads=4, iterations=1),
    "spformer-small-stage": _SMALL | dict(cross_heads=1, depths=(12,)),
    "spformer-base-stacked": _BASE | dict(stem=stacked(48, 96)),
}


def build(
    variant: str = "spformer-small",
    *,
    classes: int = 1000,
    resolution: int = 224,
    channels: int = 3,
    segmentation: int = 0,
    drop_path: float = 0.0,
    gamma: float = 1e-5,
    class_token: bool = False,
) -> SPFormer:
    """A named network, initialised.

    Args:
        variant: a row of :data:`VARIANTS`.
        resolution: sets the grid of the learned positions; any other input works, too.
        segmentation: classes of the head for the network's ``segment``; 0: none.
        drop_path: rate of the last block, growing linearly from 0 (the published runs: 0.1).
        gamma: start of all residual gains of cross attention and hand-over.

    Raises:
        PolypatchError: an unknown variant, or a resolution below one superpixel.
    """
    from .spformer_network import Variant, assemble

    if variant not in VARIANTS:
        raise PolypatchError(f"there is no {variant}{suggest(variant, VARIANTS, kind='variants')}")
    sizes = Variant(**VARIANTS[variant])
    patch = sizes.patch
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


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> SPFormer:
    """A network with the authors' weights, in eval mode.

    Args:
        config: their constructor's arguments; what :func:`recognise` finds may be left out.
        state: the state dict with their keys.

    Raises:
        PolypatchError: unknown arguments; unknown, missing or misfitting keys, each named.
    """
    from .spformer_weights import read

    return read(config, state)


def layer_from_official(
    config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> SuperpixelCrossAttention:
    """One layer of cross attention with the authors' weights, in eval mode; ``config`` by the
    names of their layer (``in_channels_pixel``, ``pixel_qkv_channels``, …).

    Raises:
        PolypatchError: keys that don't fit, widths of q and k that don't pair.
    """
    from .spformer_weights import read_layer

    return read_layer(config, state)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The authors' arguments, as far as names and shapes tell; None if these are no SPFormer's.

    Assumed, as in every published variant: cells of 4 × 4, a convolution's stride equal to its
    kernel (3 × 3: 2), blocks with 64 channels a head, 2 heads of cross attention (3 at width 768),
    a square input, first superpixels lifted and then pooled.
    """
    from .spformer_weights import recognise_network

    return recognise_network(shapes)
