"""``polypatch claim``: does a paper's headline claim hold, at this scale?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Runs, check_device, console


def command(
    slug: Annotated[
        str | None, typer.Argument(help="A paper; without: list the claims that can be tested.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="At least 3; default: what the claim was set up with.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Page to write to; default: docs/claims.md or claims.md.")
    ] = None,
    runs: Runs = Path("runs"),
    jobs: Annotated[int | None, typer.Option(help="Runs at a time.")] = None,
    device: Device = None,
) -> None:
    """Run a paper's headline claim as a small experiment, and write the verdict down."""
    terminal = console()
    if slug is None:
        from ..claims import claim_of, claim_slugs

        for name in claim_slugs():
            print(f"{name.ljust(18)} {claim_of(name).says}")
        return
    terminal.print("Loading …")
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    from ..claims.base import Lab, claim_of, test, write_section
    from ..errors import PolypatchError
    from .compare import _done

    check_device(device)
    claim = claim_of(slug)
    seeds = claim.seeds if seeds is None else seeds
    if seeds < 3:
        raise PolypatchError(f"a verdict needs at least 3 seeds, got {seeds}")
    terminal.print(f"Claim: {claim.says}", markup=False, highlight=False)
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.fields[n]}"))
    with Progress(*columns, console=terminal) as bars:
        tasks: dict[int, object] = {}

        def refresh(work) -> None:
            key = id(work)
            if key not in tasks:
                tasks[key] = bars.add_task("training", total=float(len(work)), n="")
            done = sum(_done(job) for job in work)
            bars.update(tasks[key], completed=done, n=f"{len(work)} runs")  # type: ignore[arg-type]

        lab = Lab(root=runs, seeds=seeds, jobs=jobs, device=device, refresh=refresh)
        outcome = test(claim, lab)
    page = out or (Path("docs/claims.md") if Path("docs").is_dir() else Path("claims.md"))
    page.parent.mkdir(parents=True, exist_ok=True)
    write_section(page, outcome)
    found = outcome.interval
    print(f"{claim.metric}: {found.mean:.3g} ± {found.half:.2g} (margin {claim.margin:g})")
    print(f"Verdict: {outcome.verdict}")
    print(f"Written to {page} ({time.strftime('%H:%M:%S')})")
