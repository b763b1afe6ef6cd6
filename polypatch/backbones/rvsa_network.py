"""RVSA's blocks, dense maps and network, see :mod:`polypatch.backbones.rvsa`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..nn import (
    Backbone,
    DropPath,
    FeatureInfo,
    FeatureMap,
    InputRequirements,
    LayerNorm2d,
    Linear,
    Preprocessing,
    fresh,
)
from ..nn.positions import resample_grid
from .rvsa_attention import FullAttention, WindowAttention

__all__ = ["PYRAMIDS", "RVSA", "Block", "LocalBranch", "Pyramid"]

PYRAMIDS = ("none", "last", "stages")


class LocalBranch(nn.Module):
    """ViTAE's convolutions beside the attention: a map to a map, channels last."""

    def __init__(self, *, dim: int, hidden: int, kernel: int = 3) -> None:
        super().__init__()
        padding, groups = kernel // 2, dim // 4
        self.conv1 = nn.Conv2d(dim, hidden, kernel, padding=padding, groups=groups)
        self.norm = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, dim, kernel, padding=padding, groups=groups)

    def init_weights(self) -> None:
        """torch's defaults."""
        for layer in (self.conv1, self.norm, self.conv2):
            layer.reset_parameters()

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        x = x.permute(0, 3, 1, 2)
        if self.norm.training or torch.is_grad_enabled():
            x = self.norm(self.conv1(x))
        else:  # the norm in the weights: the widest map of the network is gone over once less
            scale, shift = fresh.affine_of(self.norm)
            weight = self.conv1.weight * scale[:, None, None, None]
            bias = None if self.conv1.bias is None else self.conv1.bias * scale + shift
            x = F.conv2d(x, weight, bias, padding=self.conv1.padding, groups=self.conv1.groups)
        return self.conv2(fresh.silu(x)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """x += attention(LN(x)) [+ local(x)]; x += MLP(LN(x))."""

    def __init__(
        self,
        *,
        dim: int,
        attention: nn.Module,
        hidden: int,
        local: LocalBranch | None,
        eps: float,
        layer_scale: float | None,
        dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attention, self.local = attention, local
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)
        self.layer_scale, self.dropout = layer_scale, dropout
        gain = None if layer_scale is None else torch.full((dim,), layer_scale)
        self.gamma1 = None if gain is None else nn.Parameter(gain.clone())
        self.gamma2 = None if gain is None else nn.Parameter(gain.clone())
        self.drop_path = DropPath(rate=drop_path)

    def init_weights(self) -> None:
        """Layer scale."""
        for gain in (self.gamma1, self.gamma2):
            if gain is not None and self.layer_scale is not None:
                nn.init.constant_(gain, self.layer_scale)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _add(self, x: Tensor, branch: Tensor, gain: Tensor | None = None) -> Tensor:
        if self.training and self.drop_path.rate:
            return x + self.drop_path(branch if gain is None else branch * gain)
        return fresh.add(x, branch) if gain is None else fresh.add_scaled(x, branch, gain)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        local = None if self.local is None else self.local(x)
        x = self._add(x, self.attention(self.norm1(x)), self.gamma1)
        if local is not None:
            x = self._add(x, local)
        hidden = self.fc1(self.norm2(x), fresh.gelu)
        if self.local is not None:
            hidden = self._drop(hidden)
        return self._add(x, self._drop(self.fc2(hidden)), self.gamma2)


class Pyramid(nn.Module):
    """Four maps at one stride to four scales, each half of the one before.

    Args:
        finest: how many times finer the first one is, 4 or 2 (the authors' for patches of 8).
    """

    def __init__(self, *, dim: int, finest: int) -> None:
        super().__init__()
        self.finest = finest
        self.up2 = nn.ConvTranspose2d(dim, dim, 2, 2)
        if finest == 4:
            self.up4_first = nn.ConvTranspose2d(dim, dim, 2, 2)
            self.up4_norm = LayerNorm2d(dim, eps=1e-6)
            self.up4_second = nn.ConvTranspose2d(dim, dim, 2, 2)

    def forward(
        self, maps: list[Float[Tensor, "batch dim height width"]]
    ) -> list[Float[Tensor, "batch dim _ _"]]:
        def half(x: Tensor, times: int) -> Tensor:
            kernel = (min(times, x.shape[-2]), min(times, x.shape[-1]))
            return F.max_pool2d(x, kernel, times)

        first, second, third, fourth = maps
        if self.finest == 2:
            return [self.up2(first), second, half(third, 2), half(fourth, 4)]
        first = self.up4_second(fresh.gelu(self.up4_norm(self.up4_first(first))))
        return [first, self.up2(second), third, half(fourth, 2)]


class RVSA(Backbone):
    """The networks of figure 2.

    Args:
        resolution: what the tables of positions are made for, (height, width).
        window: side of the windows, in cells.
        interval: every so manieth block attends to the whole map.
        separate: keys and values have windows of their own.
        local: ViTAE's convolutional branch.
        hidden: width of the MLP, default ``mlp_ratio`` times the width; of the branch it is always
            that.
        bias: of queries, keys and values (ViTAE: not of keys).
        key_bias: ViTAE's windows do have one of keys (the authors' detectors).
        scale: of the logits, default 1 / sqrt(width of a head).
        absolute: a learned table of positions is added to the patches.
        spare_row: it has a row more, in front, that nothing reads (the authors' classifiers).
        layer_scale: initial gain of the branches (ViT only), None for none.
        pyramid: the maps that :meth:`features` gives. ``"none"``: behind four blocks, at the
            patch's stride; ``"last"``: the normed last map at four scales, for detection;
            ``"stages"``: those behind the blocks ``taps`` at four scales, for segmentation.
        taps: blocks counted from 1; default a third, a half, two thirds of them and all, and
            without a pyramid every quarter.
        finest: of the pyramid, how many times finer than the patches it begins: 4 or 2.
        dropout: of patches, projections and MLPs; ``attention_dropout``: of the probabilities in
            full attention (windows have none, as in the authors' code).
        drop_path: rate of the last block, growing linearly from 0 at the first.

    Raises:
        PolypatchError: unknown words, parts that don't fit each other.
    """

    undecayed = ("position",)

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        patch: int = 16,
        resolution: tuple[int, int] = (224, 224),
        window: int = 7,
        interval: int = 3,
        separate: bool = False,
        local: bool = False,
        mlp_ratio: float = 4.0,
        hidden: int | None = None,
        bias: bool = True,
        key_bias: bool = False,
        scale: float | None = None,
        absolute: bool = True,
        spare_row: bool = True,
        layer_scale: float | None = None,
        pyramid: str = "none",
        taps: tuple[int, ...] | None = None,
        finest: int = 4,
        classes: int = 1000,
        channels: int = 3,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        if pyramid not in PYRAMIDS:
            hint = suggest(pyramid, PYRAMIDS, kind="pyramids")
            raise PolypatchError(f"there is no pyramid {pyramid!r}{hint}")
        if dim % heads or (local and dim % 4):
            raise PolypatchError(f"a width of {dim} doesn't divide by its {heads} heads, or by 4")
        if local and layer_scale is not None:
            raise PolypatchError("ViTAE's blocks have no layer scale")
        if pyramid != "none" and (finest not in (2, 4) or patch % finest):
            raise PolypatchError(f"finest is 2 or 4 and divides the patch of {patch}, got {finest}")
        if taps is None:
            quarters = (3, 6, 9, 12) if pyramid == "none" else (4, 6, 8, 12)
            taps = tuple(max(1, depth * k // 12) for k in quarters)
            taps = tuple(sorted(set(taps))) if pyramid == "none" else taps
        if min(taps) < 1 or max(taps) > depth or (pyramid == "stages" and len(taps) != 4):
            raise PolypatchError(f"taps are four blocks from 1 to {depth}, got {taps}")
        grid = (resolution[0] // patch, resolution[1] // patch)
        if min(grid) < 1:
            raise PolypatchError(f"a resolution of {resolution} is less than a patch of {patch}")
        self.dim, self.heads, self.patch = dim, heads, patch
        self.window, self.interval = window, min(interval, depth + 1)
        self.resolution, self.grid, self.eps = resolution, grid, eps
        self.separate, self.has_local = separate, local
        self.bias, self.key_bias = bias, key_bias or not local
        self.mlp_ratio, self.hidden, self.scale = mlp_ratio, hidden, scale
        self.layer_scale, self.pyramid_kind, self.taps = layer_scale, pyramid, taps
        self.dropout, self.attention_dropout, self.drop_path = dropout, attention_dropout, drop_path

        self.stem = nn.Conv2d(channels, dim, patch, patch)
        self.spare = int(spare_row)
        rows = self.spare + grid[0] * grid[1]
        self.position = nn.Parameter(torch.zeros(1, rows, dim)) if absolute else None

        def kind(keys: bool) -> str:
            return "none" if not bias else "all" if keys else "qv"

        def attention(number: int) -> nn.Module:
            if number % interval:
                return WindowAttention(
                    dim=dim,
                    heads=heads,
                    bias=kind(self.key_bias),
                    scale=scale,
                    dropout=dropout,
                    window=window,
                    separate=separate,
                )
            return FullAttention(
                dim=dim,
                heads=heads,
                bias=kind(not local),
                scale=scale,
                dropout=dropout,
                grid=grid,
                attention_dropout=attention_dropout,
            )

        inner = int(dim * mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                attention=attention(number),
                hidden=hidden or inner,
                local=LocalBranch(dim=dim, hidden=inner) if local else None,
                eps=eps,
                layer_scale=layer_scale,
                dropout=dropout,
                drop_path=drop_path * (number - 1) / max(1, depth - 1),
            )
            for number in range(1, depth + 1)
        )
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.pyramid = None if pyramid == "none" else Pyramid(dim=dim, finest=finest)
        self.head: nn.Module = nn.Linear(dim, classes) if classes else nn.Identity()
        if self.pyramid is None:
            strides = (patch,) * len(taps)
        else:
            strides = tuple(patch // finest * k for k in (1, 2, 4, 8))
        self.feature_info = tuple(FeatureInfo(dim, stride) for stride in strides)
        self.input_requirements = InputRequirements(minimum=patch)
        if preprocessing is not None:
            self.preprocessing = preprocessing
        self.channels_last()

    def _maps(self, image: Tensor) -> Iterator[Tensor]:
        """The map behind each block, (batch, height, width, dim)."""
        self.input_requirements.check(image, name="RVSA")
        x = self.stem(image.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        if self.position is not None:
            table = self.position[:, self.spare :].unflatten(1, self.grid)
            x = x + resample_grid(table, (x.shape[1], x.shape[2])).to(x.dtype)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = self.through(block, x)
            yield x

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        """The normed mean; sides that the patch doesn't divide lose the remainder."""
        for last in self._maps(image):
            x = last
        return self.norm(x.mean((1, 2)))

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """Maps as ``pyramid`` says. Sides that the patch doesn't divide get zeros below and to the
        right, as in the authors' pipelines, and the maps are cut."""
        height, width = image.shape[-2:]
        self.input_requirements.check(image, name="RVSA")
        below, right = -height % self.patch, -width % self.patch
        image = F.pad(image, (0, right, 0, below)) if below or right else image
        behind: dict[int, Tensor] = {}
        for number, x in enumerate(self._maps(image), start=1):
            if number in self.taps:
                behind[number] = x.permute(0, 3, 1, 2)
        maps = [behind[number] for number in self.taps]
        if self.pyramid is not None:
            if self.pyramid_kind == "last":
                maps = [self.norm(x).permute(0, 3, 1, 2)] * 4
            maps = self.pyramid(maps)
        return [
            FeatureMap(found[:, :, : -(-height // stride), : -(-width // stride)], stride)
            for found, (_, stride) in zip(maps, self.feature_info, strict=True)
        ]

    def layer_decay(self, rate: float = 0.75) -> dict[str, float]:
        """The factor of each parameter's learning rate in the authors' fine-tuning: patches and
        positions rate^(depth + 1), block i of 1 … depth rate^(depth + 1 - i), the rest 1."""
        depth = len(self.blocks)

        def layer(name: str) -> int:
            if name.startswith(("stem.", "position")):
                return 0
            return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1

        return {name: rate ** (depth + 1 - layer(name)) for name, _ in self.named_parameters()}

    def init_weights(self) -> None:
        """As the authors:

        | layer                             | weight                        | bias              |
        |-----------------------------------|-------------------------------|-------------------|
        | Linear                            | normal, std 0.02              | 0                 |
        | convolutions, and what moves the  | uniform by fan-in, torch's    | uniform by fan-in |
        | windows                           | default                       |                   |
        | norms                             | 1                             | 0                 |
        | positions, tables of cell pairs   | normal, std 0.02              |                   |
        | relative positions                | 0                             |                   |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.LayerNorm | nn.BatchNorm2d):
                module.reset_parameters()
        if self.position is not None:
            nn.init.trunc_normal_(self.position, std=0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.init_weights()
            assert isinstance(block.attention, FullAttention | WindowAttention)
            block.attention.init_weights()
