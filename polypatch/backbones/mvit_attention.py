"""Pooling attention, the operator of :mod:`polypatch.backbones.mvit`, and relative positions.

Tokens are (batch, [class token +] time · height · width, dim); the grid travels beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..nn import Linear, fresh, linear

__all__ = [
    "MODES",
    "BlockShape",
    "Grid",
    "HeadNorm",
    "Pool",
    "Pooling",
    "PoolingAttention",
    "distances",
    "kernel_of",
    "over_grid",
    "relative_bias",
    "slide",
]

#: time, height, width
Grid = tuple[int, int, int]

MODES = ("conv", "conv_unshared", "avg", "max")


@dataclass(frozen=True)
class Pooling:
    """Kernel and stride over (time, height, width); padded by half of the kernel."""

    kernel: Grid
    stride: Grid

    @property
    def padding(self) -> Grid:
        a, b, c = (k // 2 for k in self.kernel)
        return a, b, c


@dataclass(frozen=True)
class BlockShape:
    """One block's row of the paper's tables: widths in and out, heads, how it pools."""

    dim: int
    out: int
    heads: int
    queries: Pooling | None = None
    keys: Pooling | None = None

    @property
    def stride(self) -> Grid:
        return self.queries.stride if self.queries else (1, 1, 1)


def kernel_of(stride: Grid) -> Grid:
    """Of pooling whose kernel isn't given: stride + 1, and 1 where the stride is 1."""
    a, b, c = (s + 1 if s > 1 else 1 for s in stride)
    return a, b, c


def over_grid(
    x: Float[Tensor, "batch tokens dim"],
    grid: Grid,
    pool: Callable[[Tensor], Tensor],
    *,
    prefix: int,
) -> tuple[Float[Tensor, "batch pooled dim"], Grid]:
    """Apply ``pool``, a function of maps (batch, time, height, width, dim), to all tokens but the
    first ``prefix``; and the grid that it makes."""
    batch, _, dim = x.shape
    pooled = pool(x[:, prefix:].reshape(batch, *grid, dim))
    size = (pooled.shape[1], pooled.shape[2], pooled.shape[3])
    tokens = pooled.reshape(batch, math.prod(size), dim)
    return torch.cat([x[:, :prefix], tokens], 1) if prefix else tokens, size


def slide(
    maps: Float[Tensor, "batch time height width dim"],
    pooling: Pooling,
    two: Callable[..., Tensor],
    three: Callable[..., Tensor],
) -> Float[Tensor, "batch time2 height2 width2 dim"]:
    """``two(maps, kernel, stride, padding)`` frame by frame where time is left alone, else
    ``three``. Both see channels first; in memory channels are last."""
    kernel, stride, padding = pooling.kernel, pooling.stride, pooling.padding
    if kernel[0] > 1 or stride[0] > 1:
        pooled = three(maps.permute(0, 4, 1, 2, 3), kernel, stride, padding)
        return pooled.permute(0, 2, 3, 4, 1)
    frames = maps.flatten(0, 1).permute(0, 3, 1, 2)
    pooled = two(frames, kernel[1:], stride[1:], padding[1:]).permute(0, 2, 3, 1)
    return pooled.reshape(*maps.shape[:2], *pooled.shape[1:])


def average(x: Tensor, kernel: Sequence[int], stride: Any, padding: Sequence[int]) -> Tensor:
    """Mean over the kernel, zeros outside of the map counted; torch's own padding is refused where
    a map is smaller than the kernel."""
    pool = F.avg_pool2d if len(kernel) == 2 else F.avg_pool3d
    x = F.pad(x, [side for side in reversed(padding) for _ in range(2)])
    return pool(x, tuple(kernel), stride)


def distances(queries: int, keys: int, device: torch.device) -> Int64[Tensor, "queries keys"]:
    """Which row of a table of 2·max(queries, keys) - 1 relative positions belongs to a query and a
    key on one axis; the coarser side counts in steps of the finer one. Fractions are cut off, so
    the order of the arithmetic is the authors'."""
    row = torch.arange(queries, device=device)[:, None] * max(keys / queries, 1.0)
    step = max(queries / keys, 1.0)
    column = torch.arange(keys, device=device)[None] * step
    return (row - column + (keys - 1) * step).long()


def rows_of(
    table: Float[Tensor, "_ dim"], queries: int, keys: int
) -> Float[Tensor, "queries keys dim"]:
    """The relative positions of all queries and keys on one axis; a table that was made for other
    sizes is interpolated linearly."""
    rows = 2 * max(queries, keys) - 1
    if len(table) != rows:
        table = F.interpolate(table.t()[None], size=rows, mode="linear")[0].t()
    return table[distances(queries, keys, table.device)]


