"""Dual PatchNorm: gradients of the patch embedding come into line (Kumar, Dehghani and Houlsby,
TMLR 2023, arXiv 2302.01327).

**The claim**, from the paper's analysis of why its two norms help: in a plain ViT the gradient of
the patch embedding is out of proportion to those of the blocks behind it, and Dual PatchNorm scales
it down, all through training.

**Why it can be tested here.** It is a statement about ratios of gradient norms within one network,
which exists at every size. Both networks are trained alike from the same seeds; after so many steps
the gradients of the plain classification loss are taken on training crops that were never seen. The
patch embedding counts with its matrix only, so that both networks are compared on the same numbers;
its norm is divided by that of the median block, so that a different overall scale of the gradients
doesn't count.

**What can't be tested**: the headline, that accuracy improves often and never gets worse: gains of
one or two points on ImageNet and the claim "never" are beyond minutes of training. The accuracies
stand in the table, not judged; the photographs here differ in brightness and colour, of which the
norm in front of the embedding takes much away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..data import ImageData
from ..hosts import ViT
from ..nn import normalise
from ..patching.dual_patchnorm import gradient_norms
from ..spec import create
from .base import Claim, Evidence, Lab
from .evaluation import geometric_mean, spread

RESOLUTION = 32
PLAIN = "vit-nano(patch=8)"
NORMED = "vit-nano(patch=8)+dual-patchnorm"
STEPS = (50, 150, 300)
BATCHES, BATCH = 8, 64
#: Samples of the endless training set from here on are never trained on.
FRESH = 1_000_000


def embedding_ratio(host: ViT, data: ImageData) -> float:
    """Gradient norm of the patch embedding over that of the median block; norms are averaged over
    some batches of fresh training crops."""
    host.train()
    embedding = 0.0
    blocks = torch.zeros(len(host.blocks), dtype=torch.float64)
    for number in range(BATCHES):
        start = FRESH + number * BATCH
        images, labels = data.train.read(torch.arange(start, start + BATCH))
        host.zero_grad()
        device = next(host.parameters()).device
        logits = host(normalise(images, data.mean, data.std).to(device))
        F.cross_entropy(logits, labels.to(device)).backward()
        norms = gradient_norms(host)
        embedding += norms.embedding
        blocks += torch.tensor(norms.blocks, dtype=torch.float64)
    host.zero_grad()
    return embedding / float(blocks.median())


def experiment(lab: Lab) -> Evidence:
    ratios: dict[str, dict[int, list[float]]] = {
        spec: {step: [] for step in (0, *STEPS)} for spec in (PLAIN, NORMED)
    }
    accuracies: dict[str, Sequence[float]] = {}
    for step in STEPS:
        runs = lab.train((PLAIN, NORMED), resolution=RESOLUTION, budget=f"{step}steps")
        for spec, made in runs.items():
            ratios[spec][step] = [embedding_ratio(lab.host(run), lab.data(run)) for run in made]
            accuracies[spec] = lab.accuracy(made)  # those of the longest training stay
            if step != STEPS[0]:
                continue
            for run in made:
                config = run.config
                fresh = create(
                    spec, classes=config.classes, resolution=RESOLUTION, seed=config.seed
                )
                assert isinstance(fresh, ViT)
                ratios[spec][0].append(embedding_ratio(fresh, lab.data(run)))
    falls = [
        [a / b for a, b in zip(ratios[PLAIN][step], ratios[NORMED][step], strict=True)]
        for step in STEPS
    ]
    names = {step: f"after {step} steps" if step else "untrained" for step in (0, *STEPS)}
    return Evidence(
        values=tuple(geometric_mean(at) for at in zip(*falls, strict=True)),
        table={
            spec: {
                **{names[step]: spread(ratios[spec][step], digits=2) for step in (0, *STEPS)},
                f"accuracy after {STEPS[-1]}": spread(accuracies[spec], " %"),
            }
            for spec in (PLAIN, NORMED)
        },
        remark="Gradient norm of the patch embedding over that of the median block, on crops of "
        f"{RESOLUTION} pixels of `bundled:photos`. Each column is a training of its own length, "
        "with a whole schedule; the untrained networks don't count in the metric.",
    )


CLAIM = Claim(
    slug="dual-patchnorm",
    says="In a plain ViT the gradient of the patch embedding is out of proportion to those of the "
    "blocks; Dual PatchNorm brings it down, throughout training (the analysis of gradient norms).",
    metric="gradient norm of the patch embedding over the median block's, the plain ViT's divided "
    "by Dual PatchNorm's; geometric mean over trainings of 50, 150 and 300 steps",
    margin=1.0,
    experiment=experiment,
)
