"""The catalogue for people: how to call each paper's part, and ``docs/papers.md``."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path

from ..catalogue import ROOMS, Paper, papers

__all__ = ["Calls", "calls_of", "catalogue_text", "write_catalogue"]

_DOCS = Path(__file__).resolve().parents[2] / "docs"


@dataclass(frozen=True)
class Calls:
    """How a paper is used: a spec that works, its options, its variants."""

    spec: str
    options: tuple[str, ...]
    variants: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        said = []
        if self.spec:
            said.append(f"use:      polypatch compare '{self.spec}' vit-nano")
            said.append(f'          polypatch.create("{self.spec}", classes=10)')
        if self.options:
            said.append(f"options:  {', '.join(self.options)}")
        if self.variants:
            said.append(f"variants: {', '.join(self.variants)}")
        return said


def calls_of(entry: Paper) -> Calls:
    """Read off the paper's module: the arguments of ``plug`` or ``build``, the named variants."""
    if entry.slug == "vit":
        from ..hosts.vit import SIZES, build_vit

        return Calls("vit-nano", _options(build_vit), tuple(f"vit-{size}" for size in SIZES))
    module = importlib.import_module(entry.module)
    plug = getattr(module, "plug", None)
    variants = tuple(getattr(module, "VARIANTS", ())) if hasattr(module, "build") else ()
    if plug is not None:
        return Calls(f"vit-nano+{entry.slug}", _options(plug), variants)
    if variants:
        return Calls(variants[0], _options(module.build), variants)
    return Calls("", (), ())


def _options(function: object) -> tuple[str, ...]:
    hidden = {"host", "size", "variant", "classes"}
    return tuple(
        f"{p.name}={p.default!r}" if p.default is not p.empty else p.name
        for p in inspect.signature(function).parameters.values()  # type: ignore[arg-type]
        if p.name not in hidden
    )


def write_catalogue(path: Path) -> None:
    """Write :func:`catalogue_text` as a whole or not at all."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(catalogue_text(), encoding="utf-8")
    beside.replace(path)


def catalogue_text() -> str:
    """``docs/papers.md``: every paper, what works, and for that how to call it and a picture."""
    entries = papers()
    working = [p for p in papers(peers=True) if p.works and p.room != "catalogue"]
    lines = [
        "# The papers",
        "",
        "Written by `polypatch papers --write docs/papers.md`; a test holds this page to the "
        "catalogue.",
        "",
        f"{len(entries)} papers, of which {sum(p.works for p in entries)} work today. "
        "Methods of peers that they are measured against stand beside them, marked *peer*.",
        "",
        "## What works",
        "",
    ]
    for p in working:
        calls = calls_of(p)
        lines += [f"### {p.slug}{' (peer)' if p.peer else ''}", ""]
        lines += [f"{_citation(p)}", "", f"It {p.summary}.", ""]
        lines += ["```", *calls.lines, "```", ""]
        picture = _DOCS / "pictures" / f"{p.slug}.png"
        if picture.exists():
            lines += [f"![{p.slug}](pictures/{p.slug}.png)", ""]
    lines += ["## All papers, by room", ""]
    for room in ROOMS:
        members = [p for p in papers(peers=True) if p.room == room]
        if not members:
            continue
        lines += [f"### {room}", "", "| paper | works | what it does |", "|---|---|---|"]
        for p in members:
            name = f"[{p.slug}](#{p.slug})" if p in working and not p.peer else p.slug
            works = "yes" if p.works else ""
            peer = " *(peer)*" if p.peer else ""
            lines.append(f"| {name}{peer}: {_citation(p)} | {works} | {p.summary} |")
        lines.append("")
    return "\n".join(lines)


def _citation(p: Paper) -> str:
    title = f"[{p.title}](https://arxiv.org/abs/{p.arxiv})" if p.arxiv else p.title
    venue = f", {p.venue}" if p.venue else ""
    return f"{title}, {p.authors}{venue} {p.year}"
