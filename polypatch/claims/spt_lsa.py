"""SPT and LSA: ViTs that learn from few images (Lee, Lee and Song 2021, arXiv 2112.13492).

**The claim**, in title and abstract: shifted patch tokenization and locality self-attention make a
ViT more accurate where there are few training images and no pre-training (by 2.96 points on average
over the ViTs that the paper tries on Tiny-ImageNet).

**Why it can be tested here.** Few images are what this scale has. The training set of
``bundled:photos`` is endless, so it is cut down honestly: the first 1024 crops, 64 a photograph,
are all that a run ever sees, about 30 times each with the light augmentation (other crops for other
seeds); the test set stays whole. Both networks have the same blocks, 16 tokens, steps and images.
Differences of a few points need more than three seeds: there are five.

A third arm, with LSA alone, shows which of the two parts does what. What speaks against the method
here: the photographs differ in brightness and colour, and the layer norm over a patch's values, a
part of SPT, takes much of that away.

**What can't be tested**: the size of the gain on the paper's data sets, after 100 epochs with three
passes each and strong augmentation. SPT brings parameters (its patches hold five copies of the
image), here a quarter more; in the paper's larger networks that is little.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Float, Int64
from torch import Tensor

from ..data import ImageData, Split
from .base import Claim, Evidence, Lab
from .evaluation import arm, differences

RESOLUTION = 32
SAMPLES = 1024
PLAIN = "vit-nano(patch=8)"
LOCAL = "vit-nano(patch=8)+spt-lsa"
SHARPENED = "vit-nano(patch=8)+spt-lsa(spt=false)"
STEPS = 480


@dataclass(frozen=True, eq=False)
class First:
    """The first samples of a split."""

    split: Split
    samples: int

    def __len__(self) -> int:
        return self.samples

    def read(
        self, indices: Int64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch 3 height width"], Int64[Tensor, " batch"]]:
        return self.split.read(indices)


def few(data: ImageData) -> ImageData:
    """The source with a training set of its first :data:`SAMPLES` images, gone through again and
    again."""
    return replace(
        data,
        name=f"{data.name}, the first {SAMPLES}",
        fingerprint=f"{data.fingerprint} first {SAMPLES}",
        train=First(data.train, SAMPLES),
        endless=False,
    )


def experiment(lab: Lab) -> Evidence:
    specs = (PLAIN, LOCAL, SHARPENED)
    runs = lab.train(specs, resolution=RESOLUTION, budget=f"{STEPS}steps", view=few)
    return Evidence(
        values=differences(lab.accuracy(runs[LOCAL]), lab.accuracy(runs[PLAIN])),
        table={spec: arm(made) for spec, made in runs.items()},
        remark=f"{STEPS} steps each on the first {SAMPLES} training crops of {RESOLUTION} pixels "
        "of `bundled:photos`.",
    )


CLAIM = Claim(
    slug="spt-lsa",
    says="With few training images, shifted patches and sharpened attention make a ViT more "
    "accurate (abstract; there by 2.96 points on average on Tiny-ImageNet).",
    metric=f"test accuracy after training on {SAMPLES} images, with SPT and LSA minus without, in "
    "points",
    margin=0.0,
    experiment=experiment,
    seeds=5,
)
