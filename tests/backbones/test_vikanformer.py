"""ViKANformer: each expansion against its formula, the placements, the plug, the authors' keys."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from polypatch import create
from polypatch.backbones import vikanformer
from polypatch.backbones.vikanformer import ViKANformer, make_expansion, position_table
from polypatch.backbones.vikanformer_expansions import (
    EXPANSIONS,
    bspline_basis,
    fit_spline,
    sine_phases,
    uniform_knots,
)
from polypatch.errors import PolypatchError


def expansion(kind: str, **options):
    torch.manual_seed(0)
    layer = make_expansion(kind, inputs=3, outputs=2, maps=2, options=options)
    layer.init_weights()
    with torch.no_grad():
        for value in layer.parameters():
            if value.requires_grad:
                value.add_(0.2 * torch.randn_like(value))
    return layer


def literal(kind: str, layer, m: int, o: int, x: torch.Tensor) -> float:
    """Σ_i φ_oi(x_i) of map m, one input and one term after the other."""
    p = {n: v.detach().double() for n, v in (*layer.named_parameters(), *layer.named_buffers())}
    silu = F.silu(x)
    total = 0.0
    for i in range(3):
        v = float(x[i])
        if kind == "vanilla":
            total += p["weight"][m, o, i] * v
        elif kind == "efficientkan":
            basis = bspline_basis(x[i].double()[None], p["grid"][i][None], layer.order)[0]
            spline = (p["spline_weight"][m, o, i] * basis).sum()
            total += p["base_weight"][m, o, i] * silu[i] + p["spline_scaler"][m, o, i] * spline
        elif kind == "fast":
            normed = (x.double() - x.double().mean()) / (x.double().var(correction=0) + 1e-5).sqrt()
            u = normed[i] * p["norm_weight"][m, i] + p["norm_bias"][m, i]
            for k, centre in enumerate(p["centres"][m]):
                gauss = math.exp(-(((u - centre) / (4 / 7)) ** 2))
                total += p["spline_weight"][m, o, i * 8 + k] * gauss
            total += p["base_weight"][m, o, i] * silu[i]
        elif kind == "sine":
            for k in range(8):
                wave = math.sin(v * p["freq"][m, 0, 0, 0, k] + p["phase"][m, 0, 0, i, k])
                total += p["amplitudes"][m, o, i, k] * wave
        elif kind == "fourier":
            for k in range(28):
                total += p["coefficients"][m, 0, o, i, k] * math.cos((k + 1) * v)
                total += p["coefficients"][m, 1, o, i, k] * math.sin((k + 1) * v)
        else:
            total += np.polynomial.chebyshev.chebval(
                math.tanh(v), p["coefficients"][m, i, o].numpy()
            )
    for name in ("bias", "base_bias"):
        if name in p:
            total += p[name][m].flatten()[o]
    return float(total)


@pytest.mark.parametrize("kind", EXPANSIONS)
def test_expansions_literally(kind):
    layer = expansion(kind)
    x = torch.randn(5, 2, 3)
    y = layer(x)
    assert y.shape == (5, 2, 2)
    for row in range(5):
        for m in range(2):
            for o in range(2):
                assert float(y[row, m, o]) == pytest.approx(
                    literal(kind, layer, m, o, x[row, m]), abs=2e-4
                )


def test_splines_sum_to_one_inside_and_vanish_outside():
    knots = uniform_knots(grid=5, order=3)
    assert knots.shape == (12,)
    torch.testing.assert_close(knots[[3, 8]], torch.tensor([-1.0, 1.0]))
    x = torch.linspace(-0.999, 0.999, 101)[:, None]
    inside = bspline_basis(x, knots[None], 3)
    torch.testing.assert_close(inside.sum(-1), torch.ones(101, 1))
    assert (inside >= 0).all()
    outside = bspline_basis(torch.tensor([[-2.3], [2.3]]), knots[None], 3)
    assert outside.abs().sum() == 0


def test_fitting_recovers_a_spline():
    knots = uniform_knots(grid=5, order=3).expand(2, -1)
    wanted = torch.randn(4, 2, 8)
    x = torch.linspace(-1, 0.999, 50)[:, None].expand(-1, 2)
    y = torch.einsum("nik,oik->nio", bspline_basis(x, knots, 3), wanted)
    torch.testing.assert_close(fit_spline(x, y, knots, 3), wanted, rtol=1e-3, atol=1e-3)


def test_phases_by_their_recursion():
    phase = torch.arange(1, 6) / 6 + torch.linspace(0, math.pi, 3)[:, None]
    for i in range(1, 5):
        phase = phase * (0.9724108095811765 * i**-0.9884401790754128 + 0.999449553483052)
    torch.testing.assert_close(sine_phases(inputs=3, grid=5), phase)


def test_chebyshev_gradients_survive_saturation():
    layer = expansion("cheby")
    x = torch.tensor([[[30.0, -30.0, 0.0], [0.0, 1.0, -20.0]]], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dim", [6, 7])
def test_positions(dim):
    table = position_table(5, dim, like=torch.zeros(1, dtype=torch.float64))
    for t in range(5):
        for j in range(dim):
            angle = t / 10000 ** (j / dim)
            wanted = math.sin(angle) if j % 2 == 0 else math.cos(angle)
            assert float(table[t, j]) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("kind", [*EXPANSIONS, "flash-attn"])
@pytest.mark.parametrize("size", [(28, 28), (19, 30)])
def test_heads_work_on_their_own_channels(kind, size):
    """The network, one head after the other, with single maps taken out of the layer."""
    model = create(f"vikanformer-{kind}(dim=8,depth=2)", classes=3, seed=0).eval()
    image = torch.rand(2, 1, *size)
    height, width = (-(-s // 4) * 4 for s in size)
    padded = F.pad(image, (0, width - size[1], 0, height - size[0]))
    patches = F.unfold(padded, 4, stride=4).transpose(1, 2)  # (channel, row, column) inside
    x = torch.cat([model.class_token.expand(2, 1, -1), model.patch_map(patches)], 1)
    x = x + position_table(x.shape[1], 8, like=x)
    for block in model.blocks:
        if kind == "flash-attn":
            q, k, v = block.attn.qkv(x).chunk(3, 2)
            q, k, v = (t.unflatten(2, (2, 64)).transpose(1, 2) for t in (q, k, v))
            mixed = (q @ k.transpose(2, 3) / 8).softmax(-1) @ v
            x = mixed.transpose(1, 2).flatten(2) @ block.attn.proj.weight.T
            continue
        normed = block.norm1(x)
        parts = []
        for head in range(2):
            own = normed[..., 4 * head : 4 * head + 4]
            every = block.attn.maps(own[:, :, None].expand(-1, -1, 6, -1))
            q, k, v = every[:, :, head], every[:, :, 2 + head], every[:, :, 4 + head]
            parts.append((q @ k.transpose(1, 2) / 2).softmax(-1) @ v)
        x = x + torch.cat(parts, 2)
        hidden = F.relu(block.mlp.fc1(block.norm2(x)))
        x = x + block.mlp.fc2(hidden)
    wanted = model.head(model.norm(x[:, 0]))
    torch.testing.assert_close(model(image), wanted, rtol=1e-4, atol=1e-5)


def test_placements():
    kinds = {}
    for placement in ("code", "paper", "both"):
        model = create(f"vikanformer-nano(placement={placement})", classes=2, seed=0)
        block = model.blocks[0]
        kinds[placement] = (
            type(model.patch_map.expansion).__name__,
            type(block.attn.maps).__name__,
            type(block.mlp).__name__,
        )
        assert model(torch.rand(1, 3, 32, 32)).shape == (1, 2)
    radial, linear = "RadialExpansion", "LinearExpansion"
    assert kinds == {
        "code": (radial, radial, "Mlp"),
        "paper": (linear, linear, "Single"),
        "both": (radial, radial, "Single"),
    }
    with pytest.raises(PolypatchError, match="no layout for placement='paper'"):
        vikanformer.to_official(create("vikanformer-nano(placement=paper)"))


def test_grey_networks_take_rgb():
    model = create("vikanformer-fast", seed=0).eval()
    grey = torch.rand(1, 1, 28, 28)
    torch.testing.assert_close(model(grey.expand(-1, 3, -1, -1)), model(grey), rtol=1e-4, atol=1e-4)
    with pytest.raises(PolypatchError, match="has 2 channels, this network takes 1"):
        model(torch.rand(1, 2, 28, 28))


@pytest.mark.parametrize("variant", [v for v in vikanformer.VARIANTS if v != "vikanformer-nano"])
def test_every_variant_comes_back_from_its_weights(variant):
    model = create(variant, seed=0).eval()
    state = vikanformer.to_official(model)
    found = vikanformer.recognise({k: tuple(v.shape) for k, v in state.items()})
    assert found == vikanformer.official_config(model)
    again = vikanformer.from_official(found, state)
    image = torch.rand(1, model.channels, 32, 32)
    torch.testing.assert_close(again(image), model(image))


@pytest.mark.parametrize("kind", EXPANSIONS)
@pytest.mark.parametrize("placement", ["paper", "code", "both"])
def test_plugged_into_a_host(kind, placement):
    spec = f"vit-nano+vikanformer(expansion={kind},placement={placement})"
    model = create(spec, classes=3, resolution=32, seed=0).train()
    x = torch.randn(2, 3, 32, 32)
    model(x).square().sum().backward()
    without = [
        n for n, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]  # fmt: skip
    assert not without
    with torch.no_grad():
        assert model.bfloat16()(x.bfloat16()).isfinite().all()


def test_the_plug_in_the_attention_of_a_rotary_host():
    model = create("vit-nano(position=rope)+vikanformer(placement=code)", classes=3, seed=0).eval()
    mixing = model.blocks[0].mixing
    x = torch.randn(1, 5, 64)
    turn = (torch.rand(1, 1, 5, mixing.head_dim), torch.rand(1, 1, 5, mixing.head_dim))
    q, k, _ = mixing.project(x)
    rotated_q, rotated_k, _ = mixing.project(x, turn)
    assert not torch.equal(q, rotated_q)
    assert not torch.equal(k, rotated_k)
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("vikanformer-nano(expansion=fast-kan)", "did you mean"),
        ("vikanformer-nano(placement=ffn)", "no placement='ffn'"),
        ("vikanformer-nano(heads=5)", "does not divide into 5 heads"),
        ("vikanformer-nano(depth=0)", "depth counts from 1"),
        ("vit-nano+vikanformer(placement=mlp)", "no placement='mlp'"),
        ("vit-nano+vikanformer(expansion=kan)", "no expansion 'kan'"),
    ],
)
def test_bad_options(spec, said):
    with pytest.raises(PolypatchError, match=said):
        create(spec)


def test_bad_configurations():
    with pytest.raises(PolypatchError, match="no type 'kan'"):
        vikanformer.network({"chw": [1, 28, 28], "type": "kan"})
    with pytest.raises(PolypatchError, match="don't divide an image of 28×28"):
        vikanformer.network({"chw": [1, 28, 28], "n_patches": 5})
    with pytest.raises(PolypatchError, match="no blocks='post'"):
        ViKANformer(dim=8, depth=1, heads=2, patch=4, blocks="post")


@pytest.mark.parametrize("kind", EXPANSIONS)
def test_expansions_without_a_batch_or_with_an_empty_one(kind: str, monkeypatch) -> None:
    monkeypatch.setattr("polypatch.nn.pieces.PIECE", 1)
    layer = EXPANSIONS[kind](inputs=4, outputs=3, maps=2)
    layer.init_weights()
    x = torch.randn(5, 2, 4)
    with torch.no_grad():
        torch.testing.assert_close(layer(x[0]), layer(x)[0], rtol=1e-5, atol=1e-6)
        assert layer(x[:0]).shape == (0, 2, 3)
