"""Layers as steps of a differential equation: attention and MLP side by side, and better solvers.

Zhong, Zhang, Chakraborty and Dey, *A Neural ODE Interpretation of Transformer Layers* (workshop on
the symbiosis of deep learning and differential equations, NeurIPS 2022, arXiv 2212.06011). With the
fields F(x) = MHA(LN x) of attention and G(x) = MLP(LN x), a pre-norm layer is two Euler steps, one
field after the other; the paper's layer takes both at the same place, and is one Euler step of an
equation (x: batch × tokens × dim)::

    usual:     x' = x + F(x),  x'' = x' + G(x')
    parallel:  x' = x + F(x) + G(x)                   dx/dt = F(x) + G(x), step 1

Its parameters and operations are those of the usual layer. D layers that share their weights
(``sharing=D``) are then the integration of one equation over [0, D]; the depth stays, the
parameters become fewer. And any other solver can take the place of Euler's, :data:`SOLVERS`; with
step h, k₁ = f(x)::

    midpoint   x + h f(x + h k₁/2)
    heun       x + h (k₁ + k₂)/2,                  k₂ = f(x + h k₁)
    rk4        x + h (k₁ + 2 k₂ + 2 k₃ + k₄)/6,    k₂ = f(x + h k₁/2), k₃ = f(x + h k₂/2),
                                                   k₄ = f(x + h k₃)

:func:`plug` gives these layers to a plain ViT, keeping its weights; :func:`build` makes a complete
network, of DeiT's sizes, as the paper's image classifier is.

Traps:

* Both fields read the same x.
* A solver of order 4 evaluates each layer four times. ``steps`` sets how many steps cover a group
  of ``sharing`` layers: ``sharing=4, steps=1, solver=rk4`` costs what four Euler steps do.
* What is random must be the same throughout one solve, or the solver has no order any more: drop
  path is drawn once for a group, for each of the two fields. Its rate is the mean of the rates of
  the layers in it. Hosts with dropout inside of attention or MLP are refused.
* A host with trained weights computes something else afterwards, and must be trained on.
* Reducers (token merging) act behind a layer, there being no place between attention and MLP.

Not verified: the authors published no code, and what the paper holds beyond its abstract is known
here from accounts of it only: images are classified by DeiT-Ti on CIFAR-100, layers share weights
in groups. That the two fields have a norm each is taken from the usual layer, whose parameters it
keeps; ``shared_norm=True`` has one for both. Which solvers, with how many steps over which
interval, is not known. Gradients are those of the steps taken, not of an adjoint equation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..hosts.vit import SIZES, Block, Context, ViT, assemble_vit
from ..nn import (
    Backbone,
    FeatureInfo,
    FeatureMap,
    InputRequirements,
    Mixed,
    Preprocessing,
    fresh,
)
from ..tokens import Tokens

__all__ = [
    "SOLVERS",
    "SUBLAYERS",
    "VARIANTS",
    "NeuralODE",
    "ODEBlock",
    "Solver",
    "Variant",
    "assemble",
    "build",
    "integrate",
    "plug",
]


class Solver(NamedTuple):
    """An explicit Runge-Kutta method: what of the earlier slopes each evaluation starts from, and
    what of each slope makes the step."""

    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


SOLVERS: dict[str, Solver] = {
    "euler": Solver(((),), (1,)),
    "midpoint": Solver(((), (1 / 2,)), (0, 1)),
    "heun": Solver(((), (1,)), (1 / 2, 1 / 2)),
    "rk4": Solver(((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
SUBLAYERS = ("parallel", "sequential")


def integrate(
    field: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*shape"],
    *,
    time: float = 1.0,
    steps: int = 1,
    solver: str = "euler",
) -> Float[Tensor, "*shape"]:
    """x at ``time`` by ``steps`` equal steps along dx/dt = field(x).

    Raises:
        PolypatchError: an unknown solver, or less than one step.
    """
    if solver not in SOLVERS:
        raise PolypatchError(f"there is no solver={solver!r}{suggest(solver, SOLVERS)}")
    if steps < 1:
        raise PolypatchError(f"an integration takes at least one step, got steps={steps}")
    stages, weights = SOLVERS[solver]
    step = time / steps
    for _ in range(steps):
        slopes: list[Tensor] = []
        for shares in stages:
            slopes.append(field(_along(x, slopes, shares, step)))
        x = _along(x, slopes, weights, step)
    return x


def _along(x: Tensor, slopes: list[Tensor], shares: tuple[float, ...], step: float) -> Tensor:
    """x + step · Σ share · slope."""
    for slope, share in zip(slopes, shares):
        if share:
            x = torch.add(x, slope, alpha=step * share)
    return x


class ODEBlock(Block):
    """A host's block, made of the parts of another one, that integrates its two fields.

    Args:
        like: the block whose norms, attention, MLP and scales it takes over.
        time: interval; the number of layers that share these weights.
        steps: how many steps cover it.
        solver: a key of :data:`SOLVERS`.
        sublayers: "parallel", or "sequential": each step goes along one field after the other.
        shared_norm: the first norm for both fields.
        drop_path: rate at which one of the fields is left out for a sample, throughout a solve.
    """

    def __init__(
        self,
        *,
        like: Block,
        time: float = 1.0,
        steps: int = 1,
        solver: str = "euler",
        sublayers: str = "parallel",
        shared_norm: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        # Not a new block's parts but the other one's.
        nn.Module.__init__(self)
        self.norm1, self.mixing, self.scale1 = like.norm1, like.mixing, like.scale1
        self.norm2 = nn.Identity() if shared_norm else like.norm2
        self.mlp, self.scale2 = like.mlp, like.scale2
        self.reducing, self.proportional = like.reducing, like.proportional
        self.time, self.steps, self.solver = time, steps, solver
        self.sublayers, self.shared_norm, self.drop_rate = sublayers, shared_norm, drop_path

    def _kept(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Factors of the two fields, (batch, 1, 1) each, drawn for a whole solve."""
        if not self.training or not self.drop_rate:
            return None, None
        keep = 1 - self.drop_rate
        drawn = x.new_empty(2, x.shape[0], 1, 1).bernoulli_(keep).div_(keep)
        return drawn[0], drawn[1]

    def forward(self, tokens: Tokens, context: Context) -> Tokens:
        kept_attention, kept_mlp = self._kept(tokens.x)
        mixed: Mixed | None = None

        def attention(x: Tensor) -> Tensor:
            nonlocal mixed
            mixed = self.mix(tokens.with_x(x), context)
            update = self.scale1(mixed.x)
            return update if kept_attention is None else update * kept_attention

        def mlp(x: Tensor) -> Tensor:
            normed = self.norm1(x) if self.shared_norm else self.norm2(x)
            update = self.scale2(self.mlp(normed))
            return update if kept_mlp is None else update * kept_mlp

        x = tokens.x
        if self.sublayers == "parallel":
            x = integrate(
                lambda at: fresh.add(attention(at), mlp(at)),
                x,
                time=self.time,
                steps=self.steps,
                solver=self.solver,
            )
        else:
            for _ in range(self.steps):
                for field in (attention, mlp):
                    x = integrate(field, x, time=self.time / self.steps, solver=self.solver)
        tokens = tokens.with_x(x)
        if self.reducing is not None:
            assert mixed is not None
            tokens = self.reducing(tokens, mixed)
        return tokens

    def extra_repr(self) -> str:
        return f"{self.sublayers}, {self.solver}, {self.steps} steps over {self.time:g}"


