"""PiT and Swin as *Vision Transformer for Small-Size Datasets* trains them.

The pyramids among the five networks to which Lee et al. (2021, arXiv 2112.13492) apply SPT and LSA:
PiT (Heo et al. 2021, arXiv 2103.16302) and Swin (Liu et al. 2021, arXiv 2103.14030), here with
absolute positions, both in three stages. SPT stands for the patch embedding and, with patches of
2×2 cells, for the pooling between stages; LSA is in every block, within Swin's windows.

Traps: SPT carries its norm inside, so Swin has no norm behind the patch embedding then; the
relative bias is added before the diagonal is masked; cells that only the cyclic shift brought into
one window are held apart by −100, not −∞, as trained weights expect; a stage that one window
covers does not shift.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..errors import PolypatchError
from ..hosts.vit import Block, Context, FeatureMap, InputRequirements, Prefix
from ..nn import (
    ClassToken,
    GridPatching,
    LearnedPosition,
    MeanPool,
    Mixed,
    init_transformer_weights,
)
from ..tokens import Tokens, raster_geometry
from .spt_lsa import LocalityAttention, ShiftedPatchTokenization
from .spt_lsa_networks import growing, head_attention, plain_or_shifted, pre_norm_block

__all__ = ["Pyramid", "pit", "swin"]

_NO_CONTEXT = Context(None, None, None)


# ---- what pyramids share -------------------------------------------------------------------------


def _merged(
    tokens: Tokens, x: Float[Tensor, "batch cells dim2"], grid: tuple[int, int], prefix: Tensor
) -> Tokens:
    """Tokens on a coarser raster over the same canvas, behind their prefix."""
    centre, extent = raster_geometry(grid, tokens.canvas, device=x.device)  # type: ignore[arg-type]
    merged = Tokens(x, centre[None], extent[None], canvas=tokens.canvas, grid=grid)
    return merged.with_prefix(prefix) if prefix.shape[1] else merged


def _map(tokens: Tokens) -> Float[Tensor, "batch dim rows columns"]:
    return tokens.placed.transpose(1, 2).unflatten(2, tokens.grid)  # type: ignore[arg-type]


class Pyramid(nn.Module):
    """Stages of blocks on ever coarser rasters: PiT and Swin.

    Args:
        merges: between the stages, Tokens → Tokens of half the sides and twice the width.
        stride: pixels between the first stage's cells.
        multiple: input sides must be multiples of it.
    """

    def __init__(
        self,
        *,
        patching: nn.Module,
        position: LearnedPosition,
        prefix: Prefix | None,
        dropout: float,
        stages: list[list[Block]],
        merges: list[nn.Module],
        norm: nn.LayerNorm,
        pooling: nn.Module,
        head: nn.Module,
        stride: int,
        multiple: int = 1,
    ) -> None:
        super().__init__()
        self.patching = patching
        self.position = position
        self.prefix = prefix
        self.drop = nn.Dropout(dropout)
        self.stages = nn.ModuleList(nn.ModuleList(blocks) for blocks in stages)
        self.merges = nn.ModuleList(merges)
        self.norm = norm
        self.pooling = pooling
        self.head = head
        self.dim = norm.normalized_shape[0]
        self.stride = stride
        self.input_requirements = InputRequirements(
            multiple_of=multiple, minimum=max(stride, multiple)
        )

    def run_stages(self, image: Float[Tensor, "batch channels height width"]) -> list[Tokens]:
        """The tokens behind every stage; the last ones are normed."""
        multiple = self.input_requirements.multiple_of
        height, width = image.shape[-2:]
        if height % multiple or width % multiple:
            raise PolypatchError(
                f"the input is {height}×{width}; this network's windows need sides that are "
                f"multiples of {multiple}"
            )
        tokens = self.position(self.patching(image))
        if self.prefix is not None:
            tokens = self.prefix(tokens)
        tokens = tokens.with_x(self.drop(tokens.x))
        behind: list[Tokens] = []
        for number, blocks in enumerate(self.stages):
            if number:
                tokens = self.merges[number - 1](tokens)
            for block in blocks:  # type: ignore[union-attr]
                tokens = block(tokens, _NO_CONTEXT)
            behind.append(tokens)
        behind[-1] = tokens.with_x(self.norm(tokens.x))
        return behind

    def forward_features(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        """The last stage's tokens behind the norm."""
        return self.run_stages(image)[-1]

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        return self.head(self.pooling(self.forward_features(image)))

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """A map of every stage, with its stride; only the last one is normed."""
        return [
            FeatureMap(_map(tokens), self.stride * 2**number)
            for number, tokens in enumerate(self.run_stages(image))
        ]

    def reset_head(self, classes: int) -> None:
        """A fresh classifier for ``classes`` classes; 0: none, the pooled features come out."""
        device = next(self.parameters()).device
        self.head = nn.Linear(self.dim, classes, device=device) if classes else nn.Identity()
        init_transformer_weights(self.head)

    def no_decay(self) -> set[str]:
        """Names of parameters that weight decay may leave alone: biases, gains, tokens, positions
        (the authors decay them all the same)."""
        special = ("position.", "prefix.", "relative_bias")
        return {
            name
            for name, value in self.named_parameters()
            if value.ndim <= 1 or any(part in name for part in special)
        }


