"""Early stages without attention: less work, nothing lost (Pan et al., AAAI 2022, arXiv
2105.14217).

**The claim**, in the abstract and the ablation of early attention: in a pyramid's first stages,
where there are most tokens, attention brings little; MLPs alone there cost much less and lose no
accuracy.

**Why it can be tested here.** Both networks are trained alike, with attention in all four stages
or in the last two (``early="attention"``, ``"mlp"``); everything else, merging included, is the
same. That there is less work is a count; that accuracy is *kept* needs a bound: a loss of less than
one point counts as kept, set before looking, so the metric may be negative.

**What can't be tested**: ImageNet at 224 pixels, where the first stage has 3136 tokens, not 64, and
the savings are far larger than here; training to the end. In a few hundred steps attention may not
yet have learned what it is good for, which favours the claim.
"""

from __future__ import annotations

import torch

from ..compare import trained
from ..nn import normalise
from ..training.cost import count_flops
from .base import Claim, Evidence, Lab
from .evaluation import arm, differences

RESOLUTION = 32
MLP = "lit-nano(early=mlp)"
ATTENTION = "lit-nano(early=attention)"
STEPS = 250
COUNTED = 64


def experiment(lab: Lab) -> Evidence:
    runs = lab.train((MLP, ATTENTION), resolution=RESOLUTION, budget=f"{STEPS}steps")
    data = lab.data(runs[MLP][0])
    images, _ = data.test.read(torch.arange(COUNTED))
    images = normalise(images, data.mean, data.std)
    flops = {spec: count_flops(trained(made[0]), images) / COUNTED for spec, made in runs.items()}
    return Evidence(
        values=differences(lab.accuracy(runs[MLP]), lab.accuracy(runs[ATTENTION])),
        table={
            spec: {**arm(made), "operations": f"{flops[spec] / 1e6:.1f} M"}
            for spec, made in runs.items()
        },
        remark=f"{STEPS} steps each on crops of {RESOLUTION} pixels of `bundled:photos`. "
        f"Without early attention there is {100 * (1 - flops[MLP] / flops[ATTENTION]):.0f} % less "
        "to compute; operations are those of matrix products, convolutions and attention, for one "
        "image.",
    )


CLAIM = Claim(
    slug="lit",
    says="MLPs in place of attention in the early stages of a pyramid save work and lose no "
    "accuracy (abstract).",
    metric="test accuracy without attention in the first two stages minus with it, in points",
    margin=-1.0,
    experiment=experiment,
    seeds=5,
)
