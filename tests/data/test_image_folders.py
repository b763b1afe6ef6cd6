"""Folders of class folders."""

from __future__ import annotations

import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polypatch.data import load_images
from polypatch.data import splits as splits_module
from polypatch.data.splits import OnDemandSplit, StoredSplit, hash_split
from polypatch.errors import PolypatchError
from tests.data.pictures import encoded, picture


def test_undivided(class_folder):
    root = class_folder(cat=10, dog=20, emu=5)
    seen = []
    data = load_images(str(root), resolution=8, progress=lambda *args: seen.append(args))
    assert data.classes == ("cat", "dog", "emu")
    assert data.name == str(root)
    assert not data.notes
    assert isinstance(data.train, StoredSplit)
    _, labels = data.test.read(torch.arange(len(data.test)))
    assert torch.bincount(labels).tolist() == [2, 4, 1]
    images, labels = data.train.read(torch.arange(28))
    assert images.shape == (28, 3, 8, 8)
    assert torch.bincount(labels).tolist() == [8, 16, 4]
    assert seen[-1] == (35, 35, "decoding images")
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)
    half = load_images(str(root), resolution=8, test_fraction=0.5)
    assert len(half.test) == 5 + 10 + 2
    with pytest.raises(IndexError):
        data.train.read(torch.tensor([28]))


def test_pixels_and_labels_belong_together(tmp_path):
    from PIL import Image

    colours = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
    for name, colour in colours.items():
        (tmp_path / name).mkdir()
        for i in range(70):
            Image.new("RGB", (9, 9), colour).save(tmp_path / name / f"{i}.png")
    data = load_images(str(tmp_path), resolution=8)
    images, labels = data.train.read(torch.arange(len(data.train)))
    assert torch.equal(images.mean((2, 3)).argmax(1), 2 - labels)


@pytest.mark.parametrize("held_out", ["test", "val", "valid", "validation"])
def test_divided(class_folder, held_out):
    class_folder("set/train", cat=4, dog=3)
    class_folder(f"set/{held_out}", dog=2, cat=1)
    root = class_folder("set/extras", dog=1).parent
    data = load_images(str(root), resolution=8)
    assert (len(data.train), len(data.test)) == (7, 3)
    _, labels = data.test.read(torch.arange(3))
    assert sorted(labels.tolist()) == [0, 1, 1]
    assert data.notes == (f"only train/ and {held_out}/ are read, not extras/",)


def test_train_alone_is_divided(class_folder):
    root = class_folder("set/train", cat=5, dog=5).parent
    data = load_images(str(root), resolution=8)
    assert (len(data.train), len(data.test)) == (8, 2)
    assert "20% of train/ is held out" in data.notes[0]


