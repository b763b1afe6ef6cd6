"""CrossViT: two transformers over patches of two sizes, which swap their class tokens.

Chen, Fan and Panda, *CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image
Classification* (ICCV 2021, arXiv 2103.14899). A small branch s (fine patches, narrow, shallow) and
a large branch l (coarse patches, wide, deep) look at the image in two resolutions; K times, each
class token reads the patch tokens of the *other* branch, which costs linear time. With
xⁱ = [xⁱ_cls | xⁱ_patch] the tokens of branch i, (batch, 1 + Nⁱ, Cⁱ), and for branch l (s alike)::

    xⁱ  = blocks of ViT(xⁱ)                                    N of them in s, M in l (eq. 1)
    x'  = [f(xˡ_cls) | xˢ_patch]                                (eq. 5), of width Cˢ
    y   = f(xˡ_cls) + softmax(q kᵀ/√d) v,   q = LN(f(xˡ_cls)) W_q,  [k|v] = LN(x') [W_k|W_v]
    zˡ  = [g(y) | xˡ_patch]                                     (eq. 6, 7); no FFN

f and g are LN, GELU, linear, to the other branch's width and back; the heads are the other
branch's. The answer is the mean of two linear classifiers, one for each class token.

**One query needs no keys and values.** With a single query, (W_k x) · q = x · (W_kᵀ q), and the
weighted mean of W_v x is W_v of the weighted mean. So q goes to the tokens' own space once a head,
and 2 N C² multiplications become 2 N C h (:class:`CrossAttention`). The bias of k adds the
same to all logits of a head and cancels.

**Other fusions** (sec. 3.3, table 6) by ``fusion=``: ``"all"``, self-attention over the tokens of
both branches (eq. 2); ``"class"``, the sum of the class tokens (eq. 3); ``"pairwise"``, in addition
of patch tokens at the same place, after interpolation (eq. 4); ``"none"``. They align widths with
that of the last branch: where widths are equal f and g are left out, which gives the paper's 24.2 M
parameters of "class" and "pairwise". There is no code of the authors' for these; for "all" table 6
has 27.7 M, eq. 2 as it stands gives 25.9 M.

**Sizes.** Each branch resizes the image bicubically to its own square (240 and 224 pixels in
the named networks) whatever its size, as the authors do. ``sizing="follow"`` instead keeps the
image's scale and shape, with interpolated positions: stride 16 in the large branch. Maps
(:meth:`CrossViT.features`) are always made so; at the native size there is no difference.

Traps: g(y) *replaces* the class token; both directions read the patch tokens of before any fusion;
the norm behind f is shared by class and patch tokens; fusion blocks take the drop-path rate of the
encoder's last block. Several cross-attentions in a row (L > 1, table 7 D): as in the authors' code
only the first reads the other branch, those behind it see the class token alone; ``reread=True`` is
the paper's text. Their list of parameters without weight decay names ``pos_embed`` and
``cls_token``, but the tensors are called ``pos_embed.0``, …, so they were decayed; here they
aren't. The ablation without class tokens is left out: the paper doesn't say what becomes of z.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    KeyMap,
    Linear,
    Preprocessing,
    fresh,
    init_parts,
)
from ..nn.arguments import expansion, norm_eps, norm_word
from ..nn.positions import resample_grid
from .crossvit_embedding import KEYS
from .crossvit_embedding import embedding as patch_embedding
from .crossvit_fusion import FUSIONS, AllFusion, ClassFusion, CrossAttention, CrossFusion

__all__ = [
    "ASSUMED",
    "VARIANTS",
    "BranchHeads",
    "CrossViT",
    "Variant",
    "assemble",
    "build",
    "drop_rates",
    "from_official",
    "keymap",
    "network",
    "official_config",
    "recognise",
    "to_official",
]

SIZINGS = ("native", "follow")
Grid = tuple[int, int]


# ---- blocks ------------------------------------------------------------------------------------


class Block(nn.Module):
    """ViT's pre-norm block (eq. 1). ``dropout`` acts on both branches and inside the MLP."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        hidden: int,
        qkv_bias: bool,
        eps: float,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attention = Attention(dim=dim, heads=heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.drop_path = DropPath(rate=drop_path)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        rate = self.attention_dropout if self.training else 0.0
        q, k, v = self.attention.project(self.norm1(x))
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate).transpose(1, 2).flatten(2)
        x = self._added(x, self.attention.proj, mixed)
        hidden = self.fc1(self.norm2(x), fresh.gelu)
        return self._added(x, self.fc2, F.dropout(hidden, self.dropout, self.training))

    def _added(self, x: Tensor, layer: nn.Linear, update: Tensor) -> Tensor:
        """x + layer(update), regularised in training; in inference the product is accumulated where
        x and the bias have been added, which saves a pass over the tokens."""
        if self.training or torch.is_grad_enabled() or x.dtype != update.dtype:
            update = F.dropout(layer(update), self.dropout, self.training)
            return x + self.drop_path(update)
        total = (x + layer.bias).flatten(0, 1)
        return total.addmm_(update.flatten(0, 1), layer.weight.T).view_as(x)


