"""MetaFormer and PoolFormer: the block's equations, its mixers, its traps, its variants."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polypatch import create
from polypatch.backbones import metaformer
from polypatch.backbones.metaformer import MetaFormer, MetaFormerBlock
from polypatch.backbones.metaformer_mixers import (
    BatchNorm,
    Depthwise,
    Pooling,
    RandomMixing,
    SampleNorm,
    SelfAttention,
    SpatialFc,
)
from polypatch.errors import PolypatchError
from polypatch.nn import fresh, pieces


def lived_in(module: nn.Module) -> nn.Module:
    """Weights, gains and statistics that hide nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            drawn = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.copy_(drawn.abs() + 0.5)
            elif value.is_floating_point():
                value.copy_(0.5 * drawn if value.ndim <= 1 else drawn / value[0].numel() ** 0.5)
    return module.eval()


def both_ways(module: nn.Module, x: torch.Tensor, wanted: torch.Tensor) -> None:
    """With gradients and without (where memory is reused), and the input is left alone."""
    kept = x.clone()
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, kept)


# ---- mixers and norms ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("shape", [(4, 6), (1, 1), (2, 5)], ids=str)
def test_pooling_is_the_mean_of_the_neighbours_within_the_map_minus_the_place(size, shape):
    x = torch.randn(2, *shape, 3)
    wanted = torch.zeros_like(x)
    reach = size // 2
    for i in range(shape[0]):
        for j in range(shape[1]):
            rows = slice(max(0, i - reach), i + reach + 1)
            columns = slice(max(0, j - reach), j + reach + 1)
            wanted[:, i, j] = x[:, rows, columns].mean((1, 2)) - x[:, i, j]
    both_ways(Pooling(dim=3, size=size), x, wanted)


def test_the_norms_shift_does_nothing_in_front_of_pooling():
    """A mean leaves a constant as it is, and the subtraction takes it away."""
    block = lived_in(MetaFormerBlock(dim=6, mixer=Pooling(dim=6)))
    x = torch.randn(2, 5, 4, 6)
    before = block(x)
    with torch.no_grad():
        block.norm1.bias.add_(3)
    torch.testing.assert_close(block(x), before)


def test_attention():
    mixer = lived_in(SelfAttention(dim=6, head_dim=2))
    x = torch.randn(2, 3, 4, 6)
    tokens = x.flatten(1, 2)
    q, k, v = F.linear(tokens, mixer.attention.qkv.weight).chunk(3, dim=-1)
    heads = []
    for head in range(3):
        part = slice(2 * head, 2 * head + 2)
        logits = q[..., part] / math.sqrt(2) @ k[..., part].transpose(1, 2)
        heads.append(logits.softmax(-1) @ v[..., part])
    proj = mixer.attention.proj
    wanted = F.linear(torch.cat(heads, -1), proj.weight, proj.bias).view(x.shape)
    both_ways(mixer, x, wanted)
    assert mixer.attention.qkv.bias is None
    with pytest.raises(PolypatchError, match="48 does not divide into heads of 32"):
        SelfAttention(dim=48)


@pytest.mark.parametrize("kind", [SpatialFc, RandomMixing])
def test_one_matrix_mixes_the_places_of_every_channel(kind):
    mixer = lived_in(kind(dim=5, grid=(2, 3)))
    matrix = mixer.fc.weight if kind is SpatialFc else mixer.matrix
    x = torch.randn(2, 2, 3, 5)
    wanted = torch.zeros(2, 6, 5)
    for place in range(6):
        for other in range(6):
            wanted[:, place] += matrix[place, other] * x.flatten(1, 2)[:, other]
    both_ways(mixer, x, wanted.view(x.shape))
    with pytest.raises(PolypatchError, match="6 places, the map has 3×3"):
        mixer(torch.randn(1, 3, 3, 5))


def test_the_random_matrix_is_frozen_and_its_rows_are_means():
    model = create("metaformer-nano(mixers=rrpp)", seed=0)
    mixer = model.stages[1].blocks[0].mixer
    assert not mixer.matrix.requires_grad
    assert mixer.matrix.shape == (16, 16)  # at 32 pixels and stride 8
    torch.testing.assert_close(mixer.matrix.sum(1), torch.ones(16))
    assert mixer.matrix.std() > 0
    x = torch.ones(1, 4, 4, 64)
    torch.testing.assert_close(mixer(x), x)


