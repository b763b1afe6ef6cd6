from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polypatch import PolypatchError, create
from polypatch.nn import Attention, DropPath
from polypatch.patching.spt_lsa import (
    DIRECTIONS,
    VARIANTS,
    LocalityAttention,
    ShiftedPatchTokenization,
    build,
    from_official,
    plug,
    recognise,
    shifted_copies,
)
from polypatch.patching.spt_lsa_networks import TalkingHeads, TokensToToken, cait, sinusoid, t2t
from polypatch.patching.spt_lsa_networks import vit as plain_vit
from polypatch.patching.spt_lsa_pyramids import (
    CellMerging,
    WindowAttention,
    foreign_bias,
    pit,
    relative_index,
    swin,
)
from polypatch.tokens import Tokens

NANO = "vit-nano+spt-lsa"


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def small(name: str, *, spt: bool = True, lsa: bool = True, **more) -> nn.Module:
    """One of the five networks in a size for tests, with its parameters drawn."""
    parts = dict(classes=5, spt=spt, lsa=lsa, **more)
    models = {
        "vit": lambda: plain_vit(
            grid=(4, 4), patch=4, dim=24, depth=2, heads=3, head_dim=8, hidden=48, **parts
        ),
        "cait": lambda: cait(
            grid=(4, 4), patch=4, dim=24, depth=2, class_depth=1, heads=3, head_dim=8, hidden=48,
            **parts,
        ),
        "pit": lambda: pit(
            grid=(8, 8), patch=2, dim=16, depths=(1, 2), heads=(2, 4), head_dim=8, ratio=2, **parts
        ),
        "t2t": lambda: t2t(
            grid=(4, 4), splits=2, dim=32, depth=2, heads=4, hidden=64, token_dim=8, **parts
        ),
        "swin": lambda: swin(
            grid=(8, 8), patch=2, dim=12, depths=(2, 2), heads=(2, 3), window=4, ratio=2, **parts
        ),
    }  # fmt: skip
    model = models[name]()
    for value in model.parameters():
        nn.init.normal_(value, std=0.3)
    return model


NETWORKS = ["vit", "cait", "pit", "t2t", "swin"]


# ---- shifted patch tokenization ----------------------------------------------------------------


@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    shift=st.integers(1, 9),
    directions=st.sampled_from(sorted(DIRECTIONS)),
)
@settings(max_examples=60, deadline=None)
def test_copies_move_their_content_and_zeros_come_in(height, width, shift, directions):
    x = torch.arange(1.0, 1 + 2 * height * width).view(1, 2, height, width)
    copies = shifted_copies(x, shift, directions).unflatten(1, (-1, 2))
    assert torch.equal(copies[:, 0], x)
    for copy, (down, right) in zip(copies.unbind(1)[1:], DIRECTIONS[directions], strict=True):
        for i in range(height):
            for j in range(width):
                a, b = i - down * shift, j - right * shift
                inside = 0 <= a < height and 0 <= b < width
                expected = x[:, :, a, b] if inside else torch.zeros(1, 2)
                assert torch.equal(copy[:, :, i, j], expected)


def test_directions_are_the_papers():
    ways = {name: set(steps) for name, steps in DIRECTIONS.items()}
    assert ways["diagonal"] == {(1, 1), (1, -1), (-1, 1), (-1, -1)}
    assert ways["cardinal"] == {(1, 0), (-1, 0), (0, 1), (0, -1)}
    assert ways["eight"] == ways["diagonal"] | ways["cardinal"]


