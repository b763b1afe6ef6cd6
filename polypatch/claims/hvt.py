"""HVT: what pooled tokens save is better spent on width (Pan et al., ICCV 2021, arXiv 2103.10619).

**The claim**, in the abstract: pooling the tokens from stage to stage frees computation with which
a network can be scaled, and with comparable FLOPs the pooled network is the more accurate one. The
paper's case is Scale HVT-Ti-4, of twice the width of DeiT-Ti and as expensive.

**Why it can be tested here.** The two nano networks stand to each other as those: four blocks each,
patches of 4 pixels, images of 32. ``hvt-nano`` pools in every block, is half as wide again as
``vit-nano`` and costs no more; operations are counted, and stand in the table. Both are trained
alike. The margin, set before looking, is no difference.

**What can't be tested**: ImageNet, where the paper finds 3 points; long training, in which the
wider network's larger number of parameters counts for more.
"""

from __future__ import annotations

import torch

from ..compare import trained
from ..training.cost import count_flops
from .base import Claim, Evidence, Lab
from .evaluation import arm, differences

RESOLUTION = 32
PLAIN = "vit-nano(patch=4)"
POOLED = "hvt-nano"
STEPS = 200


def experiment(lab: Lab) -> Evidence:
    runs = lab.train((PLAIN, POOLED), resolution=RESOLUTION, budget=f"{STEPS}steps")
    image = torch.zeros(1, 3, RESOLUTION, RESOLUTION)
    return Evidence(
        values=differences(lab.accuracy(runs[POOLED]), lab.accuracy(runs[PLAIN])),
        table={
            spec: {**arm(made), "operations": f"{count_flops(trained(made[0]), image) / 1e6:.1f} M"}
            for spec, made in runs.items()
        },
        remark=f"{STEPS} steps each on crops of {RESOLUTION} pixels of `bundled:photos`; "
        "operations are counted, for one image.",
    )


CLAIM = Claim(
    slug="hvt",
    says="With comparable operations a wider transformer with pooled tokens is more accurate than "
    "one that keeps them all (abstract).",
    metric="test accuracy of the pooled, wider network minus that of the plain one, in points",
    margin=0.0,
    experiment=experiment,
    seeds=4,
)
