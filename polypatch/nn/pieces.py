"""A batch in groups of samples that fit into the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["in_pieces"]

#: values of the widest map of a group of samples (16 MiB in float32)
PIECE = 2**22


def in_pieces(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "batch *rest"], *, widest: int
) -> Float[Tensor, "batch *out"]:
    """``function(x)``, on a CPU without gradients in groups of samples, joined.

    Memory of a size that the allocator keeps, and that fits into the cache, is used again from
    block to block; a whole batch's maps come fresh from the system each time, which takes longer
    than what is done with them. ``widest``: values of a sample's widest map inside of ``function``.
    """
    group = max(1, PIECE // max(1, widest))
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu or len(x) <= group:
        return function(x)
    return torch.cat([function(part) for part in x.split(group)])
