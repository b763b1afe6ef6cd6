"""Scaling laws in patchification: the smaller the patches, the better, down to single pixels.

Wang, Yu, Wei, Shao, Zhou, Yuille and Xie, *Scaling Laws in Patchification: An Image Is Worth 50,176
Tokens And More* (ICML 2025, arXiv 2502.03738). The paper shrinks the patches of plain encoders from
16×16 to 1×1, at 224 pixels from 196 to 50,176 tokens, and finds the test loss falling all the way.
Two kinds of encoder are scaled. One is the plain ViT, the library's own host: ``vit-base(patch=1)``
(:mod:`polypatch.hosts.vit`; attention over so many tokens takes memory in proportion to them, but
time in proportion to their square). The other, of linear cost, is Adventurer (Wang et al., CVPR
2025, arXiv 2410.07599), which is in this file: a causal model of the sequence

    x_1 … x_N, class token            N = (height / p)(width / p) patches, row by row

as only the last token has seen everything. Each block is, with M the Mamba-2 mixer
(:class:`~polypatch.mixing.state_space.StateSpace`) and RMS norms::

    n = norm(x);  x ← x + M([mean(n), n]) without its first output      (the heading average)
    x ← x + W_3 (silu(W_1 m) ∘ W_2 m),  m = norm(x)                      of width 2.5 dim

so that the first patches, too, know something of the image. For the same reason some blocks read
the patches backwards; the class token stays last. Its output, normed, is classified.

**Which blocks read backwards.** Adventurer's paper turns the sequence between every two layers, so
that it is every other block (``flips="alternating"``). The authors' code asks for ``n // 2 == 1``,
which is blocks 2 and 3 of any depth; the weights were published with that code, and it is the
default, ``flips="published"``.

**Positions at another size.** The table has a row per patch and the class token's row *last*. The
network interpolates the patches' rows (bicubic) to any grid; :meth:`Adventurer.resize` makes that
permanent, between the stages of training. The authors' script takes the *first* row for the class
token's, so that the table it hands to the next stage is shifted by one patch;
``resize(resolution, shifted=True)`` and :func:`resize_positions` with ``leading=True`` do that.

**Training** (tables 8, 10 and 9). Three stages: 300 epochs at 64 or 128 pixels (200 for large and
huge), 100 at 224 (50), 20 of finetuning (50), with drop-path rates of 0.1 (large, huge: 0.2), then
0.2 for small and 0.4 for base and large, then 0.4 and 0.6. :func:`build` starts with the first.
Block i of d gets ``linspace(0, rate, d)[i - 1]``, the first two nothing. Large is finetuned with
layer-wise learning rates: :func:`learning_rate_scales`.

Traps: patches that don't fill their side are dropped; at patches of 1 a quarter to a half of the
weights are positions; the tables' sides are those of a square in the authors' code. The paper's
further results, on segmentation and detection, use these encoders as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..mixing.state_space import StateSpace, rms_norm
from ..nn import (
    Backbone,
    DropPath,
    FeatureInfo,
    FeatureMap,
    InputRequirements,
    KeyMap,
    Preprocessing,
    Rule,
    SwiGlu,
    fresh,
)

__all__ = [
    "FLIPS",
    "VARIANTS",
    "Adventurer",
    "Block",
    "Variant",
    "assemble",
    "build",
    "from_official",
    "learning_rate_scales",
    "network",
    "official_config",
    "recognise",
    "resize_positions",
    "to_official",
]

#: which blocks read the patches backwards, by their number
FLIPS: dict[str, Callable[[int], bool]] = {
    "published": lambda number: number // 2 == 1,
    "alternating": lambda number: number % 2 == 1,
    "none": lambda number: False,
}


# ---- positions and learning rates between the stages ---------------------------------------------


def resize_positions(
    table: Float[Tensor, "1 rows dim"],
    native: tuple[int, int],
    grid: tuple[int, int],
    *,
    extra: int = 1,
    leading: bool = False,
) -> Float[Tensor, "1 rows2 dim"]:
    """A position table for another grid of patches, bicubic; ``extra`` rows stay as they are.

    Args:
        native, grid: (rows, columns) of patches, before and after.
        leading: the extra rows are the first ones, as the authors' script has it, and not the last
            ones, which are the class token's.

    Raises:
        PolypatchError: a table that doesn't have the native grid's number of rows.
    """
    if table.shape[1] != native[0] * native[1] + extra:
        raise PolypatchError(
            f"{table.shape[1]} positions are not {native[0]}×{native[1]} patches and {extra} more"
        )
    at = extra if leading else table.shape[1] - extra
    first, second = table[:, :at], table[:, at:]
    maps = second if leading else first
    maps = maps.transpose(1, 2).unflatten(2, native).float()
    maps = F.interpolate(maps, size=grid, mode="bicubic", align_corners=False)
    maps = maps.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([first, maps] if leading else [maps, second], 1)


def learning_rate_scales(model: Adventurer, decay: float) -> dict[str, float]:
    """By parameter, what its learning rate is multiplied by in layer-wise decay: 1 behind the last
    block, ``decay`` in it, and so on to ``decay ** (depth + 1)`` for embedding and positions."""
    depth = len(model.blocks)

    def behind(name: str) -> int:
        part, _, rest = name.partition(".")
        if part in ("patching", "position", "class_token"):
            return depth + 1
        return depth - int(rest.split(".")[0]) if part == "blocks" else 0

    return {name: decay ** behind(name) for name, _ in model.named_parameters()}


# ---- the network ---------------------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """torch's, faster in inference."""

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        assert self.eps is not None
        return rms_norm(x, self.weight, eps=self.eps)


