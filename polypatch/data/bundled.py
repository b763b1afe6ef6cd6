"""Two image sources that need no download: their files come with scikit-image and scikit-learn.

``bundled:photos``: *which of 16 photographs does this crop come from?* A crop is a square window
whose side is drawn between the resolution and about twice the resolution (scale jitter), resized
with antialiasing. Each photograph is cut along its longer axis into bands,

    | train | gap | test | gap | train | gap | test | gap | ...

and a window lies wholly within one band, so that no pixel is in both a training and a test image.
As many bands as fit are used, which keeps train and test alike (a single cut would put the sky on
one side). The training set is endless: sample ``i`` is a pure function of the seed and ``i``, for
every ``i >= 0``. The test set is fixed, the same for every seed, 64 crops of each photograph.

``bundled:digits``: scikit-learn's 1797 handwritten digits of 8x8 pixels, enlarged bilinearly.
(Nearest-neighbour enlargement would make blocks that line up with a patch grid, a gift to some
tokenizers.) Of each class every fifth digit is a test image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64, UInt8
from torch import Tensor

from ..errors import PolypatchError
from .base import ImageData
from .resample import resample, triangle_weights
from .splits import check_indices

__all__ = [
    "BUNDLED",
    "Crops",
    "Photo",
    "PhotoCrops",
    "crop_layout",
    "load_digits",
    "load_photos",
    "read_photo",
]

GAP = 8  # source pixels between train and test bands: at least 4 after the largest reduction
TRAIN_EPOCH = 4096
TEST_SAMPLES = 1024
LARGEST_ZOOM = 2  # a window's side is at most this many times the resolution
DEFAULT_RESOLUTION = 32


@dataclass(frozen=True)
class Photo:
    """A photograph inside a wheel. ``reduce`` averages blocks of that many pixels a side (of very
    large photographs, where a window would otherwise show next to nothing); ``trim`` then keeps
    the box (left, top, right, bottom)."""

    name: str
    package: str
    file: str
    reduce: int = 1
    trim: tuple[int, int, int, int] | None = None


PHOTOS = (
    Photo("astronaut", "skimage", "data/astronaut.png"),
    Photo("brick", "skimage", "data/brick.png"),
    Photo("camera", "skimage", "data/camera.png"),
    Photo("cat", "skimage", "data/chelsea.png"),
    Photo("china", "sklearn", "datasets/images/china.jpg"),
    Photo("coffee", "skimage", "data/coffee.png"),
    Photo("coins", "skimage", "data/coins.png"),
    Photo("flower", "sklearn", "datasets/images/flower.jpg"),
    Photo("grass", "skimage", "data/grass.png"),
    Photo("gravel", "skimage", "data/gravel.png"),
    Photo("hubble", "skimage", "data/hubble_deep_field.jpg", reduce=2),
    Photo("moon", "skimage", "data/moon.png"),
    Photo("motorcycle", "skimage", "data/motorcycle_left.png"),
    # The disc without the black corners.
    Photo("retina", "skimage", "data/retina.jpg", reduce=2, trim=(103, 103, 603, 603)),
    Photo("rocket", "skimage", "data/rocket.jpg"),
    Photo("tissue", "skimage", "data/ihc.png"),
)


# ---------------------------------------------------------------------------------------------
# Where crops lie: no pixels are needed for it
# ---------------------------------------------------------------------------------------------

SplitName = Literal["train", "test"]


@dataclass(frozen=True, eq=False)
class Crops:
    """Square windows in source pixels: photograph ``photo``, rows ``top:top+side``, columns
    ``left:left+side``."""

    photo: Int64[np.ndarray, " batch"]
    top: Int64[np.ndarray, " batch"]
    left: Int64[np.ndarray, " batch"]
    side: Int64[np.ndarray, " batch"]


@dataclass(frozen=True)
class CropLayout:
    """How 16 photographs are cut into bands for one resolution; see :func:`crop_layout`."""

    sizes: tuple[tuple[int, int], ...]  # (height, width) of each photograph
    resolution: int
    largest: int  # the largest side of a window
    train: tuple[tuple[tuple[int, int], ...], ...]  # of each photograph: (start, stop) of its bands
    test: tuple[tuple[tuple[int, int], ...], ...]

    def crops(
        self, split: SplitName, indices: Int64[np.ndarray, " batch"], *, seed: int = 0
    ) -> Crops:
        """The windows of the given samples: a pure function of split, index, seed and layout.

        Training draws depend on the seed; the test set is the same for every seed.
        """
        draw = _uniform(indices, count=5, seed=seed if split == "train" else 0, stream=split)
        photos = len(self.sizes)
        if split == "train":
            photo = _scaled(draw[:, 0], photos)
        else:
            photo = indices % photos  # exactly balanced
        side = self.resolution + _scaled(draw[:, 1], self.largest - self.resolution + 1)
        bands = self.train if split == "train" else self.test
        starts, stops = _padded_table(bands)
        band = _scaled(draw[:, 2], np.array([len(b) for b in bands])[photo])
        start, stop = starts[photo, band], stops[photo, band]
        along = start + _scaled(draw[:, 3], stop - start - side + 1)
        height, width = np.array(self.sizes)[photo].T
        across = _scaled(draw[:, 4], np.minimum(height, width) - side + 1)
        wide = width >= height
        return Crops(photo, np.where(wide, across, along), np.where(wide, along, across), side)


def crop_layout(sizes: Sequence[tuple[int, int]], *, resolution: int) -> CropLayout:
    """Cut photographs of the given (height, width) into train and test bands.

    Bands run across the longer axis; 36 % of what the gaps leave is for the test. Raises
    :class:`PolypatchError` where the smallest photograph has no room for the resolution.
    """
    train, test = [], []
    for height, width in sizes:
        length = max(height, width)
        # A band that is at least twice as wide as the resolution leaves room for the jitter.
        periods = max(1, length // (6 * resolution))
        period = length // periods
        test_width = round(0.36 * (period - 2 * GAP))
        starts = [i * period for i in range(periods)]
        cut = period - 2 * GAP - test_width
        train.append(tuple((s, s + cut) for s in starts))
        test.append(tuple((s + cut + GAP, s + cut + GAP + test_width) for s in starts))
    widths = [stop - start for bands in (*train, *test) for start, stop in bands]
    room = min(*widths, *(min(size) for size in sizes))
    if room < resolution:
        single = min(round(0.36 * (max(size) - 2 * GAP)) for size in sizes)
        limit = min(single, *(min(size) for size in sizes))
        raise PolypatchError(
            f"bundled:photos has no room for crops of {resolution} pixels: "
            f"its photographs permit a resolution of at most {limit}"
        )
    largest = min(LARGEST_ZOOM * resolution, room)
    return CropLayout(tuple(sizes), resolution, largest, tuple(train), tuple(test))


def _padded_table(
    bands: Sequence[Sequence[tuple[int, int]]],
) -> tuple[Int64[np.ndarray, "photos most"], Int64[np.ndarray, "photos most"]]:
    most = max(len(b) for b in bands)
    table = np.array([[*b, *[b[-1]] * (most - len(b))] for b in bands])
    return table[..., 0], table[..., 1]


# Random numbers by counter, not by state: a hash (splitmix64's finaliser) of seed, stream, index.

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(
    indices: Int64[np.ndarray, " batch"], *, count: int, seed: int, stream: str
) -> Float64[np.ndarray, "batch {count}"]:
    """``count`` numbers in [0, 1) for each index."""
    key = hashlib.blake2b(f"{stream}:{seed}".encode(), digest_size=8).digest()
    origin = np.uint64(int.from_bytes(key, "little"))
    words = _mix(_mix(indices.astype(np.uint64) + origin) ^ origin)
    steps = np.array([(i + 1) * _GOLDEN & _WORD for i in range(count)], dtype=np.uint64)
    bits = _mix(words[:, None] + steps)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _scaled(
    draw: Float64[np.ndarray, " batch"], count: int | Int64[np.ndarray, " batch"]
) -> Int64[np.ndarray, " batch"]:
    """Whole numbers in [0, count) from numbers in [0, 1)."""
    return (draw * count).astype(np.int64)


# ---------------------------------------------------------------------------------------------
# Photographs
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PhotoCrops:
    """A :class:`~polypatch.data.base.Split` of crops from the bundled photographs.

    ``photos`` are padded on the right and below, so that the largest window may be read from every
    corner (its surplus has weight zero); ``weights[k]`` resizes a window of ``resolution + k``.
    """

    photos: UInt8[Tensor, "photos height width 3"]
    weights: Float32[Tensor, "sides size window"]
    layout: CropLayout
    split: SplitName
    seed: int

    def __len__(self) -> int:
        return TRAIN_EPOCH if self.split == "train" else TEST_SAMPLES

    def crops(self, indices: Int64[Tensor, " batch"]) -> Crops:
        """Which window of which photograph each sample shows."""
        return self.layout.crops(self.split, indices.numpy(), seed=self.seed)

    def read(
        self, indices: Int64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch 3 size size"], Int64[Tensor, " batch"]]:
        """RGB crops in [0, 1] and the number of the photograph each comes from."""
        check_indices(indices, len(self), endless=self.split == "train")
        crops = self.crops(indices)
        window = self.layout.largest
        count, height, width, channels = self.photos.shape
        # A view of every window at every place; indexing it copies only the windows asked for.
        windows = self.photos.as_strided(
            (count, height - window + 1, width - window + 1, window, window, channels),
            (*self.photos.stride()[:3], *self.photos.stride()[1:]),
        )
        labels, top, left, side = (
            torch.from_numpy(a) for a in (crops.photo, crops.top, crops.left, crops.side)
        )
        weights = self.weights[side - self.layout.resolution]
        return resample(windows[labels, top, left], weights).div_(255), labels


def load_photos(*, name: str, resolution: int | None, seed: int) -> ImageData:
    """``bundled:photos``: which of 16 photographs a crop comes from; see the module's docstring."""
    resolution = resolution or DEFAULT_RESOLUTION
    arrays = [read_photo(photo) for photo in PHOTOS]
    layout = crop_layout([a.shape[:2] for a in arrays], resolution=resolution)
    height, width = (max(sizes) + layout.largest for sizes in zip(*layout.sizes))
    photos = np.zeros((len(arrays), height, width, 3), dtype=np.uint8)
    for canvas, array in zip(photos, arrays):
        canvas[: array.shape[0], : array.shape[1]] = array
    weights = np.stack(
        [
            triangle_weights(window=side, size=resolution, padded=layout.largest)
            for side in range(resolution, layout.largest + 1)
        ]
    )
    train, test = (
        PhotoCrops(torch.from_numpy(photos), torch.from_numpy(weights), layout, split, seed)
        for split in ("train", "test")
    )
    digest = hashlib.blake2b(photos.tobytes(), digest_size=16)
    digest.update(repr(("photos 1", layout, seed, TRAIN_EPOCH, TEST_SAMPLES)).encode())
    return ImageData(
        name=name,
        fingerprint=digest.hexdigest(),
        classes=tuple(photo.name for photo in PHOTOS),
        resolution=resolution,
        train=train,
        test=test,
        endless=True,
    )


