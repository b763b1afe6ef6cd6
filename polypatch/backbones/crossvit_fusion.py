"""How CrossViT's branches exchange what they know (sec. 3.3 of arXiv 2103.14899).

Cross-attention is the method; the others are what the paper measures it against (table 6). The
equations stand in ``crossvit.py``. A fusion takes the tokens of all branches, (batch, 1 + rows ·
columns, dim) each, with their grids, and gives tokens of the same shapes. "The next branch" is the
other one of two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..nn import Attention, DropPath, Linear

__all__ = ["FUSIONS", "AllFusion", "ClassFusion", "CrossAttention", "CrossFusion"]

FUSIONS = ("cross", "all", "class", "pairwise", "none")
Grid = tuple[int, int]


class CrossAttention(nn.Module):
    """The class token's residual update from itself and the other branch's patch tokens, eq. 6, 7.

    Heads stand in for queries: each head's query is carried into the space of the normed tokens,
    where one fused attention with ``heads`` queries of width ``dim`` gives a mean of *tokens*.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        qkv_bias: bool,
        eps: float,
        scale: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5 if scale is None else scale
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.k = Linear(dim, dim, bias=qkv_bias)
        self.v = Linear(dim, dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.attention_dropout = attention_dropout
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(rate=drop_path)

    def forward(
        self,
        token: Float[Tensor, "batch 1 dim"],
        others: Float[Tensor, "batch patches dim"],
    ) -> Float[Tensor, "batch 1 dim"]:
        x = self.norm(torch.cat([token, others], dim=1))[:, None]  # batch, 1, 1 + patches, dim
        q = self.q(x[:, 0, 0]).unflatten(1, (self.heads, -1)).transpose(0, 1)
        lifted = q @ self.k.weight.unflatten(0, (self.heads, -1))  # heads, batch, dim
        bias = None
        if torch.is_grad_enabled() and self.k.bias is not None:
            # Cancels in the softmax; there so that every parameter has a gradient, if one of zero.
            bias = (q * self.k.bias.unflatten(0, (self.heads, 1, -1))).sum(-1) * self.scale
            bias = bias.transpose(0, 1)[:, None, :, None].expand(-1, -1, -1, x.shape[2])
        mean = F.scaled_dot_product_attention(
            lifted.transpose(0, 1)[:, None],
            x,
            x,
            attn_mask=bias,
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scale,
        )
        mixed = mean[:, 0].transpose(0, 1) @ self.v.weight.unflatten(0, (self.heads, -1)).mT
        mixed = mixed.transpose(0, 1).flatten(1)
        if self.v.bias is not None:  # the weights of the mean sum to 1
            mixed = mixed + self.v.bias
        update = self.dropout(self.proj(mixed))[:, None]
        return token + self.drop_path(update)


def project(dim: int, out: int, *, eps: float) -> nn.Sequential:
    """f and g: LN, GELU, linear (the GELU in front of the linear map, as in the authors' code)."""
    return nn.Sequential(nn.LayerNorm(dim, eps=eps), nn.GELU(), Linear(dim, out))


class CrossFusion(nn.Module):
    """Each branch's class token reads the patches of the next branch (fig. 4, eq. 5 to 7).

    Args:
        attentions: per branch, those in a row.
        reread: all of a row read the other branch's patches, not only the first.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int],
        attentions: Sequence[Sequence[CrossAttention]],
        eps: float,
        reread: bool = False,
    ) -> None:
        super().__init__()
        others = [*dims[1:], dims[0]]
        self.reread = reread
        self.outward = nn.ModuleList(project(d, o, eps=eps) for d, o in zip(dims, others))
        self.attentions = nn.ModuleList(nn.ModuleList(row) for row in attentions)
        self.back = nn.ModuleList(project(o, d, eps=eps) for d, o in zip(dims, others))

    def forward(self, branches: list[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        fused = []
        for i, x in enumerate(branches):
            others = branches[(i + 1) % len(branches)][:, 1:]
            token = self.outward[i](x[:, :1])
            for number, attention in enumerate(self.attentions[i]):  # type: ignore[arg-type]
                token = attention(token, others if self.reread or not number else others[:, :0])
            fused.append(self.back[i](token))
        return [replaced(x, token) for x, token in zip(branches, fused)]


def replaced(
    x: Float[Tensor, "batch tokens dim"], token: Float[Tensor, "batch 1 dim"]
) -> Float[Tensor, "batch tokens dim"]:
    """x with another class token; in place without gradients, as nobody reads a branch's tokens any
    more once all are fused."""
    if torch.is_grad_enabled():
        return torch.cat([token, x[:, 1:]], dim=1)
    x[:, :1] = token
    return x


class SharedWidth(nn.Module):
    """Base of the simple fusions: f and g between each branch's width and the last branch's."""

    def __init__(self, *, dims: Sequence[int], eps: float) -> None:
        super().__init__()
        width = dims[-1]

        def aligned(dim: int, out: int) -> nn.Module:
            return nn.Identity() if dim == out else project(dim, out, eps=eps)

        self.outward = nn.ModuleList(aligned(d, width) for d in dims)
        self.back = nn.ModuleList(aligned(width, d) for d in dims)


class AllFusion(SharedWidth):
    """Self-attention over the tokens of all branches, eq. 2: quadratic in their number."""

    def __init__(self, *, dims: Sequence[int], heads: int, qkv_bias: bool, eps: float) -> None:
        super().__init__(dims=dims, eps=eps)
        self.norm = nn.LayerNorm(dims[-1], eps=eps)
        self.attention = Attention(dim=dims[-1], heads=heads, qkv_bias=qkv_bias)

    def forward(self, branches: list[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        y = torch.cat([f(x) for f, x in zip(self.outward, branches)], dim=1)
        y = y + self.attention(self.norm(y)).x
        parts = y.split([x.shape[1] for x in branches], dim=1)
        return [g(part) for g, part in zip(self.back, parts)]


class ClassFusion(SharedWidth):
    """The class tokens' sum, eq. 3; ``pairwise``: patch tokens at the same place, too, eq. 4, those
    of other branches interpolated bilinearly to the branch's own grid."""

    def __init__(self, *, dims: Sequence[int], eps: float, pairwise: bool = False) -> None:
        super().__init__(dims=dims, eps=eps)
        self.pairwise = pairwise

    def forward(self, branches: list[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        if not self.pairwise:
            tokens = [f(x[:, :1]) for f, x in zip(self.outward, branches)]
            token = torch.stack(tokens).sum(0)
            return [replaced(x, g(token)) for g, x in zip(self.back, branches)]
        lifted = [f(x) for f, x in zip(self.outward, branches)]
        maps = [x[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2) for x, grid in zip(lifted, grids)]
        token = torch.stack([x[:, :1] for x in lifted]).sum(0)
        fused = []
        for g, grid in zip(self.back, grids):
            patches = torch.stack([resized(map, grid) for map in maps]).sum(0)
            fused.append(g(torch.cat([token, patches.flatten(2).transpose(1, 2)], dim=1)))
        return fused


def resized(
    map: Float[Tensor, "batch dim rows columns"], grid: Grid
) -> Float[Tensor, "batch dim rows2 columns2"]:
    """Bilinear, where the map isn't of this grid already."""
    return map if map.shape[-2:] == grid else F.interpolate(map, size=grid, mode="bilinear")
