"""Which boxes of an image ElasticViT looks at (Pardyl et al., WACV 2025, arXiv 2309.13353).

A *box* is (y0, x0, y1, x1) in pixels of the input. This file draws boxes (samplers), cuts them out
(:func:`crop`), and measures how well a network stands up to them (:func:`accuracy_curve`,
:func:`elasticity`); the network itself is in ``elastic_vit.py``.

A sampler is called with (canvas, batch, rng, image) and gives :class:`Boxes`. ``rng`` is a numpy
``Generator`` or the older ``RandomState``; for one image, the draws come in the order of the
authors' samplers, so that the same generator gives the same boxes:

* grid: axis of the shake (1: x), then its sign (1: negative), both drawn even where nothing is
  shaken; then a shuffle for dropout or selection, and for ``select_mode="drop"`` which of the four
  patches of a block stays;
* random crops: all sizes, then all y, then all x; upper bounds are exclusive, so a crop of side s
  never starts at side - s;
* a mixture: first which sampler, then its draws.

**Traps.** Zoom shrinks a box towards its *upper left* corner and clips its side to what is left of
the image; shaking moves each box along *one* axis. Dropout numbers its blocks in raster order,
selection *down the columns*, both on a square grid. Crops are resized without antialiasing: large
ones alias, which is what the published networks were trained on. The tails of the grid on the
right and at the bottom, where sides don't divide, are cut to the image and stretched to a patch,
while their boxes keep the full size.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ..errors import PolypatchError

__all__ = [
    "PERTURBATIONS",
    "Boxes",
    "CentralSampler",
    "EdgeSampler",
    "FixedSampler",
    "GridSampler",
    "MixedSampler",
    "MultiscaleSampler",
    "RandomSampler",
    "Sampler",
    "accuracy_curve",
    "central_boxes",
    "crop",
    "crop_spans",
    "edge_boxes",
    "elasticity",
    "grid_boxes",
    "grid_spans",
    "modified_grid",
    "random_boxes",
    "random_spans",
]

Rng = np.random.Generator | np.random.RandomState


class Boxes(NamedTuple):
    """Boxes of a batch: the same for all (batch 1) or for each image its own. ``real`` is False
    for padding behind the boxes of an image that has fewer; ``blank`` is True for boxes whose
    pixels are to be zero (soft dropout)."""

    boxes: Int64[Tensor, "#batch boxes 4"]
    real: Bool[Tensor, "#batch boxes"] | None = None
    blank: Bool[Tensor, "#batch boxes"] | None = None


Sampler = Callable[..., Boxes]


def _integers(rng: Rng, low: Any, high: Any, size: Any = None) -> np.ndarray:
    draw = rng.integers if isinstance(rng, np.random.Generator) else rng.randint
    return np.asarray(draw(low, high, size=size), dtype=np.int64)


def _corners(y: np.ndarray, x: np.ndarray, side: np.ndarray) -> np.ndarray:
    return np.stack([y, x, y + side, x + side], axis=-1)


def _stack(rows: Sequence[np.ndarray]) -> Boxes:
    """Boxes of several images, padded behind the shorter lists with the image's last box."""
    most = max(map(len, rows))
    if min(map(len, rows)) == most:
        return Boxes(torch.from_numpy(np.stack(rows)))
    real = torch.tensor([[i < len(row) for i in range(most)] for row in rows])
    padded = [np.concatenate([row, row[-1:].repeat(most - len(row), axis=0)]) for row in rows]
    return Boxes(torch.from_numpy(np.stack(padded)), real)


# ---- boxes of one image --------------------------------------------------------------------------


def grid_boxes(canvas: tuple[int, int], patch: int) -> np.ndarray:
    """The regular grid in raster order, (boxes, 4)."""
    y, x = np.meshgrid(
        np.arange(0, canvas[0], patch), np.arange(0, canvas[1], patch), indexing="ij"
    )
    return _corners(y.ravel(), x.ravel(), np.full(y.size, patch))


