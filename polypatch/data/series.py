"""Series from a table: CSV or parquet, a column for each series or one row for each value.

What comes out is regular in time and numeric, with NaN where nothing was observed. What a table
holds is kept, or left out with a sentence in ``notes``, or refused with a sentence that names the
line: nothing vanishes silently.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from ..errors import PolypatchError, suggest
from .bundled_series import BUNDLED_SERIES
from .calendar import regular_index

__all__ = ["Series", "load_series", "series_of"]

#: names under which time columns go, in order of preference
_TIME_NAMES = ("date", "datetime", "timestamp", "time", "ds", "day", "week", "month", "year")
_STEP_NAMES = ("t", "step", "index", "n")
FORMS = "bundled:co2, bundled:sunspots, bundled:elnino, bundled:macro, a .csv or a .parquet file"


@dataclass(frozen=True)
class Series:
    """Series side by side, on one regular time axis.

    ``values`` is (time, series), float64, NaN where nothing was observed. ``index`` is a
    ``DatetimeIndex`` with a frequency, or a ``RangeIndex`` where a table has no times.
    """

    name: str
    index: pd.Index
    columns: tuple[str, ...]
    values: np.ndarray
    notes: tuple[str, ...] = field(default=())

    @property
    def frequency(self) -> str | None:
        """pandas' word for the step (``h``, ``D``, ``MS``, ...); None without times."""
        return getattr(self.index, "freqstr", None)

    @property
    def fingerprint(self) -> str:
        """Changes whenever a value, a name or a time does."""
        digest = hashlib.sha256(np.ascontiguousarray(self.values).tobytes())
        digest.update(repr((self.columns, str(self.index[0]), self.frequency)).encode())
        return digest.hexdigest()[:16]

    def frame(self) -> pd.DataFrame:
        """As a data frame, a column for each series."""
        return pd.DataFrame(self.values, index=self.index, columns=list(self.columns))


