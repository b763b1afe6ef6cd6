"""MetaFormer: the transformer block with any token mixer; PoolFormer, where the mixer is a mean.

Yu et al., *MetaFormer Is Actually What You Need for Vision* (CVPR 2022, arXiv 2111.11418). The
paper's argument is that the block counts, not how tokens are mixed in it: mean pooling, without a
parameter, is enough. With maps x of (height, width, dim) and a gain s per channel::

    block        y = x + s₁ · Mixer(Norm(x));   z = y + s₂ · W₂ GELU(W₁ Norm(y))       (eq. 2 and 3)
    Pooling      Mixer(n) = mean of the 3×3 neighbours within the map − n                  (eq. 4)
    Norm         over channels and places of a sample together, gain and shift per channel  (MLN)
    between      Conv(kernel 3, stride 2, padding 1) in front of stages 2 to 4, nothing else
    stem, head   Conv(kernel 7, stride 4, padding 2);  W · mean over places of Norm(x)

:class:`MetaFormerBlock` takes any module from maps to maps as its mixer; those of the paper's
ablations and hybrids (table 5) are in :mod:`.metaformer_mixers`. The letters i, p, a, f, r, d
stand for identity, pooling, attention, Spatial-FC, a frozen random matrix and a depthwise
convolution, four letters for a network (``pppa``: attention in the last stage).

Traps: the stem's padding is 2, not 3; the mean at the border is over fewer places
(``count_include_pad=False``), and n is subtracted because the block adds x. A mean leaves the
norm's shift as it is, so that the subtraction takes it away again: ``norm1.bias`` of a PoolFormer
does nothing. Hybrids with attention have layer norm per place (the authors' ``LayerNormChannel``),
all others MLN; hybrids with attention have a position table in front of their first stage of
attention, which other sizes of images read resampled. Spatial-FC has one matrix for all places,
which fixes the size of images. s starts at 1e-5, in the deepest three at 1e-6.

Dense heads read the maps of all stages (:meth:`MetaFormer.features`). The authors' dense networks
(``…-feat``) have a norm of their own for each of these maps instead of the last norm and the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

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
    KeyMap,
    LayerScale,
    Linear,
    Preprocessing,
    Rule,
    fresh,
    in_pieces,
    pointwise,
)
from ..nn.arguments import expansion
from ..nn.positions import resample_grid
from .metaformer_mixers import (
    MIXER_NAMES,
    NORM_NAMES,
    BatchNorm,
    Depthwise,
    Pooling,
    RandomMixing,
    SampleNorm,
    SelfAttention,
    SpatialFc,
    entry_of,
    mixer_of,
    norm_of,
    position_of,
    recognised_mixer,
)

__all__ = [
    "ASSUMED",
    "MIXERS",
    "VARIANTS",
    "BatchNorm",
    "Depthwise",
    "MetaFormer",
    "MetaFormerBlock",
    "Pooling",
    "RandomMixing",
    "SampleNorm",
    "SelfAttention",
    "SpatialFc",
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

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": fresh.gelu,
    "relu": fresh.relu,
    "silu": fresh.silu,
}


#: token mixers by letter
MIXERS: dict[str, type[nn.Module]] = {
    "i": nn.Identity,
    "p": Pooling,
    "a": SelfAttention,
    "f": SpatialFc,
    "r": RandomMixing,
    "d": Depthwise,
}
#: norms of maps; "layer" norms each place by itself
NORMS: dict[str, type[nn.Module]] = {
    "group": SampleNorm,
    "layer": nn.LayerNorm,
    "batch": BatchNorm,
}


# ---- the network ---------------------------------------------------------------------------------

#: kernel, stride and padding of a convolution
Cut = tuple[int, int, int]

STEM: Cut = (7, 4, 2)
DOWN: Cut = (3, 2, 1)


def map_sizes(height: int, width: int, cuts: Sequence[Cut | None]) -> list[tuple[int, int]]:
    """Rows and columns of each stage's map, from the image's."""
    found: list[tuple[int, int]] = []
    for cut in cuts:
        if cut is not None:
            kernel, stride, padding = cut
            height, width = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
        found.append((height, width))
    return found


class MetaFormerBlock(nn.Module):
    """x + s₁ mixer(norm(x)), then + s₂ mlp(norm(x)); (batch, height, width, dim) in and out.

    Args:
        mixer: any module from maps to maps of the same shape. What it gives must be a tensor of
            its own, or its input: without gradients the sum takes that memory.
        norm: makes the norm of a width; it must give a new tensor, too.
        hidden: of the MLP, default 4 · dim.
        activation: of a tensor whose memory it may take, such as those of ``nn.fresh``.
        layer_scale: initial s₁ and s₂; None: there are none.
        dropout: behind both layers of the MLP.
    """

    def __init__(
        self,
        *,
        dim: int,
        mixer: nn.Module,
        norm: Callable[[int], nn.Module] = SampleNorm,
        hidden: int | None = None,
        activation: Callable[[Tensor], Tensor] = fresh.gelu,
        layer_scale: float | None = 1e-5,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        self.norm1, self.mixer, self.norm2 = norm(dim), mixer, norm(dim)
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)
        scaled = layer_scale is not None
        self.scale1 = LayerScale(dim=dim, init=layer_scale) if scaled else None
        self.scale2 = LayerScale(dim=dim, init=layer_scale) if scaled else None
        self.activation, self.dropout = activation, dropout
        self.drop_path = DropPath(rate=drop_path)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        x = self._add(x, self.mixer(self.norm1(x)), self.scale1)
        hidden = self.fc1(self.norm2(x), self.activation)
        update = self.fc2(F.dropout(hidden, self.dropout, self.training))
        return self._add(x, F.dropout(update, self.dropout, self.training), self.scale2)

    def _add(self, x: Tensor, update: Tensor, scale: LayerScale | None) -> Tensor:
        update = self.drop_path(update)
        return fresh.add(x, update) if scale is None else fresh.add_scaled(x, update, scale.gamma)


class Stage(nn.Module):
    """Patches of the map before (or the map as it is), positions if any, blocks, and the norm of a
    dense network's map."""

    def __init__(
        self,
        *,
        patches: nn.Module,
        position: tuple[int, int] | None,
        dim: int,
        blocks: list[MetaFormerBlock],
        norm: nn.Module,
    ) -> None:
        super().__init__()
        self.patches = patches
        self.position = nn.Parameter(torch.zeros(1, *position, dim)) if position else None
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm


