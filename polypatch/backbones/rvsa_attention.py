"""The attentions of :mod:`polypatch.backbones.rvsa`: in windows that move, stretch and turn, and
over the whole map. Maps are channels-last: (batch, height, width, dim)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..nn import Linear, linear, merge_windows, windows_of
from .mvit_attention import relative_bias

__all__ = [
    "Attention",
    "FullAttention",
    "WindowAttention",
    "around",
    "sampling_points",
    "table_bias",
]


def around(side: int, window: int) -> tuple[int, int]:
    """Zeros in front and behind that make a side a multiple of the window; the odd one behind."""
    lacking = -side % window
    return lacking // 2, lacking - lacking // 2


def window_means(
    x: Float[Tensor, "batch height width dim"], window: int
) -> Float[Tensor, "batch rows columns dim"]:
    """Means over windows, of a map with zeros :func:`around` it; as two products with matrices of
    ones, which spare the padded copy."""

    def sums(side: int) -> Tensor:
        place = (torch.arange(side, device=x.device) + around(side, window)[0]) // window
        rows = torch.arange(-(-side // window), device=x.device)
        return (place == rows[:, None]).to(x.dtype)

    height, width = x.shape[1:3]
    x = (sums(height) @ x.flatten(2)).unflatten(2, (width, -1))
    return sums(width) @ x / window**2


def sampling_points(
    geometry: Float[Tensor, "batch rows columns numbers"],
    *,
    sets: int,
    heads: int,
    window: int,
    size: tuple[int, int],
) -> Float[Tensor, "batch sets heads windows cells 2"]:
    """Where each window reads keys and values: x before y, cells row by row, in the units of
    ``grid_sample`` without ``align_corners``, in which the map's outer edges are -1 and 1.

    Args:
        geometry: of each set (one; or two, for keys and for values): shift (x, y) of every head,
            then stretch (x, y) of every head, then the angles in radians. Shifts are in units of
            half the padded map, between the centres of its outer cells, and are divided by windows:
            in x by those in a *column*, in y by those in a row, as the authors' code has it.
        size: of the map, without what is :func:`around` it.
    """
    rows, columns = geometry.shape[1:3]
    geometry = geometry.unflatten(-1, (sets, 5 * heads)).permute(0, 3, 4, 1, 2)
    pair, angle = geometry.split([4 * heads, heads], 2)
    shift, stretch = pair.unflatten(2, (2, heads, 2)).unbind(2)  # batch sets heads 2 rows columns

    def axis(count: int) -> tuple[Tensor, Tensor]:
        """Centres of the windows along a side, and cells around a centre."""
        step = 2 / (count * window - 1)
        middle = (window - 1) / 2
        places = torch.arange(max(count, window), device=geometry.device, dtype=geometry.dtype)
        return (places[:count] * window + middle) * step - 1, (places[:window] - middle) * step

    def on_map(points: Tensor, count: int, side: int) -> Tensor:
        """From centres of the padded map's outer cells to edges of the map itself."""
        scale = (count * window - 1) / side
        return points * scale + (scale + (1 - 2 * around(side, window)[0]) / side - 1)

    (y, dy), (x, dx) = axis(rows), axis(columns)
    cosine, sine = (f(angle)[..., None, None] for f in (torch.cos, torch.sin))
    wide = dx * (1 + stretch[:, :, :, 0, ..., None, None])
    tall = dy[:, None] * (1 + stretch[:, :, :, 1, ..., None, None])
    shift_x = shift[:, :, :, 0] / max(1, size[0] // window) + x
    shift_y = shift[:, :, :, 1] / max(1, size[1] // window) + y[:, None]
    points = torch.stack(
        [
            on_map(wide * cosine - tall * sine + shift_x[..., None, None], columns, size[1]),
            on_map(wide * sine + tall * cosine + shift_y[..., None, None], rows, size[0]),
        ],
        -1,
    )  # batch sets heads rows columns window window 2
    return points.flatten(5, 6).flatten(3, 4)


def table_bias(
    table: Float[Tensor, "offsets heads"], window: int
) -> Float[Tensor, "heads cells cells"]:
    """Swin's bias of each pair of cells of a window, ``table[(y - y' + w - 1)(2w - 1) + x - x' + w
    - 1]``, read by sliding over the table instead of by an index."""
    offsets = table.unflatten(0, (2 * window - 1, 2 * window - 1))
    pairs = offsets.unfold(0, window, 1).unfold(1, window, 1).flip(-2, -1)
    return pairs.permute(2, 0, 1, 3, 4).flatten(3).flatten(1, 2)


class Attention(nn.Module):
    """What both attentions share: projections and the decomposed relative positions.

    Args:
        bias: of the projections: ``"all"``, ``"qv"`` (ViTAE: keys have none) or ``"none"``.
        side: of the square table of relative positions.
        scale: of the logits, default 1 / sqrt(width of a head).
    """

    def __init__(
        self, *, dim: int, heads: int, bias: str, side: int, scale: float | None, dropout: float
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.scale = scale or (dim // heads) ** -0.5
        self.qkv = Linear(dim, 3 * dim, bias=bias == "all")
        self.q_bias = nn.Parameter(torch.zeros(dim)) if bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if bias == "qv" else None
        self.proj = Linear(dim, dim)
        self.rel_height = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
        self.rel_width = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))

    def biases(self) -> Float[Tensor, " triple"] | None:
        if self.q_bias is not None and self.v_bias is not None:
            return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return self.qkv.bias

    def out(self, x: Float[Tensor, "batch height width dim"]) -> Tensor:
        x = self.proj(x)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def init_weights(self) -> None:
        """Relative positions and the biases beside the projection begin as 0."""
        for value in (self.rel_height, self.rel_width, self.q_bias, self.v_bias):
            if value is not None:
                nn.init.zeros_(value)


class FullAttention(Attention):
    """Attention over the whole map. The relative positions multiply the *scaled* query.

    Args:
        grid: rows and columns that the tables are made for. Both tables have the entries that the
            rows ask for; a grid with fewer columns reads the first entries of the second one.
        attention_dropout: of the probabilities.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        bias: str,
        scale: float | None,
        dropout: float,
        grid: tuple[int, int],
        attention_dropout: float,
    ) -> None:
        super().__init__(
            dim=dim, heads=heads, bias=bias, side=grid[0], scale=scale, dropout=dropout
        )
        self.grid, self.attention_dropout = grid, attention_dropout

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        height, width = x.shape[1:3]
        qkv = linear(x.flatten(1, 2), self.qkv.weight, self.biases())
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        size = (1, height, width)
        across = self.rel_width[: 2 * min(self.grid) - 1]
        tables = (None, self.rel_height * self.scale, across * self.scale)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=relative_bias(q, size, size, tables),
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scale,
        )
        return self.out(mixed.transpose(1, 2).flatten(2).unflatten(1, (height, width)))


class WindowAttention(Attention):
    """RVSA: queries of a window, keys and values from where the window went; each head its own way.
    The relative positions multiply the *unscaled* query and know nothing of the movement.

    Args:
        window: side in cells.
        separate: keys and values are read from places of their own.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        bias: str,
        scale: float | None,
        dropout: float,
        window: int,
        separate: bool,
    ) -> None:
        super().__init__(dim=dim, heads=heads, bias=bias, side=window, scale=scale, dropout=dropout)
        self.window, self.sets = window, 2 if separate else 1
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.sample = Linear(dim, self.sets * heads * 5)

    def init_weights(self) -> None:
        """The table normal, std 0.02; what moves the windows uniform by fan-in, torch's default of
        convolutions: windows of a fresh network aren't at rest."""
        super().init_weights()
        nn.init.trunc_normal_(self.table, std=0.02)
        self.sample.reset_parameters()

    def points(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch sets heads windows cells 2"]:
        """Where keys and values are read; in float32, as bfloat16 can't tell neighbouring cells of
        large maps."""
        geometry = self.sample(F.leaky_relu(window_means(x, self.window))).float()
        return sampling_points(
            geometry,
            sets=self.sets,
            heads=self.heads,
            window=self.window,
            size=(x.shape[1], x.shape[2]),
        )

    def keys_and_values(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch twice height width"]:
        """Channels first, as ``grid_sample`` wants them: so they come out of the product, where a
        copy in another order would cost half as much again."""
        batch, height, width, dim = x.shape
        weight, bias = self.qkv.weight[dim:].expand(batch, -1, -1), self.biases()
        tokens = x.flatten(1, 2).transpose(1, 2)
        if bias is None:
            maps = torch.bmm(weight, tokens)
        else:
            maps = torch.baddbmm(bias[dim:, None].to(x.dtype), weight, tokens)
        return maps.unflatten(2, (height, width))

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        batch, height, width, dim = x.shape
        window, heads = self.window, self.heads
        (above, below), (left, right) = around(height, window), around(width, window)
        points = self.points(x).expand(-1, 2, -1, -1, -1, -1)
        # Zeros beyond the map, so nothing has to be put around it.
        maps = self.keys_and_values(x).unflatten(1, (2 * heads, -1)).flatten(0, 1)
        read = F.grid_sample(maps.float(), points.flatten(0, 2), align_corners=False)
        read = read.to(maps.dtype).unflatten(0, (batch, 2, heads)).permute(1, 0, 4, 2, 5, 3)
        k, v = read.reshape(2, -1, heads, window**2, dim // heads).contiguous().unbind(0)

        bias = self.biases()
        q = linear(x, self.qkv.weight[:dim], None if bias is None else bias[:dim])
        if below or right:
            q = F.pad(q, (0, 0, left, right, above, below))
        tall, wide = q.shape[1:3]
        q = windows_of(q, (window, window)).unflatten(-1, (heads, -1))
        size = (1, window, window)
        places = relative_bias(q, size, size, (None, self.rel_height, self.rel_width))
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k,
            v,
            attn_mask=places + table_bias(self.table, window).to(places.dtype),
            scale=self.scale,
        )
        mixed = merge_windows(mixed.transpose(1, 2).flatten(2), (window, window), (tall, wide))
        if below or right:
            mixed = mixed[:, above : above + height, left : left + width].contiguous()
        return self.out(mixed)
