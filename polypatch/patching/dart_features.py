"""Features for DART's score networks: small ones, and the first layers of ImageNet classifiers.

MobileNetV3 (Howard et al. 2019, arXiv 1905.02244) and EfficientNet-B0 (Tan & Le 2019, arXiv
1905.11946), as far as :mod:`polypatch.patching.dart` reads them, with torchvision's names of
weights, which the published score networks carry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..nn import DropPath, load_exactly

__all__ = ["ConvFeatures", "Features", "ImageNetFeatures", "load_features", "score_features"]

#: Makes a norm for a number of channels.
Norm = Callable[[int], nn.Module]


class ConvFeatures(nn.Sequential):
    """Two strided convolutions, for small images and hosts (ours, not the paper's)."""

    def __init__(self, *, channels: int = 3, dim: int = 32) -> None:
        super().__init__(
            nn.Conv2d(channels, dim // 2, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            nn.GELU(),
        )


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, squeeze-and-excitation, project (Sandler et al. 2018; Howard
    et al. 2019, fig. 4). Parts that a block lacks are left out of ``block``, as in torchvision,
    whose weights the published score networks start from."""

    def __init__(
        self,
        *,
        dim: int,
        expanded: int,
        out: int,
        kernel: int,
        stride: int,
        squeeze: int,
        activation: type[nn.Module],
        gate: tuple[type[nn.Module], type[nn.Module]],
        norm: Norm,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        if expanded != dim:
            parts.append(_conv(dim, expanded, activation=activation, norm=norm))
        depthwise = partial(_conv, kernel=kernel, stride=stride, groups=expanded)
        parts.append(depthwise(expanded, expanded, activation=activation, norm=norm))
        if squeeze:
            parts.append(SqueezeExcitation(dim=expanded, squeeze=squeeze, gate=gate))
        parts.append(_conv(expanded, out, activation=None, norm=norm))
        self.block = nn.Sequential(*parts)
        self.residual = stride == 1 and dim == out
        self.drop_path = DropPath(rate=drop_path)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Tensor:
        return x + self.drop_path(self.block(x)) if self.residual else self.block(x)


class SqueezeExcitation(nn.Module):
    """Channels times a gate of their means (Hu et al. 2018)."""

    def __init__(
        self, *, dim: int, squeeze: int, gate: tuple[type[nn.Module], type[nn.Module]]
    ) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, dim, 1)
        self.activation, self.gate = gate[0](), gate[1]()

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.activation(self.fc1(pooled))))


def _conv(
    dim: int,
    out: int,
    *,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None,
    norm: Norm,
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(dim, out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
        norm(out),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))


# Howard et al. 2019, tables 1 and 2: kernel, expanded, out, squeeze-and-excitation, hard swish,
# stride. The first layer has 16 channels and stride 2, the last expands sixfold.
_MOBILENET: dict[str, list[tuple[int, int, int, bool, bool, int]]] = {
    "small": [
        (3, 16, 16, True, False, 2),
        (3, 72, 24, False, False, 2),
        (3, 88, 24, False, False, 1),
        (5, 96, 40, True, True, 2),
        (5, 240, 40, True, True, 1),
        (5, 240, 40, True, True, 1),
        (5, 120, 48, True, True, 1),
        (5, 144, 48, True, True, 1),
        (5, 288, 96, True, True, 2),
        (5, 576, 96, True, True, 1),
        (5, 576, 96, True, True, 1),
    ],
    "large": [
        (3, 16, 16, False, False, 1),
        (3, 64, 24, False, False, 2),
        (3, 72, 24, False, False, 1),
        (5, 72, 40, True, False, 2),
        (5, 120, 40, True, False, 1),
        (5, 120, 40, True, False, 1),
        (3, 240, 80, False, True, 2),
        (3, 200, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 480, 112, True, True, 1),
        (3, 672, 112, True, True, 1),
        (5, 672, 160, True, True, 2),
        (5, 960, 160, True, True, 1),
        (5, 960, 160, True, True, 1),
    ],
}

# Tan & Le 2019, table 1: expansion, kernel, stride of the first, out, layers.
_EFFICIENTNET_B0 = [
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
]


class ImageNetFeatures(nn.Sequential):
    """The first layers of an ImageNet classifier, with torchvision's names of weights."""

    def init_weights(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
                nn.init.ones_(layer.weight)
                nn.init.zeros_(layer.bias)


def _mobilenet(size: str, layers: int, channels: int) -> ImageNetFeatures:
    norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    stack: list[nn.Module] = [
        _conv(channels, 16, kernel=3, stride=2, activation=nn.Hardswish, norm=norm)
    ]
    dim = 16
    for kernel, expanded, out, excite, swish, stride in _MOBILENET[size]:
        # A quarter of the channels, rounded to a multiple of 8 but not below 90 %.
        quarter = expanded // 4
        squeeze = max(8, (quarter + 4) // 8 * 8)
        squeeze += 8 * (squeeze < 0.9 * quarter)
        stack.append(
            InvertedResidual(
                dim=dim,
                expanded=expanded,
                out=out,
                kernel=kernel,
                stride=stride,
                squeeze=squeeze if excite else 0,
                activation=nn.Hardswish if swish else nn.ReLU,
                gate=(nn.ReLU, nn.Hardsigmoid),
                norm=norm,
            )
        )
        dim = out
    stack.append(_conv(dim, 6 * dim, activation=nn.Hardswish, norm=norm))
    return ImageNetFeatures(*stack[:layers])


def _efficientnet(channels: int) -> ImageNetFeatures:
    norm = nn.BatchNorm2d
    stack: list[nn.Module] = [
        _conv(channels, 32, kernel=3, stride=2, activation=nn.SiLU, norm=norm)
    ]
    dim, number, depth = 32, 0, sum(row[4] for row in _EFFICIENTNET_B0)
    for expansion, kernel, first_stride, out, layers in _EFFICIENTNET_B0:
        stage: list[nn.Module] = []
        for index in range(layers):
            stage.append(
                InvertedResidual(
                    dim=dim,
                    expanded=expansion * dim,
                    out=out,
                    kernel=kernel,
                    stride=first_stride if index == 0 else 1,
                    squeeze=max(1, dim // 4),
                    activation=nn.SiLU,
                    gate=(nn.SiLU, nn.Sigmoid),
                    drop_path=0.2 * number / depth,
                    norm=norm,
                )
            )
            dim, number = out, number + 1
        stack.append(nn.Sequential(*stage))
    stack.append(_conv(dim, 1280, activation=nn.SiLU, norm=norm))
    return ImageNetFeatures(*stack)


class Features(NamedTuple):
    """How to build a score network's features, their width and the head's."""

    make: Callable[[int], nn.Module]
    dim: int
    hidden: int


def score_features(name: str, version: str = "v1", *, channels: int = 3) -> Features:
    """Features by name, with the head's widths as in the authors' code (``dart/spn.py``).

    ``"conv"``: two strided convolutions, ours; ``"pixel"``: the pixels themselves (the authors'
    default); ``"mobilenet-small"``, ``"mobilenet-large"``, ``"efficientnet-b0"``: as far as each
    version reads them.
    """
    first = version == "v1"
    table = {
        "conv": Features(lambda c: ConvFeatures(channels=c), 32, 32),
        "pixel": Features(lambda c: nn.Identity(), channels, 64),
        "mobilenet-small": Features(
            lambda c: _mobilenet("small", 11 if first else 13, c), 96 if first else 576, 96
        ),
        "mobilenet-large": Features(
            lambda c: _mobilenet("large", 15 if first else 17, c),
            160 if first else 960,
            160 if first else 96,
        ),
        "efficientnet-b0": Features(_efficientnet, 1280, 96),
    }
    if name not in table:
        raise PolypatchError(f"there is no score={name!r}{suggest(name, table, kind='scores')}")
    return table[name]


def load_features(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill the score features of ``model`` from an ImageNet classifier's state dict (torchvision's
    ``mobilenet_v3_small``, ``mobilenet_v3_large``, ``efficientnet_b0``). Its later layers are left.

    Raises:
        PolypatchError: the model has no such features, or a weight is missing or misshapen.
    """
    patching = getattr(model, "patching", model)
    features = getattr(getattr(patching, "score", None), "features", None)
    if not isinstance(features, ImageNetFeatures):
        raise PolypatchError(
            "this model's scores don't come from an ImageNet network; "
            "make it with dart(score=mobilenet-small) or another"
        )
    given = {name.removeprefix("features."): value for name, value in state.items()}
    wanted = {name: given[name] for name in features.state_dict() if name in given}
    load_exactly(features, wanted, what="these score features")
