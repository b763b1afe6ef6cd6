"""bundled:photos and bundled:digits: disjointness, purity, balance."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polypatch.data import ImageData, Split, load_images
from polypatch.data.bundled import GAP, PHOTOS, PhotoCrops, crop_layout
from polypatch.errors import PolypatchError


@pytest.fixture(scope="module")
def photos() -> ImageData:
    return load_images("bundled:photos")


def crops_of(data: ImageData, split: str, count: int):
    source = getattr(data, split)
    assert isinstance(source, PhotoCrops)
    return source.crops(torch.arange(count))


def test_importing_the_readers_is_light():
    heavy = "{'PIL', 'datasets', 'pyarrow', 'skimage', 'sklearn'}"
    code = f"import sys, polypatch.data; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_is_bundled(photos):
    assert len(photos.classes) == len(set(photos.classes)) >= 16
    assert photos.resolution == 32
    assert photos.endless
    assert photos.flippable
    assert isinstance(photos.train, Split)
    assert len(photos.train) == 4096
    assert len(photos.test) == 1024
    images, labels = photos.train.read(torch.tensor([0, 5, 10**12]))
    assert images.shape == (3, 3, 32, 32)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize("resolution", [32, 64, 96])
def test_train_and_test_share_no_pixel(resolution):
    data = load_images("bundled:photos", resolution=resolution)
    layout = crop_layout(
        data.train.layout.sizes,  # type: ignore[attr-defined]
        resolution=resolution,
    )
    covered = {}
    for split, count in (("train", 6000), ("test", 1024)):
        crops = crops_of(data, split, count)
        covered[split] = [np.zeros(size, dtype=bool) for size in layout.sizes]
        for photo, top, left, side in zip(crops.photo, crops.top, crops.left, crops.side):
            height, width = layout.sizes[photo]
            assert resolution <= side <= 2 * resolution
            assert 0 <= top <= height - side
            assert 0 <= left <= width - side
            covered[split][photo][top : top + side, left : left + side] = True
    for photo, (train, test) in enumerate(zip(covered["train"], covered["test"])):
        assert train.any()
        assert test.any()
        assert not (train & test).any(), PHOTOS[photo].name
        # The bands run across the longer axis: distances along it are all that matters.
        axis = 0 if train.shape[1] >= train.shape[0] else 1
        t = np.flatnonzero(train.any(axis=axis))
        u = np.flatnonzero(test.any(axis=axis))
        assert np.abs(t[:, None] - u).min() > GAP  # GAP pixels lie between
    # The largest window shrinks by two: the gap is a few pixels in the result too.
    assert GAP * resolution / layout.largest >= 3


@settings(max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(60, 700), st.integers(60, 700)), min_size=1, max_size=5),
    resolution=st.integers(8, 100),
)
def test_bands_never_touch(sizes, resolution):
    try:
        layout = crop_layout(sizes, resolution=resolution)
    except PolypatchError as error:
        limit = int(str(error).split()[-1])
        assert limit < resolution
        if limit >= 8:
            crop_layout(sizes, resolution=limit)  # what the error promises, holds
        return
    for size, train, test in zip(sizes, layout.train, layout.test):
        bands = sorted([*train, *test])
        assert bands[0][0] >= 0
        assert bands[-1][1] <= max(size)
        assert all(b[0] - a[1] >= GAP for a, b in pairwise(bands))
        assert all(stop - start >= layout.largest >= resolution for start, stop in bands)


def test_reading_is_pure(photos):
    for split in (photos.train, photos.test):
        indices = torch.randperm(900, generator=torch.Generator().manual_seed(0))[:70]
        images, labels = split.read(indices)
        for size in (1, 7, 33):
            parts = [split.read(part) for part in indices.split(size)]
            assert torch.equal(torch.cat([p[0] for p in parts]), images)
            assert torch.equal(torch.cat([p[1] for p in parts]), labels)
        backwards = split.read(indices.flip(0))
        assert torch.equal(backwards[0].flip(0), images)
        again, _ = split.read(torch.stack([indices[3]] * 5))
        assert all(torch.equal(image, images[3]) for image in again)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(photos.test.read(indices)[0], images)
    assert photos.train.read(torch.empty(0, dtype=torch.int64))[0].shape == (0, 3, 32, 32)


def test_the_seed_decides_the_training_crops(photos):
    same, other = load_images("bundled:photos"), load_images("bundled:photos", seed=1)
    indices = torch.arange(40)
    assert torch.equal(same.train.read(indices)[0], photos.train.read(indices)[0])
    assert not torch.equal(other.train.read(indices)[1], photos.train.read(indices)[1])
    assert torch.equal(other.test.read(indices)[0], photos.test.read(indices)[0])
    assert same.fingerprint == photos.fingerprint != other.fingerprint
    assert load_images("bundled:photos", resolution=40).fingerprint != photos.fingerprint


def test_labels_are_balanced(photos):
    _, labels = photos.test.read(torch.arange(1024))
    assert (torch.bincount(labels) == 64).all()
    drawn = crops_of(photos, "train", 64000).photo
    counts = np.bincount(drawn, minlength=16)
    # Expected 4000 each; five standard deviations of a binomial are 306.
    assert np.abs(counts - 4000).max() < 306


def test_endless_means_ever_new_crops(photos):
    _, length = photos.train, len(photos.train)
    early, _ = photos.train.read(torch.arange(64))
    late, _ = photos.train.read(torch.arange(length, length + 64))
    assert not any(torch.equal(a, b) for a, b in zip(early, late))
    with pytest.raises(IndexError, match="0 to 1023"):
        photos.test.read(torch.tensor([1024]))
    with pytest.raises(IndexError, match="0 or more"):
        photos.train.read(torch.tensor([-1]))


def test_a_crop_shows_its_window(photos):
    """Where the window is as large as the resolution nothing is resized: pixels are copied."""
    crops = crops_of(photos, "train", 4000)
    index = int(np.flatnonzero(crops.side == 32)[0])
    photo, top, left = crops.photo[index], crops.top[index], crops.left[index]
    image = photos.train.read(torch.tensor([index]))[0][0]
    window = photos.train.photos[photo, top : top + 32, left : left + 32]  # type: ignore[attr-defined]
    assert torch.equal((image * 255).round().byte(), window.permute(2, 0, 1))


def test_too_large_a_resolution_names_the_limit():
    with pytest.raises(PolypatchError, match=r"no room for crops of 300.*at most 132"):
        load_images("bundled:photos", resolution=300)
    assert load_images("bundled:photos", resolution=132).resolution == 132


def test_a_missing_photograph_is_a_sentence(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PolypatchError, match=r"scikit-image.*pip install"):
        load_images("bundled:photos")


def test_digits():
    data = load_images("bundled:digits")
    assert data.classes == tuple("0123456789")
    assert not data.flippable
    assert not data.endless
    assert len(data.train) + len(data.test) == 1797
    images, labels = data.test.read(torch.arange(len(data.test)))
    assert images.shape[1:] == (3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    assert 0 <= images.min() < 0.1 < 0.9 < images.max() <= 1
    assert all(abs(int(n) - len(data.test) / 10) <= 2 for n in torch.bincount(labels))
    # No digit is on both sides (all 8x8 digits of the set are distinct).
    plain = load_images("bundled:digits", resolution=8)
    train = {image.numpy().tobytes() for image in plain.train.read(torch.arange(1442))[0]}
    assert not train & {image.numpy().tobytes() for image in plain.test.read(torch.arange(355))[0]}
    one = torch.cat([data.test.read(i[None])[0] for i in torch.arange(20)])
    assert torch.equal(one, images[:20])
    with pytest.raises(IndexError):
        data.train.read(torch.tensor([1442]))
