"""PVT v2: a pyramid of transformer stages whose keys and values come from a reduced map.

Wang et al., *PVT v2: Improved Baselines with Pyramid Vision Transformer* (CVMJ 2022, arXiv
2106.13797). Four stages at strides 4, 8, 16, 32; the reduction makes attention affordable at stride
4, convolutions between and inside the blocks bring in the positions. No class token, no position
table. With maps x of (height, width, dim), LN layer norm over dim, h·w queries::

    patches          x = LN(Conv(map; kernel 2S − 1, stride S, zero padding S − 1)), S = 4, 2, 2, 2
    block            x = x + SRA(LN(x));  x = x + FFN(LN(x));  LN behind the last one of a stage
    SRA              softmax(q kᵀ / √d) v, queries of x, keys and values of m tokens r(x):
      reduction R    r(x) = LN(Conv(x; kernel R, stride R)), m = ⌊h/R⌋·⌊w/R⌋;  R = 1: r(x) = x
      linear SRA     r(x) = GELU(LN(W · adaptive mean(x; P×P))), m = P², P = 7
    FFN              W₂ GELU(Depthwise(W₁ x; kernel 3, zero padding))

    products         SRA 2 h²w² dim / R² + h w dim²;  linear SRA 2 h w P² dim     (eq. 1 and 2)

The mean over the last stage's map goes into a linear classifier.

Traps: the norms of the patches and of the reduction have ε = 1e-5, all others 1e-6; the linear
network has one more ReLU between W₁ and the depthwise convolution, of which the paper doesn't
speak; its reduction is the same in all stages, and a map smaller than P×P is spread to P² tokens;
the reducing convolution drops rows and columns that don't fill a cell. ``linear=True`` gives all of
it, as the published weights want it; with ``rectified=False`` it is what the paper writes. Its
eq. 1 counts the reducing convolution R² times; a stride of R saves that.

For dense heads (:meth:`PVTv2.features`) the authors take the normed maps of all stages, and train
with drop path :data:`DENSE_DROP_PATH` whatever the size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

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
    KeyMap,
    Linear,
    Rule,
    fresh,
    in_pieces,
    pointwise,
)
from ..nn.arguments import expansion, norm_eps, norm_word

__all__ = [
    "ASSUMED",
    "DENSE_DROP_PATH",
    "VARIANTS",
    "Attention",
    "ConvReduction",
    "FeedForward",
    "PVTv2",
    "PoolReduction",
    "Variant",
    "assemble",
    "build",
    "from_official",
    "keymap",
    "network",
    "official_config",
    "recognise",
    "to_official",
]

#: in the authors' detectors and segmenters, whatever the size of the encoder
DENSE_DROP_PATH = 0.1

STRIDES = (4, 8, 16, 32)


class ConvReduction(nn.Module):
    """SRA's: one token for each full cell of ``ratio`` × ``ratio`` tokens."""

    def __init__(self, *, dim: int, ratio: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, ratio, stride=ratio)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch m dim"]:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2))


class PoolReduction(nn.Module):
    """Linear SRA's: ``cells`` × ``cells`` means, whatever the size of the map."""

    def __init__(self, *, dim: int, cells: int = 7) -> None:
        super().__init__()
        self.cells = cells
        self.proj = Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch m dim"]:
        means = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), self.cells)
        return fresh.gelu(self.norm(self.proj(means.flatten(2).transpose(1, 2))))


