"""XCiT: its equations, its traps, its variants, its training-time parts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polypatch import create
from polypatch.backbones import xcit
from polypatch.backbones.xcit import XCiT, class_attention, cross_covariance, fourier_code
from polypatch.errors import PolypatchError
from polypatch.nn import DropPath
from polypatch.training.cost import count_flops


def lived_in(model: XCiT) -> XCiT:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif value.is_floating_point():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


def small(**changed) -> XCiT:
    sizes = {"dim": 16, "depth": 3, "heads": 2, "patch": 8, "classes": 5}
    model = XCiT(**(sizes | changed))
    model.init_weights()
    return lived_in(model)


# ---- the equations, literally ----------------------------------------------------------------


def literal_xca(layer, x: torch.Tensor) -> torch.Tensor:
    """X W_v · softmax(K̂ᵀQ̂ τ) of each head; x: (batch, tokens, dim)."""
    q, k, v = F.linear(x, layer.qkv.weight, layer.qkv.bias).chunk(3, dim=-1)
    heads = []
    for h, (qh, kh, vh) in enumerate(
        zip(q.chunk(layer.heads, -1), k.chunk(layer.heads, -1), v.chunk(layer.heads, -1))
    ):
        qh = qh / qh.norm(dim=1, keepdim=True)
        kh = kh / kh.norm(dim=1, keepdim=True)
        shares = (kh.transpose(1, 2) @ qh * layer.temperature[h, 0, 0]).softmax(1)
        heads.append(vh @ shares)
    return layer.proj(torch.cat(heads, -1))


def literal_class_attention(block, x: torch.Tensor) -> torch.Tensor:
    """Attention of the first token, with keys and values of all of them."""
    q, k, v = F.linear(x, block.qkv.weight, block.qkv.bias).chunk(3, dim=-1)
    heads = [
        (qh[:, :1] @ kh.transpose(1, 2) * block.scale).softmax(-1) @ vh
        for qh, kh, vh in zip(*(part.chunk(block.heads, -1) for part in (q, k, v)))
    ]
    return block.proj(torch.cat(heads, -1))


def literal(model: XCiT, image: torch.Tensor) -> torch.Tensor:
    def batch_norm(norm, x):
        mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
        x = (x - mean) / (var + 1e-5).sqrt()
        return x * norm.weight[:, None, None] + norm.bias[:, None, None]

    def layer_norm(norm, x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-6).sqrt() * norm.weight + norm.bias

    x = image
    for number, layer in enumerate(model.stem):
        x = batch_norm(layer.norm, F.conv2d(x, layer.conv.weight, stride=2, padding=1))
        x = F.gelu(x) if number < len(model.stem) - 1 else x
    height, width = x.shape[2:]
    tokens = x.flatten(2).transpose(1, 2)
    if model.use_position:
        for row in range(height):
            for column in range(width):
                code = [
                    wave(2 * math.pi * (at + 1) / (cells + 1e-6) / 10000 ** (2 * j / 32))
                    for at, cells in ((row, height), (column, width))
                    for j in range(16)
                    for wave in (math.sin, math.cos)
                ]
                tokens[:, row * width + column] += model.position.proj(torch.tensor(code))

    for block in model.blocks:
        normed = layer_norm(block.norm_attention, tokens)
        tokens = tokens + block.gain_attention * literal_xca(block.attention, normed)
        lpi = layer_norm(block.norm_local, tokens).transpose(1, 2).unflatten(2, (height, width))
        one, two = block.local.conv1, block.local.conv2
        lpi = F.gelu(F.conv2d(lpi, one.weight, one.bias, padding=1, groups=model.dim))
        lpi = batch_norm(block.local.norm, lpi)
        lpi = F.conv2d(lpi, two.weight, two.bias, padding=1, groups=model.dim)
        tokens = tokens + block.gain_local * lpi.flatten(2).transpose(1, 2)
        hidden = F.gelu(block.mlp.fc1(layer_norm(block.norm_mlp, tokens)))
        tokens = tokens + block.gain_mlp * block.mlp.fc2(hidden)

    x = torch.cat([model.class_token.expand(len(tokens), 1, -1), tokens], 1)
    for block in model.class_blocks:
        normed = layer_norm(block.norm1, x)
        first = x[:, :1] + block.gain1 * literal_class_attention(block, normed)
        rest = x[:, 1:] + block.gain1 * normed[:, 1:]
        first = layer_norm(block.norm2, first)
        rest = layer_norm(block.norm2, rest) if model.tokens_norm else rest
        first = first + block.gain2 * block.mlp.fc2(F.gelu(block.mlp.fc1(first)))
        x = torch.cat([first, rest + rest], 1)
    return model.head(layer_norm(model.norm, x[:, 0]))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (24, 40)),
        ({"patch": 16, "tokens_norm": False}, (33, 50)),
        ({"patch": 4, "heads": 4, "use_position": False}, (28, 28)),  # 49 tokens > 2 · 16 channels
        ({"class_depth": 3, "qkv_bias": False, "mlp_ratio": 1.5, "class_scale": 0.4}, (17, 8)),
    ],
)
def test_the_equations(options, size):
    model = small(**options)
    image = torch.randn(2, 3, *size)
    wanted = literal(model, image)
    torch.testing.assert_close(model(image), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(image), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cells", [1, 5, 14])
def test_the_code_spans_a_circle_whatever_the_number_of_cells(cells):
    code = fourier_code(cells)
    for at in range(cells):
        for j in range(16):
            angle = 2 * math.pi * (at + 1) / (cells + 1e-6) / 10000 ** (j / 16)
            assert code[at, 2 * j].item() == pytest.approx(math.sin(angle), abs=2e-6)
            assert code[at, 2 * j + 1].item() == pytest.approx(math.cos(angle), abs=2e-6)
    torch.testing.assert_close(code[-1], fourier_code(1)[0], rtol=0, atol=1e-5)


# ---- what follows from them ------------------------------------------------------------------


def test_the_map_between_channels_forgets_order_and_scale_of_tokens():
    qk = torch.randn(2, 3, 4, 30, 6)
    temperature = torch.rand(4, 1, 1) + 0.5
    shares = cross_covariance(qk.clone(), temperature)
    assert shares.shape == (3, 4, 6, 6)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, 4, 6))
    shuffled = qk[:, :, :, torch.randperm(30)]
    torch.testing.assert_close(cross_covariance(shuffled, temperature), shares)
    # a token given twice everywhere: sums and lengths grow alike
    torch.testing.assert_close(cross_covariance(qk.repeat(1, 1, 1, 2, 1), temperature), shares)
    scaled = qk * torch.rand(2, 3, 4, 1, 6).add(0.1)
    torch.testing.assert_close(cross_covariance(scaled, temperature), shares)


def test_attention_between_channels_commutes_with_permutations_of_tokens():
    layer = small().blocks[0].attention
    x = torch.randn(2, 5, 7, 16)
    order = torch.randperm(35)
    shuffled = layer(x.flatten(1, 2)[:, order].unflatten(1, (5, 7))).flatten(1, 2)
    torch.testing.assert_close(shuffled, layer(x).flatten(1, 2)[:, order], rtol=1e-4, atol=1e-6)


def test_silent_channels_have_gradients_and_half_precision_does_not_overflow():
    qk = torch.randn(2, 1, 1, 8, 4)
    qk[0, ..., 0] = 0
    qk.requires_grad_()
    cross_covariance(qk, torch.ones(1, 1, 1)).square().sum().backward()
    assert qk.grad.isfinite().all()
    many = 8 * torch.randn(2, 1, 1, 4000, 4) + 8  # sums of products beyond 65504
    exact = cross_covariance(many.clone(), torch.ones(1, 1, 1))
    half = cross_covariance(many.half(), torch.ones(1, 1, 1).half())
    torch.testing.assert_close(half.float(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_class_attention_without_keys_and_values(bias):
    block = small(qkv_bias=bias).class_blocks[0]
    x = torch.randn(3, 11, 16)
    gathered = class_attention(
        x, block.qkv.weight, block.qkv.bias, heads=2, scale=block.scale, dropout=0.0
    )
    wanted = literal_class_attention(block, x)[:, 0]
    torch.testing.assert_close(block.proj(gathered), wanted, rtol=1e-4, atol=1e-6)


def test_class_attention_under_dropout():
    """What is dropped is the weight of a value *with* its bias."""
    x = torch.zeros(200, 5, 8)
    weight, bias = torch.randn(24, 8), torch.randn(24)
    gathered = class_attention(x, weight, bias, heads=2, scale=1.0, dropout=0.5)
    factors = (gathered / bias[16:]).unflatten(-1, (2, 4))  # kept equal shares, doubled
    torch.testing.assert_close(factors, factors[..., :1].expand_as(factors), rtol=1e-4, atol=1e-5)
    kept = factors[..., 0] * 5 / 2
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-4)
    assert len(kept.round().unique()) > 3


def test_cost_grows_with_the_tokens_not_with_their_square():
    model = small(use_position=False)  # its code costs the root of the tokens
    one, four, sixteen = (count_flops(model, torch.randn(1, 3, s, s)) for s in (64, 128, 256))
    assert (sixteen - four) / (four - one) == 4


# ---- variants and options --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"),
    # table 1, to its precision; exact counts are checked against the authors' code
    [("nano-12", 3.1), ("tiny-12", 6.7), ("tiny-24", 12.1), ("small-12", 26.3),
     ("small-24", 47.7), ("medium-24", 84.4), ("large-24", 189.1)],
)  # fmt: skip
def test_published_sizes(name, millions):
    with torch.device("meta"):
        model = create(f"xcit-{name}-p16")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_paths_are_dropped_at_one_rate_and_not_in_class_attention():
    with torch.device("meta"):
        model = create("xcit-medium-24-p16")
    rates = [m.rate for m in model.blocks.modules() if isinstance(m, DropPath)]
    assert rates == [0.15] * 24
    assert not any(isinstance(m, DropPath) for m in model.class_blocks.modules())


def test_initial_values():
    with torch.device("meta"):
        deep = create("xcit-tiny-24-p16(depth=2)", classes=4)
    deep.to_empty(device="cpu").init_weights()
    assert deep.blocks[1].gain_local.unique().item() == pytest.approx(1e-5)
    assert deep.class_blocks[0].gain1.unique().item() == pytest.approx(1e-5)
    assert deep.blocks[0].attention.temperature.unique().item() == 1
    assert deep.class_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert deep.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    # torch's uniform by fan-in (64 here), not the normal of the other linear layers
    assert deep.position.proj.weight.abs().max().item() == pytest.approx(1 / 8, rel=0.02)


@pytest.mark.parametrize("options", ["dropout=0.5", "attention_dropout=0.5", "drop_path=0.5"])
def test_noise_acts_in_training_only(options):
    model = create(f"xcit-nano({options})", classes=3, seed=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    image = torch.randn(2, 3, 16, 16)
    plain = create("xcit-nano", classes=3, seed=0).eval()(image)
    model.training = True
    assert not torch.equal(model(image), model(image))
    torch.testing.assert_close(model.eval()(image), plain)


def test_options():
    model = create("xcit-nano(dim=24,heads=3,depth=2,patch=16,channels=1)", classes=3)
    assert [m.map.shape[1:] for m in model.features(torch.randn(1, 1, 32, 50))] == [(24, 2, 4)] * 2
    assert model.preprocessing.crop == 1.0
    assert create("xcit-nano", resolution=384).preprocessing.resolution == 384
    with pytest.raises(PolypatchError, match="patches of 8 or 16, not 12"):
        create("xcit-nano(patch=12)")
    with pytest.raises(PolypatchError, match="5 heads don't divide a width of 64"):
        create("xcit-nano(heads=5)")
    with pytest.raises(PolypatchError, match="depth counts from 1"):
        create("xcit-nano(depth=0)")
    with pytest.raises(PolypatchError, match="4 can't begin 3 times halved"):
        create("xcit-nano(dim=4,patch=16)")
    with pytest.raises(PolypatchError, match="numbers of blocks from 1 to 2"):
        XCiT(dim=8, depth=2, heads=1, taps=(1, 3))
    with pytest.raises(PolypatchError, match="no image"):
        XCiT(dim=8, depth=1, heads=1, class_depth=0)


# ---- the backbone of detectors ---------------------------------------------------------------


@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("size", [(64, 96), (77, 50), (33, 32)], ids=str)
def test_the_pyramid_has_four_strides(patch, size):
    model = small(patch=patch, depth=6, pyramid=True)
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = model.features(image)
        assert model(image).shape == (2, 5)
    assert [m.stride for m in maps] == [4, 8, 16, 32]
    for (value, stride), info in zip(maps, model.feature_info):
        assert (value.shape[1], stride) == info
        for cells, side in zip(value.shape[2:], size):
            assert cells in (side // stride, -(-side // stride))


def test_the_pyramid_resamples_the_plain_maps():
    image = torch.randn(1, 3, 64, 64)
    plain = small(depth=6)
    model = small(depth=6, pyramid=True)
    model.load_state_dict(plain.state_dict() | model.pyramid.state_dict(prefix="pyramid."),
                          strict=False)  # fmt: skip
    with torch.no_grad():
        maps = [m.map for m in model.features(image)]
        below = [m.map for m in plain.features(image)]
    up = model.pyramid.levels[0][0]
    blocks = torch.einsum("bchw,cdij->bdhiwj", below[0], up.weight).flatten(4).flatten(2, 3)
    torch.testing.assert_close(maps[0], blocks + up.bias[:, None, None], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps[1], below[1])
    torch.testing.assert_close(maps[2], F.max_pool2d(below[2], 2))
    torch.testing.assert_close(maps[3], F.max_pool2d(below[3], 4))


def test_the_pyramid_names_what_it_needs():
    model = small(patch=16, pyramid=True)
    with pytest.raises(PolypatchError, match="at least 17"):
        model(torch.randn(1, 3, 16, 40))
    with pytest.raises(PolypatchError, match="patches of 8 and 16"):
        small(patch=4, pyramid=True)


# ---- training --------------------------------------------------------------------------------


def test_distillation():
    logits, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    loss = F.cross_entropy(logits, torch.arange(6) % 4)
    hard = xcit.distillation_loss(logits, loss, teacher)
    wanted = -sum(logits.log_softmax(1)[i, teacher[i].argmax()] for i in range(6)) / 6
    torch.testing.assert_close(hard, 0.5 * loss + 0.5 * wanted)
    soft = xcit.distillation_loss(logits, loss, teacher, kind="soft", share=0.3, temperature=3.0)
    p, q = (logits / 3).softmax(1), (teacher / 3).softmax(1)
    distance = (q * (q / p).log()).sum() * 9 / 24
    torch.testing.assert_close(soft, 0.7 * loss + 0.3 * distance)
    soft.backward()
    assert teacher.grad is None
    same = xcit.distillation_loss(logits, loss, logits, kind="soft", share=1.0)
    assert same.item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(PolypatchError, match=r"'herd'; did you mean hard\?"):
        xcit.distillation_loss(logits, loss, teacher, kind="herd")


def test_a_grafted_stem_stays_as_it_is():
    donor, model = small(depth=1), small()
    xcit.graft_stem(model, donor)
    before = {k: v.clone() for k, v in model.stem.state_dict().items()}
    for key, value in donor.stem.state_dict().items():
        assert torch.equal(before[key], value)
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    optimiser.step()
    for key, value in model.stem.state_dict().items():
        assert torch.equal(before[key], value), key
    assert model.blocks[0].local.norm.training
    with pytest.raises(PolypatchError, match="the stem of this XCiT"):
        xcit.graft_stem(model, small(patch=16))


# ---- authors' weights ------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    width=st.integers(1, 4), heads=st.integers(1, 3), depth=st.integers(1, 4),
    patch=st.sampled_from([8, 16]), mlp_ratio=st.sampled_from([1, 2.7, 3.3, 4]),
    qkv_bias=st.booleans(), class_depth=st.integers(1, 3), tokens_norm=st.booleans(),
    use_position=st.booleans(), gain=st.sampled_from([1.0, 1e-5]), classes=st.integers(0, 4),
    channels=st.integers(1, 4), pyramid=st.booleans(),
)  # fmt: skip
def test_configurations_come_back_from_the_weights(width, heads, pyramid, tokens_norm, **drawn):
    # a pyramid has no blocks whose norm that could be
    tokens_norm = tokens_norm or pyramid
    model = lived_in(
        XCiT(dim=8 * width * heads, heads=heads, pyramid=pyramid, tokens_norm=tokens_norm, **drawn)
    )
    state = xcit.to_official(model)
    found = xcit.recognise({k: tuple(v.shape) for k, v in state.items()})
    config = xcit.official_config(model)
    assumed = {name: config[name] for name in xcit.ASSUMED if name in config}
    noise = dict.fromkeys(("drop_rate", "attn_drop_rate", "drop_path_rate"), 0.0)
    assert found | assumed | noise == config
    again = xcit.from_official(config, state)
    image = torch.randn(1, drawn["channels"], 32, 41)
    torch.testing.assert_close(again(image), model(image))
    for one, other in zip(again.features(image), model.features(image), strict=True):
        torch.testing.assert_close(one.map, other.map)


def test_published_files_are_known():
    """Of the nano weights only, patch tokens aren't normed in class attention."""
    for name in ("xcit-nano-12-p16", "xcit-tiny-24-p8"):
        with torch.device("meta"):
            state = xcit.to_official(create(name))
        shapes = {k: tuple(v.shape) for k, v in state.items()}
        found = xcit.recognise(shapes)
        assert found["tokens_norm"] == (name != "xcit-nano-12-p16")
        assert found["eta"] == xcit.VARIANTS[name].gain
        # self-supervised weights have no head
        headless = {k: v for k, v in shapes.items() if not k.startswith("head.")}
        assert xcit.recognise(headless) == found | {"num_classes": 0}
    assert xcit.recognise({"head.weight": (3, 4), "blocks.0.attn.qkv.weight": (12, 4)}) is None


