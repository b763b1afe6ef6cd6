"""Timing two things in turn, so that a drifting machine moves both.

Run the scripts of this folder with nothing else running:

    OMP_WAIT_POLICY=passive python benchmarks/vit.py
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Must be set before torch starts its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@dataclass(frozen=True)
class Pair:
    """Median milliseconds of both, and the median over rounds of theirs / ours."""

    ours: float
    theirs: float
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"ours {self.ours:8.2f} ms   theirs {self.theirs:8.2f} ms   "
            f"ratio {self.ratio:.2f}× ({self.low:.2f}–{self.high:.2f})"
        )


def paired(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    rounds: int = 15,
    warmup: int = 3,
) -> Pair:
    """Time A B A B …; the ratio is taken within each round. low and high are its quartiles."""
    for _ in range(warmup):
        ours()
        theirs()
    a, b = [], []
    for _ in range(rounds):
        a.append(_milliseconds(ours))
        b.append(_milliseconds(theirs))
    ratios = sorted(y / x for x, y in zip(a, b))
    quarter = len(ratios) // 4
    return Pair(
        statistics.median(a),
        statistics.median(b),
        statistics.median(ratios),
        ratios[quarter],
        ratios[-1 - quarter],
    )


def _milliseconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)