def read_photo(photo: Photo) -> UInt8[np.ndarray, "height width 3"]:
    """The photograph's pixels, reduced and trimmed.

    Raises:
        PolypatchError: its package is there without it.
    """
    from importlib.util import find_spec

    from PIL import Image

    # The file's place is looked up without importing the package, which would take a second.
    spec = find_spec(photo.package)
    path = Path(spec.origin).parent / photo.file if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        package = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[photo.package]
        raise PolypatchError(
            f"bundled:photos needs {photo.file} of the package {package}, which is not there: "
            f"run pip install --force-reinstall {package}"
        )
    with Image.open(path) as image:
        image = image.convert("RGB").reduce(photo.reduce)
        return np.array(image.crop(photo.trim) if photo.trim else image)


# ---------------------------------------------------------------------------------------------
# Digits
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DigitImages:
    """A :class:`~polypatch.data.base.Split` of 8x8 digits, enlarged as they are read."""

    pixels: UInt8[Tensor, "samples 8 8"]
    labels: Int64[Tensor, " samples"]
    weights: Float32[Tensor, "size 8"]

    def __len__(self) -> int:
        return len(self.labels)

    def read(
        self, indices: Int64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch 3 size size"], Int64[Tensor, " batch"]]:
        """White strokes on black in [0, 1], three equal channels, and the digit."""
        check_indices(indices, len(self))
        grey = resample(self.pixels[indices][..., None], self.weights[None]).div_(255)
        return grey.expand(-1, 3, -1, -1).contiguous(), self.labels[indices]


def load_digits(*, name: str, resolution: int | None, seed: int) -> ImageData:
    """``bundled:digits``: scikit-learn's handwritten digits. Nothing is drawn: ``seed`` is idle."""
    from sklearn.datasets import load_digits as sklearn_digits

    resolution = resolution or DEFAULT_RESOLUTION
    bunch: Any = sklearn_digits()
    values = np.asarray(bunch["images"])  # 0..16
    labels = np.asarray(bunch["target"]).astype(np.int64)
    pixels = np.rint(values * (255 / 16)).astype(np.uint8)
    # The n-th digit of its class, in the order of the file: every fifth is for the test.
    rank = np.zeros(len(labels), dtype=np.int64)
    for label in range(10):
        rank[labels == label] = np.arange((labels == label).sum())
    weights = torch.from_numpy(triangle_weights(window=8, size=resolution))
    train, test = (
        DigitImages(torch.from_numpy(pixels[rows]), torch.from_numpy(labels[rows]), weights)
        for rows in (rank % 5 != 4, rank % 5 == 4)
    )
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16)
    digest.update(repr(("digits 1", resolution)).encode())
    return ImageData(
        name=name,
        fingerprint=digest.hexdigest(),
        classes=tuple("0123456789"),
        resolution=resolution,
        train=train,
        test=test,
        flippable=False,
    )


BUNDLED: dict[str, Callable[..., ImageData]] = {
    "bundled:photos": load_photos,
    "bundled:digits": load_digits,
}