def test_the_authors_arguments():
    base = {"embed_dim": 16, "depth": 1, "num_heads": 2, "eta": 1.0, "num_classes": 2}
    model = xcit.network(base | {"img_size": 384, "patch_proj": "linear", "drop_path_rate": 0.2})
    assert model.blocks[0].drop_path.rate == 0.2
    assert not model.tokens_norm, "off by default in the authors' class"
    # their in_chans does nothing; the weights tell how many there are
    state = xcit.to_official(model)
    assert xcit.from_official(base | {"in_chans": 7}, state).stem[0].conv.in_channels == 3
    with pytest.raises(PolypatchError, match=r"no argument 'depths'; did you mean depth\?"):
        xcit.network(base | {"depths": 3})
    with pytest.raises(PolypatchError, match="a number for eta"):
        xcit.network(base | {"eta": None})
    with pytest.raises(PolypatchError, match="norm_layer"):
        xcit.network(base | {"norm_layer": "batch"})


def test_other_taps_of_a_pyramid():
    config = {"embed_dim": 16, "depth": 4, "num_heads": 2, "eta": 1.0, "out_indices": [0, 1, 3],
              "patch_size": 8, "num_classes": 80}  # fmt: skip
    model = lived_in(xcit.network(config | {"num_classes": 0}))
    again = xcit.from_official(config, xcit.to_official(model))
    assert [m.stride for m in again.features(torch.randn(1, 3, 32, 32))] == [4, 8, 16]
    assert again.taps == (1, 2, 4)
