"""The network of DAT and DAT++ (:mod:`.dat`): blocks, stages, the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError
from ..nn import (
    Backbone,
    DropPath,
    FeatureInfo,
    FeatureMap,
    InputRequirements,
    LayerScale,
    Linear,
    Preprocessing,
    fresh,
    init_parts,
)
from .dat_attention import DeformableAttention
from .dat_local import (
    NeighbourhoodAttention,
    PyramidAttention,
    SlideAttention,
    WindowAttention,
)

__all__ = ["DAT", "LETTERS", "Stage"]

#: what the letters of ``Stage.blocks`` stand for
LETTERS = {
    "D": "deformable attention",
    "L": "windows",
    "S": "shifted windows",
    "N": "neighbourhoods",
    "P": "pyramid reduction",
    "E": "slide attention",
    "X": "a depthwise convolution instead of attention (ConvNeXt's block)",
}


class Embedding(nn.Module):
    """A strided convolution and LN: patches, and the steps between stages."""

    def __init__(
        self, dim: int, out: int, *, kernel: int, stride: int, padding: int, bias: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel, stride, padding, bias=bias)
        self.norm = nn.LayerNorm(out)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch rows columns out"]:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ResidualDepthwise(nn.Conv2d):
    """x + depthwise 3 × 3 (x), as one convolution; (batch, height, width, dim) in and out."""

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, input: Float[Tensor, "batch height width dim"]) -> Tensor:
        weight = self.weight + F.pad(self.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
        x = self._conv_forward(input.permute(0, 3, 1, 2), weight, self.bias)
        return x.permute(0, 2, 3, 1)


class FeedForward(nn.Module):
    """Linear, the residual convolution if there is one, GELU, linear."""

    def __init__(self, *, dim: int, hidden: int, conv: bool, drop: float) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.conv = ResidualDepthwise(dim=hidden) if conv else None
        self.fc2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        if self.conv is None:  # dropout stands behind the activation here, in front of it there
            return self.drop(self.fc2(self.drop(self.fc1(x, fresh.gelu))))
        return self.drop(self.fc2(fresh.gelu(self.conv(self.drop(self.fc1(x))))))


class Block(nn.Module):
    """LPU, mixer, MLP, each with its residual; (batch, height, width, dim) in and out."""

    def __init__(
        self,
        *,
        dim: int,
        mixer: nn.Module,
        mlp: FeedForward,
        lpu: bool,
        scale: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.lpu = ResidualDepthwise(dim=dim) if lpu else nn.Identity()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp
        self.scale1, self.scale2 = (
            nn.Identity() if scale is None else LayerScale(dim=dim, init=scale) for _ in range(2)
        )
        self.drop_path = DropPath(rate=drop_path)

    def mixed(self, x: Float[Tensor, "batch height width dim"]) -> Tensor:
        """What the mixer reads."""
        return self.norm1(self.lpu(x))

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Tensor:
        x = self.lpu(x)
        x = fresh.add(x, self.drop_path(self.scale1(self.mixer(self.norm1(x)))))
        return fresh.add(x, self.drop_path(self.scale2(self.mlp(self.norm2(x)))))


class ConvBlock(nn.Module):
    """``X``: one residual around depthwise convolution, LN and MLP."""

    def __init__(
        self, *, dim: int, kernel: int, mlp: FeedForward, lpu: bool, drop_path: float
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise PolypatchError(f"the convolution's window must be odd, got {kernel}")
        self.lpu = ResidualDepthwise(dim=dim) if lpu else nn.Identity()
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(rate=drop_path)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Tensor:
        x = self.lpu(x)
        mixed = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return fresh.add(x, self.drop_path(self.mlp(self.norm(mixed))))


@dataclass(frozen=True)
class Stage:
    """One of the four stages.

    Attributes:
        blocks: a letter of ``LETTERS`` a block, such as ``"NDND"``.
        groups, stride, kernel, bound, offsets, position: of :class:`DeformableAttention`.
        window, neighbours, reduction: of the letters L, S and X; N; P.
        mlp_conv, lpu: the convolutions of DAT++.
        scale: initial layer scale; None: there is none.
    """

    dim: int
    blocks: str
    heads: int
    groups: int = 1
    stride: int = 1
    kernel: int = 5
    bound: float | None = None
    offsets: bool = True
    position: str | None = "table"
    window: int = 7
    neighbours: int = 7
    reduction: int = 1
    mlp_conv: bool = False
    lpu: bool = False
    scale: float | None = None


class DAT(Backbone):
    """The network of figure 3 of the conference paper, and figure 4 of DAT++.

    Args:
        stem: width behind the patches; a linear layer leads to the first stage's where they differ.
        stages: four of them.
        patch: side and stride of the patches; overlapping ones have twice a stride of half of it,
            which is the same for 4 alone.
        overlapping: 3 × 3 convolutions instead of non-overlapping ones, in stem and between stages.
        expansion: of the MLPs.
        conference: points as in the code of 2022.
        map_norms: LN on every map of :meth:`features`, as the authors' dense tasks have it.
        resolution: input side that position tables are for.
        drop, attn_drop, drop_path: dropout, of the attention's probabilities, stochastic depth
            (rising from 0 to this over the blocks).

    Raises:
        PolypatchError: an unknown letter, or sizes that don't fit each other.
    """

    def __init__(
        self,
        *,
        stem: int,
        stages: tuple[Stage, ...],
        patch: int = 4,
        overlapping: bool = True,
        expansion: int = 4,
        classes: int = 1000,
        channels: int = 3,
        conference: bool = False,
        map_norms: bool = False,
        resolution: int = 224,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if len(stages) != 4:
            raise PolypatchError(f"DAT has four stages, got {len(stages)}")
        if overlapping and (patch % 2 or stem % 2):
            raise PolypatchError(
                f"overlapping patches need an even patch and width, got {patch} and {stem}"
            )
        self.stages_spec, self.patch, self.overlapping = stages, patch, overlapping
        self.expansion, self.conference, self.resolution = expansion, conference, resolution
        self.rates = {"drop": drop, "attn_drop": attn_drop, "drop_path": drop_path}
        self.dim = stages[-1].dim
        kernel, padding = (3, 1) if overlapping else (2, 0)
        if overlapping:
            half, step = stem // 2, patch // 2
            embeddings = [
                Embedding(channels, half, kernel=3, stride=step, padding=1),
                Embedding(half, stem, kernel=3, stride=step, padding=1),
            ]
        else:
            embeddings = [Embedding(channels, stem, kernel=patch, stride=patch, padding=0)]
        self.stem = nn.ModuleList(embeddings)
        self.widen = Linear(stem, stages[0].dim) if stem != stages[0].dim else nn.Identity()
        rates = torch.linspace(0, drop_path, sum(len(s.blocks) for s in stages), device="cpu")
        remaining = iter(rates.tolist())
        side = resolution // patch
        self.stages = nn.ModuleList()
        for spec in stages:
            self.stages.append(
                nn.ModuleList(
                    _block(
                        letter,
                        spec,
                        size=(side, side),
                        hidden=expansion * spec.dim,
                        conference=conference,
                        attn_drop=attn_drop,
                        drop=drop,
                        drop_path=next(remaining),
                    )
                    for letter in spec.blocks
                )
            )
            side = max(1, side // 2)
        self.downs = nn.ModuleList(
            Embedding(before.dim, after.dim, kernel=kernel, stride=2, padding=padding, bias=False)
            for before, after in pairwise(stages)
        )
        # The last map's norm is the one in front of the classifier.
        self.map_norms = nn.ModuleList(nn.LayerNorm(s.dim) for s in stages[:-1] if map_norms)
        self.norm = nn.LayerNorm(self.dim)
        self.head: nn.Module = nn.Linear(self.dim, classes) if classes else nn.Identity()
        stride = (patch // 2) ** 2 if overlapping else patch
        self.feature_info = tuple(FeatureInfo(s.dim, stride * 2**i) for i, s in enumerate(stages))
        self.input_requirements = InputRequirements(minimum=1 if overlapping else 8 * patch)
        self.preprocessing = Preprocessing(
            resolution=resolution, crop=1.0 if resolution >= 384 and not conference else 0.875
        )
        names = [name for name, _ in self.named_parameters()]
        self.undecayed = tuple(w for w in ("rpe", "relative_bias") if any(w in n for n in names))
        self.channels_last()

    def _enter(self, image: Tensor) -> Tensor:
        """Patches, (batch, height, width, dim)."""
        self.input_requirements.check(image, name="DAT")
        x = image.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        for number, embedding in enumerate(self.stem):
            x = embedding(fresh.gelu(x) if number else x)
        return self.widen(x)

    def _maps(self, image: Tensor) -> Iterator[Tensor]:
        """The map behind each stage, (batch, height, width, dim)."""
        x = self._enter(image)
        for number, blocks in enumerate(self.stages):
            if number:
                x = self.downs[number - 1](x)
            for block in blocks:  # type: ignore[union-attr]
                x = self.through(block, x)
            yield x

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        for last in self._maps(image):
            x = last
        return self.norm(x).mean((1, 2))

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """The four stages' maps."""
        norms = (*self.map_norms, self.norm) if len(self.map_norms) else ()
        maps = list(self._maps(image))
        maps = [norm(x) for norm, x in zip(norms, maps)] or maps
        return [
            FeatureMap(x.permute(0, 3, 1, 2), info.stride)
            for x, info in zip(maps, self.feature_info)
        ]

    def sampling_points(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> list[Float[Tensor, "batch groups rows columns 2"]]:
        """Where each block with deformable attention looks, first block first, to be drawn on the
        image: (y, x), -1 and 1 being the middles of the map's outer cells."""
        found = []
        x = self._enter(image)
        for number, blocks in enumerate(self.stages):
            if number:
                x = self.downs[number - 1](x)
            for block in blocks:  # type: ignore[union-attr]
                mixer = getattr(block, "mixer", None)
                if isinstance(mixer, DeformableAttention) and mixer.offsets:
                    found.append(mixer.points(mixer.q(block.mixed(x))))
                x = block(x)
        return found

    def parameter_groups(
        self, *, rate: float, decay: float, slower: Mapping[str, float] | None = None
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer: with and without weight decay; parameters whose name holds a
        word of ``slower`` (such as ``{"offset": 0.01}``) at that part of the rate."""
        spared = self.no_decay()
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, value in self.named_parameters():
            if not value.requires_grad:
                continue
            factor = next((f for word, f in (slower or {}).items() if word in name), 1.0)
            key = (rate * factor, 0.0 if name in spared else decay)
            groups.setdefault(key, []).append(value)
        return [{"params": p, "lr": lr, "weight_decay": d} for (lr, d), p in groups.items()]

    def init_weights(self) -> None:
        """What the authors' networks begin with.

        | part                              | weight                        | bias        |
        |-----------------------------------|-------------------------------|-------------|
        | Conv2d, Linear, the classifier    | torch's, uniform by fan-in    | the same    |
        | LayerNorm                         | 1                             | 0           |
        | bias tables of D, L, S            | normal, std 0.01, cut at ± 2  |             |
        | bias tables of N, E               | normal, std 0.02, cut at ± 2  |             |
        | LayerScale                        | its ``init``                  |             |
        | fixed shift of E                  | 1 at one neighbour            | torch's     |
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, module.init)
        init_parts(self)


def _block(
    letter: str,
    spec: Stage,
    *,
    size: tuple[int, int],
    hidden: int,
    conference: bool,
    attn_drop: float,
    drop: float,
    drop_path: float,
) -> nn.Module:
    dim, heads = spec.dim, spec.heads
    if letter not in LETTERS:
        hint = "; QnA isn't in the paper and fails in the authors' code" if letter == "Q" else ""
        raise PolypatchError(f"there is no block {letter!r}, known are {', '.join(LETTERS)}{hint}")
    if dim % heads:
        raise PolypatchError(f"{heads} heads don't divide the width {dim}")
    mlp = FeedForward(dim=dim, hidden=hidden, conv=spec.mlp_conv, drop=drop)
    if letter == "X":
        return ConvBlock(dim=dim, kernel=spec.window, mlp=mlp, lpu=spec.lpu, drop_path=drop_path)
    drops = dict(attn_drop=attn_drop, drop=drop)
    mixers: dict[str, Callable[[], nn.Module]] = {
        "D": lambda: DeformableAttention(
            dim=dim,
            heads=heads,
            groups=spec.groups,
            size=size,
            stride=spec.stride,
            kernel=spec.kernel,
            bound=spec.bound,
            offsets=spec.offsets,
            position=spec.position,
            conference=conference,
            **drops,
        ),
        "L": lambda: WindowAttention(dim=dim, heads=heads, window=spec.window, shift=0, **drops),
        "S": lambda: WindowAttention(
            dim=dim, heads=heads, window=spec.window, shift=-(-spec.window // 2), **drops
        ),
        "N": lambda: NeighbourhoodAttention(dim=dim, heads=heads, kernel=spec.neighbours, **drops),
        "P": lambda: PyramidAttention(dim=dim, heads=heads, reduction=spec.reduction, **drops),
        "E": lambda: SlideAttention(dim=dim, heads=heads),
    }
    return Block(
        dim=dim,
        mixer=mixers[letter](),
        mlp=mlp,
        lpu=spec.lpu,
        scale=spec.scale,
        drop_path=drop_path,
    )
