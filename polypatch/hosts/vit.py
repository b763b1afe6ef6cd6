"""A plain vision transformer with six sockets (Dosovitskiy et al. 2021, arXiv 2010.11929).

One image's way through it::

    image ── patching ──▶ Tokens ── position ──▶ + prefix ──▶ blocks ──▶ norm ── pooling ── head
                                                               │
                                        each: mixing, reducing ┘

| socket              | default             | takes → gives                                     |
|---------------------|---------------------|---------------------------------------------------|
| ``patching``        | ``GridPatching``    | (batch, 3, height, width) → :class:`Tokens`        |
| ``position``        | ``LearnedPosition`` | Tokens → Tokens; rotation and bias for the blocks  |
| ``blocks[i].mixing``| ``Attention``       | (batch, tokens, dim), bias, rotation → ``Mixed``   |
| ``blocks[i].reducing`` | None             | Tokens, ``Mixed`` → fewer Tokens                   |
| ``pooling``         | ``ClassToken``      | Tokens → (batch, dim)                              |
| ``head``            | ``Linear``          | (batch, dim) → (batch, classes)                    |

A technique fills sockets from outside (``plug(host, **options)``); the loop over the blocks,
:meth:`ViT.run_blocks`, is the one place to override for anything that changes their order.
Batches whose samples have unequal token counts run in a few groups of similar length, so that
padding costs less than a tenth (:func:`polypatch.tokens.length_buckets`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import PolypatchError, suggest
from ..nn import (
    Attention,
    AttentionPool,
    ClassAndMean,
    ClassToken,
    DropPath,
    FeatureInfo,
    FeatureMap,
    GridPatching,
    InputRequirements,
    LayerScale,
    LearnedPosition,
    MeanPool,
    Mixed,
    Mlp,
    NoPosition,
    Position,
    RotaryPosition,
    SinCosPosition,
    SwiGlu,
    fresh,
    init_parts,
    init_transformer_weights,
)
from ..tokens import Tokens, length_buckets
from .hooks import TrainingHook

__all__ = [
    "SIZES",
    "Block",
    "Context",
    "FeatureMap",
    "InputRequirements",
    "Prefix",
    "Reducer",
    "Size",
    "ViT",
    "assemble_vit",
    "build_vit",
]


class Size(NamedTuple):
    """Width, depth, heads, feed-forward width and the patch and resolution it is used with."""

    dim: int
    depth: int
    heads: int
    hidden: int
    patch: int = 16
    resolution: int = 224


#: tiny and small: Touvron et al. 2021 (DeiT), table 1; base, large, huge: Dosovitskiy et al. 2021,
#: table 1; giant: Zhai et al. 2022, table 2; so400m: Alabdulmohsin et al. 2023, table 2;
#: nano is ours, for demonstrations on a CPU.
SIZES: dict[str, Size] = {
    "nano": Size(64, 4, 4, 256, patch=4, resolution=32),
    "tiny": Size(192, 12, 3, 768),
    "small": Size(384, 12, 6, 1536),
    "base": Size(768, 12, 12, 3072),
    "large": Size(1024, 24, 16, 4096),
    "so400m": Size(1152, 27, 16, 4304, patch=14),
    "huge": Size(1280, 32, 16, 5120, patch=14),
    "giant": Size(1408, 40, 16, 6144, patch=14),
}


class Context(NamedTuple):
    """What every block gets beside the tokens; made anew whenever the set of tokens changes."""

    rotation: tuple[Tensor, Tensor] | None
    bias: Tensor | None
    proportional_bias: Tensor | None


class Reducer(nn.Module):
    """Base of the ``reducing`` socket. ``where`` says when it acts: ``"middle"``, between a
    block's mixing and its feed-forward network, or ``"end"``, behind the block."""

    where: str = "end"

    def forward(self, tokens: Tokens, mixed: Mixed) -> Tokens:
        return tokens


class Prefix(nn.Module):
    """Placeless tokens in front: class token, distillation token, registers.

    ``position`` holds the learned position of the first ``positioned`` of them (older ViTs keep a
    row for the class token in the position table), else there is none.
    """

    def __init__(self, *, dim: int, count: int, positioned: int = 0) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, count, dim))
        self.position = nn.Parameter(torch.zeros(1, positioned, dim)) if positioned else None

    def init_weights(self) -> None:
        nn.init.normal_(self.tokens, std=1e-6)
        if self.position is not None:
            nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, tokens: Tokens) -> Tokens:
        x = self.tokens
        if self.position is not None:
            x = x + F.pad(self.position, (0, 0, 0, x.shape[1] - self.position.shape[1]))
        return tokens.with_prefix(x)


class ClassAndDistill(nn.Module):
    """Class and distillation token, (batch, 2, dim), for :class:`DistilledHead`."""

    def forward(self, tokens: Tokens) -> Float[Tensor, "batch 2 dim"]:
        return tokens.x[:, :2]


