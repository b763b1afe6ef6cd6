"""PVT v2: its equations, its traps, what it costs, its variants."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polypatch import create
from polypatch.backbones import pvtv2
from polypatch.backbones.pvtv2 import (
    Attention,
    ConvReduction,
    FeedForward,
    PoolReduction,
    PVTv2,
)
from polypatch.errors import PolypatchError
from polypatch.nn import pieces
from polypatch.training.cost import count_flops


def lived_in(module: nn.Module) -> nn.Module:
    """Weights and gains that hide nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in module.parameters():
            drawn = torch.randn(value.shape, generator=generator)
            value.copy_(0.5 * drawn if value.ndim == 1 else drawn / value[0].numel() ** 0.5)
    return module.eval()


# ---- equations -----------------------------------------------------------------------------------


def cells_of(x: torch.Tensor, module: nn.Module | None) -> list[torch.Tensor]:
    """The tokens that keys and values are made of, cell by cell; x is one map (h, w, dim)."""
    height, width, _ = x.shape
    if module is None:
        return list(x.flatten(0, 1))
    cells = []
    if isinstance(module, ConvReduction):
        r = module.conv.stride[0]
        for top in range(0, height - r + 1, r):
            for left in range(0, width - r + 1, r):
                cell = x[top : top + r, left : left + r]
                value = torch.einsum("yxc,ocyx->o", cell, module.conv.weight) + module.conv.bias
                cells.append(F.layer_norm(value, value.shape, module.norm.weight, module.norm.bias))
        return cells
    assert isinstance(module, PoolReduction)

    def bins(side: int) -> list[slice]:
        p = module.cells
        return [slice(k * side // p, math.ceil((k + 1) * side / p)) for k in range(p)]

    for rows in bins(height):
        for columns in bins(width):
            value = module.proj.weight @ x[rows, columns].mean((0, 1)) + module.proj.bias
            value = F.layer_norm(value, value.shape, module.norm.weight, module.norm.bias)
            cells.append(F.gelu(value))
    return cells


def literal_attention(module: Attention, x: torch.Tensor) -> torch.Tensor:
    """One sample, query by query and head by head."""
    tokens = torch.stack(cells_of(x, module.reduction))
    keys, values = F.linear(tokens, module.kv.weight, module.kv.bias).chunk(2, dim=-1)
    queries = F.linear(x, module.q.weight, module.q.bias)
    d = x.shape[-1] // module.heads
    mixed = torch.zeros_like(x)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:2])).tolist():
        for head in range(module.heads):
            part = slice(head * d, (head + 1) * d)
            logits = keys[:, part] @ queries[*place, part] / d**0.5
            mixed[*place, part] = logits.softmax(0) @ values[:, part]
    return F.linear(mixed, module.proj.weight, module.proj.bias)


@pytest.mark.parametrize("size", [(7, 9), (4, 4), (8, 15)], ids=str)
@pytest.mark.parametrize(
    "reduction",
    [
        lambda: None,
        lambda: ConvReduction(dim=6, ratio=2),
        lambda: ConvReduction(dim=6, ratio=3),  # doesn't divide
        lambda: PoolReduction(dim=6, cells=5),  # more cells than places, and bins that overlap
        lambda: PoolReduction(dim=6),
    ],
    ids=["all", "conv2", "conv3", "pool5", "pool7"],
)
def test_attention(size, reduction):
    module = lived_in(Attention(dim=6, heads=2, reduction=reduction()))
    x = torch.randn(2, *size, 6)
    wanted = torch.stack([literal_attention(module, sample) for sample in x])
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)


def test_rows_that_fill_no_cell_are_not_seen_by_others():
    module = lived_in(Attention(dim=6, heads=1, reduction=ConvReduction(dim=6, ratio=4)))
    x = torch.randn(1, 9, 11, 6)
    other = x.clone()
    other[:, 8:], other[:, :, 8:] = 3, -2
    assert torch.equal(module(x)[:, :8, :8], module(other)[:, :8, :8])


