"""Parallel layers, solvers and shared weights: the equations, the solvers' order, the options."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from polypatch import create
from polypatch.backbones import neural_ode
from polypatch.backbones.neural_ode import (
    SOLVERS,
    NeuralODE,
    ODEBlock,
    build,
    integrate,
    plug,
)
from polypatch.errors import PolypatchError
from polypatch.hosts import ViT, build_vit
from polypatch.hosts.vit import Block
from polypatch.training.cost import count_flops


def host(*, seed: int = 0, **options) -> ViT:
    """A small plain ViT whose weights are unlike a fresh one's, in eval mode."""
    torch.manual_seed(seed)
    model = build_vit("nano", classes=5, patch=8, resolution=16, **options)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model.eval()


def images(*, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# ---- literally -----------------------------------------------------------------------------------


def norm(layer, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    return scaled * layer.weight + layer.bias


def attention(block, x: Tensor) -> Tensor:
    """F(x), head by head."""
    n = norm(block.norm1, x)
    q, k, v = (n @ block.mixing.qkv.weight.T + block.mixing.qkv.bias).chunk(3, -1)
    heads = []
    for qh, kh, vh in zip(*(t.chunk(block.mixing.heads, -1) for t in (q, k, v))):
        logits = qh @ kh.transpose(1, 2) / math.sqrt(qh.shape[-1])
        heads.append(logits.softmax(-1) @ vh)
    return torch.cat(heads, -1) @ block.mixing.proj.weight.T + block.mixing.proj.bias


def mlp(block, x: Tensor, *, first_norm: bool = False) -> Tensor:
    """G(x)."""
    n = norm(block.norm1 if first_norm else block.norm2, x)
    hidden = n @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def step(f, x: Tensor, h: float, solver: str) -> Tensor:
    k1 = f(x)
    if solver == "euler":
        return x + h * k1
    if solver == "midpoint":
        return x + h * f(x + h / 2 * k1)
    if solver == "heun":
        return x + h / 2 * (k1 + f(x + h * k1))
    k2 = f(x + h / 2 * k1)
    k3 = f(x + h / 2 * k2)
    k4 = f(x + h * k3)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shared_norm", [False, True])
@pytest.mark.parametrize("record", [False, True])
def test_layers_are_their_equations(solver, shared_norm, record):
    plain = host()
    plugged = plug(host(), solver=solver, shared_norm=shared_norm)
    x = images()
    at = plain.tokens(x).x
    for block in plain.blocks:

        def field(y: Tensor, block=block) -> Tensor:
            return attention(block, y) + mlp(block, y, first_norm=shared_norm)

        at = step(field, at, 1.0, solver)
    expected = plain.head(norm(plain.norm, at)[:, 0])
    with torch.set_grad_enabled(record):
        torch.testing.assert_close(plugged(x), expected, rtol=1e-4, atol=1e-4)
    assert plugged.plugs == ("neural-ode",)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("solver", SOLVERS)
@torch.no_grad()
def test_a_group_integrates_one_equation_over_its_layers(solver, steps):
    """Two layers share the first one's weights: [0, 2] in so many steps."""
    plain = host()
    plugged = plug(host(), solver=solver, sharing=2, steps=steps)
    assert len(plugged.blocks) == 2
    at = plain.tokens(images()).x
    for number in (0, 2):
        block = plain.blocks[number]
        for _ in range(steps):
            at = step(lambda y, b=block: attention(b, y) + mlp(b, y), at, 2 / steps, solver)
    expected = plain.head(norm(plain.norm, at)[:, 0])
    torch.testing.assert_close(plugged(images()), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_euler_over_a_group_is_tied_layers():
    def tied() -> ViT:
        model = host()
        for number in (1, 3):
            model.blocks[number].load_state_dict(model.blocks[number - 1].state_dict())
        return model

    x = images()
    torch.testing.assert_close(plug(host(), sharing=2)(x), plug(tied())(x), rtol=0, atol=0)
    usual = plug(host(), sharing=2, sublayers="sequential")
    torch.testing.assert_close(usual(x), tied()(x), rtol=0, atol=1e-6)


@torch.no_grad()
def test_sequential_layers_are_the_hosts_own():
    x = images()
    torch.testing.assert_close(plug(host(), sublayers="sequential")(x), host()(x))
    assert not torch.allclose(plug(host())(x), host()(x), atol=1e-3)


@torch.no_grad()
def test_without_an_mlp_the_layer_is_its_attention():
    plain, plugged = host(), plug(host())
    for model in (plain, plugged):
        for block in model.blocks:
            block.mlp.fc2.weight.zero_()
            block.mlp.fc2.bias.zero_()
    torch.testing.assert_close(plugged(images()), plain(images()))


# ---- theorems ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)]
)
def test_solvers_have_their_order(solver, order):
    """dx/dt = -x² + x, whose solution is known: halving the step divides the error by 2^order."""
    x = torch.tensor([0.2, 0.5, 1.5], dtype=torch.float64)
    exact = x * math.e**2 / (1 - x + x * math.e**2)
    errors = [
        (integrate(lambda y: y - y * y, x, time=2.0, steps=n, solver=solver) - exact).abs().max()
        for n in (20, 40, 80)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@torch.no_grad()
def test_solvers_of_a_layer_agree_in_the_limit():
    """Attention and MLP are smooth: all solvers find the same solution, each at its pace."""
    errors = {}
    reference = plug(host().double(), solver="rk4", steps=64)(images().double())
    for solver in SOLVERS:
        found = plug(host().double(), solver=solver, steps=16)(images().double())
        errors[solver] = (found - reference).abs().max().item()
    assert errors["rk4"] < 0.02 * min(errors["midpoint"], errors["heun"])
    assert max(errors["midpoint"], errors["heun"]) < 0.2 * errors["euler"]


@torch.no_grad()
def test_side_by_side_and_one_after_the_other_differ_by_the_square_of_the_step():
    """Both are first-order steps of the same equation; what differs is how the fields commute."""
    differences = []
    for size in (0.1, 0.05, 0.025):
        results = []
        for sublayers in ("parallel", "sequential"):
            model = host().double()
            for block in model.blocks:
                for layer in (block.mixing.proj, block.mlp.fc2):
                    layer.weight.mul_(size)
                    layer.bias.mul_(size)
            del model.blocks[1:]
            model = plug(model, sublayers=sublayers)
            results.append(model.run_blocks(model.tokens(images().double())).x)
        differences.append((results[0] - results[1]).norm())
    for coarse, fine in itertools.pairwise(differences):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.1)


@torch.no_grad()
def test_a_causal_bias_keeps_layers_causal():
    """As in a language model: later tokens change nothing in earlier ones, under any solver."""
    model = plug(host(), solver="rk4", sharing=2)
    bias = torch.full((1, 1, 5, 5), -math.inf).triu(1)
    tokens = model.tokens(images())
    context = model.context(tokens)._replace(bias=bias, proportional_bias=bias)
    changed = tokens.with_x(torch.cat([tokens.x[:, :3], torch.randn(2, 2, 64)], 1))
    for block in model.blocks:
        tokens, changed = block(tokens, context), block(changed, context)
    torch.testing.assert_close(tokens.x[:, :3], changed.x[:, :3])
    assert not torch.allclose(tokens.x[:, 3:], changed.x[:, 3:])


def test_gradients_are_those_of_the_steps():
    """Through two tied steps, by hand and by the group."""
    model = plug(host().double(), sharing=4, steps=2, solver="midpoint")
    plain = host().double()
    x = images().double()
    model(x).square().sum().backward()
    block, at = plain.blocks[0], plain.tokens(x).x
    for _ in range(2):
        at = step(lambda y: attention(block, y) + mlp(block, y), at, 2.0, "midpoint")
    plain.head(norm(plain.norm, at)[:, 0]).square().sum().backward()
    theirs = dict(block.named_parameters())
    for name, value in model.blocks[0].named_parameters():
        torch.testing.assert_close(value.grad, theirs[name].grad, rtol=1e-6, atol=1e-7)


def test_what_is_dropped_stays_dropped_throughout_a_solve():
    """Every sample is a deterministic solve of one of four equations."""
    model = build_vit("nano", classes=5, patch=8, resolution=16, drop_path=0.0).double()
    block = model.blocks[0]
    assert isinstance(block, Block)
    layer = ODEBlock(like=block, time=2.0, steps=3, solver="rk4", drop_path=0.4)
    tokens = model.tokens(images(batch=1).double().expand(64, -1, -1, -1))
    context = model.context(tokens)
    found = layer.train()(tokens, context).x.detach()
    kinds = []
    for keep_attention, keep_mlp in itertools.product((0, 1 / 0.6), repeat=2):

        def field(y: Tensor, a=keep_attention, m=keep_mlp) -> Tensor:
            return a * attention(block, y) + m * mlp(block, y)

        at = tokens.x[:1]
        for _ in range(3):
            at = step(field, at, 2 / 3, "rk4")
        kinds.append(at[0].detach())
    errors = torch.stack([(found - kind).abs().amax((1, 2)) for kind in kinds])
    assert errors.min(0).values.max() < 1e-6
    assert set(errors.argmin(0).tolist()) == {0, 1, 2, 3}
    torch.testing.assert_close(
        layer.eval()(tokens, context).x[0],
        ODEBlock(like=block, time=2.0, steps=3, solver="rk4").train()(tokens, context).x[0],
    )


def test_drop_path_of_a_group_is_the_mean_of_its_layers():
    model = plug(host(drop_path=0.3), sharing=2)
    assert [block.drop_rate for block in model.blocks] == pytest.approx([0.05, 0.25])


# ---- the network and its options -----------------------------------------------------------------


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 5_717_416), ("small", 22_050_664)])
def test_the_parameters_are_those_of_deit(size, parameters):
    """5.7 M and 22 M in DeiT's table 1; side by side costs nothing."""
    with torch.device("meta"):
        model = create(f"neural-ode-{size}")
        usual = create(f"vit-{size}")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in usual.parameters()) == parameters