class Block(nn.Module):
    """The heading average, the mixer and the gated MLP."""

    def __init__(
        self,
        *,
        dim: int,
        mixer: nn.Module,
        norm: type[nn.RMSNorm] | type[nn.LayerNorm],
        eps: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim, eps=eps)
        self.mixer = mixer
        self.norm2 = norm(dim, eps=eps)
        self.mlp = SwiGlu(dim=dim, hidden=int(2.5 * dim))
        self.drop_path = DropPath(rate=drop_path)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        normed = self.norm1(x)
        headed = torch.cat([normed.mean(1, keepdim=True), normed], 1)
        x = fresh.add(x, self.drop_path(self.mixer(headed)[:, 1:]))
        return fresh.add(x, self.drop_path(self.mlp(self.norm2(x))))


def backwards(x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
    """The tokens in reverse, but for the last."""
    return torch.cat([x[:, :-1].flip(1), x[:, -1:]], 1)


def _grid(resolution: int | tuple[int, int], patch: int) -> tuple[int, int]:
    """Rows and columns of whole patches."""
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    if patch < 1 or min(height, width) < patch:
        raise PolypatchError(
            f"patches of {patch} pixels a side don't fit into {height}×{width} pixels"
        )
    return height // patch, width // patch


class Adventurer(Backbone):
    """The causal encoder.

    Args:
        resolution: side, or (height, width), that the position table is made for.
        mixing: makes a block's mixer, such as ``partial(StateSpace, dim=dim)``.
        flips: which blocks read backwards, a key of :data:`FLIPS`.
        rms: RMS norms around the mixers, else layer norms.
        drop_path: rate of a block behind the last; see above.
        dropout: of the tokens that enter the first block.
    """

    undecayed = ("position", "class_token")

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        patch: int,
        resolution: int | tuple[int, int],
        mixing: Callable[[], StateSpace],
        classes: int = 1000,
        channels: int = 3,
        flips: str = "published",
        rms: bool = True,
        eps: float = 1e-5,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if flips not in FLIPS:
            raise PolypatchError(f"there is no flips={flips!r}{suggest(flips, FLIPS)}")
        self.dim, self.patch, self.flips = dim, patch, flips
        self.grid = _grid(resolution, patch)
        self.drop_path, self.dropout = drop_path, dropout
        self.patching = nn.Conv2d(channels, dim, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, math.prod(self.grid) + 1, dim))
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        norm = RMSNorm if rms else nn.LayerNorm
        self.blocks = nn.ModuleList(
            Block(dim=dim, mixer=mixing(), norm=norm, eps=eps, drop_path=rates[max(0, number - 1)])
            for number in range(depth)
        )
        self.norm = norm(dim, eps=eps)
        self.head: nn.Module = nn.Linear(dim, classes) if classes else nn.Identity()
        self.taps = tuple(sorted({max(1, depth * k // 4) for k in (1, 2, 3, 4)}))
        self.feature_info = (FeatureInfo(dim, patch),) * len(self.taps)
        self.input_requirements = InputRequirements(minimum=patch)
        self.channels_last()

    def _tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The sequence that enters the first block, and its grid."""
        self.input_requirements.check(image, name="Adventurer")
        maps = self.patching(image.contiguous(memory_format=torch.channels_last))
        grid = (maps.shape[2], maps.shape[3])
        position = self.position
        if grid != self.grid:
            position = resize_positions(position, self.grid, grid)
        token = self.class_token.expand(image.shape[0], -1, -1)
        x = torch.cat([maps.flatten(2).transpose(1, 2), token], 1) + position
        return F.dropout(x, self.dropout, self.training), grid

    def _run(self, x: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """The sequence behind each block, and whether it stands backwards there."""
        turned = False
        for number, block in enumerate(self.blocks):
            if FLIPS[self.flips](number) != turned:
                x, turned = backwards(x), not turned
            x = self.through(block, x)
            yield x, turned

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        last, _ = self._tokens(image)
        for x, _ in self._run(last):
            last = x
        return self.norm(last[:, -1])

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """Four normed maps, evenly spaced in depth, all at the patch's stride."""
        x, grid = self._tokens(image)
        maps = []
        for number, (behind, turned) in enumerate(self._run(x), start=1):
            if number in self.taps:
                placed = self.norm(behind[:, :-1])
                placed = placed.flip(1) if turned else placed
                maps.append(FeatureMap(placed.transpose(1, 2).unflatten(2, grid), self.patch))
        return maps

    def resize(self, resolution: int | tuple[int, int], *, shifted: bool = False) -> Adventurer:
        """Make the positions those of another input size, for training on.

        Args:
            shifted: as the authors' script does it, off by one patch.

        Raises:
            PolypatchError: an input smaller than a patch.
        """
        grid = _grid(resolution, self.patch)
        with torch.no_grad():
            table = resize_positions(self.position, self.grid, grid, leading=shifted)
        self.position, self.grid = nn.Parameter(table), grid
        return self

    def init_weights(self) -> None:
        """The authors' initialisation.

        | part                   | weight                                     | bias |
        |------------------------|--------------------------------------------|------|
        | patch embedding        | normal, std 1.137/√fan-in, cut at 2        | 0    |
        | class token, positions | normal, std 0.02, cut at 2                 |      |
        | mixers                 | see :meth:`StateSpace.init_weights`        |      |
        | MLPs                   | uniform up to 1/√fan-in                    | 0    |
        | norms                  | 1                                          | 0    |
        | head                   | normal, std 0.02, cut at 2                 | 0    |
        """
        # 0.8796: std of a standard normal that is cut at 2
        std = self.patching.weight[0].numel() ** -0.5 / 0.87962566103423978
        nn.init.trunc_normal_(self.patching.weight, std=std)
        assert self.patching.bias is not None
        nn.init.zeros_(self.patching.bias)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, StateSpace):
                module.init_weights()
            elif isinstance(module, SwiGlu):
                for linear in (module.fc1, module.fc2):
                    linear.reset_parameters()
                    nn.init.zeros_(linear.bias)
            elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
                module.reset_parameters()
        self.init_head()


@dataclass(frozen=True)
class Variant:
    dim: int
    depth: int
    patch: int
    drop_path: float = 0.1
    resolution: int = 224
    state: int = 64
    head_dim: int = 64


#: table 7 and the authors' code. Base with patches of 8 is among the weights of Adventurer's own
#: repository; huge stands in the table only, whose 759 M parameters these sizes don't give (718 M).
#: Drop path is that of the first stage (table 8). nano is ours, for demonstrations on a CPU.
VARIANTS: dict[str, Variant] = {
    "patch-scaling-nano": Variant(64, 4, 4, drop_path=0.0, resolution=32, state=16, head_dim=16),
    "patch-scaling-tiny-patch16": Variant(256, 12, 16),
    "patch-scaling-small-patch16": Variant(512, 12, 16),
    "patch-scaling-base-patch16": Variant(768, 12, 16),
    "patch-scaling-large-patch16": Variant(1024, 24, 16, drop_path=0.2),
    "patch-scaling-huge-patch16": Variant(1280, 32, 16, drop_path=0.2),
    "patch-scaling-base-patch8": Variant(768, 12, 8),
    "patch-scaling-tiny-patch1": Variant(256, 12, 1),
    "patch-scaling-small-patch1": Variant(512, 12, 1),
    "patch-scaling-base-patch1": Variant(768, 12, 1),
    "patch-scaling-large-patch1": Variant(1024, 24, 1, drop_path=0.2),
}


def assemble(
    variant: Variant,
    *,
    classes: int = 1000,
    channels: int = 3,
    flips: str = "published",
    dropout: float = 0.0,
) -> Adventurer:
    """Wire a network without filling it."""
    model = Adventurer(
        dim=variant.dim,
        depth=variant.depth,
        patch=variant.patch,
        resolution=variant.resolution,
        mixing=partial(
            StateSpace,
            dim=variant.dim,
            state=variant.state,
            head_dim=variant.head_dim,
            out_scale=variant.depth**-0.5,
        ),
        classes=classes,
        channels=channels,
        flips=flips,
        drop_path=variant.drop_path,
        dropout=dropout,
    )
    model.preprocessing = _preprocessing(variant.patch, variant.resolution)
    return model


def _preprocessing(patch: int, resolution: int) -> Preprocessing:
    """The authors crop only where patches are large and the input is of the usual size, or where
    it is tiny."""
    crops = resolution <= (224 if patch >= 16 else 64)
    return Preprocessing(resolution=resolution, crop=0.875 if crops else 1.0)


def build(
    variant: str,
    *,
    classes: int = 1000,
    resolution: int | None = None,
    patch: int | None = None,
    channels: int = 3,
    drop_path: float | None = None,
    dropout: float = 0.0,
    flips: str = "published",
) -> Adventurer:
    """A named network with fresh weights.

    Args:
        resolution: input side that the position table is made for; any other works, too.
        patch: another patch size than the variant's.
        drop_path: rate of stochastic depth; default: that of the first stage of training.
        dropout: of the tokens in front of the first block.
        flips: which blocks read backwards: "published", "alternating" or "none".

    Raises:
        PolypatchError: an unknown option, or patches larger than the input.
    """
    row = VARIANTS[variant]
    row = replace(
        row,
        patch=row.patch if patch is None else patch,
        resolution=row.resolution if resolution is None else resolution,
        drop_path=row.drop_path if drop_path is None else drop_path,
    )
    model = assemble(row, classes=classes, channels=channels, flips=flips, dropout=dropout)
    model.init_weights()
    return model


# ---- authors' weights --------------------------------------------------------------------------

KEYS = KeyMap(
    [
        ("cls_token", "class_token"),
        ("pos_embed", "position"),
        ("patch_embed.proj", "patching"),
        ("layers.{i}.norm", "blocks.{i}.norm1"),
        ("layers.{i}.norm_mlp", "blocks.{i}.norm2"),
        ("layers.{i}.mixer.norm.weight", "blocks.{i}.mixer.norm"),
        ("layers.{i}.mixer.conv1d", "blocks.{i}.mixer.conv"),
        *(
            (f"layers.{{i}}.mixer.{name}", f"blocks.{{i}}.mixer.{name}")
            for name in ("in_proj", "out_proj", "dt_bias", "A_log", "D")
        ),
        Rule(("layers.{i}.mlp.w1", "layers.{i}.mlp.w2"), "blocks.{i}.mlp.fc1", parts=(1, 1)),
        ("layers.{i}.mlp.w3", "blocks.{i}.mlp.fc2"),
        ("norm_f", "norm"),
        ("head", "head"),
    ]
)

#: what no shape tells; of ``ssm_cfg``: ``ngroups``, ``norm_before_gate`` and ``dt_limit``
ASSUMED = ("flips", "norm_epsilon", "ssm_cfg")

#: words of ``ssm_cfg`` with the authors' defaults, and what they are called here
SSM = {
    "headdim": ("head_dim", 64),
    "d_conv": ("kernel", 4),
    "d_ssm": ("scanned", None),
    "ngroups": ("groups", 1),
    "D_has_hdim": ("skip_per_channel", False),
    "rmsnorm": ("norm", True),
    "norm_before_gate": ("norm_first", False),
    "dt_limit": ("limits", (0.0, math.inf)),
    "bias": ("bias", False),
    "conv_bias": ("conv_bias", True),
    "conv_init": ("conv_init", None),
    "A_init_range": ("rates", (1.0, 16.0)),
    "dt_min": ("", 1e-3),
    "dt_max": ("", 0.1),
    "dt_init_floor": ("least_step", 1e-4),
}
#: words of ``ssm_cfg`` that say how their kernels run, and change no result
IGNORED = ("chunk_size", "use_mem_eff_path", "sequence_parallel", "process_group")


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`from_official` from names and shapes, None if these are no
    Adventurer's. The grid is a square, as the authors' always is."""
    first = "layers.0.mixer."
    needed = ("in_proj.weight", "conv1d.weight", "out_proj.weight", "A_log", "D")
    names = ("cls_token", "pos_embed", "patch_embed.proj.weight", "layers.0.norm_mlp.weight")
    if not {*names, *(first + name for name in needed)} <= shapes.keys():
        return None
    table, kernel = shapes["pos_embed"], shapes["patch_embed.proj.weight"]
    projection, out = shapes[first + "in_proj.weight"], shapes[first + "out_proj.weight"]
    conv = shapes[first + "conv1d.weight"]
    if not (len(table) == len(conv) == 3 and len(kernel) == 4 and len(projection) == len(out) == 2):
        return None
    side = math.isqrt(max(0, table[1] - 1))
    heads = math.prod(shapes[first + "A_log"])
    dim, inner = out
    shared = (projection[0] - 2 * inner - heads) // 2
    scanned = conv[0] - 2 * shared
    if side * side != table[1] - 1 or not side or not heads or scanned <= 0 or inner % dim:
        return None
    skip = math.prod(shapes[first + "D"])
    told = {
        "headdim": scanned // heads,
        "d_conv": conv[2],
        "d_ssm": scanned if scanned != inner else None,
        "D_has_hdim": skip == scanned and skip != heads,
        "rmsnorm": first + "norm.weight" in shapes,
        "bias": first + "in_proj.bias" in shapes,
        "conv_bias": first + "conv1d.bias" in shapes,
    }
    return {
        "img_size": side * kernel[-1],
        "patch_size": kernel[-1],
        "depth": len({name.split(".")[1] for name in shapes if name.startswith("layers.")}),
        "embed_dim": dim,
        "channels": kernel[1],
        "num_classes": shapes["head.weight"][0] if "head.weight" in shapes else 0,
        "ssm_cfg": _unusual(told),
        "norm_epsilon": 1e-5,
        "rms_norm": "norm_f.bias" not in shapes,
        "mamba_expand": inner // dim,
        "mamba_d_state": shared,
        "flips": "published",
    }


def _unusual(words: Mapping[str, Any]) -> dict[str, Any] | None:
    """Those words of ``ssm_cfg`` that differ from the authors' defaults."""
    return {word: value for word, value in words.items() if value != SSM[word][1]} or None


def network(config: Mapping[str, Any]) -> Adventurer:
    """An unfilled network by the authors' argument names: ``img_size`` (224), ``patch_size`` (16),
    ``depth`` (12), ``embed_dim`` (256), ``channels`` (3), ``num_classes`` (1000), ``ssm_cfg``,
    ``drop_rate`` (0), ``drop_path_rate`` (0.1), ``norm_epsilon`` (1e-5), ``rms_norm`` (False),
    ``initializer_cfg``, ``mamba_expand`` (2), ``mamba_d_state`` (64), and our ``flips``
    (``"published"``).

    Raises:
        PolypatchError: an unknown word in ``ssm_cfg`` or ``initializer_cfg``, or sizes that don't
            fit each other.
    """
    ssm = {w: v for w, v in (config.get("ssm_cfg") or {}).items() if w not in IGNORED}
    start = dict(config.get("initializer_cfg") or {})
    for where, words, known in (
        ("ssm_cfg", ssm, SSM),
        (
            "initializer_cfg",
            start,
            ("initializer_range", "rescale_prenorm_residual", "n_residuals_per_layer"),
        ),
    ):
        for word in words:
            if word not in known:
                raise PolypatchError(f"there is no {word!r} in {where}{suggest(word, known)}")
    dim, depth = config.get("embed_dim", 256), config.get("depth", 12)
    options = {SSM[word][0]: value for word, value in ssm.items() if SSM[word][0]}
    options["steps"] = (ssm.get("dt_min", 1e-3), ssm.get("dt_max", 0.1))
    # ``initializer_range`` is for embeddings of words, which there are none of.
    scale = (start.get("n_residuals_per_layer", 1) * depth) ** -0.5
    options["out_scale"] = scale if start.get("rescale_prenorm_residual", True) else 1.0
    patch, size = config.get("patch_size", 16), config.get("img_size", 224)
    if not isinstance(patch, int):
        if len(set(patch)) > 1:
            raise PolypatchError(f"patches must be square, got {tuple(patch)}")
        patch = int(patch[0])
    model = Adventurer(
        dim=dim,
        depth=depth,
        patch=patch,
        resolution=size if isinstance(size, int) else (int(size[0]), int(size[1])),
        mixing=partial(
            StateSpace,
            dim=dim,
            state=config.get("mamba_d_state", 64),
            expand=config.get("mamba_expand", 2),
            **options,
        ),
        classes=config.get("num_classes", 1000),
        channels=config.get("channels", 3),
        flips=config.get("flips", "published"),
        rms=config.get("rms_norm", False),
        eps=config.get("norm_epsilon", 1e-5),
        drop_path=config.get("drop_path_rate", 0.1),
        dropout=config.get("drop_rate", 0.0),
    )
    model.preprocessing = _preprocessing(patch, size if isinstance(size, int) else min(size))
    return model


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Adventurer:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    model = network(config)
    KEYS.load(model, state, what="this Adventurer")
    return model.eval()


def to_official(model: Adventurer) -> dict[str, Tensor]:
    """The state dict under the authors' keys."""
    return KEYS.to_theirs(model.state_dict())


def official_config(model: Adventurer) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    mixer = block.mixer
    assert isinstance(mixer, StateSpace)
    inner, scanned, heads = mixer.out_proj.in_features, mixer.parts[2], mixer.parts[-1]
    ssm = {
        "headdim": mixer.head_dim,
        "d_conv": mixer.conv.kernel_size[0],
        "d_ssm": scanned if scanned != inner else None,
        "ngroups": mixer.groups,
        "D_has_hdim": len(mixer.D) == scanned != heads,
        "rmsnorm": mixer.norm is not None,
        "norm_before_gate": mixer.norm_first,
        "dt_limit": mixer.limits,
        "conv_init": mixer.conv_init,
        "A_init_range": mixer.rates,
        "dt_min": mixer.steps[0],
        "dt_max": mixer.steps[1],
        "dt_init_floor": mixer.least_step,
        "bias": mixer.in_proj.bias is not None,
        "conv_bias": mixer.conv.bias is not None,
    }
    size = [cells * model.patch for cells in model.grid]
    return {
        "img_size": size[0] if size[0] == size[1] else tuple(size),
        "patch_size": model.patch,
        "depth": len(model.blocks),
        "embed_dim": model.dim,
        "channels": model.patching.in_channels,
        "num_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "ssm_cfg": _unusual(ssm),
        "drop_rate": model.dropout,
        "drop_path_rate": model.drop_path,
        "norm_epsilon": model.norm.eps,
        "rms_norm": isinstance(model.norm, nn.RMSNorm),
        "mamba_expand": inner // model.dim,
        "mamba_d_state": mixer.state,
        "flips": model.flips,
    }
