"""DuoFormer: attention over the scales of each place, then over the places.

Tang, Zhang, Ho, Knudsen and Tasdizen, *DuoFormer: Leveraging Hierarchical Representations by Local
and Global Attention Vision Transformer* (2025, arXiv 2506.12982; MIDL 2025). A ResNet's maps at
strides 32, 16, 8 and 4 are brought to one width and regrouped: each cell of the coarsest becomes a
window that holds its 1, 4, 16 and 64 cells of the four maps, behind one *scale token*. With S
scales and n windows::

    x = [scale | cells of stride 32, 16, …] + P        (n, 1 + (4^S - 1)/3, dim); P: one for all
    local:   x = x + MSA(LN x), x = x + MLP(LN x)      within each window, ``depth`` times
    global:  z = [class | scale tokens] + Q            (1 + n, dim)
             z = MSA(z)                                ``depth`` times
    logits = Linear(z₀)

The scale token is learned and the same everywhere (``"random"``), or made from all four maps,
brought to the coarsest grid by convolutions and pooling (``"channel"``).

Checked against a third party's refactoring of the authors' code, whose peculiarities are kept where
weights depend on them: the global blocks are attention alone, without norm, residual or MLP; the
final norm exists but the classifier reads the class token without it (``normed_head=True`` puts it
to use); of the four cells at stride 16 the order is down, then right, while it is right, then down
at strides 8 and 4. Its ResNet-18 works with two scales and a learned token only, by a mistake in
its widths; here every combination does.

Sides must be multiples of 32, so that every window has all of its cells. The table Q is
interpolated for other grids than the 7×7 of 224 pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
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
    fresh,
    init_transformer_weights,
    merge_windows,
    pointwise,
    windows_of,
)
from ..nn.arguments import expansion
from ..nn.positions import resample_grid
from .duoformer_resnet import RESNETS, ResNet, ResNetSize, resnet_keys

__all__ = [
    "VARIANTS",
    "ChannelToken",
    "DuoFormer",
    "MultiscaleEncoder",
    "Variant",
    "assemble",
    "build",
    "cells_of_windows",
    "from_official",
    "load_resnet",
    "network",
    "official_config",
    "recognise",
    "to_official",
    "windows_of_cells",
]

SCALE_TOKENS = ("random", "channel")


def windows_of_cells(
    x: Float[Tensor, "batch height width dim"], side: int
) -> Float[Tensor, "batch windows cells dim"]:
    """Cut a map into windows of side × side cells, in the order that the position table has."""
    windows = windows_of(x, (side, side)).unflatten(0, (x.shape[0], -1))
    # Weights depend on it: at side 2 the second cell is the one below the first.
    return windows[:, :, [0, 2, 1, 3]] if side == 2 else windows


def cells_of_windows(
    x: Float[Tensor, "batch windows cells dim"], side: int, grid: tuple[int, int]
) -> Float[Tensor, "batch height width dim"]:
    """Undo :func:`windows_of_cells`; ``grid``: rows and columns of windows."""
    x = x[:, :, [0, 2, 1, 3]] if side == 2 else x
    return merge_windows(x.flatten(0, 1), (side, side), (grid[0] * side, grid[1] * side))


class ScaleBlock(nn.Module):
    """A pre-norm block within each window; (batch · windows, tokens, dim)."""

    def __init__(self, *, dim: int, heads: int, hidden: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim=dim, heads=heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim=dim, hidden=hidden)
        self.drop_path = DropPath(rate=drop_path)

    def forward(self, x: Float[Tensor, "windows tokens dim"]) -> Tensor:
        x = fresh.add(x, self.drop_path(self.attn(self.norm1(x)).x))
        return fresh.add(x, self.drop_path(self.mlp(self.norm2(x))))


class PatchBlock(nn.Module):
    """Attention over the windows, and nothing else."""

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(dim=dim, heads=heads)

    def forward(self, z: Float[Tensor, "batch tokens dim"]) -> Tensor:
        return self.attn(z).x


class MultiscaleEncoder(nn.Module):
    """Local and global attention, on windows that are there already.

    Args:
        scales: 2, 3 or 4: windows of 1 + 5, 21 or 85 tokens.
        grid: rows and columns of windows that the position table is for.
        normed_head: the classifier reads the class token behind the final norm.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        scales: int,
        hidden: int,
        grid: tuple[int, int] = (7, 7),
        drop_path: float = 0.0,
        normed_head: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.normed_head = grid, normed_head
        self.scale_position = nn.Parameter(torch.empty(1, 1, 1 + (4**scales - 1) // 3, dim))
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.class_position = nn.Parameter(torch.empty(1, 1, dim))
        self.position = nn.Parameter(torch.empty(1, *grid, dim))
        self.scale_blocks = nn.ModuleList(
            ScaleBlock(
                dim=dim, heads=heads, hidden=hidden, drop_path=drop_path * k / max(1, depth - 1)
            )
            for k in range(depth)
        )
        self.patch_blocks = nn.ModuleList(PatchBlock(dim=dim, heads=heads) for _ in range(depth))
        # Part of every checkpoint, though only normed_head makes use of it.
        self.norm = nn.LayerNorm(dim, eps=1e-6).requires_grad_(normed_head)

    def init_weights(self) -> None:
        """Linear layers normal, std 0.02, cut; positions, class token normal, std 0.036."""
        init_transformer_weights(self)
        for table in (self.scale_position, self.class_position, self.position):
            nn.init.trunc_normal_(table, std=0.036)
        nn.init.normal_(self.class_token, std=0.036)

    def local(
        self, x: Float[Tensor, "batch windows tokens dim"], through: Any
    ) -> Float[Tensor, "batch windows tokens dim"]:
        """The scale blocks, in every window by itself."""
        batch = x.shape[0]
        x = (x + self.scale_position).flatten(0, 1)
        for block in self.scale_blocks:
            x = through(block, x)
        return x.unflatten(0, (batch, -1))

    def spread(
        self, tokens: Float[Tensor, "batch windows dim"], grid: tuple[int, int], through: Any
    ) -> Float[Tensor, "batch tokens dim"]:
        """The patch blocks on class token and windows."""
        position = self.position if grid == self.grid else resample_grid(self.position, grid)
        z = tokens + position.flatten(1, 2)
        first = (self.class_token + self.class_position).expand(z.shape[0], -1, -1)
        z = torch.cat([first.to(z.dtype), z], dim=1)
        for block in self.patch_blocks:
            z = through(block, z)
        return z

    def forward(self, x: Float[Tensor, "batch windows tokens dim"]) -> Float[Tensor, "batch dim"]:
        """What the classifier reads, for windows of the native grid."""
        x = self.local(x, _plainly)
        return self.read(self.spread(x[:, :, 0], self.grid, _plainly))

    def read(self, z: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        return self.norm(z[:, 0]) if self.normed_head else z[:, 0]


def _plainly(block: nn.Module, *inputs: Tensor) -> Tensor:
    return block(*inputs)


class ChannelToken(nn.Module):
    """A scale token for each window out of all four maps."""

    def __init__(self, *, dims: tuple[int, ...], dim: int) -> None:
        super().__init__()
        first, second = dims[0], dims[1]
        self.first = nn.ModuleList(nn.Conv2d(first, first, 3, 2, 1) for _ in range(2))
        self.second = nn.Conv2d(second, second, 3, 2, 1)
        widths = (sum(dims), dim, dim, dim, dim)
        self.fuse = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b))
            for a, b in pairwise(widths)
        )

    def init_weights(self) -> None:
        """The downsampling convolutions normal by fan-in, the others torch's default."""
        for conv in (*self.first, self.second):
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_normal_(conv.weight)
            nn.init.normal_(conv.bias, std=1e-6)  # type: ignore[arg-type]
        for layer in self.fuse.modules():
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
                layer.reset_parameters()

    def forward(self, maps: list[Tensor]) -> Float[Tensor, "batch windows 1 dim"]:
        first, second, third, fourth = maps
        for conv in self.first:
            first = conv(first)
        pooled = [F.max_pool2d(value, 2) for value in (first, self.second(second), third)]
        x = torch.cat([*pooled, fourth], dim=1)
        for layer in self.fuse:
            x = fresh.relu(layer(x))
        return x.flatten(2).transpose(1, 2)[:, :, None]


