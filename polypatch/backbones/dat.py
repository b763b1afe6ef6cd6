"""DAT and DAT++: every query attends to the same few places, and the image decides which.

Xia, Pan, Song, Li and Huang, *Vision Transformer with Deformable Attention* (CVPR 2022, arXiv
2201.00520), and *DAT++: Spatially Dynamic Vision Transformer with Deformable Attention* (2023,
arXiv 2309.01430). Deformable attention shifts a coarse grid of reference points by offsets that it
predicts from the queries, samples the map there and attends to these samples only. With a map x of
H × W places, G groups of channels and N = H/r · W/r points::

    q = x W_q                                                            (H W, C)
    Δ = θ(q),  θ: depthwise k × k with stride r, LN, GELU, 1 × 1         (G, N, 2), as (y, x)
    p = clamp(reference + Δ, -1, 1)      or   reference + s tanh(Δ) / (cells - 1)
    k, v = x̃ W_k, x̃ W_v,  x̃ = bilinear(x; p), each group at its own points   (N, C)
    z = softmax(q kᵀ / √d + B(p_q - p)) v W_o

B reads a table of (2H - 1) × (2W - 1) entries a head bilinearly at half the displacement. The cost
is 2 HWNC + 2 HWC² + 2 NC² + (k² + 2) NC multiplications with additions: that of attention to N
keys, and a last term for the offsets. A block of DAT++ is::

    x = x + depthwise 3 × 3 (x)                     LPU
    x = x + mixer(LN x)                             local (``dat_local.py``), or deformable: "D"
    x = x + W₂ GELU(h + depthwise 3 × 3 (h)),       h = W₁ LN x

in four stages at strides 4, 8, 16, 32, overlapping 3 × 3 convolutions between them, then LN, the
mean, a linear classifier. DAT has neither LPU nor convolutions in its MLP, cuts non-overlapping
patches, uses windows, and deformable attention in its last two stages only, with bounded offsets.

Traps: offsets come from q, but keys are sampled from x; points lie outside of [-1, 1] until they
are clamped, for the references are ``(cell + 0.5) / (cells - 1)`` of the way while queries stand at
``cell / (cells - 1)``; the bias is not scaled with the logits; groups and heads are contiguous
blocks of channels. The code of 2022, of which DAT's published weights are, divides by ``cells`` in
all places (references, queries, bounds) and bounds with a tanh where 2023 clamps:
``conference=True``, assumed for weights of its sizes. ``offsets=False`` is the authors' ablation:
average pooling instead of sampling, and no position bias at all. Their initialisation looks like
Kaiming's but loops over tensors where it means modules, so that torch's own stays; so here. One
cell a side would divide by zero; it stands in the middle here. The authors' letter Q (learned
queries) isn't in the paper, and fails in their code.

Maps stay channels-last. Convolutions with a residual around them are one convolution, with 1 added
to the kernel's middle. On a map of the table's own size all queries are a whole number of cells
apart, so a key reads, for all of them, one window of the table at one fraction of a cell: without
gradients this is done in place of ``grid_sample``, in an eighth of the time.

Here stand the sizes and the authors' weights; the attention is in ``dat_attention.py``, what it
alternates with in ``dat_local.py``, the network in ``dat_network.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..nn import KeyMap, Rule, init_parts, pointwise
from .dat_local import WindowAttention
from .dat_network import DAT, Stage

__all__ = [
    "DAT",
    "VARIANTS",
    "Stage",
    "Variant",
    "assemble",
    "build",
    "from_official",
    "keymap",
    "network",
    "official_config",
    "recognise",
    "resized",
    "to_official",
]

# ---- sizes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    stem: int
    stages: tuple[Stage, ...]
    overlapping: bool
    drop_path: float
    resolution: int = 224
    conference: bool = False


def _plus_plus(
    dims: tuple[int, ...],
    heads: tuple[int, ...],
    groups: tuple[int, ...],
    *,
    convolutions: bool = True,
    blocks: tuple[str, ...] = ("ND", "NDND", "ND" * 9, "DD"),
    strides: tuple[int, ...] = (8, 4, 2, 1),
    kernels: tuple[int, ...] = (9, 7, 5, 3),
) -> tuple[Stage, ...]:
    return tuple(
        Stage(
            dim=dims[i],
            blocks=blocks[i],
            heads=heads[i],
            groups=groups[i],
            stride=strides[i],
            kernel=kernels[i],
            mlp_conv=convolutions,
            lpu=convolutions,
        )
        for i in range(4)
    )


def _conference(dim: int, third: int, groups: int, window: int = 7) -> tuple[Stage, ...]:
    plan = (
        (1, "LS", -1, -1, 9),
        (2, "LS", -1, -1, 7),
        (4, "LD" * (third // 2), groups, 1, 5),
        (8, "LD", 2 * groups, 1, 3),
    )
    return tuple(
        Stage(
            dim=factor * dim,
            blocks=blocks,
            heads=factor * dim // 32,
            groups=groups,
            stride=stride,
            kernel=kernel,
            bound=2.0 if "D" in blocks else None,
            window=window,
        )
        for factor, blocks, groups, stride, kernel in plan
    )


_TINY = _plus_plus((64, 128, 256, 512), (2, 4, 8, 16), (1, 2, 4, 8))
_SMALL = _plus_plus((96, 192, 384, 768), (3, 6, 12, 24), (1, 2, 3, 6))
_BASE = _plus_plus((128, 256, 512, 1024), (4, 8, 16, 32), (2, 4, 8, 16))

#: DAT++ (table 1 of 2309.01430 and the authors' configurations, where they are called dat_tiny and
#: so on); dat-p is DAT-T++ without its convolutions; dat-2022-…: the conference paper's table 1;
#: nano is ours, for demonstrations on a CPU. The rate of stochastic depth is their recipes'.
VARIANTS: dict[str, Variant] = {
    "dat-nano": Variant(
        24,
        _plus_plus(
            (24, 48, 96, 192),
            (2, 4, 4, 8),
            (1, 2, 2, 4),
            blocks=("ND", "ND", "NDD", "D"),
            strides=(4, 2, 1, 1),
            kernels=(5, 5, 3, 3),
        ),
        True,
        0.0,
        32,
    ),
    "dat-tiny": Variant(64, _TINY, True, 0.2),
    "dat-small": Variant(96, _SMALL, True, 0.4),
    "dat-base": Variant(128, _BASE, True, 0.7),
    "dat-base-384": Variant(128, _BASE, True, 0.6, 384),
    "dat-p": Variant(
        64,
        _plus_plus((64, 128, 256, 512), (2, 4, 8, 16), (1, 2, 4, 8), convolutions=False),
        False,
        0.2,
    ),
    "dat-2022-tiny": Variant(96, _conference(96, 6, 3), False, 0.2, conference=True),
    "dat-2022-small": Variant(96, _conference(96, 18, 3), False, 0.3, conference=True),
    "dat-2022-base": Variant(128, _conference(128, 18, 4), False, 0.5, conference=True),
    "dat-2022-base-384": Variant(
        128, _conference(128, 18, 4, window=12), False, 0.5, 384, conference=True
    ),
}


def assemble(
    variant: Variant,
    *,
    classes: int = 1000,
    channels: int = 3,
    resolution: int | None = None,
    drop_path: float | None = None,
    drop: float = 0.0,
    attn_drop: float = 0.0,
) -> DAT:
    """Wire a network without filling it."""
    return DAT(
        stem=variant.stem,
        stages=variant.stages,
        overlapping=variant.overlapping,
        classes=classes,
        channels=channels,
        conference=variant.conference,
        resolution=variant.resolution if resolution is None else resolution,
        drop=drop,
        attn_drop=attn_drop,
        drop_path=variant.drop_path if drop_path is None else drop_path,
    )


def build(
    variant: str,
    *,
    classes: int = 1000,
    resolution: int | None = None,
    channels: int = 3,
    drop_path: float | None = None,
    drop: float = 0.0,
    attn_drop: float = 0.0,
) -> DAT:
    """A named network with fresh weights.

    Args:
        resolution: input side that the position tables are for; others are possible afterwards.
        drop_path: default: the variant's own.
    """
    model = assemble(
        VARIANTS[variant],
        classes=classes,
        channels=channels,
        resolution=resolution,
        drop_path=drop_path,
        drop=drop,
        attn_drop=attn_drop,
    )
    model.init_weights()
    return model


def resized(model: DAT, resolution: int, *, window: int | None = None) -> DAT:
    """A copy for another resolution, to be trained further: position tables (and those of windows,
    if ``window`` is another) are resized bicubically, as the authors go from 224 to 384 pixels.

    Raises:
        PolypatchError: tables of fixed positions, which have no larger counterpart.
    """
    stages = model.stages_spec
    if any(s.position == "fixed" and "D" in s.blocks for s in stages):
        raise PolypatchError("fixed positions are resized in the forward pass, not here")
    if window is not None:
        stages = tuple(replace(s, window=window) for s in stages)
    config = {**official_config(model), "img_size": resolution}
    if window is not None:
        config["window_sizes"] = [window] * 4
    other = network(config).to(device=model.norm.weight.device, dtype=model.norm.weight.dtype)
    state, wanted = model.state_dict(), other.state_dict()
    for name, value in state.items():
        if value.shape == wanted[name].shape:
            continue
        table = value
        if table.ndim == 2:  # windows: (rows · columns, heads)
            side = math.isqrt(len(table))
            table = table.t().unflatten(1, (side, side))
        side = wanted[name].shape[-1] if value.ndim == 3 else math.isqrt(len(wanted[name]))
        table = F.interpolate(table[None], (side, side), mode="bicubic")[0]
        state[name] = table.flatten(1).t() if value.ndim == 2 else table
    other.load_state_dict(state)
    return other.train(model.training)


# ---- authors' weights --------------------------------------------------------------------------

#: what no shape tells, or not in every network
ASSUMED = (
    "conference",
    "fixed_pes",
    "groups",
    "heads",
    "img_size",
    "layer_scale_values",
    "no_offs",
    "offset_range_factor",
    "patch_size",
    "strides",
)


def _stacked(theirs: tuple[str, ...], ours: str) -> Rule:
    """Their 1×1 convolutions are parts of our linear layer."""
    one = pointwise("", "")
    return Rule(theirs, ours, (1,) * len(theirs), one.to_ours, one.to_theirs)


def _mixer_rules(letter: str, position: str | None) -> list[Rule | tuple[str, str]]:
    """Names within a mixer; a tensor of its own has its whole name."""
    if letter in "LS":
        return [
            ("relative_position_bias_table", "relative_bias"),
            ("proj_qkv", "qkv"),
            ("proj_out", "proj"),
        ]
    if letter == "N":
        return [("rpb", "rpb"), ("qkv", "qkv"), ("proj", "proj")]
    if letter == "P":
        return [
            *(pointwise(name, name) for name in ("q", "kv", "proj")),
            ("proj_ds.0", "reduce"),
            ("proj_ds.1.norm", "norm"),
        ]
    if letter == "E":
        table = Rule(
            ("relative_position_bias_table",),
            "relative_bias",
            to_ours=lambda w: w.flatten(3).flatten(0, 2),
            to_theirs=lambda w: w[None, :, None, :, None, None],
        )
        return [("qkv", "qkv"), ("proj", "proj"), ("dep_conv", "shift"), ("dep_conv1", "learned"),
                table]  # fmt: skip
    names: dict[str | None, list[Rule | tuple[str, str]]] = {
        "table": [("rpe_table", "rpe.table")],
        "fixed": [("rpe_table", "rpe.table")],
        "depthwise": [("rpe_table", "rpe")],
        "log": [("rpe_table.0", "rpe.fc1"), ("rpe_table.2", "rpe.fc2")],
    }
    return [
        pointwise("proj_q", "q"),
        _stacked(("proj_k", "proj_v"), "kv"),
        pointwise("proj_out", "proj"),
        ("conv_offset.0", "offset_conv"),
        ("conv_offset.1.norm", "offset_norm"),
        pointwise("conv_offset.3", "offset_out"),
        *names.get(position, []),
    ]


def keymap(stages: tuple[Stage, ...], *, overlapping: bool, map_norms: bool = False) -> KeyMap:
    """Their lists run over a stage's kinds of layers (norms, mixers, MLPs), ours over blocks."""
    rules: list[Rule | tuple[str, str]] = [
        ("patch_proj.0", "stem.0.conv"),
        ("patch_proj.1.norm", "stem.0.norm"),
        pointwise("stages.0.proj", "widen"),
        ("down_projs.{i}.0", "downs.{i}.conv"),
        ("down_projs.{i}.1.norm", "downs.{i}.norm"),
        ("cls_head", "head"),
    ]
    unused = []
    if overlapping:
        rules += [("patch_proj.3", "stem.1.conv"), ("patch_proj.4.norm", "stem.1.norm")]
    if map_norms:
        rules += [("norms.3.norm", "norm"), ("norms.{i}.norm", "map_norms.{i}")]
    else:
        rules += [("cls_norm.norm", "norm")]
    for i, stage in enumerate(stages):
        for d, letter in enumerate(stage.blocks):
            theirs, ours = f"stages.{i}", f"stages.{i}.{d}"
            rules += [(f"{theirs}.local_perception_units.{d}", f"{ours}.lpu")]
            if stage.mlp_conv:
                rules += [
                    pointwise(f"{theirs}.mlps.{d}.linear1.0", f"{ours}.mlp.fc1"),
                    (f"{theirs}.mlps.{d}.dwc", f"{ours}.mlp.conv"),
                    pointwise(f"{theirs}.mlps.{d}.linear2.0", f"{ours}.mlp.fc2"),
                ]
            else:
                rules += [
                    (f"{theirs}.mlps.{d}.chunk.linear1", f"{ours}.mlp.fc1"),
                    (f"{theirs}.mlps.{d}.chunk.linear2", f"{ours}.mlp.fc2"),
                ]
            if letter == "X":
                rules += [
                    (f"{theirs}.attns.{d}", f"{ours}.conv"),
                    (f"{theirs}.ln_cnvnxt.{d}.norm", f"{ours}.norm"),
                ]
                # Their block has layer scales and doesn't call them.
                unused += [f"{theirs}.layer_scales.{2 * d + k}" for k in (0, 1)]
                continue
            for k in (0, 1):
                rules += [
                    (f"{theirs}.layer_norms.{2 * d + k}.norm", f"{ours}.norm{k + 1}"),
                    (f"{theirs}.layer_scales.{2 * d + k}.weight", f"{ours}.scale{k + 1}.gamma"),
                ]
            unused += [f"{theirs}.attns.{d}.{name}" for name in BUFFERS]
            for rule in _mixer_rules(letter, stage.position):
                rule = Rule((rule[0],), rule[1]) if isinstance(rule, tuple) else rule
                rules.append(
                    replace(
                        rule,
                        theirs=tuple(f"{theirs}.attns.{d}.{name}" for name in rule.theirs),
                        ours=f"{ours}.mixer.{rule.ours}",
                    )
                )
    return KeyMap(rules, unused=unused)