class MetaFormer(Backbone):
    """The network of figure 2, with a mixer of one's own for each stage.

    Args:
        dims, depths, ratios: per stage, C and L of table 1 and the MLP's widening.
        mixers: per stage, makes the mixer of a block, called as ``mixer(dim=…)``.
        norm: makes the norm of a width; see :data:`NORMS`.
        activation: ``"gelu"``, ``"relu"`` or ``"silu"``.
        positions: per stage, the grid of a position table in front of it, or None.
        downsamples: per transition, whether there is a convolution even if the width stays.
        stem, down: kernel, stride and padding.
        layer_scale: initial s; None: there are none.
        dense: stages whose maps have norms of their own, in place of the last norm: the authors'
            dense networks; they leave out the first for RetinaNet.
        dropout: in the MLPs. ``drop_path``: of the last block; rises linearly from 0 at the first.

    Raises:
        PolypatchError: lists of unequal lengths, or an unknown activation.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        mixers: Sequence[Callable[..., nn.Module]],
        ratios: Sequence[float] = (4, 4, 4, 4),
        norm: Callable[[int], nn.Module] = SampleNorm,
        activation: str = "gelu",
        positions: Sequence[tuple[int, int] | None] | None = None,
        downsamples: Sequence[bool] | None = None,
        stem: Cut = STEM,
        down: Cut = DOWN,
        layer_scale: float | None = 1e-5,
        dense: Sequence[int] | None = None,
        classes: int = 1000,
        channels: int = 3,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        count = len(dims)
        positions = [None] * count if positions is None else positions
        downsamples = [True] * (count - 1) if downsamples is None else downsamples[: count - 1]
        lists = {"dims": dims, "depths": depths, "mixers": mixers, "ratios": ratios,
                 "positions": positions, "downsamples": [*downsamples, True]}  # fmt: skip
        if len({len(values) for values in lists.values()}) > 1:
            given = ", ".join(f"{name} {len(values)}" for name, values in lists.items())
            raise PolypatchError(f"one value of each for a stage; got {given}")
        if activation not in ACTIVATIONS:
            hint = suggest(activation, ACTIVATIONS, kind="activations")
            raise PolypatchError(f"there is no activation {activation!r}{hint}")
        self.dims, self.depths, self.ratios = tuple(dims), tuple(depths), tuple(ratios)
        self.activation, self.layer_scale, self.channels = activation, layer_scale, channels
        self.dense = None if dense is None else tuple(dense)
        self.dropout, self.drop_path = dropout, drop_path
        self.positions, self.stem, self.down = tuple(positions), stem, down
        #: in front of each stage; None: the map goes on as it is
        self.cuts: tuple[Cut | None, ...] = (stem, *(
            down if asked or dims[i] != dims[i + 1] else None
            for i, asked in enumerate(downsamples)
        ))  # fmt: skip

        def patches(i: int) -> nn.Module:
            before, cut = dims[i - 1] if i else channels, self.cuts[i]
            return nn.Conv2d(before, dims[i], *cut) if cut else nn.Identity()

        def block(i: int, number: int) -> MetaFormerBlock:
            return MetaFormerBlock(
                dim=dims[i],
                mixer=mixers[i](dim=dims[i]),
                norm=norm,
                hidden=int(dims[i] * ratios[i]),
                activation=ACTIVATIONS[activation],
                layer_scale=layer_scale,
                dropout=dropout,
                drop_path=drop_path * number / max(1, sum(depths) - 1),
            )

        self.stages = nn.ModuleList(
            Stage(
                patches=patches(i),
                position=positions[i],
                dim=dims[i],
                blocks=[block(i, sum(depths[:i]) + k) for k in range(depths[i])],
                norm=norm(dims[i]) if i in (self.dense or ()) else nn.Identity(),
            )
            for i in range(count)
        )
        self.dim = dims[-1]
        self.norm = norm(self.dim) if self.dense is None else nn.Identity()
        self.head: nn.Module = nn.Linear(self.dim, classes) if classes else nn.Identity()
        strides = [math.prod(cut[1] for cut in self.cuts[: i + 1] if cut) for i in range(count)]
        self.feature_info = tuple(FeatureInfo(d, s) for d, s in zip(dims, strides))
        # The first stage whose mixer has a grid decides the size of images.
        grids = [getattr(block.mixer, "grid", None) for block in self.first_blocks]
        exact = [(g[0] * s, g[1] * s) for g, s in zip(grids, strides) if g]
        self.input_requirements = InputRequirements(
            minimum=max(1, stem[0] - 2 * stem[2]), exact=exact[0] if exact else None
        )
        self.grids = tuple(grids)
        self.channels_last()

    @property
    def first_blocks(self) -> list[MetaFormerBlock]:
        """Of each stage; those behind it are alike."""
        return [stage.blocks[0] for stage in self.stages]  # type: ignore[index, misc, union-attr]

    def _maps(self, image: Tensor) -> Iterator[Tensor]:
        """The map of each stage, (batch, height, width, dim), without a norm."""
        sizes = map_sizes(image.shape[2], image.shape[3], self.cuts)
        # Several sizes of images give the grid that a mixer wants, not the exact one alone.
        fits = all(g is None or math.prod(g) == math.prod(s) for g, s in zip(self.grids, sizes))
        if not any(self.grids) or not fits:
            self.input_requirements.check(image, name="this MetaFormer")
        x = image
        for stage, dim, ratio, size in zip(self.stages, self.dims, self.ratios, sizes):
            run = partial(self._run, stage)  # type: ignore[arg-type]
            widest = int(dim * ratio) * size[0] * size[1]
            # Batch norm in training needs the whole batch, even without gradients.
            x = run(x) if self.training else in_pieces(run, x, widest=widest)
            yield x
            x = x.permute(0, 3, 1, 2)

    def _run(
        self, stage: Stage, map: Float[Tensor, "batch channels tall wide"]
    ) -> Float[Tensor, "batch height width dim"]:
        x = stage.patches(map).permute(0, 2, 3, 1)
        if stage.position is not None:
            x = x + resample_grid(stage.position, (x.shape[1], x.shape[2]))
        for block in stage.blocks:
            x = self.through(block, x)
        return x

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        for last in self._maps(image):
            x = last
        return self.norm(self.stages[-1].norm(x)).mean((1, 2))  # type: ignore[operator]

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """The maps of all stages. Each is normed in a dense network; otherwise the last one is, by
        the norm in front of the head."""
        norms = [stage.norm for stage in self.stages]
        maps = [norm(x) for norm, x in zip(norms, self._maps(image))]  # type: ignore[operator]
        maps[-1] = self.norm(maps[-1])
        return [
            FeatureMap(x.permute(0, 3, 1, 2), info.stride)
            for x, info in zip(maps, self.feature_info)
        ]

    def init_weights(self) -> None:
        """As the authors have it:

        | layer          | weight                                          | bias |
        |----------------|-------------------------------------------------|------|
        | Linear         | normal, std 0.02 (MLP, attention, Spatial-FC)   | 0    |
        | Conv2d         | torch's default, uniform by fan-in              | same |
        | norms          | 1, statistics 0 and 1                           | 0    |
        | layer scale    | ``layer_scale``                                 |      |
        | position table | 0                                               |      |
        | random matrix  | softmax of uniform numbers                      |      |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.GroupNorm | nn.LayerNorm | nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, module.init)
            elif isinstance(module, RandomMixing):
                module.init_weights()
            elif isinstance(module, Stage) and module.position is not None:
                nn.init.zeros_(module.position)


