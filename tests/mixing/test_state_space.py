"""The scan against the recurrence, token by token, in float64; the mixer against its equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polypatch.errors import PolypatchError
from polypatch.mixing.state_space import (
    Memory,
    StateSpace,
    causal_convolution,
    gated_norm,
    rms_norm,
    scan,
)
from polypatch.training.cost import peak_memory


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Token by token, as the equations stand."""
    batch, tokens, heads, head_dim = x.shape
    share = heads // B.shape[2]
    if state is None:
        state = x.new_zeros(batch, heads, B.shape[3], head_dim)
    outputs = []
    for t in range(tokens):
        b, c = B[:, t].repeat_interleave(share, 1), C[:, t].repeat_interleave(share, 1)
        write = torch.einsum("bhn,bhp->bhnp", b, x[:, t])
        pace = dt[:, t, :, None, None]
        state = torch.exp(pace * A[:, None, None]) * state + pace * write
        y = torch.einsum("bhnp,bhn->bhp", state, c)
        if D is not None:
            y = y + (D if D.ndim == 2 else D[:, None]) * x[:, t]
        outputs.append(y)
    return torch.stack(outputs, 1), state


def drawn(
    batch: int = 2,
    tokens: int = 37,
    heads: int = 4,
    head_dim: int = 3,
    state: int = 5,
    groups: int = 2,
    seed: int = 0,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(batch, tokens, heads, head_dim),
        "dt": F.softplus(2 * normal(batch, tokens, heads) - 1),
        "A": -normal(heads).exp() * 2,
        "B": normal(batch, tokens, groups, state),
        "C": normal(batch, tokens, groups, state),
        "D": normal(heads),
        "state": normal(batch, heads, state, head_dim),
    }


# ---- the scan ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 70),
    groups=st.sampled_from([1, 2, 4]),
    chunk=st.integers(1, 30),
    segment=st.integers(1, 80),
    skip=st.sampled_from(["none", "head", "channel"]),
    start=st.booleans(),
    record=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_scan_is_the_recurrence(tokens, groups, chunk, segment, skip, start, record, seed):
    given_ = drawn(tokens=tokens, groups=groups, seed=seed)
    given_["D"] = {
        "none": None,
        "head": given_["D"],
        "channel": given_["D"][:, None] * torch.arange(1, 4),
    }[skip]
    given_["state"] = given_["state"] if start else None
    kept = {name: None if v is None else v.clone() for name, v in given_.items()}
    with torch.set_grad_enabled(record):
        y, state = scan(**given_, chunk=chunk, segment=segment)
    expected, last = recurrence(**kept)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-11)
    for name, value in given_.items():
        assert value is None or torch.equal(value, kept[name]), f"{name} was overwritten"


def test_gradients_are_the_recurrences():
    ours = {name: value.requires_grad_() for name, value in drawn().items()}
    theirs = {name: value.detach().clone().requires_grad_() for name, value in ours.items()}
    weights = [torch.randn(2, 37, 4, 3).double(), torch.randn(2, 4, 5, 3).double()]
    for values, function in (
        (ours, lambda v: scan(**v, chunk=8, segment=20)),
        (theirs, lambda v: recurrence(**v)),
    ):
        sum((w * out).sum() for w, out in zip(weights, function(values))).backward()
    for name, value in ours.items():
        torch.testing.assert_close(value.grad, theirs[name].grad, rtol=1e-9, atol=1e-10, msg=name)


def test_gradcheck():
    values = [v.requires_grad_() for v in drawn(batch=1, tokens=7, heads=2, groups=1).values()]

    def run(x, dt, A, B, C, D, state):
        return scan(x, dt, A, B, C, D=D, state=state, chunk=3, segment=5)

    assert torch.autograd.gradcheck(run, values)


