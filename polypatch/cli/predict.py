"""``polypatch predict``: classes of image files, as CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Device, check_device, console


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
    import torch

    from ..checkpoints import load
    from ..data.decode import Undecodable, decode_image
    from ..errors import PolypatchError
    from ..nn import normalise

    check_device(device)
    if out is not None and out.suffix not in (".csv", ".json"):
        raise PolypatchError(f"{out} is neither .csv nor .json")
    if top < 1:
        raise PolypatchError(f"--top counts from 1, got {top}")
    loaded = load(run)
    model = loaded.model if device is None else loaded.model.to(device)
    side = loaded.config.get("resolution") or getattr(model, "resolution", 224)
    paths = _expanded(files)
    terminal = console()
    rows: list[dict[str, Any]] = []
    bad: list[str] = []
    at = next(model.parameters()).device
    for start in range(0, len(paths), batch):
        images, names = [], []
        for path in paths[start : start + batch]:
            try:
                pixels = decode_image(path, resolution=side, name=str(path))
                images.append(torch.from_numpy(pixels.copy()).float() / 255)
                names.append(str(path))
            except (Undecodable, PolypatchError, OSError) as error:
                bad.append(f"{path}: {error}")
        if not images:
            continue
        stacked = normalise(torch.stack(images), loaded.mean, loaded.std)
        with torch.inference_mode():
            chances = model(stacked.to(at)).float().softmax(1).cpu()
        best = chances.topk(min(top, chances.shape[1]))
        for name, values, classes in zip(names, best.values.tolist(), best.indices.tolist()):
            labels = [loaded.classes[c] if loaded.classes else str(c) for c in classes]
            guesses = [
                {"class": label, "probability": round(value, 6)}
                for label, value in zip(labels, values)
            ]
            rows.append({"file": name, "predictions": guesses})
    text = _json(rows) if out is not None and out.suffix == ".json" else _csv(rows, top)
    if out is None:
        sys.stdout.write(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = out.with_name(f".{out.name}")
        beside.write_text(text, encoding="utf-8")
        beside.replace(out)
        terminal.print(f"{len(rows)} images: {out}", highlight=False)
    for sentence in bad:
        terminal.print(f"left out {sentence}", markup=False, highlight=False)
    if bad:
        raise typer.Exit(1)


def _expanded(files: list[Path]) -> list[Path]:
    from ..errors import PolypatchError

    paths: list[Path] = []
    for path in files:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
            if not inside:
                raise PolypatchError(f"there are no files in {path}")
            paths += inside
        elif path.exists():
            paths.append(path)
        else:
            raise PolypatchError(f"there is no file {path}")
    return paths


def _json(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, indent=2) + "\n"


def _csv(rows: list[dict[str, Any]], top: int) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    heads = [f"{word}_{k}" for k in range(1, top + 1) for word in ("class", "probability")]
    writer.writerow(["file", *heads])
    for row in rows:
        flat = [v for guess in row["predictions"] for v in (guess["class"], guess["probability"])]
        writer.writerow([row["file"], *flat])
    return buffer.getvalue()
