"""The report of a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..training.budget import Budget
from .pictures import cut, data_uri, enlarged, sample_images, to_png
from .plots import COLOURS, curves, pareto
from .statistics import pareto_front

if TYPE_CHECKING:
    from ..compare import Candidate, Comparison

__all__ = ["COLUMNS", "render", "row_cells", "summary", "write_report"]


def write_report(comparison: Comparison, folder: Path, *, command: str = "") -> Path:
    """Write ``index.html`` and, for programs, ``results.json`` into ``folder``; return the page."""
    from ..training.runs import write_json

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", summary(comparison))
    page = folder / "index.html"
    beside = folder / ".index.html"
    beside.write_text(render(comparison, command=command), encoding="utf-8")
    beside.replace(page)
    return page


def summary(comparison: Comparison) -> dict[str, Any]:
    """The numbers of the report as plain data."""
    return {
        "recommendation": comparison.recommendation,
        "data": comparison.data.name,
        "resolution": comparison.data.resolution,
        "budget": comparison.budget,
        "seeds": comparison.seeds,
        "seconds": comparison.seconds,
        "candidates": [
            {
                "spec": c.spec,
                "accuracy": c.accuracy.mean,
                "accuracy_interval": None
                if c.accuracy.half != c.accuracy.half
                else c.accuracy.half,
                "accuracy_per_seed": c.per_seed("accuracy"),
                "tokens": None if c.tokens is None else c.tokens[0],
                "tokens_spread": None if c.tokens is None else c.tokens[1],
                "images_per_second": c.throughput,
                "training_seconds": c.seconds,
                "runs": [str(run.folder) for run in c.runs],
                **c.cost.to_dict(),
            }
            for c in comparison.candidates
        ],
    }


def render(comparison: Comparison, *, command: str = "") -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup, escape

    environment = Environment(loader=PackageLoader("polypatch", "report"), autoescape=True)
    candidates = comparison.candidates
    images, classes = sample_images(comparison.data)
    rows = [
        {
            "spec": c.spec,
            "broken": Markup(str(escape(c.spec)).replace("+", "+<wbr>")),
            "colour": COLOURS[i % len(COLOURS)],
            "cells": row_cells(c),
            "pictures": _pictures(c, comparison, images),
        }
        for i, c in enumerate(candidates)
    ]
    for name in ("gflops", "latency_1", "latency_32"):
        costs = [getattr(c.cost, name) for c in candidates]
        on_front = set(pareto_front(costs, [c.accuracy.mean for c in candidates]))
        for index, row in enumerate(rows):
            row.setdefault("front", {})[name] = index in on_front
    return environment.get_template("template.html").render(
        comparison=comparison,
        recipe=comparison.recipe,
        rows=rows,
        columns=COLUMNS,
        classes=classes,
        budget=Budget.parse(comparison.budget).words,
        originals=[data_uri(to_png(image)) for image in enlarged(images)],
        pareto_operations=pareto(
            candidates,
            lambda c: c.cost.gflops,
            label="operations per image, GFLOP (log)",
            title="Accuracy against counted operations",
        ),
        pareto_latency=pareto(
            candidates,
            lambda c: c.cost.latency_32 / 32,
            label="latency per image at batch 32, ms (log)",
            title="Accuracy against measured latency",
        ),
        pareto_tokens=(
            pareto(
                candidates,
                lambda c: (c.tokens or (1.0, 0.0))[0],
                label="tokens per image (log)",
                title="Accuracy against tokens",
            )
            if all(c.tokens for c in candidates)
            else ""
        ),
        curves=curves(candidates),
        command=command or "polypatch compare",
        machine=_machine(),
        data_json=json.dumps(summary(comparison)).replace("<", "\\u003c"),
    )


def _machine() -> str:
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {threads} threads, torch {torch.__version__}"


#: heading, unit and explanation of the table's columns
COLUMNS = (
    (
        "accuracy",
        "%",
        "On the test split: mean over seeds ± half of Student's 95 % interval.",
    ),
    ("tokens", "per image", "Tokens that enter the first block: mean ± spread over images."),
    ("parameters", "", "All parameters."),
    (
        "GFLOP",
        "per image",
        "Counted in a forward pass, 2 per multiplication and addition.",
    ),
    ("latency", "ms, batch 1", "Median of a forward pass of one image, all cores."),
    ("latency", "ms, batch 32", "Median of a forward pass of 32 images, all cores."),
    ("memory", "MiB, batch 32", "Peak of what a forward pass of 32 images allocates."),
    ("training", "images/s", "While the runs trained, as many at a time as there are jobs."),
)


def row_cells(candidate: Candidate) -> list[tuple[str, float]]:
    """What each column shows, and the number that it is sorted by."""
    c, cost = candidate, candidate.cost
    half = "" if c.accuracy.half != c.accuracy.half else f" ± {100 * c.accuracy.half:.1f}"
    if c.tokens is None:
        tokens = ("–", -1.0)
    else:
        spread = f" ± {c.tokens[1]:.1f}" if c.tokens[1] >= 0.05 else ""
        tokens = (f"{c.tokens[0]:.0f}{spread}", c.tokens[0])
    return [
        (f"{100 * c.accuracy.mean:.1f}{half}", c.accuracy.mean),
        tokens,
        (_thousands(cost.parameters), cost.parameters),
        (f"{cost.gflops:.3g}", cost.gflops),
        (f"{cost.latency_1:.3g}", cost.latency_1),
        (f"{cost.latency_32:.3g}", cost.latency_32),
        (f"{cost.memory_mb:.3g}", cost.memory_mb),
        (f"{c.throughput:.0f}", c.throughput),
    ]


def _thousands(count: int) -> str:
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {sign}"
    return str(count)


def _pictures(
    candidate: Candidate, comparison: Comparison, images: torch.Tensor
) -> list[dict[str, Any]]:
    """The sample images as this candidate's first run cuts them."""
    from ..compare import trained

    model = trained(candidate.runs[0])
    if not hasattr(model, "forward_features"):
        return []
    data = comparison.data
    drawn, counts = cut(model, images, mean=data.mean, std=data.std)
    return [
        {"source": data_uri(to_png(picture)), "count": count}
        for picture, count in zip(drawn, counts)
    ]