class Encoder(nn.Module):
    """Blocks of each branch, then a fusion (fig. 2); the paper's "multi-scale transformer encoder".
    The network calls the parts."""

    def __init__(self, *, blocks: Sequence[Sequence[Block]], fusion: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(branch) for branch in blocks)
        self.fusion = fusion


class BranchHeads(nn.Module):
    """One linear classifier for each branch's class token; the answer is their mean."""

    def __init__(self, *, dims: Sequence[int], classes: int) -> None:
        super().__init__()
        self.dims = tuple(dims)
        self.classifiers = nn.ModuleList(nn.Linear(dim, classes) for dim in dims)

    def each(
        self, pooled: Float[Tensor, "batch all_dims"]
    ) -> Float[Tensor, "branches batch classes"]:
        """The answer of each branch alone (last columns of table 6)."""
        tokens = pooled.split(self.dims, dim=1)
        return torch.stack([head(x) for head, x in zip(self.classifiers, tokens)])

    def forward(self, pooled: Float[Tensor, "batch all_dims"]) -> Float[Tensor, "batch classes"]:
        return self.each(pooled).mean(0)


# ---- the network -------------------------------------------------------------------------------


def drop_rates(depths: Sequence[Sequence[int]], rate: float) -> list[list[float]]:
    """Per encoder the drop-path rates of its layers: rising linearly from 0 to ``rate`` over all
    encoders; a layer is a block of the deepest branch, or one of the cross-attentions that
    ``depths`` counts. Block i of every branch takes the i-th rate, the fusion the last."""
    layers = [max(entry[:-1]) + entry[-1] for entry in depths]
    steps = max(1, sum(layers) - 1)
    return [
        [rate * (sum(layers[:k]) + i) / steps for i in range(count)]
        for k, count in enumerate(layers)
    ]


