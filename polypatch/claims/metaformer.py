"""MetaFormer is what you need, not the token mixer (Yu et al., CVPR 2022, arXiv 2111.11418).

**The claim**, in title and abstract: what a transformer achieves is due to its general
architecture more than to how it mixes tokens. The paper's own measure is its ablation (table 5): on
ImageNet a network whose blocks mix nothing reaches 74.3 %, mean pooling 77.2 %, attention in half
of the stages 81.0 %.

**Why it can be tested here.** The same network is trained with different mixers and nothing else
changed: none at all (identity), mean pooling, and attention in all stages. The metric is the share
of the attention network's accuracy above chance that is left without any mixing in the blocks; in
the paper it is 92 %, and the margin is 90 %. What mixes then are the convolutions between the
stages alone.

**What can't be tested**: that pooling outdoes tuned transformers of its time on ImageNet. And the
verdict speaks of small images: there are 64 places in the first stage, and the convolutions between
the stages join them soon.
"""

from __future__ import annotations

from .base import Claim, Evidence, Lab
from .evaluation import arm

STEPS = 200
IDENTITY, POOLING, ATTENTION = (
    f"metaformer-nano(mixers={word})" for word in ("iiii", "pppp", "aaaa")
)


def experiment(lab: Lab) -> Evidence:
    runs = lab.train((IDENTITY, POOLING, ATTENTION), budget=f"{STEPS}steps")
    chance = 100 / runs[IDENTITY][0].config.classes
    pairs = zip(lab.accuracy(runs[IDENTITY]), lab.accuracy(runs[ATTENTION]), strict=True)
    return Evidence(
        values=tuple(100 * (without - chance) / (mixed - chance) for without, mixed in pairs),
        table={spec: arm(made) for spec, made in runs.items()},
        remark=f"{STEPS} steps each on crops of 32 pixels of `bundled:photos`; chance is "
        f"{chance:.1f} %.",
    )


CLAIM = Claim(
    slug="metaformer",
    says="The architecture counts, not the token mixer: a MetaFormer whose blocks mix no tokens "
    "keeps nine tenths of the accuracy that attention gives it (the title; table 5).",
    metric="accuracy above chance with identity as the mixer, as a share of that with attention, "
    "in per cent",
    margin=90.0,
    experiment=experiment,
)
