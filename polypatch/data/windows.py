"""What forecasters learn from: a look-back and the steps behind it, cut out of regular series.

Splits lie in the order of time. Values are standardised by the mean and deviation of the training
part alone; a test window may look back into the part before its own, never forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..errors import PolypatchError, suggest
from .calendar import season_of
from .series import Series

__all__ = ["PROTOCOLS", "ForecastData", "Windows", "filled", "split_series"]

_MONTH = 30 * 24  # of hours, as the papers count it
#: name → steps in the training, validation and test part; None: 70, 10 and 20 per cent
PROTOCOLS: dict[str, tuple[int, int, int] | None] = {
    "ratio": None,
    "ett-hour": (12 * _MONTH, 4 * _MONTH, 4 * _MONTH),
    "ett-minute": (12 * _MONTH * 4, 4 * _MONTH * 4, 4 * _MONTH * 4),
}


@dataclass(frozen=True)
class Windows:
    """All windows whose forecast lies within one part: random access, and pure.

    ``values`` (time, series) are standardised; ``observed`` says which were not filled in. A window
    is ``lookback`` steps and the ``horizon`` steps behind them.
    """

    values: Float[Tensor, "time series"]
    observed: Bool[Tensor, "time series"]
    lookback: int
    horizon: int

    def __len__(self) -> int:
        return max(0, len(self.values) - self.lookback - self.horizon + 1)

    def read(
        self, indices: Int64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch lookback series"], Float[Tensor, "batch horizon series"]]:
        """Look-backs and what follows them, NaN where nothing was observed to compare with.

        Raises:
            IndexError: an index below 0 or past the last window.
        """
        if ((indices < 0) | (indices >= len(self))).any():
            raise IndexError(f"windows are numbered 0 to {len(self) - 1}")
        steps = indices[:, None] + torch.arange(self.lookback + self.horizon)
        past, future = steps[:, : self.lookback], steps[:, self.lookback :]
        return self.values[past], self.values[future].masked_fill(~self.observed[future], torch.nan)


@dataclass(frozen=True)
class ForecastData:
    """Series to forecast, split in the order of time.

    ``mean`` and ``std``, (series,), are of the training part; a deviation of 0 counts as 1.
    ``season`` is the number of steps that a seasonal baseline goes back.
    """

    name: str
    fingerprint: str
    columns: tuple[str, ...]
    index: pd.Index
    train: Windows
    val: Windows
    test: Windows
    mean: Float[Tensor, " series"]
    std: Float[Tensor, " series"]
    lookback: int
    horizon: int
    season: int
    protocol: str
    notes: tuple[str, ...] = field(default=())
    endless: bool = False
    task: str = "forecast"


def split_series(
    series: Series, *, lookback: int, horizon: int, protocol: str = "ratio"
) -> ForecastData:
    """Training, validation and test windows of series.

    Args:
        lookback, horizon: steps that a forecaster sees, and that it forecasts.
        protocol: ``ratio``: 70, 10 and 20 per cent of the steps. ``ett-hour``: 12, 4 and 4 months
            of 30 days from the start, whatever comes later left alone, as in the papers on
            ETTh1 and ETTh2; ``ett-minute`` the same at 15 minutes.

    Raises:
        PolypatchError: an unknown protocol, or series too short for one window in each part.
    """
    if lookback < 1 or horizon < 1:
        raise PolypatchError(
            f"look-back and horizon are at least 1 step, got {lookback} and {horizon}"
        )
    if protocol not in PROTOCOLS:
        raise PolypatchError(f"there is no protocol {protocol!r}{suggest(protocol, PROTOCOLS)}")
    steps = len(series.values)
    parts = PROTOCOLS[protocol]
    if parts is None:
        train, test = int(steps * 0.7), int(steps * 0.2)
        parts = (train, steps - train - test, test)
    if sum(parts) > steps:
        raise PolypatchError(
            f"{series.name} has {steps} steps; the protocol {protocol} needs {sum(parts)}"
        )
    needed = {"training": lookback + horizon, "validation": horizon, "test": horizon}
    for (part, least), have in zip(needed.items(), parts):
        if have < least:
            raise PolypatchError(
                f"{series.name} has {steps} steps, so {have} for {part}, where a look-back of "
                f"{lookback} and a horizon of {horizon} need {least}; shorten one of them"
            )
    values, notes = filled(series)
    borders = np.cumsum((0, *parts))
    known = values[: borders[1]]
    mean, std = known.mean(0), known.std(0)
    std = np.where(std == 0, 1.0, std)
    scaled = torch.from_numpy(((values - mean) / std).astype(np.float32))
    observed = torch.from_numpy(~np.isnan(series.values))

    def windows(part: int) -> Windows:
        first = borders[part] - (lookback if part else 0)
        place = slice(max(0, first), borders[part + 1])
        return Windows(scaled[place], observed[place], lookback, horizon)

    return ForecastData(
        name=series.name,
        fingerprint=series.fingerprint,
        columns=series.columns,
        index=series.index,
        train=windows(0),
        val=windows(1),
        test=windows(2),
        mean=torch.from_numpy(mean).float(),
        std=torch.from_numpy(std).float(),
        lookback=lookback,
        horizon=horizon,
        season=season_of(series.index),
        protocol=protocol,
        notes=series.notes + notes,
    )


def filled(series: Series) -> tuple[np.ndarray, tuple[str, ...]]:
    """Values without gaps, (time, series), and a word on what was done: a missing value is the last
    one before it, at the start the first one. A line towards the next value would tell a look-back
    that ends in a gap about its future. Scores never count what was filled in."""
    values = series.values
    missing = int(np.isnan(values).sum())
    if not missing:
        return values, ()
    word = f"{missing} missing values are filled with the last one before, and not scored"
    return pd.DataFrame(values).ffill().bfill().to_numpy(), (word,)
