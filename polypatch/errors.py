"""The one exception that a user's mistake raises, and what finds the nearest right answer.

The command line prints the message of a :class:`PolypatchError` and leaves with exit code 2;
anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["PolypatchError", "suggest"]


class PolypatchError(ValueError):
    """Something that the caller can mend; one sentence says what is wrong and what is right."""


def suggest(word: str, known: Iterable[str], *, kind: str = "") -> str:
    """A closing half-sentence with the nearest of the ``known`` words to ``word``.

    >>> suggest("drat", ["dart", "quadtree"])
    '; did you mean dart?'
    >>> suggest("xyz", ["dart", "quadtree"], kind="techniques")
    '; known techniques: dart, quadtree'
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.55)
    if close:
        return f"; did you mean {close[0]}?"
    if not known:
        return ""
    listed = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return f"; known {kind}: {listed}" if kind else f"; known: {listed}"
