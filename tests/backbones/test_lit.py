"""LIT against slow literal versions of its equations; both families; their weights; training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polypatch import create
from polypatch.backbones import lit
from polypatch.backbones.lit_network import (
    Block,
    DeformableMerging,
    Positions,
    deformable_patches,
    relative_bias,
)
from polypatch.errors import PolypatchError
from polypatch.nn import init_parts


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- deformable token merging ------------------------------------------------------------------


def literal_patches(x: Tensor, offsets: Tensor) -> Tensor:
    """(height, width, dim) and (rows, columns, 4, 2): corner by corner."""
    height, width, dim = x.shape
    rows, columns = offsets.shape[:2]
    out = torch.zeros(rows, columns, 4, dim, dtype=x.dtype)
    for i in range(rows):
        for j in range(columns):
            for tap in range(4):
                y = 2 * i + tap // 2 + float(offsets[i, j, tap, 0])
                z = 2 * j + tap % 2 + float(offsets[i, j, tap, 1])
                for row in (math.floor(y), math.floor(y) + 1):
                    for column in (math.floor(z), math.floor(z) + 1):
                        if 0 <= row < height and 0 <= column < width:
                            weight = (1 - abs(y - row)) * (1 - abs(z - column))
                            out[i, j, tap] += weight * x[row, column]
    return out.flatten(2)


@pytest.mark.parametrize("size", [(6, 8), (5, 3), (2, 2), (7, 2)], ids=str)
@pytest.mark.parametrize("reach", [0.0, 0.5, 3.0, 40.0])
def test_patches_are_fetched_from_their_places(size: tuple[int, int], reach: float) -> None:
    x = double(2, *size, 3)
    offsets = reach * double(2, size[0] // 2, size[1] // 2, 4, 2)
    expected = torch.stack([literal_patches(a, b) for a, b in zip(x, offsets)])
    torch.testing.assert_close(deformable_patches(x, offsets), expected)


def test_endless_offsets_fetch_nothing() -> None:
    x = double(1, 4, 4, 2)
    offsets = torch.full((1, 2, 2, 4, 2), 1e30, dtype=torch.float64)
    assert deformable_patches(x, offsets).abs().max() == 0
    assert deformable_patches(x, -offsets).abs().max() == 0


def test_offsets_have_the_gradient_of_the_interpolation() -> None:
    x = double(1, 4, 6, 3).requires_grad_()
    # away from the cells' middles, where interpolation has a kink
    offsets = (torch.rand(1, 2, 3, 4, 2, dtype=torch.float64) * 0.6 + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(deformable_patches, (x, offsets))


def test_merging_begins_as_an_ordinary_convolution() -> None:
    """With fresh offsets of zero: conv 2 × 2 with stride 2, batch norm, GELU."""
    module = DeformableMerging(6, 10)
    init_parts(module)
    module.init_weights()
    module = module.double().eval()
    x = double(2, 6, 4, 6)
    assert module.offsets(x).abs().max() == 0
    weight = module.proj.weight.view(10, 2, 2, 6).permute(0, 3, 1, 2)
    plain = F.conv2d(x.permute(0, 3, 1, 2), weight, module.proj.bias, stride=2)
    expected = F.gelu(module.norm(plain)).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)


def test_merging_in_training_updates_its_statistics() -> None:
    module = DeformableMerging(4, 8)
    before = module.norm.running_mean.clone()
    module.train()(torch.randn(2, 4, 4, 4))
    assert not torch.equal(module.norm.running_mean, before)
    with torch.no_grad():
        module(torch.randn(2, 4, 4, 4))
    assert module.norm.num_batches_tracked == 2


def test_a_moved_image_needs_moved_offsets() -> None:
    """Offsets of one whole cell read what lies one cell further."""
    x = double(1, 8, 8, 2)
    one = torch.zeros(1, 4, 4, 4, 2, dtype=torch.float64)
    one[..., 1] = 1
    moved = deformable_patches(x.roll(-1, 2), one * 0)
    torch.testing.assert_close(deformable_patches(x, one)[:, :, :-1], moved[:, :, :-1])


# ---- blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 4), (1, 1)], ids=str)
def test_relative_bias_is_swins(size: tuple[int, int]) -> None:
    height, width = size
    table = double(2, 2 * height - 1, 2 * width - 1)
    bias = relative_bias(table, size)
    assert bias.shape == (1, 2, height * width, height * width)
    for q in range(height * width):
        for k in range(height * width):
            down, right = q // width - k // width, q % width - k % width
            assert torch.equal(bias[0, :, q, k], table[:, down + height - 1, right + width - 1])


def block(**changes: Any) -> Block:
    options = dict(
        dim=8, heads=2, hidden=16, attention=True, size=(3, 2), eps=1e-5, qkv_bias=True,
        scale=None, drop=0.0, attn_drop=0.0,
    )  # fmt: skip
    made = Block(**{**options, **changes})
    init_parts(made)
    made.init_weights()
    return made.double().eval()


@pytest.mark.parametrize("scale", [None, 0.2])
def test_a_late_block(scale: float | None) -> None:
    module = block(scale=scale)
    x = double(2, 6, 8)
    qkv = F.layer_norm(x, (8,)) @ module.attn.qkv.weight.T + module.attn.qkv.bias
    q, k, v = qkv.view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-1, -2) * (0.5 if scale is None else scale)
    logits = logits + relative_bias(module.relative.T.unflatten(1, (5, 3)), (3, 2))
    y = x + module.attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    y = y + module.mlp.fc2(F.gelu(module.mlp.fc1(F.layer_norm(y, (8,)))))
    torch.testing.assert_close(module(x, (3, 2)), y)


def test_an_early_block_lets_no_token_see_another() -> None:
    module = block(attention=False)
    assert not any(name.startswith(("attn", "norm1", "relative")) for name, _ in
                   module.named_parameters())  # fmt: skip
    x = double(1, 6, 8)
    changed = x.clone()
    changed[:, 2] += 1
    moved = (module(changed, (3, 2)) - module(x, (3, 2))).abs().amax(-1)[0]
    assert moved[2] > 0
    assert moved.sum() == moved[2]


def test_positions_are_resized_but_for_the_class_token() -> None:
    module = Positions(dim=3, size=(4, 4), extra=1)
    module.init_weights()
    table = module((6, 5))
    assert table.shape == (1, 31, 3)
    assert torch.equal(table[:, 0], module.table[:, 0])
    maps = module.table[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resized = F.interpolate(maps, (6, 5), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(table[:, 1:], resized)
    assert module((4, 4)) is module.table


# ---- network -----------------------------------------------------------------------------------

#: the authors' networks, counted
PARAMETERS = {
    "lit-ti": 19_886_272,
    "lit-small": 27_973_720,
    "lit-medium": 49_372_264,
    "lit-base": 87_292_384,
    "lit-pvt-small-full-msa": 20_185_384,
}


@pytest.mark.parametrize("name", sorted(lit.VARIANTS))
def test_published_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in create(name).parameters())
    assert count == PARAMETERS[name] if name in PARAMETERS else count < 1.5e6


def swin(**changes: Any) -> dict[str, Any]:
    return {
        "code": "s_m_b", "img_size": 64, "embed_dim": 16, "depths": [1, 2, 1, 2],
        "num_heads": [1, 1, 2, 4], "num_classes": 5, **changes,
    }  # fmt: skip


def pvt(**changes: Any) -> dict[str, Any]:
    return {
        "code": "ti", "img_size": 64, "patch_size": 4, "embed_dims": [16, 24, 64, 128],
        "depths": [1, 2, 1, 2], "num_heads": [1, 1, 1, 2], "mlp_ratios": [4, 3, 2, 2],
        "qkv_bias": True, "num_classes": 5, "norm_layer": "LayerNorm(eps=1e-6)", **changes,
    }  # fmt: skip


CONFIGS = {
    "swin": swin(),
    "attention everywhere": swin(has_msa=[1, 1, 1, 1], num_heads=[4, 4, 4, 8]),
    "one stage with attention": swin(has_msa=[0, 1, 0, 0], num_heads=[1, 2, 2, 4]),
    "no attention": swin(has_msa=[0, 0, 0, 0]),
    "bare": swin(patch_norm=False, qkv_bias=False, mlp_ratio=2.5, patch_size=2, in_chans=3),
    "three stages": swin(depths=[1, 1, 2], num_heads=[1, 1, 2], has_msa=[0, 0, 1]),
    "dense": swin(out_indices=(0, 1, 2, 3)),
    "pvt": pvt(),
    "pvt without bias": pvt(qkv_bias=False),
    "plain merging": pvt(deformable=False),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


def filled(config: dict[str, Any]) -> lit.LIT:
    """Fresh weights, but offsets and statistics that aren't nothing."""
    model = lit.network(config)
    model.init_weights()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1 or "offset" in name:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
        for name, value in model.named_buffers():
            if "running" in name:
                value.add_(torch.rand(value.shape, generator=generator))
    return model.eval()


