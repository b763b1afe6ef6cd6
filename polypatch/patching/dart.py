"""DART: patches whose sizes follow a learned map of importance, end to end differentiable.

A small network scores the cells of a coarse grid; the scores, normalised to a density, are cut into
parts of equal mass: first into rows, then, with all rows laid side by side as one strip, into
tokens. Detail gets many small patches, background few large ones, and the cuts have gradients.

Yin, Yin, Liu, Chen, Lin: *DART: Differentiable Dynamic Adaptive Region Tokenizer for Vision
Transformer and Mamba*, 2025, arXiv 2506.10390; code HCPLab-SYSU/DART.

With scores s over a grid of gh × gw cells, R rows and T tokens::

    s      = standardise(resize(net(image), gh × gw))          a positive map:
             version v1: sigmoid(s) + 0.1      version v2: sigmoid(2 s)
    f      = s / sum(s)                                        density, (batch, gh, gw)
    Q_f(p) = j + (p - F_(j-1)) / f_j   with  F_(j-1) < p <= F_j, F = cumsum(f)     quantile
    y_r    = Q_rowsums(f)(r / R)                               row edges, r = 0 ... R
    g      = f averaged over each new row, rows side by side   strip of R · gw cells
    e_t    = Q_g(t / T)                                        token edges on the strip
    patch  = the region's rows and columns at offsets k / p, k = 0 ... p-1, linear interpolation
    code   = the position table averaged over the region by overlap

A patch may so begin at the end of one row and end at the start of the next (or, if it is wider than
a row, span several); its support is then several boxes, :class:`~polypatch.tokens.Pieces`. Together
the supports cover the canvas exactly once. ``partition="grid"`` is the paper's other form
(DART-Grid, for networks that need a raster): columns are quantiles of the column sums, so that all
regions are boxes of one warped grid, and :func:`warp` gives the warped image itself.

Where the authors' code and this module differ:

* *Standardising.* The code standardises the scores over the **whole batch**, so an image's tokens
  depend on its batch mates. The published weights were trained so: :func:`build` and
  :func:`from_official` do it (``standardise="batch"``). :func:`plug` standardises each image by
  itself (``"image"``), with which one image's answer doesn't depend on others; there a flat image
  gets the regular grid.
* *Sizes.* The code knows 224 and 448 pixels, 16-pixel patches and a 14 × 14 score grid only. Here
  the grid has one cell per ``cell`` pixels of whatever input comes; their networks have
  ``cell=32`` (``high_res``: images of 448 pixels on a 14 × 14 grid), which is the same at 448.
* *The last patch.* The code reads zeros beyond the strip's end, so the last columns of the last
  patch fade to black where it is narrower than ``p`` pixels. Kept for their networks
  (``padding="zeros"``), ``"border"`` in :func:`plug`.
* *Frozen features.* Their MobileNets run without gradients. Their batch norms, though, are in
  training mode while the network trains: statistics come from the batch and running statistics are
  updated. So are ours (at batch 1 and an input of 32 pixels or less that is an error of torch's).
* The last bias of version v1 cancels when the mean is subtracted. It is kept where weights have it.

There is no loss, schedule or regulariser of its own: the network is trained with DeiT's recipe. The
paper's Mamba hosts (Vim, VideoMamba) and RMT aren't hosts of this library, so their weights are not
read; MnasNet and SqueezeNet as score networks appear in a table only and are left to
``ScoreNetwork(features=...)``, which takes any module.

Trap: regions are sampled at left-aligned offsets and not antialiased, as in the code; a region of
exactly p × p pixels at whole-number edges reads its pixels unchanged, so equal scores give ViT's
own patches.

The features of score networks stand in ``dart_features.py``, the authors' complete networks and
their weights in ``dart_networks.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..hosts import InputRequirements, ViT
from ..nn import (
    GridPatching,
    LearnedPosition,
    Linear,
    Mlp,
    init_parts,
    init_transformer_weights,
    linear_of,
)
from ..tokens import Pieces, Tokens
from .dart_features import load_features, score_features

__all__ = [
    "VARIANTS",
    "DartPatching",
    "Partition",
    "RegionPosition",
    "ScoreNetwork",
    "build",
    "flow_partition",
    "from_official",
    "grid_partition",
    "load_features",
    "overlap_weights",
    "plug",
    "quantile_edges",
    "quantiles",
    "recognise",
    "sample_regions",
    "score_features",
    "standardised",
    "strip_pieces",
    "warp",
]

# ---- cutting a density into parts of equal mass --------------------------------------------------


def quantiles(
    density: Float[Tensor, "batch cells"], levels: Float[Tensor, " levels"], *, eps: float = 1e-8
) -> Float[Tensor, "batch levels"]:
    """Where the cumulated density reaches each level, in cells from the left.

    The density is constant within a cell, so the inverse of its integral is piecewise linear, and
    differentiable in the density everywhere but at the cells' edges (where it is continuous). The
    ``density`` sums to 1; ``eps`` guards empty cells.
    """
    mass = density.cumsum(1)
    wanted = levels.to(mass.dtype).expand(len(density), -1).contiguous()
    cell = torch.searchsorted(mass.detach(), wanted).clamp_max(density.shape[1] - 1)
    before = F.pad(mass, (1, 0)).gather(1, cell)
    return cell + (wanted - before) / (density.gather(1, cell) + eps)


def quantile_edges(
    density: Float[Tensor, "batch cells"], parts: int
) -> Float[Tensor, "batch edges"]:
    """Edges that cut the density into ``parts`` of equal mass, from 0 to the number of cells."""
    levels = torch.linspace(0, 1, parts + 1, device=density.device, dtype=density.dtype)[1:-1]
    inner = quantiles(density, levels)
    return F.pad(F.pad(inner, (1, 0)), (0, 1), value=float(density.shape[1]))


def overlap_weights(
    low: Float[Tensor, "*batch"], high: Float[Tensor, "*batch"], cells: int
) -> Float[Tensor, "*batch cells"]:
    """What share of each interval lies in each cell [j, j + 1): the weights that average a
    piecewise constant function over the interval. Empty intervals give zeros."""
    start = torch.arange(cells, device=low.device, dtype=low.dtype)
    overlap = torch.minimum(high[..., None], start + 1) - torch.maximum(low[..., None], start)
    overlap = overlap.clamp_min(0)
    return overlap / overlap.sum(-1, keepdim=True).clamp_min(1e-6)


class Partition(NamedTuple):
    """Cuts of a canvas, in cells of the score grid (cells are what float32 resolves best).

    Fields:
        rows: edges of the rows of regions, from 0 to the grid's rows.
        strip: edges of the tokens where all rows lie side by side, from 0 to the number of rows
            times the grid's columns.
        grid: the score grid's rows and columns.
        density: over the strip's cells, from which ``strip`` was cut; None where it was not.
    """

    rows: Float[Tensor, "batch row_edges"]
    strip: Float[Tensor, "batch token_edges"]
    grid: tuple[int, int]
    density: Float[Tensor, "batch cells"] | None = None


def flow_partition(
    density: Float[Tensor, "batch height width"], *, tokens: int, rows: int
) -> Partition:
    """The paper's partition: ``rows`` rows of equal mass, then ``tokens`` parts of equal mass of
    the strip of all rows."""
    height, width = density.shape[1:]
    row_sums = density.sum(2)
    row_sums = row_sums / (row_sums.sum(1, keepdim=True) + 1e-8)
    # Heights, then their sums, though these are the edges again: edges on a strip of some thousand
    # pixels are at float32's limit, and only the same order of sums gives the authors' roundings.
    edges = F.pad(quantile_edges(row_sums, rows).diff(dim=1).cumsum(1), (1, 0))
    weights = overlap_weights(edges[:, :-1], edges[:, 1:], height)
    strip = (weights @ density).flatten(1)
    # Averaging over rows of unequal height loses the mass that a tall row holds; the paper
    # renormalises the averages, so a cell of a tall row counts as much as one of a flat row.
    strip = strip / strip.sum(1, keepdim=True)
    cells = strip.shape[1]
    # Dividing and multiplying changes the last bit: the authors keep fractions of the strip.
    return Partition(edges, quantile_edges(strip, tokens) / cells * cells, (height, width), strip)


def grid_partition(
    density: Float[Tensor, "batch height width"], *, columns: int, rows: int
) -> Partition:
    """DART-Grid: rows of equal mass of the row sums, columns of equal mass of the column sums."""
    height, width = density.shape[1:]
    edges = quantile_edges(density.sum(2), rows)
    across = quantile_edges(density.sum(1), columns)
    start = width * torch.arange(rows, device=density.device, dtype=density.dtype)[:, None]
    strip = (across[:, None, :-1] + start).flatten(1)
    return Partition(edges, F.pad(strip, (0, 1), value=float(rows * width)), (height, width))


# ---- reading the regions -------------------------------------------------------------------------


def sample_regions(
    image: Float[Tensor, "batch channels height width"],
    partition: Partition,
    patch: int,
    *,
    padding: str = "border",
) -> Float[Tensor, "batch tokens patch patch channels"]:
    """Each region resampled to ``patch`` × ``patch`` pixels, differentiable in the cuts.

    Every row of regions is read at ``patch`` heights, all rows are laid side by side, and each
    token reads ``patch`` columns of this strip; between columns of two rows it interpolates as
    between neighbours. ``padding`` says what lies right of the strip: "border" or "zeros". The
    latter also rounds coordinates as ``F.grid_sample`` does, which is what published weights saw:
    on a strip of 6000 pixels that is some 1e-4 of a pixel.
    """
    batch, channels, height, width = image.shape
    rows = partition.rows.shape[1] - 1
    offset = torch.arange(patch, device=image.device, dtype=partition.rows.dtype) / patch

    def between(edges: Tensor) -> Tensor:
        return (edges[:, :-1, None] + (edges[:, 1:] - edges[:, :-1])[..., None] * offset).flatten(1)

    y = between(partition.rows * (height / partition.grid[0]))
    x = between(partition.strip * width * rows / (rows * partition.grid[1]))
    if padding == "zeros":
        y, x = _through_unit_range(y, height), _through_unit_range(x, rows * width)
    # Lines of the image as (batch * height, width * channels): whole rows move, not elements.
    lines = image.permute(0, 2, 3, 1).reshape(batch * height, width * channels)
    lines = _read_lines(lines, y.clamp(0, height - 1), height)
    lines = lines.view(batch, rows, patch, width, channels)
    strip = lines.transpose(2, 3).reshape(batch * rows * width, patch * channels)
    patches = _read_lines(strip, x, rows * width, zeros=padding == "zeros")
    return patches.view(batch, -1, patch, patch, channels).transpose(2, 3)


def _through_unit_range(at: Tensor, count: int) -> Tensor:
    """Indices to [-1, 1] and back, as ``grid_sample`` wants them: the same but for rounding."""
    span = max(1, count - 1)
    return (2 * (at / span) - 1 + 1) / 2 * span


def _read_lines(
    lines: Float[Tensor, "lines values"],
    at: Float[Tensor, "batch reads"],
    count: int,
    *,
    zeros: bool = False,
) -> Float[Tensor, "batch*reads values"]:
    """Linear interpolation between each sample's ``count`` lines at the given indices."""
    low = at.detach().floor().clamp(0, count - 1)
    fraction = (at - low).flatten()[:, None].to(lines.dtype)
    first = low.long()
    last = first + 1
    start = count * torch.arange(len(at), device=at.device)[:, None]
    below = lines.index_select(0, (first + start).flatten())
    above = lines.index_select(0, (last.clamp_max(count - 1) + start).flatten())
    if zeros:
        inside = (last < count).flatten()[:, None]
        return below * (1 - fraction) + above * (fraction * inside)
    # Beyond the last line both are that line.
    return torch.lerp(below, above, fraction)


