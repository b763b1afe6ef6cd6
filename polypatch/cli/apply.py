"""``polypatch apply``: a checkpoint on files, whatever it is for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Config, Device, Resolution, check_device, console, read_config, write_text

if TYPE_CHECKING:
    from ..inference import Pictures


def command(
    checkpoint: Annotated[
        str, typer.Argument(help="Weights, a run's folder, or hub:owner/name; it is recognised.")
    ],
    inputs: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    top: Annotated[int, typer.Option(help="How many classes for each image.")] = 5,
    form: Annotated[str, typer.Option("--format", help="csv or json.")] = "csv",
    labels: Annotated[
        Path | None, typer.Option(help="Names of the classes: a line each, or a JSON list.")
    ] = None,
    features: Annotated[
        str,
        typer.Option(help="Write features instead: pooled (a row an image) or maps (dense)."),
    ] = "",
    save: Annotated[str, typer.Option(help="Form of features: npy or safetensors.")] = "npy",
    resolution: Resolution = None,
    config: Config = [],  # noqa: B006  # typer copies it
    device: Device = None,
    batch: Annotated[int, typer.Option(help="Images at a time.")] = 32,
) -> None:
    """Run a checkpoint on files: classes as CSV or JSON, masks as PNG, or features.

    Files that are no images are named and left out; the exit code is then 1.
    """
    terminal = console()
    terminal.print("Loading …")
    from ..checkpoints import load
    from ..errors import PolypatchError, suggest
    from ..inference import Pictures, expand, side_of

    check_device(device)
    for word, name, known in (
        (form, "--format", ["csv", "json"]),
        (features, "--features", ["", "pooled", "maps"]),
        (save, "--save", ["npy", "safetensors"]),
    ):
        if word not in known:
            raise PolypatchError(f"there is no {name} {word}{suggest(word, known)}")
    if top < 1 or batch < 1:
        raise PolypatchError(f"--top and --batch count from 1, got {top} and {batch}")
    paths = expand(inputs)
    loaded = load(checkpoint, config=read_config(config))
    if device is not None:
        loaded.model.to(device)
    name = loaded.variant or loaded.config.get("spec") or loaded.paper
    said = f", assumed: {', '.join(loaded.assumed)}" if loaded.assumed else ""
    terminal.print(f"{name} ({loaded.task}){said}", markup=False, highlight=False)
    pictures = Pictures(paths, loaded, side_of(loaded, resolution), batch)
    out.mkdir(parents=True, exist_ok=True)
    if features:
        written = _features(pictures, out, features, save)
    elif loaded.task == "segment":
        written = _masks(pictures, out, terminal)
    else:
        written = _classes(pictures, out, top, form, labels, terminal)
    print(written)
    for sentence in pictures.bad:
        terminal.print(f"left out {sentence}", markup=False, highlight=False)
    if pictures.bad:
        raise typer.Exit(1)


@contextmanager
def _bar(pictures: Pictures, terminal) -> Iterator[None]:
    """A progress bar over the files of ``pictures``."""
    from rich.progress import Progress

    with Progress(console=terminal, transient=True) as bars:
        task = bars.add_task("images", total=len(pictures.paths))
        pictures.done = lambda count: bars.update(task, advance=count)
        yield


def _classes(
    pictures: Pictures, out: Path, top: int, form: str, labels: Path | None, terminal
) -> str:
    from ..inference import classify, csv_text, json_text

    with _bar(pictures, terminal):
        rows = list(classify(pictures, top=top, labels=labels))
    file = out / f"predictions.{form}"
    write_text(file, json_text(rows) if form == "json" else csv_text(rows, top))
    return f"{len(rows)} images: {file}"


def _masks(pictures: Pictures, out: Path, terminal) -> str:
    from ..inference import segment, unique_names

    names = unique_names(pictures.paths)
    count = 0
    with _bar(pictures, terminal):
        for path, mask, overlay in segment(pictures):
            mask.save(out / f"{names[path]}.png")
            overlay.save(out / f"{names[path]}-overlay.png")
            count += 1
    return f"{count} masks: {out}"


def _features(pictures: Pictures, out: Path, kind: str, save: str) -> str:
    import numpy as np
    from safetensors.torch import save_file

    from ..inference import feature_maps, pooled_features, unique_names

    if kind == "pooled":
        paths, rows = pooled_features(pictures)
        write_text(out / "files.txt", "".join(f"{path}\n" for path in paths))
        file = out / f"features.{save}"
        if save == "npy":
            np.save(file, rows.numpy())
        else:
            save_file({"features": rows}, file)
        return f"{len(paths)} rows of {rows.shape[1]}: {file} (rows in the order of files.txt)"
    names = unique_names(pictures.paths)
    count = 0
    for path, maps in feature_maps(pictures):
        count += 1
        if save == "safetensors":
            save_file(maps, out / f"{names[path]}.safetensors")
            continue
        for which, values in maps.items():
            np.save(out / f"{names[path]}.{which}.npy", values.numpy())
    return f"maps of {count} images: {out}"
