"""Patch scaling: the smaller the patches, the lower the test loss, down to single pixels (Wang et
al., ICML 2025, arXiv 2502.03738).

**The claim**, in the abstract: with smaller patches the models get better all along, until there is
nothing left to divide: patches of one pixel are the best.

**Why it can be tested here.** The paper sees it for every task, input size and encoder that it
tries, its smallest input having 64 pixels a side. Crops of 8 pixels make 64 tokens of one pixel,
which is affordable: the same causal encoder is trained on patches of 4, 2 and 1 under equal steps
and data, from 4 to 64 tokens. The statement is that the loss falls at *each* halving, so the metric
is the smaller of the two falls, and must be above 0.

**What can't be tested**: that the fall follows a power law; that it goes on for larger inputs with
up to 50,176 tokens; that patches pay better than parameters. Equal steps favour large patches, if
anything: they learn from few tokens, while the paper trains for hundreds of epochs.
"""

from __future__ import annotations

from itertools import pairwise

from .base import Claim, Evidence, Lab
from .evaluation import differences, spread

RESOLUTION = 8
PATCHES = (4, 2, 1)
STEPS = 160


def experiment(lab: Lab) -> Evidence:
    specs = {side: f"patch-scaling-nano(patch={side})" for side in PATCHES}
    runs = lab.train(tuple(specs.values()), resolution=RESOLUTION, budget=f"{STEPS}steps")
    losses = {
        side: [float((run.result or {})["loss"]) for run in runs[spec]]
        for side, spec in specs.items()
    }
    falls = [differences(losses[large], losses[small]) for large, small in pairwise(PATCHES)]
    return Evidence(
        values=tuple(min(at) for at in zip(*falls, strict=True)),
        table={
            spec: {
                "tokens": str((RESOLUTION // side) ** 2),
                "parameters": f"{(runs[spec][0].result or {})['parameters']:,}",
                "test loss": spread(losses[side], digits=3),
                "accuracy": spread(lab.accuracy(runs[spec]), " %"),
            }
            for side, spec in specs.items()
        },
        remark=f"{STEPS} steps each on crops of {RESOLUTION} pixels of `bundled:photos`.",
    )


CLAIM = Claim(
    slug="patch-scaling",
    says="The test loss falls with every halving of the patches, down to single pixels (abstract).",
    metric="the smaller of the falls in test loss (nats) from patches of 4 to 2 and from 2 to 1",
    margin=0.0,
    experiment=experiment,
)
