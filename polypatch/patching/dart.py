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
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..hosts.layouts import TIMM, rename
from ..hosts.vit import InputRequirements, ViT, assemble_vit
from ..nn import GridPatching, LearnedPosition, Mlp, init_transformer_weights, linear_of
from ..nn.pooling import ClassToken
from ..tokens import Pieces, Tokens
from .dart_features import ImageNetFeatures, score_features

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
            self.mlp.fc2 = nn.Linear(hidden, 1, bias=False)

    def raw(
        self, image: Float[Tensor, "batch channels height width"], grid: tuple[int, int]
    ) -> Float[Tensor, "batch rows columns"]:
        """Scores before they are standardised, in float32 at least."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.features(image)
        places = features.permute(0, 2, 3, 1)
        if self.version == "v1":
            score = self.mlp(places)[..., 0]
        else:
            gate = torch.sigmoid(self.mlp(places.flatten(1, 2).mean(1)))
            score = (places.flatten(1, 2) * gate[:, None]).sum(-1).view(places.shape[:3])
        # Quantiles in bfloat16 would place 256 different edges at best.
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        return F.interpolate(score[:, None], size=grid, mode="bilinear", align_corners=False)[:, 0]

    def forward(
        self, image: Float[Tensor, "batch channels height width"], grid: tuple[int, int]
    ) -> Float[Tensor, "batch rows columns"]:
        score = standardised(self.raw(image, grid), over=self.standardise)
        return torch.sigmoid(score) + 0.1 if self.version == "v1" else torch.sigmoid(2 * score)


def load_features(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill the score features of ``model`` from an ImageNet classifier's state dict (torchvision's
    ``mobilenet_v3_small``, ``mobilenet_v3_large``, ``efficientnet_b0``). Its later layers are left.

    Raises:
        PolypatchError: the model has no such features, or a weight is missing or misshapen.
    """
    patching = getattr(model, "patching", model)
    features = getattr(getattr(patching, "score", None), "features", None)
    if not isinstance(features, ImageNetFeatures):
        raise PolypatchError(
            "this model's scores don't come from an ImageNet network; "
            "make it with dart(score=mobilenet-small) or another"
        )
    wanted = features.state_dict()
    given = {name.removeprefix("features."): value for name, value in state.items()}
    wrong = [n for n, v in wanted.items() if n not in given or given[n].shape != v.shape]
    if wrong:
        raise PolypatchError(f"weights are missing or misshapen: {', '.join(wrong[:6])}")
    features.load_state_dict({name: given[name] for name in wanted})


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
    _initialise(network)
    network.features.requires_grad_(not frozen)
    reference = next(host.patching.parameters())
    host.patching = patching.to(device=reference.device, dtype=reference.dtype)
    if position == "region" and type(host.position) is LearnedPosition:
        host.position = _region_position(host.position)
    return host.plugged("dart")


def _initialise(network: ScoreNetwork) -> None:
    if any(value.is_meta for value in network.parameters()):
        return
    init_transformer_weights(network)
    if isinstance(network.features, ImageNetFeatures):
        network.features.init_weights()


def _region_position(position: LearnedPosition) -> RegionPosition:
    """The same table, read over regions."""
    grid = (position.table.shape[1], position.table.shape[2])
    with torch.device("meta"):
        new = RegionPosition(grid=grid, dim=position.table.shape[3], mode=position.mode)
    new.table = position.table
    return new


# ---- the authors' networks -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the authors' ``models_deit.py``; the depth is 12, the patch 16."""

    dim: int
    heads: int
    score: str
    version: str = "v1"
    tokens: int = 196


#: darvit_tiny, _tiny_v2, _tiny_121p, _sm, _sm_144p, _sm_288p, _sm_392p.
VARIANTS: dict[str, Variant] = {
    "dart-tiny": Variant(dim=192, heads=3, score="mobilenet-small"),
    "dart-tiny-v2": Variant(dim=192, heads=3, score="mobilenet-small", version="v2"),
    "dart-tiny-121": Variant(dim=192, heads=3, score="mobilenet-small", tokens=121),
    "dart-small": Variant(dim=384, heads=6, score="mobilenet-large"),
    "dart-small-144": Variant(dim=384, heads=6, score="mobilenet-large", tokens=144),
    "dart-small-288": Variant(dim=384, heads=6, score="mobilenet-large", tokens=288),
    "dart-small-392": Variant(dim=384, heads=6, score="mobilenet-large", tokens=392),
}

