"""``polypatch predict``: classes of image files, as CSV or JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, check_device, console, write_text


def command(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or a checkpoint.")],
    files: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(help="How many classes for each image.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="FILE.csv or FILE.json; default: CSV to the terminal.")
    ] = None,
    device: Device = None,
    batch: Annotated[int, typer.Option(help="Images at a time.")] = 32,
) -> None:
    """Classify images. One row an image: file, then class and probability, best first.

    Files that are no images are named and left out; the exit code is then 1.
    """
    from ..checkpoints import load
    from ..errors import PolypatchError
    from ..inference import Pictures, classify, csv_text, expand, json_text, side_of

    check_device(device)
    if out is not None and out.suffix not in (".csv", ".json"):
        raise PolypatchError(f"{out} is neither .csv nor .json")
    if top < 1:
        raise PolypatchError(f"--top counts from 1, got {top}")
    loaded = load(run)
    if device is not None:
        loaded.model.to(device)
    pictures = Pictures(expand(files), loaded, side_of(loaded), batch)
    rows = list(classify(pictures, top=top))
    text = json_text(rows) if out is not None and out.suffix == ".json" else csv_text(rows, top)
    terminal = console()
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)
        terminal.print(f"{len(rows)} images: {out}", highlight=False)
    for sentence in pictures.bad:
        terminal.print(f"left out {sentence}", markup=False, highlight=False)
    if pictures.bad:
        raise typer.Exit(1)
