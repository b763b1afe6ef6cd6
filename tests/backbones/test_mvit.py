"""MViT: pooling attention and relative positions against slow versions, its schedule, its video."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from polypatch import create
from polypatch.backbones import mvit
from polypatch.backbones.mvit import BlockShape, MViT, Pooling, plan, relative_bias
from polypatch.backbones.mvit_attention import PoolingAttention, distances
from polypatch.backbones.mvit_network import AbsolutePosition, Block
from polypatch.errors import PolypatchError


def lived_in(module: nn.Module) -> Any:
    """Weights and gains that hide nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in module.parameters():
            drawn = torch.randn(value.shape, generator=generator)
            value.copy_(0.5 * drawn if value.ndim == 1 else drawn / value[0].numel() ** 0.5)
    return module.eval()


# ---- equations -----------------------------------------------------------------------------------


def places(grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    return list(itertools.product(*map(range, grid)))


def literal_pool(x: Tensor, grid, pooling: Pooling, weight: Tensor, gain: Tensor, shift: Tensor):
    """One head of one tensor, (class token + places, head_dim): cell by cell, tap by tap."""
    maps = x[1:].reshape(*grid, -1)
    out = [x[0]]
    size = tuple((n - 1) // s + 1 for n, s in zip(grid, pooling.stride))
    for cell in places(size):
        value = torch.zeros(x.shape[1])
        for tap in places(pooling.kernel):
            at = [c * s + t - k // 2 for c, s, t, k in
                  zip(cell, pooling.stride, tap, pooling.kernel)]  # fmt: skip
            if all(0 <= a < n for a, n in zip(at, grid)):
                value = value + maps[tuple(at)] * weight[:, 0, tap[0], tap[1], tap[2]]
        out.append(value)
    return F.layer_norm(torch.stack(out), x.shape[1:], gain, shift, 1e-6), size


def literal_attention(module: PoolingAttention, x: Tensor, grid, *, shape: BlockShape) -> Tensor:
    """Equations 1 to 6 and v2's, for one sample with a class token."""
    q, k, v = F.linear(x, module.qkv.weight, module.qkv.bias).chunk(3, dim=-1)
    d = module.out // module.heads
    mixed = []
    for head in range(module.heads):
        part = slice(head * d, (head + 1) * d)
        queries, keys, values, q_grid, k_grid = q[:, part], k[:, part], v[:, part], grid, grid
        if shape.queries:
            pool = module.pool_q
            queries, q_grid = literal_pool(
                queries, grid, shape.queries, pool.conv.weight, pool.norm.weight, pool.norm.bias
            )
        if shape.keys:
            pool = module.pool_kv
            w, gain, shift = pool.conv.weight, pool.norm.weight, pool.norm.bias
            keys, k_grid = literal_pool(keys, grid, shape.keys, w[:d], gain[:d], shift[:d])
            values, _ = literal_pool(values, grid, shape.keys, w[d:], gain[d:], shift[d:])
        logits = queries @ keys.T / d**0.5
        for (n, a), (m, b) in itertools.product(
            enumerate(places(q_grid)), enumerate(places(k_grid))
        ):
            for axis, table in enumerate(module.tables):
                if table is not None:
                    # steps of the finer side, from the last key behind to the last query in front
                    i = a[axis] * max(1, k_grid[axis] / q_grid[axis])
                    j = (k_grid[axis] - 1 - b[axis]) * max(1, q_grid[axis] / k_grid[axis])
                    logits[1 + n, 1 + m] += queries[1 + n] @ table[int(i + j)]
        attended = logits.softmax(-1) @ values
        if module.residual:
            attended[1:] += queries[1:]
        mixed.append(attended)
    return F.linear(torch.cat(mixed, -1), module.proj.weight, module.proj.bias)


@pytest.mark.parametrize(
    ("queries", "keys", "tables", "residual"),
    [
        (None, Pooling((3, 3, 3), (1, 2, 2)), (0, 0, 0), False),
        (Pooling((1, 3, 3), (1, 2, 2)), Pooling((1, 3, 3), (1, 1, 1)), (0, 0, 0), False),
        (Pooling((3, 3, 3), (2, 2, 2)), Pooling((1, 5, 5), (1, 4, 4)), (0, 0, 0), True),
        (Pooling((3, 3, 3), (1, 1, 1)), Pooling((3, 3, 3), (1, 2, 2)), (3, 5, 7), True),
        (Pooling((1, 3, 3), (1, 2, 2)), Pooling((1, 3, 3), (1, 1, 1)), (0, 5, 7), True),
        (None, None, (3, 0, 0), False),
    ],
)
def test_pooling_attention(queries, keys, tables, residual):
    """With keys on a coarser grid than queries, and the other way round."""
    shape, grid = BlockShape(6, 8, 2, queries, keys), (2, 3, 4)
    module = PoolingAttention(
        shape=shape, prefix=1, mode="conv", pool_first=False, bias=True, residual=residual,
        tables=tables,
    )  # fmt: skip
    module = lived_in(module)
    x = torch.randn(2, 1 + 24, 6)
    wanted = torch.stack([literal_attention(module, sample, grid, shape=shape) for sample in x])
    torch.testing.assert_close(module(x, grid)[0], wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(module(x, grid)[0], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module(x, grid, True)[0], wanted[:, :1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("widen_in_attention", [False, True])
def test_block(widen_in_attention):
    """Residuals: the maximum over 3 × 3 beside pooled queries, a map of the normed tokens where
    the width changes."""
    block = lived_in(
        Block(
            shape=BlockShape(4, 8, 2, Pooling((1, 3, 3), (1, 2, 2))),
            prefix=1, mode="conv", pool_first=False, qkv_bias=True, residual_pooling=False,
            tables=(0, 0, 0), widen_in_attention=widen_in_attention, mlp_ratio=2.0, dropout=0.0,
            drop_path=0.0,
        )
    )  # fmt: skip
    x, grid = torch.randn(1, 1 + 35, 4), (1, 5, 7)
    found, size = block(x, grid)
    assert size == (1, 3, 4)
    normed = block.norm1(x)
    branch, _ = block.attention(normed, grid)
    skip = block.widen(normed) if widen_in_attention else x
    maps = skip[0, 1:].reshape(5, 7, -1)
    cells = [
        maps[max(0, 2 * a - 1) : 2 * a + 2, max(0, 2 * b - 1) : 2 * b + 2].amax((0, 1))
        for a in range(3)
        for b in range(4)
    ]
    y = torch.stack([skip[0, 0], *cells])[None] + branch
    normed = block.norm2(y)
    skip = y if widen_in_attention else block.widen(normed)
    wanted = skip + block.fc2(F.gelu(block.fc1(normed)))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_relative_positions_depend_on_the_distance_alone():
    """On equal grids a query meets keys at the same distance with the same row."""
    index = distances(5, 5, torch.device("cpu"))
    for shift in range(-4, 5):
        assert len(set(index.diagonal(shift).tolist())) == 1
    assert sorted(set(index.flatten().tolist())) == list(range(9))
    # a query per second key, and keys of a finer grid: all rows stay inside of the table
    for queries, keys in [(8, 4), (4, 8), (7, 4), (39, 20), (1, 9)]:
        index = distances(queries, keys, torch.device("cpu"))
        assert index.min() >= 0
        assert index.max() <= 2 * max(queries, keys) - 2


def test_relative_tables_of_other_sizes_are_interpolated():
    q = torch.randn(1, 3 * 5, 1, 4)
    ramp = torch.linspace(-1, 1, 9)[:, None] * torch.ones(4)
    bias = relative_bias(q, (1, 3, 5), (1, 3, 5), (None, ramp, None))
    assert bias.shape == (1, 1, 15, 15)
    same = relative_bias(q, (1, 3, 5), (1, 3, 5), (None, F.interpolate(
        ramp.T[None], size=5, mode="linear")[0].T, None))  # fmt: skip
    torch.testing.assert_close(bias, same)


# ---- the schedule --------------------------------------------------------------------------------


def test_the_schedule_of_mvit_b():
    """96 to 768 channels, 1 to 8 heads; keys and values on 7 × 7, where a stage begins 14 × 14."""
    blocks = mvit.VARIANTS["mvit-b-16x4"].blocks
    assert [b.out for b in blocks] == [192, 192, 384] + [384] * 10 + [768] * 3
    assert [b.heads for b in blocks] == [1, 2, 2] + [4] * 11 + [8, 8]
    assert [b.stride[1] for b in blocks] == [1, 2, 1, 2] + [1] * 10 + [2, 1]
    side = 56
    for block in blocks:
        assert block.dim == 96 * block.heads
        keys = block.keys
        assert keys is not None
        assert side // keys.stride[1] == 7 * block.stride[1]
        side //= block.stride[1]


def test_keys_of_stride_plus_one_stop_being_pooled():
    blocks = mvit.VARIANTS["mvit-b-24-32x3"].blocks
    assert [b.keys.kernel[1] for b in blocks[:21] if b.keys] == [9, 9] + [5] * 3 + [3] * 16
    assert all(b.keys is None for b in blocks[21:])


COUNTS = {
    "mvit-b-16x4": (400, 36610672),
    "mvit-b-24-32x3": (400, 53115280),
    "mvit-b-16": (1000, 36982600),
    "mvit-v2-s-16x4": (400, 34537744),
    "mvit-v2-b-32x3": (400, 51230128),
    "mvit-v2-t": (1000, 24173320),
    "mvit-v2-s": (1000, 34870216),
}
#: as the papers and repositories round them, in millions
ROUNDED = {
    "mvit-b-32x3": (400, 36.6),
    "mvit-b-64x3": (400, 36.6),
    "mvit-b-24-wide-320": (1000, 72.9),
    "mvit-v2-b": (1000, 51.5),
    "mvit-v2-l": (1000, 218.0),
    "mvit-v2-h": (1000, 667.0),
    "mvit-v2-l-40x3": (174, 213.1),
    "mvit-s-16x4": (400, 26.1),
}


@pytest.mark.parametrize("name", [n for n in mvit.VARIANTS if "nano" not in n])
def test_published_parameter_counts(name):
    classes, wanted = COUNTS.get(name, ROUNDED.get(name, (1000, None)))
    with torch.device("meta"):
        model = mvit.build(name, classes=classes)
    count = sum(p.numel() for p in model.parameters())
    if name in COUNTS:
        assert count == wanted
    elif wanted:
        assert abs(count / 1e6 - wanted) < 0.13
    else:
        assert name in ("mvit-b-16-max", "mvit-b-24-wide")  # given with another's size only


@pytest.mark.parametrize(
    ("name", "billions"),
    [("mvit-b-16", 7.8), ("mvit-v2-t", 4.7), ("mvit-b-16x4", 70.5), ("mvit-v2-s-16x4", 64.0)],
)
def test_published_operations(name, billions):
    """Multiplications with additions of a whole pass, that is with all tokens in the last block."""
    with torch.device("meta"):
        model = mvit.build(name, classes=400).train()
        x = torch.zeros(1, 3, *((model.frames,) if model.video else ()), 224, 224)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.tokens(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, rel=0.02)


# ---- what follows from the architecture ----------------------------------------------------------

OURS = ("mvit-nano", "mvit-nano-v2", "mvit-nano-video")


def images(model: MViT, *size: int, batch: int = 2, frames: int = 4) -> Tensor:
    return torch.randn(batch, 3, *((frames,) if model.video else ()), *size)


@pytest.mark.parametrize("name", OURS)
def test_the_last_block_for_the_class_token_alone(name):
    """What inference leaves out changes nothing."""
    model = lived_in(mvit.build(name, classes=5))
    x = images(model, 40, 32)
    tokens = model.tokens(x)
    wanted = tokens[:, 0] if model.prefix else tokens.mean(1)
    torch.testing.assert_close(model.pooled(x), wanted, rtol=1e-5, atol=1e-5)
    model.train()
    for block in model.blocks:
        block.eval()  # nothing is dropped
    torch.testing.assert_close(model.pooled(x), wanted, rtol=1e-5, atol=1e-5)


def test_an_image_is_a_video_of_one_frame():
    image = lived_in(mvit.build("mvit-nano", classes=5))
    video = MViT(
        blocks=mvit.VARIANTS["mvit-nano"].blocks, patch=Pooling((1, 7, 7), (1, 4, 4)), video=True,
        resolution=32, classes=5,
    ).eval()  # fmt: skip
    state = image.state_dict()
    state["stem.weight"] = state["stem.weight"][:, :, None]
    video.load_state_dict(state)
    x = torch.randn(2, 3, 36, 50)
    torch.testing.assert_close(video(x[:, :, None]), image(x), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(video.features(x[:, :, None]), image.features(x)):
        torch.testing.assert_close(mine.map[:, :, 0], theirs.map, rtol=1e-4, atol=1e-5)


def test_frames_may_be_shuffled_where_time_has_no_place():
    """Without kernels over time and without its positions a clip is a set of frames; with either
    it isn't."""
    shapes = replace(mvit.VARIANTS["mvit-nano-video"], frames=0).blocks  # kernels of one frame

    def network(**options) -> MViT:
        return lived_in(
            MViT(
                blocks=shapes, patch=Pooling((1, 7, 7), (1, 4, 4)), video=True, frames=4,
                resolution=32, classes=5, **options,
            )
        )  # fmt: skip

    x = torch.randn(1, 3, 4, 32, 32)
    shuffled = x[:, :, [2, 0, 3, 1]]
    model = network(position="none", relative_space=True)
    torch.testing.assert_close(model(shuffled), model(x), rtol=1e-4, atol=1e-5)
    for options in ({"position": "separate"}, {"position": "none", "relative_time": True}):
        model = network(**options)
        assert (model(shuffled) - model(x)).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["joint", "separate", "sincos"])
def test_positions_of_other_grids(kind):
    """The native grid reads the table; a table that is linear in the middle stays so elsewhere."""
    module = AbsolutePosition(kind=kind, grid=(2, 4, 6), dim=16, prefix=1)
    module.init_weights()
    native = module.code((2, 4, 6))
    assert native.shape == (1, 1 + 48, 16)
    other = module.code((4, 8, 6))
    assert other.shape == (1, 1 + 192, 16)
    torch.testing.assert_close(other[:, 0], native[:, 0])
    # twice as fine: neighbours in a row of a column average to the coarse cell
    coarse = native[:, 1:].reshape(2, 4, 6, 16)
    fine = module.code((2, 8, 6))[:, 1:].reshape(2, 4, 2, 6, 16)
    inner = fine[:, 1:3].mean(2)
    wanted = 0.125 * coarse[:, 0:2] + 0.75 * coarse[:, 1:3] + 0.125 * coarse[:, 2:4]
    torch.testing.assert_close(inner, wanted, rtol=1e-5, atol=1e-5)


def test_the_fixed_code_is_the_sine_of_place_and_is_added_twice():
    module = AbsolutePosition(kind="sincos", grid=(2, 3, 4), dim=32, prefix=1)
    module.init_weights()
    assert not module.joint.requires_grad
    code = module.code((2, 3, 4))
    assert (code[:, 0] == 0).all()
    code = code[0, 1:].reshape(2, 3, 4, 32) / 2
    for t, y, x in places((2, 3, 4)):
        for start, size, at in ((0, 8, t), (8, 12, x), (20, 12, y)):
            angle = at / 10000 ** (torch.arange(size // 2) / (size // 2))
            wanted = torch.cat([angle.sin(), angle.cos()])
            torch.testing.assert_close(code[t, y, x, start : start + size], wanted)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("size", [(32, 32), (35, 50), (97, 64), (1, 1)], ids=str)
def test_any_size(name, size):
    model = lived_in(mvit.build(name, classes=5))
    for frames in (1, 4, 7) if model.video else (1,):
        x = images(model, *size, frames=frames)
        assert model(x).shape == (2, 5)
        maps = model.features(x)
        for (found, stride), info in zip(maps, model.feature_info, strict=True):
            assert (found.shape[1], stride) == tuple(info)
            assert found.shape[-2:] == tuple(-(-n // stride) for n in size)
            assert not model.video or found.shape[2] == -(-frames // 2)
            assert found.isfinite().all()


def test_patches_that_lose_the_remainder_name_the_smallest_input():
    with torch.device("meta"):
        model = mvit.build("mvit-s-16x4", classes=5)
        assert [f.map.shape[2:] for f in model.features(torch.zeros(1, 3, 3, 70, 64))] == [
            (2, 8, 8), (2, 4, 4), (2, 2, 2),
        ]  # fmt: skip
        with pytest.raises(PolypatchError, match="at least 8"):
            model(torch.zeros(1, 3, 4, 7, 64))


def test_probabilities():
    model = lived_in(mvit.build("mvit-nano", classes=5))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.probabilities(x), model(x).softmax(1))
    model.head_activation = "sigmoid"
    torch.testing.assert_close(model.probabilities(x), model(x).sigmoid())


# ---- training ------------------------------------------------------------------------------------


def test_training_parts():
    model = mvit.build("mvit-nano-video", classes=5, drop_path=0.4, dropout=0.1)
    rates = [b.drop_path.rate for b in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert model.head_dropout == 0.5
    assert mvit.build("mvit-nano").head_dropout == 0.0
    x = images(model, 32, 32)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_every_parameter_has_a_gradient_in_training():
    """Also those that reach no logit: zeros, which distributed training takes as an answer."""
    model = mvit.build("mvit-nano-v2", classes=5)
    video = MViT(
        blocks=mvit.VARIANTS["mvit-nano-v2"].blocks, patch=Pooling((3, 7, 7), (2, 4, 4)),
        video=True, frames=4, resolution=32, classes=5, position="none", relative_space=True,
        relative_time=True, residual_pooling=True, widen_in_attention=True,
    )  # fmt: skip
    video.init_weights()
    for network in (model, video):
        network.train()(images(network, 32, 32)).sum().backward()
        assert all(p.grad is not None for p in network.parameters())


def test_initial_values():
    model = MViT(
        blocks=plan(
            dim=32, heads=1, depth=2, dim_factors={1: 2.0}, head_factors={},
            key_strides={0: (1, 2, 2)}, query_strides={1: (1, 2, 2)},
        ),
        patch=Pooling((1, 7, 7), (1, 4, 4)), resolution=64, classes=50, head_scale=0.001,
        relative_space=True, relative_zero=True, decay_positions=False,
    )  # fmt: skip
    model.init_weights()
    block = model.blocks[0]
    assert block.fc1.bias.unique().tolist() == pytest.approx([0.02])
    assert block.attention.pool_kv.norm.bias.unique().tolist() == pytest.approx([0.02])
    assert block.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.attention.pool_kv.conv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.position.joint.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    assert model.head.bias.unique().tolist() == pytest.approx([2e-5])
    assert not block.attention.rel_height.any()
    spared = model.no_decay()
    assert {"class_token", "position.joint", "blocks.0.attention.rel_width"} <= spared
    assert "blocks.0.fc1.weight" not in spared
    assert "class_token" not in mvit.build("mvit-nano").no_decay()  # as in the authors' recipes


# ---- options that don't fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "convolution"}, "there is no mode 'convolution'"),
        ({"position": "rope"}, "there is no position 'rope'"),
        ({"head_activation": "relu"}, "there is no activation 'relu'"),
        ({"mode": "conv_unshared"}, "needs pool_first"),
        ({"frames": 4}, "an image network has one frame"),
        ({"resolution": 3}, "less than one patch"),
        ({"position": "sincos"}, "a multiple of 16, not 24"),
        ({"blocks": (BlockShape(24, 24, 5),)}, "5 heads don't divide"),
        (
            {"blocks": (BlockShape(24, 24, 1, Pooling((1, 3, 3), (1, 3, 3))),)},
            "kernel 3 don't fit the residual, pooled by 4",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(options, sentence):
    usual: dict[str, Any] = {"blocks": (BlockShape(24, 24, 1),), "resolution": 32}
    with pytest.raises(PolypatchError, match=sentence):
        MViT(patch=Pooling((1, 7, 7), (1, 4, 4)), **usual | options)


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(PolypatchError, match=r"takes \(batch, channels, frames, height, width\)"):
        mvit.build("mvit-nano-video")(torch.zeros(1, 3, 32, 32))
    with pytest.raises(PolypatchError, match=r"takes \(batch, channels, height, width\)"):
        mvit.build("mvit-nano")(torch.zeros(1, 3, 4, 32, 32))
    with pytest.raises(PolypatchError, match="for the variants that take video"):
        mvit.build("mvit-nano", frames=4)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"MVIT.REV.ENABLE": True}, "MVIT.REV.ENABLE=True is no MViT"),
        ({"DETECTION.ENABLE": True}, "DETECTION.ENABLE"),
        ({"MVIT.NORM": "batchnorm"}, "only 'layernorm'"),
        ({"MVIT.EMBED": 96}, "no setting MVIT.EMBED"),
        ({"MVIT.USE_FIXED_SINCOS_POS": True, "MVIT.SEP_POS_EMBED": True}, "no MVIT.SEP_POS_EMBED"),
        ({"DATA.INPUT_CHANNEL_NUM": [3, 3]}, "one pathway"),
    ],
)
def test_settings_of_other_networks_are_named(setting, sentence):
    with pytest.raises(PolypatchError, match=sentence):
        mvit.network(setting)


# ---- authors' weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in mvit.VARIANTS if n != "mvit-nano-video"])
def test_variants_are_recognised_with_what_no_shape_tells(name):
    with torch.device("meta"):
        model = mvit.build(name, classes=7)
    theirs = mvit.to_official(model)
    found = mvit.recognise({key: tuple(value.shape) for key, value in theirs.items()})
    assert found is not None
    config = mvit.official_config(model)
    assert {key: config[key] for key in found} == found


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_drawn_configurations_round_trip(data):
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    video, depth, second = draw(True, False), draw(2, 3), draw(True, False)
    start = draw(1, depth - 1)
    position = draw("joint", "separate", "sincos", "none")
    model = MViT(
        blocks=plan(
            dim=draw(16, 32),
            heads=draw(1, 2),
            depth=depth,
            dim_factors={start: 2.0},
            head_factors={start: 2.0},
            query_strides=dict.fromkeys(range(depth) if second else (), (1, 1, 1))
            | {start: (1, 2, 2)},
            first_key_stride=(1, draw(2, 4), 4),
            kernel=draw((3, 3, 3) if video else (1, 3, 3), None),
            widen_in_attention=second,
        ),
        patch=Pooling((3, 7, 7), (2, 4, 4)) if video else Pooling((1, 7, 7), (1, 4, 4)),
        video=video,
        frames=4 if video else 1,
        resolution=draw(32, 40),
        classes=draw(0, 3),
        channels=draw(1, 3),
        class_token=draw(True, False),
        position=position,
        relative_space=second,
        relative_time=second and video,
        residual_pooling=draw(True, False),
        widen_in_attention=second,
        pool_first=draw(True, False),
        separate_qkv=draw(True, False),
        mlp_ratio=draw(2.0, 4.0, 2.7),
        qkv_bias=draw(True, False),
        norm_patches=draw(True, False),
        mean_pooling=draw(True, False),
        head_activation=draw("softmax", "sigmoid"),
    )
    model = lived_in(model)
    theirs = mvit.to_official(model)
    found = mvit.recognise({key: tuple(value.shape) for key, value in theirs.items()})
    config = mvit.official_config(model)
    assert found is not None
    told = {key: value for key, value in found.items() if key not in mvit.ASSUMED}
    assert {key: config[key] for key in told} == told
    again = mvit.from_official(config, theirs)
    x = images(model, 33, 40)[:, : model.stem.in_channels]
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)


def test_kernels_of_two_axes_are_read():
    """The image networks of v2's repository pool with two-dimensional convolutions."""
    model = lived_in(mvit.build("mvit-nano-v2", classes=5))
    theirs = {
        key: value.squeeze(2) if ".pool_" in key else value
        for key, value in mvit.to_official(model).items()
    }
    config = mvit.recognise({key: tuple(value.shape) for key, value in theirs.items()})
    assert config is not None
    lists = {
        "MVIT.POOL_KVQ_KERNEL": [3, 3],
        "MVIT.POOL_Q_STRIDE": [[i, a, b] for i, _, a, b in config["MVIT.POOL_Q_STRIDE"]],
        "MVIT.POOL_KV_STRIDE_ADAPTIVE": [4, 4],
    }
    x = torch.randn(2, 3, 32, 32)
    for used in (config, config | lists):
        torch.testing.assert_close(mvit.from_official(used, theirs)(x), model(x))


def test_others_are_not_recognised():
    model = create("mvit-nano", classes=5)
    shapes = {key: tuple(value.shape) for key, value in mvit.to_official(model).items()}
    assert mvit.recognise({}) is None
    assert mvit.recognise({k: v for k, v in shapes.items() if "patch_embed" not in k}) is None
    assert mvit.recognise({k: v for k, v in shapes.items() if "norm1" not in k}) is None
    plain = {k: v for k, v in shapes.items() if "attn.pool" not in k and "head" not in k}
    assert mvit.recognise(plain) is None


def test_blocks_that_no_setting_describes():
    shapes = (BlockShape(24, 24, 1, keys=Pooling((1, 5, 5), (1, 2, 2))),
              BlockShape(24, 24, 1, keys=Pooling((1, 3, 3), (1, 2, 2))))  # fmt: skip
    model = MViT(blocks=shapes, patch=Pooling((1, 7, 7), (1, 4, 4)), resolution=32)
    with pytest.raises(PolypatchError, match="no configuration"):
        mvit.official_config(model)


# ---- exporters -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mvit-nano-v2", "mvit-nano-video"])
def test_compiles_and_exports(name):
    model = lived_in(mvit.build(name, classes=5))
    x = images(model, 48, 32)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
        program = torch.export.export(
            model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
        )
        more = images(model, 48, 32, batch=3)
        torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mvit-nano-v2", "mvit-nano-video"])
def test_bf16(name):
    model = lived_in(mvit.build(name, classes=5))
    x = images(model, 32, 32)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = model(x).float()
    assert (cast - exact).abs().max() < 0.1 * exact.abs().max()
