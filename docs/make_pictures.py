"""Writes the pictures of docs/papers.md and the README into docs/pictures/.

polypatch train "vit-nano(patch=8)+dart(tokens=96)" --resolution 96 --budget 400steps --batch 32 --lr 0.002
polypatch train "vit-nano(patch=8)+spformer" --resolution 96 --budget 400steps --batch 32 --lr 0.002
python docs/make_pictures.py runs
"""  # noqa: E501

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from skimage import data

import polypatch
from polypatch.nn import normalise
from polypatch.patching.dual_patchnorm import gradient_norms
from polypatch.patching.elastic_sampling import RandomSampler
from polypatch.patching.spt_lsa import shifted_copies
from polypatch.report.layouts import cutters_of, draw_layouts, load_photo
from polypatch.report.receptive import draw_fields, receptive_fields

HERE = Path(__file__).resolve().parent / "pictures"
SETTING = dict(host="vit-nano", patch=8, resolution=128)


def main() -> None:
    runs = Path(sys.argv[1])
    dart, spformer = (next(runs.glob(f"*{name}*-s0-*")) for name in ("dart", "spformer"))
    photo_file = HERE / "astronaut.png"
    Image.fromarray(data.astronaut()).save(photo_file)
    photo = load_photo(photo_file, 128, 8)
    single = {
        "vit": "grid",
        "dart": str(dart),
        "spformer": str(spformer),
        "quadtree": "quadtree(scales=3,thresholds=[5.2,5.2])",
        "tome": "tome(r=40)",
        "flexivit": "flexivit",
    }
    everything = ",".join(("grid", *(single[s] for s in ("quadtree", "dart", "spformer", "tome"))))
    draw_layouts([(photo_file, photo)], cutters_of(everything, **SETTING), HERE / "layouts.png")
    for slug, cutter in single.items():
        draw_layouts([(photo_file, photo)], cutters_of(cutter, **SETTING), HERE / f"{slug}.png")
    small = load_photo(photo_file, 48, 8)
    pixels = cutters_of("pixel-transformer", host="vit-nano", patch=8, resolution=48)
    draw_layouts([(photo_file, small)], pixels, HERE / "pixel-transformer.png")
    flexivit(photo)
    elastic_vit(photo)
    spt_lsa(photo)
    dual_patchnorm()
    receptive()
    photo_file.unlink()
    for path in HERE.glob("*.png"):  # a repository keeps every version: make them small
        with Image.open(path) as picture:
            small_one = picture.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT)
        small_one.save(path, optimize=True)


def strip(titles: list[str], pictures: list[torch.Tensor], path: Path) -> None:
    figure = Figure(figsize=(3.2 * len(pictures), 3.5), layout="constrained")
    for axes, title, picture in zip(figure.subplots(1, len(pictures)), titles, pictures):
        axes.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


@torch.no_grad()
def flexivit(photo: torch.Tensor) -> None:
    """One set of weights at three patch sizes."""
    model = polypatch.create("vit-nano(patch=8)+flexivit", classes=0, resolution=128, seed=0).eval()
    titles, pictures = [], []
    for patch in (16, 8, 4):
        model.patching.patch = patch
        tokens = model.tokens(normalise(photo))
        titles.append(f"patch {patch}: {tokens.placed.shape[1]} tokens")
        pictures.append(tokens.draw(photo, fill=0.6, scale=4)[0])
    strip(titles, pictures, HERE / "flexivit.png")


@torch.no_grad()
def elastic_vit(photo: torch.Tensor) -> None:
    """The grid of evaluation, and boxes as they are drawn in training."""
    model = polypatch.create(
        "vit-nano(patch=8)+elastic-vit", classes=0, resolution=128, seed=0
    ).eval()
    patching = model.patching
    sampler = RandomSampler(count=160, smallest=8, largest=24)
    boxes = sampler((128, 128), 1, np.random.default_rng(0)).boxes
    drawn = patching.sample(normalise(photo), boxes)
    grid = model.tokens(normalise(photo))
    strip(
        ["photo", "evaluation: the grid", "training: 160 random boxes"],
        [
            torch.nn.functional.interpolate(photo, scale_factor=4, mode="bicubic")[0],
            grid.draw(photo, fill=0.6, scale=4)[0],
            drawn.draw(photo, fill=0.6, scale=4)[0],
        ],
        HERE / "elastic-vit.png",
    )


def spt_lsa(photo: torch.Tensor) -> None:
    """The image and its four shifted copies, of which each patch sees its part."""
    copies = shifted_copies(photo, 16).view(5, 3, *photo.shape[-2:])
    names = ["photo", "down right", "down left", "up right", "up left"]
    strip(names, list(copies), HERE / "spt-lsa.png")


def dual_patchnorm() -> None:
    """Gradient norms of the patch embedding and the blocks, with and without the norms."""
    images = torch.from_numpy(data.astronaut()[:512, :512]).permute(2, 0, 1)[None].float() / 255
    batch = torch.cat(
        [images[:, :, y : y + 32, x : x + 32] for y in range(0, 512, 64) for x in range(0, 512, 64)]
    )
    labels = torch.arange(len(batch)) % 10
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, spec in (("ViT", "vit-nano"), ("with Dual PatchNorm", "vit-nano+dual-patchnorm")):
        model = polypatch.create(spec, classes=10, seed=0).train()
        torch.nn.functional.cross_entropy(model(normalise(batch)), labels).backward()
        norms = gradient_norms(model)
        values = [norms.embedding, *norms.blocks]
        axes.plot(range(len(values)), values, marker="o", label=f"{name} (ratio {norms.ratio:.1f})")
    axes.set_xticks(range(len(values)), ["embedding", *(f"block {i}" for i in range(1, 5))])
    axes.set_ylabel("gradient norm")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "dual-patchnorm.png", dpi=110)


def receptive() -> None:
    """What one cell of each map of an encoder looks at, with fresh weights."""
    batch = torch.from_numpy(data.astronaut()[:512, :512]).permute(2, 0, 1)[None].float() / 255
    batch = torch.cat([batch[:, :, y : y + 128, x : x + 128] for y in (0, 256) for x in (64, 256)])
    for entry in polypatch.papers():
        name = f"{entry.slug}-nano"
        if not entry.works or name not in getattr(module_of(entry), "VARIANTS", ()):
            continue
        model = polypatch.create(name, classes=0, resolution=128, seed=0)
        draw_fields(receptive_fields(model, normalise(batch)), HERE / f"{entry.slug}.png")


def module_of(entry):
    return importlib.import_module(entry.module)


if __name__ == "__main__":
    main()
