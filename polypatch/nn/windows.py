"""Cutting maps into windows and back. Maps are channels-last: (batch, height, width, dim)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["merge_windows", "pad_to_windows", "windows_of"]


def pad_to_windows(
    x: Float[Tensor, "batch height width dim"], window: tuple[int, int]
) -> Float[Tensor, "batch tall wide dim"]:
    """Zeros below and to the right, up to the next multiples of the window."""
    height, width = x.shape[1:3]
    below, right = -height % window[0], -width % window[1]
    return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x


def windows_of(
    x: Float[Tensor, "batch height width dim"], window: tuple[int, int]
) -> Float[Tensor, "windows tokens dim"]:
    """Non-overlapping windows, row by row within each sample: (batch · windows, tokens, dim).

    The sides must be multiples of the window's (:func:`pad_to_windows`).
    """
    batch, height, width, dim = x.shape
    tall, wide = window
    x = x.view(batch, height // tall, tall, width // wide, wide, dim)
    return x.transpose(2, 3).reshape(-1, tall * wide, dim)


def merge_windows(
    x: Float[Tensor, "windows tokens dim"],
    window: tuple[int, int],
    size: tuple[int, int],
) -> Float[Tensor, "batch height width dim"]:
    """Undo :func:`windows_of`; ``size``: height and width of the map, multiples of the window."""
    tall, wide = window
    rows, columns = size[0] // tall, size[1] // wide
    x = x.view(-1, rows, columns, tall, wide, x.shape[-1])
    return x.transpose(2, 3).reshape(x.shape[0], size[0], size[1], x.shape[-1])
