"""Patches are all you need? (Trockman and Kolter, TMLR 2023, arXiv 2201.09792).

**The claim**, in the abstract: a network that keeps nothing of a vision transformer but its patches
outperforms the ViT for similar parameter counts and data set sizes.

**Why it can be tested here.** It compares two architectures on the same patches, parameters and
data, at any size. ``convmixer-nano`` is widened until its parameters are those of ``vit-nano``;
both cut 32 pixels into patches of 4 and make the same number of steps with the same recipe. The
metric is the difference of their accuracies.

**What can't be tested**: that this holds on ImageNet after hundreds of epochs, where the
transformer has had the data to make up for the bias that it lacks. In a short training on few
photographs that bias counts for more: a verdict here speaks of small data, not of large.
"""

from __future__ import annotations

from .base import Claim, Evidence, Lab
from .evaluation import arm, differences

VIT = "vit-nano"
CONVMIXER = "convmixer-nano(dim=195,kernel=7)"
STEPS = 200


def experiment(lab: Lab) -> Evidence:
    runs = lab.train((VIT, CONVMIXER), budget=f"{STEPS}steps")
    return Evidence(
        values=differences(lab.accuracy(runs[CONVMIXER]), lab.accuracy(runs[VIT])),
        table={spec: arm(runs[spec]) for spec in (VIT, CONVMIXER)},
        remark=f"{STEPS} steps each on crops of 32 pixels of `bundled:photos`.",
    )


CLAIM = Claim(
    slug="convmixer",
    says="Patches are what counts: a convolutional network on the same patches, with the same "
    "number of parameters, is more accurate than a ViT (the abstract).",
    metric="test accuracy of ConvMixer minus that of the ViT, in points",
    margin=0.0,
    experiment=experiment,
)
