"""Foreign weights: every drawn configuration survives writing, recognising and reading."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polypatch.errors import PolypatchError
from polypatch.hosts.layouts import from_official, recognise, to_official
from polypatch.hosts.vit import assemble_vit


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


configurations = st.fixed_dictionaries(
    {
        "dim": st.sampled_from([64, 128]),
        "depth": st.integers(1, 3),
        "hidden": st.sampled_from([32, 96]),
        "patch": st.sampled_from([2, 4]),
        "grid": st.sampled_from([(3, 3), (5, 5)]),
        "classes": st.sampled_from([0, 7]),
        "channels": st.sampled_from([1, 3]),
        "kind": st.sampled_from(["class", "mean", "attention", "registers", "distilled"]),
        "norm_in": st.booleans(),
        "patch_bias": st.booleans(),
        "qkv_bias": st.booleans(),
        "qk_norm": st.booleans(),
        "gated": st.booleans(),
        "layer_scale": st.sampled_from([None, 0.1]),
    }
)


@given(configurations)
@settings(max_examples=40, deadline=None)
def test_round_trip(config):
    kind = config.pop("kind")
    config["heads"] = config["dim"] // 64
    config |= {
        "class": dict(pooling="class", prefix=1, positioned=1),
        "mean": dict(pooling="mean", prefix=0, norm_pooled=True),
        "attention": dict(pooling="attention", prefix=0),
        "registers": dict(pooling="class", prefix=4, positioned=0),
        "distilled": dict(pooling="class+distill", prefix=2, positioned=2, classes=7),
    }[kind]
    model = assemble_vit(**config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.1)
    state = to_official(model)
    read = recognise(shapes(state))
    assert read is not None
    assert read["num_heads"] == config["heads"]
    again = from_official(read, state)
    assert shapes(again.state_dict()) == shapes(model.state_dict())
    side = config["patch"] * config["grid"][0]
    image = torch.randn(2, config["channels"], side, side)
    assert torch.equal(again(image), model(image))


def test_unknown_and_missing_keys_are_named():
    model = assemble_vit(
        dim=64, depth=1, heads=1, hidden=64, patch=4, grid=(2, 2), classes=3, prefix=1, positioned=1
    )
    state = to_official(model)
    with pytest.raises(PolypatchError, match=r"blocks\.0\.extra"):
        from_official({}, {**state, "blocks.0.extra.weight": torch.zeros(1)})
    less = {k: v for k, v in state.items() if k != "blocks.0.norm2.bias"}
    with pytest.raises(PolypatchError, match=r"missing keys blocks\.0\.norm2\.bias"):
        from_official({}, less)
    with pytest.raises(PolypatchError, match="unknown arguments"):
        from_official({"embed_dims": 3}, state)


def test_incomplete_and_contradicting_weights_get_a_sentence():
    model = assemble_vit(
        dim=64, depth=2, heads=1, hidden=96, patch=4, grid=(2, 2), classes=3, prefix=1, positioned=1
    )
    state = to_official(model)
    for lost in ("patch_embed.proj.weight", "blocks.0.mlp.fc2.weight"):
        with pytest.raises(PolypatchError, match="missing keys"):
            from_official({}, {k: v for k, v in state.items() if k != lost})
    with pytest.raises(PolypatchError, match="two keys for one weight"):
        from_official({}, {**state, "blocks.0.mlp.w12.weight": state["blocks.0.mlp.fc1.weight"]})
    for config, said in [
        ({"embed_dim": 999}, "embed_dim=999 contradicts the weights, which have 64"),
        ({"depth": 7}, "depth=7 contradicts"),
    ]:
        with pytest.raises(PolypatchError, match=said):
            from_official(config, state)


def test_transformers_words_and_parts_are_checked():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=96,
    )  # fmt: skip
    state = dict(transformers.ViTModel(config, add_pooling_layer=False).state_dict())
    assert from_official({"num_attention_heads": 1}, state) is not None
    with pytest.raises(PolypatchError, match="unknown arguments of a vision model: hiden_size"):
        from_official({"hiden_size": 64}, state)
    less = {k: v for k, v in state.items() if "k_proj.weight" not in k and "key.weight" not in k}
    with pytest.raises(PolypatchError, match="lacks its part k"):
        from_official({}, less)
    strange = {**shapes(state), "layers.0.attention.gate.weight": (1,)}
    assert recognise(strange) is None


def test_other_networks_are_not_taken_for_a_vit():
    assert recognise({"conv1.weight": (64, 3, 7, 7)}) is None
    assert recognise({"patch_embed.proj.weight": (64, 3, 4, 4)}) is None
    assert (
        recognise(
            {
                "patch_embed.proj.weight": (64, 3, 4, 4),
                "blocks.0.attn.qkv.weight": (192, 64),
                "blocks.0.attn.relative_position_bias_table": (9, 4),
            }
        )
        is None
    )


def test_plugged_parts_have_no_place_in_timms_layout():
    model = assemble_vit(
        dim=64, depth=1, heads=1, hidden=64, patch=4, grid=(2, 2), classes=3, prefix=1, positioned=1
    )
    model.blocks[0].adapter = torch.nn.Linear(2, 2)
    with pytest.raises(PolypatchError, match="no names for blocks"):
        to_official(model)


@pytest.mark.parametrize(
    "family", ["ViTForImageClassification", "Dinov2Model", "Dinov2WithRegistersModel",
               "CLIPVisionModel", "SiglipVisionModel", "DeiTForImageClassificationWithTeacher"],
)  # fmt: skip
def test_models_of_transformers_load_and_agree(family):
    """Beyond the stored cases: registers, two heads, what `save_pretrained` writes."""
    transformers = pytest.importorskip("transformers")
    config_class = getattr(transformers, family.split("For")[0].removesuffix("Model") + "Config")
    config = config_class(
        image_size=24, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        **({} if "Dinov2" in family else {"intermediate_size": 96}),
    )  # fmt: skip
    model = getattr(transformers, family)(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.2)
    state = dict(model.state_dict())
    assert recognise(shapes(state))["layout"] == "transformers"
    ours = from_official(
        {"class": family, "num_attention_heads": 2, "image_size": 24, "patch_size": 8}, state
    )
    image = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        theirs = model(image)
        found = ours.forward_features(image)
        if hasattr(theirs, "logits"):
            assert torch.allclose(ours(image), theirs.logits, atol=1e-4)
        else:
            assert torch.allclose(found.x, theirs.last_hidden_state, atol=1e-3)