class DistilledHead(nn.Module):
    """DeiT's two classifiers; the answer is their mean (Touvron et al. 2021, sec. 4)."""

    def __init__(self, *, dim: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, classes)
        self.distilled = nn.Linear(dim, classes)

    def forward(self, pooled: Float[Tensor, "batch 2 dim"]) -> Float[Tensor, "batch classes"]:
        return (self.head(pooled[:, 0]) + self.distilled(pooled[:, 1])) / 2


class Block(nn.Module):
    """Pre-norm transformer block: tokens += mixing(norm(tokens)); tokens += mlp(norm(tokens))."""

    def __init__(
        self,
        *,
        dim: int,
        mixing: nn.Module,
        mlp: nn.Module,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.mixing = mixing
        self.scale1 = LayerScale(dim=dim, init=layer_scale) if layer_scale else nn.Identity()
        self.norm2 = norm(dim)
        self.mlp = mlp
        self.scale2 = LayerScale(dim=dim, init=layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(rate=drop_path)
        self.reducing: Reducer | None = None
        # Whether keys of merged tokens count as many times as the tokens that they stand for.
        self.proportional = True

    def mix(self, tokens: Tokens, context: Context) -> Mixed:
        """The mixing branch, before scale and residual."""
        bias = context.proportional_bias if self.proportional else context.bias
        return self.mixing(self.norm1(tokens.x), bias=bias, rotation=context.rotation)

    def forward(self, tokens: Tokens, context: Context) -> Tokens:
        mixed = self.mix(tokens, context)
        tokens = tokens.with_x(tokens.x + self.drop_path(self.scale1(mixed.x)))
        reducing = self.reducing
        if reducing is not None and reducing.where == "middle":
            tokens = reducing(tokens, mixed)
        update = self.scale2(self.mlp(self.norm2(tokens.x)))
        tokens = tokens.with_x(tokens.x + self.drop_path(update))
        if reducing is not None and reducing.where == "end":
            tokens = reducing(tokens, mixed)
        return tokens


class ViT(nn.Module):
    """The host. Parts are passed in; :func:`build_vit` passes the usual ones.

    Args:
        dim: width of the tokens.
        patch: finest cell in pixels; strides of :meth:`features` and position codes refer to it.
        resolution: input side that learned positions were made for (others work as well).
        norm_in: norm of the tokens before the first block (CLIP), default none.
        norm: norm behind the last block; identity where the pooling norms its own output.
        patching, position, prefix, blocks, pooling, head: the sockets, see above.
    """

    def __init__(
        self,
        *,
        dim: int,
        patch: int,
        resolution: int,
        patching: nn.Module,
        position: Position,
        prefix: Prefix | None,
        blocks: list[Block],
        pooling: nn.Module,
        head: nn.Module,
        norm: nn.Module,
        norm_in: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.patch, self.resolution = dim, patch, resolution
        self.patching = patching
        self.position = position
        self.prefix = prefix
        self.norm_in = norm_in or nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.pooling = pooling
        self.head = head
        #: names of the techniques plugged in, in order
        self.plugs: tuple[str, ...] = ()
        #: what takes part in training
        self.hooks: tuple[TrainingHook, ...] = ()
        self._checkpointed = False

    # ---- the way of an image -------------------------------------------------------------------

    def tokens(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        """The tokens that enter the first block."""
        tokens = self.position(self.patching(image))
        if self.prefix is not None:
            tokens = self.prefix(tokens)
        return tokens.with_x(self.norm_in(tokens.x))

    def context(self, tokens: Tokens) -> Context:
        """Rotation and attention biases for this set of tokens."""
        bias = tokens.key_bias(proportional=False)
        proportional = bias if tokens.weight is None else tokens.key_bias()
        relative = self.position.bias(tokens)
        if relative is not None:
            bias = relative if bias is None else bias + relative
            proportional = relative if proportional is None else proportional + relative
        return Context(self.position.rotation(tokens), bias, proportional)

    def run_blocks(self, tokens: Tokens) -> Tokens:
        """All blocks in order, without the final norm. The loop that techniques may replace."""
        context = self.context(tokens)
        for block in self.blocks:
            before = tokens
            if self._checkpointed and self.training:
                tokens = checkpoint(block, tokens, context, use_reentrant=False)  # type: ignore
            else:
                tokens = block(tokens, context)
            if tokens.centre is not before.centre or tokens.weight is not before.weight:
                context = self.context(tokens)
        return tokens

    def encode(self, tokens: Tokens) -> Tokens:
        """Blocks and final norm. Padded batches run in groups of similar length."""
        if tokens.mask is not None and not torch.compiler.is_compiling():
            groups = length_buckets(tokens.counts)
            if len(groups) > 1:
                done = [self.run_blocks(tokens.select(rows)) for rows in groups]
                tokens = Tokens.join(done, order=torch.cat(groups))
            else:
                tokens = self.run_blocks(tokens.trim())
        else:
            tokens = self.run_blocks(tokens)
        return tokens.with_x(self.norm(tokens.x))

    def forward_features(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        """All tokens behind the final norm, with their places."""
        return self.encode(self.tokens(image))

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        return self.head(self.pooling(self.forward_features(image)))

    def features(
        self,
        image: Float[Tensor, "batch channels height width"],
        *,
        stages: tuple[int, ...] | None = None,
    ) -> list[FeatureMap]:
        """Normed maps behind some blocks (default: four, evenly spaced), at the patch's stride.

        Tokens of any shape are spread over the cells that they cover, so reduced and adaptive
        tokens give maps as well. ``stages`` counts blocks from 1.
        """
        depth = len(self.blocks)
        stages = stages or tuple(sorted({max(1, depth * k // 4) for k in (1, 2, 3, 4)}))
        if min(stages) < 1 or max(stages) > depth:
            raise PolypatchError(f"stages count blocks from 1 to {depth}, got {stages}")
        tokens = self.tokens(image)
        size = tuple(max(1, -(-side // self.patch)) for side in tokens.canvas)
        maps: list[FeatureMap] = []
        context = self.context(tokens)
        for number, block in enumerate(self.blocks, start=1):
            before = tokens
            tokens = block(tokens, context)
            if tokens.centre is not before.centre or tokens.weight is not before.weight:
                context = self.context(tokens)
            if number in stages:
                normed = tokens.with_x(self.norm(tokens.x))
                maps.append(FeatureMap(normed.scatter_to_grid(size), self.patch))  # type: ignore
        return maps

    # ---- what callers ask ----------------------------------------------------------------------

    @property
    def input_requirements(self) -> InputRequirements:
        needs = getattr(self.patching, "input_requirements", None)
        return needs or InputRequirements(minimum=self.patch)

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """Of the maps that :meth:`features` gives by default."""
        return (FeatureInfo(self.dim, self.patch),) * min(4, len(self.blocks))

    def reset_head(self, classes: int) -> None:
        """A fresh classifier for ``classes`` classes; 0: none, the pooled features come out."""
        width = self.head.in_features if isinstance(self.head, nn.Linear) else self.dim
        device = next(self.parameters()).device
        self.head = nn.Linear(width, classes, device=device) if classes else nn.Identity()
        init_transformer_weights(self.head)

    def checkpointed(self, on: bool = True) -> ViT:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self._checkpointed = on
        return self

    def init_weights(self) -> None:
        """ViT's initialisation (JAX ViT and DeiT); works on modules that came from the meta
        device."""
        init_transformer_weights(self)
        init_parts(self)

    def no_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone: biases, gains, tokens, positions."""
        special = ("position.", "prefix.", ".query")
        return {
            name
            for name, value in self.named_parameters()
            if value.ndim <= 1 or any(part in name for part in special)
        }

    def plugged(self, name: str, *, hook: TrainingHook | None = None) -> ViT:
        """Note a technique and what it does in training; return the host."""
        self.plugs = (*self.plugs, name)
        if hook is not None:
            self.hooks = (*self.hooks, hook)
        return self


POOLINGS = ("class", "mean", "attention", "class+mean", "class+distill")
POSITIONS = ("learned", "sincos", "rope", "none")


def assemble_vit(
    *,
    dim: int,
    depth: int,
    heads: int,
    hidden: int,
    patch: int,
    grid: tuple[int, int],
    classes: int,
    channels: int = 3,
    pooling: str = "class",
    position: str = "learned",
    prefix: int = 0,
    positioned: int = 0,
    norm_pooled: bool = False,
    norm_in: bool = False,
    patch_bias: bool = True,
    qkv_bias: bool = True,
    qk_norm: bool = False,
    head_bias: bool = True,
    gated: bool = False,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
    activation: Callable[[Tensor], Tensor] = fresh.gelu,
    eps: float = 1e-6,
) -> ViT:
    """Wire a ViT from numbers, without filling the weights; :func:`build_vit` and the readers of
    foreign weights (``hosts/layouts.py``) name the numbers.

    Args:
        grid: cells of the learned position table; times ``patch`` it is the native resolution.
        prefix: placeless tokens, of which the first ``positioned`` have a learned position.
        norm_pooled: the final norm stands behind the pooling (mean-pooled ViTs, CLIP), not before.
        norm_in: a norm in front of the first block (CLIP).
    """

    def norm(width: int) -> nn.LayerNorm:
        return nn.LayerNorm(width, eps=eps)

    def feed_forward() -> nn.Module:
        if gated:
            return SwiGlu(dim=dim, hidden=hidden)
        return Mlp(dim=dim, hidden=hidden, activation=activation)

    positions: dict[str, Callable[[], Position]] = {
        "learned": lambda: LearnedPosition(grid=grid, dim=dim),
        "sincos": lambda: SinCosPosition(dim=dim, patch=patch),
        "rope": lambda: RotaryPosition(head_dim=dim // heads, patch=patch),
        "none": NoPosition,
    }
    behind = norm(dim) if norm_pooled else None
    poolings: dict[str, Callable[[], nn.Module]] = {
        "class": lambda: ClassToken(norm=behind),
        "mean": lambda: MeanPool(norm=behind),
        "attention": lambda: AttentionPool(
            dim=dim, heads=heads, hidden=hidden, activation=activation, eps=eps
        ),
        "class+mean": ClassAndMean,
        "class+distill": ClassAndDistill,
    }
    if position not in positions:
        raise PolypatchError(f"there is no position={position!r}{suggest(position, positions)}")
    if pooling not in poolings:
        raise PolypatchError(f"there is no pooling={pooling!r}{suggest(pooling, poolings)}")
    width = 2 * dim if pooling == "class+mean" else dim
    head: nn.Module = nn.Identity()
    if classes and pooling == "class+distill":
        head = DistilledHead(dim=dim, classes=classes)
    elif classes:
        head = nn.Linear(width, classes, bias=head_bias)
    return ViT(
        dim=dim,
        patch=patch,
        resolution=max(grid) * patch,
        patching=GridPatching(dim=dim, patch=patch, channels=channels, bias=patch_bias),
        position=positions[position](),
        prefix=Prefix(dim=dim, count=prefix, positioned=positioned) if prefix else None,
        norm_in=norm(dim) if norm_in else None,
        blocks=[
            Block(
                dim=dim,
                mixing=Attention(
                    dim=dim, heads=heads, qkv_bias=qkv_bias, qk_norm=norm if qk_norm else None
                ),
                mlp=feed_forward(),
                norm=norm,
                layer_scale=layer_scale,
                drop_path=drop_path * index / max(1, depth - 1),
            )
            for index in range(depth)
        ],
        norm=nn.Identity() if norm_pooled else norm(dim),
        pooling=poolings[pooling](),
        head=head,
    )


def build_vit(
    size: str = "base",
    *,
    patch: int | None = None,
    resolution: int | None = None,
    classes: int = 1000,
    channels: int = 3,
    pooling: str = "class",
    position: str = "learned",
    registers: int = 0,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
    qk_norm: bool = False,
    gated: bool = False,
) -> ViT:
    """A plain ViT of a named size, initialised.

    Args:
        size: a row of :data:`SIZES`.
        patch, resolution: default to the size's own; the resolution only sets the grid of learned
            positions, any input size is accepted.
        classes: 0 for a model without classifier.
        pooling: ``"class"``, ``"mean"``, ``"attention"`` or ``"class+mean"``.
        position: ``"learned"``, ``"sincos"``, ``"rope"`` or ``"none"``.
        registers: how many register tokens (Darcet et al. 2024).
        drop_path: rate of the last block, growing linearly from 0 at the first.
        gated: SwiGLU with 2/3 of the feed-forward width, rounded up to a multiple of 8 (DINOv2).

    Raises:
        PolypatchError: unknown size or option value, or a resolution smaller than the patch.
    """
    if size not in SIZES:
        raise PolypatchError(f"there is no vit-{size}{suggest(size, SIZES, kind='sizes')}")
    dim, depth, heads, hidden, default_patch, default_resolution = SIZES[size]
    patch = default_patch if patch is None else patch
    resolution = default_resolution if resolution is None else resolution
    if patch < 1:
        raise PolypatchError(f"a patch has at least 1 pixel a side, got patch={patch}")
    if resolution < patch:
        raise PolypatchError(
            f"patch={patch} does not fit into a resolution of {resolution}; use patch="
            f"{max(1, resolution // 4)} or a larger resolution"
        )
    cells = -(-resolution // patch)
    with_class = pooling in ("class", "class+mean")
    model = assemble_vit(
        dim=dim,
        depth=depth,
        heads=heads,
        hidden=(int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden,
        patch=patch,
        grid=(cells, cells),
        classes=classes,
        channels=channels,
        pooling=pooling,
        position=position,
        prefix=registers + with_class,
        positioned=int(with_class and position == "learned"),
        norm_pooled=pooling == "mean",
        qk_norm=qk_norm,
        gated=gated,
        layer_scale=layer_scale,
        drop_path=drop_path,
    )
    model.resolution = resolution
    if not next(model.parameters()).is_meta:  # on the meta device there is nothing to fill
        model.init_weights()
    return model
