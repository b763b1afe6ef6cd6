"""TNT: a small transformer over the words of each patch inside of one over the patches.

Han, Xiao, Wu, Guo, Xu and Wang, *Transformer in Transformer* (NeurIPS 2021, arXiv 2103.00112). A
patch is a *sentence* of m *words*, windows of a few pixels. In every block the words of a sentence
attend to each other, then tell their sentence, then the sentences attend to each other. With n
sentences of width d and words of width c (24 beside 384) the inner transformer costs little::

    Yⁱ ← Yⁱ + MSA(LN(Yⁱ));  Yⁱ ← Yⁱ + MLP(LN(Yⁱ))           m × c, for each sentence i (eq. 4)
    Zⁱ ← Zⁱ + LN(W · LN(Vec(Yⁱ)))                          W: d × m c, own in each block (eq. 6)
    Z ← Z + MSA(LN(Z));  Z ← Z + MLP(LN(Z))                 (n + 1) × d (eq. 7)

The class token, which has no words, is read at the end. Sentences have a position each; words have
one within their sentence, the same for all sentences. In front of the first block the sentences are
made from the words by the same map (there W has a bias).

Where code and paper differ, this is the code, which made the published weights:

* words are seen through a 7×7 convolution, so that they overlap; it runs on each patch by itself,
  with zeros beyond the patch's border and not the neighbour's pixels. The paper cuts the patch into
  m pieces (``overlap=False``);
* both norms around W; the paper's equation has none;
* with ``squeeze`` the output t of the outer MLP becomes t + t · tanh(W₂ ReLU(W₁ LN(mean of t))),
  the mean over all tokens, that of the class included.

Traps: in training a path of the inner transformer is dropped for single sentences, not for whole
images; the published files hold a tensor ``outer_tokens`` that nothing reads, and that counts among
their parameters; what the patch doesn't divide of an image is not seen. The authors' network takes
images of its own size alone; here the positions of the sentences are resampled to others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..nn import (
    Attention,
    Backbone,
    DropPath,
    FeatureInfo,
    FeatureMap,
    InputRequirements,
    KeyMap,
    Linear,
    Mlp,
    Preprocessing,
    Rule,
    fresh,
    linear,
)
from ..nn.arguments import expansion, pair
from ..nn.positions import resample_grid

__all__ = [
    "TNT",
    "VARIANTS",
    "Variant",
    "assemble",
    "build",
    "from_official",
    "network",
    "official_config",
    "recognise",
    "to_official",
]


class Words(nn.Module):
    """Cuts an image into patches and shows each of them, by itself, to one convolution."""

    def __init__(
        self, *, patch: int, stride: int, inner_dim: int, channels: int, overlap: bool
    ) -> None:
        super().__init__()
        if not overlap and patch % stride:
            raise PolypatchError(f"words of {stride} pixels don't divide a patch of {patch}")
        self.patch, self.side = patch, -(-patch // stride)
        kernel, padding = (7, 3) if overlap else (stride, 0)
        self.conv = nn.Conv2d(channels, inner_dim, kernel, stride, padding)

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "sentences words inner_dim"]:
        """The sentences of all images, row by row: batch · rows · columns of them."""
        patch = self.patch
        rows, columns = image.shape[2] // patch, image.shape[3] // patch
        seen = image[:, :, : rows * patch, : columns * patch]
        seen = seen.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
        # Channels-last patches, the layout in which words come out without a copy.
        patches = seen.permute(0, 2, 4, 3, 5, 1).flatten(0, 2).permute(0, 3, 1, 2)
        return self.conv(patches).permute(0, 2, 3, 1).flatten(1, 2)


class Squeeze(nn.Module):
    """What the tokens are on average decides by how much each channel counts (Hu et al. 2018)."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = Linear(dim, dim // 4)
        self.fc2 = Linear(dim // 4, dim)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Tensor:
        mean = self.norm(x.mean(1, keepdim=True))
        return x * self.fc2(F.relu(self.fc1(mean))).tanh()


def first_attends(
    attention: Attention, x: Float[Tensor, "batch tokens dim"]
) -> Float[Tensor, "batch 1 dim"]:
    """What attention gives to the first token: one query, keys and values of all tokens."""
    weight, bias, dim = attention.qkv.weight, attention.qkv.bias, x.shape[-1]
    q = linear(x[:, :1], weight[:dim], None if bias is None else bias[:dim])
    kv = linear(x, weight[dim:], None if bias is None else bias[dim:])
    q, k, v = (
        part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in (q, *kv.chunk(2, -1))
    )
    rate = attention.dropout if attention.training else 0.0
    mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, scale=attention.scale)
    return attention.proj(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A pre-norm transformer layer; the inner and the outer ones are of this kind. With
    ``first_only`` it computes the first token alone, (batch, 1, dim)."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        scale: float | None,
        dropout: float,
        attention_dropout: float,
        drop_path: float,
        squeeze: bool = False,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise PolypatchError(f"{heads} heads don't divide a width of {dim}")
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(
            dim=dim, heads=heads, qkv_bias=qkv_bias, dropout=attention_dropout
        )
        self.attention.scale = scale or self.attention.scale
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim=dim, hidden=int(dim * mlp_ratio), activation=fresh.gelu, dropout=dropout)
        self.squeeze = Squeeze(dim=dim) if squeeze else None
        self.drop_path = DropPath(rate=drop_path)

    def forward(self, x: Float[Tensor, "batch tokens dim"], first_only: bool = False) -> Tensor:
        if first_only and self.squeeze is None:
            x, mixed = x[:, :1], first_attends(self.attention, self.norm1(x))
        else:
            mixed = self.attention(self.norm1(x)).x
        x = self._add(x, F.dropout(mixed, self.dropout, self.training))
        mixed = F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)
        if self.squeeze is not None:
            mixed = mixed + self.squeeze(mixed)
        return self._add(x, mixed)

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        return fresh.add(x, self.drop_path(branch))


