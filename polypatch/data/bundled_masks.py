"""Three sources with a class for every pixel, from photographs that come with scikit-image.

The masks are derived by textbook image processing, so they are consistent rather than true: a
network learns to do in one pass, from crops, what the recipe did with the whole picture.

| source         | classes                  | recipe                                             |
|----------------|--------------------------|----------------------------------------------------|
| bundled:coins  | background, coin         | watershed on edges from dark and bright seeds      |
| bundled:cells  | stroma, nucleus, stained | colour deconvolution (Ruifrok and Johnston 2001)   |
| bundled:retina | retina, vessel           | tubeness filter (Sato et al. 1998), Otsu threshold |

Crops and the split into training and test bands are those of ``bundled:photos``
(:mod:`polypatch.data.bundled`): endless, deterministic in the seed, no pixel in both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from .base import ImageData
from .bundled import Photo, PhotoCrops, crop_layout, read_photo
from .resample import triangle_weights

__all__ = ["BUNDLED_MASKS", "MaskCrops", "load_bundled_masks"]

DEFAULT_RESOLUTION = 64


@dataclass(frozen=True, eq=False)
class MaskCrops:
    """A :class:`~polypatch.data.base.Split` of crops with a label for each pixel."""

    crops: PhotoCrops
    mask: UInt8[Tensor, "height width"]

    def __len__(self) -> int:
        return len(self.crops) // 4

    def read(
        self, indices: Int64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch 3 size size"], Int64[Tensor, "batch size size"]]:
        """RGB crops in [0, 1]; masks are read at the centres of the resized pixels."""
        images, _ = self.crops.read(indices)
        windows = self.crops.crops(indices)
        size = images.shape[-1]
        steps = (np.arange(size) + 0.5) / size
        inside = (steps * windows.side[:, None]).astype(np.int64)
        rows = torch.from_numpy(windows.top[:, None] + inside)
        columns = torch.from_numpy(windows.left[:, None] + inside)
        return images, self.mask[rows[:, :, None], columns[:, None, :]].long()


def load_bundled_masks(*, name: str, resolution: int | None, seed: int) -> ImageData:
    """One of the sources of the module's docstring.

    Raises:
        PolypatchError: a resolution for which the photograph has no room.
    """
    resolution = resolution or DEFAULT_RESOLUTION
    source = BUNDLED_MASKS[name]
    pixels = read_photo(source.photo)
    mask = source.derive(pixels).astype(np.uint8)
    layout = crop_layout([pixels.shape[:2]], resolution=resolution)
    canvas = np.zeros(
        (1, pixels.shape[0] + layout.largest, pixels.shape[1] + layout.largest, 3), dtype=np.uint8
    )
    canvas[0, : pixels.shape[0], : pixels.shape[1]] = pixels
    weights = np.stack(
        [
            triangle_weights(window=side, size=resolution, padded=layout.largest)
            for side in range(resolution, layout.largest + 1)
        ]
    )
    train, test = (
        MaskCrops(
            PhotoCrops(torch.from_numpy(canvas), torch.from_numpy(weights), layout, split, seed),
            torch.from_numpy(mask),
        )
        for split in ("train", "test")
    )
    digest = hashlib.blake2b(pixels.tobytes() + mask.tobytes(), digest_size=16)
    digest.update(repr(("masks 1", layout, seed)).encode())
    return ImageData(
        name=name,
        fingerprint=digest.hexdigest(),
        classes=source.classes,
        resolution=resolution,
        train=train,
        test=test,
        endless=True,
        task="segment",
    )


@dataclass(frozen=True)
class _Source:
    photo: Photo
    classes: tuple[str, ...]
    derive: Callable[[np.ndarray], np.ndarray]


def _coins(pixels: UInt8[np.ndarray, "height width 3"]) -> np.ndarray:
    from scipy import ndimage
    from skimage import filters, segmentation

    grey: Any = pixels[..., 0]
    seeds = np.zeros(grey.shape, dtype=np.int32)
    seeds[grey < 30], seeds[grey > 150] = 1, 2
    coins = segmentation.watershed(filters.sobel(grey), seeds) == 2
    return _without_specks(ndimage.binary_fill_holes(coins), 64)  # type: ignore[arg-type]


def _cells(pixels: UInt8[np.ndarray, "height width 3"]) -> np.ndarray:
    from skimage import color, filters

    stains: Any = filters.gaussian(color.rgb2hed(pixels), sigma=1, channel_axis=-1)
    nuclei = stains[..., 0] > filters.threshold_otsu(stains[..., 0])
    stained = stains[..., 2] > filters.threshold_otsu(stains[..., 2])
    mask = np.zeros(pixels.shape[:2], dtype=np.uint8)
    mask[_without_specks(nuclei, 16)] = 1
    mask[_without_specks(stained, 16)] = 2
    return mask


def _retina(pixels: UInt8[np.ndarray, "height width 3"]) -> np.ndarray:
    from skimage import filters

    tubes: Any = filters.sato(pixels[..., 1] / 255, sigmas=range(1, 4), black_ridges=True)
    return _without_specks(tubes > filters.threshold_otsu(tubes), 48)


def _without_specks(mask: np.ndarray, smallest: int) -> np.ndarray:
    """Connected parts of fewer than ``smallest`` pixels are dropped."""
    from scipy import ndimage

    labels: Any = ndimage.label(mask)[0]  # type: ignore[index]
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= smallest)[labels]


BUNDLED_MASKS: dict[str, _Source] = {
    "bundled:coins": _Source(
        Photo("coins", "skimage", "data/coins.png"), ("background", "coin"), _coins
    ),
    "bundled:cells": _Source(
        Photo("cells", "skimage", "data/ihc.png"), ("stroma", "nucleus", "stained"), _cells
    ),
    "bundled:retina": _Source(
        Photo("retina", "skimage", "data/retina.jpg", reduce=2, trim=(103, 103, 603, 603)),
        ("retina", "vessel"),
        _retina,
    ),
}