def test_norms():
    x = torch.randn(3, 4, 5, 6) + 2
    sample = lived_in(SampleNorm(6))
    mean, deviation = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), correction=0, keepdim=True)
    normed = (x - mean) / (deviation + 1e-5).sqrt()
    both_ways(sample, x, normed * sample.weight + sample.bias)
    batch = lived_in(BatchNorm(6))
    normed = (x - batch.running_mean) / (batch.running_var + 1e-5).sqrt()
    both_ways(batch, x, normed * batch.weight + batch.bias)


# ---- the block and the network -------------------------------------------------------------------


@pytest.mark.parametrize("layer_scale", [None, 1e-5])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
@pytest.mark.parametrize("mixer", [nn.Identity(), Pooling(dim=6), Depthwise(dim=6)], ids=str)
def test_the_block(mixer, activation, layer_scale):
    act = getattr(fresh, activation)
    block = lived_in(
        MetaFormerBlock(dim=6, mixer=mixer, activation=act, hidden=9, layer_scale=layer_scale)
    )
    x = torch.randn(2, 5, 4, 6)
    scales = [1.0 if s is None else s.gamma for s in (block.scale1, block.scale2)]
    y = x + scales[0] * mixer(block.norm1(x))
    hidden = F.linear(block.norm2(y), block.fc1.weight, block.fc1.bias)
    hidden = getattr(F, activation)(hidden)
    both_ways(block, x, y + scales[1] * F.linear(hidden, block.fc2.weight, block.fc2.bias))


def test_a_mixer_of_ones_own():
    """Any module from maps to maps; here one that shifts rows."""

    class Shift(nn.Module):
        def __init__(self, *, dim: int, by: int = 1) -> None:
            super().__init__()
            self.by = by

        def forward(self, x):
            return x.roll(self.by, 1)

    model = MetaFormer(dims=(8, 12), depths=(1, 2), ratios=(2, 2), classes=3,
                       mixers=(partial(Shift, by=2), nn.Identity))  # fmt: skip
    model.init_weights()
    assert model.stages[0].blocks[0].mixer.by == 2
    assert lived_in(model)(torch.randn(1, 3, 33, 20)).shape == (1, 3)
    with pytest.raises(PolypatchError, match="no name for Shift"):
        metaformer.official_config(model)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_the_network_is_its_stages(norm):
    model = lived_in(create(f"metaformer-nano(mixers=ippa,norm={norm})", classes=3))
    image = torch.randn(2, 3, 32, 32)
    x, maps = image, []
    for i, stage in enumerate(model.stages):
        stride, padding = (4, 2) if i == 0 else (2, 1)
        x = F.conv2d(x, stage.patches.weight, stage.patches.bias, stride, padding)
        x = x.permute(0, 2, 3, 1)
        if i == 3:  # a table in front of the first attention, 1×1 at 32 pixels
            assert stage.position.shape == (1, 1, 1, 192)
            x = x + stage.position
        for block in stage.blocks:
            x = block(x)
        x = x.permute(0, 3, 1, 2)
        maps.append(x)
    normed = model.norm(x.permute(0, 2, 3, 1))
    maps[-1] = normed.permute(0, 3, 1, 2)
    for ours, wanted in zip(model.features(image), maps):
        torch.testing.assert_close(ours.map, wanted, rtol=1e-4, atol=1e-5)
    wanted = F.linear(normed.mean((1, 2)), model.head.weight, model.head.bias)
    torch.testing.assert_close(model(image), wanted, rtol=1e-4, atol=1e-5)