@each_config
def test_checkpoints_are_recognised_and_rebuilt(config: dict[str, Any]) -> None:
    model = filled(config)
    state = lit.to_official(model)
    found = lit.recognise({name: tuple(value.shape) for name, value in state.items()})
    assert found is not None
    built = lit.official_config(model)
    for word in set(found) - set(lit.ASSUMED):
        assert found[word] == built[word], word
    again = lit.from_official({**found, "img_size": 64, "norm_layer": built["norm_layer"]}, state)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))
        for one, other in zip(again.features(x), model.features(x)):
            torch.testing.assert_close(one.map, other.map)
    rewritten = lit.to_official(again)
    assert rewritten.keys() == state.keys()
    assert all(torch.equal(rewritten[name], state[name]) for name in state)


@each_config
@pytest.mark.parametrize("size", [(64, 64), (90, 51), (33, 130)], ids=str)
def test_any_size_goes(config: dict[str, Any], size: tuple[int, int]) -> None:
    """Above, below and beside the size that the tables are for; with and without gradients."""
    model = filled(config)
    x = torch.randn(2, 3, *size)
    with_gradients = model(x)
    assert with_gradients.isfinite().all()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), with_gradients.detach(), rtol=1e-4, atol=1e-5)


@each_config
def test_gradients_reach_every_parameter(config: dict[str, Any]) -> None:
    model = filled(config).train()
    x = torch.randn(2, 3, 64, 64)
    if "out_indices" in config:
        loss = sum((m.map**3).sum() for m in model.features(x))
    else:
        loss = (model(x) * torch.randn(2, 5)).sum()
    loss.backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert value.grad.abs().sum() > 0, name


