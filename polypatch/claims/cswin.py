"""CSWin: a depthwise convolution of the values tells where tokens lie (Dong et al., CVPR 2022,
arXiv 2107.00652).

**The claim**, in the abstract: the locally-enhanced positional encoding (LePE) "handles the local
positional information better than existing encoding schemes"; an ablation compares it on ImageNet
with none and with absolute, conditional and relative encodings.

**Why it can be tested here.** LePE is a part that can be left away: ``cswin-nano(lepe=false)`` is
the same network without it, and both train on the same batches; it costs hardly any operations.
The encodings of the ablation differ by less than a few seeds resolve, so the baseline is the
network without one, and the margin 0.

**What can't be tested**: the comparison with other encodings; the stripes themselves, whose
advantage over square windows needs maps of more places than the 8 × 8 of the first stage here; and
ImageNet's, COCO's and ADE20K's scores. The stem's and the merges' convolutions tell places, too, by
the zeros at the border: no network here is without any hint.
"""

from __future__ import annotations

import torch

from ..compare import trained
from ..nn import normalise
from ..training.cost import count_flops
from .base import Claim, Evidence, Lab
from .evaluation import arm, differences

RESOLUTION = 32
PLAIN = "cswin-nano(lepe=false)"
ENCODED = "cswin-nano"
STEPS = 250


def experiment(lab: Lab) -> Evidence:
    runs = lab.train((PLAIN, ENCODED), resolution=RESOLUTION, budget=f"{STEPS}steps")
    data = lab.data(runs[PLAIN][0])
    images, _ = data.test.read(torch.arange(64))
    images = normalise(images, data.mean, data.std)
    flops = {
        spec: count_flops(trained(made[0]), images) / len(images) for spec, made in runs.items()
    }
    return Evidence(
        values=differences(lab.accuracy(runs[ENCODED]), lab.accuracy(runs[PLAIN])),
        table={
            spec: {**arm(made), "operations": f"{flops[spec] / 1e6:.1f} M"}
            for spec, made in runs.items()
        },
        remark=f"{STEPS} steps each on crops of {RESOLUTION} pixels of `bundled:photos`, from the "
        "same seeds. Operations are counted, for one image.",
    )


CLAIM = Claim(
    slug="cswin",
    says="A depthwise convolution of the values (LePE) is a better positional encoding (abstract; "
    "here: better than none).",
    metric="test accuracy with LePE minus without, in points",
    margin=0.0,
    experiment=experiment,
    seeds=4,
)
