"""Multi-head self-attention on fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .positions import rotate
from .projection import Linear

__all__ = ["Attention", "Mixed"]


class Mixed(NamedTuple):
    """What a mixing module returns: the mixed features and, where it has them, its keys, from
    which reducers measure similarity (a hook would not see them behind a fused kernel)."""

    x: Float[Tensor, "batch tokens dim"]
    keys: Float[Tensor, "batch heads tokens head_dim"] | None = None


class Attention(nn.Module):
    """Softmax attention with one projection for queries, keys and values.

    ``bias`` is added to the logits (padding as -inf, log sizes of merged tokens, relative
    positions); ``rotation`` turns queries and keys (RoPE). Everything runs through
    ``scaled_dot_product_attention``; :meth:`weights` gives the probabilities when one wants to
    look at them.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        qk_norm: Callable[[int], nn.Module] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if head_dim is None and dim % heads:
            raise ValueError(f"dim {dim} does not divide into {heads} heads")
        self.heads = heads
        self.head_dim = head_dim or dim // heads
        self.scale = self.head_dim**-0.5
        self.dropout = dropout
        self.qkv = Linear(dim, 3 * heads * self.head_dim, bias=qkv_bias)
        self.q_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = Linear(heads * self.head_dim, dim)

    def project(
        self, x: Float[Tensor, "batch tokens dim"], rotation: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values, each (batch, heads, tokens, head_dim); keys before rotation are
        not kept: what is returned is what attention compares."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q, k, v

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        bias: Float[Tensor, "#batch #heads #tokens tokens"] | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Mixed:
        q, k, v = self.project(x, rotation)
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
        )
        return Mixed(self.proj(mixed.transpose(1, 2).flatten(2)), k)

    @torch.no_grad()
    def weights(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        bias: Float[Tensor, "#batch #heads #tokens tokens"] | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """The attention probabilities, for looking at."""
        q, k, _ = self.project(x, rotation)
        logits = q @ k.transpose(-2, -1) * self.scale
        return (logits if bias is None else logits + bias).softmax(-1)