def load_series(
    spec: str,
    *,
    time: str | None = None,
    ids: str | None = None,
    value: str | None = None,
    frequency: str | None = None,
) -> Series:
    """Series from where ``spec`` says: ``bundled:co2``, ``bundled:sunspots``, ``bundled:elnino``,
    ``bundled:macro`` (statsmodels' samples), or a ``.csv`` or ``.parquet`` file.

    See :func:`series_of` for the other arguments.

    Raises:
        PolypatchError: one sentence for everything that the caller can mend.
    """
    if spec.startswith("bundled:"):
        name = spec.removeprefix("bundled:")
        if name not in BUNDLED_SERIES:
            hint = suggest(name, BUNDLED_SERIES, kind="series")
            raise PolypatchError(f"there are no bundled series {name!r}{hint}")
        return series_of(BUNDLED_SERIES[name](), name=spec, time="time")
    path = Path(spec).expanduser()
    if not path.is_file():
        raise PolypatchError(f"there is no file {spec}; known forms: {FORMS}")
    if path.stat().st_size == 0:
        raise PolypatchError(f"{spec} is empty (0 bytes)")
    read = {".csv": _read_csv, ".tsv": _read_csv, ".txt": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in read:
        raise PolypatchError(f"{spec} is neither a .csv nor a .parquet file; known forms: {FORMS}")
    table = read[path.suffix.lower()](path)
    line = "row" if path.suffix.lower() == ".parquet" else "line"
    return series_of(
        table, name=spec, time=time, ids=ids, value=value, frequency=frequency, line=line
    )


def series_of(
    table: pd.DataFrame,
    *,
    name: str,
    time: str | None = None,
    ids: str | None = None,
    value: str | None = None,
    frequency: str | None = None,
    line: str = "line",
) -> Series:
    """Series from a data frame.

    Args:
        time: the column of times; default: the one that looks like it. Without one, rows are
            equally spaced steps.
        ids: the column that names each row's series, in a table with one value a row; default:
            the one column of words, where times repeat.
        value: the column of values of such a table; default: its only column of numbers.
        frequency: pandas' word for a step (``h``, ``D``, ``MS``): values within a step are
            averaged. Without it, times have to be regular up to gaps.
        line: what messages call a row: ``line`` of a file with a header, or ``row``.

    Raises:
        PolypatchError: times or values that can't be read, contradict each other or are not
            regular, with the first line where it happens.
    """
    table = table.rename(columns=str)
    if not len(table) or not len(table.columns):
        raise PolypatchError(f"{name} has no rows")
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise PolypatchError(f"{name} has two columns {twice[0]!r}; rename one")
    for word, column in (("time", time), ("series", ids), ("values", value)):
        if column is not None and column not in table:
            raise PolypatchError(
                f"{name} has no column {column!r} for the {word}"
                f"{suggest(column, list(table.columns))}; it has {_some(table.columns)}"
            )
    rows = _Rows(name, line, 2 if line == "line" else 1)
    notes: list[str] = []
    stamps, time, first = _times(table, time, rows, notes)
    table = table.drop(columns=[time] if time is not None else [])
    ids = ids or _id_column(table, stamps)
    if ids is not None:
        frame, stamps = _from_long(table, stamps, ids, value, rows, notes)
    else:
        if value is not None:
            table = table[[value]]
        frame = _numbers(table, rows, notes)
        if frequency is None:  # else values of one step, and so of one time, are averaged
            frame, stamps = _without_twins(frame, stamps, rows, notes)
    if stamps is None and frequency is not None:
        raise PolypatchError(f"{name} has no times for a frequency of {frequency}")
    if stamps is None:
        index = pd.RangeIndex(first, first + len(frame))
    else:
        frame, index = regular_index(frame, stamps, where=rows.at, frequency=frequency, notes=notes)
    frame = _useful(frame, rows, notes)
    return Series(
        name=name,
        index=index,
        columns=tuple(frame.columns),
        values=frame.to_numpy(np.float64),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Rows:
    """How messages name a row: ``sales.csv, line 17``."""

    source: str
    word: str
    first: int

    def at(self, position: Any) -> str:
        return f"{self.source}, {self.word} {int(position) + self.first}"

    def number(self, position: Any) -> int:
        return int(position) + self.first


# ---- reading -------------------------------------------------------------------------------------


def _read_csv(path: Path) -> pd.DataFrame:
    """A table with words as they stand; numbers and times are found later, with their lines."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline()
        delimiter = max(",;\t|", key=header.count)
        table = pd.read_csv(
            path, sep=delimiter, encoding="utf-8-sig", skipinitialspace=True, low_memory=False
        )
    except UnicodeDecodeError as error:
        raise PolypatchError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except pd.errors.EmptyDataError as error:
        raise PolypatchError(f"{path} has no rows") from error
    except pd.errors.ParserError as error:
        said = str(error).removeprefix("Error tokenizing data. C error: ").strip()
        raise PolypatchError(f"{path} is no table: {said}") from error
    if delimiter == ";":  # where columns are cut at semicolons, commas may be decimal points
        for column in table.columns[[not _is_numeric(table[c]) for c in table.columns]]:
            words = table[column].astype("string")
            if words.dropna().str.fullmatch(r"[-+]?\d+(,\d+)?").all():
                table[column] = words.str.replace(",", ".", regex=False)
    return table


def _read_parquet(path: Path) -> pd.DataFrame:
    import pyarrow as pa

    try:
        table = pd.read_parquet(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise PolypatchError(f"{path} is no parquet file") from error
    if not isinstance(table.index, pd.RangeIndex):
        table = table.reset_index()
    return table


# ---- times ---------------------------------------------------------------------------------------


def _times(
    table: pd.DataFrame, column: str | None, rows: _Rows, notes: list[str]
) -> tuple[pd.DatetimeIndex | None, str | None, int]:
    """Times of all rows and their column; no times, but the number of the first, where rows are
    just steps."""
    column = column or _time_column(table)
    if column is None:
        notes.append("there is no column of times; rows are taken as equally spaced steps")
        return None, None, 0
    values = table[column]
    empty = values.isna().to_numpy()
    if empty.any():
        raise PolypatchError(f"{rows.at(empty.argmax())}: the time in {column!r} is missing")
    if _is_numeric(values):
        whole = (values == values.round()).all()
        if whole and values.between(1000, 9999).all():  # years
            years = pd.to_datetime(values.astype(int).astype(str), format="%Y")
            return pd.DatetimeIndex(years), column, 0
        if values.is_unique and (values.diff().dropna() == 1).all():
            return None, column, int(values.iloc[0])
        units: tuple[tuple[Literal["s", "ms"], float], ...] = (("s", 1.0), ("ms", 1e3))
        for unit, scale in units:  # since 1970; from 1973 to 2100
            if values.between(1e8 * scale, 4.1e9 * scale).all():
                return pd.DatetimeIndex(pd.to_datetime(values, unit=unit)), column, 0
        raise PolypatchError(
            f"{rows.source}: {column!r} holds numbers that are no years, no seconds since 1970 and "
            "no steps 0, 1, 2, …; write times as 2024-01-31 or 2024-01-31 15:00"
        )
    stamps = _parsed(values)
    wrong = stamps.isna().to_numpy()
    if wrong.any():
        at = int(wrong.argmax())
        raise PolypatchError(
            f"{rows.at(at)}: {values.iloc[at]!r} in {column!r} is no time"
            + (f" of the same form as {values.iloc[0]!r}" if at else "; write 2024-01-31 15:00")
        )
    index = pd.DatetimeIndex(stamps)
    if index.tz is not None:
        notes.append("times with zones are given in UTC")
        index = index.tz_convert("UTC").tz_localize(None)
    return index, column, 0


def _time_column(table: pd.DataFrame) -> str | None:
    """The column of times: by its type, by its name, or because its words are times."""
    typed = [c for c in table.columns if pd.api.types.is_datetime64_any_dtype(table[c])]
    if typed:
        return typed[0]
    names = {c.strip().lower(): c for c in table.columns}
    for name in _TIME_NAMES:
        if name in names and not _is_numeric(table[names[name]]):
            return names[name]
    for column in table.columns:
        if not _is_numeric(table[column]):
            start = table[column].dropna().head(20)
            if len(start) and _parsed(start).notna().all():
                return column
    for name in ("year", *_TIME_NAMES[:5]):
        if name in names:
            return names[name]
    for name in _STEP_NAMES:
        if name in names and (table[names[name]].diff().dropna() == 1).all():
            return names[name]
    return None


def _parsed(values: pd.Series) -> pd.Series:
    with warnings.catch_warnings():  # of formats that pandas has to guess
        warnings.simplefilter("ignore", UserWarning)
        try:
            return pd.to_datetime(values.astype("string"), errors="coerce")
        except ValueError:  # zones that differ
            return pd.to_datetime(values.astype("string"), errors="coerce", utc=True)


# ---- values --------------------------------------------------------------------------------------


def _is_numeric(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values)


def _numbers(table: pd.DataFrame, rows: _Rows, notes: list[str]) -> pd.DataFrame:
    """All columns of numbers, as float64; the index counts the table's rows.

    Raises:
        PolypatchError: a cell that is no number in a column of numbers, or an infinity.
    """
    made = {}
    for column in table.columns:
        values = table[column]
        numbers = pd.to_numeric(values, errors="coerce").astype(np.float64)
        wrong = (numbers.isna() & values.notna()).to_numpy()
        if wrong.any() and not numbers.notna().any():
            notes.append(f"left out: column {column!r} holds no numbers")
            continue
        if wrong.any():
            at = int(wrong.argmax())
            raise PolypatchError(
                f"{rows.at(at)}: {str(values.iloc[at])!r} in column {column!r} is no number; "
                "correct it, or leave the cell empty where the value is missing"
            )
        infinite = np.isinf(numbers.to_numpy())
        if infinite.any():
            raise PolypatchError(f"{rows.at(infinite.argmax())}: {column!r} is infinite")
        made[column] = numbers.to_numpy()
    return pd.DataFrame(made, index=range(len(table)))


def _without_twins(
    frame: pd.DataFrame, stamps: pd.DatetimeIndex | None, rows: _Rows, notes: list[str]
) -> tuple[pd.DataFrame, pd.DatetimeIndex | None]:
    """One row a time; rows that say the same twice are one.

    Raises:
        PolypatchError: two rows of one time with different values.
    """
    if stamps is None or stamps.is_unique:
        return frame, stamps
    order = np.argsort(stamps, kind="stable")
    times, sorted_frame = stamps[order], frame.iloc[order]
    same_time = times[1:] == times[:-1]
    a, b = sorted_frame.to_numpy()[1:], sorted_frame.to_numpy()[:-1]
    same = ((a == b) | (np.isnan(a) & np.isnan(b))).all(1)
    clash = same_time & ~same
    if clash.any():
        at = int(clash.argmax())
        first, second = sorted(rows.number(p) for p in order[at : at + 2])
        raise PolypatchError(
            f"{rows.source}, {rows.word}s {first} and {second} both have the time {times[at]}, "
            "with different values; keep one, name the column of the series (--id), or let values "
            "of one step be averaged (--frequency)"
        )
    kept = np.sort(order[np.concatenate([[True], ~same_time])])
    notes.append(f"{len(frame) - len(kept)} {rows.word}s repeat another and are left out")
    return frame.iloc[kept], stamps[kept]


def _id_column(table: pd.DataFrame, stamps: pd.DatetimeIndex | None) -> str | None:
    """The column that names each row's series: the only one of words, where times repeat."""
    if stamps is None or stamps.is_unique:
        return None
    words = [c for c in table.columns if pd.to_numeric(table[c], errors="coerce").isna().all()]
    words = [c for c in words if table[c].notna().all()]
    return words[0] if len(words) == 1 else None


def _from_long(
    table: pd.DataFrame,
    stamps: pd.DatetimeIndex | None,
    ids: str,
    value: str | None,
    rows: _Rows,
    notes: list[str],
) -> tuple[pd.DataFrame, pd.DatetimeIndex]:
    """A column for each series from a row for each value."""
    if stamps is None:
        raise PolypatchError(
            f"{rows.source} has a value a row ({ids!r} names the series) but no column of times"
        )
    missing = table[ids].isna().to_numpy()
    if missing.any():
        raise PolypatchError(f"{rows.at(missing.argmax())}: the series in {ids!r} is missing")
    rest = table.drop(columns=[ids])
    numbers = _numbers(rest if value is None else rest[[value]], rows, notes)
    if len(numbers.columns) != 1:
        raise PolypatchError(
            f"{rows.source} has a value a row, but {len(numbers.columns)} columns of numbers "
            f"({_some(numbers.columns)}); say which holds the values (--value)"
        )
    values = numbers.iloc[:, 0].to_numpy()
    keys = pd.DataFrame({"id": table[ids].astype(str).to_numpy(), "time": stamps, "value": values})
    twin = keys.duplicated(["id", "time"], keep="first").to_numpy()
    if twin.any():
        repeats = keys.duplicated(["id", "time", "value"], keep="first").to_numpy()
        if (twin & ~repeats).any():
            at = int((twin & ~repeats).argmax())
            raise PolypatchError(
                f"{rows.at(at)}: series {keys['id'][at]!r} has another value for {stamps[at]} "
                "before; keep one"
            )
        notes.append(f"{int(twin.sum())} {rows.word}s repeat another and are left out")
        keys = keys[~twin]
    frame = keys.pivot(index="time", columns="id", values="value")
    frame = frame[list(dict.fromkeys(keys["id"]))]  # in the file's order
    stamps = pd.DatetimeIndex(frame.index)
    frame.index = pd.Index(keys.drop_duplicates("time").sort_values("time").index)
    return frame.rename_axis(columns=None), stamps


def _useful(frame: pd.DataFrame, rows: _Rows, notes: list[str]) -> pd.DataFrame:
    """Without columns that hold nothing; a word on those that never change."""
    empty = [c for c in frame.columns if frame[c].isna().all()]
    if empty:
        notes.append(f"left out: no value in {_some(empty)}")
        frame = frame.drop(columns=empty)
    if not len(frame.columns):
        raise PolypatchError(f"{rows.source} has no column of numbers to forecast")
    constant = [c for c in frame.columns if frame[c].nunique() == 1]
    if constant:
        notes.append(f"never change: {_some(constant)}")
    missing = int(frame.isna().to_numpy().sum())
    if missing:
        notes.append(f"{missing} of {frame.size} values are missing")
    return frame


def _some(names: Sequence[str] | pd.Index) -> str:
    shown = ", ".join(repr(str(n)) for n in list(names)[:6])
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")