def warp(
    image: Float[Tensor, "batch channels height width"],
    density: Float[Tensor, "batch rows_of_cells columns_of_cells"],
    *,
    grid: tuple[int, int],
    patch: int,
) -> Float[Tensor, "batch channels tall wide"]:
    """The image with dense regions enlarged, grid[0]·patch × grid[1]·patch pixels: what DART-Grid
    hands to a network that wants an image."""
    patches = sample_regions(
        image, grid_partition(density, rows=grid[0], columns=grid[1]), patch
    ).unflatten(1, grid)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


# Geometry lies on multiples of this part of a pixel, on which sums, differences and halves are
# exact in float32 (up to 4096 pixels): neighbouring boxes share an edge exactly, so no pixel centre
# falls between two of them.
_SNAP = 2048.0


def _snapped(value: Tensor) -> Tensor:
    return value + ((value.detach() * _SNAP).round() / _SNAP - value.detach())


def strip_pieces(
    partition: Partition, canvas: tuple[int, int]
) -> tuple[Float[Tensor, "batch tokens 2"], Float[Tensor, "batch tokens 2"], Pieces]:
    """Centroid and bounding box of every token, and the boxes that it consists of.

    Token edges and row edges together cut the strip into tokens + rows - 1 intervals, each within
    one token and one row; an interval is a box.
    """
    height, width = canvas
    batch, tokens = partition.strip.shape[0], partition.strip.shape[1] - 1
    rows = partition.rows.shape[1] - 1
    device, kind = partition.strip.device, partition.strip.dtype
    columns = partition.grid[1]  # a row's length on the strip
    inner = partition.strip[:, 1:-1].sort(dim=1).values
    ends = columns * torch.arange(1, rows, device=device, dtype=kind).expand(batch, -1)
    cuts = torch.cat([inner, ends], dim=1).sort(dim=1).values
    cuts = F.pad(F.pad(cuts, (1, 0)), (0, 1), value=float(rows * columns))
    low, high = cuts[:, :-1], cuts[:, 1:]
    middle = ((low + high) / 2).detach()
    owner = torch.searchsorted(inner.detach().contiguous(), middle.contiguous(), right=True)
    row = (middle / columns).floor().clamp(0, rows - 1).long()
    scale = width / columns
    left, right = ((_snapped((edge - row * columns) * scale)) for edge in (low, high))
    lines = _snapped(partition.rows * (height / partition.grid[0]))
    top, bottom = lines.gather(1, row), lines.gather(1, row + 1)
    first = torch.stack([top, left], dim=-1)
    last = torch.stack([bottom, right], dim=-1)
    centre, extent = (first + last) / 2, last - first
    area = extent.prod(-1)
    real = area.detach() > 0

    # The floor keeps the centre of a token without any area finite: it is then its boxes' mean.
    share = area.clamp_min(1e-6)
    index = owner[..., None].expand_as(centre)
    empty = centre.new_zeros(batch, tokens, 2)
    total = empty[..., 0].scatter_add(1, owner, share)[..., None]
    centroid = empty.scatter_add(1, index, centre * share[..., None]) / total
    low_corner = empty.scatter_reduce(1, index, first, "amin", include_self=False)
    high_corner = empty.scatter_reduce(1, index, last, "amax", include_self=False)
    pieces = Pieces(centre, extent, owner.where(real, -1))
    return centroid, high_corner - low_corner, pieces


