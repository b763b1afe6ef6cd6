"""ConvMixer: patches, then depthwise and pointwise convolutions at one resolution.

Trockman and Kolter, *Patches Are All You Need?* (TMLR 2023, arXiv 2201.09792). The paper asks how
much of a vision transformer's success is due to patches as such, and answers with a network that
has nothing of a transformer but the patches. With σ the GELU and BN batch norm (eq. 1 to 3)::

    z₀ = BN(σ(Conv(image; width h, kernel p, stride p)))
    y  = z + BN(σ(Depthwise(z; kernel k)))                   mixes places
    z' = BN(σ(Pointwise(y)))                                 mixes channels, without a residual

then the mean over all places and a linear classifier. ``h`` is ``dim``, the paper writes
ConvMixer-h/depth.

Traps: the norm comes behind the activation; "same" padding of an even kernel puts the odd zero
below and to the right; sides that the patch doesn't divide lose the remainder. The weights of
768/32 that the authors published were trained with ReLU, which no shape tells: with a state
dict of that size ``activation="relu"`` is assumed.

Maps are kept channels-last, the layout in which depthwise convolutions run at twice the speed on a
CPU; the pointwise one is a matrix product then. In inference the second step's norm is folded into
the product's bias, which saves a pass over the map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..nn import (
    Backbone,
    FeatureInfo,
    FeatureMap,
    InputRequirements,
    KeyMap,
    Linear,
    fresh,
    linear,
    pointwise,
)

__all__ = [
    "VARIANTS",
    "ConvMixer",
    "Variant",
    "assemble",
    "build",
    "from_official",
    "network",
    "official_config",
    "recognise",
    "to_official",
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": fresh.gelu, "relu": fresh.relu}


class Layer(nn.Module):
    """Depthwise with residual, then pointwise; (batch, height, width, dim) in and out."""

    def __init__(self, *, dim: int, kernel: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, kernel, padding="same", groups=dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.pointwise = Linear(dim, dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.activation = activation

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Tensor:
        mixed = self.activation(self.depthwise(x.permute(0, 3, 1, 2)))
        if self.norm1.training or torch.is_grad_enabled():
            x = x + self.norm1(mixed).permute(0, 2, 3, 1)
            x = self.pointwise(x, self.activation)
            return self.norm2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        # W (x + s m + t) + b = W (x + s m) + (W t + b): the shift t never touches the map.
        scale, shift = fresh.affine_of(self.norm1)
        x = fresh.add_scaled(x, mixed.permute(0, 2, 3, 1), scale)
        x = linear(x, self.pointwise.weight, self.pointwise(shift), self.activation)
        return fresh.affine(x, *fresh.affine_of(self.norm2))


class ConvMixer(Backbone):
    """The network of figure 2."""

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        kernel: int = 9,
        patch: int = 7,
        classes: int = 1000,
        channels: int = 3,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            hint = suggest(activation, ACTIVATIONS, kind="activations")
            raise PolypatchError(f"there is no activation {activation!r}{hint}")
        act = ACTIVATIONS[activation]
        self.dim, self.patch, self.kernel, self.activation = dim, patch, kernel, activation
        self.stem = nn.Conv2d(channels, dim, patch, stride=patch)
        self.stem_norm = nn.BatchNorm2d(dim)
        self.layers = nn.ModuleList(
            Layer(dim=dim, kernel=kernel, activation=act) for _ in range(depth)
        )
        self.head: nn.Module = nn.Linear(dim, classes) if classes else nn.Identity()
        self.taps = tuple(sorted({max(1, depth * k // 4) for k in (1, 2, 3, 4)}))
        self.feature_info = (FeatureInfo(dim, patch),) * len(self.taps)
        self.input_requirements = InputRequirements(minimum=patch)
        self.channels_last()

    def _maps(self, image: Tensor) -> Iterator[Tensor]:
        """The map behind each layer, (batch, height, width, dim)."""
        self.input_requirements.check(image, name="ConvMixer")
        image = image.contiguous(memory_format=torch.channels_last)
        x = self.stem_norm(ACTIVATIONS[self.activation](self.stem(image))).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = self.through(layer, x)
            yield x

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        for last in self._maps(image):
            x = last
        return x.mean((1, 2))

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """Four maps, evenly spaced in depth, all at the patch's stride."""
        return [
            FeatureMap(x.permute(0, 3, 1, 2), self.patch)
            for number, x in enumerate(self._maps(image), start=1)
            if number in self.taps
        ]

    def init_weights(self) -> None:
        """torch's defaults, as the authors have them: uniform by fan-in; norms 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                module.reset_parameters()


@dataclass(frozen=True)
class Variant:
    dim: int
    depth: int
    kernel: int
    patch: int
    activation: str = "gelu"


#: table 1 and the authors' README; nano is ours, for demonstrations on a CPU
VARIANTS: dict[str, Variant] = {
    "convmixer-nano": Variant(64, 4, 5, 4),
    "convmixer-1536-20": Variant(1536, 20, 9, 7),
    "convmixer-1024-20": Variant(1024, 20, 9, 14),
    "convmixer-768-32": Variant(768, 32, 7, 7, "relu"),
}


def assemble(variant: Variant, *, classes: int = 1000, channels: int = 3) -> ConvMixer:
    """Wire a network without filling it."""
    return ConvMixer(
        dim=variant.dim,
        depth=variant.depth,
        kernel=variant.kernel,
        patch=variant.patch,
        activation=variant.activation,
        classes=classes,
        channels=channels,
    )


def build(
    variant: str,
    *,
    classes: int = 1000,
    resolution: int | None = None,
    dim: int | None = None,
    depth: int | None = None,
    kernel: int | None = None,
    patch: int | None = None,
    activation: str | None = None,
    channels: int = 3,
) -> ConvMixer:
    """A named network with fresh weights.

    Args:
        resolution: changes nothing, any input size works.
        dim, depth, kernel, patch, activation: in place of the variant's own.
        channels: of the input.
    """
    asked = {"dim": dim, "depth": depth, "kernel": kernel, "patch": patch, "activation": activation}
    for name, value in asked.items():
        if isinstance(value, int) and value < 1:
            raise PolypatchError(f"{name} counts from 1, got {name}={value}")
    changed = replace(VARIANTS[variant], **{k: v for k, v in asked.items() if v is not None})
    model = assemble(changed, classes=classes, channels=channels)
    model.init_weights()
    return model


# ---- authors' weights --------------------------------------------------------------------------


def keymap(depth: int) -> KeyMap:
    """Their ``nn.Sequential`` numbers the layers from 3; the classifier's number tells how many."""
    layers = [
        rule
        for i in range(depth)
        for rule in (
            (f"{i + 3}.0.fn.0", f"layers.{i}.depthwise"),
            (f"{i + 3}.0.fn.2", f"layers.{i}.norm1"),
            pointwise(f"{i + 3}.1", f"layers.{i}.pointwise"),
            (f"{i + 3}.3", f"layers.{i}.norm2"),
        )
    ]
    return KeyMap([("0", "stem"), ("2", "stem_norm"), *layers, (f"{depth + 5}", "head")])