@dataclass(frozen=True)
class Variant:
    """``mixers``: a letter of :data:`MIXERS` for each stage. ``norm``: of :data:`NORMS`.
    ``pool``: size of the means. ``drop_path`` and ``crop`` are of the authors' recipes."""

    depths: tuple[int, ...]
    dims: tuple[int, ...] = (64, 128, 320, 512)
    mixers: str = "pppp"
    norm: str = "group"
    activation: str = "gelu"
    pool: int = 3
    layer_scale: float | None = 1e-5
    dense: bool = False
    drop_path: float = 0.1
    crop: float = 0.9
    resolution: int = 224


_S12, _M = (2, 2, 6, 2), (96, 192, 384, 768)
_POOLFORMERS: dict[str, Variant] = {
    "metaformer-poolformer-s12": Variant(_S12),
    "metaformer-poolformer-s24": Variant((4, 4, 12, 4)),
    "metaformer-poolformer-s36": Variant((6, 6, 18, 6), layer_scale=1e-6, drop_path=0.2),
    "metaformer-poolformer-m36": Variant(
        (6, 6, 18, 6), _M, layer_scale=1e-6, drop_path=0.3, crop=0.95
    ),
    "metaformer-poolformer-m48": Variant(
        (8, 8, 24, 8), _M, layer_scale=1e-6, drop_path=0.4, crop=0.95
    ),
}
#: tables 1 and 5 and the authors' README; nano is ours, for demonstrations on a CPU
VARIANTS: dict[str, Variant] = {
    "metaformer-nano": Variant(
        (1, 1, 2, 1), (32, 64, 128, 192), layer_scale=1.0, drop_path=0.0, resolution=32
    ),
    **_POOLFORMERS,
    **{f"{name}-feat": replace(variant, dense=True) for name, variant in _POOLFORMERS.items()},
    "metaformer-id-s12": Variant(_S12, mixers="iiii"),
    "metaformer-pppa-s12-224": Variant(_S12, mixers="pppa", norm="layer", crop=0.95),
    "metaformer-ppaa-s12-224": Variant(_S12, mixers="ppaa", norm="layer", crop=0.95),
    "metaformer-pppf-s12-224": Variant(_S12, mixers="pppf"),
    "metaformer-ppff-s12-224": Variant(_S12, mixers="ppff", crop=0.95),
}


