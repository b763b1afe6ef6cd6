"""CrossViT: class tokens that read the other branch cost linear time (Chen et al., ICCV 2021, arXiv
2103.14899).

**The claim**, in the abstract: fusing two branches by cross-attention "only requires linear time
for both computational and memory complexity instead of quadratic time otherwise"; "otherwise" is
self-attention over the tokens of both branches (sec. 3.3).

**Why it can be tested here.** It is a statement on growth, and holds for any weights. Both fusions
are timed as they stand in the library, of the widths of CrossViT-S, on grids of 32×32 and of 64×64
tokens in each branch. The exponent of growth is log₄ of the ratio of the times; it should be 1 for
cross-attention, and near 2 for the other, below by the share of its linear maps. The margin, half
an order, was set beforehand.

**What can't be tested**: that cross-attention is the most accurate of the fusions (81.0 % against
80.0 to 80.3 %, table 6), as differences of less than one point don't show in minutes of training.
Memory isn't judged but stands in the table: with fused attention neither keeps a matrix of weights,
so both are linear in it.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ..backbones.crossvit_fusion import AllFusion, CrossAttention, CrossFusion
from ..training.cost import count_flops, latency, peak_memory
from .base import Claim, Evidence, Lab
from .evaluation import spread

DIMS, HEADS = (192, 384), 6
SIDES = (32, 64)


def fusions() -> dict[str, nn.Module]:
    """Both fusions of the widths of CrossViT-S."""
    attentions = [
        [CrossAttention(dim=dim, heads=HEADS, qkv_bias=True, eps=1e-6)] for dim in DIMS[::-1]
    ]
    return {
        "cross-attention": CrossFusion(dims=DIMS, attentions=attentions, eps=1e-6),
        "all-attention": AllFusion(dims=DIMS, heads=HEADS, qkv_bias=True, eps=1e-6),
    }


class Fused(nn.Module):
    """A fusion as a function of both branches' tokens in one tensor, (batch, tokens, all dims)."""

    def __init__(self, *, fusion: nn.Module, side: int) -> None:
        super().__init__()
        self.fusion, self.grid = fusion, (side, side)

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        branches = [x.contiguous() for x in tokens.split(DIMS, dim=-1)]
        return self.fusion(branches, [self.grid] * 2)


def experiment(lab: Lab) -> Evidence:
    times: dict[str, dict[int, list[float]]] = {}
    costs: dict[str, dict[int, tuple[float, float]]] = {}
    for seed in range(lab.seeds):
        torch.manual_seed(seed)
        for name, fusion in fusions().items():
            for side in SIDES:
                tokens = torch.randn(1, 1 + side**2, sum(DIMS))
                run = Fused(fusion=fusion, side=side).eval()
                seconds = latency(lambda run=run, tokens=tokens: run(tokens), seconds=1.0)
                times.setdefault(name, {}).setdefault(side, []).append(seconds)
                memory = peak_memory(lambda run=run, tokens=tokens: run(tokens))
                costs.setdefault(name, {})[side] = (count_flops(run, tokens), memory)
    few, many = SIDES
    exponents = {
        name: [math.log(b / a, 4) for a, b in zip(found[few], found[many])]
        for name, found in times.items()
    }
    return Evidence(
        values=tuple(
            a - c for a, c in zip(exponents["all-attention"], exponents["cross-attention"])
        ),
        table={
            name: {
                "exponent of time": spread(exponents[name], digits=2),
                **{
                    f"{side}² tokens a branch": f"{1e3 * min(found[side]):.1f} ms, "
                    f"{costs[name][side][0] / 1e9:.2f} G operations, "
                    f"{costs[name][side][1] / 2**20:.0f} MiB"
                    for side in SIDES
                },
            }
            for name, found in times.items()
        },
        remark="One fusion between branches of 192 and 384 channels, batch 1, random weights and "
        "tokens; times are medians, and the shortest over seeds stands in the table. "
        "Cross-attention is computed without projecting keys and values, which doesn't "
        "change its order.",
    )


CLAIM = Claim(
    slug="crossvit",
    says="Fusing the branches by cross-attention of class tokens takes linear time, instead of "
    "quadratic time for attention among all tokens (abstract, sec. 3.3).",
    metric="exponent of the time's growth with the number of tokens: that of all-attention minus "
    "that of cross-attention",
    margin=0.5,
    experiment=experiment,
    seeds=5,
)
