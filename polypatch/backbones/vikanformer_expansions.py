"""Kolmogorov–Arnold layers: learned functions of each input, summed, in place of a linear map.

Every layer computes ``y_o = Σ_i φ_oi(x_i)`` and differs in what the φ are made of:

| class                  | φ_oi(x)                                          | known as      |
|------------------------|--------------------------------------------------|---------------|
| ``SplineExpansion``    | w silu(x) + s Σ_k c_k B_k(x), B-splines          | Efficient-KAN |
| ``RadialExpansion``    | w silu(x) + Σ_k c_k exp(-((LN(x)_i - g_k) / δ)²) | FastKAN       |
| ``SineExpansion``      | Σ_k a_k sin(f_k x + p_ik)                        | SineKAN       |
| ``FourierExpansion``   | Σ_k a_k cos(k x) + b_k sin(k x)                  | FourierKAN    |
| ``ChebyshevExpansion`` | Σ_k c_k T_k(tanh x)                              | ChebyKAN      |
| ``LinearExpansion``    | w x                                              | the control   |

A module holds ``maps`` independent layers of one size and takes (\\*, maps, inputs): the attention
of ViKANformer has three for each head, and one product does for all. The values of the basis are
features, and what is learned is a matrix on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..nn import fresh, in_pieces, linear

__all__ = [
    "EXPANSIONS",
    "ChebyshevExpansion",
    "Expansion",
    "FourierExpansion",
    "LinearExpansion",
    "RadialExpansion",
    "SineExpansion",
    "Single",
    "SplineExpansion",
    "bspline_basis",
    "fit_spline",
    "sine_phases",
    "uniform_knots",
]


def mapped(
    features: Float[Tensor, "*batch maps features"], weight: Float[Tensor, "maps out features"]
) -> Float[Tensor, "*batch maps out"]:
    """Each map's features through its matrix."""
    if len(weight) == 1:
        return linear(features, weight[0])
    return torch.einsum("...mf,mof->...mo", features, weight)


def _grouped(
    product: Callable[[Tensor], Tensor], x: Float[Tensor, "*batch groups inputs"], *, features: int
) -> Float[Tensor, "*batch maps outputs"]:
    """``product(x)`` in groups of samples, as far as there is a batch to cut."""
    if x.ndim < 3:
        return product(x)
    return in_pieces(product, x, widest=math.prod(x.shape[1:-1]) * features)


def uniform_knots(
    *, grid: int, order: int, low: float = -1.0, high: float = 1.0
) -> Float[Tensor, " knots"]:
    """``grid`` intervals on [low, high] and ``order`` more of the same width on both sides."""
    width = (high - low) / grid
    return torch.arange(-order, grid + order + 1) * width + low


def bspline_basis(
    x: Float[Tensor, "*batch inputs"], knots: Float[Tensor, "*maps inputs knots"], order: int
) -> Float[Tensor, "*batch inputs coefficients"]:
    """B-splines of this order at x (Cox and de Boor); (knots - 1 - order) of them.

    Cells are half open, left ≤ x < right: the splines are 0 outside the knots, and sum to 1 only
    where ``order`` knots lie on both sides.
    """
    x = x[..., None]
    above = x - knots
    bases = ((above[..., :-1] >= 0) & (above[..., 1:] < 0)).to(x.dtype)
    for k in range(1, order + 1):
        left, right = knots[..., : -(k + 1)], knots[..., k + 1 :]
        rising = above[..., : -(k + 1)] * (1 / (knots[..., k:-1] - left))
        falling = above[..., k + 1 :] * (1 / (knots[..., 1:-k] - right))
        bases = rising * bases[..., :-1] + falling * bases[..., 1:]
    return bases


def fit_spline(
    x: Float[Tensor, "points inputs"],
    y: Float[Tensor, "points inputs outputs"],
    knots: Float[Tensor, "inputs knots"],
    order: int,
) -> Float[Tensor, "outputs inputs coefficients"]:
    """Coefficients of the splines through the given points: least squares, and the smallest ones
    where there are fewer points than splines."""
    bases = bspline_basis(x, knots, order).transpose(0, 1)  # inputs, points, coefficients
    return (torch.linalg.pinv(bases) @ y.transpose(0, 1)).permute(2, 0, 1)


