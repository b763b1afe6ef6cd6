"""Small pictures for tests."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def picture(number: int, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> Image.Image:
    """A noisy picture, a different one for each number."""
    generator = np.random.default_rng(number)
    pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
