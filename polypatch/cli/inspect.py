"""``polypatch inspect``: what a file of weights is, without running it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .options import Config, Resolution, read_config


def command(
    file: Annotated[str, typer.Argument(help="A checkpoint, a run's folder, or hub:owner/name.")],
    resolution: Resolution = None,
    config: Config = [],  # noqa: B006  # typer copies it
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which paper and variant a file holds, its size, task, inputs and operations."""
    from ..checkpoints.describing import describe

    found = describe(file, config=read_config(config), resolution=resolution)
    loaded, needs, looks = found.loaded, found.requirements, found.loaded.preprocessing
    sides = [f"multiples of {needs.multiple_of}" if needs.multiple_of > 1 else "any sides"]
    sides += [f"at least {needs.minimum}"] if needs.minimum > 1 else []
    sides += ["square"] if needs.square else []
    if needs.exact is not None:
        sides = [f"{needs.exact[0]}×{needs.exact[1]} only"]
    facts = {
        "file": str(found.path),
        "size": f"{found.size / 1e6:.1f} MB",
        "paper": loaded.paper,
        "title": found.title,
        "variant": loaded.variant or "none of the authors'",
        "task": loaded.task,
        "parameters": f"{found.parameters:,} ({found.head_parameters:,} of them in the head)",
        "input": f"RGB in [{loaded.input_range[0]:g}, {loaded.input_range[1]:g}], "
        f"mean {_numbers(looks.mean)}, std {_numbers(looks.std)}; {', '.join(sides)}",
        "evaluated at": f"{looks.resolution} pixels, the middle {100 * looks.crop:g} % of the "
        f"shorter side, {looks.interpolation}",
        "operations": f"{found.gflops:.3g} GFLOP an image at {found.resolution} pixels"
        if found.gflops is not None
        else found.note,
        "licence": found.licence,
        "assumed": ", ".join(loaded.assumed),
        "left out": f"{len(loaded.left_out)} tensors, such as {loaded.left_out[0]}"
        if loaded.left_out
        else "",
        "configuration": json.dumps(loaded.config, default=str),
    }
    if as_json:
        plain = {
            "file": str(found.path), "bytes": found.size, "paper": loaded.paper,
            "title": found.title, "variant": loaded.variant, "task": loaded.task,
            "parameters": found.parameters, "head_parameters": found.head_parameters,
            "input_range": loaded.input_range, "preprocessing": vars(looks),
            "requirements": vars(needs), "resolution": found.resolution, "gflops": found.gflops,
            "licence": found.licence, "assumed": loaded.assumed, "left_out": loaded.left_out,
            "config": loaded.config,
        }  # fmt: skip
        print(json.dumps(plain, indent=2, default=str))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        if value:
            print(f"{name.ljust(width)}  {value}")


def _numbers(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:g}" for value in values)