@pytest.mark.parametrize("directions", sorted(DIRECTIONS))
@pytest.mark.parametrize("size", [(8, 8), (9, 14)])
def test_tokenization_is_the_papers_equation(directions, size):
    spt = ShiftedPatchTokenization(dim=6, patch=4, directions=directions)
    for value in spt.parameters():
        nn.init.normal_(value)
    image = images(2, 3, *size)
    tokens = spt(image)
    padded = F.pad(image, (0, -size[1] % 4, 0, -size[0] % 4))
    copies = shifted_copies(padded, 2, directions)
    rows, columns = padded.shape[-2] // 4, padded.shape[-1] // 4
    assert tokens.grid == (rows, columns)
    for index in range(rows * columns):
        top, left = index // columns * 4, index % columns * 4
        patch = copies[:, :, top : top + 4, left : left + 4].permute(0, 2, 3, 1).flatten(1)
        normed = (patch - patch.mean(1, keepdim=True)) / (
            patch.var(1, keepdim=True, unbiased=False) + 1e-5
        ).sqrt()
        expected = (normed * spt.norm.weight + spt.norm.bias) @ spt.proj.weight.T + spt.proj.bias
        torch.testing.assert_close(tokens.x[:, index], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (13, 18), (4, 4)])
def test_cells_tile_the_image(size):
    tokens = ShiftedPatchTokenization(dim=8, patch=4)(images(1, 3, *size)).check()
    labels = tokens.label_map()
    rows, columns = torch.arange(size[0]) // 4, torch.arange(size[1]) // 4
    assert torch.equal(labels[0], rows[:, None] * -(-size[1] // 4) + columns)


def test_a_token_sees_half_a_patch_beyond_its_cell():
    spt = ShiftedPatchTokenization(dim=8, patch=4)
    spt.init_weights()
    image = images(1, 3, 16, 16).requires_grad_()
    (spt(image).x[0, 5] * torch.arange(1.0, 9)).sum().backward()  # the cell of rows, columns 4–7
    seen = image.grad[0].abs().amax(0) > 0
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[2:10, 2:10] = True
    assert torch.equal(seen, expected)


def test_shift_is_in_patches_and_never_less_than_a_pixel():
    assert ShiftedPatchTokenization(dim=4, patch=8).shift == 4
    assert ShiftedPatchTokenization(dim=4, patch=8, shift=0.25).shift == 2
    assert ShiftedPatchTokenization(dim=4, patch=5).shift == 2
    assert ShiftedPatchTokenization(dim=4, patch=1).shift == 1


# ---- locality self-attention -------------------------------------------------------------------


def literal_lsa(attention: LocalityAttention, x: torch.Tensor) -> torch.Tensor:
    """Sec. 3.3, token by token."""
    batch, tokens, _ = x.shape
    heads, width = attention.heads, attention.head_dim
    q, k, v = attention.qkv(x).view(batch, tokens, 3, heads, width).unbind(2)
    out = torch.zeros(batch, tokens, heads, width)
    for head in range(heads):
        for i in range(tokens):
            others = [j for j in range(tokens) if j != i]
            tau = 1 / attention.inverse_temperature[head]
            logits = (q[:, i, head, None] * k[:, others, head]).sum(-1) / tau
            shares = logits.softmax(-1)
            out[:, i, head] = (shares[..., None] * v[:, others, head]).sum(1)
    return attention.proj(out.flatten(2))


def drawn_attention(**options) -> LocalityAttention:
    attention = LocalityAttention(dim=12, heads=3, **options)
    if attention.inverse_temperature is not None:
        nn.init.uniform_(attention.inverse_temperature, 0.2, 2)
    return attention.eval()


def test_attention_is_the_papers_equation():
    attention = drawn_attention()
    x = images(2, 6, 12)
    torch.testing.assert_close(attention(x).x, literal_lsa(attention, x), rtol=1e-4, atol=1e-5)


def test_nobody_attends_to_itself_and_shares_sum_to_one():
    attention = drawn_attention()
    shares = attention.weights(images(2, 6, 12))
    assert shares.diagonal(dim1=-2, dim2=-1).abs().max() == 0
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 3, 6))


