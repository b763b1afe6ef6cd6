"""MViT's blocks, positions and network, see :mod:`polypatch.backbones.mvit`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
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
    Linear,
    Preprocessing,
    fresh,
)
from ..nn.positions import sincos
from .mvit_attention import (
    MODES,
    BlockShape,
    Grid,
    HeadNorm,
    Pooling,
    PoolingAttention,
    kernel_of,
    over_grid,
    slide,
)

__all__ = ["ACTIVATIONS", "KINETICS", "POSITIONS", "AbsolutePosition", "Block", "MViT", "plan"]

POSITIONS = ("joint", "separate", "sincos", "none")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(1),
    "sigmoid": torch.sigmoid,
    "none": lambda x: x,
}

#: of clips: shorter side 256, middle crop of 224
KINETICS = Preprocessing(
    mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225), interpolation="bilinear"
)


def rounded(width: int, factor: float, divisor: int = 1) -> int:
    """``width * factor`` to the nearest multiple of ``divisor``, not below nine tenths of it."""
    wide = width * factor
    found = max(1, int(wide + divisor / 2) // divisor * divisor)
    return found + divisor if found < 0.9 * wide else found


def plan(
    *,
    dim: int,
    heads: int,
    depth: int,
    dim_factors: Mapping[int, float],
    head_factors: Mapping[int, float],
    query_strides: Mapping[int, Grid],
    key_strides: Mapping[int, Grid] | None = None,
    first_key_stride: Grid | None = None,
    kernel: Grid | None = None,
    widen_in_attention: bool = False,
) -> tuple[BlockShape, ...]:
    """All blocks from the authors' lists.

    Args:
        dim_factors, head_factors: by block, how much wider it is than the block before, and how
            many times more heads it has.
        query_strides, key_strides: by block that pools, over (time, height, width).
        first_key_stride: instead of ``key_strides``: every block pools keys and values, from this
            stride on, which each block divides by its queries' stride.
        kernel: of all pooling; None: :func:`kernel_of` the stride.
        widen_in_attention: the wider block does it itself, not the one before at its end.
    """

    def pooling(stride: Grid | None) -> Pooling | None:
        found = stride and Pooling(kernel or kernel_of(stride), stride)
        return None if not found or found == Pooling((1, 1, 1), (1, 1, 1)) else found

    blocks: list[BlockShape] = []
    across = first_key_stride
    for i in range(depth):
        queries, keys = query_strides.get(i), (key_strides or {}).get(i)
        if across is not None:
            a, b, c = (max(k // q, 1) for k, q in zip(across, queries or (1, 1, 1)))
            keys = across = (a, b, c)
        heads = rounded(heads, head_factors.get(i, 1.0))
        # Widths are multiples of the heads, which for this purpose have grown once more.
        where = i if widen_in_attention else i + 1
        divisor = rounded(heads, head_factors.get(where, 1.0))
        out = rounded(dim, dim_factors.get(where, 1.0), divisor)
        blocks.append(BlockShape(dim, out, heads, pooling(queries), pooling(keys)))
        dim = out
    return tuple(blocks)


class Block(nn.Module):
    """Pooling attention and MLP, one of which may change the width."""

    def __init__(
        self,
        *,
        shape: BlockShape,
        prefix: int,
        mode: str,
        pool_first: bool,
        qkv_bias: bool,
        residual_pooling: bool,
        tables: Grid,
        widen_in_attention: bool,
        mlp_ratio: float,
        dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.shape, self.prefix, self.dropout = shape, prefix, dropout
        self.widen_in_attention = widen_in_attention
        inner = shape.out if widen_in_attention else shape.dim
        self.norm1 = nn.LayerNorm(shape.dim, eps=1e-6)
        self.attention = PoolingAttention(
            shape=replace(shape, out=inner),
            prefix=prefix,
            mode=mode,
            pool_first=pool_first,
            bias=qkv_bias,
            residual=residual_pooling,
            tables=tables,
        )
        self.norm2 = nn.LayerNorm(inner, eps=1e-6)
        hidden = int(inner * mlp_ratio)
        self.fc1, self.fc2 = Linear(inner, hidden), Linear(hidden, shape.out)
        self.widen = Linear(shape.dim, shape.out) if shape.dim != shape.out else None
        self.drop_path = DropPath(rate=drop_path)

    def skip(self, x: Float[Tensor, "batch tokens dim"], grid: Grid) -> Tensor:
        """The residual beside pooled queries: the maximum over stride + 1 tokens a side."""
        stride = self.shape.stride
        if math.prod(stride) == 1:
            return x
        pooling = Pooling(kernel_of(stride), stride)

        def pool(maps: Tensor) -> Tensor:
            return slide(maps, pooling, F.max_pool2d, F.max_pool3d)

        return over_grid(x, grid, pool, prefix=self.prefix)[0]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.training and self.drop_path.rate:
            return x + self.drop_path(branch)
        return fresh.add(x, branch)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], grid: Grid, only_class: bool = False
    ) -> tuple[Float[Tensor, "batch pooled out"], Grid]:
        normed = self.norm1(x)
        mixed, size = self.attention(normed, grid, only_class)
        if only_class:
            x, normed = x[:, :1], normed[:, :1]
        if self.widen is not None and self.widen_in_attention:
            x = self.widen(normed)
        x = self._add(x if only_class else self.skip(x, grid), self._drop(mixed))
        normed = self.norm2(x)
        branch = self._drop(self.fc2(self._drop(self.fc1(normed, fresh.gelu))))
        if self.widen is not None and not self.widen_in_attention:
            x = self.widen(normed)
        return self._add(x, branch), size


class AbsolutePosition(nn.Module):
    """What is added to the tokens of the first block, the class token included.

    ``"joint"``: a row for every token of the native grid. ``"separate"``: one for every place in a
    frame, one for every frame, one for the class token. ``"sincos"``: a fixed joint table, a
    quarter of the channels for time, three eighths each for x and for y; it is added twice, as the
    authors' code does.
    """

    def __init__(self, *, kind: str, grid: Grid, dim: int, prefix: int) -> None:
        super().__init__()
        self.kind, self.grid, self.prefix = kind, grid, prefix
        time, height, width = grid
        if kind == "separate":
            self.space = nn.Parameter(torch.zeros(1, height * width, dim))
            self.time = nn.Parameter(torch.zeros(1, time, dim))
            self.first = nn.Parameter(torch.zeros(1, 1, dim)) if prefix else None
        else:
            if kind == "sincos" and dim % 16:
                raise PolypatchError(f"sine-cosine positions need a multiple of 16, not {dim}")
            table = torch.zeros(1, prefix + math.prod(grid), dim)
            self.joint = nn.Parameter(table, requires_grad=kind != "sincos")

    def init_weights(self) -> None:
        """Normal with std 0.02, or the fixed code (0 for the class token)."""
        if self.kind != "sincos":
            for table in self.parameters():
                nn.init.trunc_normal_(table, std=0.02)
            return
        dim = self.joint.shape[-1]
        steps = [torch.arange(n, device=self.joint.device).float() for n in self.grid]
        time, y, x = torch.meshgrid(*steps, indexing="ij")
        shares = ((time, dim // 4), (x, dim * 3 // 8), (y, dim * 3 // 8))
        code = torch.cat([sincos(place.flatten(), share) for place, share in shares], -1)
        with torch.no_grad():
            self.joint.copy_(F.pad(code, (0, 0, self.prefix, 0)))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], grid: Grid
    ) -> Float[Tensor, "batch tokens dim"]:
        return x + self.code(grid).to(x.dtype)

    def code(self, grid: Grid) -> Float[Tensor, "1 tokens dim"]:
        """The table for any grid."""
        if self.kind == "separate":
            space, time = self.space, self.time
            if grid != self.grid:
                space = resampled(space, (1, *self.grid[1:]), (1, *grid[1:]))
                time = resampled(time, (self.grid[0], 1, 1), (grid[0], 1, 1))
            code = (time[:, :, None] + space[:, None]).flatten(1, 2)
            return code if self.first is None else torch.cat([self.first, code], 1)
        code = self.joint
        if grid != self.grid:
            placed = resampled(code[:, self.prefix :], self.grid, grid)
            code = torch.cat([code[:, : self.prefix], placed], 1)
        return 2 * code if self.kind == "sincos" else code


def resampled(
    table: Float[Tensor, "1 cells dim"], old: Grid, new: Grid
) -> Float[Tensor, "1 cells2 dim"]:
    """Trilinear interpolation of a table in raster order."""
    maps = table.float().transpose(1, 2).unflatten(-1, old)
    maps = F.interpolate(maps, size=new, mode="trilinear")
    return maps.flatten(2).transpose(1, 2).to(table.dtype)


class MViT(Backbone):
    """Patches, blocks, norm, and a classifier on the class token or on the mean of all tokens.

    Args:
        blocks: widths, heads and pooling of each, see :func:`plan`.
        patch: kernel and stride of the patches over (time, height, width).
        patch_padding: default half of the kernel.
        video: whether inputs are (batch, channels, frames, height, width).
        frames, resolution: what the tables of positions are made for.
        class_token: what the head reads, else the mean of all tokens.
        position: absolute, of :data:`POSITIONS`.
        relative_space, relative_time: v2's decomposed relative positions, if
            ``relative_zero`` from 0 on.
        residual_pooling: v2's addition of the pooled queries.
        widen_in_attention: v2's place for growing widths.
        mode: how attention pools, of :data:`MODES`; ``"conv_unshared"`` (a kernel for every channel
            of all heads) only with ``pool_first``.
        pool_first: pool in front of the projections.
        separate_qkv: three projections in the authors' layout, as with ``pool_first``; otherwise
            the same network.
        norm_patches: a norm in front of the first block.
        mean_pooling: the head reads the normed mean of the tokens (without class token) instead of
            the normed class token or the mean of the normed tokens.
        dropout: in front of and inside of the blocks; ``head_dropout``: before the head.
        head_scale: factor on the fresh classifier.
        head_activation: of :meth:`probabilities`, of :data:`ACTIVATIONS`.
        drop_path: rate of the last block, growing linearly from 0 at the first.
        decay_positions: whether weight decay acts on positions and class token.

    Raises:
        PolypatchError: unknown words, parts that don't fit each other.
    """

    def __init__(
        self,
        *,
        blocks: Sequence[BlockShape],
        patch: Pooling,
        patch_padding: Grid | None = None,
        video: bool = False,
        frames: int = 1,
        resolution: int = 224,
        channels: int = 3,
        classes: int = 1000,
        class_token: bool = True,
        position: str = "joint",
        relative_space: bool = False,
        relative_time: bool = False,
        relative_zero: bool = False,
        residual_pooling: bool = False,
        widen_in_attention: bool = False,
        mode: str = "conv",
        pool_first: bool = False,
        separate_qkv: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_patches: bool = False,
        mean_pooling: bool = False,
        dropout: float = 0.0,
        head_dropout: float = 0.0,
        head_scale: float = 1.0,
        head_activation: str = "softmax",
        drop_path: float = 0.0,
        decay_positions: bool = True,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        for kind, word, known in (
            ("mode", mode, MODES),
            ("position", position, POSITIONS),
            ("activation", head_activation, ACTIVATIONS),
        ):
            if word not in known:
                raise PolypatchError(
                    f"there is no {kind} {word!r}{suggest(word, known, kind=f'{kind}s')}"
                )
        if mode == "conv_unshared" and not pool_first:
            raise PolypatchError('mode="conv_unshared" needs pool_first=True')
        if not video and (frames, patch.kernel[0], patch.stride[0]) != (1, 1, 1):
            raise PolypatchError("an image network has one frame; video=True takes clips")
        for number, shape in enumerate(blocks):
            _check(shape, number, widen_in_attention, pool_first)
        self.dim, self.patch, self.video = blocks[-1].out, patch, video
        self.patch_padding = patch.padding if patch_padding is None else patch_padding
        self.frames, self.resolution, self.prefix = frames, resolution, int(class_token)
        self.sample_shape = (channels, frames) if video else (channels,)
        self.mode, self.pool_first = mode, pool_first
        self.separate_qkv = separate_qkv or pool_first
        self.relative_zero, self.residual_pooling = relative_zero, residual_pooling
        self.widen_in_attention, self.mlp_ratio = widen_in_attention, mlp_ratio
        self.mean_pooling, self.dropout, self.head_dropout = mean_pooling, dropout, head_dropout
        self.head_scale, self.head_activation = head_scale, head_activation
        self.drop_path, self.decay_positions = drop_path, decay_positions
        self.undecayed = () if decay_positions else ("position.", "class_token", ".rel_")
        self.preprocessing = preprocessing or (KINETICS if video else Preprocessing())
        self.input_requirements = InputRequirements(
            minimum=max(1, patch.kernel[1] - 2 * self.patch_padding[1])
        )
        a, b, c = (n // s for n, s in zip((frames, resolution, resolution), patch.stride))
        if min(a, b, c) < 1:
            raise PolypatchError(
                f"{frames} × {resolution} × {resolution} is less than one patch's stride, "
                f"{' × '.join(map(str, patch.stride))}"
            )
        grid, dim = (a, b, c), blocks[0].dim

        kernel, steps, padding = patch.kernel, patch.stride, self.patch_padding
        self.stem: nn.Module = (
            nn.Conv3d(channels, dim, kernel, steps, padding)
            if video
            else nn.Conv2d(channels, dim, kernel[1:], steps[1:], padding[1:])
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.position: AbsolutePosition | None = None
        if position != "none":
            self.position = AbsolutePosition(kind=position, grid=grid, dim=dim, prefix=self.prefix)
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6) if norm_patches else None
        self.blocks = nn.ModuleList()
        time, side, stride = grid[0], grid[1], patch.stride[1]
        taps: dict[int, FeatureInfo] = {}
        for number, shape in enumerate(blocks):
            key_stride = shape.keys.stride[1] if shape.keys else 1
            across = 2 * max(side // shape.stride[1], side // key_stride) - 1
            self.blocks.append(
                Block(
                    shape=shape,
                    prefix=self.prefix,
                    mode=mode,
                    pool_first=pool_first,
                    qkv_bias=qkv_bias,
                    residual_pooling=residual_pooling,
                    tables=(
                        2 * time - 1 if relative_time else 0,
                        across if relative_space else 0,
                        across if relative_space else 0,
                    ),
                    widen_in_attention=widen_in_attention,
                    mlp_ratio=mlp_ratio,
                    dropout=dropout,
                    drop_path=drop_path * number / max(1, len(blocks) - 1),
                )
            )
            time, side = time // shape.stride[0], side // shape.stride[1]
            stride *= shape.stride[1]
            if number + 1 == len(blocks) or math.prod(blocks[number + 1].stride) > 1:
                taps[number] = FeatureInfo(shape.out, stride)
        self.taps = tuple(taps)
        self.feature_info = tuple(taps.values())
        self.norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.head: nn.Module = nn.Linear(self.dim, classes) if classes else nn.Identity()
        self.stem.to(memory_format=self._layout)  # type: ignore[call-overload]

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last_3d if self.video else torch.channels_last

    def _tokens_in(self, x: Tensor) -> tuple[Tensor, Grid]:
        """What the first block takes, and its grid."""
        if x.ndim != 4 + self.video:
            axes = "(batch, channels, frames, height, width)" if self.video else (
                "(batch, channels, height, width)")  # fmt: skip
            raise PolypatchError(f"the input is {tuple(x.shape)}; this MViT takes {axes}")
        self.input_requirements.check(x, name="MViT")
        least = self.patch.kernel[0] - 2 * self.patch_padding[0]
        if self.video and x.shape[2] < least:
            raise PolypatchError(f"the input has {x.shape[2]} frames; MViT takes {least} at least")
        x = self.stem(x.contiguous(memory_format=self._layout))
        grid = (x.shape[2] if self.video else 1, x.shape[-2], x.shape[-1])
        x = x.flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)
        if self.position is not None:
            x = self.position(x, grid)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return x if self.norm_patches is None else self.norm_patches(x), grid

    def _behind_blocks(self, x: Tensor, only_class: bool = False) -> Iterator[tuple[Tensor, Grid]]:
        x, grid = self._tokens_in(x)
        for number, block in enumerate(self.blocks, start=1):
            x, grid = self.through(block, x, grid, only_class and number == len(self.blocks))
            yield x, grid

    def tokens(
        self, image: Float[Tensor, "batch channels *size"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """All tokens behind the last norm, the class token first."""
        for found, _ in self._behind_blocks(image):
            x = found
        return self.norm(x)

    def pooled(self, image: Float[Tensor, "batch channels *size"]) -> Float[Tensor, "batch dim"]:
        with_class = self.class_token is not None and not self.mean_pooling
        # Not in training: what only the other tokens use would get no gradient, not even zeros.
        for found, _ in self._behind_blocks(image, with_class and not self.training):
            x = found
        if with_class:
            return self.norm(x[:, 0])
        if self.mean_pooling:
            return self.norm(x[:, self.prefix :].mean(1))
        return self.norm(x).mean(1)

    def features(self, image: Float[Tensor, "batch channels *size"]) -> list[FeatureMap]:
        """A map behind each stage, the last one normed. Of clips they are (batch, dim, time,
        height, width), and the stride is that of space."""
        maps: list[FeatureMap] = []
        for number, (x, grid) in enumerate(self._behind_blocks(image)):
            if number in self.taps:
                x = self.norm(x) if number + 1 == len(self.blocks) else x
                placed = x[:, self.prefix :].transpose(1, 2)
                stride = self.feature_info[len(maps)].stride
                maps.append(FeatureMap(placed.unflatten(2, grid[not self.video :]), stride))
        return maps

    def forward(
        self, image: Float[Tensor, "batch channels *size"]
    ) -> Float[Tensor, "batch classes"]:
        x = self.pooled(image)
        if self.head_dropout:
            x = F.dropout(x, self.head_dropout, self.training)
        return self.head(x)

    def probabilities(
        self, image: Float[Tensor, "batch channels *size"]
    ) -> Float[Tensor, "batch classes"]:
        """What the authors' network gives in eval mode and what they average over a video's views:
        softmax, or sigmoid where a clip has several labels."""
        return ACTIVATIONS[self.head_activation](self(image))

    def init_head(self) -> None:
        """As :meth:`init_weights` has it."""
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.constant_(self.head.bias, 0.02)
            with torch.no_grad():
                self.head.weight.mul_(self.head_scale)
                self.head.bias.mul_(self.head_scale)

    def init_weights(self) -> None:
        """As the authors:

        | layer                    | weight                            | bias              |
        |--------------------------|-----------------------------------|-------------------|
        | Linear                   | normal, std 0.02                  | 0.02              |
        | patches, pooling         | normal, std 0.02                  | uniform by fan-in |
        | layer norms              | 1                                 | 0.02              |
        | positions, class token   | normal, std 0.02; sincos: fixed   |                   |
        | relative positions       | normal, std 0.02, or 0            |                   |
        | classifier               | as Linear, times ``head_scale``   | likewise          |

        v2's image networks were published with a code that has biases of 0 instead.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.constant_(module.bias, 0.02)
            elif isinstance(module, nn.Conv2d | nn.Conv3d):
                module.reset_parameters()
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.LayerNorm | HeadNorm):
                nn.init.ones_(module.weight)
                nn.init.constant_(module.bias, 0.02)
            elif isinstance(module, AbsolutePosition):
                module.init_weights()
            elif isinstance(module, PoolingAttention):
                for table in module.tables:
                    if table is not None:
                        nn.init.trunc_normal_(table, std=0.02)
                        if self.relative_zero:
                            nn.init.zeros_(table)
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)
        self.init_head()


def _check(shape: BlockShape, number: int, widen_in_attention: bool, pool_first: bool) -> None:
    """
    Raises:
        PolypatchError: a block that can't be built.
    """
    inner = shape.out if widen_in_attention else shape.dim
    if inner % shape.heads or (pool_first and shape.dim % shape.heads):
        raise PolypatchError(
            f"block {number}: {shape.heads} heads don't divide widths of {shape.dim} and {inner}"
        )
    if shape.queries is not None:
        for kernel, other in zip(shape.queries.kernel, kernel_of(shape.stride)):
            if (kernel - other) % 2:
                raise PolypatchError(
                    f"block {number}: queries pooled by kernel {kernel} don't fit the residual, "
                    f"pooled by {other}; both must be odd or both even"
                )
