"""``polypatch patches``: draw how tokenizers cut a photo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import console


def command(
    photos: Annotated[list[Path], typer.Argument(help="Image files.", metavar="PHOTO")],
    cutters: Annotated[
        str,
        typer.Option(
            "--with",
            help="Tokenizers, comma-separated: grid, quadtree(scales=3), dart(tokens=98), … or a "
            "run's folder for what it has learned.",
        ),
    ] = "grid,quadtree,dart,spformer",
    out: Annotated[
        Path | None, typer.Option(help="FILE.png or FILE.svg; default: PHOTO-patches.png.")
    ] = None,
    resolution: Annotated[int, typer.Option(help="Shorter side the photo is resized to.")] = 224,
    patch: Annotated[int, typer.Option(help="Finest patch, in pixels.")] = 16,
    host: Annotated[
        str, typer.Option(help="The model that the tokenizers plug into.")
    ] = "vit-tiny",
) -> None:
    """Draw how each tokenizer cuts a photo, and print the token counts.

    Tokenizers that learn are drawn as they are initialised, unless a run's folder is named.
    """
    from ..errors import PolypatchError
    from ..report.layouts import cutters_of, draw_layouts, load_photo

    suffix = ".png" if out is None else out.suffix.lower()
    if suffix not in (".png", ".svg"):
        raise PolypatchError(f"{out} is neither .png nor .svg")
    terminal = console()
    models = cutters_of(cutters, host=host, patch=patch, resolution=resolution)
    loaded = [(path, load_photo(path, resolution, patch)) for path in photos]
    target = out or photos[0].with_name(f"{photos[0].stem}-patches.png")
    counts = draw_layouts(loaded, models, target)
    width = max(len(name) for name, _ in models)
    for (path, _), row in zip(loaded, counts):
        print(path)
        for (name, _), count in zip(models, row):
            print(f"  {name.ljust(width)}  {count} tokens")
    terminal.print(f"Picture: {target}", highlight=False)
