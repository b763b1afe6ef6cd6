"""Labelled images in parquet files or on the Hugging Face hub, read with ``datasets``.

The image column holds encoded images: the hub's ``Image`` feature, a struct of ``bytes`` and
``path``, or plain bytes, under any name. The label column is a ``ClassLabel``, or whole numbers, or
strings. Where several columns could be meant, ``?image=NAME&label=NAME`` after the place says
which. Decoding is ours (``decode.py``), so a broken image is skipped as it is in folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import PolypatchError, suggest
from .base import ImageData
from .decode import Source
from .splits import Labelled, Progress, assemble, hash_split, name_some

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Columns", "load_hub", "load_parquet", "parquet_files"]

_TEST_NAMES = ("test", "validation", "valid", "val", "dev", "eval")
_LABEL_NAMES = ("label", "labels", "class", "target", "category")


@dataclass(frozen=True)
class Columns:
    """The columns a caller names; None: found by their types."""

    image: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class TableImages:
    """The image column of a table. ``split`` is for messages."""

    dataset: Dataset  # with the image column only, not decoded
    column: str
    split: str

    def fetch(self, rows: Sequence[int]) -> list[Source | None]:
        consecutive = len(rows) > 0 and list(rows) == list(range(rows[0], rows[0] + len(rows)))
        # A slice is read much faster than a list of rows.
        chosen = slice(rows[0], rows[0] + len(rows)) if consecutive else list(rows)
        return [_source(value) for value in self.dataset[chosen][self.column]]

    def describe(self, row: int) -> str:
        return f"row {row} of {self.split}"

    def identity(self) -> str:
        return self.dataset._fingerprint


def _source(value: Any) -> Source | None:
    if isinstance(value, bytes):
        return value
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return value["bytes"]
        if value.get("path"):
            return Path(value["path"])
    return None


# ---------------------------------------------------------------------------------------------
# Places
# ---------------------------------------------------------------------------------------------


def parquet_files(folder: Path) -> dict[str, list[str]]:
    """The parquet files of a folder (or of its ``data/``), by split, as the hub lays them out:
    ``train*.parquet``, ``test*.parquet``, ...; files of other names are all ``train``."""
    for place in (folder, folder / "data"):
        files = sorted(p for p in place.glob("*.parquet") if not p.name.startswith("."))
        splits: dict[str, list[str]] = {}
        for split in ("train", *_TEST_NAMES):
            # "val" must not claim "validation.parquet": the word ends where the letters end.
            named = [str(p) for p in files if _leading_word(p.name) == split]
            if named:
                splits[split] = named
        if splits:
            return splits
        if files:
            return {"train": [str(p) for p in files]}
    return {}


def _leading_word(name: str) -> str:
    letters = 0
    while letters < len(name) and name[letters].isalpha():
        letters += 1
    return name[:letters].lower()


def load_parquet(
    files: Mapping[str, Sequence[str]],
    *,
    name: str,
    resolution: int | None,
    test_fraction: float,
    columns: Columns,
    progress: Progress | None = None,
) -> ImageData:
    """Read parquet files, given by split (see :func:`parquet_files`)."""
    filled = {split: [f for f in paths if _row_count(f)] for split, paths in files.items()}
    filled = {split: paths for split, paths in filled.items() if paths}
    if not filled:
        raise PolypatchError(f"{name} has no rows")
    with _quiet():
        from datasets import load_dataset

        try:
            splits = load_dataset("parquet", data_files=filled)
        except Exception as error:  # pyarrow's and datasets' errors have no common class
            raise PolypatchError(
                f"{name} can't be read as parquet ({_first_line(error.__cause__ or error)})"
            ) from error
        return _from_splits(splits, name, resolution, test_fraction, columns, progress)


def _row_count(file: str) -> int:
    """Rows of a parquet file, from its footer. ``datasets`` stumbles over files without rows, and
    doesn't say which of many files is broken."""
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(file).num_rows
    except (OSError, ValueError) as error:  # pyarrow's errors are one or the other
        raise PolypatchError(
            f"{file} can't be read as parquet ({_first_line(error).rstrip('.')})"
        ) from error


