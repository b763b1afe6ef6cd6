"""The network of LIT (:mod:`.lit`): deformable token merging, blocks, the whole.

Maps are (batch, height, width, dim).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError
from ..nn import (
    Attention,
    Backbone,
    DropPath,
    FeatureInfo,
    FeatureMap,
    InputRequirements,
    Linear,
    Mlp,
    Preprocessing,
    fresh,
    init_parts,
)

__all__ = ["LIT", "DeformableMerging", "deformable_patches", "relative_bias"]


def deformable_patches(
    x: Float[Tensor, "batch height width dim"],
    offsets: Float[Tensor, "batch rows columns 4 2"],
) -> Float[Tensor, "batch rows columns four_dim"]:
    """The tokens of 2 × 2 patches (taps in raster order), each read bilinearly at its own place,
    shifted by (y, x) cells; zeros beyond the map."""
    batch, height, width, dim = x.shape
    place = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
    numbers, weights = [], []
    for axis, cells in enumerate((height, width)):
        steps = torch.arange(offsets.shape[1 + axis], device=x.device) * 2
        tap = torch.tensor([0, 0, 1, 1] if axis == 0 else [0, 1, 0, 1], device=x.device)
        start = steps.view(-1, 1, 1) + tap if axis == 0 else steps.view(-1, 1) + tap
        # From one cell outside on there is nothing, so that far places may be brought near.
        at = (start + place[..., axis]).clamp(-1, cells)
        first = at.floor()
        rest = at - first
        pair = torch.stack([first, first + 1], -1).long()
        inside = (pair >= 0) & (pair < cells)
        weights.append(torch.stack([1 - rest, rest], -1) * inside)
        numbers.append(pair.clamp(0, cells - 1))
    row, column = numbers[0][..., :, None], numbers[1][..., None, :]
    sample = torch.arange(batch, device=x.device).view(-1, 1, 1, 1, 1, 1)
    index = (sample * height + row) * width + column
    weight = weights[0][..., :, None] * weights[1][..., None, :]
    read = F.embedding_bag(
        index.view(-1, 4),
        x.reshape(-1, dim),
        per_sample_weights=weight.view(-1, 4).to(x.dtype),
        mode="sum",
    )
    return read.view(*offsets.shape[:3], 4 * dim)


def relative_bias(
    table: Float[Tensor, "heads steps_y steps_x"], size: tuple[int, int]
) -> Float[Tensor, "1 heads tokens tokens"]:
    """Swin's bias for every pair of tokens of a whole map, from a table that is resized bicubically
    where it is for another map; distances are query minus key."""
    height, width = size
    steps = (2 * height - 1, 2 * width - 1)
    if table.shape[1:] != steps:
        table = F.interpolate(table[None], steps, mode="bicubic")[0]
    down, right = (torch.arange(n, device=table.device) for n in size)
    table = table[:, :, right[:, None] - right + width - 1]  # heads, steps, query's x, key's x
    # The large result is written once, in its final order, as rows of (head, step, query's x).
    index = torch.arange(table[..., 0].numel(), device=table.device).view(table.shape[:-1])
    index = index[:, down[:, None] - down + height - 1].transpose(2, 3)
    return F.embedding(index, table.flatten(0, 2)).flatten(3).flatten(1, 2)[None]


# ---- modules -----------------------------------------------------------------------------------


class DeformableMerging(nn.Module):
    """DTM, eq. 5 to 7; (batch, height, width, dim) in, half of the sides out."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(dim, 8, 2, stride=2)
        self.proj = Linear(4 * dim, out)
        self.norm = nn.BatchNorm2d(out)

    def init_weights(self) -> None:
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]
        self.proj.reset_parameters()  # as of the convolution that it is
        self.norm.reset_parameters()

    def offsets(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch rows columns 4 2"]:
        """How far from its own place each of four tokens is fetched, in cells, as (y, x)."""
        return self.offset(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(-1, (4, 2))

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch rows columns out"]:
        x = self.proj(deformable_patches(x, self.offsets(x)))
        if self.norm.training or torch.is_grad_enabled():
            return F.gelu(self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return fresh.gelu(fresh.affine(x, *fresh.affine_of(self.norm)))


class PlainMerging(nn.Module):
    """PVT's: a convolution and LN."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, 2, stride=2)
        self.norm = nn.LayerNorm(out)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch rows columns out"]:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Positions(nn.Module):
    """A table over a map of ``size``, bilinearly resized for others; ``extra`` entries in front
    of it belong to tokens without a place."""

    def __init__(self, *, dim: int, size: tuple[int, int], extra: int) -> None:
        super().__init__()
        self.size, self.extra = size, extra
        self.table = nn.Parameter(torch.zeros(1, extra + size[0] * size[1], dim))

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, size: tuple[int, int]) -> Float[Tensor, "1 tokens dim"]:
        if size == self.size:
            return self.table
        maps = self.table[:, self.extra :].transpose(1, 2).unflatten(-1, self.size)
        maps = F.interpolate(maps, size, mode="bilinear").flatten(2).transpose(1, 2)
        return torch.cat([self.table[:, : self.extra], maps], dim=1)


class Block(nn.Module):
    """Attention, if the stage has it, and an MLP.

    Args:
        size: of the map whose relative positions bias the attention; None: there is no bias.
        scale: of the logits; None: 1 / √head_dim.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        hidden: int,
        attention: bool,
        size: tuple[int, int] | None,
        eps: float,
        qkv_bias: bool,
        scale: float | None,
        drop: float,
        attn_drop: float,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.size = size if attention else None
        if attention:
            self.norm1 = nn.LayerNorm(dim, eps=eps)
            self.attn = Attention(dim=dim, heads=heads, qkv_bias=qkv_bias, dropout=attn_drop)
            self.attn.scale = self.attn.scale if scale is None else scale
        if self.size is not None:
            entries = (2 * self.size[0] - 1) * (2 * self.size[1] - 1)
            self.relative = nn.Parameter(torch.zeros(entries, heads))
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim=dim, hidden=hidden, activation=fresh.gelu, dropout=drop)
        self.drop = nn.Dropout(drop)
        self.drop_path = DropPath()

    def init_weights(self) -> None:
        if self.size is not None:
            nn.init.trunc_normal_(self.relative, std=0.02)

    def bias(self, size: tuple[int, int]) -> Float[Tensor, "1 heads tokens tokens"] | None:
        if self.size is None:
            return None
        steps = (2 * self.size[0] - 1, 2 * self.size[1] - 1)
        return relative_bias(self.relative.t().unflatten(1, steps), size)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], size: tuple[int, int]
    ) -> Float[Tensor, "batch tokens dim"]:
        if self.attention:
            y = self.norm1(x)
            bias = self.bias(size)
            mixed = self.attn(y, bias=None if bias is None else bias.to(y.dtype)).x
            x = fresh.add(x, self.drop_path(self.drop(mixed)))
        return fresh.add(x, self.drop_path(self.drop(self.mlp(self.norm2(x)))))


