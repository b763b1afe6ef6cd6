"""The report of forecasts: one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.calendar import step_in_words
from .plots import new_figure, to_svg

if TYPE_CHECKING:
    from ..forecast import Forecasts

__all__ = ["plot_series", "render_forecast", "write_forecast_report"]

#: series that are drawn; all are in the table
_DRAWN = 12


def write_forecast_report(found: Forecasts, folder: Path, *, command: str = "") -> Path:
    """Write ``index.html`` into ``folder``; return its path."""
    from ..training.runs import write_file

    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    write_file(page, render_forecast(found, command=command).encode())
    return page


def render_forecast(found: Forecasts, *, command: str = "") -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader

    data = found.data
    interval = "There are no intervals: too few windows to measure errors on."
    if found.covered is not None:
        share = 100 * (found.levels[-1] - found.levels[0])
        interval = (
            f"The light band is meant to hold {share:.0f} % of what comes; on the test part it "
            f"held {100 * found.covered:.0f} %. It is as wide as the errors on the validation part."
        )
    environment = Environment(loader=PackageLoader("polypatch", "report"), autoescape=True)
    return environment.get_template("forecast.html").render(
        name=data.name,
        horizon=data.horizon,
        lookback=data.lookback,
        steps=len(data.index),
        frequency=step_in_words(found.history.index),
        columns=data.columns,
        sentence=found.sentence,
        plots=[plot_series(found, column) for column in data.columns[:_DRAWN]],
        left=max(0, len(data.columns) - _DRAWN),
        interval=interval,
        candidates=found.candidates,
        parts=f"{len(data.train)}, {len(data.val)} and {len(data.test)}",
        notes=found.notes,
        command=command,
    )


def plot_series(found: Forecasts, column: str) -> str:
    """One series' last steps, its forecast and the bands of the quantiles, as SVG text."""
    data, history = found.data, found.history
    shown = min(len(history.index), max(3 * data.horizon, 2 * data.season, data.lookback))
    past = history.values[-shown:, data.columns.index(column)]
    rows = found.table[found.table["series"] == column]
    figure, axes = new_figure(column, 9.4, 2.9)
    axes.plot(history.index[-shown:], past, color="#374151", linewidth=1.3, label="observed")
    times = rows["time"].to_numpy()
    for low, high in zip(found.levels, reversed(found.levels)):
        if low < high:
            axes.fill_between(
                times, rows[f"q{low:g}"], rows[f"q{high:g}"], color="#0072B2", alpha=0.16, lw=0
            )
    # The line starts at the last value, so that no gap stands between what was and what may come.
    axes.plot(
        np.concatenate([history.index[-1:].to_numpy(), times]),
        np.concatenate([past[-1:], rows["forecast"].to_numpy()]),
        color="#0072B2",
        linewidth=1.8,
        label=found.candidates[0].spec,
    )
    axes.legend(  # beside the title, where no line runs
        loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8.5, frameon=False
    )
    return to_svg(figure)
