"""One encoded image (a file, or the bytes of one) → one square of RGB bytes.

What is done to a picture, in this order:

1. only the first frame of an animation or of a multi-page file is used;
2. the camera's EXIF orientation is applied;
3. it becomes 8-bit RGB: grey is repeated, palettes and CMYK are converted, transparent pixels are
   laid over **white**, 16-bit greys are divided by 257 (0..65535 → 0..255, never stretched to the
   image's own range), floating-point greys must lie in [0, 1];
4. the shorter side is resized to the resolution (bicubic, antialiased) and the centre is cut out.

Pillow decodes large JPEG files at a half, quarter or eighth of their size where that still leaves
twice the resolution.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from ..errors import PolypatchError

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "SUFFIXES",
    "Undecodable",
    "decode_clip",
    "decode_image",
    "decode_mask",
    "decode_whole",
    "image_size",
]

SUFFIXES = frozenset(
    (
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
        *(".ppm", ".pgm", ".pbm", ".pnm"),
    )
)
# Formats are named, so that a file which only claims to be a picture can't reach Pillow's rarer
# readers (PostScript would be handed to an interpreter).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

Source = bytes | Path


class Undecodable(Exception):
    """This picture can't be used; the message is the reason, a few words. The others still can."""


def decode_image(
    source: Source,
    *,
    name: str,
    resolution: int,
    crop: float = 1.0,
    interpolation: str = "bicubic",
) -> UInt8[np.ndarray, "3 resolution resolution"]:
    """Decode, turn upright, convert, resize and crop; ``name`` is for messages.

    ``crop`` is the part of the shorter side that is kept (authors evaluate on 0.875 of it and the
    like); ``interpolation`` is ``"bicubic"``, ``"bilinear"`` or ``"nearest"``.

    Raises :class:`Undecodable` where the picture is broken, and :class:`PolypatchError` where
    going on without it would be wrong: no permission to read it, or a decompression bomb.
    """
    with _opened(source, name) as image:
        if image.format == "JPEG":
            scale = 2 * resolution / crop / min(image.size)
            if scale < 1:
                wanted = (round(image.width * scale), round(image.height * scale))
                image.draft(None, wanted)  # type: ignore[arg-type]  # None: keep the mode
        image.load()
        upright = _rgb(_upright(image))
        return _square(upright, resolution, crop, interpolation).transpose(2, 0, 1)


def decode_clip(
    source: Source,
    *,
    name: str,
    frames: int,
    resolution: int,
    crop: float = 1.0,
    interpolation: str = "bicubic",
) -> UInt8[np.ndarray, "3 {frames} resolution resolution"]:
    """``frames`` frames, evenly spaced, of an animation (GIF, WebP, APNG, TIFF), each treated as
    :func:`decode_image` treats a picture; a still picture is repeated. Raises the same."""
    with _opened(source, name) as image:
        count = getattr(image, "n_frames", 1)
        chosen = np.linspace(0, count - 1, frames).round().astype(int).tolist()
        decoded: dict[int, np.ndarray] = {}
        for number in sorted(set(chosen)):
            image.seek(number)
            image.load()
            decoded[number] = _square(_rgb(_upright(image)), resolution, crop, interpolation)
    return np.stack([decoded[number] for number in chosen]).transpose(3, 0, 1, 2)


def decode_whole(source: Source, *, name: str) -> UInt8[np.ndarray, "3 height width"]:
    """Decode, turn upright and convert, at the image's own size. Raises as :func:`decode_image`."""
    with _opened(source, name) as image:
        image.load()
        return np.asarray(_rgb(_upright(image))).transpose(2, 0, 1)


def decode_mask(
    source: Source, *, name: str, resolution: int, beside: Source | None = None
) -> UInt8[np.ndarray, "resolution resolution"]:
    """Class numbers of a mask, cut and resized as :func:`decode_image` does it, without mixing.

    ``beside``: the image, whose size the mask must have. Raises as :func:`decode_image`, and
    :class:`PolypatchError` for colours, which don't say which class they stand for.
    """
    with _opened(source, name) as mask:
        mask.load()
        if mask.mode not in ("L", "P", "1", "I;16", "I"):
            raise PolypatchError(
                f"{name} is a colour picture ({mask.mode}); a mask holds class numbers, one "
                "channel of whole numbers"
            )
        if beside is not None and image_size(beside, name=name) != mask.size:
            raise Undecodable(f"the mask has {mask.size[0]}×{mask.size[1]} pixels, not the image's")
        values = np.asarray(mask)
        if values.max(initial=0) > 255:
            raise PolypatchError(
                f"{name} has class {values.max()}; 254 is the largest there can be"
            )
    side = min(values.shape)
    top, left = (values.shape[0] - side) // 2, (values.shape[1] - side) // 2
    places = ((np.arange(resolution) + 0.5) * side / resolution).astype(np.int64)
    picked = values[top + places[:, None], left + places[None, :]]
    return np.ascontiguousarray(picked.astype(np.uint8))


def image_size(source: Source, *, name: str) -> tuple[int, int]:
    """(width, height) from the header alone, before orientation. Raises as :func:`decode_image`."""
    with _opened(source, name) as image:
        return image.size


@contextmanager
def _opened(source: Source, name: str) -> Iterator[Image.Image]:
    """Open an image; whatever Pillow raises, then or inside the block, becomes one of our two."""
    from PIL import Image

    try:
        if source == b"":
            raise Undecodable("empty")
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=_FORMATS) as image:
            yield image
    except (Undecodable, PolypatchError):
        raise
    except Exception as error:
        raise _translated(error, source, name) from error


def _translated(error: Exception, source: Source, name: str) -> Undecodable | PolypatchError:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, PermissionError):
        return PolypatchError(
            f"{name} can't be read (permission denied): make it readable or take it away"
        )
    if isinstance(error, Image.DecompressionBombError):
        return PolypatchError(
            f"{name} has more pixels than Pillow deems safe (a decompression bomb?): "
            f"shrink it, take it away, or raise PIL.Image.MAX_IMAGE_PIXELS"
        )
    if isinstance(error, FileNotFoundError):
        return Undecodable("no such file, or a broken link")
    if isinstance(error, UnidentifiedImageError):
        empty = isinstance(source, Path) and source.stat().st_size == 0
        return Undecodable("empty" if empty else "not an image")
    # Broken pictures raise whatever the decoder stumbles over: OSError, SyntaxError, ValueError,
    # struct.error, zlib.error, IndexError, ...
    text = str(error).strip().split("\n")[0]
    if "truncated" in text.lower():
        return Undecodable("truncated")
    return Undecodable(text[:80] or type(error).__name__)


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # Broken metadata of whatever kind; the pixels have been decoded already.
        return image


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode.startswith("I"):  # I;16, I;16B, I;16L, and I (32 bits) for 16-bit files of old Pillows
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise Undecodable("floating-point values outside [0, 1]")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _square(
    image: Image.Image, resolution: int, crop: float, interpolation: str
) -> UInt8[np.ndarray, "resolution resolution 3"]:
    """The centre of the image; the same as resizing the shorter side and cutting, in one step."""
    from PIL import Image

    side = min(image.size) * crop
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if crop == 1.0:  # whole pixels, as ever
        left, top = int(left), int(top)
    box = (left, top, left + side, top + side)
    if side == resolution and crop == 1.0:
        image = image.crop(box) if image.width != image.height else image  # type: ignore[arg-type]
    else:
        way = getattr(Image.Resampling, interpolation.upper())
        image = image.resize((resolution, resolution), way, box=box, reducing_gap=3.0)
    return np.asarray(image)
