"""Attention and MLP side by side: better than one after the other (Zhong et al., workshop on deep
learning and differential equations at NeurIPS 2022, arXiv 2212.06011).

**The claim**, in the abstract: placing attention and MLP parallel to each other, which is one Euler
step of an equation in place of two, improves transformers in several tasks.

**Why it can be tested here.** Both networks have the same parameters and operations; the same small
ViT is trained with either layer, under equal steps and data. Effects in the paper are small, so
there are five seeds, and large patches to pay for them.

**What can't be tested**: the tasks on language; the second claim, that a better solver improves
image classification further: at four evaluations a layer, as many seeds take too long here.
"""

from __future__ import annotations

from .base import Claim, Evidence, Lab
from .evaluation import arm, differences

RESOLUTION = 32
USUAL = "vit-nano(patch=8)"
PARALLEL = "vit-nano(patch=8)+neural-ode"
STEPS = 400


def experiment(lab: Lab) -> Evidence:
    specs = (USUAL, PARALLEL)
    runs = lab.train(specs, resolution=RESOLUTION, budget=f"{STEPS}steps")
    return Evidence(
        values=differences(lab.accuracy(runs[PARALLEL]), lab.accuracy(runs[USUAL])),
        table={spec: arm(made) for spec, made in runs.items()},
        remark=f"{STEPS} steps each on crops of {RESOLUTION} pixels of `bundled:photos`.",
    )


CLAIM = Claim(
    slug="neural-ode",
    says="Attention and MLP side by side make a transformer more accurate than one after the "
    "other, at the same parameters (abstract).",
    metric="test accuracy of a ViT with parallel layers minus with the usual ones, in points",
    margin=0.0,
    experiment=experiment,
    seeds=5,
)
