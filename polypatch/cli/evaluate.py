"""``polypatch evaluate``: accuracy of a finished run, on its own or on other data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Resolution, check_device


def command(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Other data with the same classes.")
    ] = None,
    resolution: Resolution = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a run's model on its test split, or on that of other data."""
    from ..compare import trained
    from ..data import load_images, load_masks
    from ..errors import PolypatchError
    from ..training.evaluate import evaluate
    from ..training.runs import Run

    check_device(device)
    opened = Run.open(run)
    config = opened.config
    if opened.result is None:
        raise PolypatchError(
            f"the run in {run} is not finished; the command that began it goes on with it"
        )
    if config.task == "forecast":
        raise PolypatchError(
            f"the run in {run} forecasts series; its scores are in {run / 'result.json'}, and "
            "`polypatch forecast` with the same words shows them"
        )
    load = load_masks if config.task == "segment" else load_images
    source = load(data or config.data, resolution=resolution or config.resolution, seed=config.seed)
    if len(source.classes) != config.classes:
        raise PolypatchError(
            f"{data} has {len(source.classes)} classes, the run was trained on {config.classes}"
        )
    outcome = evaluate(trained(opened, device=device), source)
    if as_json:
        print(json.dumps(outcome.to_dict(), indent=2))
        return
    tokens = "" if outcome.tokens is None else f", {outcome.tokens:.1f} tokens an image"
    if outcome.tokens_spread:
        tokens += f" (± {outcome.tokens_spread:.1f})"
    overlap = ""
    if outcome.mean_iou is not None:
        overlap = f"mean IoU {100 * outcome.mean_iou:.2f} %, pixel "
    print(
        f"{overlap}accuracy {100 * outcome.accuracy:.2f} % on {outcome.samples} images of "
        f"{source.name}, "
        f"loss {outcome.loss:.4f}{tokens}"
    )
