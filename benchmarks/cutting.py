"""What adaptive tokenizers cost beside the plain grid at the same number of tokens, on photographs.

    OMP_WAIT_POLICY=passive python benchmarks/cutting.py [threads]

Each model is timed in turn with a plain ViT of the same width and depth that runs on as many
tokens (the first ones of a grid of 16-pixel patches). Besides, for tokenizers whose samples have
unequal token counts: which part of the slots is padding.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from pairs import paired  # first: it sets OMP_WAIT_POLICY
from skimage import data, transform

import polypatch
from polypatch.tokens import length_buckets

SPECS = (
    "vit-tiny+flexivit",
    "vit-tiny+dual-patchnorm",
    "vit-tiny+dart",
    "vit-tiny+spformer",
    "vit-tiny+elastic-vit",
    "vit-tiny+spt-lsa",
    "vit-tiny+quadtree",
    "vit-tiny+tome",
)


def photos(count: int) -> torch.Tensor:
    """Normalised crops of photographs at 224 × 224."""
    sources = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    images = []
    for index in range(count):
        source = sources[index % len(sources)]
        side = min(source.shape[:2])
        left = (index * 37) % (source.shape[1] - side + 1)
        crop = transform.resize(source[:side, left : left + side], (224, 224), anti_aliasing=True)
        images.append(torch.from_numpy(crop).permute(2, 0, 1).float())
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.stack(images) - mean[:, None, None]) / std[:, None, None]


def plain(grid: torch.nn.Module, images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The grid's model on some of its tokens."""
    cut = grid.position(grid.patching(images)).keep(index)
    return grid.head(grid.pooling(grid.encode(grid.prefix(cut))))


def main() -> None:
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    print(f"224 × 224, {torch.get_num_threads()} threads; ratio: equal grid / model")
    grid = polypatch.create("vit-tiny", classes=1000, resolution=224, seed=0).eval()
    for spec in SPECS:
        model = polypatch.create(spec, classes=1000, resolution=224, seed=0).eval()
        for batch in (1, 32):
            images = photos(batch)
            with torch.inference_mode():
                tokens = model.tokens(images)
                counts = tokens.counts - tokens.prefix
                mean = round(counts.float().mean().item())
                # A tokenizer may give more tokens than the grid has: go round.
                index = (torch.arange(mean) % 196).expand(batch, -1)

                pair = paired(
                    partial(model, images),
                    partial(plain, grid, images, index),
                    rounds=15 if batch == 1 else 7,
                )
            waste = ""
            if tokens.mask is not None and batch > 1:
                groups = length_buckets(tokens.counts)
                slots = sum(len(g) * int(tokens.counts[g].max()) for g in groups)
                waste = f"   padding {1 - int(tokens.counts.sum()) / slots:.1%}"
            print(f"{spec:26s} {mean:4d} tokens, batch {batch:2d}: {pair}{waste}")


if __name__ == "__main__":
    main()