def modified_grid(
    canvas: tuple[int, int],
    rng: Rng,
    *,
    patch: int = 16,
    zoom: int = 0,
    shake: int = 0,
    dropout: int = 0,
    dropout_block: int = 1,
    select: int = 0,
    select_mode: str = "drop",
) -> tuple[np.ndarray, np.ndarray | None]:
    """The grid perturbed: zoom, shake, then dropout or selection.

    Args:
        zoom: pixels by which every box shrinks.
        shake: pixels by which every box moves along one random axis, at most half a patch.
        dropout: how many boxes (blocks of ``dropout_block``, a square number) are left out.
        select: in how many blocks of 2 × 2 boxes only one is kept, unchanged
            (``select_mode="drop"``) or twice as large, in the place of the four (``"resize"``).

    Returns:
        all boxes (boxes, 4), and which of them stay (None: all).

    Raises:
        PolypatchError: values that leave nothing, or blocks on a grid that is not square.
    """
    if not 0 <= zoom < patch:
        raise PolypatchError(f"zoom={zoom} leaves nothing of a patch of {patch} pixels")
    if not 0 <= shake <= patch // 2:
        raise PolypatchError(f"shake={shake} is more than half a patch of {patch} pixels")
    if dropout and select:
        raise PolypatchError("a grid drops patches or selects among them, not both")
    if select_mode not in ("drop", "resize"):
        raise PolypatchError(f"there is no select_mode={select_mode!r}; use 'drop' or 'resize'")
    boxes = grid_boxes(canvas, patch)
    y, x, side = boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0]
    count, across = len(y), math.isqrt(len(y))
    side = np.minimum(side - zoom, np.minimum(canvas[0] - y, canvas[1] - x))
    along_x = _integers(rng, 0, 2, count)
    sign = 1 - 2 * _integers(rng, 0, 2, count)
    y = np.clip(y + shake * sign * (1 - along_x), 0, canvas[0] - side)
    x = np.clip(x + shake * sign * along_x, 0, canvas[1] - side)
    stays: np.ndarray | None = None
    if dropout:
        edge = math.isqrt(dropout_block)
        if edge**2 != dropout_block or (edge > 1 and (across**2 != count or across % edge)):
            raise PolypatchError(
                f"blocks of dropout_block={dropout_block} patches don't tile a grid of {count}"
            )
        order = np.arange(count // dropout_block)
        if dropout >= len(order):
            raise PolypatchError(f"dropout={dropout} leaves none of {len(order)} blocks")
        rng.shuffle(order)
        stays = np.ones(len(order), dtype=bool)
        stays[order[:dropout]] = False
        if edge > 1:
            block = stays.reshape(across // edge, across // edge)
            stays = block.repeat(edge, axis=0).repeat(edge, axis=1).ravel()
    elif select:
        if across**2 != count or across % 2 or select > count // 4:
            raise PolypatchError(
                f"select={select} needs as many blocks of 2×2 on a square grid, this one has "
                f"{count} patches"
            )
        order = np.arange(count // 4)
        rng.shuffle(order)
        chosen = order[:select]
        kept = _integers(rng, 0, 4, select) if select_mode == "drop" else np.zeros_like(chosen)
        column, row = np.divmod(chosen, across // 2)  # blocks are numbered down the columns
        stays = np.ones((across, across), dtype=bool)
        for corner in range(4):
            stays[2 * row + corner // 2, 2 * column + corner % 2] = kept == corner
        stays = stays.ravel()
        if select_mode == "resize":
            side = side.copy()
            side[(2 * row) * across + 2 * column] *= 2
    return _corners(y, x, side), stays


def random_boxes(
    canvas: tuple[int, int],
    rng: Rng,
    *,
    count: int,
    smallest: int = 8,
    largest: int = 48,
    batch: int = 1,
) -> np.ndarray:
    """Square crops anywhere, (batch, count, 4): sides uniform in [smallest, largest), then places
    uniform in [0, side of the image - side)."""
    largest = min(largest, *canvas)
    if not 1 <= smallest < largest:
        raise PolypatchError(
            f"crops of {smallest} to below {largest} pixels don't exist in an image of "
            f"{canvas[0]}×{canvas[1]}"
        )
    side = _integers(rng, smallest, largest, (batch, count))
    y = _integers(rng, 0, canvas[0] - side)
    x = _integers(rng, 0, canvas[1] - side)
    return _corners(y, x, side)


def central_boxes(canvas: tuple[int, int], sizes: Sequence[int]) -> np.ndarray:
    """Concentric frames of squares, from the border inwards, one size a frame (CENTRAL). Each
    frame: its upper row, lower row, left column, right column."""
    boxes: list[tuple[int, int, int]] = []
    height, width = canvas
    filled = 0
    for size in sizes:
        bottom, right = height - filled - size, width - filled - size
        columns = range(filled, width - filled, size)
        rows = range(filled + size, bottom, size)
        boxes += [(filled, x, size) for x in columns]
        if bottom != filled:
            boxes += [(bottom, x, size) for x in columns]
        boxes += [(y, filled, size) for y in rows]
        if right != filled:
            boxes += [(y, right, size) for y in rows]
        filled += size
    if not boxes:
        raise PolypatchError(f"no frame of sizes {tuple(sizes)} fits into {height}×{width}")
    y, x, side = np.asarray(boxes, dtype=np.int64).T
    return _corners(y, x, side)


def edge_boxes(
    edges: Bool[np.ndarray, "height width"],
    *,
    count: int,
    smallest: int = 8,
    largest: int = 48,
    border: int = 7,
) -> np.ndarray:
    """Small boxes where there are many edges, large ones elsewhere (EDGE).

    Tiles of ``largest`` are split into four, the one with most edge pixels first (ties: the upper,
    then the left one), until there are ``count``; tiles of at most ``smallest`` are final, and
    parts that end less than ``border`` pixels from the right or lower side are left out. Final
    tiles come first in the result, then the heap as it lies.

    Raises:
        PolypatchError: sizes that can't be halved down to ``smallest``.
    """
    size = largest
    while size > smallest:
        if size % 2:
            raise PolypatchError(f"largest={largest} can't be halved down to {smallest}")
        size //= 2
    height, width = edges.shape
    sums = np.zeros((height + 1, width + 1), dtype=np.int64)
    sums[1:, 1:] = edges.cumsum(0).cumsum(1)

    def tile(y: int, x: int, side: int) -> tuple[int, int, int, int]:
        bottom, right = min(y + side, height), min(x + side, width)
        inside = sums[bottom, right] - sums[y, right] - sums[bottom, x] + sums[y, x]
        return (-int(inside), y, x, side)

    heap = [
        tile(y, x, largest) for y in range(0, height, largest) for x in range(0, width, largest)
    ]
    heapq.heapify(heap)
    final: list[tuple[int, int, int, int]] = []
    while heap and len(final) + len(heap) < count:
        _, top, left, side = heapq.heappop(heap)
        half = side // 2
        if half < 1:
            final.append((0, top, left, side))
            continue
        for y, x in (
            (top, left),
            (top + half, left),
            (top, left + half),
            (top + half, left + half),
        ):
            if y + half < height - border and x + half < width - border:
                part = tile(y, x, half)
                if half <= smallest:
                    final.append(part)
                else:
                    heapq.heappush(heap, part)
    boxes = (final + heap)[:count]
    if not boxes:
        raise PolypatchError(
            f"an image of {height}×{width} has no tile that ends {border} px inside"
        )
    _, y, x, side = np.asarray(boxes, dtype=np.int64).T
    return _corners(y, x, side)


def canny(image: Float[Tensor, "3 height width"], sigma: float) -> Bool[np.ndarray, "height width"]:
    """Edge pixels of the luma image (ITU-R 601), by scikit-image with its default thresholds."""
    from skimage.feature import canny as find_edges

    luma = torch.tensor([0.2989, 0.587, 0.114], device=image.device)
    grey = (image.float() * luma[:, None, None]).sum(0)
    return find_edges(grey.cpu().numpy(), sigma=sigma)


# ---- samplers of batches -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GridSampler:
    """:func:`modified_grid` for every image anew. ``hard``: what drops out is removed, else its
    pixels become 0."""

    patch: int = 16
    zoom: int = 0
    shake: int = 0
    dropout: int = 0
    dropout_block: int = 1
    select: int = 0
    select_mode: str = "drop"
    hard: bool = True

    def __call__(
        self, canvas: tuple[int, int], batch: int, rng: Rng, image: Tensor | None = None
    ) -> Boxes:
        random = self.shake or self.dropout or self.select
        rows, blanks = [], []
        for _ in range(batch if random else 1):
            boxes, stays = modified_grid(
                canvas,
                rng,
                patch=self.patch,
                zoom=self.zoom,
                shake=self.shake,
                dropout=self.dropout,
                dropout_block=self.dropout_block,
                select=self.select,
                select_mode=self.select_mode,
            )
            if stays is not None and self.hard:
                boxes = boxes[stays]
            elif stays is not None:
                blanks.append(~stays)
            rows.append(boxes)
        blank = torch.from_numpy(np.stack(blanks)) if blanks else None
        return _stack(rows)._replace(blank=blank)


@dataclass(frozen=True, kw_only=True)
class RandomSampler:
    """:func:`random_boxes`, drawn for the whole batch at once."""

    count: int
    smallest: int = 8
    largest: int = 48

    def __call__(
        self, canvas: tuple[int, int], batch: int, rng: Rng, image: Tensor | None = None
    ) -> Boxes:
        boxes = random_boxes(
            canvas,
            rng,
            count=self.count,
            smallest=self.smallest,
            largest=self.largest,
            batch=batch,
        )
        return Boxes(torch.from_numpy(boxes))


@dataclass(frozen=True, kw_only=True)
class MultiscaleSampler:
    """Crops of given ``sizes`` at random places."""

    sizes: Sequence[int]

    def __call__(
        self, canvas: tuple[int, int], batch: int, rng: Rng, image: Tensor | None = None
    ) -> Boxes:
        if max(self.sizes) >= min(canvas):
            raise PolypatchError(f"crops of {max(self.sizes)} px don't fit into {canvas}")
        side = np.broadcast_to(np.asarray(self.sizes, dtype=np.int64), (batch, len(self.sizes)))
        y = _integers(rng, 0, canvas[0] - side)
        x = _integers(rng, 0, canvas[1] - side)
        return Boxes(torch.from_numpy(_corners(y, x, side)))


@dataclass(frozen=True, kw_only=True)
class MixedSampler:
    """For every image one of several samplers, by ``weights``."""

    samplers: tuple[Sampler, ...]
    weights: tuple[float, ...]

    def __call__(
        self, canvas: tuple[int, int], batch: int, rng: Rng, image: Tensor | None = None
    ) -> Boxes:
        share = np.asarray(self.weights, dtype=float)
        choice = rng.choice(len(self.samplers), size=batch, p=share / share.sum())
        parts: list[tuple[np.ndarray, Boxes]] = []
        for index, sampler in enumerate(self.samplers):
            rows = np.flatnonzero(choice == index)
            if len(rows):
                seen = None if image is None else image[torch.from_numpy(rows).to(image.device)]
                parts.append((rows, sampler(canvas, len(rows), rng, seen)))
        most = max(part.boxes.shape[1] for _, part in parts)
        boxes = torch.zeros(batch, most, 4, dtype=torch.long)
        real = torch.zeros(batch, most, dtype=torch.bool)
        blank = torch.zeros(batch, most, dtype=torch.bool)
        for rows, part in parts:
            count = part.boxes.shape[1]
            boxes[rows, :count] = part.boxes
            boxes[rows, count:] = part.boxes[:, -1:]
            real[rows, :count] = True if part.real is None else part.real
            if part.blank is not None:
                blank[rows, :count] = part.blank
        return Boxes(boxes, None if real.all() else real, blank if blank.any() else None)


@dataclass(frozen=True, kw_only=True)
class CentralSampler:
    """:func:`central_boxes`: fine in the middle, coarse outside."""

    sizes: Sequence[int] = (32,) * 7

    def __call__(
        self, canvas: tuple[int, int], batch: int, rng: Rng, image: Tensor | None = None
    ) -> Boxes:
        return _stack([central_boxes(canvas, self.sizes)])


@dataclass(frozen=True, kw_only=True)
class EdgeSampler:
    """:func:`edge_boxes` of Canny edges; looks at the pixels, image by image."""

    count: int
    smallest: int = 8
    largest: int = 48
    sigma: float = 12.0
    border: int = 7

    def __call__(
        self, canvas: tuple[int, int], batch: int, rng: Rng, image: Tensor | None = None
    ) -> Boxes:
        if image is None or image.shape[1] != 3:
            raise PolypatchError("EdgeSampler looks for edges and needs RGB images")
        rows = [
            edge_boxes(
                canny(picture, self.sigma),
                count=self.count,
                smallest=self.smallest,
                largest=self.largest,
                border=self.border,
            )
            for picture in image
        ]
        return _stack(rows)


@dataclass(frozen=True, kw_only=True)
class FixedSampler:
    """The same given boxes for every image, (boxes, 4)."""

    boxes: Tensor

    def __call__(
        self, canvas: tuple[int, int], batch: int, rng: Rng, image: Tensor | None = None
    ) -> Boxes:
        return Boxes(torch.as_tensor(self.boxes)[None])


# ---- cutting out ---------------------------------------------------------------------------------


def crop(
    image: Float[Tensor, "batch channels height width"],
    boxes: Float[Tensor, "#batch boxes 4"] | Int64[Tensor, "#batch boxes 4"],
    size: int = 16,
) -> Float[Tensor, "batch boxes channels size size"]:
    """Boxes cut out and resized to ``size``, bilinearly and without antialiasing.

    As if each box (its part inside of the image) were an image of its own: sampling places are
    held inside of the box, so that no crop sees its neighbours' pixels.
    """
    side = torch.tensor(image.shape[-2:], device=image.device, dtype=torch.float32)
    boxes = boxes.to(image.device, torch.float32)
    low = boxes[..., :2].clamp_min(0).minimum(side)
    high = boxes[..., 2:].clamp_min(0).minimum(side)
    steps = (torch.arange(size, device=image.device) + 0.5) / size
    # Places count pixel centres: 0 is the first pixel. Boxes narrower than a pixel read its middle.
    at = low[..., None] + steps * (high - low)[..., None] - 0.5
    middle = (low + high) / 2 - 0.5
    at = at.maximum(low.minimum(middle)[..., None]).minimum((high - 1).maximum(middle)[..., None])
    y, x = ((2 * at + 1) / side[:, None] - 1).unbind(2)
    return _read(image, y, x, align_corners=False)


def crop_spans(
    image: Float[Tensor, "batch channels height width"],
    boxes: Float[Tensor, "#batch boxes 4"],
    size: tuple[int, int] = (16, 16),
) -> Float[Tensor, "batch boxes channels rows columns"]:
    """Boxes read at points that span them from border to border, the image's own borders being the
    centres of its outer pixels (the authors' second family of samplers). Not plain crops: even a
    box of the patch's own size is resampled, and it sees its neighbours."""
    places = []
    for axis, side in enumerate(image.shape[-2:]):
        low, high = boxes[..., axis].float(), boxes[..., axis + 2].float()
        steps = torch.linspace(0, 1, size[axis], device=boxes.device)
        at = low[..., None] + steps * (high - low)[..., None]
        places.append((at / side * 2 - 1).to(image.device))
    return _read(image, *places, align_corners=True)


def _read(
    image: Float[Tensor, "batch channels height width"],
    y: Float[Tensor, "#batch boxes rows"],
    x: Float[Tensor, "#batch boxes columns"],
    *,
    align_corners: bool,
) -> Float[Tensor, "batch boxes channels rows columns"]:
    """Bilinear reading at all pairs of places y, x in [-1, 1]; in float32, as half precision can't
    tell neighbouring pixels apart."""
    places = torch.stack(torch.broadcast_tensors(x[:, :, None], y[..., None]), dim=-1)
    read = F.grid_sample(
        image.float(),
        places.flatten(1, 2).expand(len(image), -1, -1, -1),
        mode="bilinear",
        padding_mode="border",
        align_corners=align_corners,
    )
    return read.unflatten(2, (y.shape[1], y.shape[2])).transpose(1, 2).to(image.dtype)


def grid_spans(canvas: tuple[int, int], *, across: int, down: int) -> Float[Tensor, "boxes 4"]:
    """Boxes of a grid of any size in raster order, borders between pixels allowed."""
    y = torch.arange(down + 1) * (canvas[0] / down)
    x = torch.arange(across + 1) * (canvas[1] / across)
    corners = [torch.meshgrid(y[:-1], x[:-1], indexing="ij")]
    corners.append(torch.meshgrid(y[1:], x[1:], indexing="ij"))
    return torch.stack([*corners[0], *corners[1]], dim=-1).flatten(0, 1)


def random_spans(
    canvas: tuple[int, int],
    rng: np.random.Generator,
    *,
    count: int = 32,
    smallest: float = 0.01,
    largest: float = 0.25,
) -> Float[Tensor, "boxes 4"]:
    """Boxes that hold between ``smallest`` and ``largest`` of each side of the image, inside of it.
    Drawn: all sizes, then y and x of each centre in turn."""
    share = rng.uniform(2 * smallest, 2 * largest, size=count)
    reach = 1.0 - share[:, None] / 2
    centre = rng.uniform(-reach, reach, size=(count, 2))
    corners = np.concatenate([centre - share[:, None] / 2, centre + share[:, None] / 2], axis=1)
    side = np.asarray([*canvas, *canvas], dtype=float)
    return torch.from_numpy((corners + 1) / 2 * side).float()


# ---- elasticity ----------------------------------------------------------------------------------

#: What is perturbed and in which unit its strength counts.
PERTURBATIONS: dict[str, str] = {
    "zoom": "pixels by which every patch shrinks (scale)",
    "shake": "pixels by which every patch moves (position)",
    "dropout": "patches that are missing (missing data)",
    "select": "blocks of 2×2 that keep one patch (missing data)",
    "merge": "blocks of 2×2 that become one patch (scale)",
}


def perturbed(grid: GridSampler, kind: str, strength: int) -> GridSampler:
    """``grid`` with one perturbation of :data:`PERTURBATIONS`."""
    if kind not in PERTURBATIONS:
        raise PolypatchError(f"there is no perturbation {kind!r}; use {', '.join(PERTURBATIONS)}")
    if kind == "merge":
        return replace(grid, select=strength, select_mode="resize")
    return replace(grid, **{kind: strength})


@torch.no_grad()
def accuracy_curve(
    host: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    kind: str,
    strengths: Sequence[int],
    seed: int = 0,
) -> list[float]:
    """Top-1 accuracy of ``host`` on the grid, perturbed at each of ``strengths``.

    Args:
        host: a network whose ``patching`` takes a ``sampler`` (plugged with elastic-vit).
        batches: (images, labels), gone through once for each strength.
        seed: every strength starts from it, so that curves can be compared.
    """
    patching = host.patching
    if not hasattr(patching, "sampler"):
        raise PolypatchError(
            "elasticity is measured by moving patches; plug elastic-vit into the host first "
            "(position=host and train=grid leave it as it is)"
        )
    batches = list(batches)
    training, kept = host.training, patching.sampler  # type: ignore[union-attr]
    host.eval()
    curve = []
    try:
        for strength in strengths:
            grid = perturbed(GridSampler(patch=patching.patch), kind, strength)  # type: ignore
            rng = np.random.default_rng(seed)
            patching.sampler = lambda c, b, _, i, grid=grid, rng=rng: grid(c, b, rng, i)  # type: ignore
            right = total = 0
            for images, labels in batches:
                right += int((host(images).argmax(-1) == labels).sum())
                total += len(labels)
            curve.append(right / max(1, total))
    finally:
        patching.sampler = kept  # type: ignore[union-attr]
        host.train(training)
    return curve


def elasticity(strengths: Sequence[float], accuracies: Sequence[float]) -> float:
    """How much accuracy is left on average: the area under accuracy against strength (trapezoids),
    divided by that of a network that would stay at its first accuracy. 1: not impressed at all.

    Our definition: the paper measures scale, position and missing-data elasticity, but its formula
    could not be found. The first strength is to be 0, the unperturbed grid.
    """
    x, y = np.asarray(strengths, dtype=float), np.asarray(accuracies, dtype=float)
    if len(x) != len(y) or len(x) < 2 or (np.diff(x) <= 0).any():
        raise PolypatchError("a curve has at least two growing strengths and an accuracy for each")
    if y[0] <= 0:
        raise PolypatchError("the unperturbed accuracy is 0, nothing can be relative to it")
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (y[0] * (x[-1] - x[0])))