def assemble(
    variant: Variant,
    *,
    classes: int = 1000,
    channels: int = 3,
    dropout: float = 0.0,
) -> MetaFormer:
    """Wire a network without filling it; grids are those of the variant's resolution."""
    unknown = sorted(set(variant.mixers) - set(MIXERS))
    if unknown or len(variant.mixers) != len(variant.depths):
        raise PolypatchError(
            f"mixers are {len(variant.depths)} letters of {', '.join(MIXERS)}, one for a stage, "
            f"such as pppa; got {variant.mixers!r}"
        )
    if variant.norm not in NORMS:
        hint = suggest(variant.norm, NORMS, kind="norms")
        raise PolypatchError(f"there is no norm {variant.norm!r}{hint}")
    cuts = (STEM, *(DOWN,) * (len(variant.depths) - 1))
    grids = map_sizes(variant.resolution, variant.resolution, cuts)
    first = variant.mixers.find("a")

    def mixer(letter: str, grid: tuple[int, int]) -> Callable[..., nn.Module]:
        if letter == "p":
            return partial(Pooling, size=variant.pool)
        return partial(MIXERS[letter], grid=grid) if letter in "fr" else MIXERS[letter]

    model = MetaFormer(
        dims=variant.dims,
        depths=variant.depths,
        mixers=[mixer(letter, grid) for letter, grid in zip(variant.mixers, grids)],
        norm=NORMS[variant.norm],
        activation=variant.activation,
        positions=[grid if i == first else None for i, grid in enumerate(grids)],
        layer_scale=variant.layer_scale,
        dense=range(len(variant.depths)) if variant.dense else None,
        classes=classes,
        channels=channels,
        dropout=dropout,
        drop_path=variant.drop_path,
    )
    model.preprocessing = Preprocessing(resolution=variant.resolution, crop=variant.crop)
    return model


