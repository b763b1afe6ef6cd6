"""Transformer in transformer: attention inside of each patch pays (Han et al., NeurIPS 2021, arXiv
2103.00112).

**The claim**, in the abstract: letting the words inside of a patch attend to each other costs
little and makes a vision transformer more accurate, by 1.7 points at a similar cost.

**Why it can be tested here.** It compares two networks that differ in nothing but the inner
transformer, at any size: patches, width, depth, heads and recipe are the same. The words' width is
in the paper's proportion, the words of a patch together as wide as the patch's token. Both networks
make the same number of steps on the same images; the metric is the difference of their accuracies,
and the margin 0: that they differ at all. Counted operations stand in the table, not judged.

**What can't be tested**: how much it is on ImageNet after 300 epochs. A short training on small
images may well need words more, or less, than a long one on large images.
"""

from __future__ import annotations

import torch

from ..compare import trained
from ..training.cost import count_flops
from .base import Claim, Evidence, Lab
from .evaluation import arm, differences

RESOLUTION = 32
PLAIN = "vit-nano(patch=8)"
#: 16 words of 4 channels beside a token of 64
NESTED = "tnt-nano(dim=64,heads=4,inner_dim=4,inner_heads=1,drop_path=0)"
STEPS = 300


def experiment(lab: Lab) -> Evidence:
    runs = lab.train((PLAIN, NESTED), resolution=RESOLUTION, budget=f"{STEPS}steps")
    image = torch.zeros(1, 3, RESOLUTION, RESOLUTION)
    return Evidence(
        values=differences(lab.accuracy(runs[NESTED]), lab.accuracy(runs[PLAIN])),
        table={
            spec: {
                **arm(runs[spec]),
                "operations": f"{count_flops(trained(runs[spec][0]), image) / 1e6:.2f} M",
            }
            for spec in (PLAIN, NESTED)
        },
        remark=f"{STEPS} steps each on crops of {RESOLUTION} pixels of `bundled:photos`, patches "
        "of 8 pixels, words 2 pixels apart. Operations are counted, for one image.",
    )


CLAIM = Claim(
    slug="tnt",
    says="A small transformer over the words of each patch, inside of the one over the patches, "
    "makes a vision transformer more accurate at hardly more cost (abstract).",
    metric="test accuracy with inner transformers minus without, in points",
    margin=0.0,
    experiment=experiment,
    seeds=5,
)