def test_what_may_lie_in_a_folder(class_folder, tmp_path):
    root = class_folder(cat=6, dog=6)
    good = encoded(picture(0, (64, 48)))
    (root / "cat" / "half.png").write_bytes(good[: len(good) // 2])
    jpeg = encoded(picture(0, (64, 48)), "JPEG")
    (root / "cat" / "half.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (root / "dog" / "zero.jpg").touch()
    (root / "dog" / "text.jpg").write_text("not a picture")
    (root / "dog" / "lost.png").symlink_to(root / "nowhere.png")
    bad = 5
    (root / "dog" / "notes.txt").write_text("not even named like one")
    (root / "dog" / ".hidden.png").write_bytes(good)
    (root / ".git").mkdir()
    (root / "__MACOSX").mkdir()
    (root / "README.md").touch()
    (root / "dog" / "UPPER.PNG").write_bytes(good)
    (root / "dog" / "größe 狗.jpeg").write_bytes(jpeg)
    (root / "dog" / "deep" / "er").mkdir(parents=True)
    (root / "dog" / "deep" / "er" / "x.webp").write_bytes(encoded(picture(9), "WEBP"))
    (root / "dog" / "deep" / "round").symlink_to(root / "dog")
    (root / "dog" / "linked.png").symlink_to(root / "cat" / "0.png")
    for i, mode in enumerate(("L", "P", "RGBA", "LA", "1")):
        picture(i, mode=mode).save(root / "cat" / f"mode{i}.png")
    (root / "empty").mkdir()
    data = load_images(str(root), resolution=16)
    assert data.classes == ("cat", "dog")
    assert len(data.train) + len(data.test) == 12 + 4 + 5
    notes = " ".join(data.notes)
    for name in ("half.png (trunc", "half.jpg (trunc", "zero.jpg (empty)", "text.jpg (not an"):
        assert name in notes
    assert "lost.png (no such file" in notes
    assert "class 'empty'" in notes
    assert notes.count(".jpg") + notes.count(".png") == bad


def test_many_broken_files_are_summarised(class_folder):
    root = class_folder(cat=40, dog=40)
    for i in range(30):
        (root / "cat" / f"bad{i}.png").write_text("no")
    data = load_images(str(root), resolution=8)
    assert len(data.train) + len(data.test) == 80
    assert any("more" in note for note in data.notes)
    assert all(len(note) < 800 for note in data.notes)


def test_a_class_of_broken_files_is_left_out(class_folder):
    root = class_folder(ant=3, cat=3, dog=3)
    for path in (root / "ant").iterdir():
        path.write_text("no")
    data = load_images(str(root), resolution=8)
    assert data.classes == ("cat", "dog")
    assert set(data.train.read(torch.arange(len(data.train)))[1].tolist()) == {0, 1}
    shutil.rmtree(root / "dog")
    with pytest.raises(PolypatchError, match=r"two classes.*found 'cat' \(without images: 'ant'\)"):
        load_images(str(root), resolution=8)


def test_a_class_of_one_is_for_training(class_folder):
    data = load_images(str(class_folder(cat=1, dog=5)), resolution=8)
    assert data.notes == ("no test images for class 'cat'",)
    with pytest.raises(PolypatchError, match="no usable test images"):
        load_images(str(class_folder("tiny", cat=1, dog=1)), resolution=8)


def test_refusals(class_folder, tmp_path):
    def refused(path, sentence, **options):
        with pytest.raises(PolypatchError, match=sentence):
            load_images(str(path), **options)

    root = class_folder("animals/here", cat=3, dog=3)
    refused(root.parent / "hree", r"no 'hree' in .*did you mean .*here\?")
    refused(tmp_path / "animal" / "x" / "y", r"no 'animal' in .*did you mean .*animals\?")
    refused(root / "cat", r"no class folders \(3 images lie in it directly\)")
    (tmp_path / "void").mkdir()
    refused(tmp_path / "void", "no class folders: it should hold")
    refused(class_folder("one", cat=3, dog=0), r"found 'cat' \(without images: 'dog'\)")
    refused(class_folder("none", cat=0), "found none")
    refused(class_folder("odd/test", cat=3).parent, "test/ but no train/")
    refused(class_folder("odd/val", cat=3).parent, "test/, val/ but no train/")
    class_folder("strange/train", cat=3, dog=3, emu=0)
    strange = class_folder("strange/test", cat=1, emu=1, fox=1).parent
    refused(strange, "test/ has images of class 'emu', 'fox' but train/ has none")
    for resolution in (0, 7, 4097):
        refused(root, f"from 8 to 4096 pixels, not {resolution}", resolution=resolution)
    for fraction in (0.0, 1.0, -1.0):
        refused(root, "fraction must be between", test_fraction=fraction)


def test_bombs_are_refused(class_folder, monkeypatch):
    from PIL import Image

    root = class_folder(cat=3, dog=3)
    picture(0, (100, 100)).save(root / "dog" / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(PolypatchError, match=r"dog/big\.png has more pixels"):
        load_images(str(root), resolution=8)


def test_permissions(class_folder, monkeypatch):
    root = class_folder(cat=3, dog=3)
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).endswith("dog/1.png") and real(path, mode)
    )
    with pytest.raises(PolypatchError, match=r"dog/1\.png can't be read \(permission denied\)"):
        load_images(str(root), resolution=8)
    scan = os.scandir

    def denied(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PolypatchError, match=r"folder .*cat can't be read"):
        load_images(str(root), resolution=8)


def test_fingerprint_follows_the_samples(class_folder):
    root = class_folder(cat=5, dog=5)
    first = load_images(str(root), resolution=8)
    moved = shutil.copytree(root, root.parent / "moved")
    os.utime(moved / "cat" / "0.png", (0, 0))
    assert load_images(str(moved), resolution=8).fingerprint == first.fingerprint
    assert load_images(str(root), resolution=9).fingerprint != first.fingerprint
    picture(999).save(moved / "cat" / "0.png")
    changed = load_images(str(moved), resolution=8).fingerprint
    assert changed != first.fingerprint
    (moved / "cat").rename(moved / "cow")
    assert load_images(str(moved), resolution=8).fingerprint != changed


@pytest.mark.parametrize(
    ("side", "expected"), [(20, 32), (32, 32), (40, 32), (64, 64), (100, 96), (500, 224)]
)
def test_usual_resolution(tmp_path, side, expected):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(2):
            picture(i, (side, side + 7)).save(tmp_path / name / f"{i}.bmp")
    assert load_images(str(tmp_path)).resolution == expected


def test_a_set_too_large_for_memory_is_read_on_demand(class_folder, monkeypatch):
    root = class_folder(cat=12, dog=12)
    kept = load_images(str(root), resolution=8)
    monkeypatch.setattr(splits_module, "MEMORY_LIMIT", 1000)
    (root / "cat" / "text.png").write_text("no picture")
    seen = []
    data = load_images(str(root), resolution=8, progress=lambda *args: seen.append(args))
    assert isinstance(data.train, OnDemandSplit)
    assert seen[-1] == (25, 25, "checking images")
    assert "text.png (not an image)" in " ".join(data.notes)
    indices = torch.randperm(len(data.train))
    images, labels = data.train.read(indices)
    one = [data.train.read(i[None]) for i in indices]
    assert torch.equal(torch.cat([x for x, _ in one]), images)
    assert torch.equal(torch.cat([y for _, y in one]), labels)
    known = {x.numpy().tobytes() for x in kept.train.read(torch.arange(len(kept.train)))[0]}
    known |= {x.numpy().tobytes() for x in kept.test.read(torch.arange(len(kept.test)))[0]}
    assert {x.numpy().tobytes() for x in images} <= known
    before = data.fingerprint
    assert load_images(str(root), resolution=8).fingerprint == before
    os.utime(root / "cat" / "0.png", (0, 0))
    assert load_images(str(root), resolution=8).fingerprint != before


def test_damage_that_shows_up_late_is_replaced(class_folder, monkeypatch):
    monkeypatch.setattr(splits_module, "MEMORY_LIMIT", 1000)
    root = class_folder(cat=6, dog=6)
    data = load_images(str(root), resolution=8)
    assert isinstance(data.train, OnDemandSplit)
    everything = torch.arange(len(data.train))
    images, labels = data.train.read(everything)
    path = root / data.train.samples.images.describe(int(data.train.samples.rows[2]))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.warns(UserWarning, match=r"is replaced by the next image: truncated"):
        later, later_labels = data.train.read(everything)
    images[2], labels[2] = images[3], labels[3]
    assert torch.equal(later, images)
    assert torch.equal(later_labels, labels)
    shutil.rmtree(root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(PolypatchError, match="can be decoded any more"):
            data.train.read(torch.tensor([0]))


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=4), fraction=st.floats(0.05, 0.95))
def test_hash_split(counts, fraction):
    labels = np.repeat(np.arange(len(counts)), counts)
    keys = [f"{label}/{i}.png" for i, label in enumerate(labels)]
    test = hash_split(keys, labels, test_fraction=fraction)
    for label, count in enumerate(counts):
        tested = int((labels[test] == label).sum())
        assert tested == (0 if count == 1 else min(max(1, round(count * fraction)), count - 1))
    # The order of listing doesn't matter.
    turned = hash_split(keys[::-1], labels[::-1], test_fraction=fraction)
    assert {keys[::-1][i] for i in turned} == {keys[i] for i in test}
