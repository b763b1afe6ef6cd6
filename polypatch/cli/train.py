"""``polypatch train``: one model, on one or many processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Augment,
    Batch,
    BudgetText,
    CutMix,
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


def command(
    spec: Annotated[str, typer.Argument(help="The model: vit-tiny(patch=8)+dart, …")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="As for compare; to segment: bundled:coins, bundled:cells, bundled:retina, or a "
            "folder with images/ and masks/. Default: bundled:photos, bundled:coins.",
        ),
    ] = "",
    task: Annotated[
        str, typer.Option(help="classify, or segment: a light head on the model's dense maps.")
    ] = "classify",
    budget: BudgetText = "10min",
    seed: Annotated[int, typer.Option(help="Decides weights, order and augmentation.")] = 0,
    runs: Runs = Path("runs"),
    start: Annotated[
        str, typer.Option("--from", help="A run or checkpoint whose weights to start from.")
    ] = "",
    resolution: Resolution = None,
    device: Device = None,
    batch: Batch = 64,
    lr: Lr = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="On matrices only.")] = 0.05,
    warmup: Annotated[float, typer.Option(help="Fraction of all steps.")] = 0.1,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0: any.")] = 1.0,
    smoothing: Annotated[float, typer.Option(help="Label smoothing.")] = 0.1,
    augment: Augment = "light",
    mixup: Mixup = 0.0,
    cutmix: CutMix = 0.0,
    ema: Ema = 0.0,
    precision: Precision = "float32",
    accumulate: Annotated[int, typer.Option(help="Parts that a batch is cut into.")] = 1,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard events too.")] = True,
) -> None:
    """Train a model, keep the run, go on where an interrupted one stopped.

    Several processes or nodes: accelerate launch --num_processes 2 -m polypatch train …
    """
    leader = int(os.environ.get("RANK", "0")) == 0
    terminal = console()
    if leader:
        terminal.print("Loading …")
    from rich.progress import Progress, TextColumn, TimeRemainingColumn

    from ..data import load_images, load_masks
    from ..spec import parse
    from ..training.budget import Budget
    from ..training.loop import train
    from ..training.recipe import Recipe
    from ..training.runs import Run, RunConfig
    from ..training.tasks import task_of

    check_device(device)
    segment = task_of(task).name == "segment"
    data = data or ("bundled:coins" if segment else "bundled:photos")
    Budget.parse(budget)
    recipe = Recipe(
        batch=batch,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        clip=clip,
        smoothing=smoothing,
        augment=augment,
        mixup=mixup,
        cutmix=cutmix,
        ema=ema,
        precision=precision,
        accumulate=accumulate,
    )
    canonical = str(parse(spec))
    with reading_bar(terminal) as reading:
        source = (load_masks if segment else load_images)(
            data, resolution=resolution, seed=seed, progress=reading if leader else None
        )
    for note in source.notes if leader else ():
        terminal.print(note, markup=False, highlight=False)
    config = RunConfig(
        spec=canonical,
        data=data,
        data_fingerprint=source.fingerprint,
        resolution=source.resolution,
        classes=len(source.classes),
        seed=seed,
        budget=budget,
        recipe=recipe,
        init=start,
        task=task,
    )
    columns = (
        *Progress.get_default_columns()[:-1],
        TimeRemainingColumn(),
        TextColumn("{task.fields[word]}"),
    )
    with Progress(*columns, console=terminal, disable=not leader) as bars:
        bar = bars.add_task(canonical, total=None, word="starting …")

        def show(step: int, total: int, loss: float, step_seconds: float) -> None:
            word = f"step {step}, loss {loss:.3f}, {recipe.batch / step_seconds:.0f} images/s"
            bars.update(bar, completed=step, total=total, word=word)

        run: Run = train(
            config,
            source,
            root=runs,
            device=device,
            progress=show,
            tensorboard=tensorboard,
        )
    result = run.result
    if leader and result is not None:
        overlap = result.get("mean_iou")
        print(
            (f"mean IoU {100 * overlap:.2f} %, pixel " if overlap is not None else "")
            + f"accuracy {100 * result['accuracy']:.2f} % on {result['samples']} test images, "
            f"loss {result['loss']:.4f}, {result['steps']} steps in {result['seconds']:.0f} s"
        )
        print(f"Run: {run.folder}")
