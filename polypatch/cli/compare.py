"""``polypatch compare``: the main job."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    Augment,
    Batch,
    BudgetText,
    CutMix,
    Data,
    Device,
    Ema,
    Lr,
    Mixup,
    Precision,
    Resolution,
    Runs,
    check_device,
    console,
    reading_bar,
)

if TYPE_CHECKING:
    from ..compare import Comparison, Job


def command(
    specs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SPEC",
            help="Models: vit-nano, vit-tiny(patch=8)+dart(tokens=49), … "
            "Without any: the grid at two patch sizes and the adaptive tokenizers.",
            show_default=False,
        ),
    ] = None,
    data: Data = "bundled:photos",
    budget: BudgetText = "130steps",
    seeds: Annotated[int, typer.Option(help="Runs of each model, with different seeds.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
    runs: Runs = Path("runs"),
    resolution: Resolution = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time; default: one per core, on a GPU one.")
    ] = None,
    device: Device = None,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster to train on; local: start one.")
    ] = None,
    batch: Batch = 64,
    lr: Lr = 2e-3,
    augment: Augment = "light",
    mixup: Mixup = 0.0,
    cutmix: CutMix = 0.0,
    ema: Ema = 0.0,
    precision: Precision = "float32",
) -> None:
    """Train models under one budget, measure what each costs, say which is worth it.

    Leaves a report in --out (open index.html). Runs are kept: the same call again
    reuses what is finished and goes on with what was interrupted.
    """
    terminal = console()
    terminal.print("Loading …")
    from ..compare import DEFAULT_SPECS, compare
    from ..report.page import write_report
    from ..training.recipe import Recipe

    check_device(device)
    recipe = Recipe(
        batch=batch,
        lr=lr,
        augment=augment,
        mixup=mixup,
        cutmix=cutmix,
        ema=ema,
        precision=precision,
    )
    with reading_bar(terminal) as reading:
        comparison = compare(
            specs or DEFAULT_SPECS,
            data=data,
            budget=budget,
            seeds=seeds,
            resolution=resolution,
            recipe=recipe,
            root=runs,
            jobs=jobs,
            device=device,
            ray=ray,
            reading=reading,
            watch=lambda work: _live(work, terminal),
            say=lambda text: terminal.print(text, markup=False, highlight=False),
        )
    terminal.print("Writing the report …")
    page = write_report(comparison, out, command=_called())
    print_table(comparison)
    print(comparison.recommendation)
    print(f"Report: {page}")


def _called() -> str:
    import shlex

    return shlex.join(["polypatch", *sys.argv[1:]])


@contextlib.contextmanager
def _live(work: Sequence[Job], terminal: Any) -> Iterator[Callable[[], None]]:
    """Progress bars while runs train: one for each model, one for all, with the time left."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    specs = list(dict.fromkeys(job.config.spec for job in work))
    width = max(len(spec) for spec in specs)
    began = time.monotonic()
    already = sum(_done(job) for job in work)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[word]}"),
    )
    with Progress(*columns, console=terminal, refresh_per_second=4, transient=False) as bars:
        tasks = {s: bars.add_task(s.ljust(width), total=1.0, word="waiting") for s in specs}
        whole = bars.add_task("all".ljust(width), total=float(len(work)), word="starting …")

        def refresh() -> None:
            shares = {spec: [] for spec in specs}
            for job in work:
                shares[job.config.spec].append(_done(job))
            for spec, parts in shares.items():
                mean = sum(parts) / len(parts)
                jobs = [job for job in work if job.config.spec == spec]
                bars.update(tasks[spec], completed=mean, word=_word(jobs))
            done = sum(sum(parts) for parts in shares.values())
            elapsed, new = time.monotonic() - began, done - already
            left = "" if new <= 0.02 * len(work) else _clock((len(work) - done) * elapsed / new)
            bars.update(whole, completed=done, word=f"{left} left" if left else "estimating …")

        yield refresh
        refresh()
        bars.update(whole, completed=float(len(work)), word=f"{_clock(time.monotonic() - began)}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _done(job: Job) -> float:
    """Which part of a run is done, 0 to 1, from what it has written."""
    if job.run.result is not None:
        return 1.0
    plan = job.run.plan
    if plan is None:
        return 0.0
    step = _last(job).get("step", 0)
    return min(0.99, step / max(1, plan["steps"]))


def _last(job: Job) -> dict[str, Any]:
    rows = [row for row in job.run.metrics() if "loss" in row]
    return rows[-1] if rows else {}


def _word(jobs: Sequence[Job]) -> str:
    results = [r["accuracy"] for job in jobs if (r := job.run.result) is not None]
    said = f"accuracy {100 * sum(results) / len(results):.1f} %" if results else ""
    running = [row["loss"] for job in jobs if job.run.result is None and (row := _last(job))]
    if running:
        said += f"{', ' if said else ''}loss {running[0]:.2f}"
    return said or "waiting"


def print_table(comparison: Comparison) -> None:
    """The results, on standard output."""
    from rich.console import Console
    from rich.table import Table

    from ..report.page import COLUMNS, row_cells

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model")
    for name, unit, _ in COLUMNS:
        table.add_column(f"{name}\n{unit}", justify="right", no_wrap=True)
    for candidate in comparison.candidates:
        table.add_row(candidate.spec, *(shown for shown, _ in row_cells(candidate)))
    screen = Console()
    if not screen.is_terminal:
        screen = Console(width=200)
    screen.print(table, highlight=False)
