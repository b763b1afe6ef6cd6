"""``polypatch papers``: what there is, what works, how to call it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    query: Annotated[
        list[str] | None,
        typer.Argument(metavar="QUERY", help="A slug for one paper, or words to search for."),
    ] = None,
    by: Annotated[
        str, typer.Option(help="room, year or taxonomy (of A Survey of Transformers).")
    ] = "room",
    works: Annotated[bool, typer.Option("--works", help="Only what works today.")] = False,
    write: Annotated[
        Path | None, typer.Option(help="Write the whole catalogue as Markdown instead.")
    ] = None,
) -> None:
    """List, search or show the papers of the catalogue."""
    from ..catalogue import paper, papers, search
    from ..errors import PolypatchError, suggest

    if write is not None:
        from ..report.catalogue_page import write_catalogue

        write_catalogue(write)
        print(f"{write}: {len(papers())} papers")
        return
    if by not in ("room", "year", "taxonomy"):
        raise PolypatchError(
            f"papers can't be listed by {by!r}{suggest(by, ['room', 'year', 'taxonomy'])}"
        )
    words = " ".join(query or [])
    slugs = {p.slug for p in papers(peers=True)}
    if words in slugs:
        _show(paper(words))
        return
    found = search(words) if words else papers(peers=True)
    if not found:
        raise PolypatchError(f"no paper has {words!r} in it{suggest(words, slugs)}")
    if works:
        found = tuple(p for p in found if p.works)
    _list(found, by="rank" if words else by)


def _list(found: tuple[Any, ...], *, by: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..catalogue import TAXONOMY

    table = Table(box=None, header_style="bold", pad_edge=False, show_lines=False)
    table.add_column("paper", no_wrap=True)
    table.add_column("year")
    table.add_column("works", justify="center")
    table.add_column("what it does", overflow="fold")
    groups: dict[str, list[Any]] = {}
    if by == "taxonomy":
        titles = {place.path: place for place in TAXONOMY}
        groups = {
            f"{path}  ({place.title}{', ours' if place.ours else ''})": [
                p for p in found if path in p.taxonomy
            ]
            for path, place in titles.items()
        }
    elif by == "rank":
        groups = {"": list(found)}
    else:
        for p in sorted(found, key=lambda p: str(getattr(p, by))):
            groups.setdefault(str(getattr(p, by)), []).append(p)
    for title, members in groups.items():
        if not members:
            continue
        if title:
            table.add_row(f"[bold]{title}[/bold]")
        for p in members:
            name = f"{p.slug}*" if p.peer else p.slug
            table.add_row(f"  {name}", str(p.year), "yes" if p.works else "·", p.summary)
    screen = Console(width=None if Console().is_terminal else 140)
    screen.print(table, highlight=False)
    working = sum(p.works for p in found)
    screen.print(
        f"{len(found)} papers, {working} work today"
        + ("; * beside the 119" if any(p.peer for p in found) else ""),
        highlight=False,
    )


def _show(entry: Any) -> None:
    print(
        f"{entry.title}\n{entry.authors}, {entry.year}"
        + (f", {entry.venue}" if entry.venue else "")
    )
    if entry.arxiv:
        print(f"arXiv {entry.arxiv}  https://arxiv.org/abs/{entry.arxiv}")
    if entry.official:
        print(f"authors' code: github.com/{entry.official}" + _noted(entry))
    elif entry.other_code:
        print(f"code of others: {', '.join(entry.other_code)}" + _noted(entry))
    print(f"\nIt {entry.summary}.")
    print(f"room {entry.room}; taxonomy {', '.join(entry.taxonomy)}")
    if not entry.works:
        print("\nNot in the library yet.")
        return
    from ..report.catalogue_page import calls_of

    calls = calls_of(entry)
    print(f"\nmodule: {entry.module}")
    for line in calls.lines:
        print(line)


def _noted(entry: Any) -> str:
    return f" ({entry.code_note})" if entry.code_note else ""
