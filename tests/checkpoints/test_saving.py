"""Files of ours: what is written loads again, exactly; the hub's client reads a local cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import polypatch
from polypatch.backbones import convmixer
from polypatch.checkpoints import hub, load
from polypatch.checkpoints.describing import describe
from polypatch.checkpoints.saving import convert, save
from polypatch.errors import PolypatchError


@pytest.fixture
def official(tmp_path) -> Path:
    """An authors' file: wrapped, with the keys of their code, and with other things in it."""
    model = polypatch.create("convmixer-nano", classes=6, seed=1)
    file = tmp_path / "convmixer_trained.pth.tar"
    state = {f"module.{k}": v for k, v in convmixer.to_official(model).items()}
    torch.save({"epoch": 7, "state_dict": state, "optimizer": {"lr": 1.0}}, file)
    return file


def test_convert_keeps_tensors_and_facts(tmp_path, official):
    before = load(official, config={"activation": "relu"})
    names = tuple("abcdef")
    folder = convert(official, tmp_path / "new", config={"activation": "relu"}, classes=names)
    again = load(folder)
    image = torch.randn(2, 3, 36, 50)
    assert torch.equal(again.model(image), before.model(image))
    assert not torch.equal(again.model(image), load(official).model(image)), "relu was lost"
    assert (again.paper, again.classes) == ("convmixer", names)
    assert again.config == {**before.config}
    assert again.preprocessing == before.preprocessing
    raw = torch.load(official, weights_only=True)["state_dict"]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {f"module.{k}" for k in file.keys()} == set(raw)  # noqa: SIM118
        for key in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(key), raw[f"module.{key}"]), key
    about = json.loads((folder / "config.json").read_text())["polypatch"]
    assert about["paper"] == "convmixer"
    assert about["licence"] == "MIT"
    # The tensor file alone is enough, and a second conversion of it changes nothing.
    (folder / "config.json").unlink()
    twice = convert(folder / "model.safetensors", tmp_path / "twice")
    assert torch.equal(load(twice).model(image), again.model(image))
    assert load(twice).classes == names


def test_nothing_half_written(tmp_path, official, monkeypatch):
    target = tmp_path / "new"
    with pytest.raises(PolypatchError, match="is there already"):
        convert(official, tmp_path)
    monkeypatch.setattr("json.dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(official, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == [official.name]


def test_save_a_network_made_here(tmp_path):
    model = polypatch.create("convmixer-nano", classes=6, seed=1).eval()
    model.reset_head(3)
    folder = save(model, tmp_path / "mine", classes=("x", "y", "z"))
    again = load(folder)
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(again.model(image), model(image))
    assert again.variant == "convmixer-nano"
    assert again.classes == ("x", "y", "z")
    with pytest.raises(PolypatchError, match="no authors' layout"):
        save(polypatch.create("vit-nano+dart", classes=2), tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda about: about.update(format=9), "format 9"),
        (lambda about: about.update(paper="nosuch"), "no paper 'nosuch'"),
        (lambda about: about.pop("preprocessing"), "has been changed"),
        (lambda about: about.update(config={"dim": 8}), "changed"),
        (lambda about: about.update(config=3), "changed"),
        (lambda about: about.update(surprise=1), "changed"),
    ],
)
def test_tampered_facts_are_named(tmp_path, official, change, said):
    from safetensors.torch import load_file, save_file

    folder = convert(official, tmp_path / "new")
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as handle:
        about = json.loads(handle.metadata()["polypatch"])
    change(about)
    save_file(load_file(file), file, metadata={"polypatch": json.dumps(about)})
    with pytest.raises(PolypatchError, match=said):
        load(folder)


def cached(home: Path, name: str, folder: Path) -> None:
    """Lay files into a hub cache as the hub's client does when it has downloaded them."""
    place = home / ("models--" + name.replace("/", "--"))
    snapshot = place / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())


