"""XCiT's parts: attention between channels, class attention, local exchange, their blocks.

The paper, its equations and its traps stand in :mod:`.xcit`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError
from ..nn import DropPath, Linear, Mlp, fresh

__all__ = [
    "EPS",
    "Block",
    "ClassBlock",
    "Position",
    "Pyramid",
    "class_attention",
    "cross_covariance",
    "fourier_code",
]

#: of every layer norm
EPS = 1e-6
#: sines and cosines an axis, of the code of the place
WAVES = 32


# ---- attention -----------------------------------------------------------------------------------


def cross_covariance(
    fresh: Float[Tensor, "2 batch heads tokens head_dim"], temperature: Float[Tensor, "heads 1 1"]
) -> Float[Tensor, "batch heads head_dim head_dim"]:
    """Of queries and keys, stacked, in memory that nobody else reads: the cosine, over the tokens,
    of each channel of the queries (rows) with each of the keys, times the temperature; softmax over
    the keys' channels (sec. 3.2, transposed)."""
    if fresh.dtype == torch.float16:  # a sum over many tokens would overflow
        fresh = F.normalize(fresh, dim=-2)
    q, k = fresh
    product = q.transpose(-2, -1) @ k
    squares = fresh.square() if torch.is_grad_enabled() else fresh.square_()
    # As F.normalize: below a length of 1e-12 nothing is scaled up, and the gradient is 0.
    q, k = squares.sum(-2, dtype=torch.float32).clamp_min(1e-24).rsqrt().to(fresh.dtype)
    # Batch and heads as one axis: the temperature's strides would make the heads the innermost axis
    # of compiled graphs.
    scale = (k * temperature[..., 0]).flatten(0, 1)[:, None]
    logits = product.flatten(0, 1) * q.flatten(0, 1)[..., None] * scale
    return logits.softmax(-1).unflatten(0, product.shape[:2])


def class_attention(
    x: Float[Tensor, "batch tokens dim"],
    weight: Float[Tensor, "three_dims dim"],
    bias: Float[Tensor, " three_dims"] | None,
    *,
    heads: int,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "batch dim"]:
    """What the first token gathers from all tokens, itself included, before the output projection.

    ``weight`` and ``bias`` project to queries, keys and values, stacked. The keys' bias adds the
    same to every logit and is left out. ``dropout`` acts on the attention weights.
    """
    to_q, to_k, to_v = weight.unflatten(0, (3, heads, -1)).unbind(0)
    q_bias, _, v_bias = (0.0,) * 3 if bias is None else bias.unflatten(0, (3, heads, -1))
    q = torch.einsum("bc,hdc->bhd", x[:, 0], to_q) + q_bias
    logits = torch.einsum("bhd,hdc->bhc", q, to_k) @ x.transpose(1, 2) * scale
    shares = F.dropout(logits.softmax(-1), dropout)
    gathered = torch.einsum("bhc,hdc->bhd", shares @ x, to_v)
    # Under dropout the shares don't sum to 1.
    return (gathered + shares.sum(-1, keepdim=True) * v_bias).flatten(1)


# ---- the code of the place -----------------------------------------------------------------------


