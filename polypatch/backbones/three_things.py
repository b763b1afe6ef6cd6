"""Three things about ViTs: parallel blocks, fine-tuning the attention only, an MLP as patch stem.

Touvron, Cord, El-Nouby, Verbeek and Jégou, *Three things everyone should know about Vision
Transformers* (ECCV 2022, arXiv 2203.09795). Three independent changes of a plain ViT, here as
complete networks (:class:`ParallelViT`, ``three-things-small-18x2``) and for any plain host
(:func:`plug`, ``vit-tiny+three-things(parallel=2)``).

**Parallel blocks** (sec. 3.2). Two blocks behind each other become one step of attention and one of
feed-forward networks, each of two branches that read the same tokens x (batch, tokens, dim)::

    x' = x  + γ₁ A₁(LN₁(x))   + γ₂ A₂(LN₂(x))                                    (eq. 2)
    x" = x' + γ₃ F₁(LN₃(x')) + γ₄ F₂(LN₄(x'))       γ: LayerScale, or 1

Parameters and operations stay, half of the steps follow each other. "18×2" means 18 such blocks of
2 branches, the complexity of a ViT of 36 blocks. Each branch has norms, and a draw of drop path, of
its own. If each residual is small, r'(x + r(x)) ≈ r'(x), the flattened network is close to the deep
one, up to second order; so a host with trained weights may be flattened and trained on.

**Attention-only fine-tuning** (sec. 4): for another resolution or task train the attention's
weights, the positions and the classifier; norms, LayerScale, FFNs, class token and patches stay
(:func:`train_only`, which also has the paper's counterpart ``"ffn"``). Attention is a third of the
weights, so further tasks cost a third of the storage; and no weight gradients of FFNs are needed.

**hMLP stem** (sec. 5): patches p×p are embedded by three convolutions that never look beyond them,
kernel = stride = p/4, 2, 2 and widths dim/4, dim/4, dim::

    N(Conv(GELU(N(Conv(GELU(N(Conv(image))))))))        N: batch norm, or layer norm over channels

As patches don't mix, hiding them before or after the stem is the same, which masked pretraining
needs (MAE, BeiT); convolutional stems leak. In training, batch norm's statistics see all patches.

**Traps.** The class token comes in behind the positions and has none: the position table has a row
for each patch only. The paper's text starts the stem from 2×2 patches, its figure 5 and the code
from 4×4. The authors' ``--attn-only`` looks for ``.attn.`` in names, which freezes the second
branch of a parallel block (``attn1``); here all attention is trained, and ``first_branch=True`` of
:func:`train_only` gives theirs. Drop path has one rate in all blocks. The authors published no
weights; their training is the A2 procedure of *ResNet strikes back* (binary cross-entropy, LAMB,
learning rate 4e-3 for S, 3e-3 for B and L), drop path 0.05 for S, 0.1 for B, 0.4 for L, LayerScale
1e-4; with many processes they use SyncBatchNorm (``nn.SyncBatchNorm.convert_sync_batchnorm``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError
from ..hosts.vit import Block, ViT
from ..nn import (
    Attention,
    Backbone,
    FeatureInfo,
    FeatureMap,
    GridPatching,
    KeyMap,
    LayerScale,
    Mlp,
    Preprocessing,
    init_parts,
)
from ..nn.arguments import expansion, norm_eps, norm_word
from ..nn.positions import resample_grid
from .three_things_parts import (
    FINETUNING,
    STEMS,
    Branches,
    HMlpPatching,
    HMlpStem,
    ParallelBlock,
    check,
    padded,
    train_only,
)

__all__ = [
    "ASSUMED",
    "VARIANTS",
    "ParallelViT",
    "Variant",
    "assemble",
    "build",
    "from_official",
    "keymap",
    "network",
    "official_config",
    "plug",
    "recognise",
    "to_official",
    "train_only",
]


# ---- on a plain host ---------------------------------------------------------------------------


def plug(host: ViT, *, parallel: int = 2, stem: str = "hmlp", finetune: str = "full") -> ViT:
    """Any of the three things on a plain ViT.

    Args:
        parallel: so many blocks that follow each other become branches of one; 1: none do. They
            keep their weights.
        stem: ``"hmlp"``, ``"hmlp-layer"`` (with layer norms) with fresh weights, or ``"linear"``,
            the host's own.
        finetune: what is trained: ``"full"``, ``"attention"`` or ``"ffn"``, see :func:`train_only`.

    Raises:
        PolypatchError: unknown words; blocks that don't divide into groups, or that reduce tokens;
            a host that has another tokenizer than a grid of patches.
    """
    check("stem", stem, STEMS)
    check("finetune", finetune, FINETUNING)
    depth = len(host.blocks)
    if parallel < 1 or depth % parallel:
        raise PolypatchError(
            f"parallel={parallel} does not divide the host's {depth} blocks into groups"
        )
    if stem != "linear":
        patching = host.patching
        if not isinstance(patching, GridPatching):
            raise PolypatchError(
                "the hMLP stem takes the place of a linear patch embedding; this host's patching "
                f"is {type(patching).__name__}, use stem=linear to keep it"
            )
        like = patching.proj.weight
        fresh_stem = HMlpStem(
            dim=host.dim,
            patch=patching.patch,
            channels=patching.proj.in_channels,
            norm="layer" if stem == "hmlp-layer" else "batch",
        )
        if not like.is_meta:
            fresh_stem.init_weights()
        host.patching = HMlpPatching(stem=fresh_stem).to(device=like.device, dtype=like.dtype)
    if parallel > 1:
        blocks = [block for block in host.blocks if isinstance(block, Block)]
        if any(block.reducing is not None or isinstance(block, ParallelBlock) for block in blocks):
            raise PolypatchError(
                "blocks that reduce tokens or are parallel already can't run beside each other; "
                "plug three-things in front of techniques that reduce tokens, and once"
            )
        host.blocks = nn.ModuleList(
            ParallelBlock(blocks[start : start + parallel]) for start in range(0, depth, parallel)
        )
    train_only(host, finetune)
    return host.plugged("three-things")


# ---- the complete networks ---------------------------------------------------------------------


class ParallelViT(Backbone):
    """A ViT of ``depth`` blocks of ``branches`` branches; 1: an ordinary one.

    Args:
        resolution: input side, or height and width, for which the positions are; others are
            interpolated.
        ratio: width of the FFN, in widths of the tokens.
        layer_scale: initial gain of each branch, None: no gains.
        stem: ``"linear"``, ``"hmlp"`` or ``"hmlp-layer"``.
        scale: of the attention products, default 1/√(dim of a head).
        dropout: in front of the classifier; ``attention_dropout``: of the attention's weights.
        drop_path: of each branch in all blocks.

    Raises:
        PolypatchError: a resolution smaller than the patch, a width that doesn't divide into heads,
            an unknown stem or one that doesn't know the patch.
    """

    undecayed = ("position", "class_token")

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        branches: int = 2,
        ratio: float = 4.0,
        layer_scale: float | None = None,
        stem: str = "linear",
        patch: int = 16,
        resolution: int | tuple[int, int] = 224,
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
        check("stem", stem, STEMS)
        if dim % heads:
            raise PolypatchError(f"a width of {dim} does not divide into {heads} heads")
        sides = (resolution, resolution) if isinstance(resolution, int) else resolution
        if min(sides) < patch:
            raise PolypatchError(f"patches of {patch} do not fit into a resolution of {resolution}")
        self.dim, self.depth, self.heads, self.branches = dim, depth, heads, branches
        self.ratio, self.layer_scale, self.stem_kind = ratio, layer_scale, stem
        self.patch, self.resolution, self.channels = patch, resolution, channels
        self.qkv_bias, self.scale, self.eps = qkv_bias, scale, eps
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.drop_path = drop_path

        def block() -> Block:
            attention = Attention(
                dim=dim, heads=heads, qkv_bias=qkv_bias, dropout=attention_dropout
            )
            attention.scale = attention.scale if scale is None else scale
            return Block(
                dim=dim,
                mixing=attention,
                mlp=Mlp(dim=dim, hidden=int(dim * ratio)),
                norm=lambda width: nn.LayerNorm(width, eps=eps),
                layer_scale=layer_scale,
                drop_path=drop_path,
            )

        self.stem = (
            nn.Conv2d(channels, dim, patch, stride=patch)
            if stem == "linear"
            else HMlpStem(
                dim=dim,
                patch=patch,
                channels=channels,
                norm="layer" if stem == "hmlp-layer" else "batch",
            )
        )
        #: cells of the position table
        self.grid = (sides[0] // patch, sides[1] // patch)
        self.position = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], dim))
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(
            Branches([block() for _ in range(branches)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.head: nn.Module = nn.Linear(dim, classes) if classes else nn.Identity()
        self.taps = tuple(sorted({max(1, depth * k // 4) for k in (1, 2, 3, 4)}))
        self.feature_info = (FeatureInfo(dim, patch),) * len(self.taps)
        self.preprocessing = Preprocessing(resolution=max(sides))
        self.channels_last()

    def tokens(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], tuple[int, int]]:
        """Class token and patches with positions, and the grid. Sides that the patch doesn't divide
        are padded with zeros below and on the right."""
        x = self.stem(padded(image, self.patch))
        if isinstance(self.stem, nn.Conv2d):
            x = x.permute(0, 2, 3, 1)
        grid = (x.shape[1], x.shape[2])
        table = resample_grid(self.position.unflatten(1, self.grid), grid)
        x = (x + table).flatten(1, 2)
        return torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1), grid

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        """The normed class token. The last block computes nothing else."""
        x, _ = self.tokens(image)
        for number, block in enumerate(self.blocks, start=1):
            x = self.through(block, x, number == self.depth)
        return self.norm(x[:, 0])

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        return self.head(F.dropout(self.pooled(image), self.dropout, self.training))

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """Four maps, evenly spaced in depth, behind the final norm, all at the patch's stride."""
        x, grid = self.tokens(image)
        maps = []
        for number, block in enumerate(self.blocks, start=1):
            x = self.through(block, x)
            if number in self.taps:
                placed = self.norm(x[:, 1:]).unflatten(1, grid)
                maps.append(FeatureMap(placed.permute(0, 3, 1, 2), self.patch))
        return maps

    def init_weights(self) -> None:
        """As the authors:

        | tensor                  | value                                |
        |-------------------------|--------------------------------------|
        | Linear                  | normal, std 0.02; bias 0             |
        | LayerNorm               | 1; bias 0                            |
        | Conv2d                  | torch's default, uniform by fan-in   |
        | LayerScale              | ``layer_scale``                      |
        | stem                    | see :meth:`HMlpStem.init_weights`    |
        | position, class token   | normal, std 0.02                     |
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.LayerNorm | nn.Conv2d):
                layer.reset_parameters()
            elif isinstance(layer, LayerScale):
                nn.init.constant_(layer.gamma, layer.init)
        nn.init.trunc_normal_(self.position, std=0.02)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        init_parts(self)


@dataclass(frozen=True)
class Variant:
    """``depth`` × ``branches`` of the name; ``drop_path`` as the paper has it for this width."""

    dim: int
    heads: int
    depth: int
    branches: int
    layer_scale: float | None
    drop_path: float
    stem: str = "linear"
    patch: int = 16
    resolution: int = 224


#: the authors' named networks; ``base-12-hmlp`` is the last row but one of table 7; nano is ours,
#: for demonstrations on a CPU
VARIANTS: dict[str, Variant] = {
    "three-things-nano": Variant(64, 4, 3, 2, None, 0.0, "hmlp", 4, 32),
    "three-things-small-36": Variant(384, 6, 36, 1, None, 0.05),
    "three-things-small-36-ls": Variant(384, 6, 36, 1, 1e-4, 0.05),
    "three-things-small-18x2": Variant(384, 6, 18, 2, None, 0.05),
    "three-things-small-18x2-ls": Variant(384, 6, 18, 2, 1e-4, 0.05),
    "three-things-base-36x1": Variant(768, 12, 36, 1, None, 0.1),
    "three-things-base-36x1-ls": Variant(768, 12, 36, 1, 1e-4, 0.1),
    "three-things-base-18x2": Variant(768, 12, 18, 2, None, 0.1),
    "three-things-base-18x2-ls": Variant(768, 12, 18, 2, 1e-4, 0.1),
    "three-things-base-12-hmlp": Variant(768, 12, 12, 1, None, 0.1, "hmlp"),
}


def assemble(
    variant: Variant,
    *,
    classes: int = 1000,
    resolution: int | None = None,
    channels: int = 3,
    stem: str | None = None,
    branches: int | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    drop_path: float | None = None,
) -> ParallelViT:
    """Wire a network without filling it."""
    total = variant.depth * variant.branches
    branches = variant.branches if branches is None else branches
    if branches < 1 or total % branches:
        raise PolypatchError(f"branches={branches} does not divide {total} blocks into groups")
    return ParallelViT(
        dim=variant.dim,
        depth=total // branches,
        heads=variant.heads,
        branches=branches,
        layer_scale=variant.layer_scale,
        stem=variant.stem if stem is None else stem,
        patch=variant.patch,
        resolution=variant.resolution if resolution is None else resolution,
        classes=classes,
        channels=channels,
        dropout=dropout,
        attention_dropout=attention_dropout,
        drop_path=variant.drop_path if drop_path is None else drop_path,
    )


def build(
    variant: str,
    *,
    classes: int = 1000,
    resolution: int | None = None,
    channels: int = 3,
    stem: str | None = None,
    branches: int | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    drop_path: float | None = None,
) -> ParallelViT:
    """A named network with fresh weights.

    Args:
        resolution: of the position table, default the variant's; any input size works.
        stem: ``"linear"``, ``"hmlp"`` or ``"hmlp-layer"``, default the variant's.
        branches: of each block, with as many in all (fig. 1 compares 1 to 4).
        drop_path: default the paper's for this width, 0.05 for S and 0.1 for B.

    Raises:
        PolypatchError: branches that don't divide the blocks, or see :class:`ParallelViT`.
    """
    model = assemble(
        VARIANTS[variant],
        classes=classes,
        resolution=resolution,
        channels=channels,
        stem=stem,
        branches=branches,
        dropout=dropout,
        attention_dropout=attention_dropout,
        drop_path=drop_path,
    )
    model.init_weights()
    return model


# ---- authors' weights --------------------------------------------------------------------------

#: their names of the branches' parts: (first, second) → ours
_PARTS = (
    (("norm1", "norm11"), "norm1"),
    (("attn.qkv", "attn1.qkv"), "mixing.qkv"),
    (("attn.proj", "attn1.proj"), "mixing.proj"),
    (("gamma_1", "gamma_1_1"), "scale1.gamma"),
    (("norm2", "norm21"), "norm2"),
    (("mlp.fc1", "mlp1.fc1"), "mlp.fc1"),
    (("mlp.fc2", "mlp1.fc2"), "mlp.fc2"),
    (("gamma_2", "gamma_2_1"), "scale2.gamma"),
)


def keymap() -> KeyMap:
    """Their layout, for any number of blocks, of one or two branches, and both stems."""
    return KeyMap(
        [
            ("cls_token", "class_token"),
            ("pos_embed", "position"),
            ("patch_embed.proj", "stem"),
            *((f"patch_embed.proj.{3 * n}", f"stem.convs.{n}") for n in range(3)),
            *((f"patch_embed.proj.{3 * n + 1}", f"stem.norms.{n}") for n in range(3)),
            *(
                (f"blocks.{{i}}.{theirs}", f"blocks.{{i}}.branches.{number}.{ours}")
                for names, ours in _PARTS
                for number, theirs in enumerate(names)
            ),
            ("norm", "norm"),
            ("head", "head"),
        ]
    )


#: (branches, LayerScale) → the authors' class of block
BLOCKS = {
    (1, False): "Block",
    (1, True): "Layer_scale_init_Block",
    (2, False): "Block_paralx2",
    (2, True): "Layer_scale_init_Block_paralx2",
}

#: what no shape tells
ASSUMED = ("num_heads", "qk_scale", "norm_layer", "init_scale")


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`network` from names and shapes, None if these aren't the paper's:
    parallel blocks, an hMLP stem, or a published depth and width, and a square position table that
    has no row for the class token. Heads as published for the width, else of 64 channels."""
    if "pos_embed" not in shapes or keymap().unknown(shapes):
        return None
    parallel = "blocks.0.attn1.qkv.weight" in shapes
    kernels = [shapes.get(f"patch_embed.proj.{n}.weight", ()) for n in (0, 3, 6)]
    hmlp = all(len(kernel) == 4 for kernel in kernels)
    first = kernels[0] if hmlp else shapes.get("patch_embed.proj.weight", ())
    table, hidden = shapes["pos_embed"], shapes.get("blocks.0.mlp.fc1.weight")
    if len(table) != 3 or len(first) != 4 or hidden is None:
        return None
    _, cells, dim = table
    depth = 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("blocks."))
    known = {(v.dim, v.depth) for v in VARIANTS.values() if v.branches == 1}
    if math.isqrt(cells) ** 2 != cells or not (parallel or hmlp or (dim, depth) in known):
        return None
    patch = math.prod(kernel[-1] for kernel in kernels) if hmlp else first[-1]
    heads = {v.dim: v.heads for v in VARIANTS.values()}.get(dim, max(1, dim // 64))
    return {
        "img_size": math.isqrt(cells) * patch,
        "patch_size": patch,
        "in_chans": first[1],
        "num_classes": shapes.get("head.weight", (0,))[0],
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": expansion((hidden[0], dim)),
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "qk_scale": None,
        "norm_layer": norm_word(1e-6),
        "block_layers": BLOCKS[1 + parallel, "blocks.0.gamma_1" in shapes],
        "Patch_layer": "hMLP_stem" if hmlp else "PatchEmbed",
        "stem_norm": "batch"
        if "patch_embed.proj.1.running_mean" in shapes or not hmlp
        else "layer",
        "init_scale": 1e-4,
    }


def network(config: Mapping[str, Any]) -> ParallelViT:
    """An unfilled network by the arguments of the authors' ``vit_models``, with their defaults:
    ``img_size`` (a number or height and width), ``patch_size``, ``in_chans``, ``num_classes``,
    ``embed_dim``, ``depth``, ``num_heads``, ``mlp_ratio``, ``qkv_bias``, ``qk_scale``,
    ``drop_rate``, ``attn_drop_rate``, ``drop_path_rate``, ``norm_layer``, ``block_layers`` and
    ``Patch_layer`` (names of their classes), ``init_scale``, and our ``stem_norm`` (``"batch"`` or
    ``"layer"``). ``act_layer``, ``Attention_block`` and ``Mlp_block`` have one value;
    ``global_pool``, ``dpr_constant`` and ``mlp_ratio_clstk`` do nothing in theirs either.

    Raises:
        PolypatchError: a class that isn't the paper's, or patches that aren't square.
    """
    for word, only in (
        ("act_layer", "GELU"),
        ("Attention_block", "Attention"),
        ("Mlp_block", "Mlp"),
    ):
        if config.get(word, only) != only:
            raise PolypatchError(f"there is no {word}={config[word]!r}, only {only}")
    blocks = {name: kind for kind, name in BLOCKS.items()}
    kind = config.get("block_layers", "Block")
    check("block_layers", kind, tuple(blocks))
    patching = config.get("Patch_layer", "PatchEmbed")
    check("Patch_layer", patching, ("PatchEmbed", "hMLP_stem"))
    stem_norm = config.get("stem_norm", "batch")
    check("stem_norm", stem_norm, ("batch", "layer"))
    patch, size = config.get("patch_size", 16), config.get("img_size", 224)
    sides = {patch} if isinstance(patch, int) else set(patch)
    if len(sides) > 1:
        raise PolypatchError(f"patches are square, got patch_size={patch}")
    branches, scaled = blocks[kind]
    hmlp = "hmlp" if stem_norm == "batch" else "hmlp-layer"
    return ParallelViT(
        dim=config.get("embed_dim", 768),
        depth=config.get("depth", 12),
        heads=config.get("num_heads", 12),
        branches=branches,
        ratio=config.get("mlp_ratio", 4.0),
        layer_scale=config.get("init_scale", 1e-4) if scaled else None,
        stem=hmlp if patching == "hMLP_stem" else "linear",
        patch=sides.pop(),
        resolution=size if isinstance(size, int) else (size[0], size[1]),
        qkv_bias=config.get("qkv_bias", False),
        scale=config.get("qk_scale") or None,
        eps=norm_eps(config.get("norm_layer", "LayerNorm")),
        classes=config.get("num_classes", 1000),
        channels=config.get("in_chans", 3),
        dropout=config.get("drop_rate", 0.0),
        attention_dropout=config.get("attn_drop_rate", 0.0),
        drop_path=config.get("drop_path_rate", 0.0),
    )


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> ParallelViT:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    model = network(config)
    keymap().load(model, state, what="this parallel ViT")
    return model.eval()


def to_official(model: ParallelViT) -> dict[str, Tensor]:
    """The state dict under the authors' keys.

    Raises:
        PolypatchError: more than two branches, for which the authors have no names.
    """
    return keymap().to_theirs(model.state_dict())


def official_config(model: ParallelViT) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network.

    Raises:
        PolypatchError: more than two branches, for which the authors have no class.
    """
    scaled = model.layer_scale is not None
    if (model.branches, scaled) not in BLOCKS:
        raise PolypatchError(f"the authors have no block of {model.branches} branches")
    return {
        "img_size": model.resolution if isinstance(model.resolution, int) else [*model.resolution],
        "patch_size": model.patch,
        "in_chans": model.channels,
        "num_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "embed_dim": model.dim,
        "depth": model.depth,
        "num_heads": model.heads,
        "mlp_ratio": model.ratio,
        "qkv_bias": model.qkv_bias,
        "qk_scale": model.scale,
        "drop_rate": model.dropout,
        "attn_drop_rate": model.attention_dropout,
        "drop_path_rate": model.drop_path,
        "norm_layer": norm_word(model.eps),
        "block_layers": BLOCKS[model.branches, scaled],
        "Patch_layer": "PatchEmbed" if model.stem_kind == "linear" else "hMLP_stem",
        "stem_norm": "layer" if model.stem_kind == "hmlp-layer" else "batch",
        "init_scale": model.layer_scale or 1e-4,
    }
