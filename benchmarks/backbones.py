"""The complete encoders, one by one: latency at batch 1 and 16, eager and compiled, and memory.

    OMP_WAIT_POLICY=passive python benchmarks/backbones.py               # a variant of each paper
    OMP_WAIT_POLICY=passive python benchmarks/backbones.py xcit-small-12-p16 --no-compile

Figures against the authors' own code are in docs/performance.md: theirs and ours with the same
weights in one process, in turn.
"""

from __future__ import annotations

import argparse

import pairs  # noqa: F401  # sets OpenMP's waiting before torch starts
import torch

import polypatch
from polypatch import catalogue
from polypatch.checkpoints.describing import count_gflops
from polypatch.spec import host_names
from polypatch.training.cost import latency, peak_memory

#: docs/performance.md says why
COMPILED = {"freezing": True, "layout_optimization": False}
#: parameters, in millions, that a representative variant comes closest to
TARGET = 25.0


def representative(slug: str) -> str:
    """The variant of about 25 million parameters, the size that every paper has."""
    names = [n for n in host_names() if n.startswith(f"{slug}-") and not n.endswith("-nano")]

    def distance(name: str) -> float:
        with torch.device("meta"):
            model = polypatch.create(name)
        return abs(sum(p.numel() for p in model.parameters()) / 1e6 - TARGET)

    return min(names, key=distance)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("variants", nargs="*")
    options.add_argument("--seconds", type=float, default=2.0)
    options.add_argument("--no-compile", action="store_true")
    chosen = options.parse_args()
    papers = [p.slug for p in catalogue.papers(room="backbones") if p.works]
    names = chosen.variants or [representative(slug) for slug in papers]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("variant                     params  GFLOP   ms b1  ms b16  compiled b1, b16  MiB b16")
    for name in names:
        model = polypatch.create(name, seed=0).eval()
        side = model.preprocessing.resolution
        with torch.device("meta"):
            gflops, _ = count_gflops(polypatch.create(name), (side, side))
        row = [f"{name:26s}", f"{sum(p.numel() for p in model.parameters()) / 1e6:6.1f}M"]
        row.append(f"{gflops:6.2f}" if gflops is not None else "     –")
        for fast in (False, True):
            if fast and chosen.no_compile:
                continue
            run = torch.compile(model, dynamic=False, options=COMPILED) if fast else model
            for batch in (1, 16):
                x = torch.randn(batch, 3, side, side)
                milliseconds = 1e3 * latency(lambda: run(x), seconds=chosen.seconds)  # noqa: B023
                row.append(f"{milliseconds:7.1f}")
        x = torch.randn(16, 3, side, side)
        row.append(f"{peak_memory(lambda: model(x)) / 2**20:7.0f}")  # noqa: B023
        print(" ".join(row), flush=True)


if __name__ == "__main__":
    main()
