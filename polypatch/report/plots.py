"""Plots of a comparison, as SVG text for a page. One colour per candidate, the same everywhere."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .statistics import pareto_front

if TYPE_CHECKING:
    from ..compare import Candidate

__all__ = ["COLOURS", "curves", "new_figure", "pareto", "to_svg"]

#: Okabe and Ito's colours (told apart with any colour vision), then darker companions.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B5CF6", "#4B5563",
    "#991B1B", "#3F6212", "#155E75", "#7C2D12",
)  # fmt: skip
MARKERS = "osD^vP*Xhp<>"

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9CA3AF",
    "axes.labelcolor": "#374151",
    "axes.grid": True,
    "grid.color": "#E5E7EB",
    "grid.linewidth": 0.8,
    "xtick.color": "#6B7280",
    "ytick.color": "#6B7280",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "polypatch",  # the same plot gives the same bytes
}


def pareto(
    candidates: Sequence[Candidate],
    cost: Callable[[Candidate], float],
    *,
    label: str,
    title: str,
) -> str:
    """Accuracy with its interval against a cost (log axis), and the Pareto front as a step line."""
    figure, axes = new_figure(title, 5.4, 3.9)
    x = [cost(c) for c in candidates]
    y = [100 * c.accuracy.mean for c in candidates]
    half = [0 if np.isnan(c.accuracy.half) else 100 * c.accuracy.half for c in candidates]
    front = pareto_front(x, y)
    if len(front) > 1:
        axes.step(
            [x[i] for i in front],
            [y[i] for i in front],
            where="post",
            color="#9CA3AF",
            linewidth=1.4,
            linestyle=(0, (4, 2)),
            zorder=1,
            label="Pareto front",
        )
    for index, candidate in enumerate(candidates):
        axes.errorbar(
            x[index],
            y[index],
            yerr=half[index],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=8 if index in front else 6.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            capsize=2.5,
            elinewidth=1.1,
            linestyle="none",
            label=candidate.spec,
            zorder=3,
        )
    axes.set_xscale("log")
    low, high = min(x), max(x)
    axes.set_xlim(low / 1.6, high * 1.6)
    _plain_log_ticks(axes, low / 1.6, high * 1.6)
    # A wide interval must not squeeze the points into a line.
    low = min(v - h for v, h in zip(y, half))
    high = max(v + h for v, h in zip(y, half))
    axes.set_ylim(max(-2.0, low - 2), min(102.0, high + 2))
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy, %")
    return to_svg(figure)


def curves(candidates: Sequence[Candidate]) -> str:
    """Training loss against steps: mean over seeds, smoothed, the range over seeds shaded."""
    figure, axes = new_figure("Training loss", 5.4, 3.9)
    for index, candidate in enumerate(candidates):
        series = []
        for run in candidate.runs:
            rows = [(r["step"], r["loss"]) for r in run.metrics() if "loss" in r]
            if len(rows) > 1:
                series.append(np.array(rows, dtype=float))
        if not series:
            continue
        end = min(s[-1, 0] for s in series)
        start = max(s[0, 0] for s in series)
        steps = np.linspace(start, end, 120)
        smooth = np.stack([_smoothed(np.interp(steps, s[:, 0], s[:, 1])) for s in series])
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(steps, smooth.mean(0), color=colour, linewidth=1.6, label=candidate.spec)
        axes.fill_between(steps, smooth.min(0), smooth.max(0), color=colour, alpha=0.13, lw=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    return to_svg(figure)


def _smoothed(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Running mean, the ends mirrored so that they aren't pulled to zero."""
    padded = np.pad(values, width // 2, mode="reflect")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def new_figure(title: str, width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches in the house's style, and its one plot."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=10.5, color="#111827", fontweight="bold")
    return figure, axes


def _plain_log_ticks(axes: Any, low: float, high: float) -> None:
    """1, 2, 5, 10 … instead of powers of ten: costs often span less than a decade."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    exponents = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def to_svg(figure: Any) -> str:
    """The figure as an ``<svg>`` element; the same plot gives the same text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return text[text.index("<svg") :]
