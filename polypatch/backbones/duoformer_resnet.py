"""ResNet as DuoFormer has it in front (He et al. 2016, arXiv 1512.03385): four stages, no head.

In torchvision's form: in a bottleneck block the 3×3 convolution has the stride, the stem is a 7×7
convolution of stride 2 and a max pooling, strides behind the stages are 4, 8, 16, 32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..nn import ConvNorm, KeyMap, fresh

__all__ = ["RESNETS", "ResNet", "ResNetSize", "resnet_keys"]


class ResNetSize(NamedTuple):
    """Blocks in each stage, inner width of the first, and how much wider a block's output is."""

    depths: tuple[int, int, int, int]
    width: int = 64
    expansion: int = 4

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels behind each stage."""
        return tuple(self.width * 2**stage * self.expansion for stage in range(4))


#: table 1 of the paper; nano is ours
RESNETS: dict[str, ResNetSize] = {
    "r50": ResNetSize((3, 4, 6, 3)),
    "r18": ResNetSize((2, 2, 2, 2), expansion=1),
    "nano": ResNetSize((1, 1, 1, 1), width=16, expansion=1),
}


class Residual(nn.Module):
    """x + its convolutions, then ReLU: two of 3×3, or 1×1, 3×3, 1×1 (a bottleneck)."""

    def __init__(self, *, dim: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        out = width * expansion
        if expansion > 1:
            self.convs = nn.ModuleList(
                (
                    ConvNorm(dim, width, activation=fresh.relu),
                    ConvNorm(width, width, kernel=3, stride=stride, activation=fresh.relu),
                    ConvNorm(width, out),
                )
            )
        else:
            self.convs = nn.ModuleList(
                (
                    ConvNorm(dim, out, kernel=3, stride=stride, activation=fresh.relu),
                    ConvNorm(out, out, kernel=3),
                )
            )
        changes = stride > 1 or dim != out
        self.shortcut = ConvNorm(dim, out, stride=stride) if changes else nn.Identity()

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Tensor:
        y = x
        for conv in self.convs:
            y = conv(y)
        return fresh.relu(fresh.add(self.shortcut(x), y))


class ResNet(nn.Module):
    """Image → the maps behind the four stages."""

    def __init__(self, size: ResNetSize, *, channels: int = 3) -> None:
        super().__init__()
        stem = size.width
        self.stem = ConvNorm(channels, stem, kernel=7, stride=2, activation=fresh.relu)
        dim, stages = stem, []
        for stage, depth in enumerate(size.depths):
            blocks = []
            for number in range(depth):
                stride = 2 if stage and not number else 1
                block = Residual(
                    dim=dim, width=size.width * 2**stage, expansion=size.expansion, stride=stride
                )
                blocks.append(block)
                dim = size.dims[stage]
            stages.append(nn.ModuleList(blocks))
        self.stages = nn.ModuleList(stages)

    def init_weights(self) -> None:
        """Convolutions normal by fan-out (He et al. 2015), norms 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, ConvNorm):
                module.init_weights()

    def forward(
        self,
        image: Float[Tensor, "batch channels height width"],
        through: Callable[..., Any] = lambda block, x: block(x),
    ) -> list[Tensor]:
        x = F.max_pool2d(self.stem(image), 3, stride=2, padding=1)
        maps = []
        for stage in self.stages:
            for block in stage:  # type: ignore[union-attr]
                x = through(block, x)
            maps.append(x)
        return maps


def resnet_keys(
    ours: str, *, stem: tuple[str, str], stages: Mapping[int, str], bottleneck: bool
) -> KeyMap:
    """Key map of a ResNet whose stem and stages have the given names (convolution, norm; number of
    the stage → prefix), with torchvision's names inside."""
    rules = [(stem[0], f"{ours}stem.conv"), (stem[1], f"{ours}stem.norm")]
    for stage, prefix in stages.items():
        place = f"{ours}stages.{stage}.{{i}}"
        for k in range(3 if bottleneck else 2):
            rules += [
                (f"{prefix}.{{i}}.conv{k + 1}", f"{place}.convs.{k}.conv"),
                (f"{prefix}.{{i}}.bn{k + 1}", f"{place}.convs.{k}.norm"),
            ]
        rules += [
            (f"{prefix}.{{i}}.downsample.0", f"{place}.shortcut.conv"),
            (f"{prefix}.{{i}}.downsample.1", f"{place}.shortcut.norm"),
        ]
    return KeyMap(rules, unused=["fc"])