_PATCH = 16


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
    if variant not in VARIANTS:
        raise PolypatchError(f"there is no {variant}{suggest(variant, VARIANTS, kind='variants')}")
    row = VARIANTS[variant]
    if resolution < 2 * _PATCH:
        raise PolypatchError(f"{variant} needs a resolution of at least 32, got {resolution}")
    cells = math.ceil(resolution / (2 * _PATCH))
    features = score_features(row.score, row.version)
    model = _assemble(
        dim=row.dim,
        depth=12,
        heads=row.heads,
        hidden=4 * row.dim,
        classes=classes,
        grid=(cells, cells),
        cell=2 * _PATCH,
        tokens=row.tokens if tokens is None else tokens,
        score=ScoreNetwork(
            features=features.make(3),
            feature_dim=features.dim,
            hidden=features.hidden,
            version=row.version,
            standardise=standardise,
            frozen=frozen,
            last_bias=True,
        ),
        drop_path=drop_path,
    )
    if not next(model.parameters()).is_meta:
        model.init_weights()
    return model


def _assemble(
    *,
    grid: tuple[int, int],
    cell: int,
    tokens: int | None,
    rows: int | None = None,
    score: ScoreNetwork,
    representation: int = 0,
    classes: int,
    **numbers: Any,
) -> ViT:
    model = assemble_vit(
        grid=grid, patch=_PATCH, classes=classes, prefix=1, positioned=1, **numbers
    )
    assert isinstance(model.patching, GridPatching)
    assert isinstance(model.position, LearnedPosition)
    model.resolution = grid[0] * cell
    model.patching = DartPatching(
        score=score,
        embed=linear_of(model.patching.proj),
        patch=_PATCH,
        cell=cell,
        tokens=tokens,
        rows=rows,
        padding="zeros",
    )
    model.position = _region_position(model.position)
    if score.frozen:
        score.features.requires_grad_(False)
    if representation:
        fc = nn.Linear(model.dim, representation)
        model.pooling = ClassToken(norm=nn.Sequential(fc, nn.Tanh()))
        model.head = nn.Linear(representation, classes) if classes else nn.Identity()
    return model.plugged("dart")


# ---- the authors' weights ------------------------------------------------------------------------

#: Theirs → ours, beside what a plain ViT of timm has. Both spellings of the score network occur:
#: inside of a MobileNet wrapper or bare. ``features.*`` keep their names below the prefix.
KEYS = {name: ours for name, ours in TIMM.items() if name.startswith(("blocks.", "norm", "head"))}
KEYS |= {"pre_logits.fc": "pooling.norm.0"}
KEYS |= {
    f"{stem}.mlp.net.{theirs}": f"patching.score.mlp.{ours}"
    for stem in ("patch_embed.spn.spn", "patch_embed.spn.spn.spn")
    for theirs, ours in ((0, "fc1"), (2, "fc2"))
}
_STEMS = ("patch_embed.spn.spn.spn.features.", "patch_embed.spn.spn.features.")
_SPECIAL = ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")