class Attention(nn.Module):
    """Queries from every place, keys and values from ``reduction`` (None: from every place, too).

    ``scale`` multiplies the products, default 1/√(dim of a head).
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        reduction: nn.Module | None = None,
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise PolypatchError(f"a width of {dim} does not divide into {heads} heads")
        self.heads, self.scale, self.attention_dropout = heads, scale, attention_dropout
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias)
        self.reduction = reduction
        self.proj = Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        sources = x.flatten(1, 2) if self.reduction is None else self.reduction(x)
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.heads, -1))
        k, v = self.kv(sources).unflatten(-1, (2, self.heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scale,
        )
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    """Two linear layers with a depthwise 3×3 convolution between them, whose zero padding tells
    tokens where they are. ``rectified``: a ReLU before the convolution (linear networks)."""

    def __init__(
        self, *, dim: int, hidden: int, rectified: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = Linear(hidden, dim)
        self.rectified, self.dropout = rectified, dropout

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        x = self.fc1(x, fresh.relu if self.rectified else None)
        x = fresh.gelu(self.depthwise(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return self.fc2(F.dropout(x, self.dropout, self.training))


class Block(nn.Module):
    """Pre-norm attention and feed-forward network; (batch, height, width, dim) in and out.
    ``dropout`` also acts on what both branches give."""

    def __init__(
        self,
        *,
        dim: int,
        attention: Attention,
        ffn: FeedForward,
        eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.ffn = ffn
        self.dropout = dropout
        self.drop_path = DropPath(rate=drop_path)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        x = self._add(x, self.attention(self.norm1(x)))
        return self._add(x, self.ffn(self.norm2(x)))

    def _add(self, x: Tensor, update: Tensor) -> Tensor:
        return fresh.add(x, self.drop_path(F.dropout(update, self.dropout, self.training)))


class Stage(nn.Module):
    """Overlapping patches of the map before, ceil(side / stride) a side; blocks; a norm. The
    network calls the parts."""

    def __init__(
        self, *, channels: int, dim: int, kernel: int, stride: int, blocks: list[Block], eps: float
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, dim, kernel, stride=stride, padding=kernel // 2)
        self.patch_norm = nn.LayerNorm(dim, eps=1e-5)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=eps)


class PVTv2(Backbone):
    """The network of figure 1 and table 1.

    Args:
        dims, heads, ratios, depths, reductions: per stage, C, N, E, L and R of table 1.
        linear: linear SRA in all stages, ``reductions`` don't matter then.
        rectified: the additional ReLU, default as ``linear``.
        scale: of the attention products, default 1/√(dim of a head).
        eps: of the norms of blocks and stages.
        dropout: behind the depthwise convolution and both branches; ``attention_dropout``: of the
            attention's weights.
        drop_path: of the last block; rises linearly from 0 at the first.

    Raises:
        PolypatchError: lists of unequal lengths or of more than four stages.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int],
        heads: Sequence[int],
        ratios: Sequence[float],
        depths: Sequence[int],
        reductions: Sequence[int] = (8, 4, 2, 1),
        linear: bool = False,
        rectified: bool | None = None,
        qkv_bias: bool = True,
        scale: float | None = None,
        eps: float = 1e-6,
        classes: int = 1000,
        channels: int = 3,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        lists = {"dims": dims, "heads": heads, "ratios": ratios, "depths": depths,
                 "reductions": reductions}  # fmt: skip
        if len({len(values) for values in lists.values()}) > 1 or not 1 <= len(dims) <= 4:
            given = ", ".join(f"{name} {len(values)}" for name, values in lists.items())
            raise PolypatchError(f"one to four stages, one value of each for a stage; got {given}")
        self.dims, self.heads, self.ratios = tuple(dims), tuple(heads), tuple(ratios)
        self.depths, self.reductions, self.linear = tuple(depths), tuple(reductions), linear
        self.rectified = linear if rectified is None else rectified
        self.qkv_bias, self.scale, self.eps, self.channels = qkv_bias, scale, eps, channels
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.drop_path = drop_path

        def reduction(dim: int, ratio: int) -> nn.Module | None:
            if linear:
                return PoolReduction(dim=dim)
            return ConvReduction(dim=dim, ratio=ratio) if ratio > 1 else None

        def block(i: int, number: int) -> Block:
            dim = dims[i]
            return Block(
                dim=dim,
                attention=Attention(
                    dim=dim,
                    heads=heads[i],
                    reduction=reduction(dim, reductions[i]),
                    qkv_bias=qkv_bias,
                    scale=scale,
                    attention_dropout=attention_dropout,
                ),
                ffn=FeedForward(
                    dim=dim,
                    hidden=int(dim * ratios[i]),
                    rectified=self.rectified,
                    dropout=dropout,
                ),
                eps=eps,
                dropout=dropout,
                drop_path=drop_path * number / max(1, sum(depths) - 1),
            )

        self.stages = nn.ModuleList(
            Stage(
                channels=dims[i - 1] if i else channels,
                dim=dims[i],
                kernel=3 if i else 7,
                stride=2 if i else 4,
                blocks=[block(i, sum(depths[:i]) + k) for k in range(depths[i])],
                eps=eps,
            )
            for i in range(len(dims))
        )
        self.dim = dims[-1]
        self.head: nn.Module = nn.Linear(self.dim, classes) if classes else nn.Identity()
        self.feature_info = tuple(FeatureInfo(d, s) for d, s in zip(dims, STRIDES))
        # A stage's map, ceil(side / stride), must hold one cell of the reduction.
        cells = (1,) * len(dims) if linear else reductions
        self.input_requirements = InputRequirements(
            minimum=max((cell - 1) * stride + 1 for cell, stride in zip(cells, STRIDES))
        )
        self.channels_last()

    def _maps(self, image: Tensor) -> Iterator[Tensor]:
        """The normed map of each stage, (batch, height, width, dim)."""
        self.input_requirements.check(image, name="PVT v2")
        x = image
        for stage, dim, ratio, stride in zip(self.stages, self.dims, self.ratios, STRIDES):
            cells = -(-image.shape[2] // stride) * -(-image.shape[3] // stride)
            run = partial(self._run, stage)  # type: ignore[arg-type]
            x = in_pieces(run, x, widest=int(dim * ratio) * cells)
            yield x
            x = x.permute(0, 3, 1, 2)

    def _run(
        self, stage: Stage, map: Float[Tensor, "batch channels tall wide"]
    ) -> Float[Tensor, "batch height width dim"]:
        x = stage.patch_norm(stage.patches(map).permute(0, 2, 3, 1))
        for block in stage.blocks:
            x = self.through(block, x)
        return stage.norm(x)

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        for last in self._maps(image):
            x = last
        return x.mean((1, 2))

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """The normed maps of all stages, at strides 4, 8, 16 and 32."""
        return [
            FeatureMap(x.permute(0, 3, 1, 2), stride)
            for x, stride in zip(self._maps(image), STRIDES)
        ]

    def init_weights(self) -> None:
        """As the authors have it:

        | layer     | weight                                       | bias |
        |-----------|----------------------------------------------|------|
        | Linear    | normal, std 0.02 (head, too)                 | 0    |
        | Conv2d    | normal, std √(2 / (kernel² · out / groups))  | 0    |
        | LayerNorm | 1                                            | 0    |
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Conv2d):
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                else:
                    fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                    nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class Variant:
    """A column of table 1: channels C, expansion E, layers L of each stage. All have R = 8, 4, 2, 1
    or P = 7, and 1, 2, 5, 8 heads. ``drop_path`` is from the authors' recipes for ImageNet."""

    dims: tuple[int, ...]
    ratios: tuple[int, ...]
    depths: tuple[int, ...]
    linear: bool = False
    drop_path: float = 0.1
    heads: tuple[int, ...] = (1, 2, 5, 8)
    rectified: bool | None = None


_WIDE = (64, 128, 320, 512)
_B2 = Variant(_WIDE, (8, 8, 4, 4), (3, 4, 6, 3))
_NANO = Variant((32, 64, 96, 128), (4, 4, 4, 4), (1, 1, 2, 1), drop_path=0.0, heads=(1, 2, 3, 4))

#: table 1; nano and nano-li are ours, for demonstrations on a CPU
VARIANTS: dict[str, Variant] = {
    "pvtv2-nano": _NANO,
    "pvtv2-nano-li": replace(_NANO, linear=True),
    "pvtv2-b0": Variant((32, 64, 160, 256), (8, 8, 4, 4), (2, 2, 2, 2)),
    "pvtv2-b1": Variant(_WIDE, (8, 8, 4, 4), (2, 2, 2, 2)),
    "pvtv2-b2": _B2,
    "pvtv2-b2-li": replace(_B2, linear=True),
    "pvtv2-b3": Variant(_WIDE, (8, 8, 4, 4), (3, 4, 18, 3), drop_path=0.3),
    "pvtv2-b4": Variant(_WIDE, (8, 8, 4, 4), (3, 8, 27, 3), drop_path=0.3),
    "pvtv2-b5": Variant(_WIDE, (4, 4, 4, 4), (3, 6, 40, 3), drop_path=0.3),
}


def assemble(
    variant: Variant,
    *,
    classes: int = 1000,
    channels: int = 3,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> PVTv2:
    """Wire a network without filling it."""
    return PVTv2(
        dims=variant.dims,
        heads=variant.heads,
        ratios=variant.ratios,
        depths=variant.depths,
        linear=variant.linear,
        rectified=variant.rectified,
        classes=classes,
        channels=channels,
        dropout=dropout,
        attention_dropout=attention_dropout,
        drop_path=variant.drop_path,
    )


def build(
    variant: str,
    *,
    classes: int = 1000,
    resolution: int | None = None,
    channels: int = 3,
    linear: bool | None = None,
    rectified: bool | None = None,
    drop_path: float | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> PVTv2:
    """A named network with fresh weights. For a dense head: ``build(name, classes=0,
    drop_path=DENSE_DROP_PATH)``.

    Args:
        resolution: changes nothing, no table depends on it.
        linear, drop_path: in place of the variant's own.
        rectified: the additional ReLU, default as ``linear``.
    """
    asked = {"linear": linear, "rectified": rectified, "drop_path": drop_path}
    changed = replace(VARIANTS[variant], **{k: v for k, v in asked.items() if v is not None})
    model = assemble(
        changed,
        classes=classes,
        channels=channels,
        dropout=dropout,
        attention_dropout=attention_dropout,
    )
    model.init_weights()
    return model


# ---- authors' weights --------------------------------------------------------------------------


def keymap(stages: int, *, linear: bool) -> KeyMap:
    """The authors number stages from 1, inside of names."""
    rules: list[Rule | tuple[str, str]] = [("head", "head")]
    for n in range(1, stages + 1):
        theirs, ours = f"block{n}.{{j}}", f"stages.{n - 1}.blocks.{{j}}"
        reduction = f"{ours}.attention.reduction"
        rules += [
            (f"patch_embed{n}.proj", f"stages.{n - 1}.patches"),
            (f"patch_embed{n}.norm", f"stages.{n - 1}.patch_norm"),
            (f"{theirs}.norm1", f"{ours}.norm1"),
            (f"{theirs}.attn.q", f"{ours}.attention.q"),
            (f"{theirs}.attn.kv", f"{ours}.attention.kv"),
            (f"{theirs}.attn.proj", f"{ours}.attention.proj"),
            pointwise(f"{theirs}.attn.sr", f"{reduction}.proj")
            if linear
            else (f"{theirs}.attn.sr", f"{reduction}.conv"),
            (f"{theirs}.attn.norm", f"{reduction}.norm"),
            (f"{theirs}.norm2", f"{ours}.norm2"),
            (f"{theirs}.mlp.fc1", f"{ours}.ffn.fc1"),
            (f"{theirs}.mlp.dwconv.dwconv", f"{ours}.ffn.depthwise"),
            (f"{theirs}.mlp.fc2", f"{ours}.ffn.fc2"),
            (f"norm{n}", f"stages.{n - 1}.norm"),
        ]
    return KeyMap(rules)


#: what no shape tells
ASSUMED = ("num_heads", "norm_layer")


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`from_official` from names and shapes, None if these are no
    PVT v2's. Heads are 1, 2, 5, 8 as in all published networks where they divide the widths, else
    as many as the stage's number; norms have the published ε. A file without ``head``, as detectors
    keep it, has ``num_classes`` 0. (The encoders of SegFormer have these names and this network.)
    """
    dims: list[int] = []
    ratios: list[float] = []
    depths: list[int] = []
    reductions: list[int] = []
    while (hidden := shapes.get(f"block{len(dims) + 1}.0.mlp.dwconv.dwconv.weight")) is not None:
        prefix = f"block{len(dims) + 1}."
        patches = shapes.get(f"patch_embed{len(dims) + 1}.proj.weight")
        if patches is None or len(patches) != 4 or f"{prefix}0.attn.kv.weight" not in shapes:
            return None
        ratios.append(expansion((hidden[0], patches[0])))
        dims.append(patches[0])
        depths.append(len({name.split(".")[1] for name in shapes if name.startswith(prefix)}))
        kernel = shapes.get(f"{prefix}0.attn.sr.weight", (0, 0, 0, 0))
        reductions.append(kernel[-1])
    if (
        not dims
        or f"norm{len(dims)}.weight" not in shapes
        or shapes["patch_embed1.proj.weight"][2:] != (7, 7)
    ):
        return None
    usual = (1, 2, 5, 8)[: len(dims)]
    fits = all(dim % heads == 0 for dim, heads in zip(dims, usual))
    found: dict[str, Any] = {
        "in_chans": shapes["patch_embed1.proj.weight"][1],
        "num_classes": shapes.get("head.weight", (0,))[0],
        "embed_dims": dims,
        "num_heads": list(usual) if fits else [k + 1 for k in range(len(dims))],
        "mlp_ratios": ratios,
        "depths": depths,
        "qkv_bias": "block1.0.attn.q.bias" in shapes,
        "num_stages": len(dims),
        "linear": 1 in reductions,
        "norm_layer": "LayerNorm(eps=1e-6)",
    }
    if not found["linear"]:
        found["sr_ratios"] = [ratio or 1 for ratio in reductions]
    return found


#: arguments of the authors' class and their defaults, and our ``rectified``
_DEFAULTS: dict[str, Any] = {
    "img_size": 224, "patch_size": 16, "in_chans": 3, "num_classes": 1000,
    "embed_dims": (64, 128, 256, 512), "num_heads": (1, 2, 4, 8), "mlp_ratios": (4, 4, 4, 4),
    "qkv_bias": False, "qk_scale": None, "drop_rate": 0.0, "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0, "norm_layer": "LayerNorm", "depths": (3, 4, 6, 3),
    "sr_ratios": (8, 4, 2, 1), "num_stages": 4, "linear": False, "pretrained": None,
    "rectified": None,
}  # fmt: skip
#: words of a configuration that say where it is from
_LABELS = ("class", "code", "layout")


def network(config: Mapping[str, Any]) -> PVTv2:
    """An unfilled network by the authors' argument names, with their defaults; ``norm_layer`` is
    ``"LayerNorm"`` (ε = 1e-5) or ``"LayerNorm(eps=…)"``. ``img_size`` and ``patch_size`` change
    nothing there and here; lists may be longer than ``num_stages``; ``rectified`` is ours. Labels
    such as ``class``, and names that begin with _, aren't read.

    Raises:
        PolypatchError: an unknown argument or norm, or ``pretrained``.
    """
    for word in config:
        if word not in _DEFAULTS and word not in _LABELS and not word.startswith("_"):
            raise PolypatchError(
                f"PVT v2 has no argument {word!r}{suggest(word, _DEFAULTS, kind='arguments')}"
            )
    got = {**_DEFAULTS, **config}
    if got["pretrained"]:
        raise PolypatchError("load a checkpoint with polypatch.load instead of pretrained=")
    stages = got["num_stages"]
    return PVTv2(
        dims=got["embed_dims"][:stages],
        heads=got["num_heads"][:stages],
        ratios=got["mlp_ratios"][:stages],
        depths=got["depths"][:stages],
        reductions=got["sr_ratios"][:stages],
        linear=got["linear"],
        qkv_bias=got["qkv_bias"],
        scale=got["qk_scale"] or None,
        eps=norm_eps(got["norm_layer"]),
        classes=got["num_classes"],
        channels=got["in_chans"],
        dropout=got["drop_rate"],
        attention_dropout=got["attn_drop_rate"],
        drop_path=got["drop_path_rate"],
        rectified=got["rectified"],
    )


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> PVTv2:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode. If
    the weights have no ``head``, as those of their dense encoders, the network has none.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    if "head.weight" not in state:
        config = {**config, "num_classes": 0}
    model = network(config)
    keymap(len(model.dims), linear=model.linear).load(model, state, what="this PVT v2")
    return model.eval()


def to_official(model: PVTv2) -> dict[str, Tensor]:
    """The state dict under the authors' keys."""
    return keymap(len(model.dims), linear=model.linear).to_theirs(model.state_dict())


def official_config(model: PVTv2) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network."""
    return {
        "in_chans": model.channels,
        "num_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "embed_dims": list(model.dims),
        "num_heads": list(model.heads),
        "mlp_ratios": list(model.ratios),
        "depths": list(model.depths),
        "sr_ratios": list(model.reductions),
        "num_stages": len(model.dims),
        "linear": model.linear,
        "rectified": model.rectified,
        "qkv_bias": model.qkv_bias,
        "qk_scale": model.scale,
        "norm_layer": norm_word(model.eps),
        "drop_rate": model.dropout,
        "attn_drop_rate": model.attention_dropout,
        "drop_path_rate": model.drop_path,
    }
