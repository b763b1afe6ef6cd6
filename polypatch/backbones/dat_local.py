"""The local half of DAT and DAT++ (:mod:`.dat`): what a block mixes with where it isn't deformable.

All take and give maps (batch, height, width, dim), of any size. With their letters in the authors'
configurations and where they come from:

* ``L``, ``S``: windows of w × w, plain or shifted by ceil(w / 2) (Swin, Liu et al. 2021). Maps that
  the window doesn't divide get zeros below and to the right, which are attended like the rest, as
  in the authors' detection code; only the shift's mask (-100, not -∞) keeps strangers apart.
* ``N``: each place attends to the k × k window around it (NAT, Hassani et al. 2023). At the border
  the window is *moved inside*, not cut off: every place has k² keys, and the bias is that of the
  true distances. Maps smaller than k get zeros *in front of* the projections, so that what is
  added has keys: the biases.
* ``P``: keys and values from a map reduced r-fold by a strided convolution (PVT, Wang et al.
  2021).
* ``E``: each place attends to its 3 × 3 neighbours, in a quarter of the channels; these are fetched
  by a fixed shift plus a learned depthwise convolution (Slide, Pan et al. 2023). Neighbours
  outside the map are zeros plus the convolutions' bias, not masked.

Window and neighbourhood attention cut the queries of a map into tiles and treat (head, tile) as
one axis of heads. So one bias serves all samples, and one fused call does a whole map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..errors import PolypatchError
from ..nn import Linear, pad_to_windows

__all__ = [
    "NeighbourhoodAttention",
    "PyramidAttention",
    "SlideAttention",
    "WindowAttention",
    "neighbourhood_bias",
    "shift_mask",
]


def to_tiles(
    x: Float[Tensor, "batch height width dim"], tile: tuple[int, int], heads: int
) -> Float[Tensor, "batch heads_tiles tokens head_dim"]:
    """Non-overlapping tiles as heads; the tile divides the map."""
    batch, height, width, _ = x.shape
    tall, wide = tile
    x = x.view(batch, height // tall, tall, width // wide, wide, heads, -1)
    return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(1, 3)


def from_tiles(
    x: Float[Tensor, "batch heads_tiles tokens head_dim"],
    tile: tuple[int, int],
    size: tuple[int, int],
) -> Float[Tensor, "batch height width dim"]:
    """Undo :func:`to_tiles`; ``size``: of the map."""
    rows, columns = size[0] // tile[0], size[1] // tile[1]
    x = x.unflatten(2, tile).unflatten(1, (-1, rows, columns))
    return x.permute(0, 2, 4, 3, 5, 1, 6).reshape(x.shape[0], *size, -1)


def at_least(
    x: Float[Tensor, "batch height width dim"], side: int
) -> Float[Tensor, "batch tall wide dim"]:
    """Zeros below and to the right of a map whose sides are shorter than ``side``."""
    below, right = max(0, side - x.shape[1]), max(0, side - x.shape[2])
    return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x


# ---- windows -----------------------------------------------------------------------------------


def relative_index(window: int) -> Int64[Tensor, "tokens tokens"]:
    """Row of Swin's bias table for each pair of places in a window."""
    place = torch.arange(window)
    steps = place[:, None] - place + window - 1  # query minus key
    index = steps[:, None, :, None] * (2 * window - 1) + steps[None, :, None, :]
    return index.reshape(window * window, window * window)


def shift_mask(
    size: tuple[int, int], window: int, shift: int, *, like: Tensor
) -> Float[Tensor, "windows tokens tokens"]:
    """-100 between places that were no neighbours before the map was rolled by ``shift``."""

    def region(length: int) -> Tensor:
        place = torch.arange(length, device=like.device)
        return (place >= length - window).long() + (place >= length - shift).long()

    regions = region(size[0])[:, None] * 3 + region(size[1])
    regions = to_tiles(regions[None, :, :, None].to(like.dtype), (window, window), 1)[0, ..., 0]
    return (regions[:, None] != regions[:, :, None]).to(like.dtype) * -100.0


