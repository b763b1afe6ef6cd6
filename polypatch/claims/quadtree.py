"""Adaptive patch sizes: fewer tokens, the same accuracy (Choudhury et al., ICLR 2026, arXiv
2510.18091).

**The claim**, in the abstract: larger patches where an image is flat make a ViT faster (by 40 to 50
% for ViT-L and ViT-H) and keep its accuracy.

**Why it can be tested here.** Both networks are trained alike; the one with patches of two sizes
gets as many tokens as its images ask for. That there are fewer tokens and operations is a count;
that accuracy is *kept* needs a bound: a loss of less than one point counts as kept, set before
looking, and the paper's own losses are smaller. So the metric may be negative.

**What can't be tested**: the speed-up on a GPU at 224 to 448 pixels, where finding the entropies is
nothing beside the blocks. Here counted operations and milliseconds stand in the table, not judged.
Nor can the fine-tuning of a pretrained network in one epoch.
"""

from __future__ import annotations

import torch

from ..nn import normalise
from ..training.cost import count_flops
from .base import Claim, Evidence, Lab
from .evaluation import arm, differences

RESOLUTION = 32
GRID = "vit-nano(patch=4)"
ADAPTIVE = "vit-nano(patch=4)+quadtree"
STEPS = 300


def experiment(lab: Lab) -> Evidence:
    runs = lab.train((GRID, ADAPTIVE), resolution=RESOLUTION, budget=f"{STEPS}steps")
    data = lab.data(runs[GRID][0])
    images, _ = data.test.read(torch.arange(256))
    images = normalise(images, data.mean, data.std)
    flops = {
        spec: count_flops(lab.host(made[0]), images) / len(images) for spec, made in runs.items()
    }
    return Evidence(
        values=differences(lab.accuracy(runs[ADAPTIVE]), lab.accuracy(runs[GRID])),
        table={
            spec: {**arm(made), "operations": f"{flops[spec] / 1e6:.1f} M"}
            for spec, made in runs.items()
        },
        remark=f"{STEPS} steps each on crops of {RESOLUTION} pixels of `bundled:photos`; patches "
        "of 4 and 8 pixels, default thresholds. Operations are those of matrix products, "
        "convolutions and attention, for one image; finding the entropies is not in them.",
    )


CLAIM = Claim(
    slug="quadtree",
    says="Larger patches where an image is flat save tokens and keep the accuracy (abstract).",
    metric="test accuracy with patches of 4 and 8 pixels minus that of the grid of 4, in points",
    margin=-1.0,
    experiment=experiment,
)
