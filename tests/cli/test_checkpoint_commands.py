"""inspect, convert, apply: a file of weights, as a user meets it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import polypatch as library
from polypatch.backbones import convmixer


@pytest.fixture
def weights(tmp_path):
    model = library.create("convmixer-nano", seed=1)
    torch.save({"state_dict": convmixer.to_official(model)}, tmp_path / "convmixer.pth")
    return "convmixer.pth"


def test_inspect_says_what_a_file_is(polypatch, weights):
    told = polypatch("inspect", weights)
    assert told.code == 0
    for part in ("convmixer-nano", "Patches Are All You Need?", "classify", "MIT", "GFLOP",
                 "activation=gelu", "any sides, at least 4"):  # fmt: skip
        assert part in told.out
    facts = json.loads(polypatch("inspect", weights, "--json", "--resolution", "64").out)
    assert facts["paper"] == "convmixer"
    assert facts["resolution"] == 64
    layer = 64 * 25 + 64 + 128 + 64 * 64 + 64 + 128
    assert facts["parameters"] == (48 * 64 + 64 + 128) + 4 * layer + 65 * 1000


def test_convert_then_apply(polypatch, weights, photo, tmp_path):
    assert polypatch("convert", weights, "new").code == 0
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    again = polypatch("convert", weights, "new")
    assert again.code == 2
    assert "is there already" in again.err
    (tmp_path / "notes.txt").write_text("hello")
    told = polypatch("apply", "new", str(photo), "notes.txt", "--out", "out", "--top", "2")
    assert told.code == 1
    assert "left out notes.txt: not an image" in told.err
    (row,) = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert row["file"] == str(photo)
    names = Path(library.__path__[0], "data", "imagenet.txt").read_text(encoding="utf-8")
    assert row["class_1"] in names.splitlines()
    assert float(row["probability_1"]) >= float(row["probability_2"])


def test_features(polypatch, weights, photo, tmp_path):
    assert polypatch("apply", weights, str(photo), "--out", "f", "--features", "pooled").code == 0
    rows = np.load(tmp_path / "f" / "features.npy")
    assert rows.shape == (1, 64)
    assert (tmp_path / "f" / "files.txt").read_text().strip() == str(photo)
    told = polypatch("apply", weights, str(photo), "--out", "f", "--features", "maps", "--save",
                     "safetensors", "--resolution", "64")  # fmt: skip
    assert told.code == 0
    maps = load_file(tmp_path / "f" / f"{photo.stem}.safetensors")
    assert {v.shape for v in maps.values()} == {(64, 16, 16)}
    assert len(maps) == 4


def test_labels(polypatch, weights, photo, tmp_path):
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    told = polypatch("apply", weights, str(photo), "--out", "o", "--labels", "names.txt")
    assert told.code == 2
    assert "has 2 names, the model has 1000 classes" in told.err
    (tmp_path / "names.json").write_text(json.dumps([f"n{k}" for k in range(1000)]))
    told = polypatch("apply", weights, str(photo), "--out", "o", "--labels", "names.json",
                     "--format", "json")  # fmt: skip
    assert told.code == 0
    (row,) = json.loads((tmp_path / "o" / "predictions.json").read_text())
    assert row["predictions"][0]["class"].startswith("n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("apply", "nowhere.pth", "{photo}", "--out", "o"), "there is no file nowhere.pth"),
        (("apply", "{weights}", "nowhere.png", "--out", "o"), "there is no file nowhere.png"),
        (("apply", "{weights}", "{photo}", "--out", "o", "--features", "mapz"), "did you mean"),
        (("apply", "{weights}", "{photo}", "--out", "o", "--resolution", "2"), "--resolution 4"),
        (("apply", "{weights}", "{photo}", "--out", "o", "--config", "dim"), "name=value"),
        (("inspect", "{photo}"), "can't be read"),
        (("inspect", "{weights}", "--config", "activation=silu"), "there is no activation"),
        (("convert", "{weights}", "new", "--labels", "none.txt"), "there is no file none.txt"),
    ],
)
def test_mistakes_are_one_sentence(polypatch, weights, photo, words, said):
    told = polypatch(*(w.format(weights=weights, photo=photo) for w in words))
    assert told.code == 2
    assert said in told.err
    assert "Traceback" not in told.err


def test_segmenting_end_to_end(polypatch, photo, tmp_path):
    told = polypatch("train", "convmixer-nano", "--task", "segment", "--resolution", "32",
                     "--budget", "3steps", "--batch", "4", "--device", "cpu")  # fmt: skip
    assert told.code == 0
    assert "mean IoU" in told.out
    (run,) = (tmp_path / "runs").iterdir()
    assert "mean IoU" in polypatch("evaluate", str(run)).out
    assert polypatch("apply", str(run), str(photo), "--out", "masks").code == 0
    from PIL import Image

    with Image.open(tmp_path / "masks" / f"{photo.stem}.png") as mask, Image.open(photo) as image:
        assert mask.size == image.size
        assert set(np.unique(np.asarray(mask))) <= {0, 1}
    assert (tmp_path / "masks" / f"{photo.stem}-overlay.png").is_file()


def test_a_video_network_reads_animations(polypatch, tmp_path):
    """Frames evenly over the clip, normalised one by one; a still picture stands still."""
    from PIL import Image

    from polypatch.checkpoints.saving import save
    from polypatch.data.decode import decode_clip
    from polypatch.nn import normalise

    model = library.create("mvit-nano-video", classes=3, seed=0).eval()
    save(model, tmp_path / "video")
    frames = [Image.new("RGB", (40, 48), (20 * k, 200 - 20 * k, 90)) for k in range(8)]
    frames[0].save("clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    clip = decode_clip(tmp_path / "clip.webp", name="clip", frames=4, resolution=32)
    assert clip.shape == (3, 4, 32, 32)
    assert clip[0, :, 0, 0].tolist() == [0, 40, 100, 140]
    frames[3].save("still.png")
    still = decode_clip(tmp_path / "still.png", name="still", frames=4, resolution=32)
    assert (still == still[:, :1]).all()
    told = polypatch("apply", "video", "clip.webp", "--out", "o", "--format", "json",
                     "--resolution", "32", "--top", "3")  # fmt: skip
    assert told.code == 0, told.err
    (row,) = json.loads((tmp_path / "o" / "predictions.json").read_text())
    looks = model.preprocessing
    side = round(min(40, 48) * looks.crop)
    assert side < 40, "the crop is tested, too"
    cut = decode_clip(tmp_path / "clip.webp", name="c", frames=model.frames, resolution=32,
                      crop=looks.crop, interpolation=looks.interpolation)  # fmt: skip
    x = torch.from_numpy(cut.copy()).float() / 255
    x = normalise(x.transpose(0, 1), looks.mean, looks.std).transpose(0, 1)
    with torch.no_grad():
        wanted = model(x[None]).softmax(1)[0].sort(descending=True).values
    got = [guess["probability"] for guess in row["predictions"]]
    assert got == pytest.approx(wanted.tolist(), abs=1e-4)
    assert "GFLOP" in polypatch("inspect", "video").out