@pytest.mark.parametrize(("largest", "allowed"), [(1.0, 1e-5), (1e3, 1e-3)])
def test_fifty_thousand_tokens_in_float32(largest, allowed):
    """As long as the paper's longest sequence. Errors are relative to what an output could be
    without cancellation; where half of the tokens make the state forget all there was, differences
    of large sums cost digits."""
    tokens, A = 50_176, -4.0
    random = np.random.default_rng(0)
    x, B, C = (random.standard_normal((tokens, 2)) for _ in range(3))
    dt = 10.0 ** random.uniform(-4, math.log10(largest), tokens)
    state, possible = np.zeros((2, 2)), np.zeros((2, 2))
    expected, size = np.empty((tokens, 2)), np.empty(tokens)
    for t in range(tokens):
        write, kept = dt[t] * np.outer(B[t], x[t]), math.exp(A * dt[t])
        state, possible = kept * state + write, kept * possible + np.abs(write)
        expected[t], size[t] = C[t] @ state, (np.abs(C[t]) @ possible).max()
    cast = [torch.from_numpy(v).float()[None, :, None] for v in (x, B, C)]
    pace = torch.from_numpy(dt).float()[None, :, None]
    y, last = scan(cast[0], pace, torch.tensor([A]), cast[1], cast[2])
    error = np.abs(y[0, :, 0].numpy() - expected).max(1) / size
    assert error.max() < allowed
    np.testing.assert_allclose(last[0, 0].numpy(), state, rtol=1e-3)


def test_a_huge_step_does_not_drown_the_small_ones_behind_it():
    given_ = drawn(batch=1, tokens=64, heads=1, groups=1)
    given_["dt"] = torch.full((1, 64, 1), 0.01).double()
    given_["dt"][:, 20] = 1e6
    exact, _ = recurrence(**given_)
    y, _ = scan(**{name: v.float() for name, v in given_.items()})
    error = (y - exact).abs().amax((0, 2, 3)) / exact.abs().amax((0, 2, 3))
    assert error.max() < 1e-4


def test_no_pace_is_no_token():
    """dt = 0 leaves the state alone, and gradients are finite there."""
    given_ = drawn(tokens=30)
    given_["dt"] = given_["dt"].masked_fill(torch.arange(30)[:, None] % 3 == 1, 0.0)
    given_["dt"].requires_grad_()
    real = torch.arange(30) % 3 != 1
    y, state = scan(**given_, chunk=8)
    fewer = {n: v[:, real] if n in ("x", "dt", "B", "C") else v for n, v in given_.items()}
    without, last = scan(**fewer, chunk=8)
    torch.testing.assert_close(y[:, real], without)
    torch.testing.assert_close(state, last)
    (gradient,) = torch.autograd.grad(y.sum(), given_["dt"])
    assert gradient.isfinite().all()


def test_later_tokens_change_nothing():
    given_ = drawn(tokens=50)
    other = {n: v.clone() for n, v in given_.items()}
    for name in ("x", "dt", "B", "C"):
        other[name][:, 31:] = other[name][:, 31:].flip(1)
    first, second = scan(**given_, chunk=8)[0], scan(**other, chunk=8)[0]
    torch.testing.assert_close(first[:, :31], second[:, :31], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(first[:, 31:], second[:, 31:])


def test_autocast_stays_exact():
    given_ = {name: value.float() for name, value in drawn(tokens=200).items()}
    plain, _ = scan(**given_)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = scan(**given_)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)
    half, state = scan(**{name: value.bfloat16() for name, value in given_.items()})
    assert half.dtype == torch.bfloat16
    assert state.dtype == torch.float32


def test_memory_beside_the_result_is_bounded():
    def beside(tokens: int) -> float:
        given_ = {n: v.float() for n, v in drawn(1, tokens, 4, 16, 16, 1).items()}
        result = given_["x"].numel() * 4
        return peak_memory(lambda: scan(**given_)) - 2 * result  # the pieces, and then the whole

    assert beside(16_384) < 1.2 * beside(8_192)


