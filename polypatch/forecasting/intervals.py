"""Quantiles around any forecaster's forecasts, from what it got wrong on windows that it didn't
learn from (split conformal prediction: Vovk et al. 2005; Lei et al. 2018, sec. 2.2).

Step and series each have their own errors. If those of calibration and test are exchangeable, a
quantile q lies above a share of at least q of what comes, whatever the forecaster. Neighbouring
windows share most of their steps and series drift, so this is an aim on real series, and coverage
is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import PolypatchError

__all__ = ["LEVELS", "check_levels", "conformal_offsets", "coverage", "tellable"]

#: the quantiles of an interval of 90, and one of 50 per cent, and the median
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def conformal_offsets(
    errors: Float[Tensor, "windows horizon series"], levels: Sequence[float] = LEVELS
) -> Float[Tensor, "levels horizon series"]:
    """What to add to a forecast for each quantile.

    Of n errors, the one of rank ⌈(n + 1) q⌉ for a quantile above the middle, and of rank
    ⌊(n + 1) q⌋ below it, so that both ends err outwards; at the middle the median.

    Args:
        errors: truth minus forecast; NaN where there was no truth.
        levels: in (0, 1), rising.

    Raises:
        PolypatchError: levels out of order, or too few errors to see one of them.
    """
    check_levels(levels)
    ordered = errors.sort(dim=0).values  # NaNs come last
    known = errors.isfinite().sum(0)
    fewest = int(known.min()) if known.numel() else 0
    for level in (levels[0], levels[-1]):
        if not tellable(level, fewest):
            least = math.ceil(1 / min(level, 1 - level) - 1 - 1e-9)
            raise PolypatchError(
                f"{fewest} windows can't tell a quantile of {level:g}; it takes {least}"
            )
    made = []
    for level in levels:
        if level == 0.5:
            made.append(errors.nanmedian(dim=0).values)
            continue
        rank = (known + 1) * level  # a hair of rounding must not move a whole rank
        rank = (rank - 1e-9).ceil() if level > 0.5 else (rank + 1e-9).floor()
        made.append(ordered.gather(0, rank.long()[None] - 1)[0])
    return torch.stack(made)


def check_levels(levels: Sequence[float]) -> None:
    """
    Raises:
        PolypatchError: quantiles that are none, or not in order.
    """
    if not levels or any(not 0 < q < 1 for q in levels) or list(levels) != sorted(set(levels)):
        raise PolypatchError(f"quantiles rise within 0 and 1, got {', '.join(map(str, levels))}")


def tellable(level: float, windows: int) -> bool:
    """Whether so many errors have one of the quantile's rank."""
    return min(level, 1 - level) * (windows + 1) >= 1 - 1e-9


def coverage(
    truth: Float[Tensor, "windows horizon series"],
    low: Float[Tensor, "windows horizon series"],
    high: Float[Tensor, "windows horizon series"],
) -> float:
    """Share of the truth that lies within the interval, ends included; NaNs don't count."""
    known = truth.isfinite()
    inside = (low <= truth) & (truth <= high) & known
    return float(inside.sum() / known.sum())
