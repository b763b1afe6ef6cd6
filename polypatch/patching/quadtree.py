"""Adaptive Patch Transformer (APT): large patches where an image is flat, small ones elsewhere.

Choudhury, Kim, Park, Yang, Jeni & Kitani, *Accelerating Vision Transformers with Adaptive Patch
Sizes*, ICLR 2026, arXiv 2510.18091; code rccchoudhury/apt. An importance map per patch side says
how much happens in each square; squares below a threshold become one token, the rest falls back to
the next smaller side, down to the host's own patch. The number of tokens follows from the image.

The method, for a base patch of p pixels and S scales with sides p_i = 2^i p:

* importance (``method``), of pixels in [0, 255] with grey = 0.2989 R + 0.5870 G + 0.1140 B
  (other than three channels: the first one):
  - ``"entropy"``: H(P) = -Σ_b q_b log2(q_b + 1e-10), q the histogram of the patch's grey levels in
    512 bins of half a level (:func:`entropy_maps`);
  - ``"laplacian"``: mean, max or standard deviation of |8-neighbour Laplacian| of grey / 255
    (:func:`laplacian_maps`);
  - ``"upsample_mse"``: squared error of shrinking the image and enlarging it again
    (:func:`reconstruction_maps`);
* choice (:func:`select_patches`): a square of side p_i, i >= 1, is one patch where its importance
  is below τ_i, unless it lies in a larger one that is chosen;
* embedding (sec. 3.2): with E the host's patch embedding (p × p pixels → dim),

      base patch:    E(P)
      coarse patch:  E(resize_p(P)) + W · Down^i({E(P_j)}),   W = 0 at the start,

  where P_j are the 4^i base patches inside P at full resolution and Down is a 2×2 convolution with
  stride 2, applied i times (the same one at every scale). As W starts at zero, a trained ViT
  starts out with resized patches and its own embedding;
* positions: the host's table, resampled to the grid of each scale (:class:`ScaledPosition`);
  rotary and sine-cosine hosts read each patch's own centre.

Shapes: images (batch, channels, height, width); maps and masks are dictionaries, patch side →
(batch, rows, columns). Tokens come scale by scale, each in raster order, padding behind.

Where code and paper leave room, this is what the authors' code does: bilinear resizing without
antialiasing (a patch enlarged by 2^i is the mean of the middle 2×2 pixels of each 2^i × 2^i
block), incomplete squares on the border never become coarse patches, and the learnt position of a
patch's place inside its coarse patch, which the code allocates but never reads, is left out.

Traps:

* thresholds are in bits (entropy) and depend on the side: a patch of n pixels has at most log2(n)
  bits, so the authors' 5.5 for 32-pixel patches would swallow almost every 8-pixel patch (6 bits
  at most). :func:`default_thresholds` takes that into account;
* images reach a host normalised, the maps need pixels: pass the ``mean`` and ``std`` that the
  images were normalised with, if they are not ImageNet's;
* token counts depend on the data, so shapes do: ``torch.compile(fullgraph=True)`` does not apply to
  the tokenizer (the blocks can be compiled with dynamic shapes). The host runs samples of similar
  length together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..hosts import InputRequirements, ViT
from ..nn import IMAGENET_MEAN, IMAGENET_STD, GridPatching, LearnedPosition, Position
from ..nn.positions import resample_grid
from ..tokens import Tokens, raster_geometry

__all__ = [
    "PatchGroups",
    "QuadtreePatching",
    "ScaledPosition",
    "default_thresholds",
    "entropy_maps",
    "flat_layout",
    "group_patches",
    "laplacian_maps",
    "plug",
    "reconstruction_maps",
    "select_patches",
    "to_pixels",
]

METHODS = ("entropy", "laplacian", "upsample_mse")
AGGREGATES = ("mean", "max", "std")

#: Down and up by these factors, scale by scale; the last one serves all further scales.
ERROR_FACTORS = (1.0, 0.5, 0.25)

# Each map has rows and columns of its own, so the axes have no names here.
Maps = dict[int, Float[Tensor, "batch _ _"]]
Masks = dict[int, Bool[Tensor, "batch _ _"]]


# ---- importance ----------------------------------------------------------------------------------


def to_pixels(
    image: Float[Tensor, "batch channels height width"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Tensor, "batch channels height width"]:
    """Undo a normalisation: pixels in [0, 255], clamped, float32, not rounded to whole levels."""
    # Written as the inverse normalisation (x - (-mean/std)) / (1/std): bins are cut with floor, so
    # another order of the same arithmetic can put a grey level into its neighbour.
    shift = image.new_tensor([-m / s for m, s in zip(mean, std)], dtype=torch.float32)
    scale = image.new_tensor([1 / s for s in std], dtype=torch.float32)
    pixels = (image.float() - shift[:, None, None]) / scale[:, None, None]
    return (pixels * 255.0).clamp(0, 255)


def _grey(
    pixels: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch height width"]:
    if pixels.shape[1] != 3:
        return pixels[:, 0]
    red, green, blue = pixels.unbind(1)
    return 0.2989 * red + 0.5870 * green + 0.1140 * blue


def _cut(
    values: Shaped[Tensor, "batch height width"], side: int
) -> Shaped[Tensor, "batch rows columns square"]:
    """Squares in raster order, their values in raster order; zeros beyond the border."""
    height, width = values.shape[-2:]
    padded = F.pad(values, (0, -width % side, 0, -height % side))
    return rearrange(padded, "b (h p) (w q) -> b h w (p q)", p=side, q=side)


def entropy_maps(
    pixels: Float[Tensor, "batch channels height width"],
    sides: Sequence[int],
    *,
    bins: int = 512,
    span: float = 256.0,
    incomplete: float = 1e6,
) -> Maps:
    """Entropy in bits of the grey levels in each square (paper, eq. 1), for each side.

    Args:
        pixels: values in [0, 255].
        bins: bins over ``span`` levels, the last one closed: bin = floor(grey * bins / span).
        span: 256 as in training; 255 gives the single-image form of the authors' code
            (``torch.histc`` over [0, 255]), whose bins are a little narrower.
        incomplete: value of the whole last row (column) of a map whose squares reach over the
            border, so that no threshold takes them.

    Never builds one-hot vectors: counts are added up in one buffer of (squares × bins), and where
    a square has fewer pixels than there are bins, the sum runs over pixels instead of bins:
    -Σ_b q_b log2 q_b = -mean over pixels of log2 q_{bin of the pixel}.
    """
    grey = _grey(pixels)
    height, width = grey.shape[-2:]
    bin_of = (grey * bins / span).long().clamp(0, bins - 1)
    maps: Maps = {}
    for side in sides:
        index = _cut(bin_of, side)
        squares, area = index.shape[:3], side * side
        index = index.reshape(-1, area)
        counts = grey.new_zeros(len(index), bins)
        counts.scatter_add_(1, index, grey.new_ones(()).expand_as(index))
        if area < bins:
            bits = -(counts.gather(1, index) / area + 1e-10).log2().mean(1)
        else:
            share = counts / area
            bits = -(share * (share + 1e-10).log2()).sum(1)
        bits = bits.view(squares)
        if height % side:
            bits[:, -1] = incomplete
        if width % side:
            bits[:, :, -1] = incomplete
        maps[side] = bits
    return maps


def _aggregated(values: Float[Tensor, "batch height width"], side: int, aggregate: str) -> Tensor:
    squares = _cut(values, side)
    if aggregate == "mean":
        return squares.mean(-1)
    if aggregate == "max":
        return squares.amax(-1)
    if aggregate == "std":
        return squares.std(-1)  # unbiased
    raise PolypatchError(
        f"there is no aggregate={aggregate!r}{suggest(aggregate, AGGREGATES, kind='aggregates')}"
    )


def _unit_range(values: Tensor) -> Tensor:
    """Values / 255, unless the whole batch lies in [0, 1] already (the authors' rule: a batch of
    black images is taken for one in [0, 1])."""
    return values / torch.where(values.amax() > 1, 255.0, 1.0)


def laplacian_maps(
    pixels: Float[Tensor, "batch channels height width"],
    sides: Sequence[int],
    *,
    aggregate: str = "mean",
) -> Maps:
    """Mean, max or (unbiased) standard deviation, per square, of the absolute 8-neighbour
    Laplacian of grey / 255. The image is reflected at its border; squares that reach beyond it are
    filled up with zeros."""
    grey = _unit_range(_grey(pixels))[:, None]
    kernel = grey.new_ones(1, 1, 3, 3)
    kernel[0, 0, 1, 1] = -8
    response = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="reflect"), kernel)[:, 0].abs()
    return {side: _aggregated(response, side, aggregate) for side in sides}


def reconstruction_maps(
    pixels: Float[Tensor, "batch channels height width"],
    sides: Sequence[int],
    *,
    factors: Sequence[float] = ERROR_FACTORS,
    aggregate: str = "mean",
) -> Maps:
    """What shrinking the image by ``factors`` (one a side; the last one serves the rest) and
    enlarging it again, both bilinearly, loses: squared error on the [0, 1] scale, mean over
    channels, aggregated per square."""
    image = _unit_range(pixels)
    size = image.shape[-2:]
    maps: Maps = {}
    for number, side in enumerate(sides):
        factor = factors[min(number, len(factors) - 1)]
        small = F.interpolate(image, scale_factor=factor, mode="bilinear", align_corners=False)
        large = F.interpolate(small, scale_factor=1 / factor, mode="bilinear", align_corners=False)
        if large.shape[-2:] != size:
            large = F.interpolate(large, size=size, mode="bilinear", align_corners=False)
        error = (image - large).square().mean(1)
        maps[side] = _aggregated(error, side, aggregate)
    return maps


# ---- choice --------------------------------------------------------------------------------------


#: (first coarse scale, larger ones) for the methods without published values, by aggregate.
_THRESHOLDS = {
    ("laplacian", "mean"): (0.12, 0.03),
    ("laplacian", "max"): (0.5, 0.2),
    ("laplacian", "std"): (0.11, 0.03),
    ("upsample_mse", "mean"): (4e-4, 1e-4),
    ("upsample_mse", "max"): (4e-3, 1e-3),
    ("upsample_mse", "std"): (7e-4, 2e-4),
}


def default_thresholds(
    method: str, patch: int, scales: int, *, aggregate: str = "mean"
) -> tuple[float, ...]:
    """A threshold for each coarse scale.

    ``"entropy"``: the authors' 5.5 bits for the first coarse scale and 4.0 for larger ones (the
    latter from their example of three scales), but at most 0.8 of the bits that a square of that
    side can have, log2 of its pixels. On photographs shrunk to 32 pixels and base patches of 4
    that makes about half of the 8-pixel squares coarse and saves three to four tokens in ten. For
    the other methods no values are published; ours save about as much on the same photographs.
    """
    if method == "entropy":
        sides = [patch * 2**i for i in range(1, scales)]
        bits = [5.5, *[4.0] * (scales - 2)][: scales - 1]
        return tuple(round(min(b, 0.8 * math.log2(side * side)), 2) for b, side in zip(bits, sides))
    if method not in METHODS:
        raise PolypatchError(f"there is no method={method!r}{suggest(method, METHODS)}")
    first, further = _THRESHOLDS[method, aggregate]
    return (first, *[further] * (scales - 2))[: scales - 1]


def _enlarged(
    mask: Bool[Tensor, "batch rows columns"], factor: int, grid: tuple[int, int]
) -> Bool[Tensor, "batch rows2 columns2"]:
    """Every cell ``factor`` times as tall and wide, cut or filled with False to ``grid``."""
    big = mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, : grid[0], : grid[1]]
    return F.pad(big, (0, grid[1] - big.shape[2], 0, grid[0] - big.shape[1]))


def select_patches(
    maps: Mapping[int, Float[Tensor, "batch _ _"]],
    thresholds: Sequence[float],
    *,
    patch: int,
    grid: tuple[int, int],
) -> Masks:
    """Which squares of each side become a patch: a cover of the image without overlaps.

    Args:
        maps: importance by side, at least one; values of the base side are not read.
        thresholds: one for each coarse side, smallest side first; a square is taken where its
            importance is *below* it.
        patch, grid: the base side and its (rows, columns).

    Returns:
        masks for the base side and every coarse side, smallest first.

    Raises:
        PolypatchError: unequal numbers of thresholds and coarse sides.
    """
    coarse = sorted(side for side in maps if side != patch)
    if len(thresholds) != len(coarse):
        raise PolypatchError(
            f"{len(coarse)} coarse patch sizes need as many thresholds, got {len(thresholds)}"
        )
    masks: Masks = {}
    sides = [patch, *coarse]
    wanted = {side: maps[side] < limit for side, limit in zip(coarse, thresholds)}
    some = next(iter(maps.values()))
    wanted[patch] = torch.ones(len(some), *grid, dtype=torch.bool, device=some.device)
    for side in reversed(sides):
        free = wanted[side]
        for larger in masks:
            shape = (free.shape[1], free.shape[2])
            free = free & ~_enlarged(masks[larger], larger // side, shape)
        masks[side] = free
    return {side: masks[side] for side in sides}


# ---- the flat layout of the authors' tokenizer ---------------------------------------------------


@dataclass(frozen=True)
class PatchGroups:
    """The chosen patches of a batch by side; n: all of that side, sample by sample in raster
    order.

    Fields:
        resized: side → (n, channels, patch, patch): each patch at the base patch's size.
        constituents: coarse side → (n, parts, channels, patch, patch): the base patches inside it
            at full resolution, in raster order.
    """

    resized: dict[int, Float[Tensor, "_ channels patch patch"]]
    constituents: dict[int, Float[Tensor, "_ _ channels patch patch"]]


def group_patches(
    image: Float[Tensor, "batch channels height width"],
    masks: Mapping[int, Bool[Tensor, "batch _ _"]],
    *,
    patch: int,
) -> PatchGroups:
    """Cut the chosen patches out of ``image``, which is filled with zeros to whole base patches;
    masks of coarse sides count complete squares only."""
    resized: dict[int, Tensor] = {}
    constituents: dict[int, Tensor] = {}
    for side, mask in masks.items():
        times, (rows, columns) = side // patch, mask.shape[1:]
        down, right = rows * side - image.shape[2], columns * side - image.shape[3]
        whole = image  # negative padding cuts off; padding by nothing would copy
        if down or right:
            whole = F.pad(image, (0, right, 0, down))
        if side > patch:
            cut = rearrange(
                whole,
                "b c (h n p) (w m q) -> b h w n m c p q",
                n=times,
                m=times,
                p=patch,
                q=patch,
            )
            constituents[side] = _chosen(cut.flatten(3, 4), mask)
            # An empty map can't be interpolated; every pixel read lies inside its own square.
            if whole.numel():
                whole = F.interpolate(whole, scale_factor=1 / times, mode="bilinear")
            else:
                whole = whole[..., : rows * patch, : columns * patch]
        cut = rearrange(whole, "b c (h p) (w q) -> b h w c p q", p=patch, q=patch)
        resized[side] = _chosen(cut, mask)
    return PatchGroups(resized, constituents)


def _chosen(cells: Float[Tensor, "batch rows columns *rest"], mask: Tensor) -> Tensor:
    """``cells[mask]``, but copied by whole rows (several times faster than a mask on a CPU)."""
    rows = mask.flatten().nonzero()[:, 0]
    shape = cells.shape[3:]
    return cells.reshape(mask.numel(), math.prod(shape)).index_select(0, rows).unflatten(1, shape)


def flat_layout(
    masks: Mapping[int, Bool[Tensor, "batch _ _"]],
) -> tuple[Int64[Tensor, " total"], Int64[Tensor, " batch"]]:
    """All tokens of a batch in a row, as kernels for variable lengths want them.

    Returns:
        For each token its scale, 1 for the base, 2 for the doubled patch, ..., and -1 for the class
        token with which each sample begins; and the samples' lengths, class tokens included.
    """
    kept = torch.cat([mask.flatten(1) for mask in masks.values()], dim=1)
    scale = torch.cat(
        [
            torch.full((mask[0].numel(),), number, device=mask.device)
            for number, mask in enumerate(masks.values(), start=1)
        ]
    )
    kept, scale = F.pad(kept, (1, 0), value=True), F.pad(scale, (1, 0), value=-1)
    return scale.expand_as(kept)[kept], kept.sum(1)


# ---- modules -------------------------------------------------------------------------------------


class QuadtreePatching(nn.Module):
    """Image → tokens of several patch sizes. ``proj`` is the host's own patch embedding."""

    def __init__(
        self,
        *,
        proj: nn.Conv2d,
        patch: int,
        thresholds: Sequence[float],
        method: str = "entropy",
        aggregate: str = "mean",
        bins: int = 512,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        dim = proj.out_channels
        self.patch = patch
        self.thresholds = tuple(thresholds)
        self.method, self.aggregate, self.bins = method, aggregate, bins
        self.mean, self.std = tuple(mean), tuple(std)
        self.proj = proj
        self.down = nn.Conv2d(dim, dim, kernel_size=2, stride=2)
        self.zero = nn.Linear(dim, dim)
        self.init_weights()

    @property
    def sides(self) -> tuple[int, ...]:
        """Patch sides in pixels, the base patch first."""
        return tuple(self.patch * 2**i for i in range(len(self.thresholds) + 1))

    @property
    def input_requirements(self) -> InputRequirements:
        return InputRequirements(minimum=self.patch)

    def init_weights(self) -> None:
        self.down.reset_parameters()
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    @torch.no_grad()
    def importance_maps(
        self, image: Float[Tensor, "batch channels height width"], *, base: bool = False
    ) -> Maps:
        """Importance by side of a normalised image; the base side, which no threshold reads, only
        if asked for."""
        pixels = to_pixels(image, self.mean, self.std)
        sides = self.sides if base else self.sides[1:]
        if self.method == "entropy":
            return entropy_maps(pixels, sides, bins=self.bins)
        if self.method == "laplacian":
            return laplacian_maps(pixels, sides, aggregate=self.aggregate)
        factors = ERROR_FACTORS if base else ERROR_FACTORS[1:]
        return reconstruction_maps(pixels, sides, factors=factors, aggregate=self.aggregate)

    @torch.no_grad()
    def masks(self, image: Float[Tensor, "batch channels height width"]) -> Masks:
        """The chosen patches; coarse masks count complete squares only."""
        height, width = image.shape[-2:]
        if not self.thresholds:
            grid = (-(-height // self.patch), -(-width // self.patch))
            return {self.patch: image.new_ones(len(image), *grid, dtype=torch.bool)}
        maps = self.importance_maps(image)
        whole = {side: m[:, : height // side, : width // side] for side, m in maps.items()}
        grid = (-(-height // self.patch), -(-width // self.patch))
        return select_patches(whole, self.thresholds, patch=self.patch, grid=grid)

    def embed(self, patches: Float[Tensor, "*n channels patch patch"]) -> Float[Tensor, "*n dim"]:
        """The host's patch embedding of patches that are cut out already."""
        return F.linear(patches.flatten(-3), self.proj.weight.flatten(1), self.proj.bias)

    def embed_coarse(
        self,
        resized: Float[Tensor, "n channels patch patch"],
        constituents: Float[Tensor, "n parts channels patch patch"],
    ) -> Float[Tensor, "n dim"]:
        """E(resized) + W · Down^i(E(constituents))."""
        parts = self.embed(constituents)  # (n, 4^i, dim), raster order
        kernel = self.down.weight.permute(0, 2, 3, 1).flatten(1)  # (dim, 2 · 2 · dim)
        side = round(parts.shape[1] ** 0.5)
        while side > 1:
            side //= 2
            squares = rearrange(parts, "n (h i w j) d -> n (h w) (i j d)", h=side, i=2, w=side, j=2)
            parts = F.linear(squares, kernel, self.down.bias)
        return self.embed(resized) + self.zero(parts[:, 0])

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        height, width = image.shape[-2:]
        patch = self.patch
        if height < patch or width < patch:
            raise PolypatchError(
                f"the input is {height}×{width}, smaller than one patch of {patch}×{patch}; "
                f"use inputs of at least {patch} pixels a side or a smaller patch"
            )
        masks = self.masks(image)
        groups = group_patches(image, masks, patch=patch)
        values = [self.embed(groups.resized[patch])]
        values += [
            self.embed_coarse(groups.resized[side], groups.constituents[side])
            for side in self.sides[1:]
        ]
        # Candidates of all scales in a row; a sample's kept ones move to its first slots.
        kept = torch.cat([mask.flatten(1) for mask in masks.values()], dim=1)
        slots = kept.cumsum(1) - 1
        counts = kept.sum(1)
        longest, shortest = int(counts.max()), int(counts.min())
        slots = slots + longest * torch.arange(len(image), device=image.device)[:, None]
        cells = [mask[0].numel() for mask in masks.values()]
        where = torch.cat(
            [s[k] for s, k in zip(slots.split(cells, dim=1), kept.split(cells, dim=1))]
        )

        def placed(rows: Float[Tensor, "total dim"]) -> Float[Tensor, "batch longest dim"]:
            padded = rows.new_zeros(len(image) * longest, rows.shape[1]).index_copy(0, where, rows)
            return padded.unflatten(0, (len(image), longest))

        x = placed(torch.cat(values))
        box = placed(
            torch.cat(
                [
                    self._geometry(side, mask).index_select(0, mask.flatten(1).nonzero()[:, 1])
                    for side, mask in masks.items()
                ]
            )
        )
        real = None
        if shortest < longest:
            real = torch.arange(longest, device=image.device) < counts[:, None]
        return Tokens(
            x=x,
            centre=box[..., :2],
            extent=box[..., 2:],
            canvas=(height, width),
            mask=real,
        )

    @staticmethod
    def _geometry(side: int, mask: Tensor) -> Float[Tensor, "cells 4"]:
        """Centres and extents of one scale's squares, in pixels."""
        grid = (mask.shape[1], mask.shape[2])
        covered = (grid[0] * side, grid[1] * side)
        if not mask[0].numel():
            return torch.zeros(0, 4, device=mask.device)
        return torch.cat(raster_geometry(grid, covered, device=mask.device), dim=1)

    def extra_repr(self) -> str:
        return f"sides={self.sides}, thresholds={self.thresholds}, method={self.method!r}"


class ScaledPosition(LearnedPosition):
    """A learned position table, resampled to the grid of every scale.

    The host's table is first brought to the base grid of the input, as for a plain host, then
    shrunk by 2^i (bicubic, antialiased) for the squares of side 2^i · patch. Where the base grid
    doesn't divide by 2^i, its complete squares are shrunk.
    """

    def __init__(self, *, learned: LearnedPosition, patch: int, scales: int) -> None:
        Position.__init__(self)
        self.mode, self.table = learned.mode, learned.table
        self.patch, self.scales = patch, scales

    def forward(self, tokens: Tokens) -> Tokens:
        if tokens.grid is not None:
            return super().forward(tokens)
        height, width = tokens.canvas
        rows, columns = -(-height // self.patch), -(-width // self.patch)
        base = resample_grid(self.table, (rows, columns), mode=self.mode)
        tables, starts, widths = [base.flatten(0, 2)], [0], [columns]
        for level in range(1, self.scales):
            grid = (rows >> level, columns >> level)
            starts.append(starts[-1] + len(tables[-1]))
            widths.append(grid[1])
            if grid[0] and grid[1]:
                whole = base[:, : grid[0] << level, : grid[1] << level]
                tables.append(resample_grid(whole, grid, mode=self.mode).flatten(0, 2))
            else:
                tables.append(base.new_zeros(0, base.shape[-1]))
        centre = tokens.centre[:, tokens.prefix :]
        # Padding has no extent; it reads a position that nobody looks at.
        extent = tokens.extent[:, tokens.prefix :].clamp_min(self.patch)
        level = (extent[..., 0] / self.patch).log2().round().long()
        cell = (centre / extent).floor().long()
        start = torch.tensor(starts, device=level.device)[level]
        across = torch.tensor(widths, device=level.device)[level]
        index = start + cell[..., 0] * across + cell[..., 1]
        code = F.embedding(index, torch.cat(tables)).to(tokens.x.dtype)
        return tokens.with_x(tokens.x + F.pad(code, (0, 0, tokens.prefix, 0)))


# ---- plugging in ---------------------------------------------------------------------------------


def plug(
    host: ViT,
    *,
    scales: int = 2,
    thresholds: float | Sequence[float] | None = None,
    method: str = "entropy",
    aggregate: str = "mean",
    bins: int = 512,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> ViT:
    """Give the host patches of ``scales`` sizes: its own, twice that, four times that, ...

    Args:
        scales: number of patch sizes; 1 leaves the plain grid.
        thresholds: one for each coarse size, smallest first (a single number serves all), in bits
            for ``"entropy"``; default: :func:`default_thresholds`.
        method: ``"entropy"``, ``"laplacian"`` or ``"upsample_mse"``.
        aggregate: ``"mean"``, ``"max"`` or ``"std"`` over a square, for the latter two.
        bins: grey bins of the entropy.
        mean, std: with what the images that arrive have been normalised; the defaults are
            ImageNet's, as the authors have them.

    Raises:
        PolypatchError: a host whose patching isn't the plain grid, or options out of range.
    """
    if not isinstance(host.patching, GridPatching):
        raise PolypatchError(
            "quadtree needs a host with plain grid patches, as it reuses their embedding; this "
            f"one has {type(host.patching).__name__}"
        )
    if scales < 1:
        raise PolypatchError(f"quadtree needs at least one scale, got scales={scales}")
    if method not in METHODS:
        raise PolypatchError(f"there is no method={method!r}{suggest(method, METHODS)}")
    if aggregate not in AGGREGATES:
        raise PolypatchError(f"there is no aggregate={aggregate!r}{suggest(aggregate, AGGREGATES)}")
    if bins < 2:
        raise PolypatchError(f"an entropy needs at least 2 bins, got bins={bins}")
    patching = host.patching
    channels = patching.proj.in_channels
    if not len(mean) == len(std) == channels:
        raise PolypatchError(
            f"the host has {channels} channels; give quadtree as many numbers in mean and std "
            f"(got {len(mean)} and {len(std)})"
        )
    if thresholds is None:
        thresholds = default_thresholds(method, patching.patch, scales, aggregate=aggregate)
    elif isinstance(thresholds, int | float):
        thresholds = (float(thresholds),) * (scales - 1)
    if len(thresholds) != scales - 1:
        raise PolypatchError(
            f"{scales} scales need {scales - 1} thresholds, got {len(tuple(thresholds))}"
        )
    if scales == 1:
        return host.plugged("quadtree")
    weight = patching.proj.weight
    host.patching = QuadtreePatching(
        proj=patching.proj,
        patch=patching.patch,
        thresholds=thresholds,
        method=method,
        aggregate=aggregate,
        bins=bins,
        mean=mean,
        std=std,
    ).to(device=weight.device, dtype=weight.dtype)
    if isinstance(host.position, LearnedPosition):
        host.position = ScaledPosition(learned=host.position, patch=patching.patch, scales=scales)
    return host.plugged("quadtree")
