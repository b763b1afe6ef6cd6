"""Parallel blocks, attention-only fine-tuning, hMLP stem: on networks of the paper and on hosts."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import polypatch
from polypatch import PolypatchError, create
from polypatch.backbones import three_things as things
from polypatch.backbones.three_things import ParallelViT, build, network, recognise, train_only
from polypatch.backbones.three_things_parts import Branches, HMlpStem, ParallelBlock
from polypatch.hosts import build_vit
from polypatch.hosts.vit import assemble_vit
from polypatch.nn import DropPath
from polypatch.pretraining.mae import MaskedAutoencoder
from polypatch.tokens import Tokens
from polypatch.training.cost import count_flops
from polypatch.training.recipe import parameter_groups


def lively(module: nn.Module) -> nn.Module:
    """Every parameter and statistic far from its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in module.parameters():
            fan = value[0].numel() if value.ndim > 1 else 25
            value.copy_(torch.randn(value.shape, generator=generator) / fan**0.5)
            if value.ndim == 1:
                value.add_(0.3)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(0, 0.2, generator=generator)
                norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def small(**changes) -> ParallelViT:
    settings = dict(dim=16, depth=2, heads=2, patch=8, resolution=32, classes=5)
    return lively(ParallelViT(**{**settings, **changes}))  # type: ignore[return-value]


