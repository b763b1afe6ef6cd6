"""FlexiViT: one set of weights serves many patch sizes (Beyer et al., CVPR 2023, arXiv 2212.08013).

**The claim**, in the abstract and the reason for the paper's title: randomising the patch size in
training gives one set of weights that does well over a wide range of patch sizes, where a ViT that
was trained at one size does well at that size only.

**Why it can be tested here.** It compares one network at several patch sizes with other networks at
the same sizes; neither scale nor ImageNet enters. All are trained alike on crops of 48 pixels,
which patches of 4, 6, 8, 12, 16 and 24 pixels tile: half of to three times 8, the range that the
paper has around 16 at 240 pixels. At sizes other than its own a fixed ViT gets all the help that
there is: its patch embedding is PI-resized, its position table resampled. There are two fixed ViTs,
of patch 8 and 16; the metric takes the better of the two, for each seed.

**What can't be tested**: the accuracies, the transfer to other tasks, and distillation from a
larger teacher, without which the paper's best models are not had. "Usually matches a ViT trained at
that size" is reported in the table, not judged.
"""

from __future__ import annotations

from copy import deepcopy

import torch

from ..hosts import ViT
from ..nn import GridPatching
from ..patching.flexivit import resample_patch_embed, set_patch
from .base import Claim, Evidence, Lab
from .evaluation import accuracy, batches, differences, spread

RESOLUTION = 48
SIZES = (4, 6, 8, 12, 16, 24)
FLEXIBLE = "vit-nano(patch=8)+flexivit"
FIXED = ("vit-nano(patch=8)", "vit-nano(patch=16)")
STEPS = 400


@torch.no_grad()
def at_patch_size(host: ViT, size: int) -> ViT:
    """A copy of a plain ViT at another patch size: embedding PI-resized; the position table is
    resampled by the host itself."""
    old = host.patching
    assert isinstance(old, GridPatching)
    copy = deepcopy(host)
    new = GridPatching(
        dim=host.dim, patch=size, channels=old.proj.in_channels, bias=old.proj.bias is not None
    )
    new.proj.weight.copy_(resample_patch_embed(old.proj.weight, (size, size)))
    if old.proj.bias is not None and new.proj.bias is not None:
        new.proj.bias.copy_(old.proj.bias)
    copy.patching, copy.patch = new.to(old.proj.weight.device), size
    return copy.eval()


def experiment(lab: Lab) -> Evidence:
    runs = lab.train((FLEXIBLE, *FIXED), resolution=RESOLUTION, budget=f"{STEPS}steps")
    test = batches(lab.data(runs[FLEXIBLE][0]))
    # Per spec and patch size: accuracy of each seed.
    scores: dict[str, dict[int, list[float]]] = {}
    for spec in runs:
        scores[spec] = {size: [] for size in SIZES}
        for run in runs[spec]:
            model = lab.host(run)
            for size in SIZES:
                other = set_patch(model, size) if spec == FLEXIBLE else at_patch_size(model, size)
                scores[spec][size].append(accuracy(other, test))
    means = {
        spec: [sum(at) / len(SIZES) for at in zip(*scores[spec].values(), strict=True)]
        for spec in runs
    }
    better = [max(pair) for pair in zip(*(means[spec] for spec in FIXED), strict=True)]
    own = [
        f"{spread(differences(scores[FLEXIBLE][size], scores[spec][size]))} points at patch {size}"
        for spec, size in zip(FIXED, (8, 16), strict=True)
    ]
    return Evidence(
        values=differences(means[FLEXIBLE], better),
        table={
            spec: {
                **{f"patch {size}": spread(scores[spec][size]) for size in SIZES},
                "mean": spread(means[spec]),
            }
            for spec in runs
        },
        remark=f"Test accuracy in per cent, {STEPS} steps each on crops of {RESOLUTION} pixels of "
        "`bundled:photos`. Against each fixed ViT at the size that it was trained for, FlexiViT "
        f"makes {' and '.join(own)}.",
    )


CLAIM = Claim(
    slug="flexivit",
    says="Drawing the patch size anew in each training step gives one set of weights that does "
    "well over a wide range of patch sizes, where a ViT trained at one size does not (abstract).",
    metric="test accuracy averaged over patch sizes 4, 6, 8, 12, 16 and 24, FlexiViT minus the "
    "better of two ViTs trained at patch 8 and at patch 16 and resized, in points",
    margin=0.0,
    experiment=experiment,
)
