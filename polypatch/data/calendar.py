"""The regular time axis behind the times of a table: its step, and the steps that are missing."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset

from ..errors import PolypatchError

__all__ = ["SEASONS", "regular_index", "season_of", "step_in_words", "step_of"]

#: steps in the season that forecasters repeat, by pandas' word for a step
SEASONS = {
    "s": 60, "min": 60, "h": 24, "D": 7, "B": 5, "W": 52,
    "MS": 12, "ME": 12, "BMS": 12, "BME": 12, "QS": 4, "QE": 4, "BQS": 4, "BQE": 4,
}  # fmt: skip
_NAMES = {
    "s": "second", "min": "minute", "h": "hour", "D": "day", "B": "business day", "W": "week",
    "MS": "month", "ME": "month", "QS": "quarter", "QE": "quarter", "YS": "year", "YE": "year",
}  # fmt: skip
#: a time axis with more missing steps than this, for each that is there, isn't one
_EMPTIEST = 20


def regular_index(
    frame: pd.DataFrame,
    stamps: pd.DatetimeIndex,
    *,
    where: Callable[[int], str],
    frequency: str | None,
    notes: list[str],
) -> tuple[pd.DataFrame, pd.DatetimeIndex]:
    """A row for each step of time: in order, with empty rows where steps are missing.

    Args:
        frame: its index holds the rows' positions in the table.
        where: names a position for people.
        frequency: pandas' word for a step, within which values are averaged; None: the step is
            found, and every time has to lie on it.

    Raises:
        PolypatchError: an unknown frequency, too few rows to see a step, or a time off the steps.
    """
    if not stamps.is_monotonic_increasing:
        order = np.argsort(stamps, kind="stable")
        frame, stamps = frame.iloc[order], stamps[order]
        notes.append("rows are put into the order of time")
    positions = frame.index
    frame = frame.set_axis(stamps, axis=0)
    if frequency is not None:
        try:
            offset = to_offset(frequency)
        except ValueError as error:
            raise PolypatchError(
                f"{frequency!r} is no frequency; write h, D, W, MS or a multiple such as 15min"
            ) from error
        averaged = frame.resample(offset).mean()
        if not len(averaged):
            raise PolypatchError("there are no times to average over")
        notes.append(f"values are averaged over steps of {frequency}: {len(frame)} rows became "
                     f"{len(averaged)}")  # fmt: skip
        return averaged, pd.DatetimeIndex(averaged.index)
    if len(stamps) < 3:
        raise PolypatchError(
            f"{len(stamps)} rows are too few to see the step of time; name it (--frequency)"
        )
    full = step_of(stamps)
    if full is None:
        step = _usual_step(stamps)
        off = (stamps - stamps[0]) % step != pd.Timedelta(0)
        at = int(off.argmax()) if off.any() else int((stamps[1:] - stamps[:-1]).argmax()) + 1
        why = "" if off.any() else f", or far too many steps are missing before {stamps[at]}"
        raise PolypatchError(
            f"{where(positions[at])}: the time {stamps[at]} doesn't lie on the steps of "
            f"{_words(step)} that most rows keep{why}; values can be averaged over steps "
            "(--frequency, such as h, D or MS)"
        )
    if len(full) > len(stamps):
        first = full[~full.isin(stamps)][0]
        notes.append(
            f"{len(full) - len(stamps)} steps of {step_in_words(full)} are missing, the first at "
            f"{first}"
        )
    return frame.reindex(full), full


def step_of(stamps: pd.DatetimeIndex) -> pd.DatetimeIndex | None:
    """The regular axis on which all times lie, with the fewest steps missing; None: there is none.

    ``stamps`` are in order and unique. Steps are equal (an hour) or of the calendar (month starts,
    business days).
    """
    window = min(len(stamps), 8)
    starts = np.unique(np.linspace(0, len(stamps) - window, 200).astype(int))
    with warnings.catch_warnings():  # pandas 3 speaks of words that will be offsets one day
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        guesses = Counter(pd.infer_freq(stamps[s : s + window]) for s in starts)
    words = [word for word, _ in guesses.most_common() if word is not None]
    fits = []
    for candidate in (*words, _usual_step(stamps)):
        offset = to_offset(candidate)
        rough = (stamps[-1] - stamps[0]) / max(_length(stamps[0], offset), pd.Timedelta(1, "ns"))
        if rough > _EMPTIEST * len(stamps) + 100:
            continue
        full = pd.date_range(stamps[0], stamps[-1], freq=offset)
        if len(full) <= _EMPTIEST * len(stamps) and stamps.isin(full).all():
            fits.append(full)
    return min(fits, key=len, default=None)


def season_of(index: pd.Index) -> int:
    """Steps of the season that a seasonal baseline repeats: a day of hours, a week of days, a year
    of months; 1 where the step has none."""
    word = getattr(index, "freqstr", None)
    if not isinstance(index, pd.DatetimeIndex) or word is None:
        return 1
    base = word.lstrip("0123456789").split("-")[0]
    times = getattr(index.freq, "n", 1)
    if base == "min" and times >= 5:  # the day, as of hours, once a step is long enough
        return 24 * 60 // times if 24 * 60 % times == 0 else 1
    season = SEASONS.get(base, 1)
    return season // times if season % times == 0 else 1


def step_in_words(index: pd.Index) -> str:
    """``1 month``, ``15 minutes``; pandas' word where there is no plainer one, "" without times."""
    word = getattr(index, "freqstr", None)
    if word is None:
        return ""
    times = getattr(getattr(index, "freq", None), "n", 1)
    name = _NAMES.get(word.lstrip("0123456789").split("-")[0])
    return word if name is None else f"{times} {name}{'s'[: times != 1]}"


def _usual_step(stamps: pd.DatetimeIndex) -> pd.Timedelta:
    steps = (stamps[1:] - stamps[:-1]).to_numpy()
    values, counts = np.unique(steps, return_counts=True)
    return pd.Timedelta(values[counts.argmax()])


def _length(start: pd.Timestamp, offset: Any) -> pd.Timedelta:
    first = offset.rollforward(start)
    return (first + offset) - first


def _words(step: pd.Timedelta) -> str:
    text = str(step).replace("0 days ", "").removesuffix(" 00:00:00")
    return text
