"""From series to forecasts: models beside simple baselines, the best of them, and how sure it is.

What is taken is decided on the validation part; the test part then tells, untouched until there,
how far off it is, and how much its intervals cover.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .compare import trained
from .data.series import Series
from .data.windows import ForecastData, split_series
from .errors import PolypatchError
from .forecasters import create_forecaster
from .forecasting.intervals import LEVELS, check_levels, coverage, tellable
from .training.budget import Budget
from .training.forecasts import ForecastScores, calibrate, score
from .training.loop import Progress, train
from .training.recipe import Recipe
from .training.runs import Run, RunConfig

__all__ = ["BASELINES", "MODELS", "RECIPE", "Candidate", "Forecasts", "forecast", "usual_lookback"]

#: what stands beside every model
BASELINES = ("seasonal-naive", "drift")
#: what is trained where nothing is named
MODELS = ("nlinear", "dlinear")
RECIPE = Recipe(
    batch=64, lr=2e-3, weight_decay=0.0, smoothing=0.0, augment="none", warmup=0.05, patience=5
)


@dataclass(frozen=True)
class Candidate:
    """A model and how well it forecasts."""

    spec: str
    run: Run
    val: ForecastScores
    test: ForecastScores
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Forecasts:
    """What :func:`forecast` found.

    ``table`` has a row for each step and series: time, series, forecast and a column for each
    quantile, in the units of the data. ``covered`` is the share of the test part inside of the
    interval of the outermost two quantiles; None without quantiles. ``candidates`` stand in the
    order of their validation error; the first made the forecasts.
    """

    data: ForecastData
    history: Series
    candidates: tuple[Candidate, ...]
    table: pd.DataFrame
    levels: tuple[float, ...]
    covered: float | None
    sentence: str
    notes: tuple[str, ...]


def usual_lookback(steps: int, *, horizon: int, season: int) -> int:
    """Twice the longer of horizon and season, as far as it leaves the training part as many windows
    as a look-back has steps."""
    train_steps = int(steps * 0.7)
    return max(2, min(2 * max(horizon, season), (train_steps - horizon) // 2))


def forecast(
    series: Series,
    *,
    horizon: int,
    lookback: int | None = None,
    models: Sequence[str] = MODELS,
    levels: Sequence[float] = LEVELS,
    budget: str = "50epochs",
    recipe: Recipe = RECIPE,
    seed: int = 0,
    root: Path = Path("runs"),
    device: str | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> Forecasts:
    """Train models and baselines on series, and forecast what follows them.

    Args:
        horizon: steps to forecast.
        lookback: steps that models see; default: :func:`usual_lookback`.
        models: specs of forecasters (see ``forecasters.py``); the baselines come by themselves.
        levels: quantiles beside the forecast; left out, with a note, where the validation part has
            too few windows to tell them.
        budget: of each training, which ends earlier where validation stops improving.
        root: where runs are kept and found again.
        progress: given a spec, what the training calls as it goes.

    Raises:
        PolypatchError: before any training, for anything wrong with sizes or specs.
    """
    from .data.calendar import season_of

    Budget.parse(budget)
    check_levels(levels)
    season, notes = season_of(series.index), []
    if horizon < 1:
        raise PolypatchError(f"a horizon is at least 1 step, got {horizon}")
    if lookback is None:
        lookback = usual_lookback(len(series.values), horizon=horizon, season=season)
    data = split_series(series, lookback=lookback, horizon=horizon)
    if season > lookback:
        notes.append(f"a season of {season} steps doesn't fit a look-back of {lookback}: the last "
                     "value is repeated in its place")  # fmt: skip
        season = 1
    specs = list(dict.fromkeys((*models, *BASELINES)))
    configs = [_config(spec, data, season, budget, recipe, seed) for spec in specs]
    for config in configs:  # everything that can be wrong with a spec shows here
        model = _build(config)
        with torch.no_grad():
            model.eval()(torch.zeros(1, lookback, len(series.columns)))
    candidates = []
    for config in configs:
        watch = progress(config.spec) if progress is not None else None
        run = train(config, data, root=root, device=device, progress=watch)
        if watch is not None and run.result is not None:  # it may have ended early
            steps = max(1, run.result["steps"])
            watch(steps, steps, float("nan"), 0.0)
        candidates.append(_scored(run, data))
    candidates.sort(key=lambda candidate: candidate.val.mse)
    best = trained(candidates[0].run)
    told = tuple(q for q in levels if tellable(q, len(data.val)))
    if len(told) < len(levels):
        lost = ", ".join(f"{q:g}" for q in levels if q not in told)
        notes.append(f"{len(data.val)} windows of validation can't tell the quantiles {lost}")
    offsets = calibrate(best, data.val, levels=told) if told else None
    return Forecasts(
        data=data,
        history=series,
        candidates=tuple(candidates),
        table=_table(best, data, offsets, told),
        levels=told,
        covered=None if offsets is None else _covered(best, data, offsets),
        sentence=_sentence(candidates),
        notes=(*data.notes, *notes),
    )


def _config(
    spec: str, data: ForecastData, season: int, budget: str, recipe: Recipe, seed: int
) -> RunConfig:
    return RunConfig(
        spec=spec,
        data=data.name,
        data_fingerprint=data.fingerprint,
        resolution=0,
        classes=0,
        seed=seed,
        budget=budget,
        recipe=recipe,
        task="forecast",
        lookback=data.lookback,
        horizon=data.horizon,
        series=len(data.columns),
        season=season,
        protocol=data.protocol,
    )


def _build(config: RunConfig) -> nn.Module:
    return create_forecaster(
        config.spec,
        lookback=config.lookback,
        horizon=config.horizon,
        series=config.series,
        season=config.season,
        seed=config.seed,
    )


def _scored(run: Run, data: ForecastData) -> Candidate:
    result = run.result
    assert result is not None  # of a finished run
    return Candidate(
        spec=run.config.spec,
        run=run,
        val=score(trained(run), data.val),
        test=ForecastScores(result["mse"], result["mae"], result["windows"]),
        parameters=result["parameters"],
        seconds=result["seconds"],
    )


@torch.no_grad()
def _covered(model: nn.Module, data: ForecastData, offsets: Tensor) -> float:
    past, truth = data.test.read(torch.arange(len(data.test)))
    made = torch.cat([model(part) for part in past.split(256)])
    return coverage(truth, made + offsets[0], made + offsets[-1])


@torch.no_grad()
def _table(
    model: nn.Module, data: ForecastData, offsets: Tensor | None, levels: Sequence[float]
) -> pd.DataFrame:
    made = model(data.test.values[None, -data.lookback :])[0]
    scale, centre = data.std, data.mean
    columns = {"forecast": made * scale + centre}
    if offsets is not None:
        for level, offset in zip(levels, offsets):
            columns[f"q{level:g}"] = (made + offset) * scale + centre
    times = _future(data.index, data.horizon)
    return pd.DataFrame(
        {
            "time": np.repeat(times.to_numpy(), len(data.columns)),
            "series": np.tile(np.array(data.columns, dtype=object), data.horizon),
            **{name: value.flatten().numpy().astype(np.float64) for name, value in columns.items()},
        }
    )


def _future(index: pd.Index, horizon: int) -> pd.Index:
    """The steps behind the last one."""
    if isinstance(index, pd.DatetimeIndex):
        return pd.date_range(index[-1], periods=horizon + 1, freq=index.freq)[1:]
    return pd.RangeIndex(index[-1] + 1, index[-1] + 1 + horizon)


def _sentence(candidates: Sequence[Candidate]) -> str:
    """Which one was taken, and how it does on the test part beside the best baseline."""
    best = candidates[0]
    base = next(c for c in candidates if c.spec in BASELINES)
    if best is base:
        others = ", ".join(c.spec for c in candidates if c.spec not in BASELINES)
        return (
            f"Nothing beat {base.spec} on the validation part, not {others}; it makes the forecast."
        )
    gain = 100 * (1 - best.test.mse / base.test.mse)
    word = f"{gain:.0f} % below" if gain >= 0 else f"{-gain:.0f} % above"
    return (
        f"{best.spec} makes the forecast: on the test part its squared error is {word} that of "
        f"{base.spec}, the better baseline."
    )