def fourier_code(cells: int, *, device: torch.device | None = None) -> Float[Tensor, "cells waves"]:
    """Of the places 1 … ``cells`` along an axis that is 2π long, whatever their number: 32
    interleaved sines and cosines with wave numbers from 1 down to 1/10000."""
    place = torch.arange(1, cells + 1, device=device, dtype=torch.float32)
    place = place / (cells + 1e-6) * (2 * math.pi)
    step = torch.arange(WAVES // 2, device=device, dtype=torch.float32) * (2 / WAVES)
    angle = place[:, None] / 10000.0**step
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class Position(nn.Module):
    """Fourier codes of row and column, side by side, through one linear map."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.proj = Linear(2 * WAVES, dim)

    def forward(self, height: int, width: int) -> Float[Tensor, "{height} {width} dim"]:
        weight = self.proj.weight
        row, column = (
            fourier_code(cells, device=weight.device).to(weight.dtype) for cells in (height, width)
        )
        codes = [row[:, None].expand(-1, width, -1), column.expand(height, -1, -1)]
        # One product of all places. The sum of two, of rows and of columns, would be less work, but
        # compilers then take its odd layout for all tokens of the network.
        return self.proj(torch.cat(codes, dim=-1))


# ---- modules -------------------------------------------------------------------------------------


def batch_normed(norm: nn.Module, x: Float[Tensor, "batch dim height width"]) -> Tensor:
    """Batch norm of a map that nobody else reads, in its memory where nothing is learned."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.training or torch.is_grad_enabled():
        return norm(x)
    return fresh.affine(x.permute(0, 2, 3, 1), *fresh.affine_of(norm)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Cross-covariance attention, XCA: (batch, height, width, dim) in and out."""

    def __init__(
        self, *, dim: int, heads: int, qkv_bias: bool, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.attention_dropout = heads, dropout, attention_dropout
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.proj = Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Tensor:
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.heads, -1))
        qk = qkv[:, :, :2].permute(2, 0, 3, 1, 4).contiguous()
        shares = cross_covariance(qk, self.temperature)
        shares = F.dropout(shares, self.attention_dropout, self.training)
        v, dim = qkv[:, :, 2], x.shape[-1]
        if v.shape[1] > 2 * dim:
            # With the projection it is one matrix an image: cheaper for many tokens, no copies.
            merged = shares.transpose(-2, -1) @ self.proj.weight.t().unflatten(0, (self.heads, -1))
            mixed = torch.baddbmm(self.proj.bias, v.flatten(2), merged.flatten(1, 2))
        else:
            mixed = v.transpose(1, 2) @ shares.transpose(-2, -1)
            mixed = self.proj(mixed.transpose(1, 2).flatten(2))
        mixed = mixed.unflatten(1, x.shape[1:3])
        return F.dropout(mixed, self.dropout, self.training)


class Local(nn.Module):
    """Local patch interaction, LPI: two depthwise convolutions; the norm is between them."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Tensor:
        x = fresh.gelu(self.conv1(x.permute(0, 3, 1, 2)))
        return self.conv2(batch_normed(self.norm, x)).permute(0, 2, 3, 1)


class FeedForward(Mlp):
    """The MLP with dropout behind both layers."""

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch out"]:
        return F.dropout(super().forward(x), self.dropout, self.training)


class Block(nn.Module):
    """XCA, LPI and MLP, each normed, scaled and added; (batch, height, width, dim) in and out."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        hidden: int,
        qkv_bias: bool,
        dropout: float,
        attention_dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim, eps=EPS)
        self.attention = Attention(
            dim=dim,
            heads=heads,
            qkv_bias=qkv_bias,
            dropout=dropout,
            attention_dropout=attention_dropout,
        )
        self.gain_attention = nn.Parameter(torch.ones(dim))
        self.norm_local = nn.LayerNorm(dim, eps=EPS)
        self.local = Local(dim=dim)
        self.gain_local = nn.Parameter(torch.ones(dim))
        self.norm_mlp = nn.LayerNorm(dim, eps=EPS)
        self.mlp = FeedForward(dim=dim, hidden=hidden, activation=fresh.gelu, dropout=dropout)
        self.gain_mlp = nn.Parameter(torch.ones(dim))
        self.drop_path = DropPath(rate=drop_path)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Tensor:
        x = self._add(x, self.attention(self.norm_attention(x)), self.gain_attention)
        x = self._add(x, self.local(self.norm_local(x)), self.gain_local)
        return self._add(x, self.mlp(self.norm_mlp(x)), self.gain_mlp)

    def _add(self, x: Tensor, branch: Tensor, gain: Tensor) -> Tensor:
        if self.drop_path.rate and self.drop_path.training:
            return x + self.drop_path(branch * gain)
        return fresh.add_scaled(x, branch, gain)


class ClassBlock(nn.Module):
    """Class attention and an MLP for the class token, which stands first; (batch, tokens, dim) in
    and out, or (batch, 1, dim) out if ``last``."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        hidden: int,
        qkv_bias: bool,
        scale: float | None,
        tokens_norm: bool,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.heads, self.tokens_norm = heads, tokens_norm
        self.scale = scale or (dim // heads) ** -0.5
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.gain1 = nn.Parameter(torch.ones(dim))
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = FeedForward(dim=dim, hidden=hidden, activation=fresh.gelu, dropout=dropout)
        self.gain2 = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "batch tokens dim"], last: bool) -> Tensor:
        normed = self.norm1(x)
        gathered = class_attention(
            normed,
            self.qkv.weight,
            self.qkv.bias,
            heads=self.heads,
            scale=self.scale,
            dropout=self.attention_dropout if self.training else 0.0,
        )
        gathered = F.dropout(self.proj(gathered[:, None]), self.dropout, self.training)
        token = self.norm2(x[:, :1] + gathered * self.gain1)
        token = token + self.mlp(token) * self.gain2
        if last:
            return token
        patches = x[:, 1:] + normed[:, 1:] * self.gain1
        if self.tokens_norm:
            patches = self.norm2(patches)
        return torch.cat([token, patches * 2], dim=1)


class Pyramid(nn.Module):
    """Maps of one stride made maps of strides 4, 8, 16 and 32, for detectors and segmenters
    (sec. 4): transposed convolutions of stride 2 upwards, max pooling downwards."""

    def __init__(self, *, dim: int, patch: int) -> None:
        super().__init__()

        def up() -> nn.Module:
            return nn.ConvTranspose2d(dim, dim, 2, stride=2)

        levels: list[nn.Module]
        if patch == 16:
            finest = nn.Sequential(up(), nn.BatchNorm2d(dim), nn.GELU(), up())
            levels = [finest, nn.Sequential(up()), nn.Identity(), nn.MaxPool2d(2)]
        elif patch == 8:
            levels = [nn.Sequential(up()), nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4)]
        else:
            raise PolypatchError(f"a pyramid is defined for patches of 8 and 16, not {patch}")
        self.levels = nn.ModuleList(levels)

    def forward(
        self, maps: list[Tensor], size: tuple[int, int]
    ) -> list[Float[Tensor, "batch dim _ _"]]:
        """``size``: of the image. Where a side is no multiple of the patch, what the finer levels
        have beyond the image is cut off."""
        made = []
        for level, x, stride in zip(self.levels, maps, (4, 8, 16, 32)):
            made.append(level(x)[..., : -(-size[0] // stride), : -(-size[1] // stride)])
        return made