def test_dense_networks_norm_every_map_by_itself():
    model = lived_in(create("metaformer-nano", classes=0))
    dense = MetaFormer(dims=model.dims, depths=model.depths, mixers=[Pooling] * 4, layer_scale=1.0,
                       dense=(1, 2, 3), classes=0)  # fmt: skip
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("norm.")}
    dense.load_state_dict(state, strict=False)
    image = torch.randn(1, 3, 40, 50)
    before, behind = model.features(image), dense.features(image)
    torch.testing.assert_close(behind[0].map, before[0].map)  # without a norm, as for RetinaNet
    for i in (1, 2):
        wanted = SampleNorm(model.dims[i])(before[i].map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(behind[i].map, wanted)
    torch.testing.assert_close(dense(image), behind[3].map.mean((2, 3)))
    dense.reset_head(4)
    again = metaformer.from_official(
        metaformer.official_config(dense), metaformer.to_official(dense)
    )
    torch.testing.assert_close(again(image), dense(image))
    with torch.device("meta"):
        named = create("metaformer-poolformer-s12-feat", classes=0)
    assert [type(stage.norm) for stage in named.stages] == [SampleNorm] * 4
    assert isinstance(named.norm, nn.Identity)


def test_positions_are_resampled_and_matrices_are_not():
    model = lived_in(create("metaformer-nano(mixers=papp)", classes=3))
    assert model.stages[1].position.shape == (1, 4, 4, 64)
    with torch.no_grad():
        model.stages[1].position.fill_(0.7)  # a constant table is the same at any size
        image = torch.randn(1, 3, 70, 50)
        resampled = model(image)
        model.stages[1].position = nn.Parameter(torch.full((1, 9, 6, 64), 0.7))
        torch.testing.assert_close(model(image), resampled, rtol=1e-4, atol=1e-5)
    fixed = create("metaformer-nano(mixers=pfpp)", classes=3, resolution=64).eval()
    assert fixed.input_requirements.exact == (64, 64)
    assert fixed(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert fixed(torch.randn(1, 3, 60, 66)).shape == (1, 3)  # gives the same 8×8 places
    with pytest.raises(PolypatchError, match=r"the input is 96×64; this MetaFormer takes .*64×64"):
        fixed(torch.randn(1, 3, 96, 64))


@pytest.mark.parametrize("size", [(3, 3), (32, 32), (33, 70), (61, 47)], ids=str)
def test_sizes(size):
    model = lived_in(create("metaformer-nano", classes=5))
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).isfinite().all()
        cells = [(n + 1) // 4 for n in size]  # a padding of 2, not of 3
        for value, _ in model.features(torch.randn(1, 3, *size)):
            assert list(value.shape[2:]) == cells
            cells = [-(-n // 2) for n in cells]
    with pytest.raises(PolypatchError, match="the input is 2×9"):
        model(torch.randn(1, 3, 2, 9))


def test_groups_of_samples_change_nothing(monkeypatch):
    image = torch.randn(5, 3, 37, 41)
    for norm in ("group", "layer", "batch"):
        model = lived_in(create(f"metaformer-nano(norm={norm})", classes=5))
        with torch.no_grad():
            monkeypatch.setattr(pieces, "PIECE", 2**22)
            whole, trained = model(image), model.train()(image)
            monkeypatch.setattr(pieces, "PIECE", 1)
            torch.testing.assert_close(model(image), trained, rtol=1e-4, atol=1e-5)
            lived_in(model)  # training has moved the statistics
            torch.testing.assert_close(model(image), whole, rtol=1e-4, atol=1e-5)


# ---- variants and options ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"),
    # table 2, to its precision; exact counts are checked against the authors' code
    [("s12", 12), ("s24", 21), ("s36", 31), ("m36", 56), ("m48", 73)],
)
def test_published_sizes(name, millions):
    with torch.device("meta"):
        model = create(f"metaformer-poolformer-{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)


def test_the_random_matrices_are_the_papers_21_million():
    """Table 5, at 224 pixels."""
    with torch.device("meta"):
        model = create("metaformer-poolformer-s12(mixers=rrrr)")
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert frozen / 1e6 == pytest.approx(21, abs=0.5)


@pytest.mark.parametrize(
    ("name", "rate", "scale", "crop"),
    [("s12", 0.1, 1e-5, 0.9), ("s24", 0.1, 1e-5, 0.9), ("s36", 0.2, 1e-6, 0.9),
     ("m36", 0.3, 1e-6, 0.95), ("m48", 0.4, 1e-6, 0.95)],
)  # fmt: skip
def test_recipes(name, rate, scale, crop):
    with torch.device("meta"):
        model = create(f"metaformer-poolformer-{name}")
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, rate, sum(model.depths)))
    assert model.stages[0].blocks[0].scale1.init == scale
    assert model.preprocessing.crop == crop


def test_initialisation():
    model = create("metaformer-nano(mixers=ppaa,layer_scale=1e-5)", seed=0)
    stage = model.stages[2]
    assert stage.blocks[0].fc1.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert stage.blocks[0].mixer.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.03)
    bound = (9 * 64) ** -0.5
    assert bound * 0.95 < stage.patches.weight.abs().max() <= bound
    assert torch.equal(stage.blocks[0].scale2.gamma, torch.full((128,), 1e-5))
    assert stage.position.abs().sum() == 0


def test_dropout_and_options():
    model = create("metaformer-nano(dropout=0.5,mixers=ppad,pool=5,channels=2)", classes=3)
    mlp_off = MetaFormerBlock(dim=4, mixer=nn.Identity(), dropout=1 - 1e-7, layer_scale=1.0)
    x = torch.randn(1, 3, 3, 4)
    torch.testing.assert_close(mlp_off(x), x + mlp_off.norm1(x), atol=1e-4, rtol=0)
    assert model.stages[0].blocks[0].mixer.size == 5
    assert isinstance(model.stages[3].blocks[0].mixer, Depthwise)
    assert model.eval()(torch.randn(1, 2, 20, 20)).shape == (1, 3)
    assert create("metaformer-nano(layer_scale=0)").stages[0].blocks[0].scale1 is None
    for options, sentence in (
        ("mixers=ppx", "4 letters of i, p, a, f, r, d"),
        ("mixers=pppx", "got 'pppx'"),
        ("norm=instance", "no norm 'instance'"),
        ("activation=tanh", "no activation 'tanh'"),
        ("pool=4", "odd size, not 4"),
    ):
        with pytest.raises(PolypatchError, match=sentence):
            create(f"metaformer-nano({options})")
    with pytest.raises(PolypatchError, match="one value of each for a stage"):
        MetaFormer(dims=(4, 8), depths=(1,), mixers=(Pooling,))


# ---- authors' weights ----------------------------------------------------------------------------

_ENTRIES = st.sampled_from([
    "Identity", "Pooling", {"type": "Pooling", "pool_size": 5}, "Attention",
    {"type": "Attention", "head_dim": 8, "qkv_bias": True}, "SpatialFc", "RandomMixing",
    {"type": "Conv2d", "kernel_size": 5},
])  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_configurations_come_back_from_the_weights(data):
    stages = data.draw(st.integers(1, 4))
    several = lambda values: [data.draw(values) for _ in range(stages)]  # noqa: E731
    config = {
        "layers": several(st.integers(1, 2)),
        "embed_dims": several(st.sampled_from([32, 64])),
        "mlp_ratios": several(st.sampled_from([1, 2, 1.3, 10 / 3])),
        "downsamples": several(st.booleans()),
        "num_classes": data.draw(st.sampled_from([0, 1, 5])),
        "use_layer_scale": data.draw(st.booleans()),
        "layer_scale_init_value": 1e-6,
        "in_patch_size": data.draw(st.sampled_from([5, 7])),
        "norm_layer": data.draw(st.sampled_from(["GroupNorm(eps=1e-6)", "LayerNormChannel",
                                                 "BatchNorm2d"])),
        "act_layer": data.draw(st.sampled_from(["GELU", "ReLU", "SiLU"])),
        "in_chans": data.draw(st.integers(1, 3)),
    }  # fmt: skip
    if data.draw(st.booleans()):
        config |= {"class": "PoolFormer", "pool_size": data.draw(st.sampled_from([3, 5])),
                   "fork_feat": data.draw(st.booleans())}  # fmt: skip
        config["fork_last3"] = config["fork_feat"] and stages > 1 and data.draw(st.booleans())
    else:
        cuts = [True, *(d or a != b for d, a, b in zip(config["downsamples"], config["embed_dims"],
                                                       config["embed_dims"][1:]))]  # fmt: skip
        cells = [(40 + 4 - config["in_patch_size"]) // 4 + 1]
        for cut in cuts[1:]:
            cells.append(-(-cells[-1] // 2) if cut else cells[-1])
        mixers = several(_ENTRIES)
        config["token_mixers"] = [
            {"type": m, "spatial_shape": [n, n]} if m in ("SpatialFc", "RandomMixing") else m
            for m, n in zip(mixers, cells)
        ]
        config["add_pos_embs"] = [[n, n] if data.draw(st.booleans()) else None for n in cells]
    model = lived_in(metaformer.network(config))
    state = metaformer.to_official(model)
    own = metaformer.official_config(model)
    found = metaformer.recognise({k: tuple(v.shape) for k, v in state.items()})
    assert found is not None
    if config.get("fork_feat"):
        found["num_classes"] = own["num_classes"] = 0
    for word, value in found.items():
        if word == "mlp_ratios":  # told as far as it decides the widths
            widths = [[int(d * r) for d, r in zip(own["embed_dims"], ratios)]
                      for ratios in (value, own[word])]  # fmt: skip
            assert widths[0] == widths[1]
        elif word == "down_patch_size":  # of no meaning without one
            assert value == 3
        elif word in own and word not in metaformer.ASSUMED:
            assert own[word] == value, word
    image = torch.randn(2, config["in_chans"], 40, 40)
    again = metaformer.from_official({**found, **own}, state)
    torch.testing.assert_close(again(image), model(image))
    for ours, wanted in zip(again.features(image), model.features(image), strict=True):
        torch.testing.assert_close(ours.map, wanted.map)


@pytest.mark.parametrize("name", [n for n in metaformer.VARIANTS if "nano" not in n])
def test_published_files_are_recognised(name):
    """Everything but the identity network, which no shape tells from PoolFormer-S12."""
    variant = metaformer.VARIANTS[name]
    with torch.device("meta"):
        model = create(name, classes=0 if variant.dense else 1000)
        state = metaformer.to_official(model)
        found = metaformer.recognise({k: tuple(v.shape) for k, v in state.items()})
        assert found is not None
        again = metaformer.network(found)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert again.preprocessing.crop == variant.crop
    for ours, other in zip(model.first_blocks, again.first_blocks):
        assert type(ours.norm1) is type(other.norm1)
        if name != "metaformer-id-s12":
            assert type(ours.mixer) is type(other.mixer)
    assert (again.dense, again.positions) == (model.dense, model.positions)


def test_other_networks_are_not_taken_for_this_one():
    state = metaformer.to_official(create("metaformer-nano"))
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    assert metaformer.recognise({}) is None
    assert metaformer.recognise({"patch_embed.proj.weight": (8, 3, 4, 4)}) is None
    linear = {k: v[:2] if "mlp.fc" in k else v for k, v in shapes.items()}
    assert metaformer.recognise(linear) is None


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"layer": [1]}, "no argument 'layer'; did you mean layers"),
        ({"norm_layer": "InstanceNorm"}, "no norm 'InstanceNorm'"),
        ({"act_layer": "Tanh"}, "no activation 'tanh'"),
        ({"token_mixers": ["Fourier"]}, "no token mixer 'Fourier'"),
        ({"token_mixers": [{"type": "Pooling", "size": 3}]}, "Pooling has no argument 'size'"),
        ({"init_cfg": {"checkpoint": "x"}}, "polypatch.load"),
    ],
)
def test_arguments_that_are_not_supported_are_named(config, sentence):
    base = {"layers": [1], "embed_dims": [8], "mlp_ratios": [1], "downsamples": [True]}
    with pytest.raises(PolypatchError, match=sentence):
        metaformer.network(base | config)


