"""Scores of a forecaster, and its intervals, on windows of series."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..data.windows import Windows
from ..forecasting.intervals import LEVELS, conformal_offsets

__all__ = ["ForecastScores", "calibrate", "score"]


@dataclass(frozen=True)
class ForecastScores:
    """Mean squared and mean absolute error on standardised values, as the papers report them."""

    mse: float
    mae: float
    windows: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def score(model: nn.Module, windows: Windows, *, batch: int = 256) -> ForecastScores:
    """Over all windows, all steps and all series that were observed; the last, smaller batch
    included. In eval mode; the mode is restored."""
    squared = absolute = torch.zeros((), dtype=torch.float64)
    count = 0
    for forecast, truth in _forecasts(model, windows, batch):
        error = (forecast - truth)[truth.isfinite()].double()
        squared = squared + error.square().sum().cpu()
        absolute = absolute + error.abs().sum().cpu()
        count += error.numel()
    return ForecastScores(
        mse=float(squared) / max(count, 1),
        mae=float(absolute) / max(count, 1),
        windows=len(windows),
    )


@torch.no_grad()
def calibrate(
    model: nn.Module, windows: Windows, *, levels: Sequence[float] = LEVELS, batch: int = 256
) -> Float[Tensor, "levels horizon series"]:
    """What to add to forecasts for each quantile, from errors on these windows (see
    :func:`~polypatch.forecasting.intervals.conformal_offsets`)."""
    errors = [(truth - forecast).cpu() for forecast, truth in _forecasts(model, windows, batch)]
    return conformal_offsets(torch.cat(errors), levels)


def _forecasts(model: nn.Module, windows: Windows, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    training = model.training
    model.eval()
    try:
        for indices in torch.arange(len(windows)).split(batch):
            past, truth = windows.read(indices)
            yield model(past.to(device)).float(), truth.to(device)
    finally:
        model.train(training)