#: of windows, computed
BUFFERS = ("relative_position_index", "attn_mask")


def _keymap_of(model: DAT) -> KeyMap:
    return keymap(
        model.stages_spec, overlapping=model.overlapping, map_norms=bool(len(model.map_norms))
    )


#: what stands for sizes that a stage has no block for, so that there is one way of writing it
UNUSED = {"ksizes": 5, "nat_ksizes": 7, "sr_ratios": 1, "window_sizes": 7}

#: a tensor of a mixer that only this letter has; the first that is there counts
_SIGNS = {
    "conv_offset.0.weight": "D",
    "rpb": "N",
    "dep_conv.weight": "E",
    "attn_mask": "S",
    "proj_qkv.weight": "L",
    "kv.weight": "P",
    "q_param": "Q",
    "weight": "X",
}


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`network` from names and shapes, None if these are no DAT's.

    Bounds, strides and the code's year are those of the authors' network of the same widths and
    blocks, else DAT++'s; heads that no table tells are 32 channels wide.
    """
    if not {"patch_proj.1.norm.weight", "down_projs.0.0.weight"} <= shapes.keys():
        return None
    overlapping = "patch_proj.3.weight" in shapes
    stem, _, _, patch = shapes["patch_proj.3.weight" if overlapping else "patch_proj.0.weight"]
    patch = 4 if overlapping else patch
    found: list[dict[str, Any]] = []
    for i in range(4):
        stage = _recognise_stage(shapes, f"stages.{i}.")
        if stage is None:
            return None
        found.append(stage)
    plan = tuple((s["dim"], s["stage_spec"]) for s in found)
    known = next(
        (
            v
            for v in VARIANTS.values()
            if v.overlapping == overlapping and tuple((s.dim, s.blocks) for s in v.stages) == plan
        ),
        None,
    )
    everywhere = all("D" in s["stage_spec"] for s in found)
    for i, stage in enumerate(found):
        like = known.stages[i] if known else None
        deformable = "D" in stage["stage_spec"]
        if stage["heads"] is None:
            stage["heads"] = like.heads if like else max(1, stage["dim"] // 32)
        if stage["group_heads"] and stage["groups"] > 0:
            stage["heads"] = stage["group_heads"] * stage["groups"]
        stage["strides"] = like.stride if like else (8, 4, 2, 1)[i] if everywhere else 1
        stage["strides"] = stage["strides"] if deformable else -1
        bound = like.bound if like and deformable else None
        stage["offset_range_factor"] = -1 if bound is None else bound
    image, fixed = _recognise_tables([s["rpe"] for s in found], patch)
    for i, stage in enumerate(found):
        stage["fixed_pes"] = fixed.get(i, False)
        if stage["fixed_pes"]:
            stage["strides"] = math.isqrt(stage["rpe"][1] // stage["rpe"][2])
    config: dict[str, Any] = {
        "img_size": image,
        "patch_size": patch,
        "num_classes": shapes.get("cls_head.weight", (0,))[0],
        "expansion": found[0]["hidden"] // found[0]["dim"],
        "dim_stem": stem,
        "dims": [s["dim"] for s in found],
        "depths": [len(s["stage_spec"]) for s in found],
        "use_conv_patches": overlapping,
        "conference": bool(known and known.conference),
    }
    for name in PER_STAGE:
        config[name] = [list(s[name]) if name == "stage_spec" else s[name] for s in found]
    if "norms.0.norm.weight" in shapes:
        config["out_indices"] = (0, 1, 2, 3)
    return config


def _recognise_stage(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Any] | None:
    depth = len({name.split(".")[3] for name in shapes if name.startswith(f"{prefix}mlps.")})
    conv = f"{prefix}mlps.0.linear1.0.weight" in shapes
    first = shapes.get(f"{prefix}mlps.0.{'linear1.0' if conv else 'chunk.linear1'}.weight")
    if first is None:
        return None
    letters, tensors = "", {}
    for d in range(depth):
        mixer = f"{prefix}attns.{d}."
        letter = next((v for k, v in _SIGNS.items() if mixer + k in shapes), None)
        if letter is None:
            return None
        letters += letter
        own = {k.removeprefix(mixer): v for k, v in shapes.items() if k.startswith(mixer)}
        tensors.setdefault(letter, own)
    deformable, near = tensors.get("D", {}), tensors.get("N", {})
    windows = tensors.get("L") or tensors.get("S") or {}
    rpe = deformable.get("rpe_table", ())
    log = deformable.get("rpe_table.2.weight", ())
    depthwise = "rpe_table.weight" in deformable
    slide = tensors.get("E", {}).get("relative_position_bias_table", (0, None))
    table = windows.get("relative_position_bias_table", (0, None))
    window = (math.isqrt(table[0]) + 1) // 2 if windows else UNUSED["window_sizes"]
    if "X" in tensors:
        window = tensors["X"]["weight"][-1]
    reduce = tensors.get("P", {}).get("proj_ds.0.weight")
    kernel = deformable.get("conv_offset.0.weight")
    return {
        "dim": first[1],
        "hidden": first[0],
        "stage_spec": letters,
        "heads": (*near.get("rpb", ())[:1], *rpe[:1], table[1], slide[1])[0],
        "group_heads": log[0] if log else 0,
        "groups": first[1] // kernel[0] if kernel else -1,
        "ksizes": kernel[-1] if kernel else UNUSED["ksizes"],
        "use_pes": bool(rpe or log or depthwise),
        "dwc_pes": depthwise,
        "log_cpb": bool(log),
        "rpe": rpe,
        "no_offs": False,
        "window_sizes": window,
        "nat_ksizes": (near["rpb"][1] + 1) // 2 if near else UNUSED["nat_ksizes"],
        "sr_ratios": reduce[-1] if reduce else UNUSED["sr_ratios"],
        "use_dwc_mlps": conv,
        "use_lpus": f"{prefix}local_perception_units.0.weight" in shapes,
        "layer_scale_values": 1e-5 if f"{prefix}layer_scales.0.weight" in shapes else -1,
    }


def _recognise_tables(tables: list[tuple[int, ...]], patch: int) -> tuple[int, dict[int, bool]]:
    """The input side that all tables fit, and which of them are of fixed positions: (heads, H · W,
    keys) in place of (heads, 2 H - 1, 2 W - 1)."""
    readings: dict[int, list[tuple[int, bool]]] = {}
    for i, shape in enumerate(tables):
        if not shape:
            continue
        _, rows, columns = shape
        readings[i] = [((rows + 1) // 2, False)] if rows == columns and rows % 2 else []
        readings[i] += [(math.isqrt(rows), True)] if math.isqrt(rows) ** 2 == rows else []
    if not readings:
        return 224, {}
    first = min(readings)
    for side, _ in readings[first]:
        image = side * patch * 2**first
        fitting = {
            i: [fixed for s, fixed in options if s == image // patch // 2**i]
            for i, options in readings.items()
        }
        if all(fitting.values()):
            return image, {i: options[0] for i, options in fitting.items()}
    return 224, {}


#: the authors' arguments that are lists over stages, with their defaults
PER_STAGE: dict[str, list[Any]] = {
    "stage_spec": [["L", "D"], ["L", "D"], ["L", "D"] * 3, ["L", "D"]],
    "heads": [3, 6, 12, 24],
    "groups": [-1, -1, 3, 6],
    "strides": [-1, -1, -1, -1],
    "offset_range_factor": [1, 2, 3, 4],
    "use_pes": [False] * 4,
    "dwc_pes": [False] * 4,
    "fixed_pes": [False] * 4,
    "log_cpb": [False] * 4,
    "no_offs": [False] * 4,
    "ksizes": [9, 7, 5, 3],
    "nat_ksizes": [3] * 4,
    "window_sizes": [7] * 4,
    "sr_ratios": [8, 4, 2, 1],
    "use_dwc_mlps": [False] * 4,
    "use_lpus": [False] * 4,
    "layer_scale_values": [-1] * 4,
}
_OTHERS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 4,
    "num_classes": 1000,
    "expansion": 4,
    "dim_stem": 96,
    "dims": [96, 192, 384, 768],
    "depths": [2, 2, 6, 2],
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "use_conv_patches": False,
}
#: theirs without effect on the network, or of blocks Q alone
_IDLE = ("heads_q", "ksize_qnas", "lower_lr_kvs", "nqs", "ns_per_pts", "qna_activation",
         "use_checkpoint")  # fmt: skip


def network(config: Mapping[str, Any]) -> DAT:
    """An unfilled network by the authors' argument names and defaults (``lower_lr_kvs`` concerns
    the optimizer: :meth:`DAT.parameter_groups`), and two words more: ``conference`` (the code of
    2022), and their detection code's ``out_indices`` (norms on the maps, no classifier).

    Raises:
        PolypatchError: an unknown argument, or a setting that isn't possible.
    """
    known = {*PER_STAGE, *_OTHERS, *_IDLE, "conference", "out_indices"}
    for word in config:
        if word not in known and not word.startswith("_"):
            raise PolypatchError(
                f"DAT has no argument {word!r}{suggest(word, known, kind='arguments')}"
            )
    given = {**_OTHERS, **PER_STAGE, **config}
    conference = bool(given.get("conference", False))
    if conference and (given["use_conv_patches"] or any(given["use_dwc_mlps"])):
        raise PolypatchError("the code of 2022 had other convolutions, of which nothing was made")
    maps = given.get("out_indices")
    if maps is not None and tuple(maps) != (0, 1, 2, 3):
        raise PolypatchError(f"out_indices are (0, 1, 2, 3) or not given, got {tuple(maps)}")
    stages = []
    for i in range(4):
        one = {name: given[name][i] for name in PER_STAGE}
        if len(one["stage_spec"]) != given["depths"][i]:
            raise PolypatchError(
                f"stage {i} has {given['depths'][i]} blocks and {len(one['stage_spec'])} letters"
            )
        bound, scale = one["offset_range_factor"], one["layer_scale_values"]
        stages.append(
            Stage(
                dim=given["dims"][i],
                blocks="".join(one["stage_spec"]),
                heads=one["heads"],
                groups=one["groups"],
                stride=one["strides"],
                kernel=one["ksizes"],
                bound=None if bound < 0 else float(bound),
                offsets=not one["no_offs"],
                position=_position(one),
                window=one["window_sizes"],
                neighbours=one["nat_ksizes"],
                reduction=one["sr_ratios"],
                mlp_conv=one["use_dwc_mlps"],
                lpu=one["use_lpus"],
                scale=scale if scale > 0 else None,
            )
        )
    return DAT(
        stem=given["dim_stem"],
        stages=tuple(stages),
        patch=given["patch_size"],
        overlapping=given["use_conv_patches"],
        expansion=given["expansion"],
        classes=given["num_classes"] if maps is None else 0,
        conference=conference,
        map_norms=maps is not None,
        resolution=given["img_size"],
        drop=given["drop_rate"],
        attn_drop=given["attn_drop_rate"],
        drop_path=given["drop_path_rate"],
    )


def _position(stage: Mapping[str, Any]) -> str | None:
    """Their flags in the order in which they ask for them."""
    if not stage["use_pes"]:
        return None
    flags = {"dwc_pes": "depthwise", "fixed_pes": "fixed", "log_cpb": "log"}
    return next((name for flag, name in flags.items() if stage[flag]), "table")


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> DAT:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    model = network(config)
    init_parts(model)  # windows' indices
    _keymap_of(model).load(model, state, what="this DAT")
    return model.eval()


def to_official(model: DAT) -> dict[str, Tensor]:
    """The state dict under the authors' keys, with the buffers that their windows keep."""
    state = _keymap_of(model).to_theirs(model.state_dict())
    for i, blocks in enumerate(model.stages):
        for d, block in enumerate(blocks):  # type: ignore[arg-type]
            mixer = getattr(block, "mixer", None)
            if isinstance(mixer, WindowAttention):
                side = model.resolution // model.patch // 2**i
                state[f"stages.{i}.attns.{d}.{BUFFERS[0]}"] = mixer.index
                if mixer.shift:
                    state[f"stages.{i}.attns.{d}.{BUFFERS[1]}"] = mixer.mask((side, side))
    return state