#: Constructor arguments of DARViT and its tokenizer, and what a variant is told by.
_KNOWN = {
    "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads",
    "mlp_ratio", "qkv_bias", "representation_size", "distilled", "drop_rate", "attn_drop_rate",
    "drop_path_rate", "norm_eps", "weight_init", "high_res", "num_patches", "target_h", "spn",
}  # fmt: skip


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
    words = sorted(word for word in set(config) - _KNOWN if not word.startswith("_"))
    if words:
        raise PolypatchError(f"unknown arguments of DARViT: {', '.join(words)}")
    if config.get("distilled"):
        raise PolypatchError("DARViT has no working distilled form: its forward pass fails")
    missing = [name for name in (*_SPECIAL, "blocks.0.mlp.fc1.weight") if name not in state]
    if missing:
        raise PolypatchError(f"weights that every DARViT has are missing: {', '.join(missing)}")
    renamed, unknown = _renamed(state)
    if unknown:
        raise PolypatchError(f"keys that no DARViT has: {', '.join(unknown[:8])}")
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    weight = state["patch_embed.proj.weight"]
    dim, channels = weight.shape[:2]
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    high_res = config.get("high_res", True)
    cell = 2 * _PATCH if high_res else _PATCH
    size = config.get("img_size", side * cell)
    if size != side * cell or side * side != state["pos_embed"].shape[1] - 1:
        raise PolypatchError(
            f"a position table of {state['pos_embed'].shape[1] - 1} cells does not belong to "
            f"images of {size} pixels with high_res={high_res}"
        )
    head = state.get("head.weight")
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    representation = state.get("pre_logits.fc.weight")
    cells = side * side
    model = _assemble(
        dim=dim,
        depth=1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks.")),
        heads=config.get("num_heads", max(1, dim // 64)),
        hidden=hidden,
        channels=channels,
        classes=0 if head is None else head.shape[0],
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        eps=config.get("norm_eps", 1e-6),
        drop_path=config.get("drop_path_rate", 0.0),
        representation=0 if representation is None else representation.shape[0],
        grid=(side, side),
        cell=cell,
        tokens=config.get("num_patches") or cells,
        rows=config.get("target_h"),
        score=_official_score(config.get("spn"), shapes, channels),
    )
    renamed["patching.embed.weight"] = weight.permute(0, 2, 3, 1).flatten(1)
    renamed["patching.embed.bias"] = state["patch_embed.proj.bias"]
    renamed["prefix.tokens"] = state["cls_token"]
    renamed["prefix.position"] = state["pos_embed"][:, :1]
    renamed["position.table"] = state["pos_embed"][:, 1:].reshape(1, side, side, dim)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in renamed.items()}
    if wanted != given:
        wrong = sorted(n for n in wanted.keys() | given.keys() if wanted.get(n) != given.get(n))
        said = [f"{n} ({given.get(n)} for {wanted.get(n)})" for n in wrong[:6]]
        raise PolypatchError(
            f"these weights don't fit the DARViT of their shapes: {'; '.join(said)}"
        )
    model.load_state_dict(renamed)
    return model.eval()


def _renamed(state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    features, rest = {}, {}
    for name, value in state.items():
        stem = next((s for s in _STEMS if name.startswith(s)), None)
        if stem is not None:
            features[f"patching.score.features.{name.removeprefix(stem)}"] = value
        elif name not in _SPECIAL:
            rest[name] = value
    renamed, unknown = rename(rest, KEYS)
    return renamed | features, unknown


def _official_score(spn: Any, shapes: Mapping[str, tuple[int, ...]], channels: int) -> ScoreNetwork:
    """The score network of a state dict, with what ``spn`` says beyond the shapes."""
    ours, _ = _renamed(shapes)
    first = ours.get("patching.score.mlp.fc1.weight")
    second = ours.get("patching.score.mlp.fc2.weight")
    if first is None or second is None:
        raise PolypatchError("the score network's weights (patch_embed.spn...mlp.net) are missing")
    hidden, feature_dim = first
    given = dict(spn) if isinstance(spn, Mapping) else {}
    version = given.get("version", "v1" if second[0] == 1 and feature_dim != 1 else "v2")
    features = given.get("features")
    if isinstance(features, str):
        features = score_features(features, version, channels=channels).make(channels)
    if features is None:
        features = _features_of(ours, channels)
    if features is None:
        raise PolypatchError(
            "the score network's features are none of those known "
            "(pixels, MobileNetV3, EfficientNet-B0, one convolution): give spn={'features': module}"
        )
    return ScoreNetwork(
        features=features,
        feature_dim=feature_dim,
        hidden=hidden,
        version=version,
        standardise="batch",
        frozen=True,
        last_bias=True,
    )


def _features_of(ours: Mapping[str, tuple[int, ...]], channels: int) -> nn.Module | None:
    """Which features have weights of these shapes."""
    stem = "patching.score.features."
    wanted = {n.removeprefix(stem): tuple(s) for n, s in ours.items() if n.startswith(stem)}
    if not wanted:
        return nn.Identity()
    if set(wanted) <= {"weight", "bias"} and len(wanted["weight"]) == 4:
        # A convolution's stride can't be told; patches that touch are the natural guess.
        out, inner, *kernel = wanted["weight"]
        size = (kernel[0], kernel[1])
        return nn.Conv2d(inner, out, size, stride=size, bias="bias" in wanted)
    for name in ("mobilenet-small", "mobilenet-large", "efficientnet-b0"):
        for version in ("v1", "v2"):
            make = score_features(name, version).make
            with torch.device("meta"):
                shapes = {n: tuple(v.shape) for n, v in make(channels).state_dict().items()}
            if shapes == wanted:
                return make(channels)
    return None


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration that :func:`from_official` takes, from names and shapes alone; None if
    these aren't a DARViT's. Neither the heads (64 channels each), nor ``high_res`` (True) nor
    ``num_patches`` (that of the position table) can be told: assumed is what the published
    networks have, but for those with 121, 144, 288 or 392 patches."""
    if any(name not in shapes for name in (*_SPECIAL, "blocks.0.attn.qkv.weight")):
        return None
    ours, unknown = _renamed(shapes)
    if unknown or "patching.score.mlp.fc1.weight" not in ours:
        return None
    with torch.device("meta"):
        if _features_of(ours, shapes["patch_embed.proj.weight"][1]) is None:
            return None
    dim = shapes["patch_embed.proj.weight"][0]
    cells = shapes["pos_embed"][1] - 1
    return {
        "img_size": 2 * _PATCH * math.isqrt(cells),
        "embed_dim": dim,
        "num_heads": max(1, dim // 64),
        "high_res": True,
        "num_patches": cells,
    }
