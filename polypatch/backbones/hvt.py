"""HVT: a plain vision transformer whose tokens are max-pooled from stage to stage.

Pan et al., *Scalable Vision Transformers with Hierarchical Pooling* (ICCV 2021, arXiv 2103.10619).
A transformer keeps all of its tokens to the end, which is redundant; HVT halves them several times
on the way, as convolutional networks do, and puts the saved work into width or depth. It has no
class token: the head reads the mean of the tokens that are left.

With N patches, M stages, n₀ = N tokens and pre-norm blocks as in DeiT (dim stays the same)::

    x  = Patches(image) + E                                    (N, dim)
    x' = x + Attention(LN(x));   x ← x' + MLP(LN(x'))          every block
    x ← MaxPool(x; kernel k, stride 2) + Eₛ                    behind the first block of each stage
    nₛ = ⌊(nₛ₋₁ - k) / 2⌋ + 1                                  tokens of stage s, k = 3
    y  = Linear(mean LN(x))

Traps: pooling runs over the *sequence*, patches row by row, so that windows run across the ends of
rows, and it has no padding: of 196 tokens 97, 48, 23 and 11 are left. Each pooling adds positions
of its own. The first block always pools (HVT-S-0, which never does, can't be built by the authors'
code; here ``every=0``). Sides that the patch doesn't divide lose the remainder.

The authors' network takes one size. For others the positions are resampled: those of a pooled
sequence are spread along it to all patches, resampled as a map (bicubic, antialiased), and read at
the centres of the new tokens; for the native grid that gives the table itself. Dense maps show at
each patch the token whose centre is nearest along the sequence.

``pooling`` offers average pooling and a strided convolution (dim → dim, with bias) to compare with;
the authors' code has max pooling alone, and there are no weights for the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
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
    Mlp,
    Preprocessing,
    fresh,
)
from ..nn.arguments import expansion, norm_eps, norm_word, pair
from ..nn.positions import resample_grid

__all__ = [
    "HVT",
    "VARIANTS",
    "TokenPooling",
    "Variant",
    "assemble",
    "build",
    "from_official",
    "network",
    "official_config",
    "recognise",
    "to_official",
]

POOLINGS = ("max", "average", "convolution")


# ---- the sequence of tokens ---------------------------------------------------------------------


def pooled_length(tokens: int, kernel: int) -> int:
    """Tokens that a pooling leaves."""
    return (tokens - kernel) // 2 + 1


def centre_of_first(level: int, kernel: int) -> float:
    """Where, in patches along the sequence, the first token lies that has been pooled ``level``
    times; the next ones follow at distances of 2**level."""
    return (2**level - 1) * (kernel - 1) / 2


def read_at(
    table: Float[Tensor, "1 tokens dim"], places: Float[Tensor, " places"]
) -> Float[Tensor, "1 places dim"]:
    """Rows at fractional places by linear interpolation, constant beyond the ends."""
    places = places.clamp(0, table.shape[1] - 1)
    low = places.floor().long()
    high = (low + 1).clamp_max(table.shape[1] - 1)
    share = (places - low).to(table.dtype)[:, None]
    return torch.lerp(table[:, low], table[:, high], share)


def resample_positions(
    table: Float[Tensor, "1 tokens dim"],
    native: tuple[int, int],
    grid: tuple[int, int],
    *,
    level: int,
    kernel: int,
) -> Float[Tensor, "1 tokens2 dim"]:
    """Positions of tokens that have been pooled ``level`` times, for another grid of patches."""
    if native == grid:
        return table
    step, first = 2**level, centre_of_first(level, kernel)

    def counted(number: int) -> Tensor:
        return torch.arange(number, device=table.device, dtype=torch.float32)

    spread = read_at(table, (counted(native[0] * native[1]) - first) / step)
    spread = resample_grid(spread.unflatten(1, native), grid).flatten(1, 2)
    left = spread.shape[1]
    for _ in range(level):
        left = pooled_length(left, kernel)
    return read_at(spread, counted(left) * step + first)


def nearest_tokens(
    patches: int, tokens: int, *, level: int, kernel: int, device: torch.device
) -> Int64[Tensor, " patches"]:
    """By patch, the pooled token whose centre is nearest along the sequence."""
    places = torch.arange(patches, device=device, dtype=torch.float32)
    places = (places - centre_of_first(level, kernel)) / 2**level
    return places.round().long().clamp(0, tokens - 1)


# ---- the network --------------------------------------------------------------------------------


class TokenPooling(nn.Module):
    """Half of the tokens, with positions of their own.

    Args:
        tokens: how many are left at the native resolution.
        kind: of :data:`POOLINGS`.
    """

    def __init__(self, *, dim: int, tokens: int, kernel: int, kind: str) -> None:
        super().__init__()
        self.kernel, self.kind = kernel, kind
        self.position = nn.Parameter(torch.zeros(1, tokens, dim))
        if kind == "convolution":
            self.conv = nn.Conv1d(dim, dim, kernel, stride=2)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], position: Float[Tensor, "1 left dim"]
    ) -> Float[Tensor, "batch left dim"]:
        if self.kind == "convolution":
            x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        else:  # torch's own pooling wants channels in front, and takes twice the time
            windows = x.unfold(1, self.kernel, 2)
            x = windows.amax(3) if self.kind == "max" else windows.mean(3)
        return fresh.add(position.expand_as(x), x)


class Block(nn.Module):
    """Pre-norm transformer block, then the pooling if there is one."""

    def __init__(
        self,
        *,
        dim: int,
        hidden: int,
        attention: Attention,
        pooling: TokenPooling | None,
        eps: float,
        dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim=dim, hidden=hidden, activation=fresh.gelu, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(rate=drop_path)
        self.pooling = pooling

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], position: Float[Tensor, "1 left dim"] | None
    ) -> Float[Tensor, "batch left dim"]:
        x = fresh.add(x, self.drop_path(self.dropout(self.attention(self.norm1(x)).x)))
        x = fresh.add(x, self.drop_path(self.dropout(self.mlp(self.norm2(x)))))
        return x if self.pooling is None else self.pooling(x, position)


class HVT(Backbone):
    """The network of figure 2.

    Args:
        patch: pixels a side.
        grid: rows and columns of patches that the positions are made for.
        every: blocks of a stage; the first of each ends with a pooling. 0: no pooling at all.
        kernel: tokens that a pooling window covers.
        pooling: ``"max"``, ``"average"`` or ``"convolution"``.
        scale: of the attention's logits, 1/√(width of a head) by default.
        dropout: of tokens with positions, of both layers of the MLP and behind the attention.
        attention_dropout: of attention's probabilities.
        drop_path: rate of the last block, growing linearly from 0 at the first.

    Raises:
        PolypatchError: an unknown pooling, or more poolings than the grid has tokens for.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        patch: int,
        grid: tuple[int, int],
        every: int,
        kernel: int = 3,
        pooling: str = "max",
        hidden: int | None = None,
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
        if pooling not in POOLINGS:
            hint = suggest(pooling, POOLINGS, kind="poolings")
            raise PolypatchError(f"there is no pooling={pooling!r}{hint}")
        if dim % heads:
            raise PolypatchError(f"dim={dim} does not divide into {heads} heads")
        pools = [bool(every) and number % every == 0 for number in range(depth)]
        least = 1
        for _ in range(sum(pools)):
            least = 2 * (least - 1) + kernel
        if grid[0] * grid[1] < least:
            raise PolypatchError(
                f"{sum(pools)} poolings of {kernel} tokens need {least} patches at least, a grid "
                f"of {grid[0]}×{grid[1]} has {grid[0] * grid[1]}; use a larger resolution, a "
                "smaller patch or longer stages"
            )
        self.dim, self.patch, self.grid, self.kernel = dim, patch, grid, kernel
        self.every, self.pooling, self.dropout = every, pooling, dropout
        self.undecayed = ("position",)
        self.stem = nn.Conv2d(channels, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.zeros(1, grid[0] * grid[1], dim))
        self.blocks = nn.ModuleList()
        tokens = grid[0] * grid[1]
        for number, pool in enumerate(pools):
            attention = Attention(
                dim=dim, heads=heads, qkv_bias=qkv_bias, dropout=attention_dropout
            )
            attention.scale = scale or attention.scale
            tokens = pooled_length(tokens, kernel) if pool else tokens
            self.blocks.append(
                Block(
                    dim=dim,
                    hidden=4 * dim if hidden is None else hidden,
                    attention=attention,
                    pooling=TokenPooling(dim=dim, tokens=tokens, kernel=kernel, kind=pooling)
                    if pool
                    else None,
                    eps=eps,
                    dropout=dropout,
                    drop_path=drop_path * number / max(1, depth - 1),
                )
            )
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.head: nn.Module = nn.Linear(dim, classes) if classes else nn.Identity()
        self.taps = tuple(sorted({max(1, depth * k // 4) for k in (1, 2, 3, 4)}))
        self.feature_info = (FeatureInfo(dim, patch),) * len(self.taps)
        side = isqrt(least - 1) + 1
        self.input_requirements = InputRequirements(minimum=side * patch)
        self.preprocessing = Preprocessing(resolution=max(grid) * patch)
        self.channels_last()

    def _sequences(self, image: Tensor) -> Iterator[tuple[Tensor, int, tuple[int, int]]]:
        """Behind each block: its tokens, how often they have been pooled, and the grid."""
        self.input_requirements.check(image, name="HVT")
        x = self.stem(image)
        grid = (x.shape[2], x.shape[3])

        def positions(table: Tensor, level: int) -> Tensor:
            return resample_positions(table, self.grid, grid, level=level, kernel=self.kernel)

        x = x.flatten(2).transpose(1, 2) + positions(self.position, 0)
        x = F.dropout(x, self.dropout, self.training)
        level = 0
        for block in self.blocks:
            assert isinstance(block, Block)
            position = None
            if block.pooling is not None:
                level += 1
                position = positions(block.pooling.position, level)
            x = self.through(block, x, position)
            yield x, level, grid

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        for last, _, _ in self._sequences(image):
            x = last
        return self.norm(x).mean(1)

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """Four normed maps, evenly spaced in depth, all at the patch's stride."""
        maps = []
        for number, (x, level, grid) in enumerate(self._sequences(image), start=1):
            if number in self.taps:
                nearest = nearest_tokens(
                    grid[0] * grid[1], x.shape[1], level=level, kernel=self.kernel, device=x.device
                )
                spread = self.norm(x)[:, nearest].unflatten(1, grid)
                maps.append(FeatureMap(spread.permute(0, 3, 1, 2), self.patch))
        return maps

    def init_weights(self) -> None:
        """The authors'.

        | layer                        | weight               | bias       |
        |------------------------------|----------------------|------------|
        | Linear                       | normal, std 0.02     | 0          |
        | LayerNorm                    | 1                    | 0          |
        | positions                    | normal, std 0.02     |            |
        | patches, pooling convolution | uniform, ±1/√fan in  | likewise   |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv1d | nn.Conv2d):
                module.reset_parameters()
            elif isinstance(module, TokenPooling | HVT):
                nn.init.trunc_normal_(module.position, std=0.02)


@dataclass(frozen=True)
class Variant:
    dim: int
    heads: int
    every: int
    depth: int = 12
    patch: int = 16
    resolution: int = 224
    drop_path: float = 0.1


#: the authors' README and configuration files; Scale HVT-Ti-4 and HVT-S-4 are one network under two
#: names. nano is ours, for demonstrations on a CPU
VARIANTS: dict[str, Variant] = {
    "hvt-nano": Variant(96, 3, 1, depth=4, patch=4, resolution=32, drop_path=0.0),
    "hvt-ti-1": Variant(192, 3, 12),
    "hvt-scale-ti-4": Variant(384, 6, 3),
    "hvt-s-0": Variant(384, 6, 0),
    "hvt-s-1": Variant(384, 6, 12),
    "hvt-s-2": Variant(384, 6, 6),
    "hvt-s-3": Variant(384, 6, 4),
    "hvt-s-4": Variant(384, 6, 3),
}


def assemble(
    variant: Variant,
    *,
    resolution: int | None = None,
    patch: int | None = None,
    pooling: str = "max",
    classes: int = 1000,
    channels: int = 3,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    drop_path: float | None = None,
) -> HVT:
    """Wire a network without filling it."""
    resolution = variant.resolution if resolution is None else resolution
    patch = variant.patch if patch is None else patch
    if patch < 1:
        raise PolypatchError(f"a patch has at least 1 pixel a side, got patch={patch}")
    return HVT(
        dim=variant.dim,
        depth=variant.depth,
        heads=variant.heads,
        patch=patch,
        grid=(resolution // patch, resolution // patch),
        every=variant.every,
        pooling=pooling,
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
    patch: int | None = None,
    pooling: str = "max",
    channels: int = 3,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    drop_path: float | None = None,
) -> HVT:
    """A named network with fresh weights; the arguments are :class:`HVT`'s. ``resolution`` sets the
    grid that the positions are made for (other sizes work); ``drop_path`` is the variant's by
    default, 0.1 for the authors'."""
    model = assemble(
        VARIANTS[variant],
        resolution=resolution,
        patch=patch,
        pooling=pooling,
        classes=classes,
        channels=channels,
        dropout=dropout,
        attention_dropout=attention_dropout,
        drop_path=drop_path,
    )
    model.init_weights()
    return model


# ---- authors' weights --------------------------------------------------------------------------

KEYS = KeyMap(
    [
        ("pos_embed", "position"),
        ("patch_embed.proj", "stem"),
        ("blocks.{i}.pos_embed", "blocks.{i}.pooling.position"),
        ("blocks.{i}.norm1", "blocks.{i}.norm1"),
        ("blocks.{i}.attn.qkv", "blocks.{i}.attention.qkv"),
        ("blocks.{i}.attn.proj", "blocks.{i}.attention.proj"),
        ("blocks.{i}.norm2", "blocks.{i}.norm2"),
        ("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
        ("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
        ("norm", "norm"),
        ("head", "head"),
    ]
)

#: what no shape tells
ASSUMED = (
    "img_size",
    "num_heads",
    "pool_kernel_size",
    "qk_scale",
    "norm_layer",
    "drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`from_official` from names and shapes, None if these are no HVT's.

    A network that never pools, HVT-S-0, has the names of any vision transformer without a class
    token and is not recognised; :func:`from_official` takes it with ``pool_block_width=0``.

    Assumed are heads as in the authors' variants (of 64 channels, or the next smaller power of 2
    that divides the width), an image as square as its patches permit, and of the windows that
    agree with the lengths the nearest to 3 tokens.
    """
    found = (re.fullmatch(r"blocks\.(\d+)\.pos_embed", name) for name in shapes)
    pooled = sorted(int(match[1]) for match in found if match)
    needed = {"pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight"}
    if not pooled or not needed <= shapes.keys():
        return None
    dim, channels, patch, _ = shapes["patch_embed.proj.weight"]
    depth = sum(bool(re.fullmatch(r"blocks\.\d+\.norm1\.weight", name)) for name in shapes)
    every = pooled[1] if len(pooled) > 1 else depth
    lengths = [shapes["pos_embed"][1], *(shapes[f"blocks.{i}.pos_embed"][1] for i in pooled)]
    steps = list(pairwise(lengths))
    kernels = [
        kernel
        for kernel in sorted(range(1, lengths[0] + 1), key=lambda size: abs(size - 3))
        if all(pooled_length(before, kernel) == after for before, after in steps)
    ]
    if pooled != list(range(0, depth, every)) or not kernels:
        return None
    head = next(width for width in (64, 32, 16, 8, 4, 2, 1) if dim % width == 0)
    heads = {v.dim: v.heads for v in VARIANTS.values()}.get(dim, dim // head)
    rows = next(r for r in range(isqrt(lengths[0]), 0, -1) if lengths[0] % r == 0)
    return {
        "img_size": (rows * patch, lengths[0] // rows * patch),
        "patch_size": patch,
        "in_chans": channels,
        "num_classes": shapes.get("head.weight", (0,))[0],
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": expansion((shapes["blocks.0.mlp.fc1.weight"][0], dim)),
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "qk_scale": None,
        "pool_kernel_size": kernels[0],
        "pool_block_width": every,
        "drop_rate": 0.0,
        "attn_drop_rate": 0.0,
        "drop_path_rate": 0.0,
        "norm_layer": "LayerNorm(eps=1e-6)",
    }


def network(config: Mapping[str, Any]) -> HVT:
    """An unfilled network by the authors' argument names, with their defaults: those of the class
    and ``pool_kernel_size`` (3), ``pool_block_width`` (4; 0: no pooling) of their command line.
    ``pool_stride`` does nothing there, the stride is always 2.

    Raises:
        PolypatchError: patches that aren't square, and norms that aren't layer norms.
    """
    height, width = pair(config.get("img_size", 224))
    patch, other = pair(config.get("patch_size", 16))
    if patch != other:
        raise PolypatchError(f"patches are square, got patch_size={patch}×{other}")
    dim = config.get("embed_dim", 768)
    return HVT(
        dim=dim,
        depth=config.get("depth", 12),
        heads=config.get("num_heads", 12),
        patch=patch,
        grid=(height // patch, width // patch),
        every=config.get("pool_block_width", 4),
        kernel=config.get("pool_kernel_size", 3),
        hidden=int(dim * config.get("mlp_ratio", 4.0)),
        qkv_bias=config.get("qkv_bias", False),
        scale=config.get("qk_scale"),
        eps=norm_eps(config.get("norm_layer")),
        classes=config.get("num_classes", 1000),
        channels=config.get("in_chans", 3),
        dropout=config.get("drop_rate", 0.0),
        attention_dropout=config.get("attn_drop_rate", 0.0),
        drop_path=config.get("drop_path_rate", 0.0),
    )


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> HVT:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    model = network(config)
    KEYS.load(model, state, what="this HVT")
    return model.eval()


def to_official(model: HVT) -> dict[str, Tensor]:
    """The state dict under the authors' keys."""
    return KEYS.to_theirs(model.state_dict())


def official_config(model: HVT) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network.

    Raises:
        PolypatchError: another pooling than max pooling, which the authors' code doesn't have.
    """
    if model.pooling != "max":
        raise PolypatchError(f"the authors' code has no pooling={model.pooling!r}")
    first, last = model.blocks[0], model.blocks[-1]
    assert isinstance(first, Block)
    assert isinstance(last, Block)
    attention = first.attention
    return {
        "img_size": (model.grid[0] * model.patch, model.grid[1] * model.patch),
        "patch_size": model.patch,
        "in_chans": model.stem.in_channels,
        "num_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "embed_dim": model.dim,
        "depth": len(model.blocks),
        "num_heads": attention.heads,
        "mlp_ratio": expansion((first.mlp.fc1.out_features, model.dim)),
        "qkv_bias": attention.qkv.bias is not None,
        "qk_scale": attention.scale,
        "pool_kernel_size": model.kernel,
        "pool_block_width": min(model.every, len(model.blocks)),
        "drop_rate": model.dropout,
        "attn_drop_rate": attention.dropout,
        "drop_path_rate": last.drop_path.rate,
        "norm_layer": norm_word(model.norm.eps),
    }
