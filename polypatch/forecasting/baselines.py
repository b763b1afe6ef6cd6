"""What a forecaster has to beat: the last season again, a straight line on, and linear maps.

``seasonal-naive`` and ``drift`` are Hyndman & Athanasopoulos' (*Forecasting: Principles and
Practice*, sec. 5.2), without anything to learn. ``nlinear`` and ``dlinear`` are one linear map from
look-back to horizon, the same for all series or one for each (Zeng et al. 2023, "Are Transformers
Effective for Time Series Forecasting?", sec. 3.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError

__all__ = ["DLinear", "Drift", "NLinear", "SeasonalNaive", "moving_average"]


def moving_average(
    x: Float[Tensor, "batch time series"], width: int
) -> Float[Tensor, "batch time series"]:
    """Mean over ``width`` steps around each one; beyond the ends, the first and last value stand.

    Raises:
        PolypatchError: an even width, which has no middle.
    """
    if width < 1 or width % 2 == 0:
        raise PolypatchError(f"a moving average is over an odd number of steps, not {width}")
    side = (width - 1) // 2
    padded = F.pad(x.transpose(1, 2), (side, side), mode="replicate")
    return F.avg_pool1d(padded, width, stride=1).transpose(1, 2)


class SeasonalNaive(nn.Module):
    """The last season again and again. ``season`` of 1: the last value."""

    def __init__(self, *, lookback: int, horizon: int, season: int = 1) -> None:
        super().__init__()
        if not 1 <= season <= lookback:
            raise PolypatchError(
                f"a season of {season} steps needs a look-back as long, got {lookback}"
            )
        self.horizon, self.season = horizon, season

    def forward(
        self, x: Float[Tensor, "batch lookback series"]
    ) -> Float[Tensor, "batch horizon series"]:
        steps = torch.arange(self.horizon, device=x.device) % self.season
        return x[:, x.shape[1] - self.season + steps]


class Drift(nn.Module):
    """On along the line from the first to the last value of the look-back."""

    def __init__(self, *, lookback: int, horizon: int) -> None:
        super().__init__()
        if lookback < 2:
            raise PolypatchError(f"a line needs a look-back of 2 steps, got {lookback}")
        self.lookback, self.horizon = lookback, horizon

    def forward(
        self, x: Float[Tensor, "batch lookback series"]
    ) -> Float[Tensor, "batch horizon series"]:
        slope = (x[:, -1:] - x[:, :1]) / (x.shape[1] - 1)
        steps = torch.arange(1, self.horizon + 1, device=x.device, dtype=x.dtype)
        return x[:, -1:] + slope * steps[:, None]


class _Map(nn.Module):
    """A linear map along time, (batch, look-back, series) → (batch, horizon, series), shared by the
    series or one for each of them."""

    def __init__(self, *, lookback: int, horizon: int, series: int | None) -> None:
        super().__init__()
        several = () if series is None else (series,)
        self.weight = nn.Parameter(torch.empty(*several, horizon, lookback))
        self.bias = nn.Parameter(torch.empty(*several, horizon))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.ndim == 2:
            return F.linear(x.transpose(1, 2), self.weight, self.bias).transpose(1, 2)
        return torch.einsum("bls,shl->bhs", x, self.weight) + self.bias.t()

    def init_weights(self) -> None:
        """Uniform within ±1/√look-back, as any linear layer of torch."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)


class NLinear(nn.Module):
    """A linear map of the differences to the last value.

    Args:
        series: how many; needed where ``individual`` gives each a map of its own.
    """

    def __init__(
        self, *, lookback: int, horizon: int, series: int = 1, individual: bool = False
    ) -> None:
        super().__init__()
        self.map = _Map(lookback=lookback, horizon=horizon, series=series if individual else None)
        self.init_weights()

    def forward(
        self, x: Float[Tensor, "batch lookback series"]
    ) -> Float[Tensor, "batch horizon series"]:
        last = x[:, -1:]
        return self.map(x - last) + last

    def init_weights(self) -> None:
        self.map.init_weights()


class DLinear(nn.Module):
    """One linear map of the moving average, another of what is left of the series.

    Args:
        width: of the moving average, in steps.
    """

    def __init__(
        self,
        *,
        lookback: int,
        horizon: int,
        series: int = 1,
        individual: bool = False,
        width: int = 25,
    ) -> None:
        super().__init__()
        each = series if individual else None
        self.width = width
        self.trend = _Map(lookback=lookback, horizon=horizon, series=each)
        self.rest = _Map(lookback=lookback, horizon=horizon, series=each)
        self.init_weights()

    def forward(
        self, x: Float[Tensor, "batch lookback series"]
    ) -> Float[Tensor, "batch horizon series"]:
        trend = moving_average(x, self.width)
        return self.trend(trend) + self.rest(x - trend)

    def init_weights(self) -> None:
        self.trend.init_weights()
        self.rest.init_weights()