def sine_phases(*, inputs: int, grid: int) -> Float[Tensor, "inputs grid"]:
    """SineKAN's fixed phases: l / (grid + 1) plus π spread over the inputs, then a recursion that
    keeps sums of ``grid`` sines alike in size for every grid. The constants are the authors' fit.
    """
    rate, power, offset = 0.9724108095811765, 0.9884401790754128, 0.999449553483052
    phase = torch.arange(1, grid + 1) / (grid + 1) + torch.linspace(0, math.pi, inputs)[:, None]
    factors = [rate * i**-power + offset for i in range(1, grid)]
    return phase * math.prod(factors)


class Expansion(nn.Module):
    """Base of the layers: ``maps`` of them, from ``inputs`` to ``outputs`` values."""

    #: whether the features are the same whatever the map, so that copies can share them
    shares_features = True

    def __init__(self, *, inputs: int, outputs: int, maps: int = 1) -> None:
        super().__init__()
        self.inputs, self.outputs, self.maps = inputs, outputs, maps

    def features(
        self, x: Float[Tensor, "*batch maps inputs"]
    ) -> Float[Tensor, "*batch maps features"]:
        """The values of the basis functions."""
        raise TypeError(f"{type(self).__name__} defines no features()")

    def matrix(self) -> Float[Tensor, "maps outputs features"]:
        """What is learned on them."""
        raise TypeError(f"{type(self).__name__} defines no matrix()")

    def offset(self) -> Tensor | None:
        """(maps, outputs), or None."""
        return None

    def init_weights(self) -> None:
        raise TypeError(f"{type(self).__name__} defines no init_weights()")

    def forward(
        self, x: Float[Tensor, "*batch maps inputs"]
    ) -> Float[Tensor, "*batch maps outputs"]:
        weight, offset = self.matrix(), self.offset()

        def product(x: Tensor) -> Tensor:
            y = mapped(self.features(x), weight)
            return y if offset is None else y + offset

        return _grouped(product, x, features=weight.shape[-1])

    def repeated(
        self, x: Float[Tensor, "*batch groups inputs"]
    ) -> Float[Tensor, "*batch maps outputs"]:
        """Every group of inputs through its ``maps / groups`` maps: numbers g, groups + g, …"""
        copies = self.maps // x.shape[-2]
        if not self.shares_features:
            return self(torch.cat([x] * copies, dim=-2))
        weight, offset = self.matrix().unflatten(0, (copies, -1)), self.offset()

        def product(x: Tensor) -> Tensor:
            y = torch.einsum("...gf,cgof->...cgo", self.features(x), weight).flatten(-3, -2)
            return y if offset is None else y + offset

        return _grouped(product, x, features=weight.shape[-1])


class Single(nn.Module):
    """One map by itself: (\\*, inputs) → (\\*, outputs)."""

    def __init__(self, expansion: Expansion) -> None:
        super().__init__()
        self.expansion = expansion

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return self.expansion(x[..., None, :])[..., 0, :]