class RegionPosition(LearnedPosition):
    """A learned table averaged over each token's region (the paper resamples position embeddings
    like its density: over the rows, then over the strip).

    A token of several boxes weights them by their widths, not areas: on the strip all rows are
    equally high. For tokens whose regions are a label map it is :class:`LearnedPosition`.
    """

    @classmethod
    def like(cls, position: LearnedPosition) -> RegionPosition:
        """The same table, read over regions."""
        _, rows, columns, dim = position.table.shape
        with torch.device("meta"):
            new = cls(grid=(rows, columns), dim=dim, mode=position.mode)
        new.table = position.table
        return new

    def forward(self, tokens: Tokens) -> Tokens:
        regions = tokens.regions
        if tokens.grid is not None or isinstance(regions, Tensor):
            return super().forward(tokens)
        start = tokens.prefix
        count = tokens.x.shape[1] - start
        if isinstance(regions, Pieces):
            centre, extent, owner = regions.centre, regions.extent, regions.owner
        else:
            centre, extent = tokens.centre[:, start:], tokens.extent[:, start:]
            owner = torch.arange(count, device=centre.device).expand(len(centre), -1)
        grid = self.table.shape[1:3]
        low, high = centre - extent / 2, centre + extent / 2
        down, across = (
            overlap_weights(
                low[..., axis] * (grid[axis] / tokens.canvas[axis]),
                high[..., axis] * (grid[axis] / tokens.canvas[axis]),
                grid[axis],
            )
            for axis in (0, 1)
        )
        width = extent[..., 1] * (owner >= 0)
        owner = owner.clamp_min(0)
        total = width.new_zeros(len(width), count).scatter_add(1, owner, width)
        share = width / total.gather(1, owner).clamp_min(1e-6)
        weights = ((down * share[..., None])[..., None] * across[:, :, None]).flatten(2)
        if isinstance(regions, Pieces):
            index = owner[..., None].expand_as(weights)
            weights = weights.new_zeros(len(weights), count, weights.shape[2]).scatter_add(
                1, index, weights
            )
        code = weights.to(self.table.dtype) @ self.table.flatten(1, 2)[0]
        placed = tokens.placed + code.to(tokens.x.dtype)
        if start:
            placed = torch.cat([tokens.x[:, :start], placed], dim=1)
        return tokens.with_x(placed)


