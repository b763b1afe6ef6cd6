"""ViKANformer (Shreyas and Akshath 2025, arXiv 2503.01124).

**The claim**, in the abstract: vision transformers with Kolmogorov–Arnold layers do very well on
simple patterns (above 97 % on MNIST, Fast-KAN among the best), at the price of training time.

**Why it can be tested here.** Handwritten digits come with scikit-learn, the networks are small.
What the number alone can't show is whether the layers are the reason, so the metric is a
difference: the accuracy with Gaussians (Fast-KAN) minus that of the same network with linear maps
in their place, after the same steps on the same digits. The table says what they cost.

**What can't be tested**: that 97 % are reached on MNIST, which isn't bundled.
"""

from __future__ import annotations

from .base import Claim, Evidence, Lab
from .evaluation import arm, differences, spread

LINEAR = "vikanformer-nano(expansion=vanilla)"
RADIAL = "vikanformer-nano"
STEPS = 150


def experiment(lab: Lab) -> Evidence:
    specs = (LINEAR, RADIAL)
    runs = lab.train(specs, data="bundled:digits", budget=f"{STEPS}steps")
    speeds = {
        spec: [float((run.result or {})["images_per_second"]) for run in runs[spec]]
        for spec in specs
    }
    return Evidence(
        values=differences(lab.accuracy(runs[RADIAL]), lab.accuracy(runs[LINEAR])),
        table={
            spec: {**arm(runs[spec]), "training, images/s": spread(speeds[spec], digits=0)}
            for spec in specs
        },
        remark=f"{STEPS} steps each on `bundled:digits` at 32 pixels.",
    )


CLAIM = Claim(
    slug="vikanformer",
    says="Kolmogorov–Arnold layers in place of a vision transformer's linear maps recognise "
    "handwritten digits better (the abstract).",
    metric="test accuracy with Gaussian expansions minus that with linear maps, in points",
    margin=0.0,
    experiment=experiment,
)