class ShiftedMerging(nn.Module):
    """SPT between two stages: 2×2 cells of the map and its copies moved by one cell; a class token
    has a linear map of its own."""

    def __init__(self, *, dim: int, class_token: bool) -> None:
        super().__init__()
        self.spt = ShiftedPatchTokenization(dim=2 * dim, patch=2, channels=dim)
        self.class_linear = nn.Linear(dim, 2 * dim) if class_token else nn.Identity()

    def forward(self, tokens: Tokens) -> Tokens:
        x, grid = self.spt.embed(_map(tokens))
        return _merged(tokens, x, grid, self.class_linear(tokens.x[:, : tokens.prefix]))


# ---- PiT ---------------------------------------------------------------------------------------


class ConvMerging(nn.Module):
    """PiT's pooling: a depthwise 3×3 convolution of stride 2, then a pointwise one."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, groups=dim)
        self.pointwise = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.class_linear = nn.Linear(dim, 2 * dim)

    def forward(self, tokens: Tokens) -> Tokens:
        maps = self.pointwise(self.depthwise(_map(tokens)))
        grid = (maps.shape[-2], maps.shape[-1])
        token = self.class_linear(tokens.x[:, : tokens.prefix])
        return _merged(tokens, maps.flatten(2).transpose(1, 2), grid, token)


def pit(
    *,
    grid: tuple[int, int],
    patch: int,
    classes: int,
    dim: int,
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    head_dim: int,
    ratio: float,
    spt: bool,
    lsa: bool,
    channels: int = 3,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    embed_dropout: float = 0.0,
) -> Pyramid:
    """PiT: heads keep their width and double in number. ``drop_path`` is every block's rate."""
    widths = [dim * 2**stage for stage in range(len(depths))]

    def block(width: int, count: int) -> Block:
        return pre_norm_block(
            dim=width,
            mixing=head_attention(dim=width, heads=count, head_dim=head_dim, lsa=lsa),
            hidden=int(width * ratio),
            drop_path=drop_path,
            dropout=dropout,
        )

    def merging(width: int) -> nn.Module:
        return ShiftedMerging(dim=width, class_token=True) if spt else ConvMerging(dim=width)

    return Pyramid(
        patching=plain_or_shifted(dim=dim, patch=patch, channels=channels, spt=spt),
        position=LearnedPosition(grid=grid, dim=dim),
        prefix=Prefix(dim=dim, count=1, positioned=1),
        dropout=embed_dropout,
        stages=[
            [block(width, count) for _ in range(depth)]
            for width, depth, count in zip(widths, depths, heads)
        ],
        merges=[merging(width) for width in widths[:-1]],
        norm=nn.LayerNorm(widths[-1]),
        pooling=ClassToken(),
        head=nn.Linear(widths[-1], classes) if classes else nn.Identity(),
        stride=patch,
    )


# ---- Swin --------------------------------------------------------------------------------------


def relative_index(window: int, device: torch.device) -> Int64[Tensor, "cells cells"]:
    """Row of the bias table for each pair of cells: (Δy + w−1)(2w−1) + Δx + w−1."""
    at = torch.arange(window, device=device)
    step = at[:, None] - at + window - 1
    pairs = step[:, None, :, None] * (2 * window - 1) + step[None, :, None, :]
    return pairs.flatten(0, 1).flatten(1, 2)


def foreign_bias(
    grid: tuple[int, int], window: int, shift: int, device: torch.device
) -> Float[Tensor, "windows cells cells"]:
    """−100 between cells that only the cyclic shift brought into one window, else 0."""
    labels = []
    for side in grid:
        at = torch.arange(side, device=device)
        labels.append((at >= side - window).long() + (at >= side - shift).long())
    region = labels[0][:, None] * 3 + labels[1]
    region = rearrange(region, "(h p) (w q) -> (h w) (p q)", p=window, q=window)
    return -100.0 * (region[:, :, None] != region[:, None]).float()