class LIT(Backbone):
    """The network of figure 2.

    Args:
        dims, depths, heads, expansions: per stage; ``expansions`` of the MLPs.
        attention: which stages have it.
        relative: relative positions and the mean (LIT-S, -M, -B), else absolute positions and a
            class token in the last stage (LIT-Ti).
        deformable: merging by DTM, else PVT's.
        patch_norm: LN behind the patches; its ε is 1e-5 in LIT-Ti, whatever ``eps`` is.
        map_norms: LN on the maps of :meth:`features` but the first, as the authors' dense tasks
            have it.
        resolution: input side, or sides, that position tables are for.
        scale: of the attention's logits; None: 1 / √head_dim.
        drop_path: stochastic depth, rising from 0 to this over the blocks.

    Raises:
        PolypatchError: lists of different lengths, or a resolution below one patch in the last map.
    """

    def __init__(
        self,
        *,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        expansions: tuple[float, ...],
        attention: tuple[bool, ...] = (False, False, True, True),
        relative: bool = True,
        deformable: bool = True,
        patch: int = 4,
        patch_norm: bool = True,
        map_norms: bool = False,
        eps: float = 1e-5,
        classes: int = 1000,
        channels: int = 3,
        resolution: int | tuple[int, int] = 224,
        qkv_bias: bool = True,
        scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        stages = len(dims)
        if {len(depths), len(heads), len(expansions), len(attention)} != {stages}:
            raise PolypatchError(
                f"depths, heads, expansions and attention must have one entry for each of {stages} "
                f"widths, got {len(depths)}, {len(heads)}, {len(expansions)}, {len(attention)}"
            )
        if any(dim % n for dim, n, has in zip(dims, heads, attention) if has):
            raise PolypatchError(f"heads {heads} don't divide the widths {dims}")
        sides = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        self.least = patch * 2 ** (stages - 1)
        if min(sides) < self.least:
            raise PolypatchError(f"{stages} stages need a resolution of {self.least}, got {sides}")
        self.dims, self.depths, self.heads, self.expansions = dims, depths, heads, expansions
        self.attention, self.relative, self.deformable = attention, relative, deformable
        self.patch, self.eps, self.sides = patch, eps, sides
        self.options = {"qkv_bias": qkv_bias, "scale": scale, "drop": drop, "attn_drop": attn_drop}
        self.dim = dims[-1]
        self.patches = nn.Conv2d(channels, dims[0], patch, stride=patch)
        stem_eps = eps if relative else 1e-5
        self.patch_norm = nn.LayerNorm(dims[0], eps=stem_eps) if patch_norm else nn.Identity()
        sizes = [(sides[0] // patch // 2**i, sides[1] // patch // 2**i) for i in range(stages)]
        self.positions = nn.ModuleList(
            Positions(dim=dim, size=size, extra=int(i == stages - 1))
            for i, (dim, size) in enumerate(zip(dims, sizes))
            if not relative
        )
        self.drop = nn.Dropout(drop)
        merging = DeformableMerging if deformable else PlainMerging
        self.mergings = nn.ModuleList(merging(a, b) for a, b in pairwise(dims))
        self.stages = nn.ModuleList(
            nn.ModuleList(
                Block(
                    dim=dims[i],
                    heads=heads[i],
                    hidden=int(dims[i] * expansions[i]),
                    attention=attention[i],
                    size=sizes[i] if relative else None,
                    eps=eps,
                    **self.options,
                )
                for _ in range(depths[i])
            )
            for i in range(stages)
        )
        self.set_drop_path(drop_path)
        if not relative:
            self.class_token = nn.Parameter(torch.zeros(1, 1, self.dim))
        # The last map's norm is the one in front of the classifier.
        self.map_norms = nn.ModuleList(nn.LayerNorm(d, eps=eps) for d in dims[1:-1] if map_norms)
        self.norm = nn.LayerNorm(self.dim, eps=eps)
        self.head: nn.Module = nn.Linear(self.dim, classes) if classes else nn.Identity()
        self.feature_info = tuple(FeatureInfo(dim, patch * 2**i) for i, dim in enumerate(dims))
        self.input_requirements = InputRequirements(minimum=self.least - patch + 1)
        self.preprocessing = Preprocessing(resolution=max(sides))
        self.undecayed = ("relative",) if relative and any(attention) else ()
        self.undecayed += () if relative else ("class_token",)
        self.channels_last()

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth from now on. The authors train ``lit-pvt-small-full-msa`` without it for
        100 epochs, LIT with it from the start."""
        self.drop_path = rate
        blocks = [block for stage in self.stages for block in stage]  # type: ignore[union-attr]
        rates = torch.linspace(0, rate, len(blocks), device="cpu").tolist()
        for block, value in zip(blocks, rates):
            block.drop_path.rate = value

    def _enter(self, image: Tensor) -> Tensor:
        """Patches, (batch, height, width, dim)."""
        self.input_requirements.check(image, name="LIT")
        below, right = -image.shape[2] % self.patch, -image.shape[3] % self.patch
        image = F.pad(image, (0, right, 0, below)) if below or right else image
        image = image.contiguous(memory_format=torch.channels_last)
        return self.patch_norm(self.patches(image).permute(0, 2, 3, 1))

    def _stages(self, image: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Behind each stage its map (batch, height, width, dim), and the tokens that it is part of:
        in LIT-Ti's last stage a class token stands in front."""
        x = self._enter(image)
        for number, blocks in enumerate(self.stages):
            x = self.mergings[number - 1](x) if number else x
            size = (x.shape[1], x.shape[2])
            tokens = x.flatten(1, 2)
            if not self.relative:
                position: Positions = self.positions[number]  # type: ignore[assignment]
                if position.extra:
                    tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], dim=1)
                tokens = tokens + position(size)
            tokens = self.drop(tokens)
            for block in blocks:  # type: ignore[union-attr]
                tokens = self.through(block, tokens, size)
            x = tokens[:, -size[0] * size[1] :].unflatten(1, size)
            yield x, tokens

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        for _, last in self._stages(image):
            tokens = last
        return self.norm(tokens).mean(1) if self.relative else self.norm(tokens[:, 0])

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """The stages' maps."""
        maps = [x for x, _ in self._stages(image)]
        if len(self.map_norms):
            norms = (*self.map_norms, self.norm)
            maps = [maps[0], *(norm(x) for norm, x in zip(norms, maps[1:]))]
        return [
            FeatureMap(x.permute(0, 3, 1, 2), info.stride)
            for x, info in zip(maps, self.feature_info)
        ]

    def offsets(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> list[Float[Tensor, "batch rows columns 4 2"]]:
        """Of each merging, first one first: how far from its place each token is fetched, in cells
        of the map that is merged, as (y, x); to be drawn on the image.

        Raises:
            PolypatchError: plain merging.
        """
        if not self.deformable:
            raise PolypatchError("plain merging has no offsets")
        maps = [x for x, _ in self._stages(image)]
        return [merging.offsets(x) for merging, x in zip(self.mergings, maps)]  # type: ignore[union-attr]

    def parameter_groups(
        self, *, rate: float, decay: float, offsets: float = 0.01
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer as the authors have them: decayed and not, and the matrices that
        predict offsets at ``offsets`` times the rate."""
        spared = self.no_decay()
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, value in self.named_parameters():
            slow = name.startswith("mergings") and name.endswith("offset.weight")
            key = (rate * offsets if slow else rate, 0.0 if name in spared else decay)
            groups.setdefault(key, []).append(value)
        return [{"params": p, "lr": lr, "weight_decay": d} for (lr, d), p in groups.items()]

    def init_weights(self) -> None:
        """What the authors' networks begin with.

        | part                             | weight                      | bias     |
        |----------------------------------|-----------------------------|----------|
        | Linear                           | normal, std 0.02, cut       | 0        |
        | LayerNorm, BatchNorm2d           | 1; statistics fresh         | 0        |
        | patches, plain merging           | torch's, uniform by fan-in  | the same |
        | DTM's convolution                | the same                    | the same |
        | DTM's offsets                    | 0                           | 0        |
        | position tables, class token     | normal, std 0.02, cut       |          |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.LayerNorm):
                module.reset_parameters()
        if not self.relative:
            nn.init.trunc_normal_(self.class_token, std=0.02)
        init_parts(self)
