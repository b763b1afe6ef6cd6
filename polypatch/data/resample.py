"""Resizing whose result does not depend on how samples are batched, to the last bit.

A resize is two matrix products, ``W @ image @ Wᵀ``, with the antialiasing triangle filter in ``W``.
In ordinary floating point the product of a batch of 64 and that of a batch of 1 may differ in the
last bit, because the library sums in another order. Here the weights are whole numbers of 1/256
and each pass is rounded to whole grey levels (as Pillow does): every product and every partial sum
is then an integer below 2^24, exact in float32 in any order, and ``read`` is truly a function of
the index alone.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

__all__ = ["resample", "triangle_weights"]

UNIT = 256  # the weights of one output pixel sum to this


def triangle_weights(
    *, window: int, size: int, padded: int | None = None
) -> Float32[np.ndarray, "size padded"]:
    """Weights that resize ``window`` pixels to ``size``, whole numbers that sum to 256 in each row.

    Shrinking widens the triangle by the ratio (antialiasing); enlarging is bilinear. Pixels outside
    the window never enter: at its edges the filter is cut off and renormalised. Columns from
    ``window`` to ``padded`` are zero, so that windows of several sizes share one shape.
    """
    ratio = window / size
    support = max(ratio, 1.0)
    centres = (np.arange(size) + 0.5) * ratio
    distance = np.abs(np.arange(window) + 0.5 - centres[:, None]) / support
    weights = np.clip(1.0 - distance, 0.0, None)
    weights *= UNIT / weights.sum(axis=1, keepdims=True)
    whole = np.rint(weights)
    # Rounding leaves the row a few units off; the largest weight takes the difference.
    whole[np.arange(size), whole.argmax(axis=1)] += UNIT - whole.sum(axis=1)
    out = np.zeros((size, padded or window), dtype=np.float32)
    out[:, :window] = whole
    return out


def resample(
    patches: UInt8[Tensor, "batch window window channels"],
    weights: Float32[Tensor, "#batch size window"],
) -> Float32[Tensor, "batch channels size size"]:
    """Resize square patches by their own :func:`triangle_weights`; whole grey levels 0..255."""
    batch, window, _, channels = patches.shape
    size = weights.shape[1]
    weights = weights.expand(batch, size, window)
    # A caller's autocast would round the products to bfloat16.
    with torch.autocast(patches.device.type, enabled=False):
        # Rows first: one product per sample, all columns and channels at once.
        rows = torch.bmm(weights, patches.reshape(batch, window, window * channels).float())
        rows = rows.div_(UNIT).round_().view(batch, size, window, channels)
        # Then columns: (window, channels * size), so that the result needs one permutation only.
        columns = rows.permute(0, 2, 3, 1).reshape(batch, window, channels * size)
        out = torch.bmm(weights, columns).div_(UNIT).round_()  # batch, x, (channel, y)
    return out.view(batch, size, channels, size).permute(0, 2, 3, 1).contiguous()