def test_published_networks_are_known_by_their_sizes() -> None:
    for name in ("lit-ti", "lit-small", "lit-pvt-small-full-msa"):
        with torch.device("meta"):
            model = create(name)
        found = lit.recognise({k: tuple(v.shape) for k, v in lit.to_official(model).items()})
        assert found is not None
        built = lit.official_config(model)
        assert {k: built[k] for k in found} == {**found, "norm_layer": built["norm_layer"]}
        assert lit.network(found).eps == model.eps


def test_other_weights_are_no_lit() -> None:
    """Above all not PVT's own, whose names begin alike, nor Swin's."""
    assert lit.recognise({"patch_embed.proj.weight": (96, 3, 4, 4), "layers.0.x": (1,)}) is None
    shapes = {k: tuple(v.shape) for k, v in lit.to_official(filled(pvt(deformable=False))).items()}
    renamed = {k.replace("attn.qkv", "attn.kv"): v for k, v in shapes.items()}
    assert lit.recognise(shapes) is not None
    assert lit.recognise(renamed) is None


def test_the_class_token_joins_in_the_last_stage() -> None:
    model = filled(pvt())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = [m.map for m in model.features(x)], model(x)
        model.class_token.add_(1)
        after = [m.map for m in model.features(x)], model(x)
    for old, new in zip(before[0][:3], after[0][:3]):
        assert torch.equal(old, new)
    assert not torch.equal(before[0][3], after[0][3])
    assert not torch.equal(before[1], after[1])


