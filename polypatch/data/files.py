"""A folder of class folders, as an :class:`~polypatch.data.base.ImageData`.

Two layouts: ``train/`` and one of ``test/``, ``val/``, ``valid/``, ``validation/`` with a folder of
each class in both; or the class folders directly, which are then split by a hash of each file's
path relative to the folder (the same on every machine). Images may lie deeper inside a class's
folder. Hidden files and folders are passed over; links are followed, but not round in circles.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import PolypatchError
from .base import ImageData
from .decode import SUFFIXES, Source
from .splits import Labelled, Progress, assemble, hash_split, name_some

__all__ = ["TEST_NAMES", "FileImages", "load_folder"]

TEST_NAMES = ("test", "val", "valid", "validation")  # the first that is there is taken
_IGNORED = frozenset(("__MACOSX", "@eaDir", "lost+found"))


@dataclass(frozen=True)
class FileImages:
    """Image files below a folder, by their paths relative to it."""

    root: Path
    paths: tuple[str, ...]

    def fetch(self, rows: Sequence[int]) -> list[Source | None]:
        return [self.root / self.paths[row] for row in rows]

    def describe(self, row: int) -> str:
        return self.paths[row]

    def identity(self) -> str:
        facts = []
        for path in self.paths:
            try:
                stat = (self.root / path).stat()
            except OSError:  # a broken link: it is among the skipped
                continue
            facts.append((path, stat.st_size, stat.st_mtime_ns))
        return repr(facts)


def load_folder(
    root: Path,
    *,
    name: str,
    resolution: int | None,
    test_fraction: float,
    progress: Progress | None = None,
) -> ImageData:
    """Read class folders below ``root``; see the module's docstring.

    Raises :class:`PolypatchError`: no class folders, fewer than two classes with images, a class
    that only the test part has, a file or folder without permission to read it.
    """
    folders = {path.name.casefold(): path for path in _visible_folders(root)}
    held_out = [n for n in TEST_NAMES if n in folders]
    if "train" not in folders and folders and len(held_out) == len(folders):
        raise PolypatchError(
            f"{name} has {name_some([n + '/' for n in held_out])} but no train/: "
            f"put the training images' class folders into train/"
        )
    if "train" not in folders:
        return _load_undivided(root, [], name, resolution, test_fraction, progress)
    notes = []
    used = {"train", *held_out[:1]}
    if unused := sorted(path.name + "/" for key, path in folders.items() if key not in used):
        beside = f"train/ and {held_out[0]}/" if held_out else "train/"
        notes.append(f"only {beside} are read, not {name_some(unused)}")
    if not held_out:
        notes.append(f"no test/ or val/ beside train/: {test_fraction:.0%} of train/ is held out")
        return _load_undivided(folders["train"], notes, name, resolution, test_fraction, progress)

    classes, train_files = _class_files(folders["train"], name=f"{name} (train/)")
    test_classes, test_files = _class_files(folders[held_out[0]], name=f"{name} ({held_out[0]}/)")
    numbers = {key: i for i, key in enumerate(classes)}
    with_images = {classes[label] for label in train_files[1]}
    strangers = sorted({test_classes[label] for label in test_files[1]} - with_images)
    if strangers:
        raise PolypatchError(
            f"{name}: {held_out[0]}/ has images of class {name_some([repr(c) for c in strangers])}"
            f" but train/ has none; the training images have {name_some(sorted(with_images))}"
        )
    # Names in messages are relative to the root, so that they say which part a file is in.
    paths = [f"{folders['train'].name}/{p}" for p in train_files[0]]
    paths += [f"{folders[held_out[0]].name}/{p}" for p in test_files[0]]
    images = FileImages(root, tuple(paths))
    rows = np.arange(len(paths))
    cut = len(train_files[0])
    return assemble(
        name=name,
        classes=classes,
        train=Labelled(images, rows[:cut], np.array(train_files[1], dtype=np.int64)),
        test=Labelled(
            images,
            rows[cut:],
            np.array([numbers[test_classes[i]] for i in test_files[1]], dtype=np.int64),
        ),
        resolution=resolution,
        notes=notes,
        progress=progress,
    )


def _load_undivided(
    root: Path,
    notes: list[str],
    name: str,
    resolution: int | None,
    test_fraction: float,
    progress: Progress | None,
) -> ImageData:
    classes, (paths, labels) = _class_files(root, name=name)
    images = FileImages(root, tuple(paths))
    everything = Labelled(images, np.arange(len(paths)), np.array(labels, dtype=np.int64))
    # One Unicode form, or a folder copied from a Mac would be split in another way.
    keys = [unicodedata.normalize("NFC", path) for path in paths]
    test = hash_split(keys, everything.labels, test_fraction=test_fraction)
    train = np.setdiff1d(np.arange(len(paths)), test)
    return assemble(
        name=name,
        classes=classes,
        train=everything.take(train),
        test=everything.take(test),
        resolution=resolution,
        notes=notes,
        progress=progress,
    )


def _class_files(root: Path, *, name: str) -> tuple[list[str], tuple[list[str], list[int]]]:
    """The class folders below ``root`` and, of every image, its path below root and its label."""
    folders = _visible_folders(root)
    if not folders:
        images = sum(_is_image(entry) for entry in _entries(root))
        raise PolypatchError(
            f"{name} has no class folders ({images} images lie in it directly): "
            f"put the images of each class into a folder named after it"
            if images
            else f"{name} has no class folders: it should hold one folder of images for each class"
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = sorted(_images_below(folder, ()))
        paths += [path.relative_to(root).as_posix() for path in found]
        labels += [label] * len(found)
    if len(set(labels)) < 2:
        empty = [repr(f.name) for i, f in enumerate(folders) if i not in labels]
        having = [repr(f.name) for i, f in enumerate(folders) if i in labels]
        raise PolypatchError(
            f"{name}: at least two class folders with images are needed, "
            f"found {name_some(having) or 'none'}"
            + (f" (without images: {name_some(empty)})" if empty else "")
        )
    return [folder.name for folder in folders], (paths, labels)


def _visible_folders(root: Path) -> list[Path]:
    return sorted(Path(e.path) for e in _entries(root) if e.is_dir())


def _images_below(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Image files at any depth. ``above`` identifies the folders on the way here: a link to one of
    them is a circle and isn't followed."""
    stat = folder.stat()
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _images_below(Path(entry.path), (*above, here))
        elif _is_image(entry):
            # A broken link is kept: decoding names it among the skipped.
            if entry.is_file() and not os.access(entry.path, os.R_OK):
                raise PolypatchError(
                    f"{entry.path} can't be read (permission denied): "
                    f"make it readable or take it away"
                )
            yield Path(entry.path)


def _is_image(entry: os.DirEntry[str]) -> bool:
    return Path(entry.name).suffix.lower() in SUFFIXES


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return [
                entry
                for entry in found
                if not entry.name.startswith(".") and entry.name not in _IGNORED
            ]
    except PermissionError as error:
        raise PolypatchError(
            f"the folder {folder} can't be read (permission denied): make it readable"
        ) from error
