"""Augmentation on tensors: one affine warp and one colour change per image, a whole batch at once.

Everything random is drawn first, for the *global* batch and on the CPU (:func:`draw`), then a
process applies its part (:func:`augment`). So the augmented batch doesn't depend on the number of
processes or on the device.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["Draws", "augment", "augment_masks", "draw", "mix", "one_hot"]

#: name → tensor with one row per image of the global batch
Draws = dict[str, Tensor]

_GREY = (0.299, 0.587, 0.114)


def draw(kind: str, batch: int, *, flip: bool, generator: torch.Generator) -> Draws:
    """Random numbers for a batch. ``light``: mirror, shift by up to an eighth. ``rand``: besides,
    zoom (area 0.5–1), rotation up to 20°, shear, brightness, contrast, saturation, solarising,
    and one erased rectangle; each image gets two of the geometric and two of the colour changes.
    """
    draws: Draws = {}
    if kind == "none":
        return draws

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator) * (high - low) + low

    draws["mirror"] = (uniform(0, 1) < 0.5) & flip
    draws["shift"] = uniform(-0.125, 0.125, 2)
    if kind == "light":
        return draws

    def chosen(options: int, count: int) -> Tensor:
        scores = torch.rand(batch, options, generator=generator)
        return torch.zeros_like(scores).scatter_(1, scores.topk(count).indices, 1.0)

    geometric, colour = chosen(3, 2), chosen(4, 2)
    draws["zoom"] = uniform(0.5, 1.0).sqrt()
    draws["angle"] = uniform(-20, 20) * math.pi / 180 * geometric[:, 0]
    draws["shear"] = uniform(-0.2, 0.2, 2) * geometric[:, 1:2]
    draws["stretch"] = torch.exp(uniform(-0.2, 0.2) * geometric[:, 2])
    draws["brightness"] = 1 + uniform(-0.4, 0.4) * colour[:, 0]
    draws["contrast"] = 1 + uniform(-0.4, 0.4) * colour[:, 1]
    draws["saturation"] = 1 + uniform(-0.6, 0.6) * colour[:, 2]
    draws["solarise"] = torch.where(colour[:, 3] > 0, uniform(0.5, 1.0), torch.tensor(2.0))
    draws["erase"] = torch.cat([uniform(0, 1, 2), uniform(0.1, 0.4, 2), uniform(0, 1, 1)], dim=1)
    return draws


def augment(
    images: Float[Tensor, "batch 3 height width"], draws: Draws
) -> Float[Tensor, "batch 3 height width"]:
    """Apply drawn numbers (rows of this batch) to images in [0, 1]; the border is mirrored."""
    if not draws:
        return images
    draws = {name: value.to(images.device) for name, value in draws.items()}
    images = _warped(images, draws)
    if "brightness" not in draws:
        return images

    def column(name: str) -> Tensor:
        return draws[name].to(images.dtype)[:, None, None, None]

    images = images * column("brightness")
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (images - mean) * column("contrast")
    weights = images.new_tensor(_GREY)[:, None, None]
    grey = (images * weights).sum(1, keepdim=True)
    images = (grey + (images - grey) * column("saturation")).clamp(0, 1)
    images = torch.where(images > column("solarise"), 1 - images, images)
    return _erased(images, draws["erase"])


def augment_masks(
    masks: Int64[Tensor, "batch height width"], draws: Draws
) -> Int64[Tensor, "batch height width"]:
    """The geometric part of :func:`augment`: each pixel's label is that of the nearest one."""
    if not draws:
        return masks
    draws = {name: value.to(masks.device) for name, value in draws.items()}
    # grid_sample takes no whole numbers; labels are small enough to be exact as floats.
    return _warped(masks[:, None].float(), draws, mode="nearest")[:, 0].long()