def load_hub(
    identifier: str,
    *,
    name: str,
    resolution: int | None,
    test_fraction: float,
    columns: Columns,
    progress: Progress | None = None,
) -> ImageData:
    """Load ``owner/name``, ``name``, either with ``/configuration``, or a local dataset folder."""
    with _quiet():
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError

        parts = identifier.strip("/").split("/")
        if Path(identifier).is_dir():
            attempts = [(identifier, None)]
        elif len(parts) == 1:
            attempts = [(parts[0], None)]
        elif len(parts) == 2:  # owner/name, or an old ownerless name with a configuration
            attempts = [(identifier.strip("/"), None), (parts[0], parts[1])]
        elif len(parts) == 3:
            attempts = [(f"{parts[0]}/{parts[1]}", parts[2])]
        else:
            attempts = []
        if not all(parts) or not attempts:
            raise PolypatchError(
                f"{name!r} names no dataset: write hub:owner/name or hub:owner/name/configuration"
            )
        errors = []
        for path, configuration in attempts:
            try:
                splits = load_dataset(path, configuration)
            except DatasetNotFoundError as error:  # try the other reading of the name
                errors.append(error)
                continue
            except Exception as error:  # network, hub, builder and parser errors of many libraries
                errors.append(error)
                break
            return _from_splits(splits, name, resolution, test_fraction, columns, progress)
        raise PolypatchError(
            f"the dataset {name} can't be loaded ({type(errors[0]).__name__}: "
            f"{_first_line(errors[0])})"
        ) from errors[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of ``datasets``, which would run through ours; its setting is put
    back afterwards."""
    from datasets.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


# ---------------------------------------------------------------------------------------------
# Splits, columns, labels
# ---------------------------------------------------------------------------------------------


def _from_splits(
    splits: Mapping[Any, Dataset],  # by name; datasets' own keys are strings or NamedSplit
    name: str,
    resolution: int | None,
    test_fraction: float,
    columns: Columns,
    progress: Progress | None,
) -> ImageData:
    train_name = "train" if "train" in splits else next(iter(splits), "")
    if not train_name or not len(splits[train_name]):
        raise PolypatchError(f"{name} has no training rows")
    train = splits[train_name]
    image, label = _choose_columns(train, name, columns)
    notes: list[str] = []
    train_values = _labels(train, label)
    test_name, test_values = "", []
    for candidate in _TEST_NAMES:
        if candidate in splits and candidate != train_name and label in splits[candidate].features:
            values = _labels(splits[candidate], label)
            if any(v is not None for v in values):  # competitions publish tests without labels
                test_name, test_values = candidate, values
                break
            notes.append(f"{candidate} has no labels and isn't used")

    classes = _class_names(train, label, train_values)
    kept = _numbered(train_values, classes)
    train_images = _images(train, image, train_name)
    rows = np.flatnonzero(kept >= 0)
    if len(rows) < len(kept):
        notes.append(f"{len(kept) - len(rows)} rows of {train_name} have no label")
    everything = Labelled(train_images, rows, kept[rows])
    if test_name:
        strangers = sorted({str(v) for v in test_values if v is not None} - set(classes))
        if strangers:
            raise PolypatchError(
                f"{name}: {test_name} has rows of class {name_some([repr(c) for c in strangers])} "
                f"but {train_name} has none"
            )
        numbers = _numbered(test_values, classes)
        tested = np.flatnonzero(numbers >= 0)
        if len(tested) < len(numbers):
            notes.append(f"{len(numbers) - len(tested)} rows of {test_name} have no label")
        absent = np.setdiff1d(numbers[tested], everything.labels)
        if len(absent):
            raise PolypatchError(
                f"{name}: {test_name} has rows of class "
                f"{name_some([repr(classes[i]) for i in absent])} but {train_name} has none"
            )
        test = Labelled(_images(splits[test_name], image, test_name), tested, numbers[tested])
        train_part = everything
    else:
        keys = [str(row) for row in rows]
        held_out = hash_split(keys, everything.labels, test_fraction=test_fraction)
        test = everything.take(held_out)
        train_part = everything.take(np.setdiff1d(np.arange(len(rows)), held_out))
    return assemble(
        name=name,
        classes=classes,
        train=train_part,
        test=test,
        resolution=resolution,
        notes=notes,
        progress=progress,
    )


def _images(dataset: Dataset, column: str, split: str) -> TableImages:
    from datasets import Image

    if column not in dataset.features:
        raise PolypatchError(f"{split} has no column {column!r}: {_listed(dataset)}")
    only = dataset.select_columns([column])
    if isinstance(only.features[column], Image):
        only = only.cast_column(column, Image(decode=False))
    return TableImages(only, column, split)


def _choose_columns(dataset: Dataset, name: str, columns: Columns) -> tuple[str, str]:
    """The image column and the label column, by name where given, else by type."""
    from datasets import ClassLabel, Image

    features = dataset.features
    for wanted in (columns.image, columns.label):
        if wanted is not None and wanted not in features:
            raise PolypatchError(
                f"{name} has no column {wanted!r}{suggest(wanted, features, kind='columns')}"
            )
    images = [
        key
        for key, feature in features.items()
        if isinstance(feature, Image)
        or (isinstance(feature, dict) and "bytes" in feature)
        or getattr(feature, "dtype", None) in ("binary", "large_binary")
    ]
    image = columns.image or _only(images, "image", name, dataset)
    others = {key: f for key, f in features.items() if key != image}
    labels = [key for key, f in others.items() if isinstance(f, ClassLabel)]
    if not labels:
        plain = [key for key, f in others.items() if _is_plain(getattr(f, "dtype", None))]
        labels = [key for key in plain if key.lower() in _LABEL_NAMES] or plain
    if len(labels) > 1 and "label" in labels:  # the name says it
        labels = ["label"]
    return image, columns.label or _only(labels, "label", name, dataset)


def _is_plain(dtype: str | None) -> bool:
    return dtype in ("string", "large_string", "bool") or str(dtype).startswith(("int", "uint"))


def _only(candidates: Sequence[str], kind: str, name: str, dataset: Dataset) -> str:
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise PolypatchError(f"{name} has no {kind} column: {_listed(dataset)}")
    raise PolypatchError(
        f"{name} has several columns that could be the {kind} ({', '.join(candidates)}): "
        f"choose one by adding ?{kind}={candidates[0]}"
    )


def _listed(dataset: Dataset) -> str:
    shown = []
    for key, feature in dataset.features.items():
        kind = getattr(feature, "dtype", None) or type(feature).__name__
        shown.append(f"{key} ({kind})")
    return f"its columns are {', '.join(shown)}"


def _labels(dataset: Dataset, column: str) -> list[Any]:
    """The labels of all rows: names where the column is a ClassLabel, else its values; None where
    there is none."""
    from datasets import ClassLabel

    feature = dataset.features[column]
    values = dataset.select_columns([column])[:][column]
    if isinstance(feature, ClassLabel):
        names = feature.names
        # -1 is the hub's sign for "not labelled".
        return [names[v] if v is not None and 0 <= v < len(names) else None for v in values]
    if any(isinstance(v, list | dict) for v in values[:1]):
        raise PolypatchError(f"the label column {column!r} holds lists, not one label for each row")
    return values


def _class_names(dataset: Dataset, column: str, values: Sequence[Any]) -> list[str]:
    from datasets import ClassLabel

    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    return [str(v) for v in sorted({v for v in values if v is not None})]


def _numbered(values: Sequence[Any], classes: Sequence[str]) -> np.ndarray:
    """Positions in ``classes``; -1 where there is no label."""
    numbers = {key: i for i, key in enumerate(classes)}
    return np.array([-1 if v is None else numbers.get(str(v), -1) for v in values], dtype=np.int64)
