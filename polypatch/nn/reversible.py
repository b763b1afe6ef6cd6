"""Reversible instance normalisation: each window on its own scale, and the forecast back on it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Moments", "ReversibleNorm"]


class Moments(NamedTuple):
    """What was taken out of each window, (batch, 1, series) both."""

    centre: Tensor
    scale: Tensor


class ReversibleNorm(nn.Module):
    """RevIN (Kim et al. 2022, "Reversible Instance Normalization for Accurate Time-Series
    Forecasting against Distribution Shift").

    Window and series by themselves: minus their mean, divided by their deviation (biased variance,
    ``eps`` added), then an affine map of each series if wanted. No gradient passes through mean and
    deviation. What was taken out is returned, not kept: the module has no memory between calls.

    Args:
        series: how many; only the affine map has a weight for each.
        affine: learn a gain and an offset for each series.
        subtract_last: take out the last value in place of the mean.
    """

    def __init__(
        self, *, series: int, affine: bool = False, subtract_last: bool = False, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.subtract_last, self.eps = subtract_last, eps
        self.weight = nn.Parameter(torch.ones(series)) if affine else None
        self.bias = nn.Parameter(torch.zeros(series)) if affine else None

    def forward(
        self, x: Float[Tensor, "batch time series"]
    ) -> tuple[Float[Tensor, "batch time series"], Moments]:
        with torch.no_grad():
            variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
            centre = x[:, -1:] if self.subtract_last else mean
            scale = (variance + self.eps).sqrt()
        x = (x - centre) / scale
        if self.weight is not None and self.bias is not None:
            x = x * self.weight + self.bias
        return x, Moments(centre, scale)

    def inverse(
        self, y: Float[Tensor, "batch time series"], moments: Moments
    ) -> Float[Tensor, "batch time series"]:
        """Back to the scale that the window had."""
        if self.weight is not None and self.bias is not None:
            y = (y - self.bias) / (self.weight + self.eps**2)  # a gain of 0 divides by 1e-10
        return y * moments.scale + moments.centre

    def init_weights(self) -> None:
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)
