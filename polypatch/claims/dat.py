"""Deformable attention: points that move cost hardly more than points that stand (Xia et al., CVPR
2022, arXiv 2201.00520; DAT++, arXiv 2309.01430).

**The claim**, in section 3 on computational complexity: beside attention to N sampled keys,
2 HWNC + 2 HWC² + 2 NC² multiplications, what predicts the offsets costs (k² + 2) NC, which is at
most 6 % of the module in their example: the third stage of a Swin-T, 14 × 14 places, 384 channels,
49 points, k = 5. (They give 79.63 M for the attention and 5.08 M for the offsets; their formula
makes it a tenth of that.)

**Why it can be tested here.** It is a count, of the very example: operations of the module are
counted with offsets and without (the authors' ablation, in which the keys are means of the cells),
and the metric is how far the overhead stays below 6 %. A count has no spread; the seeds show that
the weights don't matter. The paper counts matrix products and convolutions, and so does this; the
bilinear sampling, of the map and of the position bias, is in neither count. What it costs in *time*
stands in the table, without a verdict, because the paper claims nothing about it.

**What can't be tested**: what the moving points are for, the accuracy on ImageNet, where the
ablation loses a fraction of a point.
"""

from __future__ import annotations

import torch

from ..backbones.dat_attention import DeformableAttention
from ..training.cost import count_flops, latency
from .base import Claim, Evidence, Lab
from .evaluation import spread

SIDE, DIM, HEADS, GROUPS, STRIDE, KERNEL = 14, 384, 12, 3, 2, 5
LIMIT = 6.0


def module(*, offsets: bool, stride: int = STRIDE) -> DeformableAttention:
    return DeformableAttention(
        dim=DIM,
        heads=HEADS,
        groups=GROUPS,
        size=(SIDE, SIDE),
        stride=stride,
        kernel=KERNEL,
        bound=None,
        offsets=offsets,
        position="table" if offsets else None,
        conference=False,
        attn_drop=0.0,
        drop=0.0,
    ).eval()


def experiment(lab: Lab) -> Evidence:
    arms = {
        "49 points that move": dict(offsets=True),
        "49 points that stand": dict(offsets=False),
        "all 196 places": dict(offsets=False, stride=1),
    }
    counts: dict[str, list[int]] = {name: [] for name in arms}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for seed in range(lab.seeds):
        torch.manual_seed(seed)
        x = torch.randn(1, SIDE, SIDE, DIM)
        for name, options in arms.items():
            part = module(**options)
            counts[name].append(count_flops(part, x))
            times[name].append(1e3 * latency(lambda part=part, x=x: part(x)))
    moving, standing, _ = counts.values()
    shares = [100 * (a - b) / a for a, b in zip(moving, standing)]
    return Evidence(
        values=tuple(LIMIT - share for share in shares),
        table={
            name: {
                # 2 operations for a multiplication with its addition, which the paper counts once
                "multiplications": f"{counts[name][0] / 2e6:.2f} M",
                "batch 1": spread(times[name], " ms", digits=2),
            }
            for name in arms
        },
        remark=f"One module on a map of {SIDE} × {SIDE} places of {DIM} channels. The offsets are "
        f"{shares[0]:.2f} % of the operations; the rest of the difference in time is the sampling "
        "of keys and of the position bias, which the last two rows don't have.",
    )


CLAIM = Claim(
    slug="dat",
    says="Predicting where deformable attention looks costs little: at most 6 % of the module in "
    "the paper's example (section 3, computational complexity).",
    metric="6 % minus the offsets' share of the module's operations, in points",
    margin=0.0,
    experiment=experiment,
)