@pytest.mark.parametrize("rectified", [False, True])
def test_feed_forward(rectified):
    module = lived_in(FeedForward(dim=4, hidden=6, rectified=rectified))
    x = torch.randn(1, 5, 4, 4)
    inner = F.linear(x, module.fc1.weight, module.fc1.bias)[0]
    inner = inner.clamp(min=0) if rectified else inner
    padded = F.pad(inner, (0, 0, 1, 1, 1, 1))
    mixed = torch.zeros_like(inner)
    for dy in range(3):
        for dx in range(3):
            mixed += padded[dy : dy + 5, dx : dx + 4] * module.depthwise.weight[:, 0, dy, dx]
    mixed = F.gelu(mixed + module.depthwise.bias)
    wanted = F.linear(mixed, module.fc2.weight, module.fc2.bias)[None]
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("linear", [False, True])
def test_the_network_is_its_stages(linear):
    """Patches with a norm, blocks, a norm, whose output the next stage reads; with the ε that
    belong there."""
    model = lived_in(PVTv2(dims=(4, 6), heads=(1, 2), ratios=(2, 3), depths=(1, 2), classes=3,
                           reductions=(2, 1), linear=linear))  # fmt: skip
    image = 1e-2 * torch.randn(2, 3, 30, 45)  # small, so that ε counts
    x, maps = image, []
    for number, stage in enumerate(model.stages):
        kernel, stride = (7, 4) if number == 0 else (3, 2)
        x = F.conv2d(x, stage.patches.weight, stage.patches.bias, stride, kernel // 2)
        x = x.permute(0, 2, 3, 1)
        affine = (stage.patch_norm.weight, stage.patch_norm.bias)
        x = F.layer_norm(x, x.shape[-1:], *affine, eps=1e-5)
        for block in stage.blocks:
            affine = (block.norm1.weight, block.norm1.bias)
            x = x + block.attention(F.layer_norm(x, x.shape[-1:], *affine, eps=1e-6))
            affine = (block.norm2.weight, block.norm2.bias)
            x = x + block.ffn(F.layer_norm(x, x.shape[-1:], *affine, eps=1e-6))
        x = F.layer_norm(x, x.shape[-1:], stage.norm.weight, stage.norm.bias, eps=1e-6)
        x = x.permute(0, 3, 1, 2)
        maps.append(x)
    for ours, wanted in zip(model.features(image), maps):
        torch.testing.assert_close(ours.map, wanted, rtol=1e-4, atol=1e-5)
    wanted = F.linear(maps[-1].mean((2, 3)), model.head.weight, model.head.bias)
    torch.testing.assert_close(model(image), wanted, rtol=1e-4, atol=1e-5)


# ---- what it costs -------------------------------------------------------------------------------


def test_costs_of_equations_1_and_2():
    """The products with keys and values, and the reduction; the four projections of the queries,
    keys, values and outputs are the same everywhere."""
    dim, r = 8, 4

    def operations(reduction: nn.Module | None, side: int) -> int:
        module = Attention(dim=dim, heads=1, reduction=reduction)
        total = count_flops(module, torch.zeros(1, side, side, dim))
        tokens = {type(None): side**2, ConvReduction: (side // r) ** 2, PoolReduction: 49}
        return total // 2 - (2 * side**2 + 2 * tokens[type(reduction)]) * dim**2

    for side in (8, 16, 32):
        places = side**2
        assert operations(None, side) == 2 * places**2 * dim
        convolution = ConvReduction(dim=dim, ratio=r)
        assert operations(convolution, side) == 2 * places**2 * dim // r**2 + places * dim**2
        pool = PoolReduction(dim=dim)
        assert operations(pool, side) == 2 * places * 49 * dim + 49 * dim**2


def test_a_linear_network_costs_as_many_operations_as_it_has_pixels():
    def operations(name: str, side: int) -> int:
        return count_flops(create(name, seed=0).eval(), torch.zeros(1, 3, side, side))

    small, middle, large = (operations("pvtv2-nano-li", side) for side in (128, 256, 512))
    assert large - middle == 4 * (middle - small)
    small, middle, large = (operations("pvtv2-nano", side) for side in (128, 256, 512))
    assert large - middle > 4.2 * (middle - small)


def test_groups_of_samples_change_nothing(monkeypatch):
    model = lived_in(create("pvtv2-nano", classes=5))
    image = torch.randn(5, 3, 37, 41)
    with torch.no_grad():
        whole = model(image)
        sizes = []
        monkeypatch.setattr(pieces, "PIECE", 4 * 32 * 10 * 11 * 2)  # two samples in the first stage
        hook = model.stages[0].patches.register_forward_hook(lambda *a: sizes.append(len(a[1][0])))
        torch.testing.assert_close(model(image), whole, rtol=1e-5, atol=1e-6)
        monkeypatch.setattr(pieces, "PIECE", 1)
        torch.testing.assert_close(model(image), whole, rtol=1e-5, atol=1e-6)
        hook.remove()
    assert sizes == [2, 2, 1, 1, 1, 1, 1, 1]


# ---- variants and options ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"),
    # the authors' table of released weights, to its precision; the exact counts are checked
    # against the authors' code
    [("b0", 3.7), ("b1", 14.0), ("b2-li", 22.6), ("b2", 25.4), ("b3", 45.2), ("b4", 62.6),
     ("b5", 82.0)],
)  # fmt: skip
def test_published_sizes(name, millions):
    with torch.device("meta"):
        model = create(f"pvtv2-{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_drop_path_rises_from_nothing_to_the_recipes_rate():
    for name, rate in (("b1", 0.1), ("b3", 0.3), ("nano", 0.0)):
        with torch.device("meta"):
            model = create(f"pvtv2-{name}")
        rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
        steps = torch.linspace(0, rate, sum(model.depths))
        torch.testing.assert_close(torch.tensor(rates), steps)
    model = pvtv2.build("pvtv2-nano", classes=0, drop_path=pvtv2.DENSE_DROP_PATH)
    assert model.stages[-1].blocks[-1].drop_path.rate == 0.1
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 128)


def test_initialisation_is_the_papers():
    model = create("pvtv2-b0", seed=0)
    stage = model.stages[1]
    # depthwise: fan out is 9 for one group's single output
    assert stage.blocks[0].ffn.depthwise.weight.std().item() == pytest.approx(
        (2 / 9) ** 0.5, rel=0.03
    )
    wide = stage.patches.weight.std().item()
    assert wide == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert stage.blocks[0].attention.q.bias.abs().sum() == 0


def test_dropout_acts_where_the_authors_have_it():
    """In training only, and not on what goes past the branches: with everything dropped from both
    branches a block is the identity."""
    model = pvtv2.build("pvtv2-nano", classes=3, dropout=1 - 1e-7, attention_dropout=0.5)
    block, x = model.stages[0].blocks[0], torch.randn(1, 8, 8, 32)
    torch.testing.assert_close(block(x), x, rtol=0, atol=1e-5)
    assert not torch.allclose(block.eval()(x), x, atol=1e-3)
    model = pvtv2.build("pvtv2-nano", classes=3, attention_dropout=0.5)
    attention = model.stages[0].blocks[0].attention
    assert not torch.equal(attention(x), attention(x))
    assert torch.equal(attention.eval()(x), attention(x))


def test_options():
    model = create("pvtv2-nano(linear=true,rectified=false,channels=4,drop_path=0.2)", classes=2)
    assert isinstance(model.stages[3].blocks[0].attention.reduction, PoolReduction)
    assert not model.stages[0].blocks[0].ffn.rectified
    assert create("pvtv2-nano-li").stages[0].blocks[0].ffn.rectified
    assert model.eval()(torch.randn(1, 4, 9, 5)).shape == (1, 2)
    with pytest.raises(PolypatchError, match=r"the input is 28×40; PVT v2 takes .*at least 29"):
        create("pvtv2-nano")(torch.randn(1, 3, 28, 40))
    with pytest.raises(PolypatchError, match=r"one value of each.*depths 2"):
        PVTv2(dims=(8,), heads=(1,), ratios=(4,), depths=(1, 1), reductions=(1,))
    with pytest.raises(PolypatchError, match="10 does not divide into 4 heads"):
        PVTv2(dims=(10,), heads=(4,), ratios=(4,), depths=(1,), reductions=(1,))


@pytest.mark.parametrize("name", ["pvtv2-nano", "pvtv2-nano-li"])
@pytest.mark.parametrize("size", [(29, 29), (33, 64), (71, 30), (96, 160)], ids=str)
def test_sizes(name, size):
    model = lived_in(create(name, classes=5))
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).isfinite().all()
        for value, stride in model.features(torch.randn(1, 3, *size)):
            assert value.shape[2:] == tuple(-(-side // stride) for side in size)


# ---- authors' weights ----------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_configurations_come_back_from_the_weights(data):
    stages = data.draw(st.integers(1, 4))
    several = lambda values: [data.draw(values) for _ in range(stages)]  # noqa: E731
    heads = several(st.sampled_from([1, 2, 3]))
    linear = data.draw(st.booleans())
    config = {
        "embed_dims": [h * data.draw(st.integers(1, 5)) for h in heads],
        "num_heads": heads,
        "mlp_ratios": several(st.sampled_from([1, 2, 4, 1.3, 2.7, 10 / 3])),
        "depths": several(st.integers(1, 2)),
        "sr_ratios": several(st.sampled_from([1, 2, 3])),
        "num_stages": stages,
        "linear": linear,
        "qkv_bias": data.draw(st.booleans()),
        "in_chans": data.draw(st.integers(1, 4)),
        "num_classes": data.draw(st.sampled_from([0, 1, 5])),
        "norm_layer": data.draw(st.sampled_from(["LayerNorm(eps=1e-6)", "LayerNorm"])),
    }
    model = lived_in(pvtv2.network(config))
    state = pvtv2.to_official(model)
    found = pvtv2.recognise({k: tuple(v.shape) for k, v in state.items()})
    own = pvtv2.official_config(model)
    for word, value in found.items():
        if word == "mlp_ratios":  # told as far as it decides the widths
            widths = [[int(d * r) for d, r in zip(found["embed_dims"], rs)]
                      for rs in (value, own[word])]  # fmt: skip
            assert widths[0] == widths[1]
        elif word not in pvtv2.ASSUMED:
            assert own[word] == value, word
    told = found | {word: config[word] for word in pvtv2.ASSUMED}
    assert set(state) == set(pvtv2.to_official(pvtv2.network(own)))
    image = torch.randn(1, config["in_chans"], 70, 65)
    expected = model(image)
    torch.testing.assert_close(pvtv2.from_official(told, state)(image), expected)
    torch.testing.assert_close(pvtv2.from_official(own, state)(image), expected)


@pytest.mark.parametrize("name", [n for n in pvtv2.VARIANTS if "nano" not in n])
def test_published_files_are_recognised_with_their_heads(name):
    with torch.device("meta"):
        model = create(name)
        state = pvtv2.to_official(model)
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    found = pvtv2.recognise(shapes)
    assert found is not None
    told = {k: v for k, v in pvtv2.official_config(model).items() if k in found}
    told["norm_layer"] = "LayerNorm(eps=1e-6)"
    assert found == told
    # as the authors' detectors and segmenters keep it
    encoder = {k: v for k, v in shapes.items() if not k.startswith("head")}
    assert pvtv2.recognise(encoder) == {**found, "num_classes": 0}


def test_weights_without_a_classifier():
    state = pvtv2.to_official(create("pvtv2-nano", seed=0))
    config = pvtv2.official_config(create("pvtv2-nano"))
    state = {k: v for k, v in state.items() if not k.startswith("head")}
    model = pvtv2.from_official(config, state)
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(image), model.pooled(image))


def test_other_networks_are_not_taken_for_this_one():
    state = pvtv2.to_official(create("pvtv2-nano"))
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    without = {k: v for k, v in shapes.items() if "dwconv" not in k}  # PVT v1 has none
    assert pvtv2.recognise(without) is None
    assert pvtv2.recognise({k: v for k, v in shapes.items() if k != "norm4.weight"}) is None
    assert pvtv2.recognise({}) is None
    assert pvtv2.recognise(shapes | {"patch_embed1.proj.weight": (32, 3, 4, 4)}) is None


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"depth": [1]}, "no argument 'depth'; did you mean depths"),
        ({"norm_layer": "BatchNorm2d"}, "no norm_layer='BatchNorm2d'"),
        ({"pretrained": "b2.pth"}, "polypatch.load"),
    ],
)
def test_arguments_that_are_not_supported_are_named(config, sentence):
    with pytest.raises(PolypatchError, match=sentence):
        pvtv2.network(config)


def test_the_authors_defaults():
    """Of the bare class, which none of the variants uses."""
    with torch.device("meta"):
        model = pvtv2.network({"class": "PyramidVisionTransformerV2", "img_size": 224})
    assert (model.dims, model.heads, model.depths) == (
        (64, 128, 256, 512), (1, 2, 4, 8), (3, 4, 6, 3)
    )  # fmt: skip
    assert model.stages[0].norm.eps == 1e-5
    assert model.stages[0].blocks[0].attention.q.bias is None
    scaled = pvtv2.network({"num_stages": 1, "embed_dims": [8], "qk_scale": 0.1})
    assert scaled.stages[0].blocks[0].attention.scale == 0.1


@pytest.mark.slow
def test_linear_networks_compile_and_export():
    model = lived_in(create("pvtv2-nano-li", classes=3))
    image = torch.randn(2, 3, 64, 64)  # the last map is 2×2, less than the 7×7 cells
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(image), model(image), rtol=1e-3, atol=1e-4)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (image,), dynamic_shapes=({0: batch},))
        more = torch.randn(3, 3, 64, 64)
        torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-5)
