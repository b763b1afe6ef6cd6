"""FlexiViT: one set of weights for every patch size, trained with a random one in each step.

Beyer, Izmailov, Kolesnikov, Caron, Kornblith, Zhai, Minderer, Tschannen, Alabdulmohsin & Pavetic,
*FlexiViT: One Model for All Patch Sizes*, CVPR 2023, arXiv 2212.08013; code
google-research/big_vision, ``models/proj/flexi``. The patch embedding is kept at one *underlying*
size and the positions as one small grid; both are resized to the patch size in use, which turns
patch size, and so sequence length and cost, into a knob at run time.

**Resizing a patch embedding** (sec. 3.4). Bilinear resizing of a patch x from p to q pixels a side
is linear: resize(x) = B x. We want weights ŵ for q pixels that see resized patches as w saw the
originals,

    ŵ = argmin E_x [(⟨x, w⟩ - ⟨B x, ŵ⟩)²],

which for white x is ŵ = (Bᵀ)⁺ w, "PI-resize". For q >= p, ⟨B x, ŵ⟩ = ⟨x, w⟩ exactly, as then
Bᵀ (Bᵀ)⁺ = 1; for q < p it is the least-squares answer. Plain interpolation of w does neither: it
changes the length of the embeddings by the square of the scale.

B is a Kronecker product, one factor a side, B = B_h ⊗ B_w, and so is its pseudo-inverse:
ŵ = (B_hᵀ)⁺ w (B_wᵀ)⁺ᵀ. So only two small matrices are inverted (:func:`resize_matrix`,
:func:`resample_patch_embed`). **Rank-deficient sizes**: growing one side while shrinking the other
makes B as a whole rank-deficient, though neither factor is. The authors invert the whole in single
precision with a cut-off of 1e-15 and get weights of 1e8 and more; here such sizes are two
well-conditioned steps and the result is the exact pseudo-inverse.

**Positions**: inside the model the table is resized linearly with antialiasing when it shrinks
(``jax.image.resize``); checkpoints are converted with a corner-aligned zoom
(``scipy.ndimage.zoom``, order 1). The two differ: :func:`resample_positions` has both.

**Training** (sec. 3.2): each step draws one patch size for the whole batch, uniformly from
8, 10, 12, 15, 16, 20, 24, 30, 40, 48 at 240 pixels (:class:`RandomPatchSize`). **Distillation**
(sec. 3.6): the student starts as its teacher (:func:`initialise_from`) and is trained towards the
teacher's probabilities, the teacher seeing its own native size (:func:`distill`,
:func:`distillation_loss`).

Shapes: images (batch, channels, height, width); kernels OIHW, or HWIO as flax has them; position
tables (1, rows, columns, dim).

Traps: the resize in B has half-pixel centres and **no** antialiasing; timm's
``resample_patch_embed`` antialiases and is bicubic by default, which gives other weights. The bias
is not resized. Given a grid side instead of a patch size (``seqhw``), the patch is
(height // seqhw, width // seqhw), so patches of other than square images aren't square, and pixels
that fill no whole patch are cut off; given a patch size, the image is padded with zeros instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..hosts import InputRequirements, TrainingHook, ViT
from ..hosts.vit import assemble_vit
from ..nn import GridPatching, LearnedPosition, Position, load_exactly
from ..tokens import Tokens, raster_geometry

__all__ = [
    "VARIANTS",
    "Distillation",
    "FlexiPatching",
    "RandomPatchSize",
    "build",
    "default_sizes",
    "distill",
    "distillation_loss",
    "from_official",
    "initialise_from",
    "plug",
    "recognise",
    "resample_patch_embed",
    "resample_positions",
    "resize_matrix",
    "set_patch",
    "to_official",
]


# ---- resizing weights ----------------------------------------------------------------------------


def resize_matrix(old: int, new: int) -> Float[Tensor, "new old"]:
    """Bilinear resizing of ``old`` to ``new`` samples as a matrix (half-pixel centres, no
    antialiasing), in double precision. For an image, the Kronecker product of one for each side.
    """
    unit = torch.eye(old, dtype=torch.float64, device="cpu")[:, None]  # each source sample alone
    return F.interpolate(unit, size=new, mode="linear", align_corners=False)[:, 0].T.clone(
        memory_format=torch.contiguous_format
    )


@lru_cache(maxsize=256)
def _inverse(old: int, new: int, device: torch.device) -> Float[Tensor, "new old"]:
    """(Bᵀ)⁺ of :func:`resize_matrix`, in single precision: computed once per pair of sizes (in a
    compiled graph, in every call: two inversions of a patch's side). Its singular values stay far
    from the cut-off for every pair."""
    # Kept tensors outlive the call: made in inference mode, they could never be trained through.
    with torch.inference_mode(False):
        inverse = torch.linalg.pinv(resize_matrix(old, new).T, rtol=1e-10)
        return inverse.float().to(device)


def resample_patch_embed(
    weight: Float[Tensor, "..."], size: tuple[int, int], *, layout: str = "OIHW"
) -> Float[Tensor, "..."]:
    """PI-resize of a patch embedding's kernel to patches of ``size`` (sec. 3.4, eq. 5).

    Embeddings of patches that were *enlarged* bilinearly come out as they did for the original
    patches; for smaller patches the answer is best in the least-squares sense. Differentiable in
    ``weight``.

    Args:
        weight: (out, in, height, width), or (height, width, in, out) with ``layout="HWIO"``.
        size: new (height, width) in pixels.

    Raises:
        PolypatchError: an unknown layout, or a size without pixels.
    """
    if layout not in ("OIHW", "HWIO"):
        raise PolypatchError(f"a kernel's layout is OIHW or HWIO, got {layout!r}")
    if min(size) < 1:
        raise PolypatchError(f"a patch has at least 1 pixel a side, got {size}")
    if layout == "HWIO":
        turned = resample_patch_embed(weight.permute(3, 2, 0, 1), size)
        return turned.permute(2, 3, 1, 0)
    old = (weight.shape[2], weight.shape[3])
    if old == tuple(size):
        return weight
    rows = _inverse(old[0], size[0], weight.device)
    columns = _inverse(old[1], size[1], weight.device)
    return (rows @ weight.float() @ columns.T).to(weight.dtype)


def resample_positions(
    table: Float[Tensor, "1 rows columns dim"], size: tuple[int, int], *, method: str = "linear"
) -> Float[Tensor, "1 rows2 columns2 dim"]:
    """A position table on another grid.

    Args:
        method: ``"linear"``, as the model does it in every forward pass: half-pixel centres,
            antialiased where it shrinks; ``"zoom"``, as the authors convert checkpoints: the
            corners of both grids coincide, no antialiasing.
    """
    if method not in ("linear", "zoom"):
        raise PolypatchError(f"there is no method={method!r}{suggest(method, ('linear', 'zoom'))}")
    if tuple(table.shape[1:3]) == tuple(size):
        return table
    zoom = method == "zoom"
    maps = table.permute(0, 3, 1, 2).float()
    maps = F.interpolate(
        maps, size=tuple(size), mode="bilinear", align_corners=zoom, antialias=not zoom
    )
    return maps.permute(0, 2, 3, 1).to(table.dtype)


# ---- modules -------------------------------------------------------------------------------------


class FlexiPatching(nn.Module):
    """Patches of any size from one underlying embedding, ``proj``.

    ``patch`` (pixels, or (height, width)) may be set at any time; setting ``seqhw``, the number of
    patches a side, derives the patch from each image's size instead.
    """

    def __init__(
        self,
        *,
        dim: int,
        underlying: tuple[int, int],
        patch: int | tuple[int, int],
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=underlying, stride=underlying)
        self.patch = patch

    @property
    def patch(self) -> int | tuple[int, int]:
        """Patch size in use, in pixels; of no meaning while ``seqhw`` is set."""
        height, width = self._height, self._width
        return height if height == width else (height, width)

    @patch.setter
    def patch(self, size: int | tuple[int, int]) -> None:
        # Two numbers instead of a pair: compilers take a module's own numbers for constants.
        self._height, self._width = _pair(size)
        self._seqhw: int | None = None

    @property
    def seqhw(self) -> int | None:
        """Patches a side, where they are given instead of a patch size."""
        return self._seqhw

    @seqhw.setter
    def seqhw(self, side: int | None) -> None:
        if side is not None and side < 1:
            raise PolypatchError(f"an image has at least 1 patch a side, got seqhw={side}")
        self._seqhw = side

    @property
    def input_requirements(self) -> InputRequirements:
        return InputRequirements(minimum=self._seqhw or max(self._height, self._width))

    def kernel(self, size: tuple[int, int]) -> Float[Tensor, "dim channels height width"]:
        """The embedding for patches of ``size``."""
        return resample_patch_embed(self.proj.weight, size)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        height, width = image.shape[-2:]
        seqhw = self._seqhw
        size = (height // seqhw, width // seqhw) if seqhw else (self._height, self._width)
        if min(size) < 1 or height < size[0] or width < size[1]:
            wanted = f"{seqhw} patches a side" if seqhw else f"a patch of {size[0]}×{size[1]}"
            raise PolypatchError(f"the input of {height}×{width} is too small for {wanted}")
        if seqhw is None:
            image = F.pad(image, (0, -width % size[1], 0, -height % size[0]))
        features = F.conv2d(image, self.kernel(size), self.proj.bias, stride=size)
        grid = (features.shape[-2], features.shape[-1])
        covered = (grid[0] * size[0], grid[1] * size[1])
        centre, extent = raster_geometry(grid, covered, device=image.device)
        return Tokens(
            x=features.flatten(2).transpose(1, 2),
            centre=centre[None],
            extent=extent[None],
            canvas=(height, width),
            grid=grid,
        )

    def extra_repr(self) -> str:
        return f"seqhw={self._seqhw}" if self._seqhw else f"patch={self.patch}"


def _pair(size: int | tuple[int, int] | Sequence[int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(pair) < 1:
        raise PolypatchError(f"a patch has at least 1 pixel a side, got patch={size}")
    return pair


class FixedTable(LearnedPosition):
    """big_vision's sine-cosine code of a fixed grid, resized like a learned table.

    Of the channels a quarter each: sin x, cos x, sin y, cos y; frequencies from 1 to 1/10000, both
    included (unlike :class:`polypatch.nn.SinCosPosition`, which stops short of the last).
    """

    table: Tensor  # type: ignore[assignment]

    def __init__(self, *, grid: tuple[int, int], dim: int) -> None:
        Position.__init__(self)
        if dim % 4 or dim < 8:
            raise PolypatchError(f"a 2-D sine-cosine code needs a width of 8, 12, 16, …, got {dim}")
        self.mode = "bilinear"
        y, x = torch.meshgrid(*(torch.arange(side).float() for side in grid), indexing="ij")
        omega = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4 - 1))
        parts = [f(at[..., None] * omega) for at in (x, y) for f in (torch.sin, torch.cos)]
        self.register_buffer("table", torch.cat(parts, dim=-1)[None], persistent=False)

    def init_weights(self) -> None:
        """Nothing is learned."""


# ---- training ------------------------------------------------------------------------------------


class RandomPatchSize(TrainingHook):
    """Draws the patch size of each training step, and sets the default one for evaluation.

    Args:
        sizes: patch sizes in pixels, or grid sides where ``seqhw``.
        weights: how likely each one is; default: all alike.
        default: what evaluation uses.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[int],
        weights: Sequence[float] | None = None,
        default: int,
        seqhw: bool = False,
    ) -> None:
        self.sizes, self.default, self.seqhw = tuple(sizes), default, seqhw
        share = torch.ones(len(self.sizes)) if weights is None else torch.tensor(weights)
        self.weights = share / share.sum()

    def draw(self, generator: torch.Generator) -> int:
        return self.sizes[int(torch.multinomial(self.weights, 1, generator=generator))]

    def apply(self, host: ViT, size: int) -> None:
        assert isinstance(host.patching, FlexiPatching)
        if self.seqhw:
            host.patching.seqhw = size
        else:
            host.patching.patch = size

    def before_step(self, host: ViT, *, step: int, total: int, generator: torch.Generator) -> None:
        self.apply(host, self.draw(generator))

    def after_training(self, host: ViT) -> None:
        self.apply(host, self.default)