def _warped(images: Tensor, draws: Draws, *, mode: str = "bilinear") -> Tensor:
    batch = len(images)
    if "angle" not in draws:
        # Whole-pixel shifts and mirrors are a gather: no resampling blur, and much cheaper.
        side = images.shape[-1]
        height = images.shape[-2]
        columns = (
            torch.arange(side, device=images.device) + (draws["shift"][:, 1:] * side).round().long()
        )
        columns = torch.where(draws["mirror"][:, None], side - 1 - columns, columns)
        rows = (
            torch.arange(height, device=images.device)
            + (draws["shift"][:, :1] * height).round().long()
        )
        rows, columns = _mirrored(rows, height), _mirrored(columns, side)
        picked = torch.arange(batch, device=images.device)[:, None, None]
        out = images.permute(0, 2, 3, 1)[picked, rows[:, :, None], columns[:, None]]
        return out.permute(0, 3, 1, 2)
    cosine, sine = draws["angle"].cos(), draws["angle"].sin()
    one = torch.ones_like(cosine)
    turn = torch.stack([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2)
    shear = torch.stack([one, draws["shear"][:, 0], draws["shear"][:, 1], one], 1).view(-1, 2, 2)
    mirror = torch.where(draws["mirror"], -1.0, 1.0)
    size = torch.stack([mirror * draws["zoom"] * draws["stretch"], draws["zoom"]], dim=1)
    matrix = turn @ shear * size[:, None]
    room = 1 - draws["zoom"][:, None]
    offset = draws["shift"].flip(-1) * 2 + room * draws["shift"].flip(-1) * 8
    affine = torch.cat([matrix, offset[..., None]], dim=2).to(images.dtype)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode=mode, padding_mode="reflection", align_corners=False)


def _mirrored(index: Tensor, size: int) -> Tensor:
    """Indices outside of 0 … size-1 reflected at the border."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index).clamp(0, size - 1)


def _erased(images: Tensor, boxes: Tensor) -> Tensor:
    """Grey out one rectangle in half of the images (random erasing, Zhong et al. 2020)."""
    height, width = images.shape[-2:]
    y = (torch.arange(height, device=images.device) + 0.5) / height
    x = (torch.arange(width, device=images.device) + 0.5) / width
    inside_y = (y >= boxes[:, 0:1]) & (y < boxes[:, 0:1] + boxes[:, 2:3])
    inside_x = (x >= boxes[:, 1:2]) & (x < boxes[:, 1:2] + boxes[:, 3:4])
    inside = inside_y[:, :, None] & inside_x[:, None] & (boxes[:, 4] < 0.5)[:, None, None]
    return images.masked_fill(inside[:, None], 0.5)


def one_hot(
    labels: Int64[Tensor, " batch"], classes: int, smoothing: float
) -> Float[Tensor, "batch classes"]:
    """Class probabilities: 1 - smoothing on the label, the rest spread evenly over all."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(
    images: Float[Tensor, "batch 3 height width"],
    targets: Float[Tensor, "batch classes"],
    *,
    mixup: float,
    cutmix: float,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch classes"]]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), one ratio for the batch.

    Partners are neighbours (0 with 1, 2 with 3, …): batches are shuffled anyway, and partners stay
    on the same process however many there are.
    """
    if not (mixup or cutmix):
        return images, targets
    cut = cutmix > 0 and (mixup == 0 or bool(torch.rand((), generator=generator) < 0.5))
    share = _beta(cutmix if cut else mixup, generator)
    partner = torch.arange(len(images)) ^ 1
    partner = partner.clamp_max(len(images) - 1).to(images.device)
    corner = torch.rand(2, generator=generator)
    if not cut:
        images = share * images + (1 - share) * images[partner]
    else:
        height, width = images.shape[-2:]
        tall, wide = (round(side * math.sqrt(1 - share)) for side in (height, width))
        top = int(corner[0] * (height - tall + 1))
        left = int(corner[1] * (width - wide + 1))
        images = images.clone()
        box = (..., slice(top, top + tall), slice(left, left + wide))
        images[box] = images[partner][box]
        share = 1 - tall * wide / (height * width)
    return images, share * targets + (1 - share) * targets[partner]


def _beta(alpha: float, generator: torch.Generator) -> float:
    """Beta(alpha, alpha), drawn by NumPy from a seed of the generator (torch's takes none)."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return np.random.default_rng(seed).beta(alpha, alpha)
