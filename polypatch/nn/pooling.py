"""From tokens to one vector per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..tokens import Tokens
from .layers import Mlp

__all__ = ["AttentionPool", "ClassAndMean", "ClassToken", "MeanPool", "masked_mean"]


def masked_mean(tokens: Tokens) -> Float[Tensor, "batch dim"]:
    """Mean over the real placed tokens, each counted once."""
    if tokens.mask is None:
        return tokens.placed.mean(1)
    real = tokens.mask[:, tokens.prefix :, None].to(tokens.x.dtype)
    return (tokens.placed * real).sum(1) / real.sum(1).clamp_min(1)


class ClassToken(nn.Module):
    """The first token, then ``norm`` where the final norm stands behind the pooling (CLIP)."""

    def __init__(self, *, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.Identity()

    def forward(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        return self.norm(tokens.x[:, 0])


class MeanPool(nn.Module):
    """Mean of the placed tokens, then ``norm`` (in mean-pooled ViTs the final norm stands behind
    the pooling, not in front of it)."""

    def __init__(self, *, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.Identity()

    def forward(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        return self.norm(masked_mean(tokens))


class ClassAndMean(nn.Module):
    """Class token and mean of the placed tokens side by side (DINOv2's linear head)."""

    def forward(self, tokens: Tokens) -> Float[Tensor, "batch twice"]:
        return torch.cat([tokens.x[:, 0], masked_mean(tokens)], dim=1)


class AttentionPool(nn.Module):
    """A learned query attends over all tokens, then a residual MLP (multi-head attention pooling:
    Lee et al. 2019; Zhai et al. 2022). There is no norm in front of the attention and no residual
    around it; SigLIP's and big_vision's head are this one."""

    def __init__(self, *, dim: int, heads: int, hidden: int, activation=F.gelu, eps=1e-6) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim=dim, hidden=hidden, activation=activation)

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.query, std=self.query.shape[-1] ** -0.5)

    def forward(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        batch = tokens.batch
        q = self.q(self.query).expand(batch, -1, -1).unflatten(-1, (self.heads, -1))
        k, v = self.kv(tokens.x).unflatten(-1, (2, self.heads, -1)).unbind(2)
        pooled = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=tokens.key_bias(),
        )
        pooled = self.proj(pooled.transpose(1, 2).flatten(2))[:, 0]
        return pooled + self.mlp(self.norm(pooled))