def plug(
    host: ViT,
    *,
    solver: str = "euler",
    sharing: int = 1,
    steps: int | None = None,
    sublayers: str = "parallel",
    shared_norm: bool = False,
) -> ViT:
    """Let the host's layers integrate attention and MLP side by side.

    Args:
        solver: "euler", "midpoint", "heun" or "rk4".
        sharing: how many consecutive layers have the weights of the first of them.
        steps: of the solver for such a group; default: one a layer.
        sublayers: "parallel", the paper's, or "sequential", the usual layers, to share weights or
            refine steps with those.
        shared_norm: one layer norm for attention and MLP.

    Raises:
        PolypatchError: an unknown option, a depth that can't be shared so, or a host whose blocks
            have dropout, reduce tokens already or aren't the plain ones.
    """
    if solver not in SOLVERS:
        raise PolypatchError(f"there is no solver={solver!r}{suggest(solver, SOLVERS)}")
    if sublayers not in SUBLAYERS:
        raise PolypatchError(f"there is no sublayers={sublayers!r}{suggest(sublayers, SUBLAYERS)}")
    depth = len(host.blocks)
    if sharing < 1 or depth % sharing:
        raise PolypatchError(f"{depth} layers can't share weights in groups of {sharing}")
    steps = sharing if steps is None else steps
    if steps < 1:
        raise PolypatchError(f"an integration takes at least one step, got steps={steps}")
    blocks: list[Block] = []
    for number, block in enumerate(host.blocks):
        if type(block) is not Block or block.reducing is not None:
            raise PolypatchError(
                "neural-ode needs a host of plain blocks that reduce no tokens (plug what reduces "
                f"them afterwards); number {number} is {type(block).__name__}"
            )
        if getattr(block.mixing, "dropout", 0) or getattr(block.mlp, "dropout", 0):
            raise PolypatchError(
                "neural-ode can't integrate layers with dropout, which differ at every evaluation"
            )
        blocks.append(block)
    host.blocks = nn.ModuleList(
        ODEBlock(
            like=group[0],
            time=float(sharing),
            steps=steps,
            solver=solver,
            sublayers=sublayers,
            shared_norm=shared_norm,
            drop_path=sum(block.drop_path.rate for block in group) / sharing,
        )
        for group in (blocks[at : at + sharing] for at in range(0, depth, sharing))
    )
    return host.plugged("neural-ode")


# ---- a complete network --------------------------------------------------------------------------