def relative_bias(
    q: Float[Tensor, "batch tokens heads dim"],
    grid: Grid,
    keys: Grid,
    tables: Sequence[Float[Tensor, "_ dim"] | None],
) -> Float[Tensor, "batch heads tokens keys"]:
    """v2's logits of relative position: the sum over axes of q · R[distance on this axis].

    Args:
        q: unscaled queries on ``grid``, in raster order, without class token.
        keys: the keys' grid.
        tables: of time, height and width; None: this axis says nothing.
    """
    batch, _, heads, dim = q.shape
    q = q.reshape(batch, *grid, heads, dim)
    parts: list[Tensor] = []
    for axis, table in enumerate(tables):
        if table is not None:
            rows = rows_of(table, grid[axis], keys[axis]).to(q.dtype)
            moved = q.movedim(1 + axis, 1)  # each place on the axis has a matrix of its own
            part = moved.flatten(2, -2) @ rows.transpose(1, 2)
            # Transposed before it is unflattened: ONNX optimisers take the two reshapes around a
            # product away where the shapes allow it, which on square maps gives other numbers.
            part = part.transpose(1, 2).unflatten(1, moved.shape[2:-1]).movedim(-2, 1 + axis)
            shape = [1, 1, 1]
            shape[axis] = keys[axis]
            parts.append(part.unflatten(-1, shape))
    bias = sum(parts[1:], start=parts[0]).expand(-1, -1, -1, -1, -1, *keys)
    return bias.reshape(batch, math.prod(grid), heads, math.prod(keys)).transpose(1, 2)


class HeadNorm(nn.Module):
    """Layer norm of every head of one or several tensors, each with a gain and a shift of its own.
    Tensors lie side by side in the channels, and in each of them its heads."""

    def __init__(self, *, parts: int, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.parts, self.dim, self.eps = parts, dim, eps
        self.weight = nn.Parameter(torch.ones(parts * dim))
        self.bias = nn.Parameter(torch.zeros(parts * dim))

    def forward(self, x: Float[Tensor, "batch tokens channels"]) -> Tensor:
        x = x.unflatten(-1, (self.parts, -1, self.dim))
        if self.parts == 1:
            x = F.layer_norm(x, (self.dim,), self.weight, self.bias, self.eps)
        else:
            gain, shift = self.weight.view(-1, 1, self.dim), self.bias.view(-1, 1, self.dim)
            x = fresh.affine(F.layer_norm(x, (self.dim,), eps=self.eps), gain, shift)
        return x.flatten(-3)


class Pool(nn.Module):
    """LN(P(·)) of one or several tensors that lie side by side in the channels.

    Args:
        mode: of :data:`MODES`; ``"avg"`` and ``"max"`` have neither weights nor norm.
        parts: how many tensors (keys and values: 2), each with kernels of its own.
        heads: how many share the kernels.
        dim: channels of a head.
    """

    def __init__(
        self, *, mode: str, pooling: Pooling, parts: int, heads: int, dim: int, prefix: int
    ) -> None:
        super().__init__()
        self.mode, self.pooling, self.prefix = mode, pooling, prefix
        self.parts, self.heads, self.dim = parts, heads, dim
        self.conv: nn.Conv3d | None = None
        self.norm: HeadNorm | None = None
        if mode.startswith("conv"):
            width = parts * dim
            self.conv = nn.Conv3d(width, width, pooling.kernel, groups=width, bias=False)
            self.norm = HeadNorm(parts=parts, dim=dim)

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], grid: Grid
    ) -> tuple[Float[Tensor, "batch pooled channels"], Grid]:
        x, grid = over_grid(x, grid, self.pool, prefix=self.prefix)
        return x if self.norm is None else self.norm(x), grid

    def pool(self, maps: Tensor) -> Tensor:
        if self.conv is None and self.mode == "max":
            return slide(maps, self.pooling, F.max_pool2d, F.max_pool3d)
        if self.conv is None:
            return slide(maps, self.pooling, average, average)
        weight = self.conv.weight
        if self.heads > 1:
            weight = weight.unflatten(0, (self.parts, 1, self.dim))
            weight = weight.expand(-1, self.heads, *weight.shape[2:]).flatten(0, 2)
        groups = len(weight)

        def two(x: Tensor, _: Any, stride: Any, padding: Any) -> Tensor:
            return F.conv2d(x, weight[:, :, 0], None, stride, padding, groups=groups)

        def three(x: Tensor, _: Any, stride: Any, padding: Any) -> Tensor:
            return F.conv3d(x, weight, None, stride, padding, groups=groups)

        return slide(maps, self.pooling, two, three)


