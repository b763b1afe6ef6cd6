"""Pixels as tokens: locality is no need (Nguyen et al., ICLR 2025, arXiv 2406.09415).

**The claim**, in the abstract: a plain transformer whose tokens are single pixels works very well
although nothing in it is local, so locality is no necessary bias. The paper's study of it shuffles
the pixels of all images by one permutation: a ViT loses accuracy, as its patches are no
neighbourhoods any more, while the transformer on pixels is unaffected.

**Why it can be tested here.** The statement is about a network before and after a permutation, at
any size. Crops of 8 pixels make 64 tokens, which is affordable; the ViT has patches of 2 × 2, the
paper's own in its supervised comparison. Each network is trained on the crops as they are and on
shuffled ones; the metric is how much more the ViT loses by that than the pixels do. The permutation
(:func:`~polypatch.patching.pixel_transformer.pixel_permutation`, enough swaps that nothing stays
near its place) is the same for all seeds, training and test. It is applied to the data, so there is
no further augmentation, which would shift pixels that aren't neighbours; crops of an endless source
are never repeated anyway.

For pixels the statement is exact by construction, if the positions are permuted alike; what a
training from the usual start shows beyond that is that nothing else depends on the order. The exact
form is checked on every trained network, and the remark says with which result.

**What can't be tested**: that pixels beat patches (by 1.5 points on CIFAR-100), which takes 2400
epochs, or that they do for masked autoencoding and diffusion. Whether pixels are level with patches
on unshuffled crops can be read off the table.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..data import ImageData, Split
from ..hosts import ViT
from ..nn import normalise
from ..patching.pixel_transformer import PixelPosition, pixel_permutation, shuffle_pixels
from ..training.recipe import Recipe
from .base import Claim, Evidence, Lab
from .evaluation import arm, differences, spread

RESOLUTION = 8
PATCHES = "vit-nano(patch=2)"
PIXELS = "vit-nano(patch=2)+pixel-transformer"
STEPS = 160


@dataclass(frozen=True, eq=False)
class Shuffled:
    """A split with the pixels of every image moved by one permutation."""

    split: Split
    permutation: Int64[Tensor, " pixels"]

    def __len__(self) -> int:
        return len(self.split)

    def read(
        self, indices: Int64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch 3 height width"], Int64[Tensor, " batch"]]:
        images, labels = self.split.read(indices)
        return shuffle_pixels(images, self.permutation), labels


def permutation(side: int) -> Int64[Tensor, " pixels"]:
    """The permutation of this experiment: ten swaps a pixel, over any distance."""
    generator = torch.Generator().manual_seed(0)
    return pixel_permutation((side, side), swaps=10 * side**2, generator=generator)


def shuffled(data: ImageData) -> ImageData:
    """The source with shuffled pixels, in training and test alike."""
    order = permutation(data.resolution)
    return replace(
        data,
        name=f"{data.name}, pixels shuffled",
        fingerprint=f"{data.fingerprint} shuffled",
        train=Shuffled(data.train, order),
        test=Shuffled(data.test, order),
        flippable=False,
    )


@torch.no_grad()
def largest_change(model: ViT, data: ImageData) -> float:
    """By how much the logits change at most if test images and positions are shuffled alike."""
    other = deepcopy(model)
    position = other.position
    assert isinstance(position, PixelPosition)
    order = permutation(data.resolution)
    position.table.copy_(position.table.flatten(1, 2)[:, order].view_as(position.table))
    images, _ = data.test.read(torch.arange(256))
    images = normalise(images, data.mean, data.std).to(position.table.device)
    return float((other(shuffle_pixels(images, order)) - model(images)).abs().max())


def experiment(lab: Lab) -> Evidence:
    recipe = Recipe(augment="none")
    specs, budget = (PATCHES, PIXELS), f"{STEPS}steps"
    plain = lab.train(specs, resolution=RESOLUTION, budget=budget, recipe=recipe)
    moved = lab.train(specs, resolution=RESOLUTION, budget=budget, recipe=recipe, view=shuffled)
    lost = {
        spec: differences(lab.accuracy(plain[spec]), lab.accuracy(moved[spec])) for spec in specs
    }
    change = max(largest_change(lab.host(run), lab.data(run)) for run in plain[PIXELS])
    return Evidence(
        values=differences(lost[PATCHES], lost[PIXELS]),
        table={
            spec: {
                **arm(plain[spec]),
                "accuracy, shuffled": spread(lab.accuracy(moved[spec]), " %"),
                "lost": spread(lost[spec]),
            }
            for spec in specs
        },
        remark=f"{STEPS} steps each on crops of {RESOLUTION} pixels of `bundled:photos`, without "
        "further augmentation. If pixels and positions of the trained pixel networks are shuffled "
        f"alike, their logits change by {change:.1g} at most. "
        "Shortened from 200 steps to 160 after a first result, for time; the verdict was the same.",
    )


CLAIM = Claim(
    slug="pixel-transformer",
    says="Locality is no need: with the pixels of all images shuffled by one permutation, a "
    "transformer on single pixels stays as accurate as it was, while a ViT with patches loses "
    "(the study of locality).",
    metric="test accuracy that shuffling costs a ViT of patch 2 minus what it costs the "
    "transformer on pixels, in points",
    margin=0.0,
    experiment=experiment,
    seeds=5,
)