def build(
    variant: str,
    *,
    classes: int = 1000,
    resolution: int | None = None,
    channels: int = 3,
    mixers: str | None = None,
    norm: str | None = None,
    activation: str | None = None,
    pool: int | None = None,
    layer_scale: float | None = None,
    drop_path: float | None = None,
    dropout: float = 0.0,
) -> MetaFormer:
    """A named network with fresh weights.

    Args:
        resolution: side of the images that it is made for (default: the variant's). It decides the
            grid of Spatial-FC, random mixing and positions; only the first two need it afterwards.
        mixers: four letters, one for a stage: i identity, p pooling, a attention, f Spatial-FC,
            r frozen random matrix, d depthwise convolution.
        norm: ``group``, ``layer`` or ``batch``. ``activation``: ``gelu``, ``relu`` or ``silu``.
        pool: size of the means. ``layer_scale``: initial s, 0 for none.
        drop_path: default: that of the authors' recipe.
    """
    asked = {"resolution": resolution, "mixers": mixers, "norm": norm, "activation": activation,
             "pool": pool, "layer_scale": layer_scale, "drop_path": drop_path}  # fmt: skip
    changed = replace(VARIANTS[variant], **{k: v for k, v in asked.items() if v is not None})
    if layer_scale == 0:
        changed = replace(changed, layer_scale=None)
    model = assemble(changed, classes=classes, channels=channels, dropout=dropout)
    model.init_weights()
    return model


# ---- authors' weights --------------------------------------------------------------------------