@pytest.mark.parametrize("sharing", [1, 2, 3, 4, 6, 12])
def test_sharing_divides_the_layers_parameters(sharing):
    with torch.device("meta"):
        model = create(f"neural-ode-tiny(sharing={sharing})")
        layer = sum(p.numel() for p in create("neural-ode-tiny").host.blocks[0].parameters())
    count = sum(p.numel() for p in model.parameters())
    assert count == 5_717_416 - (12 - 12 // sharing) * layer
    with torch.device("meta"):
        one_norm = create("neural-ode-tiny(shared_norm=true)")
    assert sum(p.numel() for p in one_norm.parameters()) == 5_717_416 - 12 * 2 * 192


@torch.no_grad()
def test_operations_count_the_evaluations():
    embedding_and_head = 2 * 64 * (64 * 48 + 1000)

    def layers(**options) -> int:
        model = build("neural-ode-nano", **options).eval()
        return count_flops(model, torch.randn(1, 3, 32, 32)) - embedding_and_head

    euler = layers()
    assert layers(sublayers="sequential") == euler
    assert layers(sharing=4, steps=1, solver="rk4") == euler
    assert layers(solver="midpoint") == 2 * euler
    assert layers(solver="rk4") == 4 * euler


@torch.no_grad()
def test_the_complete_network_is_a_plugged_host():
    model = build("neural-ode-nano", classes=5, patch=8, resolution=16, solver="heun", sharing=2)
    other = plug(build_vit("nano", classes=5, patch=8, resolution=16), solver="heun", sharing=2)
    state = {
        name if name.startswith("head.") else f"host.{name}": value
        for name, value in other.state_dict().items()
    }
    model.load_state_dict(state)
    x = images()
    torch.testing.assert_close(model.eval()(x), other.eval()(x), rtol=0, atol=0)
    for ours, theirs in zip(model.features(x), other.features(x, stages=(1, 2)), strict=True):
        torch.testing.assert_close(ours.map, theirs.map, rtol=0, atol=0)


@torch.no_grad()
def test_it_plugs_together_with_others():
    model = create("vit-nano(patch=4)+neural-ode(solver=midpoint,sharing=2)+tome(r=6)", classes=3)
    x = torch.randn(2, 3, 32, 32)
    assert model.eval()(x).shape == (2, 3)
    # behind the first group 6 of 64 tokens are gone, behind the second 12
    assert model.forward_features(x).x.shape[1] == 65 - 12
    assert isinstance(create("vit-nano+spt-lsa+neural-ode", classes=3), ViT)
    adaptive = create("vit-nano(patch=4)+quadtree+neural-ode(solver=rk4)", classes=3).eval()
    together = adaptive(x)
    alone = torch.cat([adaptive(x[:1]), adaptive(x[1:])])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"solver": "rk45"}, "there is no solver='rk45'.*rk4"),
        ({"sharing": 3}, "4 layers can't share weights in groups of 3"),
        ({"sharing": 0}, "4 layers can't share weights in groups of 0"),
        ({"steps": 0}, "at least one step, got steps=0"),
        ({"sublayers": "side-by-side"}, "there is no sublayers='side-by-side'"),
    ],
    ids=str,
)
def test_options_that_do_not_work_are_named(options, sentence):
    with pytest.raises(PolypatchError, match=sentence):
        plug(host(), **options)
    with pytest.raises(PolypatchError, match=sentence):
        build("neural-ode-nano", **options)


