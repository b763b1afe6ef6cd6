"""ViKANformer: Kolmogorov–Arnold layers in a vision transformer's place for linear maps.

Shreyas and Akshath, *ViKANformer: Embedding Kolmogorov Arnold Networks in Vision Transformers for
Pattern-Based Learning* (2025, arXiv 2503.01124). Learned functions of single values, summed, stand
for matrices (:mod:`.vikanformer_expansions`): B-splines, Gaussians, sines, Fourier series or
Chebyshev polynomials, with a plain linear map as the control.

**Text and code differ in where they stand.** The paper's text puts them in place of the
feed-forward network, ``x + KAN(LN x)``; in the authors' code they are the patch map and the maps to
queries, keys and values, and the feed-forward network stays linear, ReLU, linear. The default is
the code, as named variants and weights are; ``placement="paper"`` is the text (one layer from dim
to dim, as in its formula: it says nothing of a hidden width), ``"both"`` has all of them. In the
code the Fourier series are in the patch map alone.

With N patches of p·p·c values and heads of d = dim / heads channels::

    z = [class | P(patches)] + table          P: a map of the chosen kind
    z = z + MSA(LN z),  z = z + W₂ relu(W₁ LN z)
    MSA: head h takes channels h d … (h+1) d, has its own three d → d maps, softmax(q kᵀ/√d) v;
         heads are concatenated, there is no output projection
    logits = Linear(LN z₀)

``table[t, j]`` is sin(t / 10000^(j/dim)) for even j and cos(…) of the same for odd j: unlike the
usual one the exponent is j itself.

Two more states of the code have names: ``-2024`` (November 2024: blocks are the bare attention,
without norm, residual or feed-forward network, and a SineKAN layer classifies) and ``flash-attn``
(blocks are an attention with 64 channels a head and nothing else). In the former training took the
cross-entropy of softmax probabilities, a softmax twice; here :meth:`forward` gives what is in front
of the softmax.

:func:`plug` puts the layers into any ViT: ``vit-tiny+vikanformer(expansion=fast)``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..hosts import ViT
from ..nn import (
    Attention,
    Backbone,
    FeatureInfo,
    FeatureMap,
    KeyMap,
    Linear,
    Mlp,
    Preprocessing,
    Rule,
    init_parts,
    rotate,
)
from .vikanformer_expansions import EXPANSIONS, Expansion, SineExpansion, Single

__all__ = [
    "VARIANTS",
    "HeadwiseAttention",
    "Variant",
    "ViKANformer",
    "assemble",
    "build",
    "from_official",
    "network",
    "official_config",
    "plug",
    "position_table",
    "recognise",
    "to_official",
]

PLACEMENTS = ("code", "paper", "both")
BLOCKS = ("pre-norm", "bare", "flash")
_GREY = (0.299, 0.587, 0.114)

#: options of the maps inside of attention and in the patch map, where they aren't the defaults
_INSIDE: dict[str, dict[str, int]] = {"sine": {"grid": 4}}
_PATCH: dict[str, dict[str, int]] = {"sine": {"grid": 28}, "fourier": {"grid": 28}}


def make_expansion(
    kind: str, *, inputs: int, outputs: int, maps: int = 1, options: Mapping[str, Any] | None = None
) -> Expansion:
    """
    Raises:
        PolypatchError: no such kind.
    """
    if kind not in EXPANSIONS:
        hint = suggest(kind, EXPANSIONS, kind="expansions")
        raise PolypatchError(f"there is no expansion {kind!r}{hint}")
    return EXPANSIONS[kind](inputs=inputs, outputs=outputs, maps=maps, **(options or {}))


def position_table(rows: int, dim: int, *, like: Tensor) -> Float[Tensor, "rows dim"]:
    """The code of positions 0 … rows - 1 of the module's docstring."""
    column = torch.arange(dim, device=like.device)
    rate = torch.exp(column * (-math.log(10000.0) / dim))
    angle = torch.arange(rows, device=like.device)[:, None] * rate
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).to(like.dtype)