def test_small_temperature_sharpens():
    attention, x = drawn_attention(), images(2, 6, 12)
    peaks = []
    for value in (0.1, 1.0, 10.0, 100.0):
        nn.init.constant_(attention.inverse_temperature, value)
        peaks.append(attention.weights(x).amax(-1).mean().item())
    assert peaks == sorted(peaks)
    assert peaks[0] < 0.3 < 0.95 < peaks[-1]


def test_without_its_parts_it_is_plain_attention():
    plain = Attention(dim=12, heads=3)
    same = LocalityAttention.like(plain, learn_temperature=False, mask_diagonal=False)
    x, bias = images(2, 6, 12), images(1, 3, 6, 6)
    torch.testing.assert_close(same(x, bias=bias).x, plain(x, bias=bias).x)
    assert same.qkv is plain.qkv


def test_padding_changes_nothing():
    attention, x = drawn_attention(), images(1, 5, 12)
    padded = torch.cat([x, images(1, 3, 12) * 50], dim=1)
    mask = torch.arange(8)[None] < 5
    bias = torch.zeros(1, 1, 1, 8).masked_fill(~mask[:, None, None], float("-inf"))
    torch.testing.assert_close(attention(padded, bias=bias).x[:, :5], attention(x).x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lone_token_keeps_itself(dtype):
    attention = drawn_attention().to(dtype)
    x = images(2, 3, 12).to(dtype)
    alone = attention(x[:, :1]).x
    value = attention.qkv(x[:, :1])[..., 24:]
    # A sum in another order may round bfloat16 the other way (8 bits, values near 1).
    room = dict(rtol=2e-2, atol=4e-3) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone, attention.proj(value), **room)
    bias = torch.tensor([0.0, float("-inf"), float("-inf")], dtype=dtype).view(1, 1, 1, 3)
    mixed = attention(x, bias=bias).x
    assert mixed.isfinite().all()
    torch.testing.assert_close(mixed[:, :1], alone, **room)


def test_permuting_tokens_permutes_the_output():
    attention, x = drawn_attention(), images(2, 7, 12)
    order = torch.randperm(7)
    torch.testing.assert_close(attention(x[:, order]).x, attention(x).x[:, order])


def test_rotation_acts_before_the_temperature():
    host = create("vit-nano(position=rope)+spt-lsa", classes=3, seed=0).eval()
    mixing = host.blocks[0].mixing
    tokens = host.tokens(images(1, 3, 32, 32))
    rotation = host.context(tokens).rotation
    q, k, _ = mixing.project(tokens.x, rotation)
    own = torch.eye(q.shape[2], dtype=torch.bool)
    logits = (q @ k.transpose(-2, -1) * mixing.head_dim**-0.5).masked_fill(own, -torch.inf)
    torch.testing.assert_close(mixing.weights(tokens.x, rotation=rotation), logits.softmax(-1))


# ---- into a host -------------------------------------------------------------------------------


def test_plug_keeps_projections_and_starts_at_their_temperature():
    host = create("vit-nano", classes=3, seed=0)
    before = [block.mixing.qkv.weight for block in host.blocks]
    host = plug(host)
    assert host.plugs == ("spt-lsa",)
    for weight, block in zip(before, host.blocks, strict=True):
        assert block.mixing.qkv.weight is weight
        torch.testing.assert_close(block.mixing.inverse_temperature.data, torch.full((4,), 0.25))
    assert isinstance(host.patching, ShiftedPatchTokenization)
    assert (host.patching.patch, host.patching.shift) == (4, 2)


def test_neutral_settings_change_nothing():
    x = images(2, 3, 32, 32)
    plain = create("vit-nano", classes=3, seed=0).eval()(x)
    for options in ("spt=false,lsa=false", "spt=false,temperature=false,mask=false"):
        host = create(f"{NANO}({options})", classes=3, seed=0).eval()
        torch.testing.assert_close(host(x), plain)


def test_weights_that_were_there_do_not_depend_on_the_parts():
    both, one = (create(f"{NANO}{o}", classes=3, seed=0) for o in ("", "(spt=false)"))
    torch.testing.assert_close(both.blocks[1].mixing.qkv.weight, one.blocks[1].mixing.qkv.weight)