class DuoFormer(Backbone):
    """The network: ResNet, windows, local and global attention, classifier.

    Args:
        resnet: sizes of the network in front.
        scales: how many of its maps are used, from the coarsest: 2, 3 or 4.
        scale_token: ``"random"`` or ``"channel"``.
        freeze: the ResNet's weights stay as they are (its norms' statistics don't).
    """

    preprocessing = Preprocessing(mean=(0.5, 0.5, 0.5), std=(1, 1, 1), crop=1.0)
    undecayed = ("position", "class_token")
    input_requirements = InputRequirements(multiple_of=32, minimum=32)

    def __init__(
        self,
        *,
        resnet: ResNetSize,
        dim: int,
        depth: int,
        heads: int,
        scales: int = 4,
        mlp_ratio: float = 4.0,
        scale_token: str = "random",
        grid: tuple[int, int] = (7, 7),
        classes: int = 1000,
        drop_path: float = 0.0,
        normed_head: bool = False,
        freeze: bool = False,
    ) -> None:
        super().__init__()
        if scales not in (2, 3, 4):
            raise PolypatchError(f"a ResNet has 2, 3 or 4 scales to use, got scales={scales}")
        if scale_token not in SCALE_TOKENS:
            hint = suggest(scale_token, SCALE_TOKENS)
            raise PolypatchError(f"there is no scale_token={scale_token!r}{hint}")
        if dim % heads:
            raise PolypatchError(f"dim={dim} does not divide into {heads} heads")
        self.dim, self.scales, self.scale_token = dim, scales, scale_token
        self.size, self.depth, self.heads = resnet, depth, heads
        self.resnet = ResNet(resnet)
        if freeze:
            self.resnet.requires_grad_(False)
        dims = resnet.dims
        # The coarsest first, as the tokens of a window are.
        self.project = nn.ModuleList(Linear(dims[3 - scale], dim) for scale in range(scales))
        self.token: nn.Parameter | None = None
        self.fuse: ChannelToken | None = None
        if scale_token == "random":
            self.token = nn.Parameter(torch.empty(1, 1, 1, dim))
            self.undecayed = (*self.undecayed, "token")
        else:
            self.fuse = ChannelToken(dims=dims, dim=dim)
        self.encoder = MultiscaleEncoder(
            dim=dim,
            depth=depth,
            heads=heads,
            scales=scales,
            hidden=int(dim * mlp_ratio),
            grid=grid,
            drop_path=drop_path,
            normed_head=normed_head,
        )
        self.head: nn.Module = nn.Linear(dim, classes) if classes else nn.Identity()
        strides = tuple(32 >> scale for scale in range(1, scales))
        self.feature_info = tuple(FeatureInfo(dim, s) for s in (*reversed(strides), 32))
        self.channels_last()

    def window_tokens(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch windows tokens dim"]:
        """What enters the encoder: of each window the scale token, then its cells from coarse to
        fine."""
        self.input_requirements.check(image, name="DuoFormer")
        image = image.contiguous(memory_format=torch.channels_last)
        maps = self.resnet(image, self.through)
        parts = []
        for scale, project in enumerate(self.project):
            projected = project(maps[3 - scale].permute(0, 2, 3, 1))
            parts.append(windows_of_cells(projected, 2**scale))
        batch, windows = parts[0].shape[:2]
        if self.fuse is not None:
            token = self.fuse(maps)
        else:
            assert self.token is not None
            token = self.token.to(parts[0].dtype).expand(batch, windows, -1, -1)
        return torch.cat([token, *parts], dim=2)

    def _encoded(self, image: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Tokens behind the local blocks, class token and windows behind the global ones."""
        grid = (image.shape[-2] // 32, image.shape[-1] // 32)
        x = self.encoder.local(self.window_tokens(image), self.through)
        return x, self.encoder.spread(x[:, :, 0], grid, self.through), grid

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        return self.encoder.read(self._encoded(image)[1])

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """The finer scales behind local attention, then the windows behind global attention."""
        x, z, grid = self._encoded(image)
        maps = [FeatureMap(z[:, 1:].transpose(1, 2).unflatten(2, grid), 32)]
        start = 2  # behind the scale token and the single cell of the coarsest map
        for scale in range(1, self.scales):
            cells = x[:, :, start : start + 4**scale]
            dense = cells_of_windows(cells, 2**scale, grid)
            maps.append(FeatureMap(dense.permute(0, 3, 1, 2), 32 >> scale))
            start += 4**scale
        return maps[::-1]

    def init_weights(self) -> None:
        """The refactored code's initialisation.

        | layer                          | weight                        | bias              |
        |--------------------------------|-------------------------------|-------------------|
        | ResNet                         | normal, std sqrt(2 / fan out) |                   |
        | projections                    | normal, std sqrt(2 / fan in)  | normal, std 1e-6  |
        | blocks                         | normal, std 0.02, cut         | 0                 |
        | positions, class, scale token  | normal, std 0.036             |                   |
        | classifier                     | uniform by fan-in             | the same          |
        """
        self.resnet.init_weights()
        for layer in self.project:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)
        if self.token is not None:
            nn.init.normal_(self.token, std=0.036)
        if self.fuse is not None:
            self.fuse.init_weights()
        self.encoder.init_weights()
        self.init_head()

    def init_head(self) -> None:
        """torch's default: uniform by fan-in."""
        if isinstance(self.head, nn.Linear):
            self.head.reset_parameters()


def load_resnet(model: DuoFormer, state: Mapping[str, Tensor]) -> None:
    """Start the network in front from a ResNet's own weights, in torchvision's layout (``conv1``,
    ``bn1``, ``layer1.0.conv1``, …); its classifier is left out. The paper trains from such.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    keys = resnet_keys(
        "",
        stem=("conv1", "bn1"),
        stages={stage: f"layer{stage + 1}" for stage in range(4)},
        bottleneck=model.size.expansion > 1,
    )
    keys.load(model.resnet, state, what="this ResNet")


@dataclass(frozen=True)
class Variant:
    resnet: str
    scales: int
    scale_token: str = "random"
    dim: int = 768
    depth: int = 12
    heads: int = 12
    grid: int = 7


#: the configurations of the code; nano is ours, for demonstrations on a CPU
VARIANTS: dict[str, Variant] = {
    "duoformer-nano": Variant("nano", 4, dim=48, depth=2, heads=4, grid=2),
    "duoformer-r50-s4": Variant("r50", 4),
    "duoformer-r50-s4-channel": Variant("r50", 4, "channel"),
    "duoformer-r50-s3": Variant("r50", 3),
    "duoformer-r50-s3-channel": Variant("r50", 3, "channel"),
    "duoformer-r50-s2": Variant("r50", 2),
    "duoformer-r50-s2-channel": Variant("r50", 2, "channel"),
    "duoformer-r18-s2": Variant("r18", 2),
}


def assemble(
    variant: Variant,
    *,
    classes: int = 1000,
    drop_path: float = 0.0,
    normed_head: bool = False,
    freeze: bool = False,
) -> DuoFormer:
    """Wire a network without filling it."""
    return DuoFormer(
        resnet=RESNETS[variant.resnet],
        dim=variant.dim,
        depth=variant.depth,
        heads=variant.heads,
        scales=variant.scales,
        scale_token=variant.scale_token,
        grid=(variant.grid, variant.grid),
        classes=classes,
        drop_path=drop_path,
        normed_head=normed_head,
        freeze=freeze,
    )


def build(
    variant: str,
    *,
    classes: int = 1000,
    resolution: int | None = None,
    scales: int | None = None,
    scale_token: str | None = None,
    depth: int | None = None,
    drop_path: float = 0.0,
    normed_head: bool = False,
    freeze: bool = False,
) -> DuoFormer:
    """A named network with fresh weights.

    Args:
        resolution: side of the images that the table of window positions is made for; others work.
        scales, scale_token, depth: in place of the variant's own.
        freeze: the ResNet isn't trained, which makes sense once it has weights
            (:func:`load_resnet`); the code's default.
    """
    if depth is not None and depth < 1:
        raise PolypatchError(f"depth counts from 1, got depth={depth}")
    grid = None if resolution is None else max(1, resolution // 32)
    asked = {"scales": scales, "scale_token": scale_token, "depth": depth, "grid": grid}
    changed = replace(VARIANTS[variant], **{k: v for k, v in asked.items() if v is not None})
    model = assemble(
        changed, classes=classes, drop_path=drop_path, normed_head=normed_head, freeze=freeze
    )
    model.init_weights()
    return model


# ---- weights -----------------------------------------------------------------------------------


def encoder_rules(theirs: str, ours: str) -> list[Any]:
    """Of the multi-scale transformer; prefixes end with a dot or are empty."""
    block = {
        "norm1": "norm1", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj", "norm2": "norm2",
        "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    }  # fmt: skip
    return [
        (f"{theirs}pos_embed_for_scale", f"{ours}scale_position"),
        (f"{theirs}cls_token", f"{ours}class_token"),
        *(
            (f"{theirs}scale_blocks.{{i}}.{a}", f"{ours}scale_blocks.{{i}}.{b}")
            for a, b in block.items()
        ),
        (f"{theirs}blocks.{{i}}.attn.qkv", f"{ours}patch_blocks.{{i}}.attn.qkv"),
        (f"{theirs}blocks.{{i}}.attn.proj", f"{ours}patch_blocks.{{i}}.attn.proj"),
        (f"{theirs}fc_norm", f"{ours}norm"),
        # Their one table is split by _split and joined by _joined.
        (f"{theirs}pos_embed.class", f"{ours}class_position"),
        (f"{theirs}pos_embed.grid", f"{ours}position"),
    ]


def keymap(size: ResNetSize, *, scales: int) -> KeyMap:
    """Their names and ours, with the position table in two parts."""
    resnet = resnet_keys(
        "resnet.",
        stem=("resnet_projector.0", "resnet_projector.1"),
        stages={stage: f"resnet_projector.{4 + stage}" for stage in range(4)},
        bottleneck=size.expansion > 1,
    )
    return KeyMap(
        [
            *resnet.rules,
            ("channel_token", "token"),
            ("channel_proj1.conv1", "fuse.first.0"),
            ("channel_proj1.conv2", "fuse.first.1"),
            ("channel_proj2.conv1", "fuse.second"),
            ("channel_proj_all.nConvs.{i}.conv", "fuse.fuse.{i}.0"),
            ("channel_proj_all.nConvs.{i}.norm", "fuse.fuse.{i}.1"),
            *(
                pointwise(f"projection.proj_heads{3 - scale}", f"project.{scale}")
                for scale in range(scales)
            ),
            *encoder_rules("vision_transformer.", "encoder."),
            ("vision_transformer.head", "head"),
        ]
    )


def _split(state: Mapping[str, Tensor], name: str, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Their table (1, 1 + windows, dim) as the class token's row and a grid."""
    state = dict(state)
    table = state.pop(name, None)
    if table is None:
        return state
    if table.ndim != 3 or table.shape[1] != 1 + grid[0] * grid[1]:
        raise PolypatchError(
            f"{name} has shape {tuple(table.shape)}; for {grid[0]}×{grid[1]} windows it has "
            f"{1 + grid[0] * grid[1]} rows"
        )
    return state | {
        f"{name}.class": table[:, :1],
        f"{name}.grid": table[:, 1:].unflatten(1, grid),
    }


def _joined(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    first, grid = state.pop(f"{name}.class"), state.pop(f"{name}.grid")
    return state | {name: torch.cat([first, grid.flatten(1, 2)], dim=1)}


#: what no shape tells
ASSUMED = ("num_heads", "freeze_backbone")

_TABLE = "vision_transformer.pos_embed"


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`network`, None if these are no DuoFormer's."""
    needed = ("resnet_projector.0.weight", "projection.proj_heads3.weight", _TABLE)
    if any(name not in shapes for name in needed) or len(shapes[_TABLE]) != 3:
        return None
    dim = shapes[_TABLE][2]

    def count(pattern: str) -> int:
        found = [int(m[1]) for name in shapes if (m := re.match(pattern, name))]
        return 1 + max(found, default=-1)

    depths = tuple(count(rf"resnet_projector\.{4 + s}\.(\d+)\.") for s in range(4))
    wider = 4 if "resnet_projector.4.0.conv3.weight" in shapes else 1
    width = shapes["resnet_projector.0.weight"][0]
    size = ResNetSize(depths, width, wider)  # type: ignore[arg-type]
    known = [name for name, other in RESNETS.items() if other == size]
    hidden = shapes.get("vision_transformer.scale_blocks.0.mlp.fc1.weight", (4 * dim,))[0]
    return {
        "depth": count(r"vision_transformer\.blocks\.(\d+)\."),
        "embed_dim": dim,
        "proj_dim": dim,
        # 64 channels a head, as all configurations of the code have.
        "num_heads": max(1, dim // 64),
        "num_classes": shapes.get("vision_transformer.head.weight", (0,))[0],
        "num_layers": sum(f"projection.proj_heads{k}.weight" in shapes for k in range(4)),
        "num_patches": shapes[_TABLE][1] - 1,
        "mlp_ratio": expansion((hidden, dim)),
        "backbone": known[0] if known else list(size),
        "scale_token": "random" if "channel_token" in shapes else "channel",
        "freeze_backbone": True,
    }


def network(config: Mapping[str, Any]) -> DuoFormer:
    """An unfilled network by the code's argument names: ``depth``, ``embed_dim`` (768),
    ``num_heads`` (12), ``num_layers`` (4), ``num_patches`` (49), ``mlp_ratio`` (4), ``backbone``
    (``r50``, ``r18``, ``r50_Swav``; or our (depths, width, expansion)), ``scale_token``,
    ``num_classes`` (2), ``freeze_backbone`` (True). ``patch_attn`` changes nothing there either.

    Raises:
        PolypatchError: other backbones, unequal widths, a number of windows that is no square, or
            dropout, which the code has never been trained with.
    """
    dim = config.get("embed_dim", 768)
    if config.get("proj_dim", dim) != dim:
        raise PolypatchError(f"proj_dim={config['proj_dim']} must be embed_dim={dim}")
    name = config.get("backbone", "r50")
    if isinstance(name, str):
        name = "r50" if name == "r50_Swav" else name
        if name not in RESNETS:
            raise PolypatchError(f"there is no backbone {name!r}{suggest(name, RESNETS)}")
        size = RESNETS[name]
    else:
        depths, width, expansion = name
        size = ResNetSize(tuple(depths), width, expansion)
    for word in ("attn_drop_rate", "proj_drop_rate"):
        if config.get(word, 0.0):
            raise PolypatchError(f"{word} is not part of DuoFormer; leave it at 0")
    windows = config.get("num_patches", 49)
    side = round(windows**0.5)
    if side * side != windows:
        raise PolypatchError(f"num_patches={windows} is no square")
    return DuoFormer(
        resnet=size,
        dim=dim,
        depth=config["depth"],
        heads=config.get("num_heads", 12),
        scales=config.get("num_layers", 4),
        mlp_ratio=config.get("mlp_ratio", 4.0),
        scale_token=config.get("scale_token", "random"),
        grid=(side, side),
        classes=config.get("num_classes", 2),
        freeze=config.get("freeze_backbone", True),
    )


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> DuoFormer:
    """The code's state dict in a network of :func:`network`'s configuration, in eval mode.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    model = network(config)
    state = _split(state, _TABLE, model.encoder.grid)
    keymap(model.size, scales=model.scales).load(model, state, what="this DuoFormer")
    return model.eval()


def encoder_from_official(
    config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[MultiscaleEncoder, nn.Linear]:
    """The transformer by itself (the code's ``MultiscaleFormer``) and its classifier.

    Args:
        config: ``depth``, ``scales``, ``num_heads``, ``embed_dim``, ``mlp_ratio``,
            ``num_classes``, ``num_patches``.
    """
    dim = config.get("embed_dim", 768)
    side = round(config.get("num_patches", 49) ** 0.5)
    encoder = MultiscaleEncoder(
        dim=dim,
        depth=config.get("depth", 12),
        heads=config.get("num_heads", 12),
        scales=config.get("scales", 2),
        hidden=int(dim * config.get("mlp_ratio", 4.0)),
        grid=(side, side),
    )
    holder = nn.ModuleDict(
        {"encoder": encoder, "head": nn.Linear(dim, config.get("num_classes", 100))}
    )
    keys = KeyMap([*encoder_rules("", "encoder."), ("head", "head")])
    keys.load(holder, _split(state, "pos_embed", (side, side)), what="this MultiscaleFormer")
    holder.eval()
    return encoder, holder["head"]  # type: ignore[return-value]


def to_official(model: DuoFormer) -> dict[str, Tensor]:
    """The state dict under the code's keys."""
    state = keymap(model.size, scales=model.scales).to_theirs(model.state_dict())
    return _joined(state, _TABLE)


def official_config(model: DuoFormer) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network."""
    known = [name for name, other in RESNETS.items() if other == model.size]
    encoder = model.encoder
    first = encoder.scale_blocks[0]
    assert isinstance(first, ScaleBlock)
    return {
        "depth": model.depth,
        "embed_dim": model.dim,
        "proj_dim": model.dim,
        "num_heads": model.heads,
        "num_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "num_layers": model.scales,
        "num_patches": encoder.grid[0] * encoder.grid[1],
        "mlp_ratio": expansion((first.mlp.fc1.out_features, model.dim)),
        "backbone": known[0] if known else list(model.size),
        "scale_token": model.scale_token,
        "freeze_backbone": not next(model.resnet.parameters()).requires_grad,
    }