def official_config(model: DAT) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network."""
    stages = model.stages_spec
    positions = [s.position if "D" in s.blocks and s.offsets else None for s in stages]
    config: dict[str, Any] = {
        "img_size": model.resolution,
        "patch_size": model.patch,
        "num_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "expansion": model.expansion,
        "dim_stem": model.stem[-1].norm.normalized_shape[0],  # type: ignore[union-attr]
        "dims": [s.dim for s in stages],
        "depths": [len(s.blocks) for s in stages],
        "stage_spec": [list(s.blocks) for s in stages],
        "heads": [s.heads for s in stages],
        "groups": [s.groups if "D" in s.blocks else -1 for s in stages],
        "strides": [s.stride if "D" in s.blocks else -1 for s in stages],
        "offset_range_factor": [-1 if s.bound is None else s.bound for s in stages],
        "ksizes": [s.kernel if "D" in s.blocks else UNUSED["ksizes"] for s in stages],
        "no_offs": [not s.offsets for s in stages],
        "use_pes": [p is not None for p in positions],
        "dwc_pes": [p == "depthwise" for p in positions],
        "fixed_pes": [p == "fixed" for p in positions],
        "log_cpb": [p == "log" for p in positions],
        "window_sizes": [
            s.window if set(s.blocks) & set("LSX") else UNUSED["window_sizes"] for s in stages
        ],
        "nat_ksizes": [s.neighbours if "N" in s.blocks else UNUSED["nat_ksizes"] for s in stages],
        "sr_ratios": [s.reduction if "P" in s.blocks else UNUSED["sr_ratios"] for s in stages],
        "use_dwc_mlps": [s.mlp_conv for s in stages],
        "use_lpus": [s.lpu for s in stages],
        "layer_scale_values": [-1 if s.scale is None else s.scale for s in stages],
        "use_conv_patches": model.overlapping,
        "conference": model.conference,
        "drop_rate": model.rates["drop"],
        "attn_drop_rate": model.rates["attn_drop"],
        "drop_path_rate": model.rates["drop_path"],
    }
    if len(model.map_norms):
        config["out_indices"] = (0, 1, 2, 3)
    return config
