"""DuoFormer (Tang et al. 2025, arXiv 2506.12982).

**The claim**, in the abstract: the maps of all stages of a convolutional network, related to each
other at every place, make a transformer behind it clearly more accurate.

**Why it can be tested here.** The number of scales is an option of the network: with two of them a
window knows little more than the coarsest map, with four it has the whole hierarchy, and everything
else stays as it is. The metric is the difference of accuracy, four scales minus two, after the same
steps on crops of 64 pixels.

**What can't be tested**: medical images, and a ResNet that was trained before; here everything is
trained from scratch, which makes the convolutional part weaker than in the paper.
"""

from __future__ import annotations

from .base import Claim, Evidence, Lab
from .evaluation import arm, differences

TWO, FOUR = "duoformer-nano(scales=2)", "duoformer-nano"
STEPS = 120


def experiment(lab: Lab) -> Evidence:
    runs = lab.train((TWO, FOUR), resolution=64, budget=f"{STEPS}steps")
    return Evidence(
        values=differences(lab.accuracy(runs[FOUR]), lab.accuracy(runs[TWO])),
        table={spec: arm(runs[spec]) for spec in (TWO, FOUR)},
        remark=f"{STEPS} steps each on crops of 64 pixels of `bundled:photos`.",
    )


CLAIM = Claim(
    slug="duoformer",
    says="Attention over all scales of a convolutional network makes it more accurate (the "
    "abstract).",
    metric="test accuracy with four scales minus that with two, in points",
    margin=0.0,
    experiment=experiment,
)