def default_sizes(resolution: int, patch: int) -> tuple[int, ...]:
    """Patch sizes to train with: those between half of and three times ``patch`` that tile
    ``resolution``. For 16 at 240 pixels these are the paper's ten; where fewer than two tile, some
    that leave a rest."""
    low, high = max(1, patch // 2), min(3 * patch, resolution)
    sizes = [size for size in range(low, high + 1) if resolution % size == 0]
    if len(sizes) < 2:
        sizes = sorted({round(patch * factor) for factor in (0.5, 0.75, 1, 1.5, 2, 3)})
        sizes = [size for size in sizes if low <= size <= high]
    return tuple(sizes)


def set_patch(host: ViT, size: int | tuple[int, int]) -> ViT:
    """Use patches of ``size`` pixels from now on; returns the host.

    Raises:
        PolypatchError: a host without flexible patches, or a size without pixels.
    """
    if not isinstance(host.patching, FlexiPatching):
        raise PolypatchError("this host's patch size is fixed; plug flexivit in first")
    host.patching.patch = size
    return host


# ---- distillation --------------------------------------------------------------------------------


def distillation_loss(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """KL(teacher ‖ student) of the softmax of logits / temperature, times temperature²; mean over
    the batch. The paper's temperature is 1."""
    ours = F.log_softmax(student.float() / temperature, dim=-1)
    theirs = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean") * temperature**2


class Distillation(TrainingHook):
    """Trains the host towards a fixed teacher: (1 - share) · cross-entropy + share · KL.

    The teacher sees the same images, resized to its native resolution. It is no part of the host:
    it is neither trained nor saved with it.
    """

    def __init__(self, teacher: ViT, *, share: float = 1.0, temperature: float = 1.0) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.share, self.temperature = share, temperature

    def targets(self, host: ViT, targets: Tensor) -> Tensor:
        # Cross-entropy is linear in the target probabilities.
        return targets * (1 - self.share)

    def loss(self, host: ViT, images: Tensor, logits: Tensor) -> Tensor:
        side = self.teacher.resolution
        with torch.no_grad():
            if images.shape[-2:] != (side, side):
                images = F.interpolate(
                    images, size=(side, side), mode="bilinear", antialias=True, align_corners=False
                )
            wanted = self.teacher.to(images.device)(images)
        return self.share * distillation_loss(logits, wanted, temperature=self.temperature)


def distill(host: ViT, teacher: ViT, *, share: float = 1.0, temperature: float = 1.0) -> ViT:
    """Train ``host`` towards ``teacher`` (sec. 3.6); returns the host.

    Args:
        share: of the distance to the teacher in the loss; the paper's 1 leaves no labels.
    """
    if not 0 <= share <= 1:
        raise PolypatchError(f"a share lies from 0 to 1, got {share}")
    hook = Distillation(teacher, share=share, temperature=temperature)
    host.hooks = (*host.hooks, hook)
    return host


@torch.no_grad()
def initialise_from(host: ViT, teacher: ViT) -> ViT:
    """Start a flexible host as its teacher, a trained ViT of a fixed patch size (sec. 3.6).

    The patch embedding is PI-resized to the underlying size and the position table zoomed to the
    underlying grid; everything else is copied. With an underlying size no smaller than the
    teacher's patch, images enlarged in proportion get the teacher's patch embeddings exactly.

    Raises:
        PolypatchError: hosts of different shapes, the parts named.
    """
    if not isinstance(host.patching, FlexiPatching):
        raise PolypatchError("this host's patch size is fixed; plug flexivit in first")
    state, own = dict(teacher.state_dict()), host.state_dict()
    kernel, table = "patching.proj.weight", "position.table"
    if kernel in state:
        size = (own[kernel].shape[2], own[kernel].shape[3])
        state[kernel] = resample_patch_embed(state[kernel], size)
    if table in state and table in own:
        grid = (own[table].shape[1], own[table].shape[2])
        state[table] = resample_positions(state[table], grid, method="zoom")
    load_exactly(host, state, what="a host of another shape")
    return host


# ---- plugging in ---------------------------------------------------------------------------------


def plug(
    host: ViT,
    *,
    sizes: Sequence[int] | None = None,
    seqhw: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    patch: int | None = None,
    underlying: int | None = None,
    grid: int | None = None,
) -> ViT:
    """Make the host's patch size flexible, and train it with a random one in each step.

    The host's embedding is PI-resized to the underlying size and its position table resized to the
    underlying grid, so that a trained host keeps what it has learned; ``host.init_weights()``
    draws both anew.

    Args:
        sizes: patch sizes in pixels to train with; default :func:`default_sizes`.
        seqhw: instead, numbers of patches a side, from which each image's size gives the patch.
        weights: how likely each size is; default: all alike.
        patch: patch size in pixels for evaluation; default: the host's own. It may be changed at
            any time: ``host.patching.patch = 8`` or :func:`set_patch`.
        underlying: side of the underlying embedding in pixels; default: twice the host's patch, the
            paper's 32 for a ViT of patch 16.
        grid: side of the underlying position grid; default: as many cells as underlying patches
            fit into the host's native resolution, the paper's 7.

    Raises:
        PolypatchError: a host whose patching isn't the plain grid, or options that don't fit.
    """
    if not isinstance(host.patching, GridPatching):
        raise PolypatchError(
            "flexivit needs a host with plain grid patches, whose embedding it resizes; this one "
            f"has {type(host.patching).__name__}"
        )
    if sizes is not None and seqhw is not None:
        raise PolypatchError("give flexivit either sizes or seqhw, not both")
    base, old = host.patching.patch, host.patching.proj
    patch = base if patch is None else patch
    drawn = tuple(seqhw or sizes or default_sizes(host.resolution, base))
    if weights is not None and (len(weights) != len(drawn) or min(weights) < 0 or not sum(weights)):
        raise PolypatchError(f"{len(drawn)} sizes need as many weights of at least 0: {weights}")
    if min(drawn) < 1 or max(drawn) > host.resolution:
        raise PolypatchError(
            f"sizes lie from 1 to the host's resolution of {host.resolution} pixels: {drawn}"
        )
    underlying = 2 * base if underlying is None else underlying
    if underlying < 1 or (grid is not None and grid < 1):
        raise PolypatchError(f"underlying={underlying} and grid={grid} must be at least 1")
    grid = max(1, host.resolution // underlying) if grid is None else grid
    patching = FlexiPatching(
        dim=host.dim,
        underlying=(underlying, underlying),
        patch=patch,
        channels=old.in_channels,
    )
    if old.bias is None:
        patching.proj.bias = None
    patching.to(device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        if not old.weight.is_meta:
            patching.proj.weight.copy_(resample_patch_embed(old.weight, (underlying, underlying)))
            if old.bias is not None:
                patching.proj.bias.copy_(old.bias)  # type: ignore[union-attr]
    host.patching = patching
    if isinstance(host.position, LearnedPosition):
        host.position.mode = "bilinear"
        table = host.position.table
        if not table.is_meta:
            small = resample_positions(table.detach(), (grid, grid))
        else:
            small = table.new_empty(1, grid, grid, table.shape[-1])
        host.position.table = nn.Parameter(small.clone())
    hook = RandomPatchSize(
        sizes=drawn,
        weights=weights,
        default=max(1, host.resolution // patch) if seqhw else patch,
        seqhw=bool(seqhw),
    )
    hook.after_training(host)
    return host.plugged("flexivit", hook=hook)


# ---- the authors' networks -----------------------------------------------------------------------

#: The published ImageNet models: distilled from DeiT III at patch 16, 7×7 positions, 240 pixels
#: (sizes: Zhai et al. 2022, table 2).
VARIANTS: dict[str, dict[str, Any]] = {
    "flexivit-small": dict(width=384, depth=12, mlp_dim=1536, num_heads=6),
    "flexivit-base": dict(width=768, depth=12, mlp_dim=3072, num_heads=12),
    "flexivit-large": dict(width=1024, depth=24, mlp_dim=4096, num_heads=16),
}


def build(variant: str, *, classes: int = 1000, resolution: int = 240) -> ViT:
    """A published size, freshly initialised as the authors do it, with patches of 16 pixels for
    evaluation and random ones in training."""
    if variant not in VARIANTS:
        raise PolypatchError(f"there is no {variant}{suggest(variant, VARIANTS, kind='variants')}")
    model = assemble(
        {
            **VARIANTS[variant],
            "num_classes": classes,
            "pool_type": "tok",
            "patch_size": (16, 16),
            "posemb_size": (7, 7),
        }
    )
    model.resolution = resolution
    if not next(model.parameters()).is_meta:
        init_weights(model)
    hook = RandomPatchSize(sizes=default_sizes(resolution, 16), default=16)
    return model.plugged("flexivit", hook=hook)


_SIZES = {  # variant of big_vision: width, depth, mlp_dim, num_heads
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "g-opt": (1536, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}

_DEFAULTS: dict[str, Any] = {
    "num_classes": 0,
    "patch_size": (32, 32),
    "posemb_size": (7, 7),
    "width": 768,
    "depth": 12,
    "mlp_dim": None,
    "num_heads": 12,
    "posemb": "learn",
    "pool_type": "gap",
    "head_zeroinit": True,
    "seqhw": None,
    "variant": None,
}

#: Words of a configuration that say how a network was called, not what it is.
_CALLS = ("layout", "seqhw_per_call")


def assemble(config: Mapping[str, Any]) -> ViT:
    """The network of the authors' arguments, weights not filled in."""
    unknown = [n for n in config if n not in _DEFAULTS and n not in _CALLS and n[0] != "_"]
    if unknown:
        raise PolypatchError(f"unknown arguments of a FlexiViT: {', '.join(unknown)}")
    values = dict(_DEFAULTS)
    if config.get("variant"):
        name, _, patch = str(config["variant"]).partition("/")
        if name not in _SIZES:
            raise PolypatchError(f"there is no variant {name!r}{suggest(name, _SIZES)}")
        values |= dict(zip(("width", "depth", "mlp_dim", "num_heads"), _SIZES[name]))
        if patch:
            values["patch_size"] = (int(patch), int(patch))
    values |= config
    pooling = {"tok": "class", "gap": "mean", "map": "attention"}.get(values["pool_type"])
    if pooling is None or values["posemb"] not in ("learn", "sincos2d"):
        raise PolypatchError(
            f"pool_type={values['pool_type']!r} and posemb={values['posemb']!r}: known are tok, "
            "gap and map; learn and sincos2d"
        )
    dim, size = values["width"], _pair(values["patch_size"])
    grid = _pair(values["posemb_size"])
    host = assemble_vit(
        dim=dim,
        depth=values["depth"],
        heads=values["num_heads"],
        hidden=values["mlp_dim"] or 4 * dim,
        patch=size[0],
        grid=grid,
        classes=values["num_classes"] or 0,
        pooling=pooling,
        prefix=int(pooling == "class"),
        activation=partial(F.gelu, approximate="tanh"),
        eps=1e-6,
    )
    host.patching = FlexiPatching(dim=dim, underlying=size, patch=size)
    if values["seqhw"]:
        host.patching.seqhw = values["seqhw"]
    if values["posemb"] == "learn":
        assert isinstance(host.position, LearnedPosition)
        host.position.mode = "bilinear"
    else:
        host.position = FixedTable(grid=grid, dim=dim)
    return host


def init_weights(host: ViT, *, head_zeroinit: bool = True) -> None:
    """big_vision's initialisation.

    | layer                         | weight                     | bias              |
    |-------------------------------|----------------------------|-------------------|
    | patch embedding               | normal, std width^-1/2     | 0                 |
    | positions                     | normal, std width^-1/2     |                   |
    | queries, keys, values, output | Glorot uniform, each alone | 0                 |
    | feed-forward                  | Glorot uniform             | normal, std 1e-6  |
    | class token, head             | 0                          | 0                 |
    | norms                         | 1                          | 0                 |
    """
    std = host.dim**-0.5
    host.init_weights()
    assert isinstance(host.patching, FlexiPatching)
    nn.init.normal_(host.patching.proj.weight, std=std)
    if isinstance(host.position, LearnedPosition) and not isinstance(host.position, FixedTable):
        nn.init.normal_(host.position.table, std=std)
    if host.prefix is not None:
        nn.init.zeros_(host.prefix.tokens)
    for name, layer in host.named_modules():
        if not isinstance(layer, nn.Linear) or name == "head":
            continue
        parts = {"qkv": 3, "kv": 2}.get(name.split(".")[-1], 1)
        for part in layer.weight.detach().chunk(parts):
            nn.init.xavier_uniform_(part)
        if ".mlp." in name:
            nn.init.normal_(layer.bias, std=1e-6)
    if head_zeroinit and isinstance(host.head, nn.Linear):
        nn.init.zeros_(host.head.weight)


# ---- the authors' weights ------------------------------------------------------------------------


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> ViT:
    """A network with the authors' weights, in eval mode. Images are ours, (batch, channels, height,
    width), not flax's.

    Args:
        config: the authors' arguments of ``Model``; what shapes determine may be left out.
            Without ``seqhw``, patches have the underlying size until set otherwise.
        state: flax names joined with dots (or slashes).

    Raises:
        PolypatchError: unknown arguments, and keys or shapes that don't fit, each named.
    """
    from .flexivit_weights import read

    return read(config, state)


def to_official(host: ViT) -> dict[str, Tensor]:
    """The host's weights with flax's names and layouts, from which :func:`from_official` reads
    them back."""
    from .flexivit_weights import flax_views

    return flax_views(host)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The authors' arguments, from names and shapes; None if these aren't big_vision's.

    Its plain ViT has the same names and shapes, and is read as well: a FlexiViT at its underlying
    patch size is one. Without a position table its grid can't be told; the default 7×7 is assumed.
    """
    from .flexivit_weights import recognise_network

    return recognise_network(shapes)