def test_hosts_that_do_not_work_are_named():
    with pytest.raises(PolypatchError, match="number 0 is ODEBlock"):
        plug(plug(host()))
    with pytest.raises(PolypatchError, match="reduce no tokens"):
        create("vit-nano+tome+neural-ode")
    dropping = host()
    dropping.blocks[2].mixing.dropout = 0.1
    with pytest.raises(PolypatchError, match="layers with dropout"):
        plug(dropping)
    with pytest.raises(PolypatchError, match="patches of 64 pixels don't fit into 32"):
        build("neural-ode-nano", patch=64)
    with pytest.raises(PolypatchError, match="at least one step"):
        integrate(lambda y: y, torch.ones(1), steps=0)
    with pytest.raises(PolypatchError, match="there is no solver='leapfrog'"):
        integrate(lambda y: y, torch.ones(1), solver="leapfrog")


def test_options_reach_the_network():
    model = create("neural-ode-nano(patch=8,sharing=2,steps=3,solver=heun,shared_norm=true)")
    assert isinstance(model, NeuralODE)
    assert "parallel, heun, 3 steps over 2" in repr(model)
    assert model.feature_info == ((64, 8),) * 2
    grey = neural_ode.assemble(neural_ode.VARIANTS["neural-ode-nano"], channels=1)
    assert grey.host.patching.proj.in_channels == 1