def test_parameters_added_are_the_papers():
    count = {
        spec: sum(p.numel() for p in create(spec, classes=10).parameters())
        for spec in ("vit-nano", f"{NANO}(spt=false)", NANO, f"{NANO}(directions=eight)")
    }
    values = 3 * 4 * 4
    assert count[f"{NANO}(spt=false)"] - count["vit-nano"] == 4 * 4
    more = (5 - 1) * values * 64 + 2 * 5 * values
    assert count[NANO] - count[f"{NANO}(spt=false)"] == more
    more = (9 - 5) * values * (64 + 2)
    assert count[f"{NANO}(directions=eight)"] - count[NANO] == more


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (f"{NANO}(directions=up)", "directions"),
        (f"{NANO}(shift=0)", "shift"),
        (f"{NANO}(shift=-0.5)", "shift"),
        (f"{NANO}(shifts=2)", "did you mean shift"),
        (f"{NANO}+spt-lsa", "spt=false"),
        (f"{NANO}+spt-lsa(spt=false)", "LocalityAttention"),
        ("spt-lsa-vit(diagonal=none)", "diagonal"),
        ("spt-lsa-vit(resolution=3)", "at least 4"),
        ("spt-lsa-swin(resolution=40)", "multiples of 64"),
        ("spt-lsa-swin+spt-lsa", "sockets"),
    ],
)
def test_bad_options_are_named(spec, said):
    with pytest.raises(PolypatchError, match=said):
        create(spec, classes=3)


def test_too_small_an_input_is_named():
    with pytest.raises(PolypatchError, match="smaller than one patch"):
        create(NANO, classes=3)(images(1, 3, 3, 8))


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (13, 18), (4, 4)])
def test_host_takes_any_size_and_batch_one(size):
    host = create(NANO, classes=3, seed=0).eval()
    assert host(images(1, 3, *size)).shape == (1, 3)
    x = images(3, 3, *size)
    torch.testing.assert_close(host(x)[1:2], host(x[1:2]), rtol=1e-4, atol=1e-5)


def test_host_of_the_usual_size():
    host = create("vit-tiny+spt-lsa", classes=3, seed=0).eval()
    with torch.no_grad():
        assert host(images(1, 3, 224, 224)).shape == (1, 3)


