"""Token merging: half the work, without training, hardly any loss (Bolya et al., ICLR 2023, arXiv
2210.09461).

**The claim**, in the abstract: similar tokens of a trained ViT can be merged block by block without
any training; that doubles the throughput of large ViTs and costs 0.2 to 0.3 points of accuracy.

**Why it can be tested here.** A ViT is trained without merging and evaluated with it, on the same
images: a paired comparison, in which the noise of training does not enter. 16 of 64 tokens are
merged in each of the four blocks, which halves the counted operations. The margin is the paper's
own effect: a loss of 0.3 points at most. Dropping as many tokens at random is shown beside it, as a
floor.

**What can't be tested**: throughput itself, which at this size is ruled by the matching's own
overhead; ViT-L and ViT-H. The paper finds that smaller networks lose more, and this one is much
smaller than any of its own, so the margin is a hard one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..reducing.tome import TokenMerging, plug
from ..tokens import Tokens
from ..training.cost import count_flops
from .base import Claim, Evidence, Lab
from .evaluation import accuracy, batches, differences, spread

RESOLUTION = 32
HOST = "vit-nano(patch=4)"
#: Tokens a block; of 64, 48, 32, 16 are left and then 8, as half is the most that can go.
MERGED = 16
STEPS = 300


class RandomDropping(TokenMerging):
    """Drops as many tokens as :class:`TokenMerging` merges, whichever."""

    def forward(self, tokens: Tokens, mixed: object) -> Tokens:
        start = tokens.prefix
        batch, count = tokens.x.shape[0], tokens.x.shape[1] - start
        left = count - min(int(self.r), count // 2)
        order: Float[Tensor, "batch placed"] = torch.rand(batch, count).argsort(1)
        kept = order[:, :left].sort(1).values.to(tokens.x.device)
        return tokens.keep(kept)


def experiment(lab: Lab) -> Evidence:
    runs = lab.train((HOST,), resolution=RESOLUTION, budget=f"{STEPS}steps")[HOST]
    test = batches(lab.data(runs[0]))
    ways = ("as trained", f"merging {MERGED} a block", f"dropping {MERGED} a block at random")
    scores: dict[str, list[float]] = {way: [] for way in ways}
    operations: dict[str, str] = {}
    for run in runs:
        torch.manual_seed(run.config.seed)
        for way in ways:
            model = lab.host(run)
            for block in model.blocks if way == ways[2] else ():
                block.reducing = RandomDropping(r=MERGED)  # type: ignore[assignment]
            if way == ways[1]:
                plug(model, r=MERGED)
            scores[way].append(accuracy(model, test))
            if way not in operations:
                images = test[0][0]
                operations[way] = f"{count_flops(model, images) / len(images) / 1e6:.1f} M"
    return Evidence(
        values=differences(scores[ways[1]], scores[ways[0]]),
        table={
            way: {"operations": operations[way], "accuracy": spread(scores[way], " %")}
            for way in ways
        },
        remark=f"One training of {STEPS} steps a seed on crops of {RESOLUTION} pixels of "
        "`bundled:photos`, without merging. Operations are counted, for one image; the matching's "
        "similarities are among them.",
    )


CLAIM = Claim(
    slug="tome",
    says="Merging similar tokens of a trained ViT, without training, halves its work and costs 0.2 "
    "to 0.3 points of accuracy (abstract; of large ViTs).",
    metric="test accuracy with merging at half the operations minus without, in points",
    margin=-0.3,
    experiment=experiment,
)
