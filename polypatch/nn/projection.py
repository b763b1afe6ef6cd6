"""The linear layer, on the fastest kernel there is, with its activation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import fresh

__all__ = ["Linear", "linear"]

#: multiplications; what is smaller loses by the call more than it gains
SMALL = 2**20
#: weights; the same for compilers, which must not look at sizes that are left open
SMALL_MATRIX = 2**14

#: what oneDNN can do to a result before it is written, by the function that does it otherwise
FUSED: dict[Callable[[Tensor], Tensor] | None, tuple[str, str]] = {
    None: ("none", ""),
    fresh.gelu: ("gelu", "none"),
    fresh.relu: ("relu", ""),
    fresh.silu: ("swish", ""),
}


@cache
def _onednn() -> Callable[..., Tensor] | None:
    """The operation that torch.compile puts in place of a linear layer and its activation on a
    CPU. It isn't documented, so it may be missing from some build or version."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@torch.library.custom_op(
    "polypatch::linear",
    mutates_args=(),
    device_types="cpu",
    # Written out, as whoever wraps functions to check shapes hides the names in annotations.
    schema="(Tensor x, Tensor weight, Tensor? bias, str activation, str form) -> Tensor",
)
def _opaque(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, form: str) -> Tensor:
    """oneDNN's operation as one that torch.compile leaves as it is. By itself the compiler takes
    MKL for linear layers, which on processors of other makers is slower, and knows oneDNN's
    operation only with constant weights."""
    return _onednn()(x, weight, bias, activation, [], form)  # type: ignore[misc]


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, form: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.compiler.assume_constant_result
def _enabled() -> bool:
    return torch.backends.mkldnn.enabled and _onednn() is not None


def _usual(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the layer is left to torch: where gradients, casts or anybody who watches the
    operations (an exporter, a counter) need the operation that they know."""
    return (
        torch.is_grad_enabled()
        or not x.is_cpu
        or not x.dtype == weight.dtype == torch.float32
        or torch.is_autocast_enabled("cpu")
        or not _enabled()
        or any(type(t) not in (Tensor, nn.Parameter) for t in (x, weight, bias) if t is not None)
        or (_plain(weight) if torch.compiler.is_compiling() else _small_or_watched(x, weight))
    )


def _plain(weight: Tensor) -> bool:
    return torch.compiler.is_exporting() or weight.numel() < SMALL_MATRIX


def _small_or_watched(x: Tensor, weight: Tensor) -> bool:
    return (
        x.numel() * weight.shape[0] < SMALL
        or _get_current_dispatch_mode() is not None
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


def linear(
    x: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, "out dim"],
    bias: Float[Tensor, " out"] | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "*batch out"]:
    """``activation(F.linear(x, weight, bias))``.

    In inference on a CPU in float32 it is oneDNN's product, with the activation inside if it is
    one of :data:`FUSED`: 5 to 20 % faster than torch's own for the sizes of transformers, and with
    half of the passes over a wide result. Sums are taken in another order there, so that results
    differ in the last digits from those with gradients.
    """
    if _usual(x, weight, bias):
        y = F.linear(x, weight, bias)
        return y if activation is None else activation(y)
    name, form = FUSED.get(activation, FUSED[None])
    if torch.compiler.is_compiling():
        y = _opaque(x, weight, bias, name, form)
    else:
        y = _onednn()(x, weight, bias, name, [], form)  # type: ignore[misc]
    return y if activation in FUSED else activation(y)  # type: ignore[misc]


class Linear(nn.Linear):
    """:func:`linear` as a layer; weights and names are those of torch's."""

    def forward(
        self,
        input: Float[Tensor, "*batch dim"],
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "*batch out"]:
        return linear(input, self.weight, self.bias, activation)