def keymap(positions: Sequence[bool], downsamples: Sequence[bool]) -> KeyMap:
    """The authors number position tables, stages and convolutions in one list, as they come.

    Args:
        positions: for each stage, whether it has a position table.
        downsamples: for each transition, whether it has a convolution.
    """
    rules: list[Rule | tuple[str, str]] = [
        ("patch_embed.proj", "stages.0.patches"),
        ("norm", "norm"),
        ("head", "head"),
    ]
    place = 0
    for i, position in enumerate(positions):
        stage = f"stages.{i}"
        if i and downsamples[i - 1]:
            rules.append((f"network.{place}.proj", f"{stage}.patches"))
            place += 1
        if position:
            rules.append(
                Rule(
                    (f"network.{place}.pos_embed",),
                    f"{stage}.position",
                    to_ours=lambda table: table.permute(0, 2, 3, 1),
                    to_theirs=lambda table: table.permute(0, 3, 1, 2),
                )
            )
            place += 1
        theirs, ours = f"network.{place}.{{j}}", f"{stage}.blocks.{{j}}"
        place += 1
        rules += [
            (f"{theirs}.norm1", f"{ours}.norm1"),
            (f"{theirs}.norm2", f"{ours}.norm2"),
            pointwise(f"{theirs}.mlp.fc1", f"{ours}.fc1"),
            pointwise(f"{theirs}.mlp.fc2", f"{ours}.fc2"),
            (f"{theirs}.layer_scale_1", f"{ours}.scale1.gamma"),
            (f"{theirs}.layer_scale_2", f"{ours}.scale2.gamma"),
            (f"{theirs}.token_mixer.qkv", f"{ours}.mixer.attention.qkv"),
            (f"{theirs}.token_mixer.proj", f"{ours}.mixer.attention.proj"),
            (f"{theirs}.token_mixer.fc", f"{ours}.mixer.fc"),
            (f"{theirs}.token_mixer.random_matrix", f"{ours}.mixer.matrix"),
            (f"{theirs}.token_mixer", f"{ours}.mixer.conv"),
            (f"norm{2 * i}", f"{stage}.norm"),
        ]
    return KeyMap(rules)


def _keymap_of(model: MetaFormer) -> KeyMap:
    return keymap(
        [stage.position is not None for stage in model.stages],  # type: ignore[union-attr]
        [cut is not None for cut in model.cuts[1:]],
    )


