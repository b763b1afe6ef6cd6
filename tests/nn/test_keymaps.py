"""Key maps read both ways and fail on what they don't know."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polypatch.errors import PolypatchError
from polypatch.nn import KeyMap, Rule, pointwise

KEYS = KeyMap(
    [
        Rule(("s{i}.{j}.q", "s{i}.{j}.kv"), "stages.{i}.{j}.qkv", parts=(1, 2)),
        pointwise("s{i}.{j}.mlp", "stages.{i}.{j}.fc"),
        ("head", "head"),
        ("pos", "table"),
    ],
    unused=["s{i}.{j}.index"],
)


def theirs() -> dict[str, torch.Tensor]:
    return {
        "s0.11.q.weight": torch.randn(4, 4),
        "s0.11.kv.weight": torch.randn(8, 4),
        "s0.11.q.bias": torch.randn(4),
        "s0.11.kv.bias": torch.randn(8),
        "s0.11.mlp.weight": torch.randn(6, 4, 1, 1),
        "s0.11.mlp.bias": torch.randn(6),
        "head.weight": torch.randn(2, 4),
        "pos": torch.randn(1, 3),
    }


def test_both_ways():
    state = theirs()
    ours, names = KEYS.to_ours({**state, "s0.11.index": torch.zeros(3)})
    assert set(ours) == {
        "stages.0.11.qkv.weight", "stages.0.11.qkv.bias", "stages.0.11.fc.weight",
        "stages.0.11.fc.bias", "head.weight", "table",
    }  # fmt: skip
    assert torch.equal(ours["stages.0.11.qkv.weight"][:4], state["s0.11.q.weight"])
    assert torch.equal(ours["stages.0.11.qkv.weight"][4:], state["s0.11.kv.weight"])
    assert ours["stages.0.11.fc.weight"].shape == (6, 4)
    assert names["table"] == "pos"
    back = KEYS.to_theirs(ours)
    assert set(back) == set(state)
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_unknown_names_are_listed():
    assert KEYS.unknown(dict.fromkeys([*theirs(), "s0.11.index", "s0.x.q", "other"])) == [
        "s0.x.q",
        "other",
    ]
    with pytest.raises(PolypatchError, match=r"no name in the authors' layout for tail\.weight"):
        KEYS.to_theirs({"tail.weight": torch.zeros(1)})


def test_a_part_that_is_missing_or_misfits_is_named():
    state = theirs()
    kv = state.pop("s0.11.kv.weight")
    with pytest.raises(PolypatchError, match=r"has s0\.11\.q\.weight but lacks its companions"):
        KEYS.to_ours(state)
    state["s0.11.kv.weight"] = kv[:, :3]
    with pytest.raises(PolypatchError, match="differ in shape"):
        KEYS.to_ours(state)


def test_two_keys_for_one_weight_are_refused():
    keys = KeyMap([("a", "x"), ("b", "x")])
    with pytest.raises(PolypatchError, match=r"two keys for one weight: a\.weight and b\.weight"):
        keys.to_ours({"a.weight": torch.zeros(1), "b.weight": torch.zeros(1)})


def test_a_number_that_stands_twice_must_agree():
    keys = KeyMap([("s{i}.b{i}.w", "s.{i}.w")])
    assert keys.find("s3.b3.w") is not None
    assert keys.find("s3.b4.w") is None


def test_loading_speaks_of_their_names():
    model = nn.Module()
    model.head = nn.Linear(4, 2)
    state = {"head.weight": torch.zeros(2, 5), "strange": torch.zeros(1)}
    with pytest.raises(PolypatchError) as caught:
        KeyMap([("head", "head")]).load(model, state, what="this")
    said = str(caught.value)
    assert "missing keys head.bias" in said
    assert "unexpected keys strange" in said
    assert "head.weight: (2, 5) for (2, 4)" in said
    with pytest.raises(ValueError, match="2 names, 1 parts"):
        Rule(("a", "b"), "c")