class WindowAttention(LocalityAttention):
    """Attention within windows, with learned relative biases; the raster may be rolled first, so
    that windows straddle those of the block before (Liu et al. 2021, sec. 3.2)."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: int,
        shift: int,
        qkv_bias: bool,
        lsa: bool,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            dim=dim,
            heads=heads,
            qkv_bias=qkv_bias,
            dropout=dropout,
            scale=scale,
            learn_temperature=lsa,
            mask_diagonal=lsa,
        )
        self.window, self.shift = window, shift
        self.relative_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.trunc_normal_(self.relative_bias, std=0.02)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "batch cells dim"], *, grid: tuple[int, int]
    ) -> Mixed:
        side = self.window
        shift = self.shift if min(grid) > side else 0
        maps = x.unflatten(1, grid)
        if shift:
            maps = maps.roll((-shift, -shift), (1, 2))
        # Windows go beside the heads: the batch then shares one bias in the kernel.
        qkv = rearrange(
            self.qkv(maps),
            "b (h p) (w q) (t k d) -> t b (h w) k (p q) d",
            p=side,
            q=side,
            t=3,
            k=self.heads,
        )
        q, k, v = qkv.unbind(0)
        bias = self.relative_bias[relative_index(side, x.device)].permute(2, 0, 1)[None]
        if shift:
            bias = bias + foreign_bias(grid, side, shift, x.device)[:, None]
        bias = bias.expand(q.shape[1], -1, -1, -1).flatten(0, 1)[None].to(q.dtype)
        mixed = self.attend(self.sharpened(q).flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), bias)
        mixed = rearrange(
            mixed,
            "b (h w k) (p q) d -> b (h p) (w q) (k d)",
            h=grid[0] // side,
            k=self.heads,
            p=side,
        )
        if shift:
            mixed = mixed.roll((shift, shift), (1, 2))
        return Mixed(self.proj(mixed.flatten(1, 2)))


class WindowBlock(Block):
    """A block whose mixing needs the raster."""

    def mix(self, tokens: Tokens, context: Context) -> Mixed:
        return self.mixing(self.norm1(tokens.x), grid=tokens.grid)


class NormedPatching(GridPatching):
    """A grid of patches with a norm behind the linear map (Swin's ``patch_norm``)."""

    def __init__(self, *, dim: int, patch: int, channels: int = 3) -> None:
        super().__init__(dim=dim, patch=patch, channels=channels)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        tokens = super().forward(image)
        return tokens.with_x(self.norm(tokens.x))


class CellMerging(nn.Module):
    """Swin's patch merging: norm and linear map of 2×2 cells, as (column, row, channel)."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.proj = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, tokens: Tokens) -> Tokens:
        rows, columns = tokens.grid  # type: ignore[misc]
        cells = rearrange(tokens.placed, "b (h p w q) c -> b (h w) (q p c)", h=rows // 2, p=2, q=2)
        x = self.proj(self.norm(cells))
        return _merged(tokens, x, (rows // 2, columns // 2), tokens.x[:, :0])


def swin(
    *,
    grid: tuple[int, int],
    patch: int,
    classes: int,
    dim: int,
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    window: int,
    ratio: float,
    spt: bool,
    lsa: bool,
    channels: int = 3,
    qkv_bias: bool = True,
    scale: float | None = None,
    patch_norm: bool = True,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> Pyramid:
    """Swin with absolute positions, in any number of stages.

    Args:
        window: side of a window, at most the stage's native raster.
        patch_norm: a norm behind the patch embedding; SPT has its own, in front.
        drop_path: rate of the last block, growing from 0.

    Raises:
        PolypatchError: a stage's native raster does not divide into windows.
    """
    widths = [dim * 2**stage for stage in range(len(depths))]
    sides = [tuple(side // 2**stage for side in grid) for stage in range(len(depths))]
    windows = [min(window, *side) for side in sides]
    if min(windows) < 1:
        raise PolypatchError(
            f"inputs of {grid[0] * patch}×{grid[1] * patch} are too small for {len(depths)} stages "
            f"of patches of {patch} pixels"
        )
    multiple = patch * math.lcm(*(2**stage * side for stage, side in enumerate(windows)))
    if any(side * patch % multiple for side in grid):
        safe = patch * window * 2 ** (len(depths) - 1)
        raise PolypatchError(
            f"inputs of {grid[0] * patch}×{grid[1] * patch} do not divide into windows of "
            f"{window}×{window} in every stage; multiples of {safe} do"
        )
    rates = iter(growing(drop_path, sum(depths)))

    def block(stage: int, number: int) -> Block:
        mixing = WindowAttention(
            dim=widths[stage],
            heads=heads[stage],
            window=windows[stage],
            shift=windows[stage] // 2 if number % 2 else 0,
            qkv_bias=qkv_bias,
            lsa=lsa,
            scale=scale,
            dropout=attention_dropout,
        )
        return pre_norm_block(
            dim=widths[stage],
            mixing=mixing,
            hidden=int(widths[stage] * ratio),
            drop_path=next(rates),
            dropout=dropout,
            kind=WindowBlock,
        )

    patching: nn.Module = plain_or_shifted(dim=dim, patch=patch, channels=channels, spt=spt)
    if patch_norm and not spt:
        patching = NormedPatching(dim=dim, patch=patch, channels=channels)
    return Pyramid(
        patching=patching,
        position=LearnedPosition(grid=grid, dim=dim),
        prefix=None,
        dropout=dropout,
        stages=[[block(s, i) for i in range(depth)] for s, depth in enumerate(depths)],
        merges=[
            ShiftedMerging(dim=width, class_token=False) if spt else CellMerging(dim=width)
            for width in widths[:-1]
        ],
        norm=nn.LayerNorm(widths[-1]),
        pooling=MeanPool(),
        head=nn.Linear(widths[-1], classes) if classes else nn.Identity(),
        stride=patch,
        multiple=multiple,
    )
