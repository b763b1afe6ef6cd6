"""ElasticViT: a ViT for patches of any place, size and number (Pardyl, Kurzejamski, Olszewski,
Trzciński and Zieliński, WACV 2025, arXiv 2309.13353).

Patches are square crops from anywhere, resized to the embedding's size; tokens carry a sine-cosine
code of both corners of their box, and training shows random crops and mixes tokens of two images.

**Scale-aware position code.** A box (y0, x0, y1, x1) in native patches gets a quarter of the
channels for each corner coordinate, in this order::

    code(c) = [sin(c ω_0) … sin(c ω_{n-1}) | cos(c ω_0) … cos(c ω_{n-1})],  n = D / 8,
    ω_i = 10000^(-i/n)

A larger crop at the same place differs in y1, x1 only. The class token has no code. Other modes:
``"corner"`` (y0, x0 alone), ``"quantised"`` (a learned table read at the rounded corner),
``"interpolated"`` (a learned table resized to the number of patches; boxes are ignored).

**PatchMix.** λ ~ Beta(1, 1), p = ⌊λN⌋: tokens p … N-1 of every image, with their boxes, are those
of the image from the other end of the batch, and the targets are mixed with λ = p / N. On a raster
grid this replaces the lower rows; ``shuffle`` permutes the tokens of every image first.

**Training** (published: 196 crops of 16 to 47 px for 30 % of the images, the grid for 70 %): draws
come from a seed that :class:`ElasticHook` takes from the step's generator; without a hook, from
torch's global one, and nothing is mixed. Drawing is done in numpy, so ``torch.compile`` gives one
graph of the network in evaluation but breaks it in training; draw and cut elsewhere and call
:func:`classify` to compile that.

**Paper and code.** The original repository is not public in the form that trained the checkpoints;
facts are from copies of its files in later projects. In those the position code divides pixels by
a literal 16, whatever the patch (here: ``unit``, the host's patch by default, 16 for the authors'
weights); the learned table is a parameter even where the sine-cosine code is used, and counted
(here it is kept, frozen, in the complete networks); drop path has one rate in all blocks; the
quantised index is clipped as a whole, so a column beyond the table reads from the next row. That
PatchMix takes the tail without shuffling is known from a later project of the first author only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..hosts.hooks import TrainingHook
from ..hosts.layouts import TIMM, rename
from ..hosts.vit import SIZES, Size, ViT, assemble_vit
from ..nn import DropPath, GridPatching, LearnedPosition, Position, load_exactly
from ..nn.arguments import expansion
from ..nn.positions import sincos
from ..tokens import Tokens
from .elastic_sampling import GridSampler, MixedSampler, RandomSampler, Sampler, crop, grid_boxes

__all__ = [
    "POSITIONS",
    "VARIANTS",
    "ElasticHook",
    "ElasticPatching",
    "ElasticPosition",
    "build",
    "classify",
    "from_official",
    "patch_mix",
    "plug",
    "position_code",
    "recognise",
]

POSITIONS = ("scale", "corner", "quantised", "interpolated")


# ---- positions -----------------------------------------------------------------------------------


def position_code(
    boxes: Float[Tensor, "*batch 4"] | Int64[Tensor, "*batch 4"],
    dim: int,
    *,
    unit: float = 16.0,
    scale_aware: bool = True,
) -> Float[Tensor, "*batch dim"]:
    """Sine-cosine code of boxes (y0, x0, y1, x1) in pixels; without ``scale_aware`` of (y0, x0)."""
    corners = boxes.float() / unit
    if not scale_aware:
        corners = corners[..., :2]
    return sincos(corners, dim // corners.shape[-1]).flatten(-2)


class ElasticPosition(Position):
    """The code of :func:`position_code` from the tokens' centre and extent, or a learned table.

    Args:
        mode: one of :data:`POSITIONS`.
        unit: pixels that count 1: a native patch.
        grid: cells of the table, which the learned modes need; in the others it is kept frozen,
            for weights that come with one.
    """

    def __init__(
        self,
        *,
        dim: int,
        unit: float,
        mode: str = "scale",
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if mode not in POSITIONS:
            raise PolypatchError(f"there is no position={mode!r}{suggest(mode, POSITIONS)}")
        parts = 8 if mode == "scale" else 4
        if mode in ("scale", "corner") and dim % parts:
            raise PolypatchError(
                f"position={mode!r} codes {parts // 2} coordinates by sine and cosine and needs a "
                f"width divisible by {parts}, got {dim}"
            )
        self.dim, self.unit, self.mode = dim, unit, mode
        self.table = None
        if mode in ("quantised", "interpolated") or grid is not None:
            if grid is None:
                raise PolypatchError(f"position={mode!r} needs the grid of its table")
            learned = mode in ("quantised", "interpolated")
            self.table = nn.Parameter(torch.zeros(1, *grid, dim), requires_grad=learned)

    def init_weights(self) -> None:
        if self.table is not None:
            nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, tokens: Tokens) -> Tokens:
        code = F.pad(self.code(tokens), (0, 0, tokens.prefix, 0))
        return tokens.with_x(tokens.x + code.to(tokens.x.dtype))

    def code(self, tokens: Tokens) -> Float[Tensor, "#batch placed dim"]:
        centre = tokens.centre[:, tokens.prefix :]
        half = tokens.extent[:, tokens.prefix :] / 2
        boxes = torch.cat([centre - half, centre + half], dim=-1)
        if self.mode in ("scale", "corner"):
            return position_code(boxes, self.dim, unit=self.unit, scale_aware=self.mode == "scale")
        assert self.table is not None
        rows, columns = self.table.shape[1:3]
        if self.mode == "quantised":
            # Rounds half to even, and clips the flat index, not each axis, as the authors do.
            cell = (boxes[..., :2] / self.unit).round()
            index = (cell[..., 0] * columns + cell[..., 1]).long().clamp(0, rows * columns - 1)
            return self.table.flatten(1, 2)[0][index]
        count = boxes.shape[1]
        size = tokens.grid or (math.isqrt(count), math.isqrt(count))
        if math.prod(size) != count:
            raise PolypatchError(
                f"position='interpolated' resizes a square table and can't serve {count} patches"
            )
        table = self.table
        if table.shape[1:3] != tuple(size):
            maps = table.permute(0, 3, 1, 2)
            table = F.interpolate(maps, size=size, mode="bicubic").permute(0, 2, 3, 1)
        return table.flatten(1, 2)


# ---- patches -------------------------------------------------------------------------------------


def patch_mix(tokens: Tokens, share: float) -> tuple[Tokens, Float[Tensor, " batch"]]:
    """Tokens whose tail comes from the image at the other end of the batch, and how much of each
    image is its own. Tokens without prefix; padding may follow. ``share`` is λ; it is rounded down
    to whole tokens."""
    counts = tokens.counts
    fewest = tokens.x.shape[1] if tokens.mask is None else int(counts.min())
    own = int(share * fewest + 1e-6)  # a share that was rounded to tokens keeps their number
    behind = torch.arange(tokens.x.shape[1], device=tokens.x.device) >= own

    def mixed(value: Tensor) -> Tensor:
        tail = behind.view(1, -1, *[1] * (value.ndim - 2))
        return torch.where(tail, value.flip(0), value)

    shared = tokens.centre.shape[0] == 1  # one geometry for all: nothing to mix
    result = Tokens(
        x=mixed(tokens.x),
        centre=tokens.centre if shared else mixed(tokens.centre),
        extent=tokens.extent if shared else mixed(tokens.extent),
        canvas=tokens.canvas,
        mask=None if tokens.mask is None else mixed(tokens.mask),
        grid=tokens.grid,
    )
    return result, own / result.counts.float()


class ElasticPatching(GridPatching):
    """The grid of patches, or any boxes.

    In evaluation: the regular grid, or what :attr:`sampler` gives if it is set, or what a caller
    passes to :meth:`sample`. In training: ``training_sampler``, anew for each image, then PatchMix
    if the step's hook has drawn a share. ``seed`` and ``share`` are set by the hook; ``mixed`` is
    each image's own share of the last batch.
    """

    def __init__(
        self,
        *,
        dim: int,
        patch: int,
        channels: int = 3,
        bias: bool = True,
        training_sampler: Sampler | None = None,
        shuffle: bool = False,
    ) -> None:
        super().__init__(dim=dim, patch=patch, channels=channels, bias=bias)
        self.training_sampler = training_sampler
        self.shuffle = shuffle
        self.sampler: Sampler | None = None
        self.seed: int | None = None
        self.share = 1.0
        self.mixed: Tensor | None = None

    def embed(
        self,
        patches: Float[Tensor, "batch boxes channels patch patch"],
        boxes: Float[Tensor, "#batch boxes 4"] | Int64[Tensor, "#batch boxes 4"],
        *,
        canvas: tuple[int, int],
        mask: Tensor | None = None,
    ) -> Tokens:
        """Tokens of crops that are cut out already."""
        if patches.shape[-2:] != (self.patch, self.patch):
            raise PolypatchError(
                f"patches are {patches.shape[-2]}×{patches.shape[-1]} pixels, the embedding takes "
                f"{self.patch}×{self.patch}"
            )
        weight = self.proj.weight.flatten(1)
        boxes = boxes.to(patches.device, torch.float32)
        return Tokens(
            x=F.linear(patches.flatten(2).to(weight.dtype), weight, self.proj.bias),
            centre=(boxes[..., :2] + boxes[..., 2:]) / 2,
            extent=boxes[..., 2:] - boxes[..., :2],
            canvas=canvas,
            mask=mask,
        )

    def sample(
        self,
        image: Float[Tensor, "batch channels height width"],
        boxes: Tensor,
        *,
        mask: Tensor | None = None,
        blank: Tensor | None = None,
    ) -> Tokens:
        """Tokens of any ``boxes`` (y0, x0, y1, x1) in pixels: (boxes, 4) for all images alike, or
        (batch, boxes, 4). They may overlap and need not be square.

        Args:
            mask: which boxes are real, (batch, boxes); padding stands behind.
            blank: whose pixels become 0.

        Raises:
            PolypatchError: boxes without extent, or outside of the image.
        """
        boxes = torch.as_tensor(boxes, device=image.device)
        boxes = boxes if boxes.ndim == 3 else boxes[None]
        canvas = (image.shape[-2], image.shape[-1])
        if not torch.compiler.is_compiling():
            side = torch.tensor(canvas, device=boxes.device)
            fits = (
                (boxes[..., :2] < boxes[..., 2:]) & (boxes[..., :2] < side) & (boxes[..., 2:] > 0)
            )
            if not bool(fits.all()):
                raise PolypatchError(
                    "boxes are (y0, x0, y1, x1) with y0 < y1 and x0 < x1, in pixels of the image "
                    f"({canvas[0]}×{canvas[1]})"
                )
        patches = crop(image, boxes, self.patch)
        if blank is not None:
            patches = patches.masked_fill(blank.to(image.device)[:, :, None, None, None], 0.0)
        if mask is not None:
            mask = mask.to(image.device).expand(len(image), -1)
        return self.embed(patches, boxes, canvas=canvas, mask=mask)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        sampler = self.training_sampler if self.training else self.sampler
        canvas = (image.shape[-2], image.shape[-1])
        if sampler is None:
            tokens = self._grid(image)
        else:
            seed = self.seed if self.training else None
            if seed is None:
                seed = int(torch.randint(2**62, ()))
            drawn = sampler(canvas, len(image), np.random.default_rng(seed), image)
            tokens = self.sample(image, drawn.boxes, mask=drawn.real, blank=drawn.blank)
        if self.training and self.share < 1.0:
            tokens = self._mix(tokens)
        return tokens

    def _grid(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        """The regular grid; where sides don't divide, the cut patches at its end are stretched,
        as the samplers do it, and not padded."""
        height, width = image.shape[-2:]
        ragged = bool(height % self.patch or width % self.patch)
        if not ragged or min(height, width) < self.patch:
            return super().forward(image)
        boxes = torch.from_numpy(grid_boxes((height, width), self.patch))
        grid = (-(-height // self.patch), -(-width // self.patch))
        return replace(self.sample(image, boxes), grid=grid)

    def _mix(self, tokens: Tokens) -> Tokens:
        if self.shuffle:
            # Draws of another stream than the boxes'; padding stays behind.
            rng = np.random.default_rng([1, self.seed or 0])
            keys = torch.from_numpy(rng.random(tuple(tokens.x.shape[:2]))).to(tokens.x.device)
            if tokens.mask is not None:
                keys = keys.masked_fill(~tokens.mask, 2.0)
            tokens = tokens.keep(keys.argsort(1))
        tokens, self.mixed = patch_mix(tokens, self.share)
        return tokens


def classify(
    host: ViT, tokens: Tokens, *, keeps: Int64[Tensor, "batch kept"] | None = None
) -> Float[Tensor, "batch classes"]:
    """The host's answer to tokens from :meth:`ElasticPatching.sample` or ``embed``. ``keeps`` are
    the indices of those that stay, taken behind the position code: the others are really gone."""
    tokens = host.position(tokens)
    if keeps is not None:
        tokens = tokens.keep(keeps)
    if host.prefix is not None:
        tokens = host.prefix(tokens)
    tokens = tokens.with_x(host.norm_in(tokens.x))
    return host.head(host.pooling(host.encode(tokens)))


# ---- training ------------------------------------------------------------------------------------


class ElasticHook(TrainingHook):
    """Draws each step's seed for the boxes, and λ of PatchMix; mixes the targets alike.

    Targets and images must be in the same order; an odd batch's middle image keeps to itself.
    """

    def __init__(self, *, alpha: float, probability: float, patches: int) -> None:
        self.alpha, self.probability, self.patches = alpha, probability, patches

    def before_step(self, host: ViT, *, step: int, total: int, generator: torch.Generator) -> None:
        patching = _elastic(host)
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        patching.seed, patching.share, patching.mixed = seed, 1.0, None
        rng = np.random.default_rng([2, seed])
        if self.alpha > 0 and rng.random() < self.probability:
            # Whole tokens of the usual number, so that targets can be asked for before the forward.
            patching.share = int(rng.beta(self.alpha, self.alpha) * self.patches) / self.patches

    def targets(
        self, host: ViT, targets: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, "batch classes"]:
        patching = _elastic(host)
        if patching.share >= 1.0:
            return targets
        own: Tensor | float = patching.share
        if patching.mixed is not None and len(patching.mixed) == len(targets):
            own = patching.mixed[:, None].to(targets)
        return targets * own + targets.flip(0) * (1 - own)

    def after_training(self, host: ViT) -> None:
        patching = _elastic(host)
        patching.seed, patching.share, patching.mixed = None, 1.0, None


def _elastic(host: ViT) -> ElasticPatching:
    if not isinstance(host.patching, ElasticPatching):
        raise PolypatchError(
            f"elastic-vit's training needs its own patching, the host has "
            f"{type(host.patching).__name__} now"
        )
    return host.patching


def _training_sampler(
    train: str, *, patch: int, patches: int, smallest: int, largest: int
) -> Sampler | None:
    """``"grid"``, ``"random"``, ``"random30"``: the percentage of images that get random crops."""
    match = re.fullmatch(r"grid|random(\d*)", train)
    percent = 0.0 if train == "grid" else float((match and match[1]) or 100)
    if match is None or percent > 100:
        raise PolypatchError(
            f"train={train!r} is not understood; use 'grid', 'random' or 'random30', where the "
            "number is the percentage of images that are shown random crops"
        )
    if percent == 0:
        return None
    crops = RandomSampler(count=patches, smallest=smallest, largest=largest)
    if percent == 100:
        return crops
    return MixedSampler(
        samplers=(GridSampler(patch=patch), crops), weights=(100 - percent, percent)
    )


def _make_elastic(
    host: ViT,
    *,
    train: str,
    patches: int | None,
    smallest: int | None,
    largest: int | None,
    patchmix: float,
    probability: float,
    shuffle: bool,
) -> ViT:
    """Replace the host's grid by patches of any box, with its weights, and hook it up."""
    old = host.patching
    if type(old) is not GridPatching:
        raise PolypatchError(
            "elastic-vit cuts any boxes instead of the host's grid of patches; this host cuts with "
            f"{type(old).__name__}"
        )
    cells = -(-host.resolution // host.patch)
    patches = cells**2 if patches is None else patches
    smallest = host.patch if smallest is None else smallest
    largest = 3 * host.patch if largest is None else largest
    if patches < 1 or not 1 <= smallest < largest:
        raise PolypatchError(
            f"patches={patches} of smallest={smallest} to below largest={largest} pixels is "
            "nothing to sample"
        )
    if patchmix < 0 or not 0 <= probability <= 1:
        raise PolypatchError("patchmix is at least 0 and its probability between 0 and 1")
    weight = old.proj.weight
    with torch.device("meta"):
        new = ElasticPatching(
            dim=host.dim,
            patch=host.patch,
            channels=weight.shape[1],
            training_sampler=_training_sampler(
                train, patch=host.patch, patches=patches, smallest=smallest, largest=largest
            ),
            shuffle=shuffle,
        )
    new.proj = old.proj
    host.patching = new
    return host.plugged(
        "elastic-vit",
        hook=ElasticHook(alpha=patchmix, probability=probability, patches=patches),
    )


def plug(
    host: ViT,
    *,
    train: str = "random30",
    patches: int | None = None,
    smallest: int | None = None,
    largest: int | None = None,
    position: str = "scale",
    patchmix: float = 1.0,
    probability: float = 1.0,
    shuffle: bool = False,
) -> ViT:
    """Let the host take patches of any box: position code, training samples, PatchMix.

    The host's patch embedding is kept. In evaluation it sees the regular grid, unless
    ``host.patching.sampler`` is set or tokens are made by ``host.patching.sample(image, boxes)``
    and given to :func:`classify`.

    Args:
        train: what training shows: ``"random30"``: random crops for 30 % of the images, the grid
            for the others (published); ``"random"``, ``"random50"``, ``"grid"`` alike.
        patches: random crops an image; default as many as the grid has (published: 196 of both).
        smallest, largest: their side in pixels, the upper bound exclusive; default the patch and
            three times the patch (published: 16 and 48 at patch 16).
        position: one of :data:`POSITIONS`, in units of the host's patch, or ``"host"``: the host's
            own stays, and learned tables are read at the centres.
        patchmix: α of PatchMix; 0: none. It is active where the training loop calls the hook.
        probability: of mixing a batch.
        shuffle: mix random tokens rather than the last ones.

    Raises:
        PolypatchError: a host that doesn't cut a plain grid, or options that make no sense.
    """
    if position not in (*POSITIONS, "host"):
        raise PolypatchError(f"there is no position={position!r}{suggest(position, POSITIONS)}")
    first = next(host.parameters())
    device, dtype = first.device, first.dtype
    host = _make_elastic(
        host,
        train=train,
        patches=patches,
        smallest=smallest,
        largest=largest,
        patchmix=patchmix,
        probability=probability,
        shuffle=shuffle,
    )
    if position == "host":
        return host
    cells = -(-host.resolution // host.patch)
    learned = position in ("quantised", "interpolated")
    new = ElasticPosition(
        dim=host.dim, unit=host.patch, mode=position, grid=(cells, cells) if learned else None
    ).to(device=device, dtype=dtype)
    if device.type != "meta":
        new.init_weights()
    prefix = host.prefix
    if (
        prefix is not None
        and prefix.position is not None
        and isinstance(host.position, LearnedPosition)
    ):
        # The class token's row goes with the table it was part of; what it added is kept.
        with torch.no_grad():
            prefix.tokens[:, : prefix.position.shape[1]] += prefix.position
        prefix.position = None
    host.position = new
    return host


# ---- complete networks ---------------------------------------------------------------------------

#: The authors' ``deit_<size>_patch16_LS``; medium: Touvron et al. 2022 (DeiT III), table 1.
VARIANTS: dict[str, Size] = {
    "elastic-vit-tiny": SIZES["tiny"],
    "elastic-vit-small": SIZES["small"],
    "elastic-vit-medium": Size(512, 12, 8, 2048),
    "elastic-vit-base": SIZES["base"],
    "elastic-vit-large": SIZES["large"],
}


def assemble(
    *,
    dim: int,
    depth: int,
    heads: int,
    hidden: int,
    patch: int,
    grid: tuple[int, int],
    classes: int,
    channels: int = 3,
    position: str = "scale",
    unit: float = 16.0,
    layer_scale: float | None = 1e-4,
    drop_path: float = 0.0,
    qkv_bias: bool = True,
    eps: float = 1e-6,
    training: Mapping[str, Any] | None = None,
) -> ViT:
    """Wire a DeiT-III with elastic patches, without filling the weights."""
    host = assemble_vit(
        dim=dim,
        depth=depth,
        heads=heads,
        hidden=hidden,
        patch=patch,
        grid=grid,
        classes=classes,
        channels=channels,
        position="none",
        prefix=1,
        qkv_bias=qkv_bias,
        layer_scale=layer_scale,
        eps=eps,
    )
    for block in host.blocks:
        block.drop_path = DropPath(rate=drop_path)  # one rate for all blocks
    host.position = ElasticPosition(dim=dim, unit=unit, mode=position, grid=grid)
    usual: dict[str, Any] = {
        "train": "random30",
        "patches": None,
        "smallest": None,
        "largest": None,
        "patchmix": 1.0,
        "probability": 1.0,
        "shuffle": False,
    }
    return _make_elastic(host, **(usual | dict(training or {})))


def build(
    variant: str = "elastic-vit-base",
    *,
    classes: int = 1000,
    resolution: int = 224,
    channels: int = 3,
    position: str = "scale",
    train: str = "random30",
    patches: int | None = None,
    patchmix: float = 1.0,
    drop_path: float = 0.0,
    layer_scale: float = 1e-4,
) -> ViT:
    """A named network: a ViT with DeiT-III's layer scale and the authors' initialisation (linear
    layers, class token and table normal with std 0.02; the patch embedding as torch initialises
    convolutions). The options of training are those of :func:`plug`.

    Raises:
        PolypatchError: an unknown variant, or a resolution below one patch.
    """
    if variant not in VARIANTS:
        raise PolypatchError(f"there is no {variant}{suggest(variant, VARIANTS, kind='variants')}")
    size = VARIANTS[variant]
    if resolution < size.patch:
        raise PolypatchError(f"a resolution of {resolution} holds no patch of {size.patch} pixels")
    cells = -(-resolution // size.patch)
    host = assemble(
        dim=size.dim,
        depth=size.depth,
        heads=size.heads,
        hidden=size.hidden,
        patch=size.patch,
        grid=(cells, cells),
        classes=classes,
        channels=channels,
        position=position,
        layer_scale=layer_scale,
        drop_path=drop_path,
        training={"train": train, "patches": patches, "patchmix": patchmix},
    )
    host.resolution = resolution
    if not next(host.parameters()).is_meta:
        host.init_weights()
        host.patching.proj.reset_parameters()  # type: ignore[union-attr]
        assert host.prefix is not None
        nn.init.trunc_normal_(host.prefix.tokens, std=0.02)
    return host


# ---- the authors' weights ------------------------------------------------------------------------

NAMES: dict[str, str] = TIMM | {
    "blocks.{i}.gamma_1": "blocks.{i}.scale1.gamma",
    "blocks.{i}.gamma_2": "blocks.{i}.scale2.gamma",
    "cls_token": "prefix.tokens",
    "pos_embed": "position.table",
}

_KNOWN = {
    "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads",
    "mlp_ratio", "qkv_bias", "qk_scale", "drop_rate", "attn_drop_rate", "drop_path_rate",
    "block_layers", "norm_eps", "init_scale", "use_learned_pos_embed", "quantize_pos_embed",
    "scale_aware_embed", "global_pool", "dpr_constant", "mlp_ratio_clstk",
}  # fmt: skip

_BLOCKS = {"Block": False, "Layer_scale_init_Block": True}


def assemble_official(config: Mapping[str, Any]) -> ViT:
    """A network without weights from the authors' arguments.

    Raises:
        PolypatchError: an unknown argument or kind of block.
    """
    unknown = sorted(name for name in config if name not in _KNOWN and not name.startswith("_"))
    if unknown:
        raise PolypatchError(f"unknown arguments of an ElasticViT: {', '.join(unknown)}")
    kind = config.get("block_layers", "Layer_scale_init_Block")
    if kind not in _BLOCKS:
        raise PolypatchError(f"block_layers={kind!r} is none of {', '.join(_BLOCKS)}")
    image, patch = config.get("img_size", 224), config.get("patch_size", 16)
    height, width = (image, image) if isinstance(image, int) else image
    position = "scale" if config.get("scale_aware_embed", True) else "corner"
    if config.get("use_learned_pos_embed", False):
        position = "quantised" if config.get("quantize_pos_embed", False) else "interpolated"
    dim, heads = config["embed_dim"], config["num_heads"]
    host = assemble(
        dim=dim,
        depth=config["depth"],
        heads=heads,
        hidden=int(dim * config.get("mlp_ratio", 4.0)),
        patch=patch,
        grid=(height // patch, width // patch),
        classes=config.get("num_classes", 1000),
        channels=config.get("in_chans", 3),
        position=position,
        # A literal 16 in the sine-cosine codes, the patch in the quantised one.
        unit=patch if position == "quantised" else 16.0,
        layer_scale=config.get("init_scale", 1e-4) if _BLOCKS[kind] else None,
        drop_path=config.get("drop_path_rate", 0.0),
        qkv_bias=config.get("qkv_bias", False),
        eps=config.get("norm_eps", 1e-6),
    )
    if config.get("qk_scale"):
        for block in host.blocks:
            block.mixing.scale = config["qk_scale"]  # type: ignore[union-attr]
    for block in host.blocks:
        block.mixing.dropout = config.get("attn_drop_rate", 0.0)  # type: ignore[union-attr]
    return host


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> ViT:
    """A network with the authors' weights, in eval mode.

    Args:
        config: their constructor's arguments; what :func:`recognise` finds may be left out.
        state: the state dict with their keys.

    Raises:
        PolypatchError: unknown arguments; unknown, missing or misfitting keys, each named.
    """
    found = recognise({name: tuple(value.shape) for name, value in state.items()}) or {}
    host = assemble_official({**found, **config})
    renamed, unknown = rename(state, NAMES)
    table, wanted = renamed.get("position.table"), host.state_dict()["position.table"]
    if table is not None and table.numel() == wanted.numel():
        renamed["position.table"] = table.reshape(wanted.shape)
    load_exactly(host, renamed, what="the ElasticViT of that configuration", unknown=unknown)
    return host.eval()


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The authors' arguments, as far as names and shapes tell; None if these are none of theirs.

    DeiT-III's own checkpoints have the same names and shapes; what tells them apart, whether the
    position table is used, is no shape. Assumed: the scale-aware code, a square input, 64 channels
    a head.
    """
    needed = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "cls_token", "pos_embed")
    if any(name not in shapes for name in needed):
        return None
    dim, channels, patch = shapes["patch_embed.proj.weight"][:3]
    rows = shapes["pos_embed"][1]
    _, unknown = rename(shapes, NAMES)
    scaled = "blocks.0.gamma_1" in shapes
    # A plain ViT of timm has a row for the class token and no gamma_1.
    if unknown or not scaled or math.isqrt(rows) ** 2 != rows:
        return None
    depth = 1 + max(int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name)))
    return {
        "img_size": math.isqrt(rows) * patch,
        "patch_size": patch,
        "in_chans": channels,
        "num_classes": shapes.get("head.weight", (0,))[0],
        "embed_dim": dim,
        "depth": depth,
        "num_heads": max(1, dim // 64),
        "mlp_ratio": expansion((shapes["blocks.0.mlp.fc1.weight"][0], dim)),
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "block_layers": "Layer_scale_init_Block",
        "use_learned_pos_embed": False,
        "scale_aware_embed": True,
    }