class HeadwiseAttention(nn.Module):
    """Attention whose heads map their own channels by maps of their own; no output projection."""

    def __init__(self, *, dim: int, heads: int, kind: str) -> None:
        super().__init__()
        if dim % heads:
            raise PolypatchError(f"dim={dim} does not divide into {heads} heads")
        self.heads = heads
        inside = "vanilla" if kind == "fourier" else kind
        self.maps = make_expansion(
            inside,
            inputs=dim // heads,
            outputs=dim // heads,
            maps=3 * heads,  # of all heads the queries', then the keys', then the values'
            options=_INSIDE.get(inside),
        )

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        split = x.unflatten(2, (self.heads, -1))
        mixed = self.maps.repeated(split)
        q, k, v = mixed.unflatten(2, (3, self.heads)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class FlashBlock(nn.Module):
    """The ``flash-attn`` type's block: an attention without bias, residual or norm."""

    def __init__(self, *, dim: int, heads: int, head_dim: int = 64) -> None:
        super().__init__()
        self.attn = Attention(dim=dim, heads=heads, head_dim=head_dim, qkv_bias=False)
        self.attn.proj = Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Tensor:
        return self.attn(x).x


class Block(nn.Module):
    """Pre-norm block with one of the layers in its attention, its feed-forward network or both."""

    def __init__(self, *, dim: int, heads: int, attention: str, feed_forward: str | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = HeadwiseAttention(dim=dim, heads=heads, kind=attention)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp: nn.Module = Mlp(dim=dim, hidden=4 * dim, activation=F.relu)
        if feed_forward is not None:
            self.mlp = Single(make_expansion(feed_forward, inputs=dim, outputs=dim))

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViKANformer(Backbone):
    """The network. Sides that the patch doesn't divide are padded with zeros, below and right.

    A network for grey images takes RGB as well and weighs it as the eye does.

    Args:
        patch: side of a patch in pixels.
        expansion: what the maps are made of, see :data:`EXPANSIONS`.
        placement: ``"code"``, ``"paper"`` or ``"both"``, see the module's docstring.
        blocks: ``"pre-norm"``, ``"bare"`` or ``"flash"``.
    """

    preprocessing = Preprocessing(resolution=28, mean=(0, 0, 0), std=(1, 1, 1), crop=1.0)

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        patch: int,
        classes: int = 10,
        channels: int = 1,
        expansion: str = "efficientkan",
        placement: str = "code",
        blocks: str = "pre-norm",
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("placement", placement, PLACEMENTS),
            ("blocks", blocks, BLOCKS),
        ):
            if value not in known:
                raise PolypatchError(f"there is no {name}={value!r}{suggest(value, known)}")
        self.dim, self.patch, self.channels, self.heads = dim, patch, channels, heads
        self.expansion, self.placement, self.kind = expansion, placement, blocks
        everywhere = placement in ("code", "both") and blocks != "flash"
        attention = expansion if everywhere else "vanilla"
        self.patch_map = Single(
            make_expansion(
                attention,
                inputs=channels * patch**2,
                outputs=dim,
                options=_PATCH.get(attention),
            )
        )
        self.class_token = nn.Parameter(torch.empty(1, dim))

        def block() -> nn.Module:
            if blocks == "flash":
                return FlashBlock(dim=dim, heads=heads)
            if blocks == "bare":
                return HeadwiseAttention(dim=dim, heads=heads, kind=attention)
            feed_forward = None if placement == "code" else expansion
            return Block(dim=dim, heads=heads, attention=attention, feed_forward=feed_forward)

        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.norm = nn.Identity() if blocks == "bare" else nn.LayerNorm(dim)
        self.head: nn.Module = nn.Linear(dim, classes) if classes else nn.Identity()
        if blocks == "bare" and classes:
            self.head = Single(SineExpansion(inputs=dim, outputs=classes, grid=4))
        self.taps = tuple(sorted({max(1, depth * k // 4) for k in (1, 2, 3, 4)}))
        self.feature_info = (FeatureInfo(dim, patch),) * len(self.taps)
        special = ("class_token", "norm_weight", "bias", "freq", "centres")
        names = [name for name, _ in self.named_parameters()]
        self.undecayed = tuple(part for part in special if any(part in name for name in names))

    def _tokens(self, image: Tensor) -> Iterator[Tensor]:
        """All tokens behind each block, the class token first."""
        if self.channels == 1 and image.shape[1] == 3:
            grey = torch.tensor(_GREY, dtype=image.dtype, device=image.device)
            image = (image * grey[:, None, None]).sum(1, keepdim=True)
        elif image.shape[1] != self.channels:
            raise PolypatchError(
                f"the input has {image.shape[1]} channels, this network takes {self.channels}"
            )
        below, right = (-side % self.patch for side in image.shape[-2:])
        if below or right:
            image = F.pad(image, (0, right, 0, below))
        # Unlike in patchify the channel comes first. No name is kept: blocks need the memory.
        side = self.patch
        x = self.patch_map(rearrange(image, "b c (h p) (w q) -> b (h w) (c p q)", p=side, q=side))
        x = torch.cat([self.class_token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = x + position_table(x.shape[1], self.dim, like=x)
        for block in self.blocks:
            x = self.through(block, x)
            yield x

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        for x in self._tokens(image):
            last = x
        return self.norm(last[:, 0])

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """Four normed maps, evenly spaced in depth, at the patch's stride, without class token."""
        rows = -(-image.shape[-2] // self.patch)
        return [
            FeatureMap(self.norm(x[:, 1:]).transpose(1, 2).unflatten(2, (rows, -1)), self.patch)
            for number, x in enumerate(self._tokens(image), start=1)
            if number in self.taps
        ]

    def init_weights(self) -> None:
        """The authors' initialisation.

        | layer                      | weight                                    |
        |----------------------------|-------------------------------------------|
        | expansions                 | each its own, see there                   |
        | linear layers              | torch's default, uniform by fan-in        |
        | norms                      | 1, 0                                      |
        | class token                | normal; in the bare form uniform in [0, 1) |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()
        (nn.init.uniform_ if self.kind == "bare" else nn.init.normal_)(self.class_token)
        init_parts(self)


@dataclass(frozen=True)
class Variant:
    expansion: str
    dim: int = 64
    depth: int = 4
    heads: int = 2
    patch: int = 4
    channels: int = 1
    classes: int = 10
    resolution: int = 28
    blocks: str = "pre-norm"


_TYPES = ("vanilla", "efficientkan", "sine", "fast", "fourier", "cheby", "flash-attn")


def _named(kind: str, **sizes: Any) -> Variant:
    """The variant of one of the authors' types."""
    if kind == "flash-attn":
        return Variant("vanilla", blocks="flash", **sizes)
    return Variant(kind, **sizes)


_CIFAR = dict(depth=8, heads=8, patch=8, channels=3, classes=100, resolution=32)

#: the authors' defaults for MNIST, for CIFAR-100, and of November 2024 (for MNIST); nano is ours
VARIANTS: dict[str, Variant] = {
    "vikanformer-nano": Variant("fast", channels=3, resolution=32),
    **{f"vikanformer-{kind}": _named(kind) for kind in _TYPES},
    **{f"vikanformer-{kind}-cifar100": _named(kind, **_CIFAR) for kind in _TYPES},
    **{
        f"vikanformer-{kind}-2024": Variant(kind, dim=8, depth=2, blocks="bare")
        for kind in ("vanilla", "efficientkan", "sine", "fast")
    },
}


def assemble(
    variant: Variant, *, classes: int | None = None, placement: str = "code"
) -> ViKANformer:
    """Wire a network without filling it; ``classes`` default to the variant's."""
    model = ViKANformer(
        dim=variant.dim,
        depth=variant.depth,
        heads=variant.heads,
        patch=variant.patch,
        classes=variant.classes if classes is None else classes,
        channels=variant.channels,
        expansion=variant.expansion,
        placement=placement,
        blocks=variant.blocks,
    )
    model.preprocessing = replace(ViKANformer.preprocessing, resolution=variant.resolution)
    return model


def build(
    variant: str,
    *,
    classes: int | None = None,
    resolution: int | None = None,
    expansion: str | None = None,
    placement: str = "code",
    dim: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    patch: int | None = None,
) -> ViKANformer:
    """A named network with fresh weights.

    Args:
        resolution: changes nothing, any input size works.
        expansion, dim, depth, heads, patch: in place of the variant's own.
        placement: ``"code"``, ``"paper"`` or ``"both"``, see the module's docstring.
    """
    asked = {
        "expansion": expansion, "dim": dim, "depth": depth, "heads": heads, "patch": patch
    }  # fmt: skip
    for name, value in asked.items():
        if isinstance(value, int) and value < 1:
            raise PolypatchError(f"{name} counts from 1, got {name}={value}")
    changed = replace(VARIANTS[variant], **{k: v for k, v in asked.items() if v is not None})
    model = assemble(changed, classes=classes, placement=placement)
    model.init_weights()
    return model


def plug(host: ViT, *, expansion: str = "fast", placement: str = "paper") -> ViT:
    """Put the layers into a host's blocks.

    Args:
        expansion: what the maps are made of: vanilla, efficientkan, fast, sine, fourier, cheby.
        placement: ``"paper"``: the feed-forward networks become one layer from dim to dim;
            ``"code"``: attention maps each head's channels by itself; ``"both"``.

    Raises:
        PolypatchError: an unknown option, or blocks whose attention isn't the plain one.
    """
    if placement not in PLACEMENTS:
        raise PolypatchError(f"there is no placement={placement!r}{suggest(placement, PLACEMENTS)}")
    like = next(host.parameters())
    for block in host.blocks:
        if placement in ("paper", "both"):
            layer = Single(make_expansion(expansion, inputs=host.dim, outputs=host.dim))
            layer.expansion.init_weights()
            block.mlp = layer.to(device=like.device, dtype=like.dtype)
        if placement in ("code", "both"):
            mixing = block.mixing
            if not isinstance(mixing, Attention) or mixing.heads * mixing.head_dim != host.dim:
                raise PolypatchError(
                    "vikanformer needs blocks with plain attention; this host's are "
                    f"{type(mixing).__name__}"
                )
            block.mixing = _headwise(mixing, expansion).to(device=like.device, dtype=like.dtype)
    return host.plugged("vikanformer")


class MappedAttention(Attention):
    """A host's attention with headwise maps in place of its projection to queries, keys, values."""

    def __init__(self, *, dim: int, heads: int, kind: str) -> None:
        super().__init__(dim=dim, heads=heads)
        size = dim // heads
        inside = "vanilla" if kind == "fourier" else kind
        self.maps = make_expansion(
            inside, inputs=size, outputs=size, maps=3 * heads, options=_INSIDE.get(inside)
        )
        del self.qkv

    def project(
        self, x: Float[Tensor, "batch tokens dim"], rotation: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        split = x.unflatten(2, (self.heads, -1))
        mixed = self.maps.repeated(split)
        q, k, v = mixed.unflatten(2, (3, self.heads)).permute(2, 0, 3, 1, 4).unbind(0)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q, k, v


def _headwise(mixing: Attention, kind: str) -> MappedAttention:
    new = MappedAttention(dim=mixing.heads * mixing.head_dim, heads=mixing.heads, kind=kind)
    new.proj = mixing.proj
    new.maps.init_weights()
    return new


# ---- authors' weights --------------------------------------------------------------------------

#: their names of a layer's tensors and ours
_TENSORS: dict[str, dict[str, str]] = {
    "vanilla": {"weight": "weight", "bias": "bias"},
    "efficientkan": {
        "base_weight": "base_weight", "spline_weight": "spline_weight",
        "spline_scaler": "spline_scaler", "grid": "grid",
    },
    "fast": {
        "layernorm.weight": "norm_weight", "layernorm.bias": "norm_bias", "rbf.grid": "centres",
        "spline_linear.weight": "spline_weight", "base_linear.weight": "base_weight",
        "base_linear.bias": "base_bias",
    },
    "sine": {"amplitudes": "amplitudes", "freq": "freq", "bias": "bias", "phase": "phase"},
    "fourier": {"fouriercoeffs": "coefficients", "bias": "bias"},
    "cheby": {"cheby_coeffs": "coefficients"},
}  # fmt: skip


def layer_rules(kind: str, theirs: tuple[str, ...], ours: str) -> list[Rule]:
    """Rules for one of our layers, which holds as many maps as there are layers of theirs."""
    maps = len(theirs)
    return [
        Rule(
            tuple(f"{prefix}.{their}" for prefix in theirs),
            f"{ours}.{our}",
            parts=(1,) * maps,
            to_ours=partial(_one_grid if our == "grid" else _by_map, maps=maps),
            to_theirs=partial(_many_grids if our == "grid" else _stacked, maps=maps),
        )
        for their, our in _TENSORS[kind].items()
    ]


def _by_map(value: Tensor, *, maps: int) -> Tensor:
    return value.unflatten(0, (maps, -1))


def _stacked(value: Tensor, *, maps: int) -> Tensor:
    return value.flatten(0, 1)


def _one_grid(value: Tensor, *, maps: int) -> Tensor:
    grids = value.unflatten(0, (maps, -1))
    if not value.is_meta and not torch.equal(grids, grids[:1].expand_as(grids)):
        raise PolypatchError("these splines have other knots in every head; here they share them")
    return grids[0]


def _many_grids(value: Tensor, *, maps: int) -> Tensor:
    return value.repeat(maps, 1)


def keymap(*, expansion: str, blocks: str, heads: int, depth: int) -> KeyMap:
    """Their names and ours. The constant ``arange`` of Chebyshev layers is dropped."""
    patch = "vanilla" if blocks == "flash" else expansion
    inside = "vanilla" if expansion == "fourier" else expansion
    rules: list[Rule | tuple[str, str]] = [("v_class", "class_token")]
    rules += layer_rules(patch, ("linear_mapper",), "patch_map.expansion")
    for i in range(depth):
        if blocks == "flash":
            stacked = (f"blocks.{i}.to_q", f"blocks.{i}.to_kv")
            rules += [
                Rule(stacked, f"blocks.{i}.attn.qkv", parts=(1, 2)),
                (f"blocks.{i}.to_out", f"blocks.{i}.attn.proj"),
            ]
            continue
        bare = blocks == "bare"
        place = f"blocks.{i}" if bare else f"blocks.{i}.attn"
        theirs = tuple(f"{place}.{part}_mappings.{h}" for part in "qkv" for h in range(heads))
        rules += layer_rules(inside, theirs, f"{place}.maps")
    if blocks == "pre-norm":
        rules += [
            ("blocks.{i}.norm1", "blocks.{i}.norm1"),
            ("blocks.{i}.norm2", "blocks.{i}.norm2"),
            ("blocks.{i}.ff.0", "blocks.{i}.mlp.fc1"),
            ("blocks.{i}.ff.2", "blocks.{i}.mlp.fc2"),
        ]
    if blocks == "bare":
        rules += layer_rules("sine", ("mlp.0",), "head.expansion")
    else:
        rules += [("mlp_head.0", "norm"), ("mlp_head.1", "head")]
    unused = ["linear_mapper.arange"]
    places = [f"{middle}{part}_mappings" for part in "qkv" for middle in ("", "attn.")]
    unused += [f"blocks.{{i}}.{place}.{{h}}.arange" for place in places]
    return KeyMap(rules, unused=unused)


#: what no shape tells: only the number of patches a side, given the size of a patch
ASSUMED = ("chw", "n_patches")

_SIGNS = {
    "amplitudes": "sine", "base_weight": "efficientkan", "spline_linear.weight": "fast",
    "fouriercoeffs": "fourier", "cheby_coeffs": "cheby", "weight": "vanilla",
}  # fmt: skip


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`network`, None if these are no ViKANformer's."""
    if "v_class" not in shapes or not any(n.startswith("linear_mapper.") for n in shapes):
        return None
    kind = next((k for sign, k in _SIGNS.items() if f"linear_mapper.{sign}" in shapes), None)
    depth = 1 + max(
        (int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1
    )
    if kind is None or not depth:
        return None
    flash = "blocks.0.to_q.weight" in shapes
    bare = "mlp.0.amplitudes" in shapes
    head = "mlp.0.amplitudes" if bare else "mlp_head.1.weight"
    if head not in shapes:
        return None
    values = _inputs(kind, shapes)
    channels = 3 if values % 3 == 0 and math.isqrt(values // 3) ** 2 == values // 3 else 1
    patch = math.isqrt(values // channels)
    heads = (
        shapes["blocks.0.to_q.weight"][0] // 64
        if flash
        else len({m[1] for n in shapes if (m := re.match(r"blocks\.0\..*q_mappings\.(\d+)\.", n))})
    )
    # 28 pixels for MNIST, 32 for CIFAR.
    side = 32 if channels == 3 else 28
    config = {
        "chw": [channels, side, side],
        "n_patches": max(1, side // patch),
        "n_blocks": depth,
        "d_hidden": shapes["v_class"][1],
        "n_heads": heads,
        "out_d": shapes[head][0],
        "type": "flash-attn" if flash else kind,
    }
    return config | ({"code_state": "29bc487"} if bare else {})


def _inputs(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Values of a patch, from the patch map's shapes."""
    name, axis = {
        "vanilla": ("weight", 1), "efficientkan": ("base_weight", 1), "sine": ("amplitudes", 1),
        "fast": ("layernorm.weight", 0), "fourier": ("fouriercoeffs", 2),
        "cheby": ("cheby_coeffs", 0),
    }[kind]  # fmt: skip
    return shapes[f"linear_mapper.{name}"][axis]


def network(config: Mapping[str, Any]) -> ViKANformer:
    """An unfilled network by the authors' argument names: ``chw``, ``n_patches`` (a side),
    ``n_blocks``, ``d_hidden``, ``n_heads``, ``out_d``, ``type``; and ``code_state``, which begins
    with 29bc487 for the state of November 2024.

    Raises:
        PolypatchError: an unknown type, or patches that don't divide the image.
    """
    channels, height, width = config["chw"]
    count = config.get("n_patches", 7)
    if height != width or height % count:
        raise PolypatchError(
            f"{count} patches a side don't divide an image of {height}×{width} pixels"
        )
    kind = config.get("type", "vanilla")
    if kind not in _TYPES:
        raise PolypatchError(f"there is no type {kind!r}{suggest(kind, _TYPES, kind='types')}")
    old = str(config.get("code_state", "")).startswith("29bc487")
    flash = kind == "flash-attn"
    model = ViKANformer(
        dim=config.get("d_hidden", 64),
        depth=config.get("n_blocks", 4),
        heads=config.get("n_heads", 2),
        patch=height // count,
        classes=config.get("out_d", 10),
        channels=channels,
        expansion="vanilla" if flash else kind,
        blocks="flash" if flash else "bare" if old else "pre-norm",
    )
    model.preprocessing = replace(ViKANformer.preprocessing, resolution=height)
    return model


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> ViKANformer:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    model = network(config)
    _keys_of(model).load(model, state, what="this ViKANformer")
    return model.eval()


def _keys_of(model: ViKANformer) -> KeyMap:
    if model.placement != "code":
        raise PolypatchError(
            f"the authors' code has no layout for placement={model.placement!r}, only for 'code'"
        )
    return keymap(
        expansion=model.expansion,
        blocks=model.kind,
        heads=model.heads,
        depth=len(model.blocks),
    )


def to_official(model: ViKANformer) -> dict[str, Tensor]:
    """The state dict under the authors' keys.

    Raises:
        PolypatchError: a placement that their code doesn't have.
    """
    return _keys_of(model).to_theirs(model.state_dict())


def official_config(model: ViKANformer) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network."""
    side = model.preprocessing.resolution
    head = model.head
    classes = 0
    if isinstance(head, nn.Linear):
        classes = head.out_features
    elif isinstance(head, Single):
        classes = head.expansion.outputs
    config: dict[str, Any] = {
        "chw": [model.channels, side, side],
        "n_patches": side // model.patch,
        "n_blocks": len(model.blocks),
        "d_hidden": model.dim,
        "n_heads": model.heads,
        "out_d": classes,
        "type": "flash-attn" if model.kind == "flash" else model.expansion,
    }
    return config | ({"code_state": "29bc487"} if model.kind == "bare" else {})