class Tell(nn.Module):
    """The words of a sentence side by side, normed, mapped to the sentence's width, normed."""

    def __init__(self, *, words: int, inner_dim: int, dim: int, bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(words * inner_dim)
        self.proj = Linear(words * inner_dim, dim, bias=bias)
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self, words: Float[Tensor, "sentences words inner_dim"], batch: int
    ) -> Float[Tensor, "batch places dim"]:
        return self.norm2(self.proj(self.norm1(words.flatten(1).unflatten(0, (batch, -1)))))


class Block(nn.Module):
    """Words among themselves, words to sentences, sentences among themselves (figure 1). The
    last block, of which the class token alone is read, may leave out the others' update."""

    def __init__(self, *, inner: Layer, tell: Tell, outer: Layer) -> None:
        super().__init__()
        self.inner, self.tell, self.outer = inner, tell, outer

    def forward(
        self,
        words: Float[Tensor, "sentences words inner_dim"],
        tokens: Float[Tensor, "batch tokens dim"],
        class_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        words = self.inner(words)
        told = fresh.add(tokens[:, 1:], self.tell(words, tokens.shape[0]))
        return words, self.outer(torch.cat([tokens[:, :1], told], dim=1), class_only)


class TNT(Backbone):
    """The network of figure 1.

    Args:
        dim, heads: of the sentences.
        inner_dim, inner_heads: of the words.
        patch: pixels a side of a sentence; ``stride``: between words.
        resolution: height and width of the images that positions are learned for, in pixels.
        scale: of the logits of all attention; default 1/√(width of a head).
        squeeze, overlap: see above.
        drop_path: of the last block; it grows linearly from 0 in the first.

    Raises:
        PolypatchError: heads that don't divide their width, or a resolution below one patch.
    """

    preprocessing = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=0.9)
    undecayed = ("class_token", "outer_position", "inner_position")

    def __init__(
        self,
        *,
        dim: int,
        inner_dim: int,
        depth: int,
        heads: int,
        inner_heads: int = 4,
        patch: int = 16,
        stride: int = 4,
        resolution: tuple[int, int] = (224, 224),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        scale: float | None = None,
        squeeze: bool = False,
        overlap: bool = True,
        classes: int = 1000,
        channels: int = 3,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.patch, self.stride, self.resolution = dim, patch, stride, resolution
        self.scale, self.overlap, self.dropout, self.drop_path = scale, overlap, dropout, drop_path
        self.preprocessing = replace(self.preprocessing, resolution=min(resolution))
        self.grid = (resolution[0] // patch, resolution[1] // patch)
        places = self.grid[0] * self.grid[1]
        if not places:
            size = f"{resolution[0]}×{resolution[1]}"
            raise PolypatchError(f"a resolution of {size} does not hold a patch of {patch} pixels")
        self.words = Words(
            patch=patch, stride=stride, inner_dim=inner_dim, channels=channels, overlap=overlap
        )
        words = self.words.side**2
        self.inner_position = nn.Parameter(torch.zeros(1, words, inner_dim))
        self.tell = Tell(words=words, inner_dim=inner_dim, dim=dim, bias=True)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.outer_position = nn.Parameter(torch.zeros(1, 1 + places, dim))
        # Read by nothing; the published files hold it.
        self.unread = nn.Parameter(torch.zeros(1, places, dim), requires_grad=False)
        common: dict[str, Any] = {
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "scale": scale,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
        }
        self.blocks = nn.ModuleList(
            Block(
                inner=Layer(dim=inner_dim, heads=inner_heads, drop_path=rate, **common),
                tell=Tell(words=words, inner_dim=inner_dim, dim=dim, bias=False),
                outer=Layer(dim=dim, heads=heads, drop_path=rate, squeeze=squeeze, **common),
            )
            for rate in (drop_path * number / max(1, depth - 1) for number in range(depth))
        )
        self.norm = nn.LayerNorm(dim)
        self.head: nn.Module = nn.Linear(dim, classes) if classes else nn.Identity()
        self.taps = tuple(sorted({max(1, depth * k // 4) for k in (1, 2, 3, 4)}))
        self.feature_info = (FeatureInfo(dim, patch),) * len(self.taps)
        self.input_requirements = InputRequirements(minimum=patch)
        self.channels_last()

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 tokens dim"]:
        """Of the class token and of the sentences of a grid of this size."""
        if grid == self.grid:
            return self.outer_position
        first, rest = self.outer_position[:, :1], self.outer_position[:, 1:]
        rest = resample_grid(rest.unflatten(1, self.grid), grid).flatten(1, 2)
        return torch.cat([first, rest], dim=1)

    def _tokens(self, image: Tensor, *, class_only: bool) -> Iterator[Tensor]:
        """Class token and sentences behind each block, (batch, 1 + sentences, dim); with
        ``class_only`` the last block may give the class token alone."""
        self.input_requirements.check(image, name="this TNT")
        batch = image.shape[0]
        words = self.words(image) + self.inner_position
        tokens = torch.cat([self.class_token.expand(batch, -1, -1), self.tell(words, batch)], dim=1)
        tokens = tokens + self.positions(self._grid(image))
        tokens = F.dropout(tokens, self.dropout, self.training)
        for number, block in enumerate(self.blocks, start=1):
            last = number == len(self.blocks)
            words, tokens = self.through(block, words, tokens, class_only and last)
            yield tokens

    def _grid(self, image: Tensor) -> tuple[int, int]:
        return image.shape[2] // self.patch, image.shape[3] // self.patch

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        for last in self._tokens(image, class_only=True):
            tokens = last
        return self.norm(tokens[:, 0])

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """The sentences behind four blocks, evenly spaced in depth, normed, at the patch's
        stride."""
        maps = []
        for number, tokens in enumerate(self._tokens(image, class_only=False), start=1):
            if number in self.taps:
                x = self.norm(tokens[:, 1:]).unflatten(1, self._grid(image))
                maps.append(FeatureMap(x.permute(0, 3, 1, 2), self.patch))
        return maps

    def init_weights(self) -> None:
        """
        | what                           | weight                       | bias     |
        |--------------------------------|------------------------------|----------|
        | Linear, class token, positions | normal, std 0.02             | 0        |
        | convolution                    | torch's own: uniform, fan-in | likewise |
        | LayerNorm                      | 1                            | 0        |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.LayerNorm):
                module.reset_parameters()
        for table in (self.class_token, self.outer_position, self.inner_position):
            nn.init.trunc_normal_(table, std=0.02)
        nn.init.zeros_(self.unread)


@dataclass(frozen=True)
class Variant:
    dim: int
    inner_dim: int
    heads: int
    inner_heads: int
    depth: int = 12
    patch: int = 16
    stride: int = 4
    resolution: int = 224


#: table 1; nano is ours, for demonstrations on a CPU
VARIANTS: dict[str, Variant] = {
    "tnt-nano": Variant(96, 12, 3, 2, depth=4, patch=8, stride=2, resolution=64),
    "tnt-ti": Variant(192, 12, 3, 2),
    "tnt-s": Variant(384, 24, 6, 4),
    "tnt-b": Variant(640, 40, 10, 4),
}


def assemble(
    variant: Variant,
    *,
    classes: int = 1000,
    squeeze: bool = False,
    overlap: bool = True,
    drop_path: float = 0.1,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    channels: int = 3,
) -> TNT:
    """Wire a network without filling it."""
    return TNT(
        dim=variant.dim,
        inner_dim=variant.inner_dim,
        depth=variant.depth,
        heads=variant.heads,
        inner_heads=variant.inner_heads,
        patch=variant.patch,
        stride=variant.stride,
        resolution=(variant.resolution, variant.resolution),
        squeeze=squeeze,
        overlap=overlap,
        classes=classes,
        channels=channels,
        dropout=dropout,
        attention_dropout=attention_dropout,
        drop_path=drop_path,
    )


def build(
    variant: str,
    *,
    classes: int = 1000,
    resolution: int | None = None,
    dim: int | None = None,
    inner_dim: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    inner_heads: int | None = None,
    patch: int | None = None,
    stride: int | None = None,
    squeeze: bool = False,
    overlap: bool = True,
    drop_path: float = 0.1,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    channels: int = 3,
) -> TNT:
    """A named network with fresh weights.

    Args:
        resolution: side of the images that positions are learned for; others are taken, too.
        dim, inner_dim, depth, heads, inner_heads, patch, stride: in place of the variant's own.
        squeeze: weigh channels by their mean behind the outer MLPs.
        overlap: off: words are pieces of the patch, as in the paper.
        drop_path: of the last block; the authors' recipe has 0.1 for all variants.
        dropout: behind the positions, each attention's projection and both layers of each MLP.
        attention_dropout: of attention weights.
        channels: of the input.
    """
    asked = {
        "resolution": resolution, "dim": dim, "inner_dim": inner_dim, "depth": depth,
        "heads": heads, "inner_heads": inner_heads, "patch": patch, "stride": stride,
    }  # fmt: skip
    for name, value in asked.items():
        if value is not None and value < 1:
            raise PolypatchError(f"{name} counts from 1, got {name}={value}")
    changed = replace(VARIANTS[variant], **{k: v for k, v in asked.items() if v is not None})
    model = assemble(
        changed,
        classes=classes,
        squeeze=squeeze,
        overlap=overlap,
        drop_path=drop_path,
        dropout=dropout,
        attention_dropout=attention_dropout,
        channels=channels,
    )
    model.init_weights()
    return model


# ---- authors' weights --------------------------------------------------------------------------


def _layer(name: str) -> list[Rule | tuple[str, str]]:
    theirs, ours = f"blocks.{{i}}.{name}_", f"blocks.{{i}}.{name}."
    qkv = (f"{theirs}attn.qk", f"{theirs}attn.v")
    return [
        (f"{theirs}norm{{j}}", f"{ours}norm{{j}}"),
        Rule(qkv, f"{ours}attention.qkv", parts=(2, 1)),
        (f"{theirs}attn.proj", f"{ours}attention.proj"),
        (f"{theirs}mlp.fc{{j}}", f"{ours}mlp.fc{{j}}"),
    ]


KEYS = KeyMap(
    [
        ("patch_embed.proj", "words.conv"),
        ("inner_pos", "inner_position"),
        ("outer_pos", "outer_position"),
        ("outer_tokens", "unread"),
        ("cls_token", "class_token"),
        ("proj_norm{j}", "tell.norm{j}"),
        ("proj", "tell.proj"),
        *_layer("inner"),
        ("blocks.{i}.proj_norm{j}", "blocks.{i}.tell.norm{j}"),
        ("blocks.{i}.proj", "blocks.{i}.tell.proj"),
        *_layer("outer"),
        ("blocks.{i}.se_layer.fc.0", "blocks.{i}.outer.squeeze.norm"),
        ("blocks.{i}.se_layer.fc.1", "blocks.{i}.outer.squeeze.fc1"),
        ("blocks.{i}.se_layer.fc.3", "blocks.{i}.outer.squeeze.fc2"),
        ("norm", "norm"),
        ("head", "head"),
    ]
)

#: what no shape tells
ASSUMED = (
    "img_size", "patch_size", "inner_stride", "outer_num_heads", "inner_num_heads", "qk_scale",
)  # fmt: skip

#: arguments of the authors' class and what they are where they are not given; the last is ours
ARGUMENTS: dict[str, Any] = {
    "img_size": 224, "patch_size": 16, "in_chans": 3, "num_classes": 1000, "outer_dim": 768,
    "inner_dim": 48, "depth": 12, "outer_num_heads": 12, "inner_num_heads": 4, "mlp_ratio": 4.0,
    "qkv_bias": False, "qk_scale": None, "drop_rate": 0.0, "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0, "norm_layer": None, "inner_stride": 4, "se": 0,
    "overlap": True,
}  # fmt: skip


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`from_official` from names and shapes, None if these are no
    TNT's. Assumed: words 4 pixels apart (which makes 16×16 patches of the published 16 words),
    heads as in table 1, else of 64 channels, and 4 of the words; a grid as square as can be."""
    if not {"outer_tokens", "inner_pos", "blocks.0.inner_attn.qk.weight"} <= shapes.keys():
        return None
    dim, places = shapes["outer_pos"][2], shapes["outer_pos"][1] - 1
    _, words, inner_dim = shapes["inner_pos"]
    _, channels, kernel, _ = shapes["patch_embed.proj.weight"]
    stride = 4 if kernel == 7 else kernel
    patch = stride * math.isqrt(words)
    rows = next(n for n in range(math.isqrt(places), 0, -1) if places % n == 0)
    size = (rows * patch, places // rows * patch)
    known = next((v for v in VARIANTS.values() if (v.dim, v.inner_dim) == (dim, inner_dim)), None)
    return {
        "img_size": size[0] if size[0] == size[1] else size,
        "patch_size": patch,
        "in_chans": channels,
        "num_classes": shapes.get("head.weight", (0,))[0],
        "outer_dim": dim,
        "inner_dim": inner_dim,
        "depth": len([n for n in shapes if re.fullmatch(r"blocks\.\d+\.inner_norm1\.weight", n)]),
        "outer_num_heads": known.heads if known else math.gcd(dim, max(1, dim // 64)),
        "inner_num_heads": known.inner_heads if known else math.gcd(inner_dim, 4),
        "mlp_ratio": expansion(
            (shapes["blocks.0.outer_mlp.fc1.weight"][0], dim),
            (shapes["blocks.0.inner_mlp.fc1.weight"][0], inner_dim),
        ),
        "qkv_bias": "blocks.0.outer_attn.qk.bias" in shapes,
        "qk_scale": None,
        "inner_stride": stride,
        "se": int("blocks.0.se_layer.fc.0.weight" in shapes),
        "overlap": kernel == 7,
    }


def network(config: Mapping[str, Any]) -> TNT:
    """An unfilled network by the authors' argument names (:data:`ARGUMENTS`) and our ``overlap``.

    Raises:
        PolypatchError: an argument that they don't have, another norm, patches that aren't square.
    """
    for name in config:
        if name not in ARGUMENTS:
            raise PolypatchError(f"TNT has no argument {name!r}{suggest(name, ARGUMENTS)}")
    given = ARGUMENTS | dict(config)
    if given["norm_layer"] is not None:
        raise PolypatchError("TNT is built with layer norms; norm_layer can't be chosen")
    patch, other = pair(given["patch_size"])
    if patch != other:
        raise PolypatchError(f"TNT is built with square patches, not {patch}×{other}")
    return TNT(
        dim=given["outer_dim"],
        inner_dim=given["inner_dim"],
        depth=given["depth"],
        heads=given["outer_num_heads"],
        inner_heads=given["inner_num_heads"],
        patch=patch,
        stride=given["inner_stride"],
        resolution=pair(given["img_size"]),
        mlp_ratio=given["mlp_ratio"],
        qkv_bias=given["qkv_bias"],
        scale=given["qk_scale"],
        squeeze=given["se"] > 0,
        overlap=given["overlap"],
        classes=given["num_classes"],
        channels=given["in_chans"],
        dropout=given["drop_rate"],
        attention_dropout=given["attn_drop_rate"],
        drop_path=given["drop_path_rate"],
    )


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> TNT:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    model = network(config)
    KEYS.load(model, state, what="this TNT")
    return model.eval()


def to_official(model: TNT) -> dict[str, Tensor]:
    """The state dict under the authors' keys."""
    return KEYS.to_theirs(model.state_dict())


def official_config(model: TNT) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network."""
    inner: Any = model.blocks[0].inner
    outer: Any = model.blocks[0].outer
    height, width = model.resolution
    return {
        "img_size": height if height == width else (height, width),
        "patch_size": model.patch,
        "in_chans": model.words.conv.in_channels,
        "num_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "outer_dim": model.dim,
        "inner_dim": model.words.conv.out_channels,
        "depth": len(model.blocks),
        "outer_num_heads": outer.attention.heads,
        "inner_num_heads": inner.attention.heads,
        "mlp_ratio": expansion(
            (outer.mlp.fc1.out_features, model.dim),
            (inner.mlp.fc1.out_features, model.words.conv.out_channels),
        ),
        "qkv_bias": outer.attention.qkv.bias is not None,
        "qk_scale": model.scale,
        "drop_rate": model.dropout,
        "attn_drop_rate": outer.attention.dropout,
        "drop_path_rate": model.drop_path,
        "inner_stride": model.stride,
        "se": int(outer.squeeze is not None),
        "overlap": model.overlap,
    }