class CrossViT(Backbone):
    """The network of figure 2.

    Args:
        sizes: per branch, the side in pixels to which it resizes the image, a multiple of its
            patch.
        patches, dims, heads, ratios: per branch; ``ratios`` of the MLP's width (r of table 1).
        depths: per encoder, the blocks of each branch, then how many cross-attentions follow each
            other; 0 is one, too, that takes no step of its own in the schedule of drop-path rates
            (so in all published networks: (1, M, 0)).
        embedding: ``"linear"``, ``"conv"`` (†), ``"t2t"`` or ``"t2t-performer"``.
        fusion: ``"cross"`` (the method), ``"all"``, ``"class"``, ``"pairwise"`` or ``"none"``.
        reread: see the module's docstring, as for ``sizing``.
        scale: of the products in the cross-attention, default 1/√(dim of a head). The blocks' is
            fixed.
        dropout: of tokens, MLPs and both branches of blocks; ``attention_dropout``: of the
            attention's weights.
        drop_path: of the last block, see :func:`drop_rates`.

    Raises:
        PolypatchError: lists that don't fit each other, sizes that aren't multiples of the patch
            or widths of the heads, unknown words.
    """

    undecayed = ("positions", "class_tokens")

    def __init__(
        self,
        *,
        sizes: Sequence[int],
        patches: Sequence[int],
        dims: Sequence[int],
        depths: Sequence[Sequence[int]],
        heads: Sequence[int],
        ratios: Sequence[float],
        embedding: str = "linear",
        fusion: str = "cross",
        reread: bool = False,
        sizing: str = "native",
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
        count = len(patches)
        if not count or any(len(values) != count for values in (sizes, dims, heads, ratios)):
            raise PolypatchError(
                "sizes, patches, dims, heads and ratios have one entry for each branch; got "
                f"{len(sizes)}, {count}, {len(dims)}, {len(heads)} and {len(ratios)}"
            )
        for size, patch, dim, number in zip(sizes, patches, dims, heads):
            if size < patch or size % patch:
                raise PolypatchError(
                    f"a branch of {size} pixels is no multiple of patches of {patch}"
                )
            if dim % number:
                raise PolypatchError(f"a width of {dim} does not divide into {number} heads")
        for entry in depths:
            if len(entry) != count + 1 or min(entry[:-1]) < 1 or entry[-1] < 0:
                raise PolypatchError(
                    f"an encoder's depths are {count} numbers of blocks, at least 1, and the "
                    f"number of cross-attentions; got {list(entry)}"
                )
        for name, value, known in (("fusion", fusion, FUSIONS), ("sizing", sizing, SIZINGS)):
            if value not in known:
                raise PolypatchError(f"there is no {name}={value!r}{suggest(value, known)}")
        self.sizes, self.patches, self.dims = tuple(sizes), tuple(patches), tuple(dims)
        self.depths = tuple(tuple(entry) for entry in depths)
        self.heads, self.ratios, self.embedding = tuple(heads), tuple(ratios), embedding
        self.fusion, self.reread, self.sizing = fusion, reread, sizing
        self.qkv_bias, self.scale, self.eps, self.channels = qkv_bias, scale, eps, channels
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.drop_path = drop_path

        #: cells of each branch's position table
        self.grids = tuple((s // p, s // p) for s, p in zip(sizes, patches))
        self.embeddings = nn.ModuleList(
            patch_embedding(embedding, dim=d, patch=p, channels=channels)
            for d, p in zip(dims, patches)
        )
        self.positions = nn.ParameterList(
            nn.Parameter(torch.zeros(1, 1 + rows * columns, d))
            for (rows, columns), d in zip(self.grids, dims)
        )
        self.class_tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, 1, d)) for d in dims)
        self.encoders = nn.ModuleList(
            Encoder(
                blocks=[
                    [self._block(i, rates[number]) for number in range(entry[i])]
                    for i in range(count)
                ],
                fusion=self._fusion(max(1, entry[-1]), rates[-1]),
            )
            for entry, rates in zip(depths, drop_rates(depths, drop_path))
        )
        self.norms = nn.ModuleList(nn.LayerNorm(d, eps=eps) for d in dims)
        self.dim = sum(dims)
        self.head: nn.Module = BranchHeads(dims=dims, classes=classes) if classes else nn.Identity()
        #: a branch's cell in pixels of an image that the last branch takes as it is
        self.strides = tuple(max(1, round(p * sizes[-1] / s)) for s, p in zip(sizes, patches))
        info = (FeatureInfo(d, s) for d, s in zip(dims, self.strides))
        self.feature_info = tuple(sorted(info, key=lambda entry: entry.stride))
        # The paper evaluates at 224 pixels; the authors' script, at the larger branch's size.
        self.preprocessing = Preprocessing(resolution=max(sizes))
        self.channels_last()

    def _block(self, branch: int, drop_path: float) -> Block:
        return Block(
            dim=self.dims[branch],
            heads=self.heads[branch],
            hidden=int(self.dims[branch] * self.ratios[branch]),
            qkv_bias=self.qkv_bias,
            eps=self.eps,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            drop_path=drop_path,
        )

    def _fusion(self, row: int, drop_path: float) -> nn.Module | None:
        """``row``: how many cross-attentions follow each other."""
        dims, eps = self.dims, self.eps
        if self.fusion == "none":
            return None
        if self.fusion == "all":
            return AllFusion(dims=dims, heads=self.heads[-1], qkv_bias=self.qkv_bias, eps=eps)
        if self.fusion in ("class", "pairwise"):
            return ClassFusion(dims=dims, eps=eps, pairwise=self.fusion == "pairwise")
        attentions = [
            [
                CrossAttention(
                    dim=dim,
                    heads=heads,
                    qkv_bias=self.qkv_bias,
                    eps=eps,
                    scale=self.scale,
                    dropout=self.dropout,
                    attention_dropout=self.attention_dropout,
                    drop_path=drop_path,
                )
                for _ in range(row)
            ]
            for dim, heads in zip((*dims[1:], dims[0]), (*self.heads[1:], self.heads[0]))
        ]
        return CrossFusion(dims=dims, attentions=attentions, eps=eps, reread=self.reread)

    # ---- the way of an image -------------------------------------------------------------------

    def followed(self, branch: int, height: int, width: int) -> Grid:
        """Cells of a branch that keeps the image's scale and shape: as many on a side as its
        ``strides`` fit in, rounded up or down, whichever is nearer to the native scale."""

        def cells(side: int, native: int) -> int:
            stride = self.strides[branch]
            wanted = round(side * native / self.sizes[-1])
            return min(max(wanted, side // stride, 1), -(-side // stride))

        rows, columns = self.grids[branch]
        return cells(height, rows), cells(width, columns)

    def _branches(
        self, image: Float[Tensor, "batch channels height width"], sizing: str
    ) -> tuple[list[Tensor], list[Grid]]:
        """All tokens behind the last encoder, (batch, 1 + rows · columns, dim) a branch, without
        the final norm; and the grids."""
        branches: list[Tensor] = []
        grids = [
            grid if sizing == "native" else self.followed(i, image.shape[-2], image.shape[-1])
            for i, grid in enumerate(self.grids)
        ]
        image = image.contiguous()  # channels-last images are resized three times slower
        for i, (grid, patch) in enumerate(zip(grids, self.patches)):
            size = (grid[0] * patch, grid[1] * patch)
            x = image
            if x.shape[-2:] != size:
                x = F.interpolate(x, size=size, mode="bicubic", align_corners=False)
            x = self.embeddings[i](x).flatten(1, 2)
            tokens = torch.cat([self.class_tokens[i].expand(x.shape[0], -1, -1), x], dim=1)
            tokens = tokens + self._position(i, grid)
            branches.append(F.dropout(tokens, self.dropout, self.training))
        for encoder in self.encoders:
            for i, blocks in enumerate(encoder.blocks):  # type: ignore[arg-type]
                for block in blocks:
                    branches[i] = self.through(block, branches[i])  # type: ignore[arg-type]
            if encoder.fusion is not None:
                branches = self.through(encoder.fusion, branches, grids)  # type: ignore[arg-type]
        return branches, grids

    def _position(self, branch: int, grid: Grid) -> Float[Tensor, "1 tokens dim"]:
        table = self.positions[branch]
        if grid == self.grids[branch]:
            return table
        places = resample_grid(table[:, 1:].unflatten(1, self.grids[branch]), grid)
        return torch.cat([table[:, :1], places.flatten(1, 2)], dim=1)

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        """The normed class tokens of all branches, side by side."""
        branches, _ = self._branches(image, self.sizing)
        return torch.cat([norm(x[:, 0]) for norm, x in zip(self.norms, branches)], dim=1)

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """The normed patch tokens of each branch behind the last encoder."""
        maps = [
            FeatureMap(norm(x[:, 1:]).unflatten(1, grid).permute(0, 3, 1, 2), stride)
            for x, grid, norm, stride in zip(
                *self._branches(image, "follow"), self.norms, self.strides
            )
        ]
        return sorted(maps, key=lambda entry: entry.stride)

    def reset_head(self, classes: int) -> None:
        """Fresh classifiers, one for each branch; 0: none, the pooled features come out."""
        like = next(self.parameters())
        self.head = BranchHeads(dims=self.dims, classes=classes) if classes else nn.Identity()
        self.head.to(device=like.device, dtype=like.dtype)
        self.init_head()

    def init_head(self) -> None:
        """Normal, std 0.02; zero bias."""
        for layer in self.head.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def init_weights(self) -> None:
        """As the authors:

        | tensor                       | value                                      |
        |------------------------------|--------------------------------------------|
        | Linear                       | normal, std 0.02; bias 0                   |
        | LayerNorm                    | 1; bias 0                                  |
        | Conv2d                       | torch's default, uniform by fan-in         |
        | positions, class tokens      | normal, std 0.02                           |
        | the performer's features     | orthogonal, scaled by the root of their number |
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.LayerNorm | nn.Conv2d):
                layer.reset_parameters()
        for table in (*self.positions, *self.class_tokens):
            nn.init.trunc_normal_(table, std=0.02)
        init_parts(self)


# ---- named networks ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """``dims``: C of both branches; ``depth``: M, the large branch's blocks in an encoder."""

    dims: tuple[int, int]
    heads: int
    depth: int
    ratio: float
    embedding: str = "linear"
    sizes: tuple[int, int] = (240, 224)
    patches: tuple[int, int] = (12, 16)
    encoders: int = 3


#: table 1 and the authors' names (dagger: three convolutions as patch embedding; 384: fine-tuned at
#: 408 and 384 pixels); nano is ours, for demonstrations on a CPU
VARIANTS: dict[str, Variant] = {
    "crossvit-nano": Variant((48, 96), 3, 2, 3, sizes=(33, 32), patches=(3, 4), encoders=2),
    "crossvit-tiny-224": Variant((96, 192), 3, 4, 4),
    "crossvit-small-224": Variant((192, 384), 6, 4, 4),
    "crossvit-base-224": Variant((384, 768), 12, 4, 4),
    "crossvit-9-224": Variant((128, 256), 4, 3, 3),
    "crossvit-15-224": Variant((192, 384), 6, 5, 3),
    "crossvit-18-224": Variant((224, 448), 7, 6, 3),
    "crossvit-9-dagger-224": Variant((128, 256), 4, 3, 3, "conv"),
    "crossvit-15-dagger-224": Variant((192, 384), 6, 5, 3, "conv"),
    "crossvit-18-dagger-224": Variant((224, 448), 7, 6, 3, "conv"),
    "crossvit-15-dagger-384": Variant((192, 384), 6, 5, 3, "conv", (408, 384)),
    "crossvit-18-dagger-384": Variant((224, 448), 7, 6, 3, "conv", (408, 384)),
}


def sizes_for(variant: Variant, resolution: int | None) -> tuple[int, int]:
    """Sides of both branches where the large one works at about ``resolution`` pixels: the nearest
    multiples of the patches in the variant's proportion (384 → 408 and 384)."""
    if resolution is None:
        return variant.sizes
    small, large = variant.sizes
    fine, coarse = variant.patches
    return (
        fine * max(1, round(resolution * small / large / fine)),
        coarse * max(1, round(resolution / coarse)),
    )


def assemble(
    variant: Variant,
    *,
    classes: int = 1000,
    resolution: int | None = None,
    channels: int = 3,
    embedding: str | None = None,
    fusion: str = "cross",
    sizing: str = "native",
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    drop_path: float = 0.0,
) -> CrossViT:
    """Wire a network without filling it."""
    return CrossViT(
        sizes=sizes_for(variant, resolution),
        patches=variant.patches,
        dims=variant.dims,
        depths=((1, variant.depth, 0),) * variant.encoders,
        heads=(variant.heads,) * 2,
        ratios=(variant.ratio,) * 2,
        embedding=variant.embedding if embedding is None else embedding,
        fusion=fusion,
        sizing=sizing,
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
    channels: int = 3,
    embedding: str | None = None,
    fusion: str = "cross",
    sizing: str = "native",
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    drop_path: float = 0.1,
) -> CrossViT:
    """A named network with fresh weights.

    Args:
        resolution: side at which the large branch works, see :func:`sizes_for`.
        embedding, fusion, sizing: see :class:`CrossViT`; ``embedding`` defaults to the variant's.
        drop_path: the authors' 0.1 for all networks.
    """
    if resolution is not None and resolution < 1:
        raise PolypatchError(f"a resolution is a positive number of pixels, got {resolution}")
    model = assemble(
        VARIANTS[variant],
        classes=classes,
        resolution=resolution,
        channels=channels,
        embedding=embedding,
        fusion=fusion,
        sizing=sizing,
        dropout=dropout,
        attention_dropout=attention_dropout,
        drop_path=drop_path,
    )
    model.init_weights()
    return model


# ---- authors' weights --------------------------------------------------------------------------


def keymap(depths: Sequence[Sequence[int]], embedding: str = "linear") -> KeyMap:
    """Names in the authors' files, and those of timm's copies (``pos_embed_0``). A fusion that
    ``depths`` counts as 0 has no number of its own in theirs."""
    block = [
        (f"blocks.{{k}}.blocks.{{i}}.{{n}}.{theirs}", f"encoders.{{k}}.blocks.{{i}}.{{n}}.{ours}")
        for theirs, ours in (
            ("norm1", "norm1"), ("attn.qkv", "attention.qkv"), ("attn.proj", "attention.proj"),
            ("norm2", "norm2"), ("mlp.fc1", "fc1"), ("mlp.fc2", "fc2"),
        )
    ]  # fmt: skip
    fusions = [
        (
            f"blocks.{k}.fusion.{{i}}.{'{n}.' if entry[-1] else ''}{theirs}",
            f"encoders.{k}.fusion.attentions.{{i}}.{'{n}' if entry[-1] else '0'}.{ours}",
        )
        for k, entry in enumerate(depths)
        for theirs, ours in (
            ("norm1", "norm"), ("attn.wq", "q"), ("attn.wk", "k"), ("attn.wv", "v"),
            ("attn.proj", "proj"),
        )
    ]  # fmt: skip
    tables = [
        (f"{theirs}{sign}{{i}}", f"{ours}.{{i}}")
        for sign in "._"
        for theirs, ours in (("pos_embed", "positions"), ("cls_token", "class_tokens"))
    ]
    return KeyMap(
        [
            *((f"patch_embed.{{i}}.{t}", f"embeddings.{{i}}.{o}") for t, o in KEYS[embedding]),
            *tables,
            *block,
            ("blocks.{k}.projs.{i}.{n}", "encoders.{k}.fusion.outward.{i}.{n}"),
            *fusions,
            ("blocks.{k}.revert_projs.{i}.{n}", "encoders.{k}.fusion.back.{i}.{n}"),
            ("norm.{i}", "norms.{i}"),
            ("head.{i}", "head.classifiers.{i}"),
        ]
    )


#: the authors' ``hybrid_backbone`` → ours, None: by ``multi_conv``
HYBRIDS = {None: None, "t2t": "t2t", "performer": "t2t-performer"}

#: what no shape tells; the patches, and with them the sizes, of convolutions and soft splits only
ASSUMED = ("num_heads", "qk_scale", "norm_layer", "patch_size", "img_size")


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`network` from names and shapes, None if these are no CrossViT's.

    Heads as in the published network of these widths, else of 32 channels in the first branch;
    patches of 12 and 16 where their convolutions or soft splits don't tell.
    """
    needed = ("blocks.0.revert_projs.0.2.weight", "blocks.0.blocks.0.0.mlp.fc1.weight")
    count = _count(shapes, r"norm\.(\d+)\.")
    tables = [_first(shapes, f"pos_embed.{i}", f"pos_embed_{i}") for i in range(count)]
    if not all(name in shapes for name in needed) or any(len(table) != 3 for table in tables):
        return None
    dims = [table[2] for table in tables]
    linear = _first(shapes, "patch_embed.0.proj.weight")
    conv = _first(shapes, "patch_embed.0.proj.0.weight")
    split = _first(shapes, "patch_embed.0.attention1.norm1.weight")  # over channels · 7 · 7
    if not (linear or conv or split):
        return None
    channels = linear[1] if linear else conv[1] if conv else split[0] // 49
    patches = [12, *(16,) * (count - 1)]
    if linear:
        patches = [shapes[f"patch_embed.{i}.proj.weight"][-1] for i in range(count)]
    hybrid = None
    if split:
        hybrid = "performer" if "patch_embed.0.attention1.w" in shapes else "t2t"
    published = {tuple(v.dims): v.heads for v in VARIANTS.values()}
    candidates = (published.get(tuple(dims), 0), *range(max(1, dims[0] // 32), 0, -1))
    heads = next(h for h in candidates if h and not any(dim % h for dim in dims))
    hidden = [shapes[f"blocks.0.blocks.{i}.0.mlp.fc1.weight"][0] for i in range(count)]
    ratios = [expansion((width, dim)) for width, dim in zip(hidden, dims)]
    depths = [
        [
            *(_count(shapes, rf"blocks\.{k}\.blocks\.{i}\.(\d+)\.") for i in range(count)),
            _count(shapes, rf"blocks\.{k}\.fusion\.0\.(\d+)\."),
        ]
        for k in range(_count(shapes, r"blocks\.(\d+)\."))
    ]
    return {
        "img_size": [math.isqrt(table[1] - 1) * p for table, p in zip(tables, patches)],
        "patch_size": patches,
        "in_chans": channels,
        "num_classes": (_first(shapes, "head.0.weight") or (0,))[0],
        "embed_dim": dims,
        "depth": depths,
        "num_heads": [heads] * count,
        "mlp_ratio": [*ratios, 1],
        "qkv_bias": "blocks.0.blocks.0.0.attn.qkv.bias" in shapes,
        "qk_scale": None,
        "hybrid_backbone": hybrid,
        "norm_layer": norm_word(1e-6),
        "multi_conv": bool(conv),
    }


def _first(shapes: Mapping[str, tuple[int, ...]], *names: str) -> tuple[int, ...]:
    """The shape of the first of these that is there; () if none is."""
    return next((shapes[name] for name in names if name in shapes), ())


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """One more than the largest number that the pattern's group finds at the start of a name."""
    found = (re.match(pattern, name) for name in shapes)
    return max((int(match.group(1)) + 1 for match in found if match), default=0)


def network(config: Mapping[str, Any]) -> CrossViT:
    """An unfilled network by the authors' argument names, with their defaults: ``img_size``,
    ``patch_size``, ``in_chans``, ``num_classes``, ``embed_dim``, ``depth``, ``num_heads``,
    ``mlp_ratio`` (a last entry for the fusions is unused), ``qkv_bias``, ``qk_scale`` (of the
    cross-attention alone), ``drop_rate``, ``attn_drop_rate``, ``drop_path_rate``,
    ``hybrid_backbone`` (None, ``"t2t"`` or ``"performer"``), ``norm_layer`` (its name) and
    ``multi_conv``; and our ``fusion``, ``reread`` and ``sizing``."""
    hybrid = config.get("hybrid_backbone")
    if hybrid not in HYBRIDS:
        raise PolypatchError(f"there is no hybrid_backbone={hybrid!r}; known: t2t, performer")
    embedding = HYBRIDS[hybrid] or ("conv" if config.get("multi_conv") else "linear")
    patches = config.get("patch_size", (8, 16))
    sizes = config.get("img_size", (224, 224))
    count = len(patches)
    return CrossViT(
        sizes=(sizes,) * count if isinstance(sizes, int) else sizes,
        patches=patches,
        dims=config.get("embed_dim", (192, 384)),
        depths=config.get("depth", ((1, 3, 1),) * 3),
        heads=config.get("num_heads", (6, 12)),
        ratios=config.get("mlp_ratio", (2.0, 2.0, 4.0))[:count],
        embedding=embedding,
        fusion=config.get("fusion", "cross"),
        reread=config.get("reread", False),
        sizing=config.get("sizing", "native"),
        qkv_bias=config.get("qkv_bias", False),
        scale=config.get("qk_scale"),
        eps=norm_eps(config.get("norm_layer", "LayerNorm")),
        classes=config.get("num_classes", 1000),
        channels=config.get("in_chans", 3),
        dropout=config.get("drop_rate", 0.0),
        attention_dropout=config.get("attn_drop_rate", 0.0),
        drop_path=config.get("drop_path_rate", 0.0),
    )


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> CrossViT:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    model = network(config)
    keymap(model.depths, model.embedding).load(model, state, what="this CrossViT")
    return model.eval()


def to_official(model: CrossViT) -> dict[str, Tensor]:
    """The state dict under the authors' keys.

    Raises:
        PolypatchError: another fusion than by cross-attention, for which the authors have no names.
    """
    if model.fusion != "cross":
        raise PolypatchError(f"the authors' layout has no names for fusion={model.fusion}")
    return keymap(model.depths, model.embedding).to_theirs(model.state_dict())


def official_config(model: CrossViT) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network."""
    hybrid = {ours: theirs for theirs, ours in HYBRIDS.items()}
    heads = model.head.classifiers if isinstance(model.head, BranchHeads) else []
    return {
        "img_size": list(model.sizes),
        "patch_size": list(model.patches),
        "in_chans": model.channels,
        "num_classes": heads[0].out_features if len(heads) else 0,
        "embed_dim": list(model.dims),
        "depth": [list(entry) for entry in model.depths],
        "num_heads": list(model.heads),
        "mlp_ratio": [*model.ratios, 1],
        "qkv_bias": model.qkv_bias,
        "qk_scale": model.scale,
        "drop_rate": model.dropout,
        "attn_drop_rate": model.attention_dropout,
        "drop_path_rate": model.drop_path,
        "hybrid_backbone": hybrid.get(model.embedding),
        "norm_layer": norm_word(model.eps),
        "multi_conv": model.embedding == "conv",
        "fusion": model.fusion,
        "reread": model.reread,
        "sizing": model.sizing,
    }