def test_the_authors_defaults():
    base = {"layers": [1], "embed_dims": [32], "mlp_ratios": [1], "downsamples": [True]}
    pool = metaformer.network(base)
    assert isinstance(pool.norm, SampleNorm)
    assert isinstance(pool.stages[0].blocks[0].mixer, Pooling)
    mixed = metaformer.network(base | {"class": "MetaFormer"})
    assert isinstance(mixed.norm, nn.LayerNorm)
    assert isinstance(mixed.stages[0].blocks[0].mixer, nn.Identity)
    fc = {"token_mixers": [{"type": "SpatialFc", "spatial_shape": 36}],
          "add_pos_embs": [{"type": "AddPositionEmb", "spatial_shape": [6, 6]}]}  # fmt: skip
    mixed = metaformer.network(base | fc)
    assert mixed.input_requirements.exact == (24, 24)
    assert mixed.positions == ((6, 6),)


@pytest.mark.slow
@pytest.mark.parametrize("mixers", ["irdp", "aaaa", "pfpf"])
def test_hybrids_compile_and_export(mixers):
    model = lived_in(create(f"metaformer-nano(mixers={mixers})", classes=3, resolution=64))
    image = torch.randn(2, 3, 64, 64)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(image), model(image), rtol=1e-3, atol=1e-4)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (image,), dynamic_shapes=({0: batch},))
        more = torch.randn(3, 3, 64, 64)
        torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-5)