def test_dense_maps_but_the_first_are_normed() -> None:
    model = filled(CONFIGS["dense"])
    raw = filled({k: v for k, v in CONFIGS["dense"].items() if k != "out_indices"})
    raw.load_state_dict({k: v for k, v in model.state_dict().items() if "map_norms" not in k},
                        strict=False)  # fmt: skip
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps, plain = model.features(x), raw.features(x)
        assert torch.equal(maps[0].map, plain[0].map)
        for norm, one, other in zip((*model.map_norms, model.norm), maps[1:], plain[1:]):
            normed = norm(other.map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            torch.testing.assert_close(one.map, normed)


def test_offsets_can_be_drawn() -> None:
    model = filled(swin())
    offsets = model.offsets(torch.randn(2, 3, 64, 96))
    assert [tuple(o.shape) for o in offsets] == [
        (2, 8, 12, 4, 2), (2, 4, 6, 4, 2), (2, 2, 3, 4, 2)
    ]  # fmt: skip
    assert all(o.abs().max() > 0 for o in offsets)
    with pytest.raises(PolypatchError, match="no offsets"):
        filled(pvt(deformable=False)).offsets(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (swin(ape=True), "ape=True"),
        (swin(num_heads=[1, 1, 3, 4]), "don't divide"),
        (swin(num_heads=[1, 1, 2]), "one entry for each"),
        (swin(img_size=16), "need a resolution of 32"),
        (swin(out_indices=(1, 2)), "out_indices"),
        (swin(norm_layer="BatchNorm"), "norm_layer"),
        (swin(embed_dims=[1, 2]), "did you mean embed_dim"),
        (swin(code="b"), "no code 'b'"),
    ],
)
def test_what_is_not_possible_is_said(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PolypatchError, match=sentence):
        lit.network(config)


def test_words_of_the_authors_that_do_nothing_or_little() -> None:
    model = lit.network(swin(window_size=7, use_checkpoint=True, qk_scale=0.25, norm_layer=None))
    assert model._checkpointed
    assert model.stages[2][0].attn.scale == 0.25
    assert lit.network(pvt(sr_ratios=[8, 4, 2, 1], norm_layer="LayerNorm")).eps == 1e-5
    with pytest.raises(PolypatchError, match="no 'none'"):
        create("lit-nano(early=none)", classes=3)
    odd = lit.LIT(
        dims=(8, 24), depths=(1, 1), heads=(1, 1), expansions=(2, 3), attention=(False, True)
    )
    with pytest.raises(PolypatchError, match="double"):
        lit.official_config(odd)


# ---- training ----------------------------------------------------------------------------------


def test_early_attention_is_an_option() -> None:
    model = create("lit-nano(early=attention)", classes=3)
    assert all(block.attention for stage in model.stages for block in stage)
    assert not create("lit-nano", classes=3).stages[0][0].attention


def test_stochastic_depth_rises_over_all_blocks() -> None:
    model = create("lit-nano(drop_path=0.6)", classes=3)
    rates = [block.drop_path.rate for stage in model.stages for block in stage]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.6, len(rates)))
    model.set_drop_path(0.0)
    assert not any(block.drop_path.rate for stage in model.stages for block in stage)


def test_offsets_learn_slowly() -> None:
    model = create("lit-nano", classes=3)
    groups = model.parameter_groups(rate=1e-3, decay=0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    slow = [g for g in groups if g["lr"] == pytest.approx(1e-5)]
    assert [names[id(p)] for g in slow for p in g["params"]] == [
        f"mergings.{i}.offset.weight" for i in range(3)
    ]
    assert slow[0]["weight_decay"] == 0.05
    bare = [names[id(p)] for g in groups if g["weight_decay"] == 0 for p in g["params"]]
    assert "stages.2.0.relative" in bare
    assert "mergings.0.offset.bias" in bare
    assert sum(len(g["params"]) for g in groups) == len(names)
    torch.optim.AdamW(groups)


def test_dropout_drops_in_training_only() -> None:
    model = create("lit-nano(drop=0.5,attn_drop=0.5)", classes=3)
    x = torch.randn(2, 3, 32, 32)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