def test_merged_tokens_keep_their_weight():
    host = create(NANO, classes=3, seed=0).eval()
    tokens = host.tokens(images(2, 3, 32, 32))
    merged = tokens.merge(torch.arange(64).expand(2, -1) // 2, 32)
    mixing = host.blocks[0].mixing
    shares = mixing.weights(merged.x, bias=host.context(merged).proportional_bias)
    plain = mixing.weights(merged.x)
    odds = shares[:, :, 3] / plain[:, :, 3]  # row 3: the class token's share against the others'
    torch.testing.assert_close(odds[..., 5] / odds[..., 0], torch.full((2, 4), 2.0))
    assert host.encode(merged).x.isfinite().all()


def test_padded_batches_agree_with_single_samples():
    host = create(NANO, classes=3, seed=0).eval()
    tokens = host.tokens(images(2, 3, 32, 32))
    order = torch.arange(64).expand(2, -1)
    real = order < torch.tensor([[64], [40]])
    out = host.encode(tokens.keep(order, real))
    short = dataclasses.replace(tokens, x=tokens.x[1:]).keep(order[1:, :40])
    torch.testing.assert_close(out.x[1:, :41], host.encode(short).x, rtol=1e-4, atol=1e-5)


def test_extremes_of_the_initialisation():
    host = create(NANO, classes=3, seed=0)
    spread = host.patching.proj.weight.std().item()
    assert spread == pytest.approx((2 / (240 + 64)) ** 0.5, rel=0.05)
    assert host.patching.proj.bias.abs().max() == 0
    names = host.no_decay()
    assert {"blocks.0.mixing.inverse_temperature", "patching.norm.weight"} <= names
    assert "patching.proj.weight" not in names


@pytest.mark.parametrize(
    "spec", [NANO, f"{NANO}(directions=eight,temperature=false)", *VARIANTS],
)  # fmt: skip
def test_gradients_reach_every_trainable_parameter(spec):
    model = create(spec, classes=3, seed=0).train()
    for module in model.modules():  # a dropped path would hide what lies behind it
        if isinstance(module, DropPath):
            module.rate = 0.0
    model(images(2, 3, 32, 32)).square().sum().backward()
    dead = [
        name
        for name, value in model.named_parameters()
        if value.requires_grad and (value.grad is None or not value.grad.abs().sum() > 0)
    ]
    assert not dead


@pytest.mark.parametrize("spec", [NANO, "vit-nano(qk_norm=true,position=rope)+spt-lsa"])
def test_bfloat16(spec):
    host = create(spec, classes=3, seed=0).eval()
    x = images(2, 3, 32, 32)
    full = host(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(host(x).float(), full, rtol=0.1, atol=0.05)
    host = plug(create(spec.split("+")[0], classes=3, seed=0).bfloat16())
    assert {value.dtype for value in host.parameters()} == {torch.bfloat16}
    assert host(x.bfloat16()).isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_bfloat16(name):
    model, x = small(name).eval(), images(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).isfinite().all()
    assert model.bfloat16()(x.bfloat16()).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["host", *NETWORKS])
def test_compiles_whole(name):
    model = create(NANO, classes=3, seed=0) if name == "host" else small(name)
    side = 32 if name == "host" else 16
    model, x = model.eval(), images(2, 3, side, side)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)


# ---- the five networks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plain", "both"),
    [  # trainable and frozen, 100 classes, 32 pixels
        ("vit", 2_709_796, 2_747_248),
        ("cait", 9_037_988, 9_075_436),
        ("pit", 7_007_236, 8_676_664),
        ("t2t", 6_525_850, 6_546_851),
        ("swin", 7_107_838, 8_596_816),
    ],
)
def test_parameter_counts(name, plain, both):
    with torch.device("meta"):
        for on, expected in ((False, plain), (True, both)):
            model = build(f"spt-lsa-{name}", classes=100, spt=on, lsa=on)
            assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("spt", [False, True])
@pytest.mark.parametrize("lsa", [False, True])
def test_networks_give_logits_tokens_and_maps(name, spt, lsa):
    model, x = small(name, spt=spt, lsa=lsa).eval(), images(2, 3, 16, 16)
    assert model(x).shape == (2, 5)
    torch.testing.assert_close(model(x)[1:], model(x[1:]), rtol=1e-3, atol=1e-4)
    tokens = model.forward_features(x).check()
    assert tokens.label_map().min() == 0
    torch.testing.assert_close(model.head(model.pooling(tokens)), model(x))
    for level in model.features(x):
        assert level.map.shape[-1] * level.stride == 16
    model.reset_head(7)
    assert model(x).shape == (2, 7)
    model.reset_head(0)
    assert model(x).shape[1] == tokens.x.shape[-1]
    assert not {n for n, p in model.named_parameters() if p.ndim <= 1} - model.no_decay()


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_other_sizes(name):
    model = small(name).eval()
    for height, width in [(32, 16), (24, 40), (18, 14)]:
        requirements = model.input_requirements
        if height % requirements.multiple_of or width % requirements.multiple_of:
            with pytest.raises(PolypatchError, match="multiples of 16"):
                model(images(1, 3, height, width))
        else:
            tokens = model.forward_features(images(1, 3, height, width)).check()
            assert tokens.canvas == (height, width)
            assert (tokens.label_map() >= 0).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_stochastic_depth_acts_in_training_only(name):
    model, x = small(name, drop_path=0.9), images(8, 3, 16, 16)
    assert not torch.equal(model(x), model(x))
    model.eval()
    torch.testing.assert_close(model(x), model(x))
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    growing = name in ("t2t", "swin")
    assert (rates[0] == 0) == growing
    assert max(rates) == pytest.approx(0.9)


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_acts_in_training_only(name):
    model, x = small(name, dropout=0.5), images(2, 3, 16, 16)
    assert not torch.equal(model(x), model(x))
    torch.testing.assert_close(model.eval()(x), model(x))