#: what no shape tells
ASSUMED = ("activation",)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`from_official` from names and shapes, None if these are no
    ConvMixer's; ``activation`` as in the published weights of that size, else GELU."""
    if not {"0.weight", "3.0.fn.0.weight", "3.1.weight"} <= shapes.keys():
        return None
    depth = len({name for name in shapes if name.endswith(".0.fn.0.weight")})
    head = shapes.get(f"{depth + 5}.weight")
    if head is None or len(head) != 2 or len(shapes["0.weight"]) != 4:
        return None
    dim, _, patch, _ = shapes["0.weight"]
    return {
        "dim": dim,
        "depth": depth,
        "kernel_size": shapes["3.0.fn.0.weight"][-1],
        "patch_size": patch,
        "n_classes": head[0],
        "activation": "relu" if (dim, depth) == (768, 32) else "gelu",
    }


def network(config: Mapping[str, Any]) -> ConvMixer:
    """An unfilled network by the authors' argument names: ``dim``, ``depth``, ``kernel_size`` (9),
    ``patch_size`` (7), ``n_classes`` (1000), and our ``activation`` (``"gelu"`` or ``"relu"``)."""
    return ConvMixer(
        dim=config["dim"],
        depth=config["depth"],
        kernel=config.get("kernel_size", 9),
        patch=config.get("patch_size", 7),
        classes=config.get("n_classes", 1000),
        activation=config.get("activation", "gelu"),
    )


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> ConvMixer:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    model = network(config)
    keymap(len(model.layers)).load(model, state, what="this ConvMixer")
    return model.eval()


def to_official(model: ConvMixer) -> dict[str, Tensor]:
    """The state dict under the authors' keys."""
    return keymap(len(model.layers)).to_theirs(model.state_dict())


def official_config(model: ConvMixer) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network."""
    return {
        "dim": model.dim,
        "depth": len(model.layers),
        "kernel_size": model.kernel,
        "patch_size": model.patch,
        "n_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "activation": model.activation,
    }
