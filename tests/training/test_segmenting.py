"""A class for every pixel: sources, augmentation of masks, loss and score, the whole run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from polypatch.checkpoints import load
from polypatch.data import load_masks
from polypatch.data.bundled_masks import BUNDLED_MASKS
from polypatch.errors import PolypatchError
from polypatch.training.augment import augment, augment_masks, draw
from polypatch.training.evaluate import evaluate
from polypatch.training.loop import train
from polypatch.training.recipe import Recipe
from polypatch.training.runs import RunConfig
from polypatch.training.tasks import Segment, mean_iou


@pytest.mark.parametrize("name", BUNDLED_MASKS)
def test_bundled_masks(name):
    data = load_masks(name, resolution=32)
    images, masks = data.train.read(torch.arange(64))
    assert images.shape == (64, 3, 32, 32)
    assert masks.shape == (64, 32, 32)
    share = torch.bincount(masks.flatten(), minlength=len(data.classes)) / masks.numel()
    assert len(share) == len(data.classes)
    assert share.min() > 0.03, "a class that hardly occurs teaches nothing"
    again, same = load_masks(name, resolution=32).train.read(torch.tensor([5, 3]))
    assert torch.equal(again, images[[5, 3]])
    assert torch.equal(same, masks[[5, 3]])
    other = load_masks(name, resolution=32, seed=1)
    assert other.fingerprint != data.fingerprint
    assert not torch.equal(other.train.read(torch.arange(4))[0], images[:4])


def test_there_are_24_coins():
    from scipy import ndimage

    from polypatch.data.bundled import read_photo

    source = BUNDLED_MASKS["bundled:coins"]
    assert ndimage.label(source.derive(read_photo(source.photo)))[1] == 24


def test_training_and_test_pixels_are_apart():
    """Where the windows of each part lie: no pixel is in both."""
    data = load_masks("bundled:coins", resolution=64)
    seen = {}
    for part, split, count in (("train", data.train, 500), ("test", data.test, len(data.test))):
        windows = split.crops.crops(torch.arange(count))
        covered = np.zeros((303, 384), dtype=bool)
        for top, left, side in zip(windows.top, windows.left, windows.side):
            covered[top : top + side, left : left + side] = True
        seen[part] = covered
    assert not (seen["train"] & seen["test"]).any()


@pytest.mark.parametrize("kind", ["none", "light", "rand"])
def test_masks_follow_their_images(kind):
    """An image that shows its own mask still does so when both are augmented."""
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(8, 4, 4, generator=generator) < 0.5).long()
    masks = masks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    draws = draw(kind, 8, flip=True, generator=generator)
    for name in ("brightness", "contrast", "saturation"):
        if name in draws:
            draws[name] = torch.ones(8)
    if "solarise" in draws:
        draws["solarise"] = torch.full((8,), 2.0)
        draws["erase"][:, 4] = 1.0  # not erased
    images = augment(masks[:, None].expand(-1, 3, -1, -1).float(), draws)
    warped = augment_masks(masks, draws)
    assert (kind == "none") == torch.equal(warped, masks)
    wrong = ((images[:, 0] > 0.5).long() != warped).float().mean()
    assert wrong < (0.02 if kind == "rand" else 1e-9), "only pixels on a border may differ"


def test_mean_iou_is_that_of_torchmetrics():
    from torchmetrics.functional.classification import multiclass_jaccard_index

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 9, 7, generator=generator)
    labels = torch.randint(0, 4, (3, 9, 7), generator=generator)
    labels[0, :4] = -1
    theirs = multiclass_jaccard_index(
        logits.argmax(1), labels, num_classes=4, ignore_index=-1, average="macro"
    )
    confusion = Segment().confusion(logits, labels)
    assert confusion.sum() == (labels >= 0).sum()
    assert mean_iou(confusion.double()) == pytest.approx(float(theirs))
    # classes that occur neither in truth nor in prediction don't count
    assert mean_iou(torch.tensor([[5.0, 5.0, 0], [0, 10, 0], [0, 0, 0]])) == pytest.approx(
        (5 / 10 + 10 / 15) / 2
    )


def config(spec: str, data, steps: int, **more) -> RunConfig:
    return RunConfig(
        spec=spec, data=data.name, data_fingerprint=data.fingerprint, resolution=data.resolution,
        classes=len(data.classes), seed=0, budget=f"{steps}steps", task="segment",
        recipe=Recipe(batch=8, lr=2e-3, **more),
    )  # fmt: skip


@pytest.mark.parametrize("spec", ["convmixer-nano", "vit-nano", "vit-nano+tome(r=4)"])
def test_a_run_learns_and_its_model_comes_back(tmp_path, spec):
    data = load_masks("bundled:coins", resolution=50)  # odd for every patch
    run = train(config(spec, data, 25), data, root=tmp_path, device="cpu")
    result = run.result
    guess = max(0.69, 1 - 0.69)  # the larger class everywhere
    assert result["accuracy"] > guess + 0.02
    assert 0.35 < result["mean_iou"] <= 1
    loaded = load(run.folder)
    assert loaded.task == "segment"
    assert evaluate(loaded.model, data).mean_iou == pytest.approx(result["mean_iou"], abs=1e-4)


def test_what_does_not_go_together(tmp_path):
    data = load_masks("bundled:coins", resolution=32)
    with pytest.raises(PolypatchError, match="mixup and cutmix are for classification"):
        train(config("convmixer-nano", data, 2, mixup=0.2), data, root=tmp_path, device="cpu")


# ---- folders of pairs --------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path):
    """Bright squares on dark ground, in train/ and val/."""
    root = tmp_path / "pairs"
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for folder in ("images", "masks"):
            (root / part / folder).mkdir(parents=True)
        for k in range(count):
            mask = np.zeros((40, 60), dtype=np.uint8)
            top, left = generator.integers(0, 20), generator.integers(10, 30)
            mask[top : top + 16, left : left + 16] = 2
            mask[:2] = 255
            Image.fromarray(np.where(mask == 2, 200, 40).astype(np.uint8)).save(
                root / part / "images" / f"{part}{k}.jpg"
            )
            Image.fromarray(mask).save(root / part / "masks" / f"{part}{k}.png")
    return root


def test_a_folder_of_pairs(pairs):
    (pairs / "classes.txt").write_text("ground\nnothing\nsquare\n")
    data = load_masks(str(pairs), resolution=20)
    assert data.classes == ("ground", "nothing", "square")
    assert (len(data.train), len(data.test)) == (6, 2)
    assert any("no pixel of nothing" in note for note in data.notes)
    images, masks = data.train.read(torch.arange(6))
    assert masks.shape == (6, 20, 20)
    assert (masks[:, 0] == -1).all()
    # cut alike: what is bright is labelled so
    inside = masks == 2
    assert images[:, 0][inside].mean() > 0.6 > 0.4 > images[:, 0][masks == 0].mean()


def test_a_folder_without_parts_is_divided(pairs):
    data = load_masks(str(pairs / "train"), resolution=20)
    assert (len(data.train), len(data.test)) == (5, 1)


def test_bad_pairs_are_named(pairs, tmp_path):
    masks = pairs / "train" / "masks"
    (pairs / "train" / "images" / "train1.jpg").write_bytes(b"no picture")
    Image.fromarray(np.zeros((5, 5), dtype=np.uint8)).save(masks / "train2.png")
    data = load_masks(str(pairs), resolution=20)
    assert len(data.train) == 4
    (note,) = [n for n in data.notes if "left out" in n]
    assert "train1.jpg (not an image)" in note
    assert "train2.jpg (the mask has 5×5 pixels" in note
    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(masks / "train3.png")
    with pytest.raises(PolypatchError, match="is a colour picture"):
        load_masks(str(pairs), resolution=20)
    (masks / "train3.png").unlink()
    with pytest.raises(PolypatchError, match=r"has no mask for train3\.jpg"):
        load_masks(str(pairs), resolution=20)
    with pytest.raises(PolypatchError, match="there is no folder"):
        load_masks(str(tmp_path / "nowhere"))
    with pytest.raises(PolypatchError, match="bundled:coins"):
        load_masks("bundled:coin")
    with pytest.raises(PolypatchError, match="needs a folder images/"):
        load_masks(str(tmp_path))