class WindowAttention(nn.Module):
    """``L``, and with ``shift`` > 0 ``S``.

    Raises:
        PolypatchError: a shift that isn't smaller than the window.
    """

    index: Tensor

    def __init__(
        self, *, dim: int, heads: int, window: int, shift: int, attn_drop: float, drop: float
    ) -> None:
        super().__init__()
        if not 0 <= shift < window:
            raise PolypatchError(f"windows of {window} can't be shifted by {shift}")
        self.heads, self.window, self.shift = heads, window, shift
        self.attn_drop = attn_drop
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.drop = nn.Dropout(drop)
        self.relative_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("index", relative_index(window), persistent=False)

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.relative_bias, std=0.01)
        self.index.copy_(relative_index(self.window))

    def mask(self, size: tuple[int, int]) -> Float[Tensor, "windows tokens tokens"]:
        return shift_mask(size, self.window, self.shift, like=self.relative_bias)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        height, width = x.shape[1:3]
        tile = (self.window, self.window)
        x = pad_to_windows(x, tile)
        size = (x.shape[1], x.shape[2])
        windows = (size[0] // self.window) * (size[1] // self.window)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        qkv = to_tiles(self.qkv(x), tile, 3 * self.heads).chunk(3, dim=1)
        bias = self.relative_bias.t()[:, None, self.index]  # heads, 1, tokens, tokens
        if self.shift:
            bias = bias + self.mask(size)
        x = F.scaled_dot_product_attention(
            *qkv,
            attn_mask=bias.expand(-1, windows, -1, -1).flatten(0, 1)[None].to(x.dtype),
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        x = self.drop(self.proj(from_tiles(x, tile, size)))
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, :height, :width]


# ---- neighbourhoods ----------------------------------------------------------------------------


def cut(length: int, kernel: int) -> tuple[int, int]:
    """Side of the query tiles along an axis, and how many cells of keys they need on either side.

    A tile's keys are those of all its queries, so small tiles copy much and large ones compute much
    that is masked: a kernel's width is best, and the whole axis where it is short.
    """
    if length <= 2 * kernel:
        return length, 0
    return -(-length // -(-length // max(kernel, 7))), kernel // 2


def axis_neighbours(
    length: int, kernel: int, device: torch.device
) -> Int64[Tensor, "tiles tile span"]:
    """Along one axis: the bias table's row for each query and key of a tile, which is their
    distance; ``2 · kernel - 1``, one beyond the table, where the query doesn't see the key."""
    tile, margin = cut(length, kernel)
    tiles = -(-length // tile)
    query = torch.arange(tile, device=device)
    distance = torch.arange(-margin, tile + margin, device=device) - query[:, None]
    place = query + torch.arange(tiles, device=device)[:, None] * tile
    first = ((place - kernel // 2).clamp(0, length - kernel) - place)[..., None]  # moved inside
    seen = (distance >= first) & (distance < first + kernel)
    return torch.where(seen, distance + kernel - 1, 2 * kernel - 1)


def neighbourhood_bias(
    table: Float[Tensor, "heads steps steps"], size: tuple[int, int], kernel: int
) -> Float[Tensor, "1 heads_tiles queries keys"]:
    """Bias by distance where a query sees a key, -∞ elsewhere."""
    rows, columns = (axis_neighbours(n, kernel, table.device) for n in size)
    table = F.pad(table, (0, 1, 0, 1), value=float("-inf"))[:, :, columns]
    # The large result is written once, in its final order, as rows of (head, row, tile, place).
    index = torch.arange(table[..., 0].numel(), device=table.device).view(table.shape[:-1])
    index = index[:, rows].permute(0, 1, 4, 2, 5, 3)
    return F.embedding(index, table.flatten(0, 3)).flatten(5).flatten(3, 4).flatten(0, 2)[None]


class NeighbourhoodAttention(nn.Module):
    """``N``.

    Raises:
        PolypatchError: an even kernel, or one below 3.
    """

    def __init__(self, *, dim: int, heads: int, kernel: int, attn_drop: float, drop: float) -> None:
        super().__init__()
        if kernel < 3 or kernel % 2 == 0:
            raise PolypatchError(f"a neighbourhood's side is odd and above 1, got {kernel}")
        self.heads, self.kernel = heads, kernel
        self.attn_drop = attn_drop
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.drop = nn.Dropout(drop)
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * kernel - 1, 2 * kernel - 1))

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        height, width = x.shape[1:3]
        x = at_least(x, self.kernel)
        size = (x.shape[1], x.shape[2])
        (tall, above), (wide, left) = cut(size[0], self.kernel), cut(size[1], self.kernel)
        below, right = -size[0] % tall, -size[1] % wide
        q, kv = self.qkv(x).tensor_split([x.shape[-1]], dim=-1)
        q = F.pad(q, (0, 0, 0, right, 0, below)) if below or right else q
        q = to_tiles(q, (tall, wide), self.heads)
        # (2, batch, heads, rows, columns, head_dim), then overlapping tiles of it
        kv = kv.unflatten(-1, (2, self.heads, -1)).permute(3, 0, 4, 1, 2, 5)
        kv = F.pad(kv, (0, 0, left, right + left, above, below + above))
        bias = neighbourhood_bias(self.rpb, size, self.kernel).to(q.dtype)
        kv = kv.unfold(3, tall + 2 * above, tall).unfold(4, wide + 2 * left, wide)
        kv = kv.permute(0, 1, 2, 3, 4, 6, 7, 5).flatten(5, 6).flatten(2, 4)
        x = F.scaled_dot_product_attention(
            q,
            kv[0],
            kv[1],
            attn_mask=bias,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        x = from_tiles(x, (tall, wide), (size[0] + below, size[1] + right))
        return self.drop(self.proj(x[:, :height, :width]))


# ---- the rest ----------------------------------------------------------------------------------


class PyramidAttention(nn.Module):
    """``P``. The reduction drops rows and columns beyond the last whole cell, as a convolution
    does; a map smaller than one cell gets zeros."""

    def __init__(
        self, *, dim: int, heads: int, reduction: int, attn_drop: float, drop: float
    ) -> None:
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.attn_drop = attn_drop
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        self.drop = nn.Dropout(drop)
        if reduction > 1:
            self.reduce = nn.Conv2d(dim, dim, reduction, stride=reduction)
            self.norm = nn.LayerNorm(dim)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        coarse = x
        if self.reduction > 1:
            coarse = at_least(x, self.reduction).permute(0, 3, 1, 2)
            coarse = self.norm(self.reduce(coarse).permute(0, 2, 3, 1))
        kv = self.kv(coarse).flatten(1, 2).unflatten(-1, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.attn_drop if self.training else 0.0
        )
        return self.drop(self.proj(mixed.transpose(1, 2).reshape(x.shape)))


class SlideAttention(nn.Module):
    """``E``. Each head's quarter-width channels lie as [q | k | v]; the fixed part of the shifting
    convolution has no gradient but a bias that has one.

    Raises:
        PolypatchError: a width that four times the number of heads doesn't divide.
    """

    SIDE = 3
    REDUCTION = 4

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        if dim % (heads * self.REDUCTION):
            raise PolypatchError(f"slide attention needs a width divisible by 4 · heads, not {dim}")
        inner = dim // self.REDUCTION
        self.heads, self.head_dim = heads, inner // heads
        self.scale = (dim // heads) ** -0.5  # of the whole width's heads, not of the quarter's
        self.qkv = Linear(dim, 3 * inner)
        self.proj = Linear(inner, dim)
        neighbours = self.SIDE**2
        fetched = self.head_dim * neighbours
        self.shift = nn.Conv2d(self.head_dim, fetched, self.SIDE, groups=self.head_dim)
        self.learned = nn.Conv2d(self.head_dim, fetched, self.SIDE, groups=self.head_dim)
        self.shift.weight.requires_grad_(False)
        self.relative_bias = nn.Parameter(torch.zeros(heads, neighbours))

    def init_weights(self) -> None:
        """The shift fetches one neighbour each; biases and learned part are torch's own."""
        neighbours = self.SIDE**2
        one = torch.eye(neighbours).view(neighbours, 1, self.SIDE, self.SIDE)
        with torch.no_grad():
            self.shift.weight.copy_(one.repeat(self.head_dim, 1, 1, 1))
        nn.init.trunc_normal_(self.relative_bias, std=0.02)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).unflatten(-1, (self.heads, 3, self.head_dim)).permute(4, 0, 3, 5, 1, 2)
        q = qkv[0] * self.scale
        around = F.conv2d(
            qkv[1:].flatten(0, 2),
            self.shift.weight + self.learned.weight,
            self.shift.bias + self.learned.bias,  # type: ignore[operator]
            padding=self.SIDE // 2,
            groups=self.head_dim,
        )
        around = around.view(2, batch, self.heads, self.head_dim, self.SIDE**2, height, width)
        # The authors add the bias to the keys, the same in each channel.
        logits = torch.einsum("bhcyx,bhcnyx->bhnyx", q, around[0])
        logits = logits + torch.einsum("bhcyx,hn->bhnyx", q, self.relative_bias)
        mixed = torch.einsum("bhnyx,bhcnyx->byxhc", logits.softmax(2), around[1])
        return self.proj(mixed.flatten(3))
