"""``load_images``: from what a user writes after ``--data`` to an ``ImageData``."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from urllib.parse import parse_qsl

from ..errors import PolypatchError, suggest
from .base import ImageData
from .bundled import BUNDLED
from .files import load_folder
from .splits import Progress
from .tables import Columns, load_hub, load_parquet, parquet_files

__all__ = ["load_images"]

FORMS = (
    "bundled:photos, bundled:digits, a folder of class folders, a .parquet file, "
    "a folder with train*.parquet and test*.parquet, or hub:owner/name"
)


def load_images(
    spec: str,
    *,
    resolution: int | None = None,
    seed: int = 0,
    test_fraction: float = 0.2,
    progress: Progress | None = None,
) -> ImageData:
    """Labelled images from where ``spec`` says.

    - ``bundled:photos``, ``bundled:digits``: nothing to download, see
      :mod:`polypatch.data.bundled`;
    - a folder of class folders, with or without ``train/`` and ``test/`` above them;
    - a ``.parquet`` file or a folder with ``train*.parquet`` and ``test*.parquet``;
    - ``hub:owner/name``, ``hub:owner/name/configuration``: a dataset of the Hugging Face hub.

    Tables take ``?image=COLUMN&label=COLUMN`` at the end where the columns aren't plain to see.

    ``resolution``: side of the square images in pixels, 8 to 4096. None: 32 for bundled sources;
    elsewhere what suits the images (median shorter side, a multiple of 16 within 32..224).
    ``seed`` changes the crops of ``bundled:photos`` and nothing else. ``test_fraction`` is the part
    of each class that is held out where the source has no test images of its own. ``progress`` is
    called with (done, total, what). Raises :class:`PolypatchError` with one sentence for everything
    the caller can mend; images that can't be decoded are skipped and named in ``notes``.
    """
    if resolution is not None and not 8 <= resolution <= 4096:
        raise PolypatchError(f"the resolution must be from 8 to 4096 pixels, not {resolution}")
    if not 0 < test_fraction < 1:
        raise PolypatchError(f"the test fraction must be between 0 and 1, not {test_fraction}")
    if spec.startswith("bundled:"):
        if spec not in BUNDLED:
            # Compared without the prefix, which would make everything look alike.
            sample = spec.removeprefix("bundled:")
            samples = [key.removeprefix("bundled:") for key in BUNDLED]
            hint = suggest(sample, samples, kind="samples")
            raise PolypatchError(f"there is no bundled sample {sample!r}{hint}")
        return BUNDLED[spec](name=spec, resolution=resolution, seed=seed)

    place, columns = _split_columns(spec)
    if place.startswith("hub:"):
        return load_hub(
            place.removeprefix("hub:"),
            name=place,
            resolution=resolution,
            test_fraction=test_fraction,
            columns=columns,
            progress=progress,
        )
    path = Path(place).expanduser()
    try:
        missing = not place.strip() or not path.exists()
    except OSError as error:  # no permission to look, or a name too long for the file system
        raise PolypatchError(f"{place} can't be looked up ({error.strerror})") from error
    if missing:
        raise _not_found(place, path)
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise PolypatchError(f"{place} is a file but not a .parquet file; known forms: {FORMS}")
        files = {"train": [str(path)]}
    else:
        files = parquet_files(path)
    if files:
        return load_parquet(
            files,
            name=place,
            resolution=resolution,
            test_fraction=test_fraction,
            columns=columns,
            progress=progress,
        )
    return load_folder(
        path,
        name=place,
        resolution=resolution,
        test_fraction=test_fraction,
        progress=progress,
    )


def _split_columns(spec: str) -> tuple[str, Columns]:
    """Cut ``?image=..&label=..`` off; a question mark in a file's name is left alone."""
    place, mark, query = spec.rpartition("?")
    if not mark or not re.match(r"(image|label)=", query):
        return spec, Columns()
    named = dict(parse_qsl(query, keep_blank_values=True))
    for key in named:
        if key not in ("image", "label"):
            hint = suggest(key, ("image", "label"), kind="options")
            raise PolypatchError(f"{spec!r}: unknown option {key!r}{hint}")
    return place, Columns(image=named.get("image"), label=named.get("label"))


def _not_found(place: str, path: Path) -> PolypatchError:
    # The deepest folder that exists is where the name went wrong.
    existing, wrong = path.parent, path.name
    while not existing.is_dir() and existing != existing.parent:
        existing, wrong = existing.parent, existing.name
    try:
        neighbours = [p.name for p in existing.iterdir() if not p.name.startswith(".")]
    except OSError:
        neighbours = []
    near = difflib.get_close_matches(wrong, neighbours, n=1, cutoff=0.55)
    if re.search(r"[\\/~]", place) and not re.match(r"\w\w+:", place):
        hint = f"; did you mean {existing / near[0]}?" if near else ""
        return PolypatchError(f"there is no {place} (no {wrong!r} in {existing}){hint}")
    forms = [*BUNDLED, *(f"hub:{n}" for n in ("cifar10", "cifar100", "mnist")), *neighbours]
    near = difflib.get_close_matches(place, forms, n=1, cutoff=0.55)
    hint = f"; did you mean {near[0]}?" if near and place else ""
    return PolypatchError(
        f"{place!r} is no file, folder or known source{hint}; known forms: {FORMS}"
    )
