"""Whatever a file holds: a clear error or a network, and nothing in it is executed."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import polypatch
from polypatch.backbones import convmixer
from polypatch.checkpoints import load, read_state
from polypatch.errors import PolypatchError


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return convmixer.to_official(polypatch.create("convmixer-nano", classes=6, seed=1))


@pytest.fixture(scope="module")
def contents(state, tmp_path_factory) -> dict[str, bytes]:
    """Whole files by suffix."""
    folder = tmp_path_factory.mktemp("whole")
    torch.save({"state_dict": state}, folder / "a.pth")
    torch.save(state, folder / "b.pt", _use_new_zipfile_serialization=False)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "c.safetensors")
    return {p.suffix: p.read_bytes() for p in folder.iterdir()}


def outcome(path: Path) -> str:
    said = ""
    try:
        load(path)
    except PolypatchError as error:
        said = str(error)
    assert "\n" not in said
    return "refused" if said else "loaded"


def test_whole_files_load(contents, tmp_path):
    for suffix, content in contents.items():
        path = tmp_path / f"file{suffix}"
        path.write_bytes(content)
        assert outcome(path) == "loaded"


FEW = settings(
    max_examples=40, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@FEW
@given(suffix=st.sampled_from([".pth", ".pt", ".safetensors"]), part=st.floats(0, 0.999))
def test_any_truncation_is_refused(contents, tmp_path, suffix, part):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(contents[suffix][: int(part * len(contents[suffix]))])
    assert outcome(path) == "refused"


def test_a_download_that_stopped_is_called_so(contents, tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(contents[".pth"][:-100])
    with pytest.raises(PolypatchError, match=r"file\.pth is cut off"):
        load(path)


def test_a_refusal_is_one_sentence_without_torchs_warnings(tmp_path, recwarn):
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(Leaves(tmp_path / "executed"), protocol=4))
    with pytest.raises(PolypatchError, match="wants to run code"):
        load(path)
    assert not recwarn.list


@FEW
@given(
    suffix=st.sampled_from([".pth", ".pt", ".safetensors"]),
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20),
)
def test_flipped_bytes_crash_nothing(contents, tmp_path, suffix, places):
    """Most of a file is values, where a flipped byte is another weight; anywhere else it is an
    error in words."""
    content = bytearray(contents[suffix])
    for place, value in places:
        content[min(len(content) - 1, int(place * min(len(content), 4000)))] = value
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    outcome(path)


@FEW
@given(
    suffix=st.sampled_from([".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".npz", ".tar", ""]),
    content=st.binary(max_size=400),
)
def test_any_bytes_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    assert outcome(path) == "refused"


class Leaves:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("where", ["whole", "value", "key", "old", "zip"])
def test_hostile_pickles_execute_nothing(tmp_path, state, where):
    mark, path = tmp_path / "executed", tmp_path / "weights.pth"
    evil = Leaves(mark)
    if where == "whole":
        path.write_bytes(pickle.dumps(evil))
    elif where == "zip":  # torch's own container with another pickle in it
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with zipfile.ZipFile(buffer) as good, zipfile.ZipFile(path, "w") as bad:
            for item in good.infolist():
                data = good.read(item)
                bad.writestr(item, pickle.dumps(evil) if item.filename.endswith("pkl") else data)
    else:
        value = {"value": {**state, "extra": evil}, "key": {evil: 1}, "old": {"state_dict": evil}}
        torch.save(value[where], path, _use_new_zipfile_serialization=where != "old")
    with pytest.raises(PolypatchError, match=r"wants to run code|can't be read"):
        load(path)
    assert not mark.exists()


def test_npz_with_objects_executes_nothing(tmp_path):
    import numpy as np

    mark, path = tmp_path / "executed", tmp_path / "weights.npz"
    np.savez(path, a=np.array([Leaves(mark)], dtype=object))
    with pytest.raises(PolypatchError, match=str(path)):
        load(path)
    assert not mark.exists()


def refusal(tmp_path, state) -> str:
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    with pytest.raises(PolypatchError) as caught:
        load(path)
    return str(caught.value)


def test_what_is_wrong_with_the_tensors_is_named(tmp_path, state):
    some = "3.1.weight"

    assert "unexpected keys extra.weight" in refusal(
        tmp_path, {**state, "extra.weight": torch.zeros(2)}
    )
    lacking = {k: v for k, v in state.items() if k != "4.3.bias"}
    assert "missing keys" in refusal(tmp_path, lacking)
    narrow = {**state, "4.1.weight": torch.zeros(64, 63, 1, 1)}
    assert "misfitting shapes" in refusal(tmp_path, narrow)
    assert "misfitting types 4.1.weight: torch.int64" in refusal(
        tmp_path, {**state, "4.1.weight": torch.zeros(64, 64, 1, 1, dtype=torch.int64)}
    )
    assert f"{some} holds NaNs" in refusal(tmp_path, {**state, some: state[some] * float("nan")})
    assert "complex" in refusal(tmp_path, {**state, some: state[some].to(torch.complex64)})
    assert "sparse" in refusal(tmp_path, {**state, some: state[some].to_sparse()})


def test_half_precision_files_load(tmp_path, state):
    path = tmp_path / "weights.pth"
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, path)
        model = load(path).model
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_networks_inside_of_others_are_found(tmp_path, state):
    """A segmenter's or detector's file: the encoder is taken, the rest is listed."""
    whole = {f"backbone.{k}": v for k, v in state.items()}
    whole |= {"decode_head.conv.weight": torch.zeros(3, 3)}
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": whole, "meta": {"epoch": 3}}, path)
    loaded = load(path)
    assert loaded.paper == "convmixer"
    assert loaded.left_out == ("decode_head.conv.weight",)


def test_unknown_files_name_the_closest_papers(tmp_path, state):
    other = {k.replace("fn.", "gn."): v for k, v in state.items()}
    said = refusal(tmp_path, other)
    assert "closest: convmixer" in said
    assert "#.#.gn.#.bias" in said
    assert "closest" not in refusal(tmp_path, {"nothing.like.it": torch.zeros(1)})


def test_text_and_folders(tmp_path):
    with pytest.raises(PolypatchError, match="is a folder"):
        read_state(tmp_path)
    path = tmp_path / "readme.md"
    path.write_text("# hello")
    assert outcome(path) == "refused"