def test_groups_must_divide_heads():
    with pytest.raises(PolypatchError, match="4 heads don't divide into 3 groups"):
        scan(**drawn(groups=3))


# ---- around it -----------------------------------------------------------------------------------


def test_convolution_is_causal_and_per_channel():
    x, weight, bias = torch.randn(2, 9, 5), torch.randn(5, 1, 4), torch.randn(5)
    expected = bias.expand(2, 9, 5).clone()
    for t in range(9):
        for k in range(4):
            if t - 3 + k >= 0:
                expected[:, t] += weight[:, 0, k] * x[:, t - 3 + k]
    torch.testing.assert_close(causal_convolution(x, weight, bias), expected)
    later = causal_convolution(x[:, 4:], weight, bias, before=x[:, 1:4])
    torch.testing.assert_close(later, expected[:, 4:])
    torch.testing.assert_close(causal_convolution(x[:, :2], weight, bias), expected[:, :2])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("record", [False, True])
def test_gated_norm(groups, norm_first, record):
    y, gate, weight = torch.randn(3, 7, 8), torch.randn(3, 7, 8), torch.randn(8)
    opened = gate * torch.sigmoid(gate)
    value = y if norm_first else y * opened
    parts = value.unflatten(-1, (groups, -1))
    normed = (parts / (parts.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * weight
    expected = normed * opened if norm_first else normed
    with torch.set_grad_enabled(record):
        found = gated_norm(
            y.clone(), gate.clone(), weight, groups=groups, norm_first=norm_first, eps=1e-5
        )
        plain = gated_norm(y.clone(), gate.clone(), None)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(plain, y * opened)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm(dtype):
    x, weight = (3 * torch.randn(4, 6)).to(dtype), torch.randn(6).to(dtype)
    kept = x.clone()
    with torch.no_grad():
        fast = rms_norm(x, weight)
    torch.testing.assert_close(fast, F.rms_norm(x, (6,), weight, 1e-5))
    assert torch.equal(x, kept)


# ---- the mixer -----------------------------------------------------------------------------------


def literal(mixer: StateSpace, u: Tensor) -> Tensor:
    """The mixer's equations with the recurrence."""
    m, _, s, mixed, heads = mixer.parts
    projected = u @ mixer.in_proj.weight.T
    if mixer.in_proj.bias is not None:
        projected = projected + mixer.in_proj.bias
    z0, x0 = projected[..., :m], projected[..., m : 2 * m]
    z = projected[..., 2 * m : 2 * m + s]
    xbc = projected[..., 2 * m + s : 2 * m + s + mixed]
    dt = projected[..., -heads:]
    width = mixer.conv.kernel_size[0]
    padded = F.pad(xbc, (0, 0, width - 1, 0))
    convolved = sum(
        mixer.conv.weight[:, 0, k] * padded[:, k : k + u.shape[1]] for k in range(width)
    )
    if mixer.conv.bias is not None:
        convolved = convolved + mixer.conv.bias
    xbc = convolved * torch.sigmoid(convolved)
    shared = mixer.groups * mixer.state
    x, B, C = xbc[..., :s], xbc[..., s : s + shared], xbc[..., s + shared :]
    dt = torch.log1p(torch.exp(dt + mixer.dt_bias)).clamp(*mixer.limits)
    D = mixer.D if len(mixer.D) == heads else mixer.D.view(heads, -1)
    y, _ = recurrence(
        x.unflatten(-1, (heads, -1)),
        dt,
        -torch.exp(mixer.A_log),
        B.unflatten(-1, (mixer.groups, -1)),
        C.unflatten(-1, (mixer.groups, -1)),
        D,
        None,
    )
    y, gate = y.flatten(2), z * torch.sigmoid(z)
    if mixer.norm is None:
        y = y * gate
    else:
        y = y if mixer.norm_first else y * gate
        parts = y.unflatten(-1, (mixer.groups, -1))
        y = (parts / (parts.square().mean(-1, keepdim=True) + mixer.eps).sqrt()).flatten(-2)
        y = y * mixer.norm * (gate if mixer.norm_first else 1)
    y = torch.cat([z0 * torch.sigmoid(z0) * x0, y], -1)
    out = y @ mixer.out_proj.weight.T
    return out if mixer.out_proj.bias is None else out + mixer.out_proj.bias


OPTIONS = [
    {},
    {"groups": 2, "state": 3},
    {"bias": True, "conv_bias": False, "kernel": 3},
    {"norm": False},
    {"norm_first": True},
    {"norm_first": True, "groups": 4},
    {"skip_per_channel": True},
    {"limits": (0.05, 0.4)},
    {"scanned": 16},
    {"expand": 1, "head_dim": 16},
]


def made(seed: int = 0, **options) -> StateSpace:
    torch.manual_seed(seed)
    mixer = StateSpace(**{"dim": 16, "state": 5, "head_dim": 8, **options})
    mixer.init_weights()
    with torch.no_grad():
        for value in mixer.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return mixer.double()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_mixer_is_its_equations(options):
    mixer = made(**options)
    u = torch.randn(2, 21, 16, dtype=torch.float64)
    expected = literal(mixer, u)
    torch.testing.assert_close(mixer(u), expected, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(mixer(u), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cuts", [(1, 2, 3), (7, 8), (20,)], ids=str)
@torch.no_grad()
def test_a_sequence_in_pieces(options, cuts):
    mixer = made(**options)
    u = torch.randn(2, 21, 16, dtype=torch.float64)
    memory: Memory | None = None
    pieces = []
    for start, stop in zip((0, *cuts), (*cuts, 21)):
        y, memory = mixer.resume(u[:, start:stop], memory)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(u), rtol=1e-9, atol=1e-10)


def test_initialisation_is_the_authors():
    mixer = StateSpace(dim=256, state=16, head_dim=2, out_scale=0.5, bias=True, conv_init=0.2)
    mixer.init_weights()
    mixer.requires_grad_(False)
    dt = F.softplus(mixer.dt_bias)
    assert dt.min() * 1.001 >= 1e-3
    assert dt.max() <= 0.1 * 1.001
    # log-uniform: the middle half lies between 10^-2.5 and 10^-1.5
    share = ((dt > 10**-2.5) & (dt < 10**-1.5)).float().mean()
    assert 0.4 < share < 0.6
    rates = mixer.A_log.detach().exp()
    assert rates.min() >= 1
    assert rates.max() <= 16
    assert rates.mean() == pytest.approx(8.5, abs=1)
    assert mixer.in_proj.weight.abs().max() == pytest.approx(256**-0.5, rel=0.01)
    assert mixer.out_proj.weight.abs().max() == pytest.approx(0.5 * 512**-0.5, rel=0.01)
    assert mixer.conv.weight.abs().max() == pytest.approx(0.2, rel=0.01)
    assert mixer.conv.bias is not None
    assert mixer.conv.bias.abs().max() == pytest.approx(0.5, rel=0.01)
    for zero in (mixer.in_proj.bias, mixer.out_proj.bias):
        assert zero is not None
        assert not zero.any()
    assert (mixer.D == 1).all()
    low = StateSpace(dim=16, head_dim=2, least_step=0.05)
    low.init_weights()
    assert F.softplus(low.dt_bias).min() >= 0.0499


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head_dim": 24}, "32 of an inner width of 32 can't be cut into heads of 24"),
        ({"scanned": 40}, "40 of an inner width of 32"),
        ({"groups": 3}, "4 heads don't divide into 3 groups"),
    ],
    ids=str,
)
def test_sizes_that_do_not_divide(options, said):
    with pytest.raises(PolypatchError, match=said):
        made(**options)
