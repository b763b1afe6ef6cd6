"""Tokens that know where they came from: the one type between patching, mixing, reducing and heads.

A batch of tokens is a feature tensor plus geometry. The geometry is in *input units* (pixels y, x
for images; samples for series and audio; bytes for text), so any tokenizer works with any position
code, any picture and any dense head, and nobody ever has to infer a square from a token count.

Two kinds of tokens stand in ``x``: ``prefix`` leading ones without a place (class token, registers,
prompts), then the *placed* ones. Everything that speaks of places (``keep``, ``merge``,
``regions``, ``grid``) counts placed tokens only, so adding a class token changes no index.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

__all__ = ["Packed", "Pieces", "Tokens", "length_buckets", "raster_geometry"]


@dataclass(frozen=True)
class Pieces:
    """Supports made of several boxes: box ``p`` of an image belongs to placed token ``owner[p]``.

    Merged tokens own all the boxes that went into them; a region that wraps from the end of one
    image row to the start of the next owns a box in each. ``owner`` is -1 for a dropped box.
    """

    centre: Float[Tensor, "#batch pieces axes"]
    extent: Float[Tensor, "#batch pieces axes"]
    owner: Int64[Tensor, "batch pieces"]


@dataclass(frozen=True)
class Tokens:
    """A batch of tokens with their geometry. Immutable: every operation returns a new one.

    Fields:
        x: features, padded to the longest sample.
        centre: where each token's support lies, in input units. Batch 1 where all samples share it
            (a grid), so a grid's geometry is stored and turned into positions once.
        extent: the support's size in the same units. Of several boxes: their bounding box.
        canvas: the input's size, e.g. (height, width).
        mask: True where a token is real; None: all are.
        weight: how many original tokens each one stands for (token merging); None: one each.
        regions: where supports aren't boxes: a label map (batch, *any grid) of placed-token
            indices, -1 for none, or :class:`Pieces`. None: the box of centre and extent.
        grid: (rows, columns) where the placed tokens are a raster over the canvas, else None.
        prefix: how many leading tokens have no place; their centre and extent are 0.
    """

    x: Float[Tensor, "batch tokens dim"]
    centre: Float[Tensor, "#batch tokens axes"]
    extent: Float[Tensor, "#batch tokens axes"]
    canvas: tuple[int, ...]
    mask: Bool[Tensor, "batch tokens"] | None = None
    weight: Float[Tensor, "batch tokens"] | None = None
    regions: Int64[Tensor, "batch *cells"] | Pieces | None = None
    grid: tuple[int, ...] | None = None
    prefix: int = 0

    @classmethod
    def from_grid(
        cls, features: Float[Tensor, "batch dim rows columns"], *, canvas: tuple[int, int]
    ) -> Tokens:
        """Tokens of a feature map in raster order, its cells spread evenly over the canvas."""
        rows, columns = features.shape[-2:]
        centre, extent = raster_geometry((rows, columns), canvas, device=features.device)
        return cls(
            x=features.flatten(2).transpose(1, 2),
            centre=centre[None],
            extent=extent[None],
            canvas=canvas,
            grid=(rows, columns),
        )

    # ---- what is in it -------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def placed(self) -> Float[Tensor, "batch placed dim"]:
        """Features of the tokens that have a place."""
        return self.x[:, self.prefix :]

    @property
    def counts(self) -> Int64[Tensor, " batch"]:
        """Real tokens per sample, prefix included."""
        if self.mask is None:
            return torch.full((self.batch,), self.x.shape[1], device=self.x.device)
        return self.mask.sum(1)

    def check(self) -> Tokens:
        """Raise ``ValueError`` where the fields contradict each other; return self."""
        batch, tokens, _ = self.x.shape
        for name in ("centre", "extent"):
            value = getattr(self, name)
            if value.shape[0] not in (1, batch) or value.shape[1:] != (tokens, len(self.canvas)):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, expected ({batch} or 1, {tokens}, "
                    f"{len(self.canvas)}) for x of shape {tuple(self.x.shape)}"
                )
        for name in ("mask", "weight"):
            value = getattr(self, name)
            if value is not None and value.shape != (batch, tokens):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, expected {(batch, tokens)}"
                )
        if self.grid is not None and math.prod(self.grid) != tokens - self.prefix:
            raise ValueError(f"a grid of {self.grid} does not hold {tokens - self.prefix} tokens")
        return self

    def key_bias(self, *, proportional: bool = True) -> Float[Tensor, "batch 1 1 tokens"] | None:
        """What attention adds to the logits of each key: -inf for padding and, if
        ``proportional``, log(weight) for tokens that stand for several (ToMe, eq. 1)."""
        bias = None
        if proportional and self.weight is not None:
            bias = self.weight.clamp_min(1e-12).log()
        if self.mask is not None:
            lowest = torch.zeros_like(self.x[..., 0]) if bias is None else bias
            bias = lowest.masked_fill(~self.mask, float("-inf"))
        return None if bias is None else bias[:, None, None].to(self.x.dtype)

    # ---- changing the set of tokens ------------------------------------------------------------

    def pieces(self) -> Pieces:
        """The supports as boxes with owners; of tokens that are boxes, each owns its own."""
        if isinstance(self.regions, Pieces):
            return self.regions
        if self.regions is not None:
            raise ValueError("these supports are a label map, not boxes")
        count = self.x.shape[1] - self.prefix
        owner = torch.arange(count, device=self.x.device).expand(self.batch, -1)
        if self.mask is not None:
            owner = owner.where(self.mask[:, self.prefix :], -1)
        return Pieces(self.centre[:, self.prefix :], self.extent[:, self.prefix :], owner)

    def with_x(self, x: Float[Tensor, "batch tokens dim2"]) -> Tokens:
        return replace(self, x=x)

    def with_prefix(self, x: Float[Tensor, "#batch prefix dim"]) -> Tokens:
        """Put placeless tokens in front of all others."""
        extra = x.shape[1]

        def padded(value: Tensor | None, fill: float) -> Tensor | None:
            if value is None:
                return None
            pad = (extra, 0) if value.ndim == 2 else (0, 0, extra, 0)
            return F.pad(value, pad, value=fill)

        mask = padded(self.mask, 1.0)
        return replace(
            self,
            x=torch.cat([x.expand(self.batch, -1, -1).to(self.x.dtype), self.x], dim=1),
            centre=padded(self.centre, 0.0),
            extent=padded(self.extent, 0.0),
            mask=None if mask is None else mask.bool(),
            weight=padded(self.weight, 1.0),
            prefix=self.prefix + extra,
        )

    def keep(
        self,
        indices: Int64[Tensor, "batch kept"],
        mask: Bool[Tensor, "batch kept"] | None = None,
    ) -> Tokens:
        """The placed tokens at ``indices`` (order as given), behind the untouched prefix.

        ``mask`` marks which of ``indices`` are real, for samples that keep unequal numbers.
        """
        batch, kept = indices.shape
        leading = torch.arange(self.prefix, device=indices.device).expand(batch, -1)
        index = torch.cat([leading, indices + self.prefix], dim=1)

        def taken(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            value = value.expand(batch, *value.shape[1:])
            if value.ndim == 2:
                return value.gather(1, index)
            return value.gather(1, index[..., None].expand(-1, -1, value.shape[-1]))

        new_mask = taken(self.mask)
        if mask is not None:
            mask = F.pad(mask, (self.prefix, 0), value=True)
            new_mask = mask if new_mask is None else new_mask & mask
        regions = self.regions
        if regions is not None:
            # Duplicates in ``indices`` leave an element with one of its copies; padding must not
            # claim anything, so it is written to a spare slot that is cut off.
            spare = self.x.shape[1] - self.prefix
            target = indices if mask is None else indices.where(mask[:, self.prefix :], spare)
            new = torch.full((batch, spare + 1), -1, device=indices.device)
            new.scatter_(1, target, torch.arange(kept, device=indices.device).expand(batch, -1))
            regions = _relabel(regions, new[:, :spare])
        return replace(
            self,
            x=taken(self.x),
            centre=taken(self.centre),
            extent=taken(self.extent),
            mask=new_mask,
            weight=taken(self.weight),
            regions=regions,
            grid=None,
        )

    def merge(
        self,
        groups: Int64[Tensor, "batch placed"],
        count: int,
        *,
        weights: Float[Tensor, "batch placed"] | None = None,
        x: Float[Tensor, "batch count dim"] | None = None,
    ) -> Tokens:
        """Merge the placed tokens of each group 0 … count-1 into one; the prefix stays.

        Features become the mean weighted by ``weights`` (default: :attr:`weight`, else equal), or
        are taken from ``x`` where the caller has merged them already. Centres follow the same
        weights, extents become the bounding box, weights add up, and ``regions`` remembers every
        piece. Padding tokens contribute nothing.
        """
        batch, placed = groups.shape
        start = self.prefix
        real = None if self.mask is None else self.mask[:, start:]
        weight = (
            torch.ones(batch, placed, device=groups.device, dtype=self.centre.dtype)
            if self.weight is None
            else self.weight[:, start:]
        )
        if real is not None:
            weight = weight * real
        share = weight if weights is None else weights
        if real is not None and weights is not None:
            share = share * real
        flat = (groups + count * torch.arange(batch, device=groups.device)[:, None]).reshape(-1)

        def summed(value: Tensor) -> Tensor:
            rows = value.reshape(batch * placed, -1)
            out = rows.new_zeros(batch * count, rows.shape[1]).index_add(0, flat, rows)
            return out.view(batch, count, -1)

        # Few, wide sums: with one sample the cost is in the number of calls, not in the numbers.
        centre = self.centre[:, start:].expand(batch, -1, -1)
        axes = centre.shape[-1]
        parts = [centre * share[..., None], share[..., None], weight[..., None]]
        sums = summed(torch.cat(parts, dim=-1))
        total = sums[..., axes : axes + 1].clamp_min(1e-12)
        if x is None:
            scaled = self.placed * share[..., None].to(self.x.dtype)
            x = summed(scaled) / total.to(self.x.dtype)
        half = self.extent[:, start:].expand(batch, -1, -1) / 2
        # The lower bound as the upper one of the negative side: one reduction for both.
        bounds = torch.cat([centre + half, half - centre], dim=-1)
        if real is not None:
            bounds = bounds.masked_fill(~real[..., None], float("-inf"))
        where = groups[..., None].expand_as(bounds)
        empty = bounds.new_zeros(batch, count, 2 * axes)
        extent = empty.scatter_reduce(1, where, bounds, "amax", include_self=False)
        extent = extent[..., :axes] + extent[..., axes:]
        new_mask = None
        if real is not None:
            alive = summed(real[..., None].to(centre.dtype))[..., 0] > 0
            extent = extent.where(alive[..., None], 0)
            new_mask = torch.cat([self.mask[:, :start], alive], dim=1)  # type: ignore[index]
        regions = self.pieces() if self.regions is None else self.regions
        merged = replace(
            self,
            x=x,
            centre=sums[..., :axes] / total,
            extent=extent,
            mask=None,
            weight=sums[..., -1],
            regions=_relabel(regions, groups),
            grid=None,
            prefix=0,
        )
        if start:
            merged = merged.with_prefix(self.x[:, :start])
        return replace(merged, mask=new_mask)

    def select(self, rows: Int64[Tensor, " chosen"]) -> Tokens:
        """The samples at ``rows``, trimmed to the longest of them."""

        def taken(value: Tensor) -> Tensor:
            return value if value.shape[0] == 1 != self.batch else value[rows]

        regions = self.regions
        if isinstance(regions, Pieces):
            regions = Pieces(taken(regions.centre), taken(regions.extent), taken(regions.owner))
        elif regions is not None:
            regions = taken(regions)
        picked = replace(
            self,
            x=self.x[rows],
            centre=taken(self.centre),
            extent=taken(self.extent),
            mask=None if self.mask is None else self.mask[rows],
            weight=None if self.weight is None else self.weight[rows],
            regions=regions,
        )
        return picked.trim()

    @staticmethod
    def join(parts: list[Tokens], *, order: Int64[Tensor, " batch"] | None = None) -> Tokens:
        """Batches of unequal length behind each other, padded to the longest.

        ``order[i]`` says which sample of the result the i-th sample of ``parts`` is (the inverse
        of :meth:`select`); default: as they come.
        """
        longest = max(part.x.shape[1] for part in parts)
        first = parts[0]
        place = None if order is None else order.argsort()

        def joined(values: list[Tensor], fill: float, axis: int | None = 1) -> Tensor:
            if axis is not None:
                most = max(value.shape[axis] for value in values)
                values = [
                    F.pad(v, (0, 0) * (v.ndim - 1 - axis) + (0, most - v.shape[axis]), value=fill)
                    for v in values
                ]
            whole = torch.cat(values)
            return whole if place is None else whole[place]

        def per_sample(part: Tokens, value: Tensor) -> Tensor:
            return value.expand(part.batch, *value.shape[1:])

        ragged = any(p.mask is not None or p.x.shape[1] != longest for p in parts)
        masks = [
            p.mask if p.mask is not None else p.x.new_ones(p.x.shape[:2], dtype=torch.bool)
            for p in parts
        ]
        weights = [
            p.weight if p.weight is not None else p.centre.new_ones(p.x.shape[:2]) for p in parts
        ]
        regions: Tensor | Pieces | None = first.regions
        if any(isinstance(p.regions, Pieces) for p in parts):
            # Parts whose tokens are boxes still (nothing was merged there) are pieces as well.
            pieces = [(p, p.pieces()) for p in parts]
            regions = Pieces(
                joined([per_sample(p, r.centre) for p, r in pieces], 0.0),
                joined([per_sample(p, r.extent) for p, r in pieces], 0.0),
                joined([r.owner for _, r in pieces], -1),
            )
        elif regions is not None:
            maps = [per_sample(p, p.regions) for p in parts if isinstance(p.regions, Tensor)]
            regions = joined(maps, -1, axis=None)
        return replace(
            first,
            x=joined([p.x for p in parts], 0.0),
            centre=joined([per_sample(p, p.centre) for p in parts], 0.0),
            extent=joined([per_sample(p, p.extent) for p in parts], 0.0),
            mask=joined(masks, False) if ragged else None,
            weight=None if all(p.weight is None for p in parts) else joined(weights, 1.0),
            regions=regions,
            grid=None if len(parts) > 1 else first.grid,
        )

    def trim(self) -> Tokens:
        """Cut off the padding behind the longest sample; drop the mask where nothing is padded.

        Padding must stand behind the real tokens, as all our tokenizers leave it.
        """
        if self.mask is None:
            return self
        longest = int(self.mask.sum(1).max())
        mask = self.mask[:, :longest]
        return replace(
            self,
            x=self.x[:, :longest],
            centre=self.centre[:, :longest],
            extent=self.extent[:, :longest],
            weight=None if self.weight is None else self.weight[:, :longest],
            mask=None if bool(mask.all()) else mask,
        )

    def pack(self) -> Packed:
        """All real tokens of the batch in a row, for kernels that take variable lengths."""
        if self.mask is None:
            return Packed(self.x.flatten(0, 1), self.counts, self)
        return Packed(self.x[self.mask], self.counts, self)

    # ---- back to the input ---------------------------------------------------------------------

    def label_map(self, size: tuple[int, int] | None = None) -> Int64[Tensor, "batch height width"]:
        """Which placed token covers each pixel of a 2-D canvas (drawn at ``size``); -1: none.

        Where supports overlap, the smallest one is on top.
        """
        if len(self.canvas) != 2:
            raise ValueError(f"label_map draws 2-D canvases, this one is {self.canvas}")
        height, width = size or self.canvas  # type: ignore[misc]
        regions = self.regions
        if isinstance(regions, Tensor):
            rows = _cell_of_pixel(height, regions.shape[1], regions.device)
            columns = _cell_of_pixel(width, regions.shape[2], regions.device)
            return regions.expand(self.batch, -1, -1)[:, rows][:, :, columns]
        if regions is None:
            regions = self.pieces()
        return _rasterise(regions, self.canvas, (height, width))

    def scatter_to_grid(
        self, size: tuple[int, int] | None = None
    ) -> Float[Tensor, "batch dim height width"]:
        """A dense map in which every pixel reads its token; pixels without one are 0."""
        if self.grid is not None and self.regions is None and size in (None, self.grid):
            dense = self.placed.transpose(1, 2).unflatten(2, self.grid)
            if size == self.grid:
                return dense
        labels = self.label_map(size)
        flat = labels.flatten(1)
        index = flat.clamp_min(0)[..., None].expand(-1, -1, self.x.shape[-1])
        values = self.placed.gather(1, index) * (flat >= 0)[..., None]
        return values.transpose(1, 2).unflatten(2, labels.shape[1:])

    def draw(
        self,
        image: Float[Tensor, "batch 3 height width"],
        *,
        fill: float = 0.65,
        edge: tuple[float, float, float] = (1.0, 1.0, 1.0),
        scale: int = 4,
    ) -> Float[Tensor, "batch 3 tall wide"]:
        """The image with each token's mean colour mixed in and the borders between tokens drawn.

        Args:
            image: RGB in [0, 1], of the canvas' size.
            fill: 0 shows the photo, 1 only the tokens' mean colours.
            scale: whole-number enlargement, so that borders stay thin.
        """
        size = (image.shape[-2] * scale, image.shape[-1] * scale)
        big = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        labels = self.label_map(size)
        flat = labels.flatten(1) + 1
        pixels = big.flatten(2).transpose(1, 2)
        bins = self.x.shape[1] - self.prefix + 1
        sums = pixels.new_zeros(len(flat), bins, 4)
        index = flat[..., None].expand(-1, -1, 4)
        sums = sums.scatter_add(1, index, F.pad(pixels, (0, 1), value=1.0))
        means = sums[..., :3] / sums[..., 3:].clamp_min(1)
        coloured = means.gather(1, flat[..., None].expand(-1, -1, 3)).transpose(1, 2)
        coloured = coloured.unflatten(2, size)
        uncovered = (labels < 0)[:, None]
        coloured = coloured.masked_fill(uncovered, 0.12)  # dark: nobody looks at these pixels
        mixed = torch.where(uncovered, coloured, fill * coloured + (1 - fill) * big)
        border = torch.zeros_like(labels, dtype=torch.bool)
        border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
        border[:, :, 1:] |= labels[:, :, 1:] != labels[:, :, :-1]
        border[:, 0], border[:, -1] = True, True
        border[:, :, 0], border[:, :, -1] = True, True
        ink = torch.tensor(edge, device=image.device, dtype=image.dtype)[:, None, None]
        return torch.where(border[:, None], ink, mixed).clamp(0, 1)


@dataclass(frozen=True)
class Packed:
    """Real tokens behind each other (total, dim), the number of each sample, and the padded
    original that :meth:`unpack` restores."""

    x: Float[Tensor, "total dim"]
    lengths: Int64[Tensor, " batch"]
    padded: Tokens

    @property
    def offsets(self) -> Int64[Tensor, " offsets"]:
        """Where each sample starts, and the end: batch + 1 numbers, as variable-length attention
        kernels want them."""
        return F.pad(self.lengths.cumsum(0), (1, 0))

    def unpack(self, x: Float[Tensor, "total dim2"] | None = None) -> Tokens:
        """Back to padded tokens, with new features ``x`` if given; padding becomes 0."""
        x = self.x if x is None else x
        if self.padded.mask is None:
            return self.padded.with_x(x.unflatten(0, (self.padded.batch, -1)))
        out = x.new_zeros(*self.padded.mask.shape, x.shape[-1])
        out[self.padded.mask] = x
        return self.padded.with_x(out)


def raster_geometry(
    grid: tuple[int, int],
    canvas: tuple[int, int],
    *,
    device: torch.device | str | None = None,
) -> tuple[Float[Tensor, "cells 2"], Float[Tensor, "cells 2"]]:
    """Centres and extents (y, x in input units) of a raster of ``grid`` cells over ``canvas``."""
    step = [canvas[axis] / grid[axis] for axis in (0, 1)]
    y = (torch.arange(grid[0], device=device, dtype=torch.float32) + 0.5) * step[0]
    x = (torch.arange(grid[1], device=device, dtype=torch.float32) + 0.5) * step[1]
    centre = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
    extent = torch.tensor(step, device=device).expand_as(centre)
    return centre, extent


def length_buckets(
    lengths: Int64[Tensor, " batch"], *, waste: float = 0.1, most: int = 8
) -> list[Int64[Tensor, " chosen"]]:
    """Split a batch into few groups of similar length, so that padding stays below ``waste``.

    Samples are sorted by length and cut at the places that save most padding (exact, by dynamic
    programming over the distinct lengths); the smallest number of groups that meets ``waste``
    (padded slots / all slots) is taken, at most ``most``.
    """
    order = lengths.argsort(stable=True)
    ordered = lengths[order].tolist()
    distinct = sorted(set(ordered))
    if len(distinct) == 1:
        return [order]
    counts = [ordered.count(value) for value in distinct]
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    real, groups = sum(ordered), len(distinct)
    # slots[g]: fewest slots for the first g distinct lengths with the current number of buckets.
    slots = [0.0] + [starts[g] * distinct[g - 1] for g in range(1, groups + 1)]
    cuts: list[list[int]] = [[0] * (groups + 1)]
    for _ in range(1, min(most, groups)):
        if slots[-1] * (1 - waste) <= real:
            break
        new, cut = [0.0] * (groups + 1), [0] * (groups + 1)
        for g in range(1, groups + 1):
            options = [slots[k] + (starts[g] - starts[k]) * distinct[g - 1] for k in range(0, g)]
            cut[g] = min(range(g), key=options.__getitem__)
            new[g] = options[cut[g]]
        slots = new
        cuts.append(cut)
    bounds, g = [len(ordered)], groups
    for cut in reversed(cuts):
        g = cut[g]
        bounds.append(starts[g])
        if g == 0:
            break
    bounds.reverse()
    return [order[a:b] for a, b in itertools.pairwise(bounds)]


def _relabel(regions: Tensor | Pieces, new: Int64[Tensor, "batch placed"]) -> Tensor | Pieces:
    """Regions whose owners are renamed: owner i becomes new[:, i]; -1 stays."""

    def renamed(labels: Tensor) -> Tensor:
        flat = labels.expand(new.shape[0], *labels.shape[1:]).flatten(1)
        fresh = new.gather(1, flat.clamp_min(0)).where(flat >= 0, -1)
        return fresh.view(-1, *labels.shape[1:])

    if isinstance(regions, Pieces):
        return replace(regions, owner=renamed(regions.owner))
    return renamed(regions)


def _cell_of_pixel(pixels: int, cells: int, device: torch.device) -> Int64[Tensor, " pixels"]:
    return ((torch.arange(pixels, device=device) + 0.5) * (cells / pixels)).long()


def _rasterise(
    pieces: Pieces, canvas: tuple[int, ...], size: tuple[int, int]
) -> Int64[Tensor, "batch height width"]:
    """Paint boxes onto pixels whose centre they hold, smallest on top.

    A box is the product of a row interval and a column interval, so "which boxes hold this pixel"
    is a matrix product of two indicator matrices. Where no two boxes overlap, weighting one of the
    factors with the index gives the label at once.
    """
    batch, count = pieces.owner.shape
    device = pieces.owner.device
    inside = []
    for axis in (0, 1):
        low = (pieces.centre - pieces.extent / 2)[..., axis].expand(batch, -1)
        high = (pieces.centre + pieces.extent / 2)[..., axis].expand(batch, -1)
        # A hair off the centre: edges like 7/2 fall on centres, and the two boxes that share one
        # may have computed it with different roundings.
        at = (torch.arange(size[axis], device=device) + 0.499) * (canvas[axis] / size[axis])
        inside.append(((low[..., None] <= at) & (at < high[..., None])).float())
    rows, columns = inside
    rows = rows * (pieces.owner >= 0)[..., None]
    covers = torch.einsum("bph,bpw->bhw", rows, columns)
    if float(covers.max()) <= 1:
        index = torch.arange(1, count + 1, device=device).float()[:, None]
        top = torch.einsum("bph,bpw->bhw", rows * index, columns).round().long() - 1
    else:
        area = pieces.extent.prod(-1).expand(batch, -1)
        order = area.argsort(dim=1, descending=True)
        top = torch.full((batch, *size), -1, device=device)
        for start in range(0, count, 64):  # chunks bound the memory, not the number of boxes
            chunk = order[:, start : start + 64]
            pick = chunk[..., None]
            held = (
                rows.gather(1, pick.expand(-1, -1, rows.shape[2]))[..., None]
                * columns.gather(1, pick.expand(-1, -1, columns.shape[2]))[:, :, None]
            )
            ranks = torch.arange(1, chunk.shape[1] + 1, device=device)[:, None, None]
            last = (held * ranks).amax(1).long()
            label = chunk.gather(1, (last - 1).clamp_min(0).flatten(1)).view_as(top)
            top = label.where(last > 0, top)
    owner = pieces.owner.gather(1, top.clamp_min(0).flatten(1)).view_as(top)
    return owner.where(top >= 0, -1)
