"""CSWin: half of the heads attends along horizontal stripes, half along vertical ones.

Dong, Bao, Chen, Zhang, Yu, Yuan, Chen and Guo, *CSWin Transformer: A General Vision Transformer
Backbone with Cross-Shaped Windows* (CVPR 2022, arXiv 2107.00652). Self-attention within stripes of
the map costs far less than over the whole of it; stripes of both directions at once, each in half
of the heads, form a cross, so that two blocks reach every place. A depthwise convolution of the
values tells where tokens lie (LePE, locally-enhanced positional encoding).

With x a map (height H, width W, dim C), sw the stripes' width and d = C / heads (sec. 3.2, 3.3)::

    q, k, v  = x W_qkv                                       each cut into halves of C/2 channels
    vertical = attention within stripes of H × sw places, of the first halves, heads/2 heads
    across   = attention within stripes of sw × W places, of the second halves, heads/2 heads
    attention(q, k, v) = softmax(q kᵀ / √d) v + depthwise3×3(v)
    CSWin(x) = concat(vertical, across) W_o
    x' = x + CSWin(LN(x));    x'' = x' + MLP(LN(x'))                                       (a block)

q kᵀ and its product with v take H·W·C·sw·(H + W) multiplications, against 2·H²·W²·C over the whole
map. Stripes widen with depth: 1, 2, 7, and the whole map in the last stage. Four stages, of strides
4 to 32: a stem of Conv 7×7 stride 4 and LN; between stages Conv 3×3 stride 2 and LN; behind the
last LN, the mean over all places, and a linear classifier.

Traps: the vertical stripes have the first channels and heads (the paper's eq. 2 counts the
horizontal ones first). LePE sees no further than its stripe: zeros stand at the stripe's borders,
not only at the map's. The stem pads by 2, not 3. A map whose side is the stripe's width is one
window with all heads, in any stage (the authors' rule; ``whole`` here); it needs other weights of
LePE, so ``resolution`` is part of a network's configuration. A map that stripes don't divide is
padded with zeros on both sides *behind* the projection, as the authors' dense-prediction code does:
such places are keys of logit 0 and value 0, and take their share of the softmax. ``drop_rate``
reaches the MLP alone.

The authors have two classes: the classifier, and one for dense prediction with a norm at the end of
every stage (``stage_norms``; as they wire it, a stage's dim grows with its heads, not twofold).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

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
    KeyMap,
    Linear,
    Preprocessing,
    fresh,
)
from ..nn.arguments import expansion

__all__ = [
    "VARIANTS",
    "Block",
    "CSWin",
    "CrossShapedAttention",
    "Embed",
    "Mlp",
    "StripeAttention",
    "Variant",
    "assemble",
    "build",
    "from_official",
    "network",
    "official_config",
    "recognise",
    "to_official",
]

STAGES = 4


def stripes_of(
    qkv: Float[Tensor, "batch height width 3 dim"], stripe: tuple[int, int]
) -> Float[Tensor, "3 stripes tokens dim"]:
    """Queries, keys and values within each stripe of the given height and width, which must divide
    the map. Stripes as wide as the map lie in memory as they are: no copy."""
    tall, wide = stripe
    x = qkv.unflatten(1, (-1, tall)).unflatten(3, (-1, wide))  # b, rows, tall, columns, wide, 3, d
    return x.permute(5, 0, 1, 3, 2, 4, 6).flatten(4, 5).flatten(1, 3)


def map_of(
    x: Float[Tensor, "stripes tokens dim"], stripe: tuple[int, int], size: tuple[int, int]
) -> Float[Tensor, "batch height width dim"]:
    """The map of ``size`` whose stripes these are."""
    tall, wide = stripe
    x = x.unflatten(1, stripe).unflatten(0, (-1, size[0] // tall, size[1] // wide))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def centred(
    qkv: Float[Tensor, "batch height width 3 dim"], stripe: tuple[int, int]
) -> tuple[Float[Tensor, "batch tall wide 3 dim"], int, int]:
    """Zeros around the map up to the next multiples of the stripe's sides, as many before as
    behind (an odd one behind); and how many lie above and to the left."""
    below, right = -qkv.shape[1] % stripe[0], -qkv.shape[2] % stripe[1]
    above, left = below // 2, right // 2
    if below or right:
        qkv = F.pad(qkv, (0, 0, 0, 0, left, right - left, above, below - above))
    return qkv, above, left


class Mlp(nn.Module):
    """Linear, GELU, linear; dropout behind both."""

    def __init__(self, *, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)
        self.dropout = dropout

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        x = F.dropout(self.fc1(x, fresh.gelu), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


class StripeAttention(nn.Module):
    """Attention within stripes, plus LePE; ``stripe`` is (height, width), None for the map's."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        stripe: tuple[int | None, int | None],
        scale: float | None = None,
        dropout: float = 0.0,
        lepe: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise PolypatchError(f"{dim} channels of a direction don't divide into {heads} heads")
        self.heads, self.stripe, self.scale, self.dropout = heads, stripe, scale, dropout
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if lepe else None

    def forward(
        self, qkv: Float[Tensor, "batch height width 3 dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        height, width = qkv.shape[1:3]
        stripe = (self.stripe[0] or height, self.stripe[1] or width)
        qkv, above, left = centred(qkv, stripe)
        tall, wide = qkv.shape[1:3]
        windows = stripes_of(qkv, stripe)
        q, k, v = windows.unflatten(-1, (self.heads, -1)).transpose(2, 3)
        x = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, scale=self.scale
        )
        x = x.transpose(1, 2).flatten(2)
        if self.lepe is not None:
            places = self.lepe(windows[2].unflatten(1, stripe).permute(0, 3, 1, 2))
            x = fresh.add(x, places.permute(0, 2, 3, 1).flatten(1, 2))
        x = map_of(x, stripe, (tall, wide))
        return x[:, above : above + height, left : left + width]


class CrossShapedAttention(nn.Module):
    """Eq. 2: vertical and horizontal stripes of width ``stripe`` in half of the channels and heads
    each; ``stripe=None``: one window, the whole map, with all of them.

    ``scale`` multiplies the logits (None: 1 / √head dim)."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        stripe: int | None,
        bias: bool = True,
        scale: float | None = None,
        dropout: float = 0.0,
        lepe: bool = True,
    ) -> None:
        super().__init__()
        shapes: list[tuple[int | None, int | None]] = (
            [(None, None)] if stripe is None else [(None, stripe), (stripe, None)]
        )
        parts = len(shapes)
        if dim % parts or heads < parts:
            raise PolypatchError(
                f"stripes of two directions need an even dim and two heads, got {dim} and {heads}"
            )
        self.qkv = Linear(dim, 3 * dim, bias=bias)
        self.stripes = nn.ModuleList(
            StripeAttention(
                dim=dim // parts,
                heads=heads // parts,
                stripe=shape,
                scale=scale,
                dropout=dropout,
                lepe=lepe,
            )
            for shape in shapes
        )
        self.proj = Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        parts = self.qkv(x).unflatten(-1, (3, len(self.stripes), -1)).unbind(-2)
        mixed = [stripe(part) for stripe, part in zip(self.stripes, parts)]
        return self.proj(torch.cat(mixed, -1) if len(mixed) > 1 else mixed[0])


class Block(nn.Module):
    """Attention, then an MLP, each behind a norm and with a residual.

    The two halves are methods of their own, so that networks that build on this one can put
    something between them.
    """

    def __init__(
        self,
        *,
        attention: nn.Module,
        dim: int,
        hidden: int,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim=dim, hidden=hidden, dropout=dropout)
        self.drop_path = DropPath(rate=drop_path)

    def mix(self, x: Float[Tensor, "batch height width dim"]) -> Tensor:
        return fresh.add(x, self.drop_path(self.attention(self.norm1(x))))

    def feed(self, x: Float[Tensor, "batch height width dim"]) -> Tensor:
        return fresh.add(x, self.drop_path(self.mlp(self.norm2(x))))

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        return self.feed(self.mix(x))


class Embed(nn.Module):
    """A convolution and LN: the stem, and the step from one stage to the next."""

    def __init__(self, *, dim: int, out: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel, stride, padding)
        self.norm = nn.LayerNorm(out)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch rows columns out"]:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class CSWin(Backbone):
    """The network of figure 2.

    Args:
        dims, depths, heads: of the four stages.
        stripes: widths of the stages' stripes.
        whole: which stages attend over the whole map instead.
        mlp_ratio: the MLP's hidden width is this times the dim, rounded down.
        scale: factor of the logits; None: 1 / √head dim.
        dropout: in the MLP; ``attention_dropout``: of the attention's weights.
        drop_path: rate of the last block; it grows linearly from 0 in the first.
        lepe: False leaves the positional encoding away (the paper's ablation).
        stage_norms: a norm behind every stage, as in the authors' class for dense prediction.

    Raises:
        PolypatchError: other than four stages, or a dim that its heads don't divide.
    """

    input_requirements = InputRequirements(minimum=3)
    preprocessing = Preprocessing(crop=0.9)

    def __init__(
        self,
        *,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        stripes: tuple[int, ...],
        whole: tuple[bool, ...] = (False, False, False, True),
        classes: int = 1000,
        channels: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        scale: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        lepe: bool = True,
        stage_norms: bool = False,
    ) -> None:
        super().__init__()
        for name, of in (
            ("dims", dims),
            ("depths", depths),
            ("heads", heads),
            ("stripes", stripes),
            ("whole", whole),
        ):
            if len(of) != STAGES:
                raise PolypatchError(f"CSWin has {STAGES} stages, got {name}={of}")
        self.dims, self.dim, self.heads, self.stripes, self.whole = (
            dims, dims[-1], heads, stripes, whole
        )  # fmt: skip
        self.mlp_ratio, self.qkv_bias, self.scale, self.lepe = mlp_ratio, qkv_bias, scale, lepe
        self.stem = Embed(dim=channels, out=dims[0], kernel=7, stride=4, padding=2)
        self.merges = nn.ModuleList(
            Embed(dim=dim, out=out, kernel=3, stride=2, padding=1) for dim, out in pairwise(dims)
        )
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            nn.ModuleList(
                Block(
                    attention=CrossShapedAttention(
                        dim=dims[stage],
                        heads=heads[stage],
                        stripe=None if whole[stage] else stripes[stage],
                        bias=qkv_bias,
                        scale=scale,
                        dropout=attention_dropout,
                        lepe=lepe,
                    ),
                    dim=dims[stage],
                    hidden=int(dims[stage] * mlp_ratio),
                    dropout=dropout,
                    drop_path=next(rates),
                )
                for _ in range(depths[stage])
            )
            for stage in range(STAGES)
        )
        self.stage_norms = (
            nn.ModuleList(nn.LayerNorm(d) for d in dims[:-1]) if stage_norms else None
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head: nn.Module = nn.Linear(dims[-1], classes) if classes else nn.Identity()
        self.feature_info = tuple(FeatureInfo(dim, 4 << stage) for stage, dim in enumerate(dims))
        self.channels_last()

    def _maps(self, image: Tensor) -> Iterator[Tensor]:
        """The map behind each stage, (batch, height, width, dim), not normalised."""
        self.input_requirements.check(image, name=type(self).__name__)
        x = image.permute(0, 2, 3, 1)
        for embed, blocks in zip((self.stem, *self.merges), self.stages):
            x = embed(x)
            for block in blocks:  # type: ignore[attr-defined]
                x = self.through(block, x)
            yield x

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        for last in self._maps(image):
            x = last
        return self.norm(x).mean((1, 2))

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """The four stages' maps. With ``stage_norms`` each is normalised; else none is, the last
        one neither: heads for dense prediction bring norms of their own."""
        maps = list(self._maps(image))
        if self.stage_norms is not None:
            maps = [norm(x) for norm, x in zip((*self.stage_norms, self.norm), maps)]
        return [
            FeatureMap(x.permute(0, 3, 1, 2), info.stride)
            for x, info in zip(maps, self.feature_info)
        ]

    def init_weights(self) -> None:
        """The authors':

        | layer     | weight                         | bias                      |
        |-----------|--------------------------------|---------------------------|
        | Linear    | normal, std 0.02, cut at ±2    | 0                         |
        | LayerNorm | 1                              | 0                         |
        | Conv2d    | torch's default: uniform,      | the same                  |
        |           | ± 1 / √fan in                  |                           |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()


@dataclass(frozen=True)
class Variant:
    """Sizes of the four stages; the fourth one's stripes say nothing, as it attends over its whole
    map. ``drop_path`` is the authors' recipe's."""

    dim: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    stripes: tuple[int, ...]
    drop_path: float
    resolution: int = 224


#: table 2 and the authors' README; large was trained on ImageNet-22K, its drop path is that of
#: fine-tuning (at 384 pixels they give none). nano is ours, for demonstrations on a CPU.
VARIANTS: dict[str, Variant] = {
    "cswin-nano": Variant(24, (1, 1, 2, 1), (2, 4, 8, 16), (1, 2, 2, 2), 0.0, 64),
    "cswin-tiny": Variant(64, (1, 2, 21, 1), (2, 4, 8, 16), (1, 2, 7, 7), 0.2),
    "cswin-small": Variant(64, (2, 4, 32, 2), (2, 4, 8, 16), (1, 2, 7, 7), 0.4),
    "cswin-base": Variant(96, (2, 4, 32, 2), (4, 8, 16, 32), (1, 2, 7, 7), 0.5),
    "cswin-large": Variant(144, (2, 4, 32, 2), (6, 12, 24, 24), (1, 2, 7, 7), 0.2),
    "cswin-base-384": Variant(96, (2, 4, 32, 2), (4, 8, 16, 32), (1, 2, 12, 12), 0.7, 384),
    "cswin-large-384": Variant(144, (2, 4, 32, 2), (6, 12, 24, 24), (1, 2, 12, 12), 0.2, 384),
}


def whole_at(resolution: int, stripes: tuple[int, ...]) -> tuple[bool, ...]:
    """The authors' rule: stages whose map, at a square input of ``resolution`` pixels, is as wide
    as its stripes attend over all of it; the last stage always does."""
    sides = [resolution // (4 << stage) for stage in range(STAGES - 1)]
    return (*(side == stripe for side, stripe in zip(sides, stripes)), True)


def preprocessing_at(resolution: int) -> Preprocessing:
    """The authors evaluate on a crop of 0.9 at 224 pixels, on whole images at 384."""
    return Preprocessing(resolution=resolution, crop=0.9 if resolution < 384 else 1.0)


def assemble(
    variant: Variant,
    *,
    classes: int = 1000,
    channels: int = 3,
    resolution: int | None = None,
    drop_path: float | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    lepe: bool = True,
) -> CSWin:
    """Wire a network without filling it; the arguments are :func:`build`'s."""
    resolution = variant.resolution if resolution is None else resolution
    model = CSWin(
        dims=tuple(variant.dim << stage for stage in range(STAGES)),
        depths=variant.depths,
        heads=variant.heads,
        stripes=variant.stripes,
        whole=whole_at(resolution, variant.stripes),
        classes=classes,
        channels=channels,
        dropout=dropout,
        attention_dropout=attention_dropout,
        drop_path=variant.drop_path if drop_path is None else drop_path,
        lepe=lepe,
    )
    model.preprocessing = preprocessing_at(resolution)
    return model


def build(
    variant: str,
    *,
    classes: int = 1000,
    channels: int = 3,
    resolution: int | None = None,
    drop_path: float | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    lepe: bool = True,
) -> CSWin:
    """A named network with fresh weights.

    Args:
        resolution: side of the images that it is made for (default: the variant's). Any size works
            afterwards; this one decides which stages attend over their whole map
            (:func:`whole_at`).
        drop_path: default: that of the authors' recipe.
        lepe: False leaves the positional encoding away.
    """
    model = assemble(
        VARIANTS[variant],
        classes=classes,
        channels=channels,
        resolution=resolution,
        drop_path=drop_path,
        dropout=dropout,
        attention_dropout=attention_dropout,
        lepe=lepe,
    )
    model.init_weights()
    return model


# ---- authors' weights --------------------------------------------------------------------------


def block_rules(theirs: str, ours: str) -> list[tuple[str, str]]:
    """Names within one block."""
    return [
        (f"{theirs}.norm1", f"{ours}.norm1"),
        (f"{theirs}.qkv", f"{ours}.attention.qkv"),
        (f"{theirs}.attns.{{j}}.get_v", f"{ours}.attention.stripes.{{j}}.lepe"),
        (f"{theirs}.proj", f"{ours}.attention.proj"),
        (f"{theirs}.norm2", f"{ours}.norm2"),
        (f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1"),
        (f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2"),
    ]


#: names outside of blocks and norms of stages
FRAME: list[tuple[str, str]] = [
    ("stage1_conv_embed.0", "stem.conv"),
    ("stage1_conv_embed.2", "stem.norm"),
    *(
        (f"merge{n + 1}.{part}", f"merges.{n}.{part}")
        for n in range(3)
        for part in ("conv", "norm")
    ),
    ("head", "head"),
]


def keymap(*, stage_norms: bool = False) -> KeyMap:
    """Their classifier's keys, or those of their class for dense prediction."""
    blocks = [
        rule
        for n in range(STAGES)
        for rule in block_rules(f"stage{n + 1}.{{i}}", f"stages.{n}.{{i}}")
    ]
    norms = [(f"norm{n + 1}", f"stage_norms.{n}") for n in range(STAGES - 1)]
    last = [*norms, ("norm4", "norm")] if stage_norms else [("norm", "norm")]
    return KeyMap([*FRAME, *blocks, *last])


#: what no shape tells
ASSUMED = ("img_size", "num_heads", "split_size")


_Value = TypeVar("_Value")


def encoder_of(state: Mapping[str, _Value]) -> dict[str, _Value]:
    """The encoder's part of a segmentation network's file (keys ``backbone.…``); what decodes is
    no part of this paper. Other files pass as they are."""
    prefix = "backbone."
    if not any(name.startswith(prefix) for name in state):
        return dict(state)
    others = ("decode_head.", "auxiliary_head.")
    return {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if not name.startswith(others)
    }


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`from_official` from names and shapes, None if these are no
    CSWin's.

    Heads and stripes are those of the published variant of that dim and depth, at 224 pixels where
    it was published at two sizes; of another size, heads of 32 channels and stripes of 1, 2 and 7.
    ``img_size`` is one at which those stages attend over their whole map that do so.
    """
    return configuration(encoder_of(shapes), VARIANTS.values())


def configuration(
    shapes: Mapping[str, tuple[int, ...]], variants: Iterable[Variant]
) -> dict[str, Any] | None:
    """:func:`recognise`, with the variants to choose from."""
    firsts = [f"stage{n + 1}.0" for n in range(STAGES)]
    wanted = {"stage1_conv_embed.0.weight", "merge3.conv.weight", f"{firsts[3]}.mlp.fc1.weight"}
    wanted |= {f"{first}.qkv.weight" for first in firsts}
    wanted |= {f"{first}.attns.0.get_v.weight" for first in firsts}
    if not wanted <= shapes.keys() or any("content_attn" in name for name in shapes):
        return None
    dims = [shapes[f"{first}.qkv.weight"][1] for first in firsts]
    depths = [
        len({name.split(".")[1] for name in shapes if name.startswith(f"stage{n + 1}.")})
        for n in range(STAGES)
    ]
    known = next((v for v in variants if (v.dim, list(v.depths)) == (dims[0], depths)), None)
    if known:
        size, split, heads = known.resolution, list(known.stripes), list(known.heads)
    else:
        most = max(2, dims[0] // 64 * 2)  # an even number, of about 32 channels each
        first = next(h for h in range(most, 0, -1) if dims[0] % h == 0)
        size, split, heads = 224, [1, 2, 7, 7], [first * dim // dims[0] for dim in dims]
    whole = [f"{first}.attns.1.get_v.weight" not in shapes for first in firsts[:-1]]
    for n in range(STAGES - 1):
        if whole[n]:
            size = split[n] * (4 << n)
    for n in range(STAGES - 1):
        side = size // (4 << n)
        if whole[n]:
            split[n] = side
        elif split[n] == side:
            split[n] = side + 1
    head = shapes.get("head.weight")
    return {
        "img_size": size,
        "in_chans": shapes["stage1_conv_embed.0.weight"][1],
        "num_classes": head[0] if head else 0,
        "embed_dim": dims[0],
        "depth": depths,
        "split_size": split,
        "num_heads": heads,
        "mlp_ratio": expansion((shapes[f"{firsts[-1]}.mlp.fc1.weight"][0], dims[-1])),
        "qkv_bias": f"{firsts[0]}.qkv.bias" in shapes,
        "stage_norms": "norm1.weight" in shapes,
    }


def network(config: Mapping[str, Any]) -> CSWin:
    """An unfilled network by the authors' argument names.

    ``embed_dim`` (96), ``depth`` ([2, 2, 6, 2]), ``split_size`` and ``num_heads`` of each stage,
    ``img_size`` (224), ``num_classes`` (1000), ``in_chans`` (3), ``mlp_ratio`` (4), ``qkv_bias``
    (True), ``qk_scale`` (None), ``drop_rate``, ``attn_drop_rate``, ``drop_path_rate`` (0),
    ``use_chk`` (False). ``patch_size`` changes nothing in their code either. Ours is
    ``stage_norms`` (False): their class for dense prediction, whose projections always have a bias,
    whose first stages never attend over their whole map, and which has no classifier.

    Raises:
        PolypatchError: settings that this network doesn't have.
    """
    model = CSWin(**arguments(config), stage_norms=bool(config.get("stage_norms", False)))
    model.preprocessing = preprocessing_at(config.get("img_size", 224))
    return model.checkpointed(config.get("use_chk", False))


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :class:`CSWin` for a configuration of :func:`network`'s."""
    for name in ("hybrid_backbone", "norm_layer"):
        if config.get(name) not in (None, "LayerNorm", "nn.LayerNorm"):
            raise PolypatchError(f"there is no CSWin with {name}={config[name]!r}")
    heads, stripes = config.get("num_heads"), config.get("split_size")
    if not isinstance(heads, list | tuple) or not isinstance(stripes, list | tuple):
        raise PolypatchError("num_heads and split_size are lists with a number for each stage")
    dense = bool(config.get("stage_norms", False))
    dims = [config.get("embed_dim", 96)]
    for now, then in pairwise(heads):
        dims.append(dims[-1] * (then // now if dense else 2))
    last_only = (False, False, False, True)
    return {
        "dims": tuple(dims),
        "depths": tuple(config.get("depth", (2, 2, 6, 2))),
        "heads": tuple(heads),
        "stripes": tuple(stripes),
        "whole": last_only if dense else whole_at(config.get("img_size", 224), tuple(stripes)),
        "classes": config.get("num_classes", 0 if dense else 1000),
        "channels": config.get("in_chans", 3),
        "mlp_ratio": config.get("mlp_ratio", 4.0),
        "qkv_bias": dense or config.get("qkv_bias", True),
        "scale": config.get("qk_scale") or None,
        "dropout": config.get("drop_rate", 0.0),
        "attention_dropout": config.get("attn_drop_rate", 0.0),
        "drop_path": config.get("drop_path_rate", 0.0),
    }


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> CSWin:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    state = encoder_of(state)
    dense = "norm1.weight" in state
    model = network({"stage_norms": dense, **config})
    keymap(stage_norms=dense).load(model, state, what="this CSWin")
    return model.eval()


def to_official(model: CSWin) -> dict[str, Tensor]:
    """The state dict under the authors' keys.

    Raises:
        PolypatchError: a network without LePE, which their layout doesn't know.
    """
    if not model.lepe:
        raise PolypatchError("the authors' layout has no CSWin without LePE")
    return keymap(stage_norms=model.stage_norms is not None).to_theirs(model.state_dict())


def official_config(model: CSWin) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network."""
    return {
        "img_size": model.preprocessing.resolution,
        "in_chans": model.stem.conv.in_channels,
        "num_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "embed_dim": model.dims[0],
        "depth": [len(blocks) for blocks in model.stages],  # type: ignore[arg-type]
        "split_size": list(model.stripes),
        "num_heads": list(model.heads),
        "mlp_ratio": model.mlp_ratio,
        "qkv_bias": model.qkv_bias,
        "qk_scale": model.scale,
        "stage_norms": model.stage_norms is not None,
    }