# ---- parallel blocks -----------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_blocks_are_equation_2(branches, layer_scale):
    block = small(branches=branches, layer_scale=layer_scale).blocks[0]
    assert isinstance(block, Branches)
    x = torch.randn(2, 7, 16)

    def gain(scale, update):
        return update * scale.gamma if layer_scale else update

    middle = x
    for b in block.branches:
        middle = middle + gain(b.scale1, b.mixing(b.norm1(x)).x)
    wanted = middle
    for b in block.branches:
        wanted = wanted + gain(b.scale2, b.mlp(b.norm2(middle)))
    kept = x.clone()
    torch.testing.assert_close(block(x), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(block(x), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(block(x, True), wanted[:, :1], rtol=1e-4, atol=1e-5)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(("stem", "parallel"), [("hmlp", 2), ("hmlp-layer", 1), ("linear", 4)])
def test_the_network_is_a_host_with_the_technique(stem, parallel):
    """The complete network and a plain ViT with the same weights and the technique plugged in."""
    model = small(depth=4 // parallel, branches=parallel, layer_scale=0.1, stem=stem)
    host = assemble_vit(
        dim=16, depth=4, heads=2, hidden=64, patch=8, grid=(4, 4), classes=5, prefix=1,
        layer_scale=0.1,
    )  # fmt: skip
    things.plug(host, parallel=parallel, stem=stem)
    state = model.state_dict()
    renamed = {"position.table": state.pop("position").unflatten(1, (4, 4)),
               "prefix.tokens": state.pop("class_token")}  # fmt: skip
    for name, value in state.items():
        name = name.replace("stem.", "patching.proj." if stem == "linear" else "patching.stem.")
        if parallel == 1:
            name = name.replace("branches.0.", "")
        renamed[name] = value
    host.load_state_dict(renamed)
    host.eval()
    for size in ((32, 32), (40, 53)):
        image = torch.randn(2, 3, *size)
        torch.testing.assert_close(host(image), model(image), rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(model.features(image), host.features(image)):
            assert ours.stride == theirs.stride
    with torch.no_grad():
        torch.testing.assert_close(host(image), model(image), rtol=1e-4, atol=1e-5)


def test_flattening_is_exact_to_second_order():
    """r'(x + r(x)) ≈ r'(x): with residuals of size ε, sequential and parallel differ by ε²."""
    image = torch.randn(2, 3, 32, 32)

    def difference(gain: float) -> float:
        outputs = []
        for parallel in (1, 2):
            host = build_vit("nano", classes=5, layer_scale=1.0)
            lively(host)
            for name, value in host.named_parameters():
                if name.endswith("gamma"):
                    value.data.fill_(gain)
            things.plug(host, parallel=parallel, stem="linear")
            outputs.append(host.double()(image.double()))
        return (outputs[0] - outputs[1]).abs().max().item()

    coarse, fine = difference(2e-3), difference(1e-3)
    assert coarse / fine == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize("size", ["nano", "tiny"])
def test_parallel_blocks_keep_weights_parameters_and_operations(size):
    plain = build_vit(size, classes=5)
    flat = build_vit(size, classes=5)
    weights = [block.mlp.fc1.weight for block in flat.blocks]
    things.plug(flat, parallel=2, stem="linear")
    assert count(flat) == count(plain)
    assert len(flat.blocks) == len(plain.blocks) // 2
    kept = [branch.mlp.fc1.weight for block in flat.blocks for branch in block.branches]
    assert all(a is b for a, b in zip(kept, weights, strict=True))
    if size == "nano":
        image = torch.randn(1, 3, 32, 32)
        assert count_flops(flat, image) == count_flops(plain, image)


def test_each_branch_has_a_drop_path_of_its_own():
    """In training every sample keeps or loses each branch by itself; kept ones count double."""
    block = small(drop_path=0.5, branches=2).blocks[0].train()
    marks = torch.zeros(2, 16)
    for number, branch in enumerate(block.branches):
        nn.init.zeros_(branch.mixing.proj.weight)
        nn.init.zeros_(branch.mixing.proj.bias)
        branch.mixing.proj.bias.data[number] = 1.0
        marks[number, number] = 2.0
        nn.init.zeros_(branch.mlp.fc2.weight)
        nn.init.zeros_(branch.mlp.fc2.bias)
    out = block(torch.zeros(64, 1, 16))[:, 0]
    seen = {tuple(row[:2].tolist()) for row in out}
    assert seen == {(0.0, 0.0), (2.0, 0.0), (0.0, 2.0), (2.0, 2.0)}


def test_drop_path_has_one_rate():
    for name, rate in (("small-18x2", 0.05), ("base-18x2-ls", 0.1)):
        with torch.device("meta"):
            model = build(f"three-things-{name}", classes=2)
        assert {m.rate for m in model.modules() if isinstance(m, DropPath)} == {rate}


def test_reducers_act_on_the_sum_with_all_keys():
    host = create("vit-nano+three-things(parallel=2)+tome(r=4)", classes=5, seed=0).eval()
    tokens = host.forward_features(torch.randn(2, 3, 32, 32))
    assert tokens.x.shape[1] == 1 + 64 - 2 * 4
    block = host.blocks[0]
    assert isinstance(block, ParallelBlock)
    start = host.tokens(torch.randn(2, 3, 32, 32))
    keys = block.mix(start, host.context(start)).keys
    assert keys.shape == (2, 2 * 4, 65, 16)
    alone = [b.mix(start, host.context(start)).keys for b in block.branches]
    assert torch.equal(keys, torch.cat(alone, dim=1))


# ---- the hMLP stem -------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("patch", [4, 8, 16])
def test_the_stem_looks_at_nothing_but_the_patch(norm, patch):
    """So it commutes with masking: hidden patches, whatever is in them, change no other token; and
    the stem of a patch cut out is the patch's token."""
    stem = lively(HMlpStem(dim=16, patch=patch, norm=norm))
    image = torch.randn(2, 3, 3 * patch, 4 * patch)
    tokens = stem(image)
    assert tokens.shape == (2, 3, 4, 16)
    hidden = torch.rand(2, 3, 4) < 0.5
    pixels = hidden.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    for filling in (torch.zeros(()), 100 * torch.randn(image.shape)):
        masked = stem(torch.where(pixels, filling, image))
        torch.testing.assert_close(masked[~hidden], tokens[~hidden], rtol=1e-5, atol=1e-5)
    cut = image.unfold(2, patch, patch).unfold(3, patch, patch)  # 2, 3, 3, 4, patch, patch
    alone = stem(cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
    torch.testing.assert_close(alone.view_as(tokens), tokens, rtol=1e-4, atol=1e-5)


def test_a_convolutional_stem_does_not_commute():
    stem = nn.Conv2d(3, 16, 7, stride=4, padding=3)
    image = torch.randn(1, 3, 32, 32)
    other = image.clone()
    other[..., :8] = 0
    assert not torch.allclose(stem(image)[..., 2], stem(other)[..., 2])


def test_the_stem_is_three_linear_maps():
    stem = lively(HMlpStem(dim=8, patch=8))
    image = torch.randn(1, 3, 8, 8)

    def normed(x, norm):
        return (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias

    def merged(cells, conv):
        """cells (rows, columns, dim) → (rows/2, columns/2, out), each 2×2 by one matrix."""
        rows = [
            torch.stack([
                conv.weight.flatten(1)
                @ cells[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].permute(2, 0, 1).flatten()
                + conv.bias
                for j in range(cells.shape[1] // 2)
            ])
            for i in range(cells.shape[0] // 2)
        ]  # fmt: skip
        return torch.stack(rows)

    x = image[0].permute(1, 2, 0)
    for number in range(3):
        x = normed(merged(x, stem.convs[number]), stem.norms[number])
        x = nn.functional.gelu(x) if number < 2 else x
    torch.testing.assert_close(stem(image)[0], x, rtol=1e-4, atol=1e-5)


def test_batch_norm_of_the_stem_sees_all_patches_in_training():
    for norm, same in (("batch", False), ("layer", True)):
        stem = HMlpStem(dim=16, patch=8, norm=norm).train()
        stem.init_weights()
        image = torch.randn(2, 3, 16, 16)
        other = image.clone()
        other[..., 8:] = 0
        assert torch.allclose(stem(image)[:, :, 0], stem(other)[:, :, 0], atol=1e-5) == same


def test_the_stem_costs_less_than_a_hundredth():
    """Sec. 5: 17.73 instead of 17.58 G multiplications for a ViT-B."""
    image = torch.randn(1, 3, 224, 224)
    stem, linear = HMlpStem(dim=768, patch=16), nn.Conv2d(3, 768, 16, 16)
    more = (count_flops(stem, image) - count_flops(linear, image)) / 2
    assert more / 1e9 == pytest.approx(17.73 - 17.58, abs=0.01)


def test_masked_autoencoding_on_the_stem():
    host = create("vit-nano+three-things", classes=0, resolution=32, seed=0)
    model = MaskedAutoencoder(encoder=host, width=32, depth=1, heads=2)
    model(torch.randn(4, 3, 32, 32)).loss.backward()
    for name, value in host.patching.named_parameters():
        assert value.grad is not None, name


def test_odd_images_are_padded_and_small_ones_refused():
    host = create("vit-nano+three-things", classes=5, seed=0).eval()
    tokens = host.patching(torch.randn(2, 3, 30, 41))
    assert isinstance(tokens.check(), Tokens)
    assert (tokens.grid, tokens.canvas) == ((8, 11), (30, 41))
    plain = build_vit("nano", classes=5).patching(torch.randn(2, 3, 30, 41))
    torch.testing.assert_close(tokens.centre, plain.centre)
    with pytest.raises(PolypatchError, match="at least 4"):
        host(torch.randn(1, 3, 3, 8))


def test_initialisation_fills_the_stem_again():
    host = create("vit-nano+three-things", classes=5, seed=0)
    stem = host.patching.stem
    stem.norms[0].running_mean.fill_(3.0)
    stem.norms[0].weight.data.fill_(3.0)
    host.init_weights()
    assert (stem.norms[0].running_mean == 0).all()
    assert (stem.norms[0].weight == 1).all()
    assert stem.convs[2].weight.abs().max() <= 64**-0.5  # torch's default: 1/√(fan in)


# ---- fine-tuning ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "three-things-nano",
        "vit-nano+three-things",
        "vit-nano(position=rope)+three-things(parallel=1,stem=linear)",
    ],
)
@pytest.mark.parametrize(("part", "inside"), [("attention", "mixing"), ("ffn", "mlp")])
def test_a_step_of_fine_tuning_changes_what_it_should(spec, part, inside):
    model = train_only(create(spec, classes=5, seed=0), part).train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    for value in model.parameters():  # LayerScale of 1e-4 would hide the gradients
        if value.ndim == 1:
            value.data.add_(0.1)
            before = {name: v.clone() for name, v in model.named_parameters()}
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    changed = {n for n, v in model.named_parameters() if not torch.equal(v, before[n])}
    wanted = {
        n
        for n in before
        if n.startswith(("head.", "position", "prefix.position")) or f".{inside}." in n
    }
    assert changed == wanted


def test_the_attention_is_a_third_of_the_weights():
    with torch.device("meta"):
        model = train_only(build("three-things-base-12-hmlp"), "attention")
    inside = sum(p.numel() for n, p in model.named_parameters() if ".mixing." in n)
    assert inside / count(model) == pytest.approx(1 / 3, abs=0.02)
    train_only(model, "full")
    assert all(p.requires_grad for p in model.parameters())


def test_the_authors_freeze_the_second_branch():
    model = small(branches=2)
    train_only(model, first_branch=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "blocks.0.branches.0.mixing.qkv.weight" in trained
    assert "blocks.0.branches.1.mixing.qkv.weight" not in trained
    train_only(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "blocks.0.branches.1.mixing.qkv.weight" in trained


# ---- plugging ------------------------------------------------------------------------------------


def test_the_option_of_the_technique_freezes():
    spec = "vit-nano+three-things(parallel=1,stem=linear,finetune=attention)"
    host = create(spec, classes=5, seed=0)
    assert not host.blocks[0].mlp.fc1.weight.requires_grad
    assert host.blocks[0].mixing.qkv.weight.requires_grad
    assert host.plugs == ("three-things",)
    plain = create("vit-nano", classes=5, seed=0)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(host(image), plain(image))


@pytest.mark.parametrize(
    "spec",
    [
        "vit-nano+three-things",
        "vit-nano+dart+three-things(stem=linear)",
        "vit-nano+three-things(parallel=4,stem=hmlp-layer)",
        "vit-nano+spt-lsa(spt=false)+three-things(stem=linear)",
        "vit-nano+quadtree+three-things(stem=linear)",
        "vit-nano(position=rope,pooling=mean,gated=true)+three-things",
    ],
)
def test_gradients_reach_every_parameter(spec):
    host = create(spec, classes=5, resolution=32, seed=0).train()
    host(torch.rand(4, 3, 32, 32)).square().sum().backward()
    for name, value in host.named_parameters():
        assert value.grad is not None, name


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("vit-nano+three-things(parallel=3)", "does not divide the host's 4 blocks"),
        ("vit-nano+three-things(stem=hmpl)", "did you mean hmlp"),
        ("vit-nano+three-things(finetune=attn)", "finetune"),
        ("vit-nano+dart+three-things", "stem=linear to keep it"),
        ("vit-nano(patch=6)+three-things", "that 4 divides, got 6"),
        ("vit-nano+tome+three-things", "in front of techniques that reduce"),
        ("vit-nano+three-things+three-things(stem=linear)", "parallel already"),
        ("vit-nano+three-things+spt-lsa(spt=false)", "in front of three-things"),
        ("vit-nano+three-things+dual-patchnorm", "HMlpPatching"),
        ("three-things-nano(branches=4)", "does not divide 6 blocks"),
        ("three-things-nano(stem=conv)", "stem"),
        ("three-things-nano(resolution=2)", "do not fit"),
        ("three-things-nano+three-things", "complete network"),
    ],
)
def test_bad_options(spec, said):
    with pytest.raises(PolypatchError, match=said):
        create(spec, classes=5)


def test_bfloat16_and_batch_of_one():
    host = create("vit-nano+three-things", classes=5, seed=0).eval()
    image = torch.rand(1, 3, 30, 35)
    wanted = host(image)
    assert (host.bfloat16()(image.bfloat16()).float() - wanted).abs().max() < 0.2


# ---- the complete networks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "linear", "hmlp"),
    [
        ("small-36-ls", 64665064, 64560424),
        ("small-36", 64637416, 64532776),
        ("small-18x2-ls", 64665064, 64560424),
        ("small-18x2", 64637416, 64532776),
        ("base-18x2-ls", 256731112, 256890472),
        ("base-18x2", 256675816, 256835176),
        ("base-36x1-ls", 256731112, 256890472),
        ("base-36x1", 256675816, 256835176),
    ],
)
def test_parameters_of_the_named_networks(name, linear, hmlp):
    with torch.device("meta"):
        assert count(build(f"three-things-{name}")) == linear
        assert count(build(f"three-things-{name}", stem="hmlp")) == hmlp


def test_branches_of_a_named_network():
    """Fig. 1: 36 blocks as 36×1, 18×2, 12×3 or 9×4, of the same complexity."""
    with torch.device("meta"):
        models = [build("three-things-small-36", branches=n) for n in (1, 2, 3, 4)]
    assert [model.depth for model in models] == [36, 18, 12, 9]
    assert len({count(model) for model in models}) == 1


def test_positions_are_interpolated_from_their_own_grid():
    model = small(resolution=(32, 16))
    assert model.grid == (4, 2)
    table = torch.arange(4.0)[:, None, None].expand(4, 2, 16)
    model.position.data = table.reshape(1, 8, 16).clone()
    nn.init.zeros_(model.stem.weight)
    nn.init.zeros_(model.stem.bias)
    x, grid = model.tokens(torch.randn(1, 3, 64, 32))
    assert grid == (8, 4)
    places = x[0, 1:].unflatten(0, grid)[:, :, 0]
    torch.testing.assert_close(places, places[:, :1].expand(8, 4))  # nothing varies along a row
    assert (places[1:, 0] > places[:-1, 0]).all()
    x, _ = model.tokens(torch.randn(1, 3, 32, 16))
    torch.testing.assert_close(x[:, 1:], model.position)
    torch.testing.assert_close(x[:, :1], model.class_token)  # which has no position


@pytest.mark.parametrize("option", ["dropout", "attention_dropout", "drop_path"])
def test_regularisation_acts_in_training_only(option):
    model = create(f"three-things-nano({option}=0.5)", classes=3, seed=0)
    lively(model)
    image = torch.randn(8, 3, 32, 32)
    assert torch.equal(model(image), model(image))
    for norm in model.stem.norms:
        norm.momentum = 0.0
    model.train()
    assert not torch.allclose(model(image), model(image))


CONFIGS = {
    "parallel": dict(block_layers="Block_paralx2"),
    "parallel, LayerScale": dict(block_layers="Layer_scale_init_Block_paralx2", num_classes=0),
    "parallel, stem": dict(block_layers="Block_paralx2", Patch_layer="hMLP_stem"),
    "stem": dict(Patch_layer="hMLP_stem", qkv_bias=False),
    "stem of layer norms": dict(Patch_layer="hMLP_stem", stem_norm="layer", in_chans=5),
    "other sizes": dict(
        block_layers="Block_paralx2", patch_size=4, img_size=12, mlp_ratio=1.5, depth=3
    ),
    "a ratio that isn't exact": dict(
        block_layers="Block_paralx2", embed_dim=28, num_heads=7, mlp_ratio=61.0001 / 28
    ),
    "published sizes": dict(embed_dim=384, depth=36, num_heads=6, mlp_ratio=1),
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_weights_are_recognised_and_rebuilt(changes):
    config = {
        "img_size": 48, "patch_size": 16, "num_classes": 5, "embed_dim": 64, "depth": 2,
        "num_heads": 4, "mlp_ratio": 2, "qkv_bias": True, "norm_layer": "LayerNorm(eps=1e-6)",
        "block_layers": "Block", "Patch_layer": "PatchEmbed", **changes,
    }  # fmt: skip
    model = lively(network(config))
    state = things.to_official(model)
    found = recognise({name: tuple(value.shape) for name, value in state.items()})
    assert found is not None
    written = things.official_config(model)
    assumed = {"num_heads"} if config["embed_dim"] == 28 else set()
    told = found.keys() - {"mlp_ratio"} - assumed
    assert {word: written[word] for word in told} == {word: found[word] for word in told}
    assert found["mlp_ratio"] == pytest.approx(written["mlp_ratio"], rel=1e-3)
    found["num_heads"] = config["num_heads"]
    image = torch.randn(1, config.get("in_chans", 3), 48, 40)
    for used in (found, written):
        again = things.from_official(used, state)
        torch.testing.assert_close(again(image), model(image), rtol=0, atol=0)


def test_plain_vits_are_left_to_the_host():
    """Sequential blocks without a stem are another paper's, unless of a published size."""
    model = lively(network({"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}))
    state = things.to_official(model)
    assert recognise({name: tuple(value.shape) for name, value in state.items()}) is None
    assert recognise({"pos_embed": (1, 197, 192), "cls_token": (1, 1, 192)}) is None
    parallel = things.to_official(small(branches=2))
    shapes = {name: tuple(value.shape) for name, value in parallel.items()}
    assert recognise(shapes) is not None
    assert recognise({**shapes, "dist_token": (1, 1, 16)}) is None


def test_files_load_whole(tmp_path):
    model = small(branches=2, layer_scale=0.1, stem="hmlp")
    torch.save({"model": things.to_official(model)}, tmp_path / "weights.pth")
    loaded = polypatch.load(tmp_path / "weights.pth", config={"num_heads": 2})
    assert loaded.paper == "three-things"
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded.model(image), model(image))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"block_layers": "Block_paral_LS"}, "block_layers"),
        ({"Patch_layer": "ConvStem"}, "Patch_layer"),
        ({"act_layer": "ReLU"}, "act_layer"),
        ({"Attention_block": "TalkingHeads"}, "Attention_block"),
        ({"norm_layer": "BatchNorm"}, "norm_layer"),
        ({"patch_size": (16, 8)}, "square"),
        ({"num_heads": 5}, "into 5 heads"),
    ],
)
def test_settings_that_do_not_exist_are_named(config, said):
    with pytest.raises(PolypatchError, match=said):
        network(config)


def test_the_authors_layout_has_two_branches_at_most():
    model = small(branches=3)
    with pytest.raises(PolypatchError, match="branches"):
        things.to_official(model)
    with pytest.raises(PolypatchError, match="3 branches"):
        things.official_config(model)


# In a process of its own: here, signatures are checked at run time, which can't be compiled.
COMPILED = """
import torch
from polypatch import create

image = torch.rand(2, 3, 32, 32)
model = create("vit-nano+three-things", classes=5, seed=0).eval()
compiled = torch.compile(model, fullgraph=True)
torch.testing.assert_close(compiled(image), model(image), atol=1e-4, rtol=1e-4)
"""


@pytest.mark.slow
def test_a_host_compiles_whole():
    subprocess.run([sys.executable, "-c", COMPILED], check=True)
