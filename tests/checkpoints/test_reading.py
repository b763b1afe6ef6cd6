"""Reading files of weights: safely, whatever wraps them, resized as asked; bad files by name."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import polypatch
from polypatch.checkpoints import load, load_weights, read_state, recognise, resize, unwrap
from polypatch.errors import PolypatchError
from polypatch.hosts.layouts import to_official
from polypatch.hosts.vit import assemble_vit
from polypatch.spec import create


@pytest.fixture
def host():
    model = assemble_vit(
        dim=64, depth=2, heads=1, hidden=96, patch=4, grid=(6, 6), classes=5, prefix=1, positioned=1
    ).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.1)
    return model


@pytest.mark.parametrize("wrapped", ["plain", "state_dict", "model", "module", "ema"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_however_wrapped(tmp_path, host, wrapped, suffix):
    state = to_official(host)
    path = tmp_path / f"weights{suffix}"
    if wrapped == "module":
        state = {f"module.{k}": v for k, v in state.items()}
    if suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        outer = {
            "state_dict": {"state_dict": state, "epoch": 3},
            "model": {"model": state, "optimizer": {"lr": 1.0}},
            "ema": {"model_ema": state, "model": {k: v * 0 for k, v in state.items()}},
        }.get(wrapped, state)
        torch.save(outer, path)
    loaded = load(path)
    image = torch.randn(2, 3, 24, 24)
    assert torch.equal(loaded.model(image), host(image))
    assert loaded.paper == "vit"
    assert loaded.assumed == ("num_heads=1",)


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"garbage, no weights at all", "can't be read|wants to run code|damaged"),
        (pickle.dumps(Hostile()), "wants to run code|can't be read"),
        (pickle.dumps([1, 2]), "not a state dict|can't be read|wants to run code"),
    ],
)
def test_bad_files_are_named_and_execute_nothing(tmp_path, content, said):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(PolypatchError, match=said):
        load(path)


def test_a_hostile_archive_executes_nothing(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": Hostile()}, path)
    with pytest.raises(PolypatchError, match="wants to run code"):
        read_state(path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files_are_named(tmp_path, host, keep, suffix):
    path = tmp_path / f"weights{suffix}"
    state = {k: v.contiguous() for k, v in to_official(host).items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(PolypatchError, match=str(path)):
        load(path)


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(PolypatchError, match="there is no file"):
        load(tmp_path / "nothing.pth")
    path = tmp_path / "other.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    with pytest.raises(PolypatchError, match="no network that polypatch knows"):
        load(path)
    with pytest.raises(PolypatchError, match="no tensors"):
        unwrap({"epoch": 3})


def test_every_named_paper_recognises_its_own_only(host):
    shapes = {k: tuple(v.shape) for k, v in to_official(host).items()}
    assert recognise(shapes)[0] == "vit"
    assert polypatch.recognise({"x": (1,)}) is None


@pytest.mark.parametrize("patch", [2, 8])
def test_resizing_the_patch_keeps_tokens_of_enlarged_images(host, patch):
    """FlexiViT's theorem, through the whole host: enlarge the image and the patch alike."""
    image = torch.randn(2, 3, 24, 24)
    before = host(image)
    if patch > 4:
        # Each patch by itself: the theorem knows nothing of the neighbours.
        cells = image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        cells = F.interpolate(cells, scale_factor=2.0, mode="bilinear", align_corners=False)
        larger = cells.view(2, 6, 6, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 48, 48)
        resized = resize(host, patch=8, resolution=48)
        assert torch.allclose(resized(larger), before, atol=1e-3)
    else:
        resized = resize(host, patch=2)
        assert resized.position.table.shape[1:3] == (12, 12)
        assert resized(image).shape == before.shape


def test_load_resizes(tmp_path, host):
    path = tmp_path / "weights.pth"
    torch.save(to_official(host), path)
    model = load(path, patch=8, resolution=64).model
    assert model.patching.proj.weight.shape[-1] == 8
    assert model.position.table.shape[1:3] == (8, 8)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_foreign_weights_start_a_model_of_another_patch_and_resolution(tmp_path, host):
    path = tmp_path / "weights.pth"
    torch.save(to_official(host), path)
    other = assemble_vit(
        dim=64, depth=2, heads=1, hidden=96, patch=8, grid=(4, 4), classes=9, prefix=1, positioned=1
    )
    fresh = load_weights(other, path)
    assert fresh == ["head.weight", "head.bias"]
    assert torch.equal(other.blocks[1].mlp.fc1.weight, host.blocks[1].mlp.fc1.weight)
    with pytest.raises(PolypatchError, match="another architecture"):
        load_weights(create("vit-nano", classes=3), path)


def test_a_run_loads_with_its_techniques(tmp_path):
    from polypatch.data import load_images
    from polypatch.training.loop import build, train
    from polypatch.training.recipe import Recipe
    from polypatch.training.runs import RunConfig

    data = load_images("bundled:digits", resolution=16)

    def config(spec, init=""):
        return RunConfig(
            spec=spec, data=data.name, data_fingerprint=data.fingerprint, resolution=16,
            classes=10, seed=0, budget="2steps", recipe=Recipe(batch=8), init=init,
        )  # fmt: skip

    run = train(config("vit-nano(patch=4)+tome(r=2)"), data, root=tmp_path, device="cpu")
    loaded = polypatch.load(run.folder)
    assert loaded.model.plugs == ("tome",)
    assert loaded.classes == data.classes
    # The bare host's weights start a host with another technique.
    plain = train(config("vit-nano(patch=4)"), data, root=tmp_path, device="cpu")
    model = build(config("vit-nano(patch=4)+dart(tokens=8)", init=str(plain.folder)))
    trained = load(plain.folder).model
    assert torch.equal(model.blocks[2].mixing.qkv.weight, trained.blocks[2].mixing.qkv.weight)
