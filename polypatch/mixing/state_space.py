"""State-space mixing as in Mamba-2: a linear recurrence over tokens, computed in parallel.

Dao and Gu, *Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
State Space Duality* (ICML 2024, arXiv 2405.21060). Each head has a matrix h (state × head_dim) that
forgets and takes in, token by token, at a pace dt > 0 that the token itself sets; A < 0::

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_tᵀ
    y_t = h_tᵀ C_t + D x_t

:func:`scan` computes that without going through the tokens (sec. 6 of the paper): with c_i the sum
of dt A from the start of a chunk up to token i, tokens of one chunk talk through a masked matrix as
in attention, and chunks pass on one state each::

    y_i     = Σ_{j ≤ i} (C_i·B_j) exp(c_i - c_j) dt_j x_j + exp(c_i) h_beforeᵀ C_i + D x_i
    h_after = exp(c_end) h_before + Σ_j exp(c_end - c_j) dt_j B_j x_jᵀ

The cost is linear in the number of tokens. Long sequences are taken in segments, which bounds the
memory that is needed beside the result.

:class:`StateSpace` is the mixer around it: projections, a short causal convolution, the scan, a
gate and a norm. :meth:`StateSpace.resume` goes on where an earlier piece of the sequence ended.

Traps:

* No exponent is ever positive: the upper triangle is masked *before* exp, and sums start anew in
  each chunk, so that differences are between numbers of moderate size. A token that makes the state
  forget more than float32 can express counts as one that makes it forget everything; otherwise its
  size would drown the small steps behind it.
* The scan runs in float32 at least, under autocast too: 16 bits are too few for sums of exponents.
* dt = 0 leaves the state as it is: padding and masked tokens are skipped that way.
* The gate acts *before* the norm, and with several groups each is normed on its own, as in the
  authors' kernels; the slow reference that their package holds beside the kernels norms the whole
  width instead. With one group, the usual case, both are the same.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError
from ..nn import Linear, fresh

__all__ = ["Memory", "StateSpace", "causal_convolution", "gated_norm", "rms_norm", "scan"]

#: the most tokens of a chunk and of a segment
CHUNK, SEGMENT = 80, 2048


# ---- the recurrence ------------------------------------------------------------------------------


def scan(
    x: Float[Tensor, "batch tokens heads head_dim"],
    dt: Float[Tensor, "batch tokens heads"],
    A: Float[Tensor, " heads"],
    B: Float[Tensor, "batch tokens groups state"],
    C: Float[Tensor, "batch tokens groups state"],
    *,
    D: Float[Tensor, " heads"] | Float[Tensor, "heads head_dim"] | None = None,
    state: Float[Tensor, "batch heads state head_dim"] | None = None,
    chunk: int = CHUNK,
    segment: int = SEGMENT,
) -> tuple[
    Float[Tensor, "batch tokens heads head_dim"], Float[Tensor, "batch heads state head_dim"]
]:
    """The recurrence above for all tokens, and the state behind the last one.

    Args:
        dt: pace, 0 or more.
        A: below 0.
        B, C: what writes into and reads from the state; ``heads / groups`` heads share them.
        D: skip, (heads,) or (heads, head_dim).
        state: to start from; default: zeros.
        chunk: most tokens that talk through one matrix; the result doesn't depend on it.
        segment: most tokens in work at a time, likewise.

    Raises:
        PolypatchError: a number of heads that the groups don't divide.
    """
    batch, tokens, heads, head_dim = x.shape
    groups, size = B.shape[2:]
    if heads % groups:
        raise PolypatchError(f"{heads} heads don't divide into {groups} groups")
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return scan(x, dt, A, B, C, D=D, state=state, chunk=chunk, segment=segment)
    dtype = x.dtype
    x, dt, A, B, C = (_exact(value) for value in (x, dt, A, B, C))
    if state is None:
        now = x.new_zeros(batch, groups, size, heads // groups, head_dim)
    else:
        now = _exact(state).unflatten(1, (groups, -1)).transpose(2, 3)
    done: list[Tensor] = []
    for start in range(0, tokens, segment):
        part = slice(start, min(start + segment, tokens))
        y, now = _segment(x[:, part], dt[:, part], A, B[:, part], C[:, part], now, chunk)
        if D is not None:
            y = torch.addcmul(y, x[:, part], _exact(D) if D.ndim == 2 else _exact(D)[:, None])
        done.append(y)
    y = torch.cat(done, 1) if len(done) > 1 else done[0]
    return y.to(dtype), now.transpose(2, 3).flatten(1, 2)


def _segment(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """:func:`scan` of one segment; its state: (batch, groups, state, heads a group, head_dim)."""
    tokens = x.shape[1]
    size = _chunk_size(tokens, longest)
    if padding := -tokens % size:
        x, B, C = (F.pad(value, (0, 0, 0, 0, 0, padding)) for value in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, padding))
    # Shapes below: batch, chunk, place in it (q), heads or groups, …
    x, dt, B, C = (value.unflatten(1, (-1, size)) for value in (x, dt, B, C))
    batch, chunks, _, heads, head_dim = x.shape
    groups = B.shape[3]

    tiny = torch.finfo(x.dtype).tiny
    fall = (dt * A).clamp_min(math.log(tiny)).cumsum(2)
    # exp(fall_i + rise_j) = exp(c_i - c_j) dt_j: the pace needs no pass over the matrix.
    rise = dt.clamp_min(tiny).log() - fall

    # Within the chunks: (batch, chunk, heads, q, q) @ (batch, chunk, heads, q, head_dim).
    above = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    exponent = fall.transpose(2, 3)[..., :, None] + rise.transpose(2, 3)[..., None, :]
    weights = exponent.masked_fill_(above, -math.inf).exp_()
    alike = C.transpose(2, 3) @ B.permute(0, 1, 3, 4, 2)
    weights = _times(weights.unflatten(2, (groups, -1)), alike[:, :, :, None]).flatten(2, 3)
    inside = (weights @ x.transpose(2, 3)).transpose(2, 3)

    # What each chunk leaves behind, and what it finds: (batch, chunk, groups, state, …).
    left = x * (fall[:, :, -1:] + rise).exp()[..., None]
    left = left.reshape(batch, chunks, size, groups, -1).transpose(2, 3)
    left = (B.permute(0, 1, 3, 4, 2) @ left).unflatten(-1, (-1, head_dim))
    kept = fall[:, :, -1].exp().view(batch, chunks, groups, 1, -1, 1)
    found = []
    for one, gain in zip(left.unbind(1), kept.unbind(1)):
        found.append(state)
        state = torch.addcmul(one, state, gain)
    read = C.transpose(2, 3) @ torch.stack(found, 1).flatten(-2)
    read = read.transpose(2, 3).reshape(batch, chunks, size, heads, head_dim)
    y = fresh.add(inside, _times(read, fall.exp()[..., None]))
    return y.flatten(1, 2)[:, :tokens], state


def _chunk_size(tokens: int, longest: int) -> int:
    """Between half and all of ``longest``, so that little is padded."""
    if tokens <= longest:
        return tokens
    return min(range(longest, longest // 2, -1), key=lambda size: -tokens % size)


def _exact(value: Tensor) -> Tensor:
    """In float32, or what is float64 as it is."""
    return value if value.dtype == torch.float64 else value.float()


def _times(new: Tensor, other: Tensor) -> Tensor:
    """new · other; without gradients in the memory of ``new``, which nobody else may read."""
    return new * other if torch.is_grad_enabled() else new.mul_(other)


# ---- around it -----------------------------------------------------------------------------------


def causal_convolution(
    x: Float[Tensor, "batch tokens channels"],
    weight: Float[Tensor, "channels 1 kernel"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    before: Float[Tensor, "batch past channels"] | None = None,
) -> Float[Tensor, "batch tokens channels"]:
    """Each channel by itself over a token and the ``kernel - 1`` in front of it; ``before``: those
    in front of the first (default: zeros)."""
    tokens, past = x.shape[1], weight.shape[-1] - 1
    if before is not None:
        x, past = torch.cat([before.to(x.dtype), x], 1), 0
    # As a map of height 1 in channels-last layout, which is what the tensor is: far faster on a CPU
    # than a convolution over (channels, tokens).
    maps = x.unsqueeze(1).permute(0, 3, 1, 2)
    maps = F.conv2d(maps, weight.unsqueeze(2), bias, padding=(0, past), groups=x.shape[-1])
    return maps.squeeze(2).transpose(1, 2)[:, :tokens]


def rms_norm(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, " dim"], *, eps: float = 1e-5
) -> Float[Tensor, "*batch dim"]:
    """x / √(mean(x²) + eps) · weight, in three passes where no gradient is recorded."""
    if torch.is_grad_enabled() or x.dtype not in (torch.float32, torch.float64):
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.mul(size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()).mul_(weight)


def gated_norm(
    y: Float[Tensor, "*batch dim"],
    gate: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, " dim"] | None,
    *,
    groups: int = 1,
    norm_first: bool = False,
    eps: float = 1e-5,
) -> Float[Tensor, "*batch dim"]:
    """RMS norm of y · silu(gate), each of the groups by itself; both tensors may be overwritten.

    ``weight``: None for the gate alone; ``norm_first``: the gate acts on the normed y.
    """
    gate = fresh.silu(gate)
    if weight is None:
        return _times(y, gate)
    if not norm_first:
        y = _times(y, gate)
    if groups == 1:
        y = rms_norm(y, weight, eps=eps)
    else:
        y = y.unflatten(-1, (groups, -1))
        y = F.rms_norm(y, y.shape[-1:], None, eps).flatten(-2) * weight
    return _times(y, gate) if norm_first else y


class Memory(NamedTuple):
    """What :meth:`StateSpace.resume` needs to know of the tokens before."""

    recent: Float[Tensor, "batch past channels"]
    state: Float[Tensor, "batch heads state head_dim"]


class StateSpace(nn.Module):
    """The Mamba-2 mixer, causal: a token sees itself and those in front of it.

    With [z | x B C | dt] = W u of the tokens u::

        x, B, C = silu(causal convolution of x B C);  dt = softplus(dt + dt_bias);  A = -exp(A_log)
        output  = W_out RMSNorm(scan(x, dt, A, B, C, D) · silu(z))

    Args:
        dim: width of the tokens.
        state: size of a head's state, times ``head_dim``.
        expand: inner width over ``dim``.
        scanned: how much of the inner width goes through the scan; the rest is a plain gated
            product. Default: all of it.
        groups: how many B and C there are; heads share them.
        kernel: of the convolution.
        bias, conv_bias: of the projections, of the convolution.
        norm, norm_first: whether there is the norm, and whether it acts before the gate.
        skip_per_channel: D per channel instead of per head.
        limits: between which dt is kept.
        steps, least_step: initial dt, log-uniform between ``steps``, then at least ``least_step``.
        rates: initial -A, uniform between them.
        conv_init: the convolution's weights are uniform up to this; default: by fan-in.
        out_scale: initial size of the output projection, relative to the usual one.

    Raises:
        PolypatchError: sizes that don't divide.
    """

    def __init__(
        self,
        *,
        dim: int,
        state: int = 64,
        head_dim: int = 64,
        expand: float = 2,
        scanned: int | None = None,
        groups: int = 1,
        kernel: int = 4,
        bias: bool = False,
        conv_bias: bool = True,
        norm: bool = True,
        norm_first: bool = False,
        skip_per_channel: bool = False,
        limits: tuple[float, float] = (0.0, math.inf),
        steps: tuple[float, float] = (1e-3, 0.1),
        least_step: float = 1e-4,
        rates: tuple[float, float] = (1.0, 16.0),
        conv_init: float | None = None,
        out_scale: float = 1.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        inner = int(expand * dim)
        scanned = inner if scanned is None else scanned
        if scanned % head_dim or not 0 < scanned <= inner:
            raise PolypatchError(
                f"{scanned} of an inner width of {inner} can't be cut into heads of {head_dim}"
            )
        heads = scanned // head_dim
        if heads % groups:
            raise PolypatchError(f"{heads} heads don't divide into {groups} groups")
        self.state, self.head_dim, self.groups = state, head_dim, groups
        self.norm_first, self.eps = norm_first, eps
        self.limits = (float(limits[0]), float(limits[1]))
        self.steps, self.least_step, self.rates = steps, least_step, rates
        self.conv_init, self.out_scale = conv_init, out_scale
        mixed = scanned + 2 * groups * state
        #: of the plain product twice, gate, what is convolved, dt
        self.parts = (inner - scanned, inner - scanned, scanned, mixed, heads)
        self.in_proj = Linear(dim, sum(self.parts), bias=bias)
        self.conv = nn.Conv1d(mixed, mixed, kernel, groups=mixed, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(scanned if skip_per_channel else heads))
        self.norm = nn.Parameter(torch.ones(scanned)) if norm else None
        self.out_proj = Linear(inner, dim, bias=bias)

    def init_weights(self) -> None:
        """The authors' initialisation.

        | parameter        | value                                                       |
        |------------------|-------------------------------------------------------------|
        | projections      | uniform up to 1/√fan-in, ``out_proj`` · ``out_scale``; bias 0 |
        | convolution      | uniform up to 1/√kernel, or ``conv_init``; bias up to 1/√kernel |
        | dt_bias          | such that softplus of it is log-uniform in ``steps``        |
        | A_log            | log of uniform in ``rates``                                 |
        | D, norm          | 1                                                           |
        """
        for linear in (self.in_proj, self.out_proj):
            linear.reset_parameters()
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.conv.reset_parameters()
        if self.conv_init is not None:
            nn.init.uniform_(self.conv.weight, -self.conv_init, self.conv_init)
        with torch.no_grad():
            self.out_proj.weight.mul_(self.out_scale)
            low, high = (math.log(step) for step in self.steps)
            dt = torch.empty_like(self.dt_bias).uniform_(low, high).exp_()
            dt.clamp_(min=self.least_step)
            self.dt_bias.copy_(dt + (-torch.expm1(-dt)).log())
            self.A_log.uniform_(*self.rates).log_()
        nn.init.ones_(self.D)
        if self.norm is not None:
            nn.init.ones_(self.norm)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return self._mix(x, None)[0]

    def resume(
        self, x: Float[Tensor, "batch tokens dim"], memory: Memory | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], Memory]:
        """The next piece of a sequence, of any length from 1 on, and the memory for the piece
        behind it; ``memory`` None: this is the first piece."""
        y, convolved, state = self._mix(x, memory)
        past = self.conv.kernel_size[0] - 1
        before = convolved.new_zeros(x.shape[0], past, convolved.shape[-1])
        if memory is not None:
            before = memory.recent.to(convolved.dtype)
        return y, Memory(torch.cat([before, convolved], 1)[:, convolved.shape[1] :], state)

    def _mix(self, x: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor, Tensor]:
        """Output, what went into the convolution, and the state behind the last token."""
        plain, straight, gate, convolved, dt = self.in_proj(x).split(self.parts, -1)
        recent, state = (None, None) if memory is None else memory
        mixed = causal_convolution(convolved, self.conv.weight, self.conv.bias, before=recent)
        shared = self.groups * self.state
        values, B, C = fresh.silu(mixed).split([gate.shape[-1], shared, shared], -1)
        dt = F.softplus(_exact(dt) + _exact(self.dt_bias)).clamp(*self.limits)
        skip = self.D
        if len(skip) != len(self.A_log):
            skip = skip.unflatten(0, (-1, self.head_dim))
        y, state = scan(
            values.unflatten(-1, (-1, self.head_dim)),
            dt,
            -_exact(self.A_log).exp(),
            B.unflatten(-1, (self.groups, -1)),
            C.unflatten(-1, (self.groups, -1)),
            D=skip,
            state=state,
        )
        y = gated_norm(
            y.flatten(2),
            gate,
            self.norm,
            groups=self.groups,
            norm_first=self.norm_first,
            eps=self.eps,
        )
        if plain.shape[-1]:
            y = torch.cat([F.silu(plain) * straight, y], -1)
        return self.out_proj(y), convolved, state