def test_layer_dropout_leaves_at_least_one_block():
    model, x = small("cait", layer_dropout=0.999), images(2, 3, 16, 16)
    ran: list[int] = []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    model(x)
    assert len(ran) == 1
    ran.clear()
    model.eval()(x)
    assert ran == [0, 1]


def test_resolutions_have_the_authors_layouts():
    for name, small_cell, large_cell in [("vit", 4, 8), ("cait", 4, 8), ("t2t", 4, 8)]:
        for side, cell in ((32, small_cell), (64, large_cell)):
            with torch.device("meta"):
                assert build(f"spt-lsa-{name}", resolution=side).patch == cell
    for name in ("pit", "swin"):
        for side, cell in ((32, 2), (64, 4)):
            with torch.device("meta"):
                assert build(f"spt-lsa-{name}", resolution=side).stride == cell


def test_initialisation_is_the_authors():
    vit = create("spt-lsa-vit", classes=10, seed=0)
    assert vit.position.table.std().item() == pytest.approx(1, rel=0.05)
    assert vit.blocks[0].mlp.fc1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.05)
    deep = create("spt-lsa-cait", classes=10, seed=0)
    assert [deep.blocks[i].scale1.gamma[0].item() for i in (17, 18)] == pytest.approx([0.1, 1e-5])
    assert deep.blocks[0].mixing.mix_before.std().item() == pytest.approx(1, rel=0.5)
    tokens = create("spt-lsa-t2t", classes=10, seed=0)
    assert not tokens.position.table.requires_grad
    torch.testing.assert_close(tokens.position.table.flatten(0, 2), sinusoid(65, 256)[1:])
    windows = create("spt-lsa-swin", classes=10, seed=0)
    assert windows.head.weight.abs().max() <= 384**-0.5  # uniform, PyTorch's own
    assert windows.merges[0].spt.proj.weight.abs().max() <= (5 * 96 * 4) ** -0.5
    for model in (vit, deep, windows):
        scales = {
            n: p for n, p in model.named_parameters() if n.endswith("inverse_temperature")
        }  # fmt: skip
        assert scales
        assert all((p == p[0]).all() and p[0] > 0.1 for p in scales.values())


