"""Arguments of the authors' networks, which many of them share: read from shapes and words, written
back."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ..errors import PolypatchError

__all__ = ["expansion", "norm_eps", "norm_word", "pair"]


def expansion(*sizes: tuple[int, int]) -> float:
    """The ``mlp_ratio`` of MLPs of these (hidden, dim).

    Authors write ``int(dim * mlp_ratio)``, which hidden / dim, rounded to a float, may miss by one.
    """
    ratio = max(hidden / dim for hidden, dim in sizes)
    while any(int(dim * ratio) < hidden for hidden, dim in sizes):
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def norm_word(eps: float) -> str:
    """A ``norm_layer`` as configurations write it: ``LayerNorm(eps=1e-6)``."""
    return f"LayerNorm(eps={eps:g})".replace("e-0", "e-")


def norm_eps(word: str | None) -> float:
    """ε of ``LayerNorm(eps=1e-6)``; torch's default, 1e-5, of ``LayerNorm`` and None.

    Raises:
        PolypatchError: another norm.
    """
    match = re.fullmatch(
        r"(?:nn\.)?LayerNorm(?:\((?:eps=)?([0-9.e+-]+)?\))?", str(word or "LayerNorm")
    )
    if match is None:
        raise PolypatchError(
            f"there is no norm_layer={word!r} here; write LayerNorm or LayerNorm(eps=1e-6)"
        )
    return float(match.group(1) or 1e-5)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a number or of two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
