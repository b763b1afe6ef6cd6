"""From a list of encoded images with labels to an :class:`~polypatch.data.base.ImageData`.

Where the whole set fits in memory as bytes (1.5 GiB) every image is decoded once, at load time, in
threads: broken ones are found and named before any training starts. A larger set is decoded as it
is read; then only the headers are looked at when it is loaded, and an image that turns out broken
later is replaced by the next good one, with a warning: a run never dies from one bad file.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from ..errors import PolypatchError
from .base import ImageData, Split
from .decode import Source, Undecodable, decode_image, image_size

__all__ = [
    "EncodedImages",
    "Labelled",
    "Progress",
    "assemble",
    "check_indices",
    "hash_split",
    "name_some",
]

MEMORY_LIMIT = 3 * 2**29  # bytes of decoded images that are kept in memory
_CHUNK = 64  # images that a thread takes at once: single small images would drown in overhead

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is being done)."""


@runtime_checkable
class EncodedImages(Protocol):
    """Images that aren't decoded yet, by row number."""

    def fetch(self, rows: Sequence[int]) -> list[Source | None]:
        """The files, or their bytes; None where a row has no image. Called from several threads."""
        ...

    def describe(self, row: int) -> str:
        """The image's name in messages."""
        ...

    def identity(self) -> str:
        """Changes when the images change; cheap (names, sizes, times), not the content."""
        ...


@dataclass(frozen=True, eq=False)
class Labelled:
    """Some rows of some images, with labels."""

    images: EncodedImages
    rows: Int64[np.ndarray, " samples"]
    labels: Int64[np.ndarray, " samples"]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, which: np.ndarray) -> Labelled:
        """The samples that a mask or positions choose."""
        return Labelled(self.images, self.rows[which], self.labels[which])


def check_indices(indices: Int64[Tensor, " batch"], length: int, *, endless: bool = False) -> None:
    """Raise an IndexError for an index that names no sample."""
    if len(indices) and (indices.min() < 0 or (not endless and indices.max() >= length)):
        limit = "0 or more" if endless else f"0 to {length - 1}"
        raise IndexError(
            f"sample indices must be {limit}, got {int(indices.min())} to {int(indices.max())}"
        )


def hash_split(
    keys: Sequence[str], labels: Int64[np.ndarray, " samples"], *, test_fraction: float
) -> Int64[np.ndarray, " tested"]:
    """Positions of the test samples: of each class, those whose keys have the smallest hashes.

    Stratified, and independent of the order, the platform and any seed. A class of two or more has
    at least one sample on each side; a class of one is for training.
    """
    digests = [hashlib.blake2b(key.encode(errors="surrogateescape")).digest() for key in keys]
    test: list[int] = []
    for label in np.unique(labels):
        members = sorted(np.flatnonzero(labels == label).tolist(), key=lambda i: digests[i])
        count = min(max(1, round(len(members) * test_fraction)), len(members) - 1)
        test.extend(members[:count])
    return np.array(sorted(test), dtype=np.int64)