# ---- scores --------------------------------------------------------------------------------------


def standardised(
    score: Float[Tensor, "batch height width"], *, over: str = "image"
) -> Float[Tensor, "batch height width"]:
    """Mean 0 and standard deviation 1 over each ``"image"`` or over the whole ``"batch"``.

    Over an image, ``sqrt(variance + 1e-8)`` keeps a flat map flat and its gradient finite. Over the
    batch it is the authors' (s - mean) / (std + 1e-8).
    """
    if over == "batch":
        centred = score - score.mean()
        return centred / (centred.std(correction=min(1, score.numel() - 1)) + 1e-8)
    centred = score - score.mean((1, 2), keepdim=True)
    variance = centred.var((1, 2), keepdim=True, correction=min(1, score[0].numel() - 1))
    return centred / (variance + 1e-8).sqrt()


class ScoreNetwork(nn.Module):
    """Positive scores (batch, *grid) for an image: features, a small head, standardising, sigmoid.

    Version v1 maps each place's features to a score; v2 weights the channels by a gate that it
    computes from their means, and sums them.

    Args:
        features: image → (batch, feature_dim, any height, any width).
        version: "v1" or "v2".
        standardise: "image" or "batch", see :func:`standardised`.
        frozen: run the features without gradients.
        last_bias: whether v1's last layer has its (ineffective) bias.
    """

    def __init__(
        self,
        *,
        features: nn.Module,
        feature_dim: int,
        hidden: int,
        version: str = "v1",
        standardise: str = "image",
        frozen: bool = False,
        last_bias: bool = False,
    ) -> None:
        super().__init__()
        _one_of("version", version, ("v1", "v2"))
        _one_of("standardise", standardise, ("image", "batch"))
        self.version, self.standardise, self.frozen = version, standardise, frozen
        self.features = features
        self.mlp = Mlp(dim=feature_dim, hidden=hidden, out=1 if version == "v1" else feature_dim)
        if version == "v1" and not last_bias:
            self.mlp.fc2 = Linear(hidden, 1, bias=False)

    def raw(
        self, image: Float[Tensor, "batch channels height width"], grid: tuple[int, int]
    ) -> Float[Tensor, "batch rows columns"]:
        """Scores before they are standardised, in float32 at least."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.features(image)
        places = features.permute(0, 2, 3, 1)
        if self.version == "v1":
            score = self._head(places)[..., 0]
        else:
            gate = torch.sigmoid(self._head(places.flatten(1, 2).mean(1)))
            score = (places.flatten(1, 2) * gate[:, None]).sum(-1).view(places.shape[:3])
        # Quantiles in bfloat16 would place 256 different edges at best.
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        return F.interpolate(score[:, None], size=grid, mode="bilinear", align_corners=False)[:, 0]

    def _head(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch out"]:
        """The MLP by torch's own product: at which pixel a region begins hangs on the last digits
        of its score, which must not depend on whether gradients are recorded."""
        first, last = self.mlp.fc1, self.mlp.fc2
        hidden = self.mlp.activation(F.linear(x, first.weight, first.bias))
        return F.linear(hidden, last.weight, last.bias)

    def forward(
        self, image: Float[Tensor, "batch channels height width"], grid: tuple[int, int]
    ) -> Float[Tensor, "batch rows columns"]:
        score = standardised(self.raw(image, grid), over=self.standardise)
        return torch.sigmoid(score) + 0.1 if self.version == "v1" else torch.sigmoid(2 * score)


# ---- the tokenizer -------------------------------------------------------------------------------


class DartPatching(nn.Module):
    """Image → :class:`Tokens` of adaptive regions, see the top of this file.

    Args:
        score: positive scores for an image on a grid, a :class:`ScoreNetwork`.
        embed: flattened patches (row, column, channel) → features, e.g. a linear layer.
        patch: side to which a region is resampled.
        tokens: how many; None: as many as cells of ``patch`` pixels cover the input.
        rows: into how many rows of regions; None: round(sqrt(tokens · height / width)).
        cell: pixels per cell of the score grid.
        partition: "flow" or "grid" (rows · columns tokens, columns = round(tokens / rows)).
        padding: what lies right of the strip: "border" or "zeros".
    """

    def __init__(
        self,
        *,
        score: nn.Module,
        embed: nn.Module,
        patch: int,
        cell: int,
        tokens: int | None = None,
        rows: int | None = None,
        partition: str = "flow",
        padding: str = "border",
    ) -> None:
        super().__init__()
        _one_of("partition", partition, ("flow", "grid"))
        _one_of("padding", padding, ("border", "zeros"))
        for name, value in (("tokens", tokens), ("rows", rows), ("cell", cell)):
            if value is not None and value < 1:
                raise PolypatchError(f"{name} must be at least 1, got {value}")
        self.score, self.embed = score, embed
        self.patch, self.cell, self.tokens, self.rows = patch, cell, tokens, rows
        self.partition, self.padding = partition, padding
        self.input_requirements = InputRequirements()

    def init_weights(self) -> None:
        if isinstance(self.embed, nn.Linear):
            nn.init.trunc_normal_(self.embed.weight, std=self.embed.in_features**-0.5)

    def counts(self, height: int, width: int) -> tuple[int, int]:
        """How many tokens, and in how many rows, an input of this size gets."""
        tokens = self.tokens or math.ceil(height / self.patch) * math.ceil(width / self.patch)
        rows = self.rows or max(1, round(math.sqrt(tokens * height / width)))
        return tokens, rows

    def density(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch rows columns"]:
        """The scores as a density over the score grid."""
        height, width = image.shape[-2:]
        score = self.score(image, (math.ceil(height / self.cell), math.ceil(width / self.cell)))
        return score / score.flatten(1).sum(1)[:, None, None]

    def cut(self, image: Float[Tensor, "batch channels height width"]) -> Partition:
        """Where the image is cut."""
        tokens, rows = self.counts(*image.shape[-2:])
        density = self.density(image)
        if self.partition == "grid":
            return grid_partition(density, rows=rows, columns=max(1, round(tokens / rows)))
        return flow_partition(density, tokens=tokens, rows=rows)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        canvas = (image.shape[-2], image.shape[-1])
        partition = self.cut(image)
        patches = sample_regions(image, partition, self.patch, padding=self.padding)
        centre, extent, pieces = strip_pieces(partition, canvas)
        return Tokens(
            x=self.embed(patches.flatten(2)),
            centre=centre,
            extent=extent,
            canvas=canvas,
            regions=pieces,
        )


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise PolypatchError(f"there is no {name}={value!r}{suggest(str(value), known)}")


def plug(
    host: ViT,
    *,
    tokens: int | None = None,
    rows: int | None = None,
    cell: int | None = None,
    score: str = "conv",
    version: str = "v1",
    standardise: str = "image",
    partition: str = "flow",
    position: str = "region",
    frozen: bool = False,
) -> ViT:
    """Replace the host's grid of equal patches by adaptive regions; its patch projection and
    position table stay.

    Args:
        tokens: how many; default: as many as the host's grid has on the same input.
        rows: into how many rows regions are cut; default: so that they are square on average.
        cell: pixels per cell of the score grid; default: the host's patch.
        score: see :func:`score_features`. ImageNet networks come untrained:
            :func:`load_features` fills them, ``frozen`` then leaves them as they are.
        version: head of the score network, "v1" or "v2".
        standardise: "image", or "batch" as the authors do.
        partition: "flow", or "grid" for boxes in a warped raster.
        position: "region": learned position tables are averaged over each region (the paper); or
            "centre": they are read at its centre. Other position codes read the centre anyway.
        frozen: no gradients for the score features.

    Raises:
        PolypatchError: the host doesn't cut its input into a grid of patches, or an option is
            wrong.
    """
    embed = getattr(host.patching, "embed", None)  # tokenizers that embed flattened patches
    patch = getattr(host.patching, "patch", None)
    if isinstance(host.patching, GridPatching):
        channels = host.patching.proj.in_channels
        embed = linear_of(host.patching.proj)
    elif isinstance(embed, nn.Module) and isinstance(patch, int):
        channels = int(getattr(host.patching, "channels", 3))
    else:
        raise PolypatchError(
            "dart needs a host that cuts its input into a grid of patches; this one's patching is "
            f"{type(host.patching).__name__}"
        )
    _one_of("position", position, ("region", "centre"))
    _one_of("version", version, ("v1", "v2"))
    features = score_features(score, version, channels=channels)
    network = ScoreNetwork(
        features=features.make(channels),
        feature_dim=features.dim,
        hidden=features.hidden,
        version=version,
        standardise=standardise,
        frozen=frozen,
    )
    patching = DartPatching(
        score=network,
        embed=embed,
        patch=host.patch,
        cell=host.patch if cell is None else cell,
        tokens=tokens,
        rows=rows,
        partition=partition,
    )
    if not any(value.is_meta for value in network.parameters()):
        init_transformer_weights(network)
        init_parts(network)
    network.features.requires_grad_(not frozen)
    reference = next(host.patching.parameters())
    host.patching = patching.to(device=reference.device, dtype=reference.dtype)
    if position == "region" and type(host.position) is LearnedPosition:
        host.position = RegionPosition.like(host.position)
    return host.plugged("dart")


# ---- the authors' networks -----------------------------------------------------------------------

#: Rows of the authors' ``models_deit.py``: darvit_tiny, _tiny_v2, _tiny_121p, _sm, _sm_144p,
#: _sm_288p, _sm_392p. All have 12 blocks and patches of 16 pixels.
VARIANTS: dict[str, dict[str, Any]] = {
    "dart-tiny": dict(dim=192, heads=3, score="mobilenet-small", version="v1", tokens=196),
    "dart-tiny-v2": dict(dim=192, heads=3, score="mobilenet-small", version="v2", tokens=196),
    "dart-tiny-121": dict(dim=192, heads=3, score="mobilenet-small", version="v1", tokens=121),
    "dart-small": dict(dim=384, heads=6, score="mobilenet-large", version="v1", tokens=196),
    "dart-small-144": dict(dim=384, heads=6, score="mobilenet-large", version="v1", tokens=144),
    "dart-small-288": dict(dim=384, heads=6, score="mobilenet-large", version="v1", tokens=288),
    "dart-small-392": dict(dim=384, heads=6, score="mobilenet-large", version="v1", tokens=392),
}


def build(
    variant: str,
    *,
    classes: int = 1000,
    resolution: int = 448,
    tokens: int | None = None,
    standardise: str = "batch",
    frozen: bool = True,
    drop_path: float = 0.0,
) -> ViT:
    """One of the authors' networks, initialised; it is a host with sockets.

    The score features are frozen, as in the authors' training; they are random until
    :func:`load_features` fills them, so without weights at hand ``frozen=False`` makes more sense.

    Args:
        resolution: input side that the position table is made for, one cell per 32 pixels; any
            input is accepted and gives the same number of tokens.
        tokens: another number of tokens than the variant's.
        standardise: "batch" (the authors') or "image".
        drop_path: stochastic depth rate of the last block (the recipe is DeiT's: 0.1).

    Raises:
        PolypatchError: unknown variant, or an option out of its range.
    """
    from .dart_networks import published

    if variant not in VARIANTS:
        raise PolypatchError(f"there is no {variant}{suggest(variant, VARIANTS, kind='variants')}")
    if resolution < 32:
        raise PolypatchError(f"{variant} needs a resolution of at least 32, got {resolution}")
    numbers = dict(VARIANTS[variant])
    if tokens is not None:
        numbers["tokens"] = tokens
    return published(
        **numbers,
        classes=classes,
        resolution=resolution,
        standardise=standardise,
        frozen=frozen,
        drop_path=drop_path,
    )


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> ViT:
    """The authors' DARViT with the given weights, in eval mode.

    Scores are standardised over the batch, as these weights were trained; set
    ``model.patching.score.standardise = "image"`` to make images independent of each other.

    Args:
        config: the authors' argument names (``img_size``, ``embed_dim``, ``num_heads``,
            ``high_res``, ``num_patches``, ...); what shapes determine may be left out. ``spn``
            may be a mapping of ScorePredNet's arguments (``features``: a module or one of
            :func:`score_features`' names, ``feature_dim``, ``hidden_dim``, ``version``); left out,
            it is found from the weights. Dropout rates only matter in training and, but for
            ``drop_path_rate``, are not kept.
        state: the state dict with the authors' keys.

    Raises:
        PolypatchError: a key or shape that doesn't fit, each named; ``distilled``, with which the
            authors' forward pass fails; an image size other than the one that they support.
    """
    from .dart_networks import read

    return read(config, state)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration that :func:`from_official` takes, from names and shapes alone; None if
    these aren't a DARViT's. Neither the heads (64 channels each), nor ``high_res`` (True) nor
    ``num_patches`` (that of the position table) can be told: assumed is what the published
    networks have, but for those with 121, 144, 288 or 392 patches."""
    from .dart_networks import recognise_network

    return recognise_network(shapes)
