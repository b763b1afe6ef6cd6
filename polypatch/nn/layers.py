"""Norms, MLPs and residual helpers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from . import fresh
from .projection import Linear

__all__ = [
    "DropPath",
    "LayerNorm2d",
    "LayerScale",
    "Mlp",
    "SwiGlu",
    "init_transformer_weights",
    "quick_gelu",
]


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of a map (batch, channels, height, width)."""

    def forward(self, input: Float[Tensor, "batch channels height width"]) -> Tensor:
        x = input.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    """Per-channel gain on a residual branch (CaiT, Touvron et al. 2021, eq. 4)."""

    def __init__(self, *, dim: int, init: float = 1e-5) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for whole samples with probability ``rate``, and
    scale the kept ones by 1 / (1 - rate) (Huang et al. 2016, in timm's rescaled form)."""

    def __init__(self, *, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"a drop-path rate lies in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Float[Tensor, "batch *rest"]) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * x.new_empty(shape).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class Mlp(nn.Module):
    """Linear, activation, linear: the transformer's feed-forward network."""

    def __init__(
        self,
        *,
        dim: int,
        hidden: int,
        out: int | None = None,
        activation: Callable[[Tensor], Tensor] = fresh.gelu,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim if out is None else out)
        self.activation = activation
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch out"]:
        x = self.fc1(x, self.activation)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return self.fc2(x)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), OpenAI CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


class SwiGlu(nn.Module):
    """Gated feed-forward network: fc2(silu(a) * b) with [a | b] = fc1(x) (Shazeer 2020, eq. 6)."""

    def __init__(self, *, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 2 * hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


def init_transformer_weights(module: nn.Module, *, std: float = 0.02) -> None:
    """ViT's initialisation, in place, for every linear layer and norm below ``module``.

    | layer          | weight                              | bias |
    |----------------|-------------------------------------|------|
    | Linear         | normal, std 0.02, cut at 2 std      | 0    |
    | LayerNorm      | 1                                   | 0    |
    | LayerScale     | its ``init``                        |      |
    | Conv2d (patch) | normal, std 1/sqrt(fan in), cut     | 0    |
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Conv2d):
            fan_in = layer.weight[0].numel()
            nn.init.trunc_normal_(layer.weight, std=fan_in**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            if layer.weight is not None:
                nn.init.ones_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, LayerScale):
            nn.init.constant_(layer.gamma, layer.init)