def test_sinusoid_is_the_usual_one():
    table = sinusoid(7, 8)
    for position in range(7):
        for channel in range(8):
            angle = torch.tensor(position / 10000 ** (2 * (channel // 2) / 8))
            expected = angle.cos() if channel % 2 else angle.sin()
            torch.testing.assert_close(table[position, channel], expected)


def test_cait_zeroes_the_own_logit_and_masks_it_on_demand():
    x = images(1, 5, 12)
    logits = {}
    for diagonal in ("zeroed", "masked", None):
        mixing = TalkingHeads(dim=12, heads=3, head_dim=4, lsa=True, diagonal=diagonal)
        torch.manual_seed(0)
        nn.init.normal_(mixing.qkv.weight)
        nn.init.eye_(mixing.mix_before)  # heads as they are, so that shares tell the logits
        nn.init.eye_(mixing.mix_after)
        logits[diagonal] = mixing.weights(x)
    assert logits["masked"].diagonal(dim1=-2, dim2=-1).max() == 0
    plain, zeroed = logits[None], logits["zeroed"]
    assert not torch.allclose(plain, zeroed)
    q, k, _ = mixing.project(x)
    products = q @ k.transpose(-2, -1) * 0.5
    products.diagonal(dim1=-2, dim2=-1).zero_()
    torch.testing.assert_close(zeroed, products.softmax(-1))


def test_masked_cait_is_another_network_and_others_are_not():
    x = images(2, 3, 32, 32)
    for name, same in (("vit", True), ("cait", False)):
        outputs = [
            create(f"spt-lsa-{name}(diagonal={word})", classes=3, seed=0).eval()(x)
            for word in ("published", "masked")
        ]
        assert torch.allclose(*outputs) == same


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("grid", [(8, 8), (8, 12)])
def test_windows_are_attention_within_regions(grid, shift):
    """Against attention over the whole raster, where pairs outside of a window are masked."""
    mixing = WindowAttention(dim=12, heads=3, window=4, shift=shift, qkv_bias=True, lsa=True)
    nn.init.normal_(mixing.relative_bias)
    nn.init.uniform_(mixing.inverse_temperature, 0.3, 1)
    cells = grid[0] * grid[1]
    x = images(2, cells, 12)
    y, z = torch.arange(cells) // grid[1], torch.arange(cells) % grid[1]
    rolled_y, rolled_z = (y - shift) % grid[0], (z - shift) % grid[1]
    window = rolled_y // 4 * grid[1] + rolled_z // 4
    together = window[:, None] == window
    round_y, round_z = y - shift != rolled_y, z - shift != rolled_z
    foreign = (round_y[:, None] != round_y) | (round_z[:, None] != round_z)
    inner_y, inner_z = rolled_y % 4, rolled_z % 4
    row = (inner_y[:, None] - inner_y + 3) * 7 + inner_z[:, None] - inner_z + 3
    bias = mixing.relative_bias[row].permute(2, 0, 1)[None]
    # Finite: a cell that is alone in its region (shift 1) then looks at the foreign ones.
    bias = (bias - 100.0 * foreign).masked_fill(~together, -1e8)
    whole = LocalityAttention.forward(mixing, x, bias=bias).x
    torch.testing.assert_close(mixing(x, grid=grid).x, whole, rtol=1e-4, atol=1e-5)


def test_relative_index_counts_offsets():
    index = relative_index(3, torch.device("cpu"))
    assert index.shape == (9, 9)
    assert index.diagonal().eq(12).all()
    assert index[0, 8] == 0
    assert index[8, 0] == 24
    assert index[0, 1] == 11
    assert foreign_bias((8, 8), 4, 2, torch.device("cpu"))[0].abs().max() == 0


def test_cell_merging_reads_columns_first():
    merge = CellMerging(dim=1)
    tokens = Tokens.from_grid(torch.arange(16.0).view(1, 1, 4, 4), canvas=(8, 8))
    seen: list[torch.Tensor] = []
    merge.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    out = merge(tokens)
    assert seen[0][0, 0].tolist() == [0, 4, 1, 5]
    assert seen[0][0, 3].tolist() == [10, 14, 11, 15]
    assert out.grid == (2, 2)
    assert out.check().extent[0, 0].tolist() == [4, 4]


def test_soft_split_overlaps_by_one():
    patches, grid = TokensToToken.soft_split(torch.arange(1.0, 26).view(1, 1, 5, 5))
    assert grid == (3, 3)
    assert patches[0, 4].tolist() == [7, 8, 9, 12, 13, 14, 17, 18, 19]
    assert patches[0, 0].tolist() == [0, 0, 0, 0, 1, 2, 0, 6, 7]


# ---- weights -----------------------------------------------------------------------------------


def official_vit(*, spt: bool, lsa: bool) -> tuple[dict, dict[str, torch.Tensor]]:
    """Configuration and weights of a small ViT by the authors' names."""
    shapes: dict[str, tuple[int, ...]] = {"pos_embedding": (1, 17, 24), "cls_token": (1, 1, 24)}

    def linear(name: str, out: int, values: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, values)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    if spt:
        norm("to_patch_embedding.merging.1", 240)
        linear("to_patch_embedding.merging.2", 24, 240)
    else:
        linear("to_patch_embedding.1", 24, 48)
    block = "transformer.layers.0"
    norm(f"{block}.0.norm", 24)
    if lsa:
        shapes[f"{block}.0.fn.scale"] = (2,)
    linear(f"{block}.0.fn.to_qkv", 96, 24, bias=False)
    linear(f"{block}.0.fn.to_out.0", 24, 32)
    norm(f"{block}.1.norm", 24)
    linear(f"{block}.1.fn.net.0", 48, 24)
    linear(f"{block}.1.fn.net.3", 24, 48)
    norm("mlp_head.0", 24)
    linear("mlp_head.1", 5, 24)
    config = dict(
        cls="ViT", img_size=16, patch_size=4, num_classes=5, dim=24, depth=1, heads=2, dim_head=16,
        mlp_dim_ratio=2, is_SPT=spt, is_LSA=lsa,
    )  # fmt: skip
    return config, {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("spt", [False, True])
@pytest.mark.parametrize("lsa", [False, True])
def test_weights_are_read_and_recognised(spt, lsa):
    config, state = official_vit(spt=spt, lsa=lsa)
    model, x = from_official(config, state), images(2, 3, 16, 16)
    assert not model.training
    patches = shifted_copies(x, 2) if spt else x
    patches = patches.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3)
    patches = patches.flatten(1, 2)
    if spt:
        patches = F.layer_norm(
            patches,
            (240,),
            state["to_patch_embedding.merging.1.weight"],
            state["to_patch_embedding.merging.1.bias"],
        )
    stem = "to_patch_embedding.merging.2" if spt else "to_patch_embedding.1"
    tokens = F.linear(patches, state[f"{stem}.weight"], state[f"{stem}.bias"])
    tokens = torch.cat([state["cls_token"].expand(2, -1, -1), tokens], 1) + state["pos_embedding"]
    torch.testing.assert_close(model.tokens(x).x, tokens, rtol=1e-4, atol=1e-3)
    found = recognise({name: tuple(value.shape) for name, value in state.items()})
    assert found is not None
    assert config.items() <= found.items()
    torch.testing.assert_close(from_official(found, state)(x), model(x))
    torch.testing.assert_close(from_official({}, state)(x), model(x))


def test_weights_that_do_not_fit_are_named():
    config, state = official_vit(spt=True, lsa=True)
    with pytest.raises(PolypatchError, match=r"unexpected keys stem\.weight"):
        from_official(config, state | {"stem.weight": torch.zeros(3)})
    with pytest.raises(PolypatchError, match=r"missing keys transformer\.layers\.0\.0\.fn\.scale"):
        from_official(config, {n: v for n, v in state.items() if not n.endswith("scale")})
    with pytest.raises(PolypatchError, match=r"missing keys pos_embedding"):
        from_official(config, {n: v for n, v in state.items() if n != "pos_embedding"})
    with pytest.raises(PolypatchError, match=r"mlp_head\.1\.bias: \(5,\) for \(6,\)"):
        from_official(config | {"num_classes": 6}, state)
    with pytest.raises(PolypatchError, match="unknown arguments of ViT: width"):
        from_official(config | {"width": 3}, state)
    with pytest.raises(PolypatchError, match="ViT"):
        from_official(config | {"cls": "VIT"}, state)
    with pytest.raises(PolypatchError, match="none of the authors' five"):
        from_official({}, {"a.weight": torch.zeros(1)})


def test_other_weights_are_not_recognised():
    _, state = official_vit(spt=True, lsa=True)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert recognise(shapes | {"stem.weight": (3,)}) is None
    assert recognise({n: s for n, s in shapes.items() if n != "mlp_head.0.bias"}) is None
    host = create("vit-nano", classes=3)
    assert recognise({n: tuple(v.shape) for n, v in host.state_dict().items()}) is None