#: what no shape tells
ASSUMED = ("class", "token_mixers", "pool_size", "norm_layer", "act_layer", "in_stride", "in_pad",
           "down_stride", "down_pad")  # fmt: skip


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`from_official` from names and shapes, None if these are no
    MetaFormer's. Stages without mixing weights are taken for pooling (identity looks the same);
    norms are per place where there is attention, per sample elsewhere, as published; heads have
    32 channels."""
    stem = shapes.get("patch_embed.proj.weight", ())
    if len(stem) != 4:
        return None
    dims: list[int] = []
    depths: list[int] = []
    ratios: list[float] = []
    downsamples: list[bool] = []
    mixers: list[Any] = []
    positions: list[list[int] | None] = []
    position: list[int] | None = None
    place, cut, down = 0, False, 3
    while True:
        prefix = f"network.{place}."
        hidden = shapes.get(f"{prefix}0.mlp.fc1.weight", ())
        if len(hidden) == 4:
            if dims:
                downsamples.append(cut)
            dims.append(hidden[1])
            ratios.append(expansion((hidden[0], hidden[1])))
            depths.append(len({name.split(".")[2] for name in shapes if name.startswith(prefix)}))
            mixers.append(recognised_mixer(shapes, f"{prefix}0.token_mixer.", hidden[1]))
            positions.append(position)
            cut, position = False, None
        elif f"{prefix}pos_embed" in shapes:
            position = list(shapes[f"{prefix}pos_embed"][2:])
        elif f"{prefix}proj.weight" in shapes:
            cut, down = True, shapes[f"{prefix}proj.weight"][-1]
        else:
            break
        place += 1
    if not dims or not any(name.endswith(".norm1.weight") for name in shapes):
        return None
    named = {m if isinstance(m, str) else m["type"] for m in mixers}
    found: dict[str, Any] = {
        "layers": depths,
        "embed_dims": dims,
        "mlp_ratios": ratios,
        "downsamples": [*downsamples, True],
        "in_chans": stem[1],
        "num_classes": shapes.get("head.weight", (0,))[0],
        "in_patch_size": stem[2],
        "in_stride": 4,
        "in_pad": 2,
        "down_patch_size": down,
        "down_stride": 2,
        "down_pad": 1,
        "use_layer_scale": any(name.endswith(".layer_scale_1") for name in shapes),
        "act_layer": "GELU",
    }
    batch = any(name.endswith(".norm1.running_mean") for name in shapes)
    place_norm = "LayerNormChannel" if "Attention" in named else "GroupNorm"
    found["norm_layer"] = "BatchNorm2d" if batch else place_norm
    dense = "norm.weight" not in shapes
    found |= {"fork_feat": dense, "fork_last3": dense and "norm0.weight" not in shapes}
    if named == {"Pooling"} and not any(positions):
        return found | {"class": "PoolFormer", "pool_size": 3}
    return found | {"class": "MetaFormer", "token_mixers": mixers, "add_pos_embs": positions}


#: arguments of the authors' two classes and their defaults, and ours: ``in_chans`` (theirs is
#: always 3) and ``fork_last3`` (there an environment variable)
_DEFAULTS: dict[str, Any] = {
    "layers": None, "embed_dims": None, "mlp_ratios": None, "downsamples": None, "pool_size": 3,
    "token_mixers": None, "add_pos_embs": None, "norm_layer": None, "act_layer": "GELU",
    "num_classes": 1000, "in_patch_size": 7, "in_stride": 4, "in_pad": 2, "down_patch_size": 3,
    "down_stride": 2, "down_pad": 1, "drop_rate": 0.0, "drop_path_rate": 0.0,
    "use_layer_scale": True, "layer_scale_init_value": 1e-5, "fork_feat": False, "init_cfg": None,
    "pretrained": None, "in_chans": 3, "fork_last3": False,
}  # fmt: skip
#: words of a configuration that say where it is from
_LABELS = ("class", "code", "layout")


def network(config: Mapping[str, Any]) -> MetaFormer:
    """An unfilled network by the argument names of the authors' PoolFormer and MetaFormer; which
    of the two is told by ``class``, else by ``token_mixers``, and decides the default norm.

    Classes are written as words: ``norm_layer`` GroupNorm, LayerNormChannel or BatchNorm2d, or
    one with ``(eps=…)``; ``act_layer`` GELU, ReLU or SiLU; ``token_mixers`` Identity, Pooling,
    Attention, SpatialFc, RandomMixing or Conv2d, or a dict with this as its ``type`` beside
    arguments; ``add_pos_embs`` the ``spatial_shape`` or None. ``in_chans`` and ``fork_last3`` (no
    norm for the first map of ``fork_feat``) are ours. Names that begin with _ aren't read.

    Raises:
        PolypatchError: an unknown argument or class, or weights to be loaded meanwhile.
    """
    for word in config:
        if word not in _DEFAULTS and word not in _LABELS and not word.startswith("_"):
            raise PolypatchError(
                f"a MetaFormer has no argument {word!r}{suggest(word, _DEFAULTS, kind='arguments')}"
            )
    got = {**_DEFAULTS, **config}
    if got["pretrained"] or got["init_cfg"]:
        raise PolypatchError("load a checkpoint with polypatch.load instead of pretrained=")
    stages = len(got["layers"])
    mixed = config.get("class", "MetaFormer" if got["token_mixers"] else "PoolFormer")
    if mixed == "PoolFormer":
        mixers: list[Callable[..., nn.Module]] = [partial(Pooling, size=got["pool_size"])] * stages
        positions: list[Any] = [None] * stages
    else:
        mixers = [mixer_of(entry) for entry in got["token_mixers"] or ["Identity"] * stages]
        positions = [position_of(entry) for entry in got["add_pos_embs"] or [None] * stages]
    dense = tuple(range(1 if got["fork_last3"] else 0, stages)) if got["fork_feat"] else None
    usual = "GroupNorm" if mixed == "PoolFormer" else "LayerNormChannel"
    model = MetaFormer(
        dims=got["embed_dims"],
        depths=got["layers"],
        mixers=mixers,
        ratios=got["mlp_ratios"],
        norm=norm_of(got["norm_layer"] or usual),
        activation=str(got["act_layer"]).removeprefix("nn.").lower(),
        positions=positions,
        downsamples=got["downsamples"],
        stem=(got["in_patch_size"], got["in_stride"], got["in_pad"]),
        down=(got["down_patch_size"], got["down_stride"], got["down_pad"]),
        layer_scale=got["layer_scale_init_value"] if got["use_layer_scale"] else None,
        dense=dense,
        classes=0 if got["fork_feat"] else got["num_classes"],
        channels=got["in_chans"],
        dropout=got["drop_rate"],
        drop_path=got["drop_path_rate"],
    )
    letters = {kind: letter for letter, kind in MIXERS.items()}
    word = "".join(letters[type(block.mixer)] for block in model.first_blocks)
    for variant in VARIANTS.values():
        if (model.dims, model.depths, word) == (variant.dims, variant.depths, variant.mixers):
            model.preprocessing = Preprocessing(variant.resolution, crop=variant.crop)
    return model


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> MetaFormer:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    model = network(config)
    if model.dense is not None and "head.weight" in state:  # theirs have none, ours may
        model.reset_head(len(state["head.weight"]))
    _keymap_of(model).load(model, state, what="this MetaFormer")
    return model.eval()


def to_official(model: MetaFormer) -> dict[str, Tensor]:
    """The state dict under the authors' keys.

    Raises:
        PolypatchError: weights of a mixer that has no name there.
    """
    return _keymap_of(model).to_theirs(model.state_dict())


def official_config(model: MetaFormer) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network.

    Raises:
        PolypatchError: a mixer or norm that has no name there.
    """
    mixers = [entry_of(block.mixer, MIXER_NAMES) for block in model.first_blocks]
    norms = {name: (kind, {"eps": "eps"}) for name, kind in NORM_NAMES.items()}
    norm = entry_of(model.first_blocks[0].norm1, norms)
    config = {
        "layers": list(model.depths),
        "embed_dims": list(model.dims),
        "mlp_ratios": list(model.ratios),
        "downsamples": [*(cut is not None for cut in model.cuts[1:]), True],
        "norm_layer": f"{norm['type']}(eps={norm['eps']:g})",
        "act_layer": {"gelu": "GELU", "relu": "ReLU", "silu": "SiLU"}[model.activation],
        "in_chans": model.channels,
        "num_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "drop_rate": model.dropout,
        "drop_path_rate": model.drop_path,
        "use_layer_scale": model.layer_scale is not None,
        "layer_scale_init_value": 1e-5 if model.layer_scale is None else model.layer_scale,
    }
    for word, cut in (("in", model.stem), ("down", model.down)):
        config |= zip((f"{word}_patch_size", f"{word}_stride", f"{word}_pad"), cut)
    config |= {
        "fork_feat": model.dense is not None,
        "fork_last3": model.dense is not None and 0 not in model.dense,
    }
    first = mixers[0]
    if first["type"] == "Pooling" and mixers == [first] * len(mixers) and not any(model.positions):
        return config | {"class": "PoolFormer", "pool_size": first["pool_size"]}
    return config | {
        "class": "MetaFormer",
        "token_mixers": mixers,
        "add_pos_embs": [grid and list(grid) for grid in model.positions],
    }
