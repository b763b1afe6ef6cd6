"""Options that several commands share, written once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="bundled:photos, bundled:digits, a folder of class folders, a parquet file or "
        "folder, or hub:owner/name.",
    ),
]
Resolution = Annotated[
    int | None, typer.Option("--resolution", help="Side of the square images, in pixels.")
]
BudgetText = Annotated[
    str, typer.Option("--budget", help="Training of each run: 60s, 10min, 500steps, 3epochs.")
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps; default: the best there is.")
]
Runs = Annotated[Path, typer.Option("--runs", help="Where runs are kept and found again.")]
Batch = Annotated[int, typer.Option("--batch", help="Images a step, all processes together.")]
Lr = Annotated[float, typer.Option("--lr", help="Peak learning rate.")]
Augment = Annotated[str, typer.Option("--augment", help="none, light or rand.")]
Precision = Annotated[str, typer.Option("--precision", help="float32, bf16 or fp16.")]
Mixup = Annotated[float, typer.Option("--mixup", help="Beta parameter; 0: off.")]
CutMix = Annotated[float, typer.Option("--cutmix", help="Beta parameter; 0: off.")]
Ema = Annotated[float, typer.Option("--ema", help="Decay of averaged weights; 0: off.")]


def check_device(device: str | None) -> None:
    """One clear sentence for a device that isn't there."""
    if device is None:
        return
    import torch

    from ..errors import PolypatchError

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise PolypatchError(f"there is no device {device!r}; use cpu, cuda or mps") from error
    usable = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not usable.get(kind, False):
        there = ", ".join(name for name, ok in usable.items() if ok)
        raise PolypatchError(f"there is no device {device!r} here; there is {there}")


@contextlib.contextmanager
def reading_bar(terminal: Any) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar for reading data; it shows up only where reading takes more than a moment."""
    from rich.progress import Progress

    began = time.monotonic()
    bars = Progress(console=terminal, transient=True)
    task: list[Any] = []

    def show(done: int, total: int, what: str) -> None:
        if not task:
            if time.monotonic() - began < 0.5:
                return
            bars.start()
            task.append(bars.add_task(what, total=total))
        bars.update(task[0], completed=done, total=total, description=what)

    try:
        yield show
    finally:
        bars.stop()


def console() -> Any:
    """Where commands talk; on standard error, so that results can be piped."""
    from rich.console import Console

    return Console(stderr=True)


def write_text(file: Path, text: str) -> None:
    """Write a file as a whole or not at all, with the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)


def read_config(words: list[str]) -> dict[str, Any]:
    """``--config num_heads=12`` → what a checkpoint's shapes don't tell, by the authors' names.

    Raises:
        PolypatchError: no ``name=value``.
    """
    import ast

    from ..errors import PolypatchError

    values: dict[str, Any] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign or not name:
            raise PolypatchError(f"--config takes name=value, such as num_heads=12, got {word!r}")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values


Config = Annotated[
    list[str],
    typer.Option("--config", help="name=value by the authors' names, where shapes don't tell."),
]
