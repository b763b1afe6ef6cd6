"""The papers that polypatch holds, as data: what each does, where it stands, where its code is.

The facts lie in ``papers.json`` beside this file, so that a correction is a change of data and
looking something up costs neither torch nor the paper's module. Nothing registers itself: an entry
names its module by rule (:attr:`Paper.module`), and whoever needs the module imports it.

The taxonomy is that of *A Survey of Transformers* (Lin et al., 2022, arXiv 2106.04554): the leaves
of its figure 3 in its order, with the models that the figure names. The survey predates most of
the papers here and has no class for how an input is cut into tokens, so two things are ours: the
place ``module/patchification``, and every assignment of a paper that the figure does not name
(:attr:`Paper.in_survey` tells). Methods that adapt a pre-trained network stand under the kind of
network that they adapt.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import PolypatchError, suggest

__all__ = ["ROOMS", "TAXONOMY", "Paper", "Place", "by_taxonomy", "paper", "papers", "search"]

_PACKAGE = Path(__file__).parent

ROOMS: tuple[str, ...] = (
    "patching",
    "positioning",
    "mixing",
    "reducing",
    "adapting",
    "backbones",
    "pretraining",
    "forecasting",
    "restoring",
    "generating",
    "compressing",
    "perceiving",
    "language",
    "solving",
    "auditing",
    "scaling",
    "catalogue",
    "hosts",
)
"""What a paper is for. Each is a package, except that the survey's method is this module."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One leaf of the taxonomy, such as ``module/attention/sparse/content-based``."""

    path: str
    title: str
    section: str = ""
    """Of the survey."""
    models: tuple[str, ...] = ()
    """Those that the survey's figure 3 names; empty where only its text discusses the class."""
    ours: bool = False
    """The survey has no such class."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What is known about a paper before its code is imported."""

    slug: str
    title: str
    authors: str
    year: int
    """Of the version of record where ``venue`` names it, else of the preprint."""
    arxiv: str = ""
    """The arXiv id, which may be of an earlier version under another title; "" if there is none."""
    venue: str = ""
    """"" for a preprint, or where it is not known."""
    room: str
    summary: str
    """One line that continues the sentence "it …"."""
    official: str = ""
    """The authors' repository (``owner/name`` on GitHub), "" if they published none."""
    other_code: tuple[str, ...] = ()
    """Repositories of others that hold the method, or parts that it is made of."""
    code_note: str = ""
    """What to expect of ``official`` and ``other_code``, where it is not the whole method."""
    licence: str = ""
    """Of the authors' code and published weights, as an SPDX name; "" where they say none."""
    taxonomy: tuple[str, ...]
    """Paths of :data:`TAXONOMY`, the most telling one first."""
    in_survey: bool = False
    """Figure 3 of the survey itself names it; else its places are our assignment."""
    peer: bool = False
    """Not one of the 119, but a method that they build on or are measured against."""

    @property
    def module(self) -> str:
        """Dotted path of the paper's module, whether or not it is there yet (see ``works``)."""
        if self.room == "catalogue":
            return "polypatch.catalogue"
        return f"polypatch.{self.room}.{self.slug.replace('-', '_')}"

    @property
    def works(self) -> bool:
        """Whether the module exists. Looks at the disk: finding a spec would import the room."""
        path = _PACKAGE.joinpath(*self.module.split(".")[1:])
        return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _read(path: Path) -> tuple[tuple[Place, ...], tuple[Paper, ...]]:
    def fields(entry: dict[str, Any]) -> dict[str, Any]:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}

    data = json.loads(path.read_text(encoding="utf-8"))
    places = tuple(Place(**fields(entry)) for entry in data["taxonomy"])
    return places, tuple(Paper(**fields(entry)) for entry in data["papers"])


TAXONOMY, _PAPERS = _read(_PACKAGE / "papers.json")


def papers(*, room: str | None = None, peers: bool = False) -> tuple[Paper, ...]:
    """The 119 papers, or those of one room; with ``peers``, the methods beside them too.

    >>> [p.slug for p in papers(room="positioning")]
    ['lape', 'urpe']
    """
    if room is not None and room not in ROOMS:
        raise PolypatchError(f"there is no room {room!r}{suggest(room, ROOMS, kind='rooms')}")
    return tuple(p for p in _PAPERS if (peers or not p.peer) and room in (None, p.room))


def paper(slug: str) -> Paper:
    """The paper, or peer, of this slug.

    >>> paper("dual-patchnorm").module
    'polypatch.patching.dual_patchnorm'
    """
    known = {p.slug: p for p in _PAPERS}
    if slug not in known:
        raise PolypatchError(f"there is no paper {slug!r}{suggest(slug, known, kind='papers')}")
    return known[slug]


def search(query: str) -> tuple[Paper, ...]:
    """Papers and peers in which every word of ``query`` occurs, best first.

    A word may be part of a word; case and accents do not matter. A slug that is the query comes
    first, then a word counts more in the slug than in the title, and more there than in authors,
    summary, room or taxonomy. A query without words asks for nothing and finds nothing.

    >>> [p.slug for p in search("entmax")]
    ['entmax', 'adasplash']
    """
    words = _fold(query).split()
    if not words:
        return ()
    found: list[tuple[int, Paper]] = []
    for candidate in _PAPERS:
        ranks = [_rank(candidate, word) for word in words]
        if None not in ranks:
            exact = candidate.slug == "-".join(words)
            found.append((-1 if exact else sum(r or 0 for r in ranks), candidate))
    # Sorting is stable: equals stay in the catalogue's order.
    return tuple(candidate for _, candidate in sorted(found, key=lambda pair: pair[0]))


def by_taxonomy(*, peers: bool = False) -> dict[str, tuple[Paper, ...]]:
    """The papers at each place, in the survey's order; a paper may stand at several places.

    Places without a paper are there too, with an empty tuple: a gap is worth seeing.
    """
    chosen = papers(peers=peers)
    return {place.path: tuple(p for p in chosen if place.path in p.taxonomy) for place in TAXONOMY}


def _rank(candidate: Paper, word: str) -> int | None:
    """0, 1 or 2 for a hit in the slug, the title or the rest; None for no hit."""
    rest = (candidate.authors, candidate.summary, candidate.room, *candidate.taxonomy)
    for rank, text in enumerate((candidate.slug, candidate.title, "\n".join(rest))):
        if word in _fold(text):
            return rank
    return None


def _fold(text: str) -> str:
    """Without case and accents: "goncalves" must find Gonçalves."""
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(c for c in decomposed if not unicodedata.combining(c)).casefold()
