"""CrossViT: the paper's equations, sizes, schedules, and the authors' layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polypatch import PolypatchError, create, load
from polypatch.backbones import crossvit
from polypatch.backbones.crossvit import CrossViT, build, drop_rates, network, recognise
from polypatch.backbones.crossvit_embedding import embedding
from polypatch.backbones.crossvit_fusion import (
    AllFusion,
    ClassFusion,
    CrossAttention,
    CrossFusion,
)
from polypatch.nn import DropPath


def lively(module: nn.Module) -> nn.Module:
    """Every parameter far from its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in module.parameters():
            fan = value[0].numel() if value.ndim > 1 else 25
            value.copy_(torch.randn(value.shape, generator=generator) / fan**0.5)
            if value.ndim == 1:
                value.add_(0.3)
    return module.eval()


def small(**changes) -> CrossViT:
    settings = dict(
        sizes=(30, 32), patches=(6, 8), dims=(8, 12), depths=((1, 2, 0), (1, 1, 0)),
        heads=(2, 3), ratios=(2, 3), classes=5,
    )  # fmt: skip
    return lively(CrossViT(**{**settings, **changes}))  # type: ignore[return-value]


def literal_cross(block: CrossAttention, token, others):
    """Eq. 6 and 7, with keys and values of every token, head by head."""
    x = torch.cat([token, others], dim=1)
    x = F.layer_norm(x, x.shape[-1:], block.norm.weight, block.norm.bias, block.norm.eps)
    q, k, v = block.q(x[:, :1]), block.k(x), block.v(x)
    head_dim = x.shape[-1] // block.heads
    mixed = []
    for h in range(block.heads):
        part = slice(h * head_dim, (h + 1) * head_dim)
        logits = q[..., part] @ k[..., part].transpose(1, 2) * block.scale
        mixed.append(logits.softmax(-1) @ v[..., part])
    return token + block.proj(torch.cat(mixed, dim=-1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_cross_attention_without_keys_is_the_papers(bias, scale):
    block = lively(CrossAttention(dim=12, heads=3, qkv_bias=bias, eps=1e-6, scale=scale))
    token, others = torch.randn(2, 1, 12), torch.randn(2, 7, 12)
    wanted = literal_cross(block, token, others)
    torch.testing.assert_close(block(token, others), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(block(token, others), wanted, rtol=1e-4, atol=1e-5)
    weight = torch.randn(2, 1, 12)
    for function in (block, lambda *x: literal_cross(block, *x)):
        block.zero_grad()
        (function(token, others) * weight).sum().backward()
        gradients = {name: value.grad.clone() for name, value in block.named_parameters()}
        if function is block:
            ours = gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_a_bias_of_the_keys_cancels():
    block = lively(CrossAttention(dim=12, heads=3, qkv_bias=True, eps=1e-6))
    token, others = torch.randn(2, 1, 12), torch.randn(2, 7, 12)
    before = block(token, others)
    block.k.bias.data.add_(3.0)
    torch.testing.assert_close(block(token, others), before, rtol=1e-4, atol=1e-5)


def test_fusion_reads_the_other_branch_and_replaces_the_class_token():
    model = small()
    fusion = model.encoders[0].fusion
    assert isinstance(fusion, CrossFusion)
    s, l = torch.randn(2, 26, 8), torch.randn(2, 17, 12)
    with torch.no_grad():
        fused_s, fused_l = fusion([s.clone(), l.clone()], [(5, 5), (4, 4)])
        for fused, own, other, i in ((fused_s, s, l, 0), (fused_l, l, s, 1)):
            token = fusion.outward[i](own[:, :1])
            token = literal_cross(fusion.attentions[i][0], token, other[:, 1:])
            torch.testing.assert_close(fused[:, :1], fusion.back[i](token), rtol=1e-4, atol=1e-5)
            assert torch.equal(fused[:, 1:], own[:, 1:])
    with_gradient = fusion([s.clone(), l.clone()], [(5, 5), (4, 4)])
    torch.testing.assert_close(with_gradient[0], fused_s)
    torch.testing.assert_close(with_gradient[1], fused_l)


def test_fusion_does_not_depend_on_the_order_of_the_other_branchs_patches():
    fusion = small().encoders[0].fusion
    s, l = torch.randn(2, 26, 8), torch.randn(2, 17, 12)
    shuffled = torch.cat([l[:, :1], l[:, 1:][:, torch.randperm(16)]], dim=1)
    first, _ = fusion([s, l], [(5, 5), (4, 4)])
    second, _ = fusion([s, shuffled], [(5, 5), (4, 4)])
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_cross_attentions_in_a_row():
    """Only the first reads the other branch, unless ``reread``."""
    s, l = torch.randn(2, 26, 8), torch.randn(2, 17, 12)
    for reread in (False, True):
        model = small(depths=((1, 1, 2),), reread=reread)
        fusion = model.encoders[0].fusion
        token = fusion.outward[1](l[:, :1])
        token = literal_cross(fusion.attentions[1][0], token, s[:, 1:])
        others = s[:, 1:] if reread else s[:, :0]
        token = literal_cross(fusion.attentions[1][1], token, others)
        _, fused = fusion([s, l], [(5, 5), (4, 4)])
        torch.testing.assert_close(fused[:, :1], fusion.back[1](token), rtol=1e-4, atol=1e-5)


def test_all_attention_is_equation_2():
    fusion = lively(AllFusion(dims=(8, 12), heads=3, qkv_bias=True, eps=1e-6))
    s, l = torch.randn(2, 26, 8), torch.randn(2, 17, 12)
    y = torch.cat([fusion.outward[0](s), l], dim=1)
    o = y + fusion.attention(fusion.norm(y)).x
    fused = fusion([s, l], [(5, 5), (4, 4)])
    torch.testing.assert_close(fused[0], fusion.back[0](o[:, :26]))
    torch.testing.assert_close(fused[1], o[:, 26:])


@pytest.mark.parametrize("pairwise", [False, True])
def test_class_token_and_pairwise_fusion_are_equations_3_and_4(pairwise):
    fusion = lively(ClassFusion(dims=(8, 12), eps=1e-6, pairwise=pairwise))
    s, l = torch.randn(2, 26, 8), torch.randn(2, 17, 12)
    lifted = fusion.outward[0](s)
    token = lifted[:, :1] + l[:, :1]
    fused_s, fused_l = fusion([s, l], [(5, 5), (4, 4)])
    torch.testing.assert_close(fused_s[:, :1], fusion.back[0](token))
    torch.testing.assert_close(fused_l[:, :1], token)
    if not pairwise:
        assert torch.equal(fused_s[:, 1:], s[:, 1:])
        assert torch.equal(fused_l[:, 1:], l[:, 1:])
        return
    # one cell of the 4×4 grid by hand: its centre lies at 1.5·5/4 − 0.5 = 1.375 cells of the 5×5
    grid = lifted[:, 1:].unflatten(1, (5, 5))
    rows = 0.625 * grid[:, 1] + 0.375 * grid[:, 2]
    cell = 0.625 * rows[:, 1] + 0.375 * rows[:, 2]
    torch.testing.assert_close(fused_l[:, 1 + 4 + 1], l[:, 1 + 4 + 1] + cell, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", crossvit.FUSIONS)
def test_every_fusion_trains(fusion):
    model = create(f"crossvit-nano(fusion={fusion})", classes=3, resolution=32, seed=0).train()
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name


def test_the_answer_is_the_mean_over_branches():
    model = small()
    image = torch.randn(2, 3, 32, 32)
    pooled = model.pooled(image)
    each = model.head.each(pooled)
    assert each.shape == (2, 2, 5)
    torch.testing.assert_close(each[0], model.head.classifiers[0](pooled[:, :8]))
    torch.testing.assert_close(each[1], model.head.classifiers[1](pooled[:, 8:]))
    torch.testing.assert_close(model(image), each.mean(0))


# ---- sizes ---------------------------------------------------------------------------------------


def test_branches_resize_whatever_comes_to_their_own_squares():
    model = small()
    image = torch.randn(2, 3, 50, 37)
    seen: list[torch.Tensor] = []
    for stem in model.embeddings:
        stem.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    assert model(image).shape == (2, 5)
    for got, size in zip(seen, (30, 32), strict=True):
        wanted = F.interpolate(image, (size, size), mode="bicubic", align_corners=False)
        assert torch.equal(got, wanted)


def test_following_the_image_is_the_same_at_the_native_size():
    """Maps, and everything with ``sizing="follow"``, come from the very tokens of ``forward``."""
    native, follow = small(), small(sizing="follow")
    follow.load_state_dict(native.state_dict())
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(follow(image), native(image), rtol=0, atol=0)
    branches, grids = native._branches(image, "native")
    maps = native.features(image)
    assert [m.map.shape[-2:] for m in maps] == grids == [(5, 5), (4, 4)]
    for norm, x, m in zip(native.norms, branches, maps):
        torch.testing.assert_close(norm(x[:, 1:]), m.map.flatten(2).transpose(1, 2))
    wide = torch.randn(1, 3, 32, 64)
    assert follow.followed(1, 32, 64) == (4, 8)
    assert not torch.allclose(follow(wide), native(wide))


@pytest.mark.parametrize("name", ["crossvit-tiny-224", "crossvit-15-dagger-384", "crossvit-nano"])
def test_maps_of_the_native_size_have_the_native_grids(name):
    with torch.device("meta"):
        model = build(name, drop_path=0.0)
    native = model.sizes[-1]
    for i, (grid, stride) in enumerate(zip(model.grids, model.strides)):
        assert model.followed(i, native, native) == grid
        for side in range(1, 4 * native, 13):
            cells, _ = model.followed(i, side, side)
            assert cells in (side // stride, -(-side // stride)) or (side < stride and cells == 1)


def test_the_resolution_sets_both_branches():
    small_variant = crossvit.VARIANTS["crossvit-15-dagger-224"]
    assert crossvit.sizes_for(small_variant, None) == (240, 224)
    assert crossvit.sizes_for(small_variant, 224) == (240, 224)
    assert crossvit.sizes_for(small_variant, 384) == (408, 384)  # the authors' fine-tuned networks
    model = create("crossvit-nano", classes=3, resolution=64)
    assert model.sizes == (66, 64)
    with pytest.raises(PolypatchError, match="positive"):
        create("crossvit-nano", resolution=0)


@pytest.mark.parametrize("kind", ["linear", "conv", "t2t", "t2t-performer"])
@pytest.mark.parametrize("patch", [12, 16])
def test_embeddings_give_one_token_for_a_patch(kind, patch):
    stem = lively(embedding(kind, dim=16, patch=patch, channels=4))
    assert stem(torch.randn(2, 4, 3 * patch, 5 * patch)).shape == (2, 3, 5, 16)
    if kind == "linear":
        image = torch.randn(1, 4, patch, 2 * patch)
        value = (image[..., patch:] * stem.proj.weight[3]).sum() + stem.proj.bias[3]
        torch.testing.assert_close(stem(image)[0, 0, 1, 3], value, rtol=1e-4, atol=1e-5)


def test_the_performer_approaches_softmax_attention():
    """E[φ(q)·φ(k)] = exp(q·k): with many random features the two attentions agree."""
    stem = embedding("t2t-performer", dim=16, patch=16, channels=3)
    attention = stem.attention1
    attention.features = nn.Parameter(torch.randn(20000, 64), requires_grad=False)
    k, q, v = (0.1 * torch.randn(1, 9, 64) for _ in range(3))
    fk, fq = attention.positive(k), attention.positive(q)
    mixed = fq @ (fk.transpose(1, 2) @ v) / (fq @ fk.sum(1)[..., None])
    wanted = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    assert (mixed - wanted).abs().max() < 0.1 * wanted.abs().max()


# ---- training-time parts -------------------------------------------------------------------------


def test_the_schedule_of_drop_path():
    """Rising over all layers; both branches share it; the fusion has the last block's rate."""
    assert drop_rates(((1, 4, 0),) * 3, 0.11)[1] == pytest.approx([0.04, 0.05, 0.06, 0.07])
    assert drop_rates(((1, 2, 1), (2, 1, 0)), 0.4) == [
        pytest.approx([0.0, 0.1, 0.2]),
        pytest.approx([0.3, 0.4]),
    ]
    model = build("crossvit-tiny-224", classes=2, drop_path=0.11)
    encoder = model.encoders[1]
    rates = [[block.drop_path.rate for block in branch] for branch in encoder.blocks]
    assert rates == [pytest.approx([0.04]), pytest.approx([0.04, 0.05, 0.06, 0.07])]
    assert [row[0].drop_path.rate for row in encoder.fusion.attentions] == pytest.approx([0.07] * 2)
    default = build("crossvit-nano", classes=2)
    assert max(m.rate for m in default.modules() if isinstance(m, DropPath)) == pytest.approx(0.1)


@pytest.mark.parametrize("option", ["dropout", "attention_dropout", "drop_path"])
def test_regularisation_acts_in_training_only(option):
    model = create(f"crossvit-nano({option}=0.5)", classes=3, resolution=32, seed=0)
    image = torch.randn(8, 3, 32, 32)
    for value in model.parameters():
        value.data.mul_(3)
    model.eval()
    assert torch.equal(model(image), model(image))
    model.train()
    assert not torch.allclose(model(image), model(image))
    with torch.no_grad():  # as batch statistics are gathered
        assert not torch.allclose(model(image), model(image))


# ---- options and the authors' layout -------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(sizes=(31, 32)), "no multiple of patches of 6"),
        (dict(dims=(8, 12, 16)), "one entry for each branch"),
        (dict(depths=((0, 1, 0),)), "at least 1"),
        (dict(depths=((1, 1),)), "depths are 2 numbers"),
        (dict(heads=(2, 5)), "into 5 heads"),
        (dict(fusion="crosss"), "did you mean cross"),
        (dict(sizing="nativ"), "did you mean native"),
        (dict(embedding="linea"), "did you mean linear"),
        (dict(embedding="conv"), "12 or 16 pixels, not 6"),
    ],
)
def test_bad_options(changes, said):
    with pytest.raises(PolypatchError, match=said):
        small(**changes)


#: parameters of table 6 in millions, of networks made of CrossViT-S
@pytest.mark.parametrize(
    ("fusion", "millions"), [("none", 23.7), ("class", 24.2), ("pairwise", 24.2)]
)
def test_parameters_of_the_other_fusions(fusion, millions):
    with torch.device("meta"):
        model = build("crossvit-small-224", fusion=fusion)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


#: of the authors' code; table 2 leaves the position tables out in some rows
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tiny-224", 7014800),
        ("small-224", 26856272),
        ("base-224", 105025232),
        ("9-224", 8553296),
        ("15-224", 27528464),
        ("18-224", 43271408),
        ("9-dagger-224", 8776592),
        ("15-dagger-224", 28209008),
        ("18-dagger-224", 44266976),
        ("15-dagger-384", 28500080),
        ("18-dagger-384", 44606560),
    ],
)
def test_parameters_of_the_named_networks(name, count):
    with torch.device("meta"):
        model = build(f"crossvit-{name}")
    assert sum(p.numel() for p in model.parameters()) == count


CONFIGS = {
    "plain": {},
    "no bias, no head": dict(qkv_bias=False, num_classes=0),
    "convolutions": dict(multi_conv=True, img_size=[48, 48]),
    "t2t": dict(hybrid_backbone="t2t"),
    "performer": dict(hybrid_backbone="performer"),
    "rows of fusions": dict(depth=[[1, 2, 1], [2, 2, 3]]),
    "other patches": dict(patch_size=[4, 8], img_size=[24, 32], mlp_ratio=[1.5, 2.5, 1]),
    "other channels": dict(in_chans=5),
    "published widths": dict(embed_dim=[96, 192], num_heads=[3, 3], depth=[[1, 4, 0]]),
    "three branches": dict(
        patch_size=[4, 8, 16], img_size=[32, 32, 32], embed_dim=[32, 64, 96], num_heads=[1, 1, 1],
        mlp_ratio=[1, 2, 3, 1], depth=[[1, 2, 1, 0]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_weights_are_recognised_and_rebuilt(changes):
    config = {
        "img_size": [60, 64], "patch_size": [12, 16], "num_classes": 5, "embed_dim": [32, 64],
        "depth": [[1, 2, 0], [1, 1, 0]], "num_heads": [1, 1], "mlp_ratio": [2, 3, 1],
        "qkv_bias": True, "norm_layer": "LayerNorm(eps=1e-6)", **changes,
    }  # fmt: skip
    model = lively(network(config))
    state = crossvit.to_official(model)
    found = recognise({name: tuple(value.shape) for name, value in state.items()})
    assert found is not None
    written = crossvit.official_config(model)
    assert {word: written[word] for word in found} == found
    image = torch.randn(1, config.get("in_chans", 3), 70, 64)
    for used in (found, written):
        again = crossvit.from_official(used, state)
        torch.testing.assert_close(again(image), model(image), rtol=0, atol=0)
    # timm's copies of the weights have another name for the tables
    renamed = {
        name.replace("pos_embed.", "pos_embed_").replace("cls_token.", "cls_token_"): value
        for name, value in state.items()
    }
    assert recognise({name: tuple(value.shape) for name, value in renamed.items()}) == found
    again = crossvit.from_official(found, renamed)
    torch.testing.assert_close(again(image), model(image), rtol=0, atol=0)


def test_files_without_a_head_load():
    model = small()
    state = {n: v for n, v in crossvit.to_official(model).items() if not n.startswith("head.")}
    found = recognise({name: tuple(value.shape) for name, value in state.items()})
    assert found is not None
    assert found["num_classes"] == 0
    again = crossvit.from_official({**found, **{"num_heads": [2, 3]}}, state)
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again(image), model.pooled(image))


def test_a_released_file_loads_by_its_variant(tmp_path):
    model = lively(build("crossvit-nano", classes=4))
    torch.save(crossvit.to_official(model), tmp_path / "crossvit.pth")
    loaded = load(tmp_path / "crossvit.pth", config={"patch_size": [3, 4], "img_size": [33, 32]})
    assert (loaded.paper, loaded.variant) == ("crossvit", "crossvit-nano")
    assert loaded.preprocessing.resolution == 33
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded.model(image), model(image))


def test_other_networks_are_not_recognised():
    state = crossvit.to_official(small())
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert recognise({n: s for n, s in shapes.items() if "revert_projs" not in n}) is None
    assert recognise({n: s for n, s in shapes.items() if "patch_embed" not in n}) is None
    assert recognise({"pos_embed": (1, 197, 192), "cls_token": (1, 1, 192)}) is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hybrid_backbone": "resnet"}, "hybrid_backbone"),
        ({"norm_layer": "BatchNorm"}, "norm_layer"),
    ],
)
def test_settings_that_do_not_exist_are_named(config, said):
    with pytest.raises(PolypatchError, match=said):
        network(config)


def test_the_authors_layout_has_one_fusion():
    with pytest.raises(PolypatchError, match="fusion=all"):
        crossvit.to_official(small(fusion="all"))
    model = small(fusion="pairwise")
    again = network(crossvit.official_config(model))
    again.load_state_dict(model.state_dict())


def test_the_authors_defaults():
    """Of their class: patches of 8 and 16, no bias, torch's norms."""
    with torch.device("meta"):
        model = network({})
    assert (model.sizes, model.patches, model.eps) == ((224, 224), (8, 16), 1e-5)
    assert not model.qkv_bias
    assert model.depths == ((1, 3, 1),) * 3
