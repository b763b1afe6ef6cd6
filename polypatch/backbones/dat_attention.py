"""Deformable attention (:mod:`.dat`): where to look, what is read there, and the bias by distance.

Points and displacements are (y, x). On a map, -1 and 1 are the *middles* of the outer cells.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..nn import Linear, fresh
from .dat_local import at_least

__all__ = [
    "POSITIONS",
    "DeformableAttention",
    "query_points",
    "reference_points",
    "relative_bias",
    "relative_bias_by_windows",
    "sample",
]

POSITIONS = ("table", "depthwise", "fixed", "log", None)


def reference_points(
    size: tuple[int, int], *, conference: bool = False, like: Tensor
) -> Float[Tensor, "rows columns 2"]:
    """Centres of the cells of a grid as (y, x) in units in which -1 and 1 are the *middles* of
    the map's outer cells; see the traps for why they overshoot."""
    axes = []
    for cells in size:
        place = torch.arange(cells, device=like.device, dtype=like.dtype) + 0.5
        if cells == 1:
            axes.append(place * 0)
        else:
            axes.append(place / (cells if conference else cells - 1) * 2 - 1)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def query_points(
    size: tuple[int, int], *, conference: bool = False, like: Tensor
) -> Float[Tensor, "rows columns 2"]:
    """Where the queries stand, in the same units."""
    if conference:
        return reference_points(size, conference=True, like=like)
    axes = [
        torch.linspace(-1, 1, cells, device=like.device, dtype=like.dtype)
        if cells > 1
        else like.new_zeros(1)
        for cells in size
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def sample(
    x: Float[Tensor, "batch height width dim"],
    points: Float[Tensor, "batch groups rows columns 2"],
) -> Float[Tensor, "batch points dim"]:
    """Each group of channels read bilinearly at its own points; zeros beyond the map."""
    batch, groups = points.shape[:2]
    maps = x.permute(0, 3, 1, 2).reshape(batch * groups, -1, *x.shape[1:3])
    read = F.grid_sample(
        maps.to(points.dtype), points.flatten(0, 1).flip(-1), mode="bilinear", align_corners=True
    )
    return read.reshape(batch, x.shape[-1], -1).transpose(1, 2).to(x.dtype)


def relative_bias(
    table: Float[Tensor, "heads rows columns"],
    points: Float[Tensor, "batch groups points 2"],
    size: tuple[int, int],
    *,
    conference: bool = False,
) -> Float[Tensor, "batch heads queries points"]:
    """The table read at half the displacement of each query of a map of ``size`` from each point:
    the general form. Displacements beyond the table read zeros."""
    batch, groups, count, _ = points.shape
    query = query_points(size, conference=conference, like=points).flatten(0, 1)
    displacement = (query[:, None] - points.flatten(0, 1)[:, None]) * 0.5
    tables = table.to(points.dtype).unflatten(0, (groups, -1)).repeat(batch, 1, 1, 1)
    read = F.grid_sample(tables, displacement.flip(-1), mode="bilinear", align_corners=True)
    return read.view(batch, len(table), -1, count)


def relative_bias_by_windows(
    table: Float[Tensor, "heads rows columns"], points: Float[Tensor, "batch groups points 2"]
) -> Float[Tensor, "batch heads queries points"]:
    """:func:`relative_bias` for a map of the table's own size and points within [-1, 1]."""
    batch, groups, count, _ = points.shape
    height, width = (table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2
    ends = torch.tensor([height - 1, width - 1], device=points.device, dtype=points.dtype)
    start = (1 - points) * 0.5 * ends  # the entry that the first query reads
    whole = start.floor()
    down, right = (start - whole)[..., None, None, None, :].to(table.dtype).unbind(-1)
    row, column = whole.long().unbind(-1)
    # One more row and column than there are queries, for the neighbours that are blended in.
    windows = F.pad(table, (0, 1, 0, 1)).unfold(1, height + 1, 1).unfold(2, width + 1, 1)
    group = torch.arange(groups, device=points.device)[:, None]
    # batch, groups, points, heads of a group, height + 1, width + 1
    window = windows.unflatten(0, (groups, -1))[group, :, row, column]
    window = torch.lerp(window[..., :-1, :], window[..., 1:, :], down)
    window = torch.lerp(window[..., :-1], window[..., 1:], right)
    return window.permute(0, 1, 3, 4, 5, 2).reshape(batch, len(table), height * width, count)


# ---- deformable attention ----------------------------------------------------------------------


class TableBias(nn.Module):
    """``"table"``: see :func:`relative_bias`. The table is for a map of ``size`` but is read at
    relative places, so any other size goes. ``inside``: all points are known to lie in [-1, 1]."""

    def __init__(self, *, heads: int, size: tuple[int, int], conference: bool) -> None:
        super().__init__()
        self.conference = conference
        self.table = nn.Parameter(torch.zeros(heads, 2 * size[0] - 1, 2 * size[1] - 1))

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.01)

    def forward(
        self,
        points: Float[Tensor, "batch groups rows columns 2"],
        size: tuple[int, int],
        inside: bool,
    ) -> Float[Tensor, "batch heads queries points"]:
        points = points.flatten(2, 3)
        own = self.table.shape[1:] == (2 * size[0] - 1, 2 * size[1] - 1)
        # The windows' gradient would need a tensor of all windows.
        if own and inside and not self.conference and not torch.is_grad_enabled():
            return relative_bias_by_windows(self.table, points)
        return relative_bias(self.table, points, size, conference=self.conference)


class FixedBias(nn.Module):
    """``"fixed"``: one learned value for each query and key of a map of ``size``, wherever the key
    moved; bilinearly resized for other maps."""

    def __init__(self, *, heads: int, size: tuple[int, int], stride: int) -> None:
        super().__init__()
        self.size, self.keys = size, (size[0] // stride, size[1] // stride)
        self.table = nn.Parameter(torch.zeros(heads, math.prod(size), math.prod(self.keys)))

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.01)

    def forward(
        self,
        points: Float[Tensor, "batch groups rows columns 2"],
        size: tuple[int, int],
        inside: bool,
    ) -> Float[Tensor, "1 heads queries points"]:
        table, keys = self.table, (points.shape[2], points.shape[3])
        if keys != self.keys:
            maps = F.interpolate(table.unflatten(-1, self.keys), keys, mode="bilinear")
            table = maps.flatten(2)
        if size != self.size:
            maps = table.transpose(1, 2).unflatten(-1, self.size)
            table = F.interpolate(maps, size, mode="bilinear").flatten(2).transpose(1, 2)
        return table[None]


class LogBias(nn.Module):
    """``"log"``: an MLP on the displacement in log scale (Swin v2, Liu et al. 2022), shared by the
    groups."""

    def __init__(self, *, group_heads: int) -> None:
        super().__init__()
        self.fc1 = Linear(2, 32)
        self.fc2 = Linear(32, group_heads, bias=False)

    def forward(
        self,
        points: Float[Tensor, "batch groups rows columns 2"],
        size: tuple[int, int],
        inside: bool,
    ) -> Float[Tensor, "batch heads queries points"]:
        query = query_points(size, like=points).flatten(0, 1)
        step = (query[:, None] - points.flatten(2, 3)[:, :, None]) * 4
        step = step.sign() * (step.abs() + 1).log2() / 3  # log2(8)
        bias = self.fc2(fresh.relu(self.fc1(step.to(self.fc1.weight.dtype))))
        return bias.permute(0, 1, 4, 2, 3).flatten(1, 2)


class DeformableAttention(nn.Module):
    """``D``; see the head of this file.

    Args:
        size: of the map that position tables are for.
        stride, kernel: r and k of the offsets' convolution; unpadded where they are equal.
        bound: s, in cells; None: offsets go as far as the map.
        position: one of ``POSITIONS``; ``"depthwise"`` adds a 3 × 3 convolution of q to the output
            in place of a bias.

    Raises:
        PolypatchError: groups that don't divide the heads, an unknown ``position``.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        groups: int,
        size: tuple[int, int],
        stride: int,
        kernel: int,
        bound: float | None,
        offsets: bool,
        position: str | None,
        conference: bool,
        attn_drop: float,
        drop: float,
    ) -> None:
        super().__init__()
        if groups < 1 or heads % groups or stride < 1 or kernel < 1:
            raise PolypatchError(
                f"deformable attention needs groups that divide its {heads} heads, a stride and a "
                f"kernel, got {groups} groups, stride {stride}, kernel {kernel}"
            )
        if position not in POSITIONS:
            known = [name for name in POSITIONS if name]
            hint = suggest(str(position), known, kind="positions")
            raise PolypatchError(f"there is no position {position!r}{hint}")
        self.heads, self.groups, self.stride, self.kernel = heads, groups, stride, kernel
        self.bound, self.offsets, self.conference = bound, offsets, conference
        self.padding = 0 if kernel == stride else kernel // 2
        self.attn_drop = attn_drop
        inner = dim // groups
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        self.drop = nn.Dropout(drop)
        self.offset_conv = nn.Conv2d(inner, inner, kernel, groups=inner)
        self.offset_norm = nn.LayerNorm(inner)
        self.offset_out = Linear(inner, 2, bias=False)
        for part in (self.offset_conv, self.offset_norm, self.offset_out):
            part.requires_grad_(offsets)
        #: the authors' ablation without offsets has no position bias either
        self.position = position if offsets else None
        self.rpe: nn.Module | None = None
        if self.position == "table":
            self.rpe = TableBias(heads=heads, size=size, conference=conference)
        elif self.position == "fixed":
            self.rpe = FixedBias(heads=heads, size=size, stride=stride)
        elif self.position == "log":
            self.rpe = LogBias(group_heads=heads // groups)
        elif self.position == "depthwise":
            self.rpe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def points(
        self, q: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch groups rows columns 2"]:
        """Where keys are sampled, as (y, x), -1 and 1 being the middles of the outer cells."""
        if self.padding == 0:
            q = at_least(q, self.kernel)
        offset = F.conv2d(
            q.permute(0, 3, 1, 2),
            self.offset_conv.weight.repeat(self.groups, 1, 1, 1),  # one network for all groups
            self.offset_conv.bias.repeat(self.groups),  # type: ignore[union-attr]
            stride=self.stride,
            padding=self.padding,
            groups=q.shape[-1],
        )
        offset = offset.permute(0, 2, 3, 1).unflatten(-1, (self.groups, -1))
        offset = self.offset_out(fresh.gelu(self.offset_norm(offset))).permute(0, 3, 1, 2, 4)
        # bfloat16 would place points to a tenth of a cell only.
        offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
        cells = (offset.shape[2], offset.shape[3])
        reference = reference_points(cells, conference=self.conference, like=offset)
        if self.bound is None:
            points = offset + reference
            return points.tanh() if self.conference else points.clamp(-1, 1)
        steps = [n if self.conference else max(n - 1, 1) for n in cells]
        return offset.tanh() * (self.bound / offset.new_tensor(steps)) + reference

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        size = (x.shape[1], x.shape[2])
        q = self.q(x)
        bias = None
        if self.offsets:
            points = self.points(q)
            keys = sample(x, points)
            if self.rpe is not None and self.position != "depthwise":
                bias = self.rpe(points, size, self.bound is None).to(q.dtype)
        else:
            keys = F.avg_pool2d(
                x.permute(0, 3, 1, 2), self.stride, self.stride, ceil_mode=self.padding > 0
            )
            keys = keys.flatten(2).transpose(1, 2)
        kv = self.kv(keys).unflatten(-1, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(
            q.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2),
            k,
            v,
            attn_mask=bias,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        mixed = mixed.transpose(1, 2).reshape(x.shape)
        if self.rpe is not None and self.position == "depthwise":
            mixed = fresh.add(mixed, self.rpe(q.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.drop(self.proj(mixed))
