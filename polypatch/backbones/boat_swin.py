"""BOAT's first form: Swin, whose windows shift from block to block, with FSLA where they do.

The host: Liu, Lin, Cao, Hu, Wei, Zhang, Lin and Guo, *Swin Transformer: Hierarchical Vision
Transformer using Shifted Windows* (ICCV 2021, arXiv 2103.14030). Maps are cut into windows of w × w
places; in every second block the windows lie ⌊w/2⌋ further down and to the right, so that
neighbours meet (each head separately, d = C / heads; B a learned table, read at the two tokens'
offset)::

    W-MSA(x) = concat(softmax(q kᵀ / √d + B) v) W_o
    x = x + W-MSA(LN(x));    x = x + MLP(LN(x))

Between stages the four neighbours' channels are joined, LN(4 C), and a linear layer makes 2 C of
them.

Traps: shifting is cyclic, so windows on the lower and right border hold places that aren't
neighbours; between these -100 is added to the logits. Joined neighbours come column by column:
(0, 0), (1, 0), (0, 1), (1, 1). A stage whose map, at the ``resolution`` that the network is made
for, isn't larger than a window has windows as small as the map, and doesn't shift. A map that
windows don't divide is padded below and to the right by zeros behind the norm (as the authors'
code for dense prediction does); these places are attended to like others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError
from ..nn import (
    Backbone,
    FeatureInfo,
    FeatureMap,
    KeyMap,
    Linear,
    Preprocessing,
    Rule,
    merge_windows,
    pad_to_windows,
    windows_of,
)
from ..nn.arguments import expansion
from ..nn.positions import resample_grid
from .boat_attention import Bilateral, FeatureAttention, feature_rules
from .cswin import Block

__all__ = [
    "BoatSwin",
    "PatchMerging",
    "WindowAttention",
    "constants",
    "keymap",
    "network",
    "official_config",
    "offsets_of",
    "recognise",
    "shift_mask",
    "windows_at",
]


def offsets_of(window: int) -> Tensor:
    """(places, places): where the table of (2 w - 1)² offsets holds that of two of w² places."""
    row, column = (
        torch.arange(window).repeat_interleave(window),
        torch.arange(window).repeat(window),
    )
    down = row[:, None] - row + window - 1
    right = column[:, None] - column + window - 1
    return down * (2 * window - 1) + right


def shift_mask(
    size: tuple[int, int], window: int, shift: int, *, like: Tensor
) -> Float[Tensor, "windows places places"]:
    """-100 between places of a shifted window that aren't neighbours in the map, else 0; of the
    windows of a map of ``size``."""
    regions = []
    for side in size:
        place = torch.arange(side, device=like.device)
        # 0: windows that are whole; 1, 2: the two parts of the last one
        regions.append((place >= side - window).to(like) + (place >= side - shift).to(like))
    region = (3 * regions[0][:, None] + regions[1])[None, :, :, None]
    region = windows_of(region, (window, window))[..., 0]
    apart = region[:, :, None] != region[:, None]
    return torch.zeros(apart.shape, dtype=like.dtype, device=like.device).masked_fill(apart, -100.0)


class WindowAttention(nn.Module):
    """W-MSA, or SW-MSA where ``shift`` is above 0. A map of no more than one window's height or
    width isn't shifted."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: int,
        shift: int = 0,
        bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise PolypatchError(f"{dim} channels don't divide into {heads} heads")
        self.heads, self.window, self.shift, self.scale = heads, window, shift, scale
        self.attention_dropout, self.dropout = attention_dropout, dropout
        self.qkv = Linear(dim, 3 * dim, bias=bias)
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.offsets: Tensor
        self.register_buffer("offsets", offsets_of(window), persistent=False)
        self.proj = Linear(dim, dim)

    def init_weights(self) -> None:
        """The table: normal, std 0.02; and the buffer."""
        nn.init.trunc_normal_(self.table, std=0.02)
        self.offsets.copy_(offsets_of(self.window))

    def bias(
        self, size: tuple[int, int], shift: int
    ) -> Float[Tensor, "windows heads places places"]:
        """What is added to the logits of each window of a map of ``size``; one for all windows
        where nothing is shifted."""
        bias = self.table[self.offsets.flatten()].view(*self.offsets.shape, -1).permute(2, 0, 1)
        if not shift:
            return bias[None]
        return bias + shift_mask(size, self.window, shift, like=bias)[:, None]

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        batch, height, width, _ = x.shape
        window = (self.window, self.window)
        shift = self.shift if min(height, width) > self.window else 0
        x = pad_to_windows(x, window)
        size = (x.shape[1], x.shape[2])
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        x = windows_of(x, window)
        qkv = self.qkv(x.unflatten(1, window)).flatten(1, 2)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.bias(size, shift)
        if len(bias) > 1:
            bias = bias.expand(batch, *bias.shape).flatten(0, 1)
        x = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=bias.to(q.dtype),
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scale,
        )
        x = self.proj(x.transpose(1, 2).flatten(2).unflatten(1, window)).flatten(1, 2)
        x = merge_windows(x, window, size)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return F.dropout(x[:, :height, :width], self.dropout, self.training)


