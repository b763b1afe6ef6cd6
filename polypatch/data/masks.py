"""``load_masks``: images with a class for every pixel, bundled or from a folder of pairs.

A folder holds ``images/`` and ``masks/`` with files of the same stems, either directly (then a part
is held out by a hash of the names) or below ``train/`` and ``test/`` (or ``val/``). A mask is a
greyscale or palette picture whose values are class numbers; 255 marks pixels that don't count.
Names of the classes stand in ``classes.txt``, a line each, if there is one.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from ..errors import PolypatchError, suggest
from .base import ImageData
from .bundled_masks import BUNDLED_MASKS, load_bundled_masks
from .decode import SUFFIXES, Undecodable, decode_image, decode_mask
from .files import TEST_NAMES
from .splits import Progress, check_indices, hash_split, name_some

__all__ = ["IGNORED", "load_masks"]

IGNORED = -1
"""Label of pixels that count neither in the loss nor in the score (255 in mask files)."""


@dataclass(frozen=True, eq=False)
class PairSplit:
    """Images and masks in memory."""

    images: UInt8[Tensor, "samples 3 size size"]
    masks: UInt8[Tensor, "samples size size"]

    def __len__(self) -> int:
        return len(self.masks)

    def read(
        self, indices: Int64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch 3 size size"], Int64[Tensor, "batch size size"]]:
        """RGB in [0, 1], and class numbers with :data:`IGNORED`."""
        check_indices(indices, len(self))
        masks = self.masks[indices].long()
        return self.images[indices].float().div_(255), masks.masked_fill(masks == 255, IGNORED)


def load_masks(
    spec: str,
    *,
    resolution: int | None = None,
    seed: int = 0,
    test_fraction: float = 0.2,
    progress: Progress | None = None,
) -> ImageData:
    """Images with masks from where ``spec`` says; see the module's docstring.

    Args:
        resolution: side of the square images; images and masks are cut alike. Default: 64 for
            bundled sources, 128 elsewhere.

    Raises:
        PolypatchError: no such source, no pairs, masks that are no class numbers, or a mask of
            another shape than its image.
    """
    if resolution is not None and not 8 <= resolution <= 4096:
        raise PolypatchError(f"the resolution must be from 8 to 4096 pixels, not {resolution}")
    if spec.startswith("bundled:"):
        if spec not in BUNDLED_MASKS:
            raise PolypatchError(
                f"there are no bundled masks {spec!r}{suggest(spec, BUNDLED_MASKS, kind='sources')}"
            )
        return load_bundled_masks(name=spec, resolution=resolution, seed=seed)
    root = Path(spec).expanduser()
    if not root.is_dir():
        raise PolypatchError(
            f"there is no folder {spec}; masks come from bundled:coins, bundled:cells, "
            "bundled:retina, or a folder with images/ and masks/"
        )
    resolution = resolution or 128
    parts = _parts(root, spec, test_fraction)
    notes: list[str] = []
    total = sum(len(pairs) for pairs in parts.values())
    splits, seen = {}, 0
    for part, pairs in parts.items():
        splits[part], left_out = _read(pairs, resolution, progress, seen, total)
        seen += len(pairs)
        if left_out:
            notes.append(f"{len(left_out)} {part} pairs left out: {name_some(left_out)}")
        if not len(splits[part]):
            raise PolypatchError(f"{spec} has no usable {part} pairs; {notes[-1]}")
    masks = torch.cat([split.masks.flatten() for split in splits.values()])
    present = torch.bincount(masks, minlength=256)[:255].nonzero().flatten().tolist()
    if not present:
        raise PolypatchError(f"every pixel of the masks in {spec} is 255, which means ignored")
    classes = _names(root, 1 + max(present))
    absent = [name for number, name in enumerate(classes) if number not in present]
    if absent:
        notes.append(f"no pixel of {name_some(absent)}")
    digest = hashlib.blake2b(digest_size=16)
    for split in splits.values():
        digest.update(split.images.numpy().tobytes())
        digest.update(split.masks.numpy().tobytes())
    return ImageData(
        name=spec,
        fingerprint=digest.hexdigest(),
        classes=classes,
        resolution=resolution,
        train=splits["train"],
        test=splits["test"],
        notes=tuple(notes),
        task="segment",
    )


Pair = tuple[Path, Path]


def _parts(root: Path, spec: str, test_fraction: float) -> dict[str, list[Pair]]:
    """Pairs of the training and of the test part."""
    if (root / "train").is_dir():
        held_out = next((root / n for n in TEST_NAMES if (root / n).is_dir()), None)
        pairs = _pairs(root / "train", spec)
        if held_out is not None:
            return {"train": pairs, "test": _pairs(held_out, spec)}
    else:
        pairs = _pairs(root, spec)
    if len(pairs) < 2:
        raise PolypatchError(f"{spec} has one pair only; training and test need one each")
    keys = [unicodedata.normalize("NFC", image.stem) for image, _ in pairs]
    test = set(
        hash_split(keys, np.zeros(len(pairs), np.int64), test_fraction=test_fraction).tolist()
    )
    return {
        "train": [pair for k, pair in enumerate(pairs) if k not in test],
        "test": [pair for k, pair in enumerate(pairs) if k in test],
    }


def _pairs(folder: Path, spec: str) -> list[Pair]:
    images, masks = folder / "images", folder / "masks"
    if not (images.is_dir() and masks.is_dir()):
        raise PolypatchError(f"{folder} needs a folder images/ and a folder masks/ beside it")
    by_stem = {p.stem: p for p in sorted(masks.iterdir()) if p.suffix.lower() in SUFFIXES}
    found = [p for p in sorted(images.iterdir()) if p.suffix.lower() in SUFFIXES]
    lonely = [p.name for p in found if p.stem not in by_stem]
    if lonely:
        raise PolypatchError(f"{masks} has no mask for {name_some(lonely)}")
    if not found:
        raise PolypatchError(f"there are no images in {images}")
    return [(p, by_stem[p.stem]) for p in found]


def _read(
    pairs: Sequence[Pair], resolution: int, progress: Progress | None, before: int, total: int
) -> tuple[PairSplit, list[str]]:
    """Decode all pairs, in threads; and what was left out, with the reason."""
    images = torch.empty((len(pairs), 3, resolution, resolution), dtype=torch.uint8)
    masks = torch.empty((len(pairs), resolution, resolution), dtype=torch.uint8)
    good: list[int] = []
    left_out: list[str] = []
    with ThreadPoolExecutor() as pool:
        for k, result in enumerate(pool.map(partial(_decode, resolution=resolution), pairs)):
            if isinstance(result, str):
                left_out.append(f"{pairs[k][0].name} ({result})")
            else:
                images[k], masks[k] = (torch.from_numpy(a) for a in result)
                good.append(k)
            if progress is not None:
                progress(before + k + 1, total, "decoding images and masks")
    return PairSplit(images[good], masks[good]), left_out


def _decode(pair: Pair, *, resolution: int) -> tuple[np.ndarray, np.ndarray] | str:
    image, mask = pair
    try:
        pixels = decode_image(image, name=str(image), resolution=resolution)
        labels = decode_mask(mask, name=str(mask), resolution=resolution, beside=image)
    except Undecodable as error:
        return str(error)
    return np.ascontiguousarray(pixels), labels


def _names(root: Path, count: int) -> tuple[str, ...]:
    file = root / "classes.txt"
    if not file.is_file():
        return tuple(str(number) for number in range(count))
    names = tuple(file.read_text(encoding="utf-8").split("\n"))
    names = tuple(name.strip() for name in names if name.strip())
    if len(names) < count:
        raise PolypatchError(
            f"{file} names {len(names)} classes, but the masks have class {count - 1}"
        )
    return names