class PoolingAttention(nn.Module):
    """Multi-head pooling attention (section 3.1), with v2's additions.

    Args:
        shape: the block's; ``out`` is the attention's own width.
        pool_first: pool the tokens and project what is left, instead of the other way round.
        residual: add the pooled queries to what is attended to.
        tables: rows of the relative positions of time, height and width; 0: none.
    """

    def __init__(
        self,
        *,
        shape: BlockShape,
        prefix: int,
        mode: str,
        pool_first: bool,
        bias: bool,
        residual: bool,
        tables: Grid,
    ) -> None:
        super().__init__()
        dim, out, heads = shape.dim, shape.out, shape.heads
        self.out, self.heads, self.prefix = out, heads, prefix
        self.pool_first, self.residual = pool_first, residual
        self.qkv = Linear(dim, 3 * out, bias=bias)
        self.proj = Linear(out, out)
        pooled = dim if pool_first else out
        sharing = 1 if mode == "conv_unshared" else heads

        def pool(pooling: Pooling | None, parts: int) -> Pool | None:
            return pooling and Pool(
                mode=mode,
                pooling=pooling,
                parts=parts,
                heads=sharing,
                dim=pooled // sharing,
                prefix=prefix,
            )

        self.pool_q = pool(shape.queries, 1)
        self.pool_kv = pool(shape.keys, 2)

        def table(rows: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(rows, out // heads)) if rows else None

        self.rel_time, self.rel_height, self.rel_width = map(table, tables)

    @property
    def tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.rel_time, self.rel_height, self.rel_width

    def project(self, x: Tensor, start: int, count: int) -> Tensor:
        """``count`` of the three projections, from the one numbered ``start``."""
        part = slice(start * self.out, (start + count) * self.out)
        bias = None if self.qkv.bias is None else self.qkv.bias[part]
        return linear(x, self.qkv.weight[part], bias)

    def queries(
        self, x: Float[Tensor, "batch tokens dim"], grid: Grid
    ) -> tuple[Float[Tensor, "batch pooled out"], Grid]:
        if self.pool_q is None:
            return self.project(x, 0, 1), grid
        if self.pool_first:
            x, grid = self.pool_q(x, grid)
            return self.project(x, 0, 1), grid
        return self.pool_q(self.project(x, 0, 1), grid)

    def keys_and_values(
        self, x: Float[Tensor, "batch tokens dim"], grid: Grid
    ) -> tuple[Float[Tensor, "batch pooled twice"], Grid]:
        if self.pool_kv is None:
            return self.project(x, 1, 2), grid
        if self.pool_first:
            x, grid = self.pool_kv(torch.cat([x, x], -1), grid)
            k, v = x.chunk(2, dim=-1)
            return torch.cat([self.project(k, 1, 1), self.project(v, 2, 1)], -1), grid
        return self.pool_kv(self.project(x, 1, 2), grid)

    def bias(
        self, q: Float[Tensor, "batch tokens heads dim"], grid: Grid, keys: Grid
    ) -> Float[Tensor, "batch heads tokens keys"] | None:
        """Relative positions; the class token, as query and as key, has none."""
        if all(table is None for table in self.tables):
            return None
        bias = relative_bias(q[:, self.prefix :], grid, keys, self.tables)
        return F.pad(bias, (self.prefix, 0, self.prefix, 0)) if self.prefix else bias

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], grid: Grid, only_class: bool = False
    ) -> tuple[Float[Tensor, "batch pooled out"], Grid]:
        """
        Args:
            x: normed tokens.
            only_class: let the class token alone ask; it is all that comes out.
        """
        kv, keys = self.keys_and_values(x, grid)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).unbind(2)
        if only_class:  # neither pooled nor placed, but normed
            q = self.class_query(x[:, :1])
            bias = None
        else:
            q, grid = self.queries(x, grid)
            q = q.unflatten(-1, (self.heads, -1))
            bias = self.bias(q, grid, keys)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias
        ).transpose(1, 2)
        if self.residual and not only_class:
            if self.prefix:
                placed = mixed[:, self.prefix :] + q[:, self.prefix :]
                mixed = torch.cat([mixed[:, : self.prefix], placed], 1)
            else:
                mixed = fresh.add(q, mixed)
        return self.proj(mixed.flatten(2)), grid

    def class_query(self, x: Float[Tensor, "batch 1 dim"]) -> Float[Tensor, "batch 1 heads dim2"]:
        """The class token's query: a pooling layer doesn't pool it, but norms it."""
        norm = self.pool_q.norm if self.pool_q is not None else None
        if norm is not None and self.pool_first:
            x = norm(x)
        q = self.project(x, 0, 1)
        if norm is not None and not self.pool_first:
            q = norm(q)
        return q.unflatten(-1, (self.heads, -1))