class PatchMerging(nn.Module):
    """Four neighbours become one of twice the dim; a missing one is 0."""

    def __init__(self, *, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, out, bias=False)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch rows columns out"]:
        x = pad_to_windows(x, (2, 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # b, rows, down, columns, right, c
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


def windows_at(
    grid: tuple[int, int], window: int, stages: int
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """The authors' rule: each stage's window, and whether its second, fourth, … block shifts, for
    a first map of ``grid`` places."""
    sides = [min(grid) >> stage for stage in range(stages)]
    return tuple(min(window, side) for side in sides), tuple(side > window for side in sides)


class BoatSwin(Backbone):
    """Swin (its figure 3) with FSLA, outside of drop path, in the blocks whose windows are shifted.

    Args:
        dim: of the first stage; each further one has twice as many.
        depths, heads: of the stages, any number of them.
        grid: places of the first map at the size that the network is made for; see
            :func:`windows_at`.
        patch: side of a patch in pixels.
        patch_norm: a norm behind the patches' embedding.
        position: a learned position of every patch is added; of other grids, interpolated.
        mlp_ratio: the MLP's hidden width is this times the dim, rounded down.
        scale: factor of the logits; None: 1 / √head dim.
        dropout: behind the embedding, the attention and in the MLP; ``attention_dropout``: of the
            attention's weights.
        drop_path: of the last block; it grows linearly from 0 in the first.
        cluster, overlap: sizes of FSLA's clusters.

    Raises:
        PolypatchError: as many heads as depths are needed, and they must divide the dims.
    """

    def __init__(
        self,
        *,
        dim: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        window: int = 7,
        grid: tuple[int, int] = (56, 56),
        patch: int = 4,
        classes: int = 1000,
        channels: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        scale: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        position: bool = False,
        patch_norm: bool = True,
        cluster: int = 49,
        overlap: int = 20,
    ) -> None:
        super().__init__()
        if len(heads) != len(depths):
            raise PolypatchError(f"{len(depths)} depths need as many heads, got {heads}")
        dims = [dim << stage for stage in range(len(depths))]
        self.dims, self.dim, self.depths, self.heads = tuple(dims), dims[-1], depths, heads
        self.window, self.grid, self.patch = window, grid, patch
        self.mlp_ratio, self.qkv_bias, self.scale, self.dropout = (
            mlp_ratio,
            qkv_bias,
            scale,
            dropout,
        )
        self.windows, self.shifted = windows_at(grid, window, len(depths))
        self.embed = nn.Conv2d(channels, dim, patch, patch)
        self.embed_norm = nn.LayerNorm(dim) if patch_norm else None
        self.position = nn.Parameter(torch.zeros(1, *grid, dim)) if position else None
        self.undecayed = ("table", "position") if position else ("table",)
        self.cluster, self.overlap = cluster, overlap
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())

        def block(stage: int, number: int) -> nn.Module:
            shift = window // 2 if self.shifted[stage] and number % 2 else 0
            common = {
                "dim": dims[stage],
                "heads": heads[stage],
                "bias": qkv_bias,
                "scale": scale,
                "attention_dropout": attention_dropout,
                "dropout": dropout,
            }
            image = Block(
                attention=WindowAttention(window=self.windows[stage], shift=shift, **common),
                dim=dims[stage],
                hidden=int(dims[stage] * mlp_ratio),
                dropout=dropout,
                drop_path=next(rates),
            )
            if not shift:
                return image
            feature = FeatureAttention(cluster=cluster, overlap=overlap, **common)
            return Bilateral(block=image, feature=feature, dim=dims[stage], drop_path=0.0)

        self.stages = nn.ModuleList(
            nn.ModuleList(block(stage, number) for number in range(depth))
            for stage, depth in enumerate(depths)
        )
        self.merges = nn.ModuleList(PatchMerging(dim=a, out=b) for a, b in pairwise(dims))
        self.norm = nn.LayerNorm(dims[-1])
        self.head: nn.Module = nn.Linear(dims[-1], classes) if classes else nn.Identity()
        self.feature_info = tuple(FeatureInfo(d, patch << stage) for stage, d in enumerate(dims))
        self.channels_last()

    def _maps(self, image: Tensor) -> Iterator[Tensor]:
        """The map behind each stage, (batch, height, width, dim), not normalised."""
        self.input_requirements.check(image, name=type(self).__name__)
        x = pad_to_windows(image.permute(0, 2, 3, 1), (self.patch, self.patch))
        x = self.embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.position is not None:
            x = x + resample_grid(self.position, (x.shape[1], x.shape[2])).to(x.dtype)
        x = F.dropout(x, self.dropout, self.training)
        for merge, blocks in zip((None, *self.merges), self.stages):
            if merge is not None:
                x = merge(x)
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
        """The stages' maps, not normalised: heads for dense prediction bring norms of their own."""
        return [
            FeatureMap(x.permute(0, 3, 1, 2), info.stride)
            for x, info in zip(self._maps(image), self.feature_info)
        ]

    def init_weights(self) -> None:
        """The authors':

        | layer                 | weight                                 | bias     |
        |-----------------------|----------------------------------------|----------|
        | Linear, offsets' and  | normal, std 0.02, cut at ±2            | 0        |
        | position tables       |                                        |          |
        | LayerNorm             | 1                                      | 0        |
        | Conv2d                | torch's default: uniform, ± 1 / √fan in | the same |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()
            elif isinstance(module, WindowAttention):
                module.init_weights()
        if self.position is not None:
            nn.init.trunc_normal_(self.position, std=0.02)


# ---- authors' weights --------------------------------------------------------------------------

#: what their files hold beside weights: it follows from the sizes
CONSTANTS = (
    "layers.{n}.blocks.{i}.attn.relative_position_index",
    "layers.{n}.blocks.{i}.attn_mask",
)


def keymap(model: BoatSwin) -> KeyMap:
    """Their keys of a network of this one's depths and grid."""
    rules: list[Rule | tuple[str, str]] = []
    for stage, blocks in enumerate(model.stages):
        for index, block in enumerate(blocks):  # type: ignore[arg-type]
            theirs, ours = f"layers.{stage}.blocks.{index}", f"stages.{stage}.{index}"
            if isinstance(block, Bilateral):
                rules += feature_rules(f"{theirs}.attnC", f"{theirs}.norm4", ours)
                ours += ".block"
            rules += [
                (f"{theirs}.norm1", f"{ours}.norm1"),
                (f"{theirs}.attn.relative_position_bias_table", f"{ours}.attention.table"),
                (f"{theirs}.attn.qkv", f"{ours}.attention.qkv"),
                (f"{theirs}.attn.proj", f"{ours}.attention.proj"),
                (f"{theirs}.norm2", f"{ours}.norm2"),
                (f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1"),
                (f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2"),
            ]
    rules += [
        ("patch_embed.proj", "embed"),
        ("patch_embed.norm", "embed_norm"),
        ("layers.{n}.downsample.norm", "merges.{n}.norm"),
        ("layers.{n}.downsample.reduction", "merges.{n}.reduction"),
        ("norm", "norm"),
        ("head", "head"),
        Rule(
            ("absolute_pos_embed",),
            "position",
            to_ours=lambda x: x.unflatten(1, model.grid),
            to_theirs=lambda x: x.flatten(1, 2),
        ),
    ]
    return KeyMap(rules, unused=CONSTANTS)


def constants(model: BoatSwin) -> dict[str, Tensor]:
    """The tensors of :data:`CONSTANTS`, which their code wants to find in a state dict; no masks of
    maps that windows don't divide, which their code doesn't take."""
    index, mask = CONSTANTS
    found: dict[str, Tensor] = {}
    for n, blocks in enumerate(model.stages):
        size = (model.grid[0] >> n, model.grid[1] >> n)
        for i, block in enumerate(blocks):  # type: ignore[arg-type]
            attention = (block.block if isinstance(block, Bilateral) else block).attention
            assert isinstance(attention, WindowAttention)
            found[index.format(n=n, i=i)] = attention.offsets
            if attention.shift and not any(side % attention.window for side in size):
                found[mask.format(n=n, i=i)] = shift_mask(
                    size, attention.window, attention.shift, like=attention.table.detach()
                )
    return found


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`network` from names and shapes, but for the sizes of FSLA; None
    if these are of no such network. ``img_size`` is told by the shifted windows' masks or by
    learned positions, taken as square; 224 where a file has neither."""
    table = "attn.relative_position_bias_table"
    wanted = {"patch_embed.proj.weight", f"layers.0.blocks.0.{table}", "norm.weight"}
    if not wanted <= shapes.keys() or not any(".attnC." in name for name in shapes):
        return None
    dim, channels, patch, _ = shapes["patch_embed.proj.weight"]
    tables: list[tuple[int, ...]] = []
    while f"layers.{len(tables)}.blocks.0.{table}" in shapes:
        tables.append(shapes[f"layers.{len(tables)}.blocks.0.{table}"])
    windows = [(isqrt(offsets) + 1) // 2 for offsets, _ in tables]
    depths = [
        len({name.split(".")[3] for name in shapes if name.startswith(f"layers.{n}.blocks.")})
        for n in range(len(tables))
    ]
    size = 224
    if "absolute_pos_embed" in shapes:
        size = isqrt(shapes["absolute_pos_embed"][1]) * patch
    for name, shape in shapes.items():
        if name.endswith(".attn_mask"):
            stage = int(name.split(".")[1])
            size = (isqrt(shape[0]) * windows[stage] << stage) * patch
            break
    head = shapes.get("head.weight")
    hidden, last = shapes[f"layers.{len(depths) - 1}.blocks.0.mlp.fc1.weight"]
    return {
        "img_size": size,
        "patch_size": patch,
        "in_chans": channels,
        "num_classes": head[0] if head else 0,
        "embed_dim": dim,
        "depths": depths,
        "num_heads": [heads for _, heads in tables],
        "window_size": max(windows),
        "mlp_ratio": expansion((hidden, last)),
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in shapes,
        "ape": "absolute_pos_embed" in shapes,
        "patch_norm": "patch_embed.norm.weight" in shapes,
    }


def network(config: Mapping[str, Any]) -> BoatSwin:
    """An unfilled network by the authors' argument names.

    ``embed_dim`` (96), ``depths`` ([2, 2, 6, 2]), ``num_heads`` ([3, 6, 12, 24]), ``window_size``
    (7), ``img_size`` (224; a number, or height and width), ``patch_size`` (4), ``num_classes``
    (1000), ``in_chans`` (3), ``mlp_ratio`` (4), ``qkv_bias`` (True), ``qk_scale`` (None),
    ``drop_rate``, ``attn_drop_rate`` (0), ``drop_path_rate`` (0.1), ``ape`` (False), ``patch_norm``
    (True), ``use_checkpoint`` (False); ours are ``cluster`` (49) and ``overlap`` (20).

    Raises:
        PolypatchError: settings that this network doesn't have.
    """
    if config.get("norm_layer") not in (None, "LayerNorm", "nn.LayerNorm"):
        raise PolypatchError(f"there is no BOAT-Swin with norm_layer={config['norm_layer']!r}")
    size, patch = config.get("img_size", 224), config.get("patch_size", 4)
    height, width = (size, size) if isinstance(size, int) else size
    model = BoatSwin(
        dim=config.get("embed_dim", 96),
        depths=tuple(config.get("depths", (2, 2, 6, 2))),
        heads=tuple(config.get("num_heads", (3, 6, 12, 24))),
        window=config.get("window_size", 7),
        grid=(height // patch, width // patch),
        patch=patch,
        classes=config.get("num_classes", 1000),
        channels=config.get("in_chans", 3),
        mlp_ratio=config.get("mlp_ratio", 4.0),
        qkv_bias=config.get("qkv_bias", True),
        scale=config.get("qk_scale") or None,
        dropout=config.get("drop_rate", 0.0),
        attention_dropout=config.get("attn_drop_rate", 0.0),
        drop_path=config.get("drop_path_rate", 0.1),
        position=config.get("ape", False),
        patch_norm=config.get("patch_norm", True),
        cluster=config.get("cluster", 49),
        overlap=config.get("overlap", 20),
    )
    model.preprocessing = Preprocessing(resolution=height)
    return model.checkpointed(config.get("use_checkpoint", False))


def official_config(model: BoatSwin) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network."""
    height, width = (side * model.patch for side in model.grid)
    return {
        "img_size": height if height == width else [height, width],
        "patch_size": model.patch,
        "in_chans": model.embed.in_channels,
        "num_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "embed_dim": model.dims[0],
        "depths": list(model.depths),
        "num_heads": list(model.heads),
        "window_size": model.window,
        "mlp_ratio": model.mlp_ratio,
        "qkv_bias": model.qkv_bias,
        "qk_scale": model.scale,
        "ape": model.position is not None,
        "patch_norm": model.embed_norm is not None,
        "cluster": model.cluster,
        "overlap": model.overlap,
    }