class LinearExpansion(Expansion):
    """An affine map, the control of all comparisons."""

    def __init__(self, *, inputs: int, outputs: int, maps: int = 1) -> None:
        super().__init__(inputs=inputs, outputs=outputs, maps=maps)
        self.weight = nn.Parameter(torch.empty(maps, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(maps, outputs))

    def init_weights(self) -> None:
        """torch's default: uniform within 1 / sqrt(inputs)."""
        bound = self.inputs**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def features(self, x: Float[Tensor, "*batch maps inputs"]) -> Tensor:
        return x

    def matrix(self) -> Tensor:
        return self.weight

    def offset(self) -> Tensor:
        return self.bias


class SplineExpansion(Expansion):
    """Efficient-KAN's layer: a SiLU with a weight, and B-splines with a weight and a scale.

    Where inputs leave the knots (as behind a layer norm they often do) only the SiLU acts. All maps
    have the same knots, (inputs, knots).
    """

    def __init__(
        self, *, inputs: int, outputs: int, maps: int = 1, grid: int = 5, order: int = 3,
        low: float = -1.0, high: float = 1.0, scaled: bool = True, noise: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(inputs=inputs, outputs=outputs, maps=maps)
        self.intervals, self.order, self.noise = grid, order, noise
        self.low, self.high = low, high
        self.base_weight = nn.Parameter(torch.empty(maps, outputs, inputs))
        self.spline_weight = nn.Parameter(torch.empty(maps, outputs, inputs, grid + order))
        self.spline_scaler = nn.Parameter(torch.empty(maps, outputs, inputs)) if scaled else None
        self.grid: Tensor
        self.register_buffer("grid", torch.empty(inputs, grid + 2 * order + 1))

    def init_weights(self) -> None:
        """Weight and scale as torch's linear layers (uniform within 1 / sqrt(inputs)); the splines
        run through small noise at the inner knots."""
        knots = uniform_knots(grid=self.intervals, order=self.order, low=self.low, high=self.high)
        with torch.no_grad():
            self.grid.copy_(knots.expand_as(self.grid))
            bound = self.inputs**-0.5
            for weight in (self.base_weight, self.spline_scaler):
                if weight is not None:
                    nn.init.uniform_(weight, -bound, bound)
            inner = knots[self.order : self.order + self.intervals + 1]
            points = inner.to(self.grid)[:, None].expand(-1, self.inputs)
            for number in range(self.maps):
                size = (self.intervals + 1, self.inputs, self.outputs)
                noise = (torch.rand(size, device=self.grid.device) - 0.5) * self.noise
                fit = fit_spline(points, noise / self.intervals, self.grid, self.order)
                self.spline_weight[number] = fit

    def features(self, x: Float[Tensor, "*batch maps inputs"]) -> Tensor:
        bases = bspline_basis(x, self.grid.to(x.dtype), self.order)
        return torch.cat([F.silu(x), bases.flatten(-2)], dim=-1)

    def matrix(self) -> Tensor:
        splines = self.spline_weight
        if self.spline_scaler is not None:
            splines = splines * self.spline_scaler[..., None]
        return torch.cat([self.base_weight, splines.flatten(2)], dim=-1)


class RadialExpansion(Expansion):
    """FastKAN's layer: Gaussians of the normed input, and a SiLU of the raw one.

    The centres are frozen parameters, as the authors' state dicts have them.
    """

    shares_features = False

    def __init__(
        self, *, inputs: int, outputs: int, maps: int = 1, grid: int = 8,
        low: float = -2.0, high: float = 2.0, base: bool = True, std: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(inputs=inputs, outputs=outputs, maps=maps)
        self.low, self.high, self.std = low, high, std
        self.width = (high - low) / (grid - 1)
        self.norm_weight = nn.Parameter(torch.empty(maps, inputs))
        self.norm_bias = nn.Parameter(torch.empty(maps, inputs))
        self.centres = nn.Parameter(torch.empty(maps, grid), requires_grad=False)
        self.spline_weight = nn.Parameter(torch.empty(maps, outputs, inputs * grid))
        self.base_weight = nn.Parameter(torch.empty(maps, outputs, inputs)) if base else None
        self.base_bias = nn.Parameter(torch.empty(maps, outputs)) if base else None

    def init_weights(self) -> None:
        """Gaussians: normal, std 0.1, cut; the SiLU's map as torch's linear layers; norm 1, 0."""
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        with torch.no_grad():
            steps = self.centres.shape[1]
            self.centres.copy_(torch.linspace(self.low, self.high, steps).expand_as(self.centres))
        nn.init.trunc_normal_(self.spline_weight, std=self.std)
        bound = self.inputs**-0.5
        for value in (self.base_weight, self.base_bias):
            if value is not None:
                nn.init.uniform_(value, -bound, bound)

    def basis(
        self, x: Float[Tensor, "*batch maps inputs"]
    ) -> Float[Tensor, "*batch maps inputs grid"]:
        """exp(-((x - centre) / δ)²), without the norm; δ is the distance of the centres."""
        distance = (x / self.width)[..., None] - (self.centres / self.width)[:, None]
        return fresh.gaussian(distance)

    def features(self, x: Float[Tensor, "*batch maps inputs"]) -> Tensor:
        normed = F.layer_norm(x, (self.inputs,)) * self.norm_weight + self.norm_bias
        features = self.basis(normed).flatten(-2)
        return features if self.base_weight is None else torch.cat([features, F.silu(x)], dim=-1)

    def matrix(self) -> Tensor:
        if self.base_weight is None:
            return self.spline_weight
        return torch.cat([self.spline_weight, self.base_weight], dim=-1)

    def offset(self) -> Tensor | None:
        return self.base_bias


class SineExpansion(Expansion):
    """SineKAN's layer: sines with learned frequencies, shared by all inputs, and fixed phases."""

    shares_features = False

    def __init__(
        self, *, inputs: int, outputs: int, maps: int = 1, grid: int = 8, first: bool = False,
        normed: bool = True, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(inputs=inputs, outputs=outputs, maps=maps)
        self.divided = normed and not first
        self.amplitudes = nn.Parameter(torch.empty(maps, outputs, inputs, grid))
        self.freq = nn.Parameter(torch.empty(maps, 1, 1, 1, grid))
        self.bias = nn.Parameter(torch.empty(maps, 1, outputs)) if bias else None
        self.phase: Tensor
        self.register_buffer("phase", torch.empty(maps, 1, 1, inputs, grid))

    def init_weights(self) -> None:
        """Amplitudes uniform within 1 / (outputs l) for the l-th sine; frequencies l / (grid + 1),
        or l in a first layer; bias 1 / outputs."""
        grid = self.freq.shape[-1]
        counted = torch.arange(1, grid + 1, device=self.freq.device)
        with torch.no_grad():
            self.amplitudes.uniform_(-1, 1).div_(self.outputs * counted)
            self.freq.copy_((counted / (grid + 1 if self.divided else 1)).expand_as(self.freq))
            phases = sine_phases(inputs=self.inputs, grid=grid)
            self.phase.copy_(phases.expand_as(self.phase))
            if self.bias is not None:
                self.bias.fill_(1 / self.outputs)

    def features(self, x: Float[Tensor, "*batch maps inputs"]) -> Tensor:
        return torch.sin(x[..., None] * self.freq[:, 0, 0] + self.phase[:, 0, 0]).flatten(-2)

    def matrix(self) -> Tensor:
        return self.amplitudes.flatten(2)

    def offset(self) -> Tensor | None:
        return None if self.bias is None else self.bias[:, 0]


class FourierExpansion(Expansion):
    """FourierKAN's layer: cosines and sines of whole frequencies 1 … grid."""

    def __init__(
        self, *, inputs: int, outputs: int, maps: int = 1, grid: int = 28, bias: bool = True,
        smooth: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(inputs=inputs, outputs=outputs, maps=maps)
        self.smooth = smooth
        self.coefficients = nn.Parameter(torch.empty(maps, 2, outputs, inputs, grid))
        self.bias = nn.Parameter(torch.empty(maps, 1, outputs)) if bias else None

    def init_weights(self) -> None:
        """Normal, std 1 / sqrt(inputs grid); with ``smooth`` 1 / (sqrt(inputs) k²)."""
        grid = self.coefficients.shape[-1]
        counted = torch.arange(1, grid + 1, device=self.coefficients.device)
        with torch.no_grad():
            damping = counted**2 if self.smooth else math.sqrt(grid)
            self.coefficients.normal_().div_(math.sqrt(self.inputs) * damping)
            if self.bias is not None:
                self.bias.zero_()

    def features(self, x: Float[Tensor, "*batch maps inputs"]) -> Tensor:
        counted = torch.arange(1, self.coefficients.shape[-1] + 1, device=x.device)
        angles = x[..., None] * counted.to(x.dtype)
        return torch.cat([angles.cos().flatten(-2), angles.sin().flatten(-2)], dim=-1)

    def matrix(self) -> Tensor:
        return self.coefficients.transpose(1, 2).flatten(2)

    def offset(self) -> Tensor | None:
        return None if self.bias is None else self.bias[:, 0]


class ChebyshevExpansion(Expansion):
    """ChebyKAN's layer: Chebyshev polynomials of tanh x.

    By their recursion, not as cos(k acos t), whose gradient is NaN where tanh saturates.
    """

    def __init__(self, *, inputs: int, outputs: int, maps: int = 1, degree: int = 4) -> None:
        super().__init__(inputs=inputs, outputs=outputs, maps=maps)
        self.coefficients = nn.Parameter(torch.empty(maps, inputs, outputs, degree + 1))

    def init_weights(self) -> None:
        """Normal, std 1 / (inputs (degree + 1))."""
        nn.init.normal_(self.coefficients, std=1 / (self.inputs * self.coefficients.shape[-1]))

    def features(self, x: Float[Tensor, "*batch maps inputs"]) -> Tensor:
        t = x.tanh()
        terms = [torch.ones_like(t), t]
        for _ in range(2, self.coefficients.shape[-1]):
            terms.append(2 * t * terms[-1] - terms[-2])
        return torch.stack(terms[: self.coefficients.shape[-1]], dim=-1).flatten(-2)

    def matrix(self) -> Tensor:
        return self.coefficients.transpose(1, 2).flatten(2)


#: by the authors' word for it
EXPANSIONS: dict[str, type[Expansion]] = {
    "vanilla": LinearExpansion,
    "efficientkan": SplineExpansion,
    "fast": RadialExpansion,
    "sine": SineExpansion,
    "fourier": FourierExpansion,
    "cheby": ChebyshevExpansion,
}
