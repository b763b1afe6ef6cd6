"""The little statistics that an honest comparison needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Difference", "Interval", "difference", "interval", "pareto_front"]


@dataclass(frozen=True)
class Interval:
    """A mean with half the width of its confidence interval (NaN for a single value)."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if np.isnan(self.half) else f"{self.mean:.4g} ± {self.half:.2g}"


def interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean."""
    from scipy.stats import t

    sample = np.asarray(values, dtype=float)
    count = len(sample)
    if count < 2:
        return Interval(float(sample.mean()), float("nan"), count)
    error = sample.std(ddof=1) / np.sqrt(count)
    return Interval(
        float(sample.mean()), float(t.ppf((1 + confidence) / 2, count - 1) * error), count
    )


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over seeds, its interval, and whether the interval leaves zero out."""

    mean: float
    half: float

    @property
    def clear(self) -> bool:
        return bool(abs(self.mean) > self.half)  # False for NaN: one seed shows nothing

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def difference(a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95) -> Difference:
    """Interval of the difference of two means, paired by seed where both have the same seeds.

    Runs of equal seed share data order and augmentation, so pairing takes that noise out; samples
    of unequal size are compared by Welch's interval.
    """
    from scipy.stats import t

    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if len(first) == len(second):
        paired = interval((first - second).tolist(), confidence=confidence)
        return Difference(paired.mean, paired.half)
    mean = float(first.mean() - second.mean())
    if min(len(first), len(second)) < 2:
        return Difference(mean, float("nan"))
    va, vb = first.var(ddof=1) / len(first), second.var(ddof=1) / len(second)
    if va + vb == 0:
        return Difference(mean, 0.0)
    freedom = (va + vb) ** 2 / (va**2 / (len(first) - 1) + vb**2 / (len(second) - 1))
    return Difference(mean, float(t.ppf((1 + confidence) / 2, freedom) * np.sqrt(va + vb)))


def pareto_front(cost: Sequence[float], value: Sequence[float]) -> list[int]:
    """Indices of the points that no other point beats (cheaper and at least as good, or as cheap
    and better), by rising cost."""
    order = sorted(range(len(cost)), key=lambda i: (cost[i], -value[i]))
    front: list[int] = []
    best = -float("inf")
    for index in order:
        if value[index] > best:
            front.append(index)
            best = value[index]
    return front