def test_the_hubs_own_client_finds_a_converted_checkpoint(tmp_path, official, monkeypatch):
    folder = convert(official, tmp_path / "new")
    cached(tmp_path / "hub", "somebody/convmixer", folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = load("hub:somebody/convmixer")
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded.model(image), load(folder).model(image))
    assert loaded.paper == "convmixer"
    assert describe("hub:somebody/convmixer").loaded.variant == "convmixer-nano"
    with pytest.raises(PolypatchError, match="hub:somebody/nothing can't be had"):
        load("hub:somebody/nothing")


def test_push_uploads_what_load_needs(tmp_path, official, monkeypatch):
    folder = convert(official, tmp_path / "new")
    calls = []

    class Api:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, name, *, private, exist_ok):
            calls.append(("create", name, private, exist_ok))

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id):
            calls.append(("file", path_in_repo, path_or_fileobj.decode()))

        def upload_folder(self, *, folder_path, repo_id, allow_patterns, commit_message):
            there = {p.name for p in folder_path.iterdir()}
            calls.append(("folder", repo_id, sorted(there & set(allow_patterns))))
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert hub.push_to_hub(folder, "me/mine", private=True, token="secret") == "https://hub/commit"
    assert calls[0] == ("create", "me/mine", True, True)
    assert calls[1][1] == "README.md"
    assert "license: mit" in calls[1][2]
    assert 'polypatch.load("hub:me/mine")' in calls[1][2]
    assert calls[2] == ("folder", "me/mine", ["config.json", "model.safetensors"])
    with pytest.raises(PolypatchError, match=r"no model\.safetensors"):
        hub.push_to_hub(tmp_path, "me/mine")


def test_describing_reads_no_values(tmp_path, official):
    # NaNs would be refused when loading; their names and shapes can still be looked at.
    state = torch.load(official, weights_only=True)
    state["state_dict"] = {k: v * float("nan") for k, v in state["state_dict"].items()}
    torch.save(state, official)
    found = describe(official, resolution=64)
    assert all(p.is_meta for p in found.loaded.model.parameters())
    assert found.loaded.variant == "convmixer-nano"
    assert found.loaded.assumed == ("activation=gelu",)
    assert found.resolution == 64
    # stem, four layers of depthwise 5×5 and pointwise on 16×16 cells and on the norm's shift, head;
    # 2 operations each
    cells, dim = 16 * 16, 64
    layers = 4 * (cells * dim * (25 + dim) + dim * dim)
    assert found.gflops * 1e9 == pytest.approx(2 * (cells * 48 * dim + layers + dim * 6))
    with pytest.raises(PolypatchError, match="NaN"):
        load(official)


def test_operations_that_depend_on_the_image_are_said_to(tmp_path):
    from polypatch.checkpoints.describing import count_gflops

    with torch.device("meta"):
        model = polypatch.create("vit-nano+quadtree", classes=2)
    gflops, why = count_gflops(model, (32, 32))
    assert gflops is None
    assert "depend on the image" in why


@pytest.mark.parametrize("task", ["classify", "segment"])
@pytest.mark.parametrize("kind", ["official", "converted"])
def test_a_run_starts_from_an_encoders_checkpoint(tmp_path, official, task, kind):
    """All of it but the classifier, which has other classes or none."""
    from polypatch.training.loop import build
    from polypatch.training.recipe import Recipe
    from polypatch.training.runs import RunConfig

    path = official if kind == "official" else convert(official, tmp_path / "new")
    config = RunConfig(
        spec="convmixer-nano", data="", data_fingerprint="", resolution=32, classes=4, seed=9,
        budget="1steps", recipe=Recipe(), init=str(path), task=task,
    )  # fmt: skip
    model = build(config)
    wanted = load(official).model.state_dict()
    encoder = model.backbone if task == "segment" else model
    for name, value in encoder.state_dict().items():
        if not name.startswith("head"):
            assert torch.equal(value, wanted[name]), name
    assert model(torch.randn(2, 3, 32, 32)).shape[:2] == (2, 4)
    other = RunConfig(**{**vars(config), "spec": "vit-nano"})
    with pytest.raises(PolypatchError, match="another architecture"):
        build(other)