class NeuralODE(Backbone):
    """A plain ViT with the paper's layers, under the surface of complete encoders.

    Args:
        host: a ViT without classifier, with :func:`plug` done.
    """

    undecayed = ("position.", "prefix.")

    def __init__(self, *, host: ViT, classes: int = 1000) -> None:
        super().__init__()
        self.host = host
        self.dim = host.dim
        self.head: nn.Module = nn.Linear(host.dim, classes) if classes else nn.Identity()
        groups = len(host.blocks)
        self.taps = tuple(sorted({max(1, groups * k // 4) for k in (1, 2, 3, 4)}))
        self.feature_info = (FeatureInfo(host.dim, host.patch),) * len(self.taps)
        self.input_requirements = InputRequirements(minimum=host.patch)

    def _tokens(self, image: Tensor) -> Iterator[Tokens]:
        """The tokens behind each group of layers."""
        self.input_requirements.check(image, name="NeuralODE")
        tokens = self.host.tokens(image)
        context = self.host.context(tokens)
        for block in self.host.blocks:
            tokens = self.through(block, tokens, context)
            yield tokens

    def _normed(self, tokens: Tokens) -> Tokens:
        return tokens.with_x(self.host.norm(tokens.x))

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        for last in self._tokens(image):
            tokens = last
        return self.host.pooling(self._normed(tokens))

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """Normed maps behind up to four groups of layers, evenly spaced, at the patch's stride."""
        rows, columns = (-(-side // self.host.patch) for side in image.shape[2:])
        size = (rows, columns)
        return [
            FeatureMap(self._normed(tokens).scatter_to_grid(size), self.host.patch)
            for number, tokens in enumerate(self._tokens(image), start=1)
            if number in self.taps
        ]

    def init_weights(self) -> None:
        """The plain ViT's, see :func:`polypatch.nn.init_transformer_weights`; of the head, too."""
        self.host.init_weights()
        self.init_head()


@dataclass(frozen=True)
class Variant:
    """A row of :data:`polypatch.hosts.vit.SIZES`, and what is done with it; see :func:`plug`."""

    size: str
    drop_path: float = 0.1
    patch: int | None = None
    resolution: int | None = None
    solver: str = "euler"
    sharing: int = 1
    steps: int | None = None
    sublayers: str = "parallel"
    shared_norm: bool = False


#: tiny is the paper's image classifier (DeiT-Ti); small and base are DeiT's, whose drop-path rate
#: all have; nano is ours, for demonstrations on a CPU
VARIANTS: dict[str, Variant] = {
    "neural-ode-nano": Variant("nano", drop_path=0.0),
    "neural-ode-tiny": Variant("tiny"),
    "neural-ode-small": Variant("small"),
    "neural-ode-base": Variant("base"),
}


def assemble(variant: Variant, *, classes: int = 1000, channels: int = 3) -> NeuralODE:
    """Wire a network without filling it."""
    size = SIZES[variant.size]
    patch = size.patch if variant.patch is None else variant.patch
    resolution = size.resolution if variant.resolution is None else variant.resolution
    if not 1 <= patch <= resolution:
        raise PolypatchError(f"patches of {patch} pixels don't fit into {resolution} pixels")
    cells = -(-resolution // patch)
    host = assemble_vit(
        dim=size.dim,
        depth=size.depth,
        heads=size.heads,
        hidden=size.hidden,
        patch=patch,
        grid=(cells, cells),
        classes=0,
        channels=channels,
        prefix=1,
        positioned=1,
        drop_path=variant.drop_path,
    )
    host = plug(
        host,
        solver=variant.solver,
        sharing=variant.sharing,
        steps=variant.steps,
        sublayers=variant.sublayers,
        shared_norm=variant.shared_norm,
    )
    model = NeuralODE(host=host, classes=classes)
    model.preprocessing = Preprocessing(resolution=resolution)
    return model


def build(
    variant: str,
    *,
    classes: int = 1000,
    channels: int = 3,
    patch: int | None = None,
    resolution: int | None = None,
    drop_path: float | None = None,
    solver: str = "euler",
    sharing: int = 1,
    steps: int | None = None,
    sublayers: str = "parallel",
    shared_norm: bool = False,
) -> NeuralODE:
    """A named network with fresh weights.

    Args:
        patch, resolution: default to the size's own; the resolution sets the grid of the learned
            positions, any input size is accepted.
        drop_path: rate of the last layer, growing linearly from 0 at the first; default: DeiT's.
        solver, sharing, steps, sublayers, shared_norm: see :func:`plug`.

    Raises:
        PolypatchError: as :func:`plug`, or a patch larger than the input.
    """
    row = VARIANTS[variant]
    row = replace(
        row,
        patch=patch,
        resolution=resolution,
        drop_path=row.drop_path if drop_path is None else drop_path,
        solver=solver,
        sharing=sharing,
        steps=steps,
        sublayers=sublayers,
        shared_norm=shared_norm,
    )
    model = assemble(row, classes=classes, channels=channels)
    model.init_weights()
    return model
