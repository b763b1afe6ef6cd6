"""SPFormer: superpixels follow the image (Mei, Chen, Yuille and Xie, TMLR 2025, arXiv 2401.02931).

**The claim**, in the abstract: instead of fixed patches, the network divides an image into
irregular regions that adapt to its content, without being told where edges are: only the
classification loss trains them. The paper measures them as superpixels against square patches of
the same number, with segmentation labels.

**Why it can be tested here.** Whether regions adapt is a property of a trained tokenizer, not of
its accuracy. There are no segmentation labels here, so regions are judged by the measure that needs
none: the *explained variation* of Moore et al. 2008 ("Superpixel Lattices", CVPR), that is what
share of an image's variance in colour is left if each region is painted in its mean colour. Test
crops show parts of photographs that training didn't. The network is trained for classification; its
hard regions (the superpixel that a pixel is most similar to) are compared with the grid's cells,
which are as many. Regions may be fewer than cells, where a superpixel wins no pixel; the grid keeps
that advantage.

**What can't be tested**: the gain on ImageNet (1.4 and 1.1 points over DeiT). The accuracies at
equal numbers of tokens stand in the table, not judged; nor is the robustness to rotation.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..data import ImageData
from ..hosts import ViT
from ..nn import normalise
from ..spec import create
from .base import Claim, Evidence, Lab
from .evaluation import arm, differences, spread

RESOLUTION = 32
GRID = "vit-nano(patch=8)"
SUPERPIXELS = "vit-nano(patch=8)+spformer"
STEPS = 400


def explained_variation(
    images: Float[Tensor, "batch channels height width"],
    labels: Int64[Tensor, "#batch rows columns"],
) -> Float[Tensor, " batch"]:
    """Share of each image's variance (about its mean colour) that the regions' mean colours keep,
    0 to 1. Labels may be coarser than the image, in whole numbers of pixels; an image of one colour
    counts 1."""
    factor = images.shape[-2] // labels.shape[-2]
    labels = labels.repeat_interleave(factor, 1).repeat_interleave(factor, 2).flatten(1)
    pixels = images.flatten(2).transpose(1, 2)  # (batch, pixels, channels)
    index = labels.expand(len(pixels), -1)
    regions = int(index.max()) + 1
    counts = pixels.new_zeros(len(pixels), regions).scatter_add(
        1, index, torch.ones_like(index, dtype=pixels.dtype)
    )
    sums = pixels.new_zeros(len(pixels), regions, pixels.shape[2])
    sums = sums.scatter_add(1, index[..., None].expand_as(pixels), pixels)
    means = sums / counts.clamp_min(1)[..., None]
    mean = pixels.mean(1, keepdim=True)
    between = (counts * (means - mean).square().sum(-1)).sum(1)
    total = (pixels - mean).square().sum((1, 2))
    return torch.where(total > 1e-9, between / total.clamp_min(1e-9), torch.ones_like(total))


@torch.no_grad()
def of_superpixels(model: ViT, data: ImageData) -> tuple[float, float]:
    """Mean explained variation of the model's regions on the test split in per cent, and how many
    regions an image has on average."""
    model.eval()
    device = next(model.parameters()).device
    kept: list[Tensor] = []
    counts: list[float] = []
    for start in range(0, len(data.test), 256):
        images, _ = data.test.read(torch.arange(start, min(start + 256, len(data.test))))
        labels = model.patching(normalise(images, data.mean, data.std).to(device)).regions.cpu()
        kept.append(explained_variation(images, labels))
        counts += [float(image.unique().numel()) for image in labels]
    return 100 * float(torch.cat(kept).mean()), sum(counts) / len(counts)


def of_grid(data: ImageData, side: int) -> float:
    """Mean explained variation of ``side`` × ``side`` equal cells, in per cent."""
    images, _ = data.test.read(torch.arange(len(data.test)))
    labels = torch.arange(side * side).view(1, side, side)
    return 100 * float(explained_variation(images, labels).mean())


def experiment(lab: Lab) -> Evidence:
    runs = lab.train((GRID, SUPERPIXELS), resolution=RESOLUTION, budget=f"{STEPS}steps")
    data = lab.data(runs[SUPERPIXELS][0])  # the test split is the same for every seed
    grid = of_grid(data, RESOLUTION // 8)
    found = [of_superpixels(lab.host(run), data) for run in runs[SUPERPIXELS]]
    trained = [kept for kept, _ in found]
    untrained = []
    for run in runs[SUPERPIXELS]:
        config = run.config
        model = create(SUPERPIXELS, classes=config.classes, resolution=RESOLUTION, seed=config.seed)
        assert isinstance(model, ViT)
        untrained.append(of_superpixels(model, data)[0])
    regions = sum(count for _, count in found) / len(found)
    return Evidence(
        values=differences(trained, [grid] * len(trained)),
        table={
            GRID: {
                **arm(runs[GRID]),
                "regions": f"{(RESOLUTION // 8) ** 2}",
                "explained variation": f"{grid:.1f} %",
            },
            SUPERPIXELS: {
                **arm(runs[SUPERPIXELS]),
                "regions": f"{regions:.1f}",
                "explained variation": spread(trained, " %"),
            },
            "the same, untrained": {"explained variation": spread(untrained, " %")},
        },
        remark=f"{STEPS} steps each on crops of {RESOLUTION} pixels of `bundled:photos`. Regions "
        "are made of cells of 2 × 2 pixels, the resolution of the tokenizer's pixel map.",
    )


CLAIM = Claim(
    slug="spformer",
    says="Superpixels that only the classification loss trains adapt to the image's content "
    "(abstract; the paper measures them against patches of the same number).",
    metric="variance of colour that the regions' means explain on test crops (Moore et al. 2008), "
    "superpixels minus a grid of as many cells, in percentage points",
    margin=0.0,
    experiment=experiment,
)
