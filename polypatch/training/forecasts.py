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

    def scores(self) -> dict[str, float]:
        """For the log."""
        return {"test_mse": self.mse, "test_mae": self.mae}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def score(
    model: nn.Module, windows: Windows, *, batch: int = 256, accelerator: Any = None
) -> ForecastScores:
    """Over all windows, all steps and all series that were observed; the last, smaller batch
    included. In eval mode; the mode is restored. With ``accelerator``, processes share the work and
    all get the result."""
    rank = accelerator.process_index if accelerator else 0
    world = accelerator.num_processes if accelerator else 1
    device = _device_of(model)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for forecast, truth in _forecasts(model, windows, batch, rank=rank, world=world):
        error = (forecast - truth)[truth.isfinite()].double()
        sums += torch.stack([error.square().sum(), error.abs().sum(), error.new_tensor(len(error))])
    if accelerator is not None:
        sums = accelerator.reduce(sums, reduction="sum")
    squared, absolute, count = sums.tolist()
    return ForecastScores(
        mse=squared / max(count, 1),
        mae=absolute / max(count, 1),
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


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)  # the simplest baselines have none
    return torch.device("cpu") if parameter is None else parameter.device


def _forecasts(
    model: nn.Module, windows: Windows, batch: int, *, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    device, training = _device_of(model), model.training
    model.eval()
    try:
        for indices in torch.arange(len(windows)).split(batch)[rank::world]:
            past, truth = windows.read(indices)
            yield model(past.to(device)).float(), truth.to(device)
    finally:
        model.train(training)
