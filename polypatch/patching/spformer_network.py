"""The complete SPFormer: stages of superpixel cross attention and transformer blocks.

The network of :mod:`polypatch.patching.spformer` (Mei et al. 2025, arXiv 2401.02931, sec. 3), for
classification and, with a head for single superpixels, for segmentation. Between two stages the
tokens are spread back onto the pixels (:class:`HandOver`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import PolypatchError
from ..hosts.vit import Block, Context, Prefix
from ..nn import (
    Attention,
    FeatureInfo,
    FeatureMap,
    InputRequirements,
    LayerScale,
    LearnedPosition,
    Mlp,
    init_parts,
)
from ..tokens import Tokens
from .spformer import (
    Refined,
    SuperpixelCrossAttention,
    as_tokens,
    by_head,
    enlarge,
    from_cells,
    hard_labels,
    merge_heads,
    padded,
    refine,
    spread,
)
from .spformer_stem import Stem, StemLayer, SuperpixelInit

__all__ = ["HandOver", "SPFormer", "Segmentation", "Stage", "Variant", "assemble"]


class HandOver(nn.Module):
    """Tokens back onto pixels between two stages: I + γ · spread(LN(W tokens))."""

    def __init__(
        self,
        *,
        pixel_dim: int,
        superpixel_dim: int,
        gamma: float | None,
        activation: bool,
        carries_pixels: bool,
        pixel_view: bool,
    ) -> None:
        super().__init__()
        self.activation, self.carries_pixels = activation, carries_pixels
        self.pixel_view = pixel_view
        self.project = nn.Linear(superpixel_dim, pixel_dim, bias=False)
        self.norm = nn.LayerNorm(pixel_dim, eps=1e-6)
        self.scale = nn.Identity() if gamma is None else LayerScale(dim=pixel_dim, init=gamma)

    def init_weights(self) -> None:
        nn.init.kaiming_normal_(self.project.weight, mode="fan_out", nonlinearity="relu")
        self.norm.reset_parameters()
        if isinstance(self.scale, LayerScale):
            nn.init.constant_(self.scale.gamma, self.scale.init)

    def forward(
        self,
        entered: Float[Tensor, "batch height width pixel_dim"],
        refined: Refined,
        superpixels: Float[Tensor, "batch rows columns superpixel_dim"],
    ) -> Float[Tensor, "batch height width pixel_dim"]:
        logits = refined.pixel_similarities if self.pixel_view else refined.similarities
        assert logits is not None
        values = self.norm(self.project(superpixels))
        if self.activation:
            values = F.gelu(values)
        grid = (superpixels.shape[1], superpixels.shape[2])
        cell = (entered.shape[1] // grid[0], entered.shape[2] // grid[1])
        given = from_cells(spread(logits, by_head(values, logits.shape[3])), cell)
        return (refined.pixels if self.carries_pixels else entered) + self.scale(given)


class Stage(nn.Module):
    """Cross attention, position, transformer blocks and, but for the last stage, the hand-over."""

    def __init__(
        self,
        *,
        layers: list[SuperpixelCrossAttention],
        position: LearnedPosition | None,
        prefix: Prefix | None,
        blocks: list[Block],
        hand_over: HandOver | None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.position = position
        self.prefix = prefix
        self.blocks = nn.ModuleList(blocks)
        self.hand_over = hand_over
        self.recomputed = False

    def forward(
        self, pixels: Tensor, superpixels: Tensor, canvas: tuple[int, int]
    ) -> tuple[Tensor, Tokens, Refined]:
        """Pixels for the next stage, the tokens behind the blocks, and the refinement itself."""
        refined = refine(self.layers, pixels, superpixels)
        # Blocks see no place but the learned one, so the geometry is added at the very end.
        tokens = Tokens.from_grid(refined.superpixels.permute(0, 3, 1, 2), canvas=canvas)
        if self.position is not None:
            tokens = self.position(tokens)
        if self.prefix is not None:
            tokens = self.prefix(tokens)
        context = Context(None, None, None)
        for block in self.blocks:
            if self.recomputed and self.training:
                tokens = checkpoint(block, tokens, context, use_reentrant=False)  # type: ignore
            else:
                tokens = block(tokens, context)
        if self.hand_over is not None:
            grid = refined.superpixels.shape[1:3]
            pixels = self.hand_over(pixels, refined, tokens.placed.unflatten(1, grid))
        return pixels, tokens, refined


class Segmentation(NamedTuple):
    """Class logits of the superpixels, and spread over the pixels."""

    superpixels: Float[Tensor, "batch classes rows columns"]
    pixels: Float[Tensor, "batch classes height width"]


class SPFormer(nn.Module):
    """The network of section 3: stem, superpixels, stages, mean of the tokens, norm, classifier.

    Args:
        stem, init, stages: the parts; :func:`build` passes the published ones.
        head: classifier; ``segmentation`` classifies single tokens for :meth:`segment`.
        class_token: the last stage has a class token, which the head reads behind a norm of all
            tokens, instead of the mean of the tokens in front of a norm.
    """

    def __init__(
        self,
        *,
        dim: int,
        stem: Stem,
        init: SuperpixelInit,
        stages: list[Stage],
        classes: int,
        segmentation: int = 0,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.stem = stem
        self.init = init
        self.stages = nn.ModuleList(stages)
        self.class_token = class_token
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head: nn.Module = nn.Linear(dim, classes) if classes else nn.Identity()
        self.seg_norm = nn.LayerNorm(dim, eps=1e-6) if segmentation else None
        self.seg_head = nn.Linear(dim, segmentation) if segmentation else None
        self.patch = stem.stride * init.cell

    def _run(self, image: Tensor) -> tuple[list[Tokens], list[Refined]]:
        canvas = (image.shape[-2], image.shape[-1])
        pixels = self.stem(padded(image, self.patch))
        superpixels = self.init(pixels)
        behind, refinements = [], []
        for stage in self.stages:
            pixels, tokens, refined = stage(pixels, superpixels, canvas)
            grid = superpixels.shape[1:3]
            superpixels = tokens.placed.unflatten(1, grid)
            behind.append(tokens)
            refinements.append(refined)
        return behind, refinements

    def _placed(self, tokens: Tokens, refined: Refined, image: Tensor) -> Tokens:
        """A stage's tokens with the regions that its refinement won."""
        placed = as_tokens(
            refined.superpixels,
            refined.similarities,
            cell=self.init.cell,
            stride=self.stem.stride,
            canvas=(image.shape[-2], image.shape[-1]),
        )
        if tokens.prefix:
            placed = placed.with_prefix(tokens.x[:, : tokens.prefix])
        return placed.with_x(tokens.x)

    def forward_features(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        """The last stage's tokens, without a final norm, with the regions that they won."""
        behind, refinements = self._run(image)
        return self._placed(behind[-1], refinements[-1], image)

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """A normed map for each stage, at the stem's stride: every cell reads the superpixel that
        it belongs to, so borders between superpixels are borders in the map."""
        stride = self.stem.stride
        size = (-(-image.shape[-2] // stride), -(-image.shape[-1] // stride))
        maps = []
        for tokens, refined in zip(*self._run(image)):
            normed = tokens.with_x(self.norm(tokens.x))
            dense = self._placed(normed, refined, image).scatter_to_grid(size)
            maps.append(FeatureMap(dense, stride))
        return maps

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """Of the maps that :meth:`features` gives."""
        return (FeatureInfo(self.dim, self.stem.stride),) * len(self.stages)

    def checkpointed(self, on: bool = True) -> SPFormer:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            stage.recomputed = on  # type: ignore[assignment]
        return self

    def pool(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        if self.class_token:
            return self.norm(tokens.x)[:, 0]
        return self.norm(tokens.placed.mean(1))

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        return self.head(self.pool(self._run(image)[0][-1]))

    def segment(
        self, image: Float[Tensor, "batch channels height width"], *, stride: int | None = None
    ) -> Segmentation:
        """Class logits of the superpixels and of the pixels, these at ``stride`` (a divisor of the
        stem's, which is the default): similarities are enlarged inside of each cell, their heads
        merged, and each pixel mixes the logits of its nine superpixels.

        Raises:
            PolypatchError: a network without segmentation head, or a stride that doesn't divide.
        """
        if self.seg_head is None or self.seg_norm is None:
            raise PolypatchError(
                "this network has no segmentation head; build it with segmentation="
            )
        stride = stride or self.stem.stride
        if self.stem.stride % stride:
            raise PolypatchError(
                f"stride={stride} does not divide the stem's stride of {self.stem.stride}"
            )
        behind, refinements = self._run(image)
        tokens, last = behind[-1], refinements[-1]
        logits = self.seg_head(self.seg_norm(tokens.placed))
        logits = logits.unflatten(1, last.superpixels.shape[1:3])
        factor, cell = self.stem.stride // stride, self.init.cell
        finer = enlarge(merge_heads(last.similarities), (cell, cell), factor)
        pixels = from_cells(spread(finer, logits[:, :, :, None]), (cell * factor, cell * factor))
        return Segmentation(logits.permute(0, 3, 1, 2), pixels.permute(0, 3, 1, 2))

    @torch.no_grad()
    def hard_maps(
        self, image: Float[Tensor, "batch channels height width"], *, stride: int | None = None
    ) -> list[Int64[Tensor, "batch tall wide"]]:
        """Every stage's superpixels as label maps at ``stride`` (default: the stem's)."""
        factor, cell = self.stem.stride // (stride or self.stem.stride), self.init.cell
        return [
            hard_labels(
                enlarge(merge_heads(refined.similarities), (cell, cell), factor),
                (cell * factor, cell * factor),
            )
            for refined in self._run(image)[1]
        ]

    @property
    def input_requirements(self) -> InputRequirements:
        return InputRequirements(minimum=self.patch)

    def reset_head(self, classes: int) -> None:
        """A fresh classifier; 0: none, the pooled features come out."""
        device = self.norm.weight.device
        self.head = nn.Linear(self.dim, classes, device=device) if classes else nn.Identity()
        _init_linear(self.head)

    def no_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone."""
        special = ("position.table", "prefix.", "init.table")
        return {
            name
            for name, value in self.named_parameters()
            if value.ndim <= 1 or any(part in name for part in special)
        }

    def init_weights(self) -> None:
        """The authors' initialisation.

        | layer                       | weight                        | bias |
        |-----------------------------|-------------------------------|------|
        | Linear of blocks and heads  | normal, std 0.02, cut         | 0    |
        | q, k, v of cross attention  | normal, std 0.02, cut         |      |
        | other convolutions          | normal, std sqrt(2 / fan out) | 0    |
        | positions                   | normal, std 0.02, cut         |      |
        | class token                 | normal, std 1e-6              |      |
        | gains γ                     | their start, 1e-5             |      |
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for part in (self.head, self.seg_head, *(stage.blocks for stage in self.stages)):
            for module in part.modules() if isinstance(part, nn.Module) else ():
                _init_linear(module)
        init_parts(self)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Sizes of a network. ``heads`` are the blocks', ``cross_heads`` those of cross attention."""

    stem: tuple[StemLayer, ...]
    dim: int
    heads: int
    cross_heads: int = 2
    depths: tuple[int, ...] = (2, 10)
    iterations: int = 2
    cell: int = 4
    init: str = "lift-pool"
    position: str = "depthwise"
    norm: str = "layer"

    @property
    def patch(self) -> int:
        """Side of a superpixel's home cell, in pixels of the input."""
        return self.cell * math.prod(layer.stride for layer in self.stem)


def assemble(
    variant: Variant,
    *,
    classes: int,
    grid: tuple[int, int],
    channels: int = 3,
    segmentation: int = 0,
    drop_path: float = 0.0,
    gamma: float | None = 1e-5,
    handover_gamma: float | None = 1e-5,
    class_token: bool = False,
    positioned_class: bool = True,
    positions: bool = True,
    activated_handover: bool = False,
    carries_pixels: bool = False,
    pixel_view: bool = False,
    fixed_pixels: bool = False,
    table_strides: tuple[int, int] = (4, 4),
) -> SPFormer:
    """Wire a network from numbers, without filling the weights.

    Args:
        grid: superpixels (rows, columns) that learned positions are made for.
        positioned_class: the class token has a row of its own in the position table.
        carries_pixels: the hand-over starts from the pixels that the stage has updated; then the
            last iteration updates them as well.
        pixel_view: the hand-over spreads by the pixels' own similarities (needs the former).
        fixed_pixels: no iteration updates pixels.
        table_strides: for ``position="learned"``, of the pixels' and the superpixels' table.
    """
    pixel_dim, depths = variant.stem[-1].channels, variant.depths
    if pixel_view and (fixed_pixels or not carries_pixels):
        raise PolypatchError(
            "the pixels' own similarities of the last iteration exist only where it updates "
            "pixels; pixel_view needs carries_pixels and no fixed_pixels"
        )
    sides = tuple(n * variant.cell for n in grid)
    tables = None
    if variant.position == "learned":
        tables = (
            (-(-sides[0] // table_strides[0]), -(-sides[1] // table_strides[0])),
            (-(-grid[0] // table_strides[1]), -(-grid[1] // table_strides[1])),
        )
    total = sum(depths)

    def block(number: int) -> Block:
        return Block(
            dim=variant.dim,
            mixing=Attention(dim=variant.dim, heads=variant.heads),
            mlp=Mlp(dim=variant.dim, hidden=4 * variant.dim),
            norm=lambda width: nn.LayerNorm(width, eps=1e-6),
            drop_path=drop_path * number / max(1, total - 1),
        )

    def stage(index: int) -> Stage:
        last = index == len(depths) - 1
        with_class = class_token and last
        positioned = int(with_class and positions and positioned_class)
        first = sum(depths[:index])
        return Stage(
            layers=[
                SuperpixelCrossAttention(
                    pixel_dim=pixel_dim,
                    superpixel_dim=variant.dim,
                    heads=variant.cross_heads,
                    position=variant.position,
                    gamma=gamma,
                    updates_pixels=not fixed_pixels
                    and (turn < variant.iterations - 1 or (carries_pixels and not last)),
                    tables=tables,
                )
                for turn in range(variant.iterations)
            ],
            position=LearnedPosition(grid=grid, dim=variant.dim) if positions else None,
            prefix=Prefix(dim=variant.dim, count=1, positioned=positioned) if with_class else None,
            blocks=[block(number) for number in range(first, first + depths[index])],
            hand_over=None
            if last
            else HandOver(
                pixel_dim=pixel_dim,
                superpixel_dim=variant.dim,
                gamma=handover_gamma,
                activation=activated_handover,
                carries_pixels=carries_pixels,
                pixel_view=pixel_view,
            ),
        )

    return SPFormer(
        dim=variant.dim,
        stem=Stem(layers=variant.stem, channels=channels, norm=variant.norm),
        init=SuperpixelInit(
            pixel_dim=pixel_dim,
            superpixel_dim=variant.dim,
            cell=variant.cell,
            kind=variant.init,
            grid=grid,
        ),
        stages=[stage(index) for index in range(len(depths))],
        classes=classes,
        segmentation=segmentation,
        class_token=class_token,
    )