def name_some(names: Sequence[str], most: int = 10) -> str:
    """A list for a sentence: the first few, and how many more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


# ---------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StoredSplit:
    """Images kept decoded in memory. ``rows[i]`` is where sample ``i`` is stored."""

    pixels: UInt8[Tensor, "stored 3 size size"]
    rows: Int64[Tensor, " samples"]
    labels: Int64[Tensor, " samples"]

    def __len__(self) -> int:
        return len(self.labels)

    def read(
        self, indices: Int64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch 3 size size"], Int64[Tensor, " batch"]]:
        """RGB in [0, 1] and labels."""
        check_indices(indices, len(self))
        return self.pixels[self.rows[indices]].float().div_(255), self.labels[indices]


@dataclass(frozen=True, eq=False)
class OnDemandSplit:
    """Images that are decoded as they are read."""

    samples: Labelled
    resolution: int

    def __len__(self) -> int:
        return len(self.samples)

    def read(
        self, indices: Int64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch 3 size size"], Int64[Tensor, " batch"]]:
        """RGB in [0, 1] and labels. A sample that can't be decoded is replaced by the next one that
        can, with its label: still a function of the index (and the files) alone."""
        check_indices(indices, len(self))
        positions = indices.tolist()
        pixels = torch.empty((len(positions), 3, self.resolution, self.resolution))
        labels = torch.empty(len(positions), dtype=torch.int64)
        with ThreadPoolExecutor(_threads()) as pool:
            for i, (image, label) in enumerate(pool.map(self._one, positions)):
                pixels[i] = torch.from_numpy(image)
                labels[i] = label
        return pixels.div_(255), labels

    def _one(self, position: int) -> tuple[UInt8[np.ndarray, "3 size size"], int]:
        reason: Exception | None = None
        for step in range(len(self)):
            at = (position + step) % len(self)
            row = int(self.samples.rows[at])
            name = self.samples.images.describe(row)
            try:
                source = self.samples.images.fetch([row])[0]
                image = _decode(source, name, self.resolution)
            except (Undecodable, PolypatchError, OSError) as error:
                reason = error
                warnings.warn(f"{name} is replaced by the next image: {error}", stacklevel=2)
                continue
            return image, int(self.samples.labels[at])
        raise PolypatchError(f"none of {len(self)} images can be decoded any more ({reason})")


def _decode(source: Source | None, name: str, resolution: int) -> np.ndarray:
    if source is None:
        raise Undecodable("no image in this row")
    return np.ascontiguousarray(decode_image(source, name=name, resolution=resolution))


def _threads() -> int:
    try:
        return min(16, len(os.sched_getaffinity(0)))
    except AttributeError:  # not Linux
        return min(16, os.cpu_count() or 1)


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


def assemble(
    *,
    name: str,
    classes: list[str],
    train: Labelled,
    test: Labelled,
    resolution: int | None,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> ImageData:
    """Decode (or check) every image, leave out what is broken, and say so in the notes.

    Labels number ``classes``; a class without a usable training image is left out. Raises
    :class:`PolypatchError` where fewer than two classes or no test image remain.
    """
    notes = list(notes)
    if resolution is None:
        resolution = _usual_resolution(train)
    in_memory = (len(train) + len(test)) * 3 * resolution**2 <= MEMORY_LIMIT
    stored: dict[str, Tensor] = {}
    good: dict[str, np.ndarray] = {}
    total = len(train) + len(test)
    for split, samples, before in (("train", train, 0), ("test", test, len(train))):
        work = _decoded(samples, resolution) if in_memory else _checked(samples)
        pixels = torch.empty(
            (len(samples) if in_memory else 0, 3, resolution, resolution), dtype=torch.uint8
        )
        target = pixels.numpy()
        failed: dict[int, str] = {}
        position = 0
        for chunk in work:
            for result in chunk:
                if isinstance(result, str):
                    failed[position] = result
                elif in_memory:
                    target[position] = result
                position += 1
            if progress is not None:
                doing = "decoding images" if in_memory else "checking images"
                progress(before + position, total, doing)
        stored[split] = pixels
        good[split] = np.array([i for i in range(len(samples)) if i not in failed], dtype=np.int64)
        if failed:
            named = [
                f"{samples.images.describe(int(samples.rows[i]))} ({reason})"
                for i, reason in failed.items()
            ]
            notes.append(
                f"{len(failed)} of {len(samples)} {split} images can't be decoded and are skipped: "
                f"{name_some(named)}"
            )

    # Classes that have lost every training image (or never had one) go, with their test images.
    present = np.unique(train.labels[good["train"]])
    absent = [c for i, c in enumerate(classes) if i not in present]
    if len(present) < 2:
        have = name_some([repr(classes[i]) for i in present]) or "none"
        why = f"; {notes[-1]}" if notes else ""
        raise PolypatchError(
            f"{name}: at least two classes with training images are needed, found {have}"
            + (f" (without images: {name_some([repr(c) for c in absent])})" if absent else "")
            + why
        )
    if absent:
        notes.append(
            f"left out for want of training images: class {name_some([repr(c) for c in absent])}"
        )
    good["test"] = good["test"][np.isin(test.labels[good["test"]], present)]
    if not len(good["test"]):
        raise PolypatchError(
            f"{name}: there are no usable test images" + "".join(f"; {note}" for note in notes[-1:])
        )
    kept = [classes[i] for i in present]
    untested = set(present.tolist()) - set(test.labels[good["test"]].tolist())
    if untested:
        missing = [repr(classes[i]) for i in sorted(untested)]
        notes.append(f"no test images for class {name_some(missing)}")

    digest = hashlib.blake2b(repr((kept, resolution)).encode(), digest_size=16)
    splits: list[Split] = []
    for split, samples in (("train", train), ("test", test)):
        chosen = samples.take(good[split])
        labels = np.searchsorted(present, chosen.labels)
        digest.update(labels.tobytes())
        if in_memory:
            # What the samples are, not what the files are called: a moved folder is the same data.
            for i in good[split]:
                digest.update(stored[split][i].numpy().data)
            rows = torch.from_numpy(good[split])
            splits.append(StoredSplit(stored[split], rows, torch.from_numpy(labels)))
        else:
            digest.update(chosen.images.identity().encode(errors="surrogateescape"))
            digest.update(chosen.rows.tobytes())
            splits.append(OnDemandSplit(Labelled(chosen.images, chosen.rows, labels), resolution))
    return ImageData(
        name=name,
        fingerprint=digest.hexdigest(),
        classes=tuple(kept),
        resolution=resolution,
        train=splits[0],
        test=splits[1],
        notes=tuple(notes),
    )


def _in_chunks(
    samples: Labelled, work: Callable[[Source, str], np.ndarray | None]
) -> Iterator[list[np.ndarray | str | None]]:
    """Apply ``work`` to every image in threads; chunk by chunk, in order. A str is a failure."""

    def chunk(start: int) -> list[np.ndarray | str | None]:
        rows = samples.rows[start : start + _CHUNK].tolist()
        results: list[np.ndarray | str | None] = []
        for row, source in zip(rows, samples.images.fetch(rows)):
            try:
                if source is None:
                    raise Undecodable("no image in this row")
                results.append(work(source, samples.images.describe(row)))
            except Undecodable as error:
                results.append(str(error))
        return results

    # Only so many chunks are under way at once: results wait in memory until they are taken.
    starts = range(0, len(samples), _CHUNK)
    threads = 1 if _are_small(samples) else _threads()
    with ThreadPoolExecutor(threads) as pool:
        ahead = 4 * threads
        for first in range(0, len(starts), ahead):
            yield from pool.map(chunk, starts[first : first + ahead])


def _are_small(samples: Labelled) -> bool:
    """Whether the first images take under 10 kB encoded. Then Python's lock is what is waited for,
    and two threads are slower than one (CIFAR-10: 158 against 95 µs an image)."""
    sizes = []
    for source in samples.images.fetch(samples.rows[:16].tolist()):
        if isinstance(source, bytes):
            sizes.append(len(source))
        elif source is not None and source.is_file():
            sizes.append(source.stat().st_size)
    return sum(sizes) < 10_000 * len(sizes)


def _decoded(samples: Labelled, resolution: int) -> Iterator[list[np.ndarray | str | None]]:
    return _in_chunks(samples, lambda source, name: _decode(source, name, resolution))


def _checked(samples: Labelled) -> Iterator[list[np.ndarray | str | None]]:
    def check(source: Source, name: str) -> None:
        image_size(source, name=name)

    return _in_chunks(samples, check)


def _usual_resolution(samples: Labelled) -> int:
    """A resolution that suits the images, where the caller names none: the median shorter side of
    up to 64 of them, down to a multiple of 16, within 32..224."""
    count = min(64, len(samples))
    sides = []
    rows = samples.rows[np.arange(count) * len(samples) // max(count, 1)].tolist()
    for row, source in zip(rows, samples.images.fetch(rows)):
        try:
            if source is not None:
                sides.append(min(image_size(source, name=samples.images.describe(row))))
        except Undecodable:
            continue
    median = int(np.median(sides)) if sides else 32
    return min(max(median // 16 * 16, 32), 224)
