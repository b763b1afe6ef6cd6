"""Weights of SPFormer's research code: its keys and arguments → ours.

What its layout has otherwise: 1 × 1 convolutions where we have linear maps, sequences whose layers
have numbers, one table for the positions of class token and superpixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import PolypatchError
from ..nn import LearnedPosition, load_exactly
from .spformer import SuperpixelCrossAttention
from .spformer_network import SPFormer, Variant, assemble
from .spformer_stem import StemLayer

__all__ = ["assemble_official", "read", "read_layer", "recognise_network"]

#: Their names → ours: patterns, replaced one after the other. ``conv`` and ``norm`` in the first
#: three stand for the numbers of a sequence, which are told apart by what they hold.
NAMES: dict[str, str] = {
    r"^stem\.conv_layers\.(\d+)\.(conv|norm)": r"stem.\2s.\1",
    r"^sp_init\.conv": "init.lift",
    r"^sp_init\.norm": "init.norm",
    r"\.patch_embed\.blocks\.": ".layers.",
    r"\._sp_qkv\.conv": ".superpixel_qkv",
    r"\._sp_qkv\.bn": ".superpixel_norm",
    r"\._pixel_qkv\.conv": ".pixel_qkv",
    r"\._pixel_qkv\.bn": ".pixel_norm",
    r"\.sp_pos_conv": ".superpixel_place.conv",
    r"\.pixel_pos_conv": ".pixel_place.conv",
    r"\.sp_pos_embed": ".superpixel_place.table",
    r"\.pixel_pos_embed": ".pixel_place.table",
    r"\.sp_ls1": ".superpixel_scale",
    r"\.pixel_ls1": ".pixel_scale",
    r"\.sp_project\.0": ".hand_over.project",
    r"\.sp_project\.1": ".hand_over.norm",
    r"\.pixel_delta_ls": ".hand_over.scale",
    r"^(stages\.\d+)\.pos_embed": r"\1.position.table",
    r"\.cls_token": ".prefix.tokens",
    r"\.attn\.": ".mixing.",
    r"^fc_norm": "norm",
    r"^seg_head_conv": "seg_head",
}

#: Kinds of stem layers and of first superpixels.
_KINDS = {
    "conv": "conv",
    "patch": "patch",
    "lift_avgpool": "lift-pool",
    "avgpool_lift": "pool-lift",
}
_POSITIONS = {"depthwise": "depthwise", "learnable": "learned", "none": "none"}

_KNOWN = {
    "img_size", "in_channels", "num_classes", "stem_channels_list", "stem_kernel_sizes",
    "stem_strides", "stem_conv_types", "depths", "dims", "heads", "strides", "sp_sizes",
    "sp_heads", "sp_method", "sp_iter", "sp_features_init_methods", "sp_global_init_method",
    "sp_position_embedding_method", "sp_position_embedding_stride",
    "sp_sp_position_embedding_stride", "sp_pixel_features_update_method", "sp_kwargs",
    "drop_rate", "drop_path_rate", "attn_drop_rate", "ls_init_value", "sp_ls_init_value",
    "pre_norm_pixel", "pixel_refine_method", "sp_embed_method", "sp_project_method",
    "class_token_position_method", "pos_embed_position_method", "no_embed_class", "weight_init",
    "use_pixel_similarities", "use_middle_pixel_features", "seg_specific_classifier",
    "seg_num_classes", "stem_as_stored",
}  # fmt: skip

#: Arguments whose other values belong to other experiments than this paper's.
_ONLY: dict[str, tuple[Any, ...]] = {
    "sp_method": ("sp_cross_asymmetry",),
    "pre_norm_pixel": (False, None),
    "pixel_refine_method": ("identity", None),
    "sp_embed_method": ("identity", None),
    "sp_project_method": ("noact", "act"),
    "sp_pixel_features_update_method": ("residual", "fixed"),
    "class_token_position_method": ("none", "last_stage"),
    "pos_embed_position_method": ("none", "every_stage"),
    "seg_specific_classifier": (None, "Linear", "Conv", ""),
}


def _translated(name: str, value: str, table: Mapping[str, str]) -> str:
    if value not in table:
        raise PolypatchError(f"{name}={value!r} is none of {', '.join(table)}")
    return table[value]


def assemble_official(config: Mapping[str, Any]) -> SPFormer:
    """A network without weights from the authors' arguments, all of them.

    ``stem_as_stored``: whether the stem has batch norm and ReLU. Takes ``sp_kwargs`` with
    ``return_similarities_final`` False only: their other setting compares pixels with superpixels
    of another width and fails.

    Raises:
        PolypatchError: an unknown argument, or a value of another method's experiments.
    """
    unknown = sorted(name for name in config if name not in _KNOWN and not name.startswith("_"))
    if unknown:
        raise PolypatchError(f"unknown arguments of an SPFormer: {', '.join(unknown)}")
    for name, allowed in _ONLY.items():
        if name in config and config[name] not in allowed:
            raise PolypatchError(
                f"{name}={config[name]!r} is not part of SPFormer; it has {allowed[0]!r}"
            )
    if (config.get("sp_kwargs") or {}).get("return_similarities_final"):
        raise PolypatchError(
            "return_similarities_final=True compares pixels and superpixels of unequal width"
        )
    dims, cells = set(config["dims"]), set(config["sp_sizes"])
    crossing, heads = set(config["sp_heads"]), set(config["heads"])
    if max(len(dims), len(cells), len(crossing), len(heads)) > 1:
        raise PolypatchError("SPFormer's stages share dims, heads, sp_sizes and sp_heads")
    if set(config.get("strides", (1,))) != {1}:
        raise PolypatchError("SPFormer's stages keep the stride: strides are 1")
    if set(config.get("sp_features_init_methods", ("from_feature",))) != {"from_feature"}:
        raise PolypatchError("SPFormer's stages start from features (sp_features_init_methods)")
    stem = zip(
        config["stem_channels_list"],
        config["stem_kernel_sizes"],
        config["stem_strides"],
        [_translated("stem_conv_types", kind, _KINDS) for kind in config["stem_conv_types"]],
        strict=True,
    )
    variant = Variant(
        stem=tuple(StemLayer(*row) for row in stem),
        dim=dims.pop(),
        heads=heads.pop(),
        cross_heads=crossing.pop(),
        depths=tuple(config["depths"]),
        iterations=config["sp_iter"],
        cell=cells.pop(),
        init=_translated("sp_global_init_method", config["sp_global_init_method"], _KINDS),
        position=_translated(
            "sp_position_embedding_method", config["sp_position_embedding_method"], _POSITIONS
        ),
        norm="batch" if config.get("stem_as_stored") else "layer",
    )
    image = config["img_size"]
    height, width = (image, image) if isinstance(image, int) else image
    pixel_table = config.get("sp_position_embedding_stride", -1)
    superpixel_table = config.get("sp_sp_position_embedding_stride") or pixel_table
    return assemble(
        variant,
        classes=config.get("num_classes", 1000),
        grid=(height // variant.patch, width // variant.patch),
        channels=config.get("in_channels", 3),
        segmentation=config["seg_num_classes"] if config.get("seg_specific_classifier") else 0,
        drop_path=config.get("drop_path_rate", 0.0),
        gamma=config.get("sp_ls_init_value", 1e-5),
        handover_gamma=config.get("ls_init_value", 1e-5),
        class_token=config.get("class_token_position_method", "none") == "last_stage",
        positioned_class=not config.get("no_embed_class", False),
        positions=config.get("pos_embed_position_method", "every_stage") == "every_stage",
        activated_handover=config.get("sp_project_method", "noact") == "act",
        carries_pixels=bool(config.get("use_middle_pixel_features", False)),
        pixel_view=bool(config.get("use_pixel_similarities", False)),
        fixed_pixels=config.get("sp_pixel_features_update_method", "residual") == "fixed",
        table_strides=(max(1, pixel_table), max(1, superpixel_table)),
    )


def read(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> SPFormer:
    """See :func:`polypatch.patching.spformer.from_official`."""
    found = recognise_network({name: tuple(value.shape) for name, value in state.items()}) or {}
    model = assemble_official({**found, **config})
    renamed, names = _renamed(state)
    for name in [n for n in renamed if n.endswith("position.table")]:
        stage = model.stages[min(int(name.split(".")[1]), len(model.stages) - 1)]
        position: LearnedPosition | None = stage.position  # type: ignore[assignment]
        if position is None:
            raise PolypatchError(
                f"these weights have {names[name]}, the configuration no positions"
            )
        rows, grid = renamed[name], position.table.shape[1:3]
        count = math.prod(grid)
        if rows.shape[1] == count + 1:
            front = name.replace("position.table", "prefix.position")
            renamed[front], names[front] = rows[:, :1], names[name]
            rows = rows[:, 1:]
        if rows.shape[1] != count:
            raise PolypatchError(
                f"a position table of {rows.shape[1]} rows does not fit {count} superpixels"
            )
        renamed[name] = rows.unflatten(1, grid)
    what = "the SPFormer of that configuration"
    load_exactly(model, _linear(model, renamed), what=what, names=names)
    return model.eval()


def read_layer(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> SuperpixelCrossAttention:
    """See :func:`polypatch.patching.spformer.layer_from_official`."""
    pixel, superpixel = config["pixel_qkv_channels"], config["sp_qkv_channels"]
    pairs = (
        (superpixel[0], pixel[1]),
        (pixel[0], superpixel[1]),
        (pixel[2], config["in_channels_sp"]),
        (superpixel[2], config["in_channels_pixel"]),
    )
    if any(a != b for a, b in pairs):
        raise PolypatchError(f"widths {pixel} of pixels don't pair with {superpixel}")
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    tables = None
    if "pixel_pos_embed" in shapes:
        pixels, supers = shapes["pixel_pos_embed"], shapes["sp_pos_embed"]
        tables = ((pixels[2], pixels[3]), (supers[2], supers[3]))
    layer = SuperpixelCrossAttention(
        pixel_dim=config["in_channels_pixel"],
        superpixel_dim=config["in_channels_sp"],
        heads=config.get("num_heads_sp", 1),
        pixel_heads=config.get("num_heads_pixel", 1),
        update_width=superpixel[0],
        assign_width=pixel[0],
        position=_translated(
            "position_embedding_method",
            config.get("position_embedding_method", "none"),
            _POSITIONS,
        ),
        gamma=config.get("ls_init_value"),
        updates_pixels=config.get("pixelify", True),
        compares_pixels=config.get("always_return_similarity_pixel", False),
        tables=tables,
    )
    # Their patterns begin at the dot behind the layer's own name.
    renamed, names = _renamed({f".{name}": value for name, value in state.items()})
    renamed = {name[1:]: value for name, value in renamed.items()}
    names = {ours[1:]: theirs[1:] for ours, theirs in names.items()}
    load_exactly(
        layer, _linear(layer, renamed), what="the layer of that configuration", names=names
    )
    return layer.eval()


def _renamed(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by our names, and the authors' name of each."""
    renamed: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, value in state.items():
        kind = "conv" if value.ndim == 4 else "norm"
        ours = re.sub(r"^(stem\.conv_layers\.\d+|sp_init)\.\d+\.", rf"\1.{kind}.", name)
        for theirs, replacement in NAMES.items():
            ours = re.sub(theirs, replacement, ours)
        if ours in names:
            raise PolypatchError(f"{names[ours]} and {name} are the same weight of an SPFormer")
        renamed[ours], names[ours] = value, name
    return renamed, names


def _linear(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convolutions that are linear maps here: 1 × 1 ones on channels-last features, cell-sized ones
    on (row, column, channel), the order of the pixels of a cell."""
    flat = {name for name, value in model.state_dict().items() if value.ndim == 2}
    return {
        name: value.permute(0, 2, 3, 1).flatten(1) if name in flat and value.ndim == 4 else value
        for name, value in state.items()
    }


def recognise_network(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """See :func:`polypatch.patching.spformer.recognise`."""
    if "stages.0.patch_embed.blocks.0._sp_qkv.conv.weight" not in shapes:
        return None

    def count(pattern: str) -> int:
        found = [int(m[1]) for name in shapes if (m := re.match(pattern, name))]
        return 1 + max(found, default=-1)

    stem_names = [
        f"stem.conv_layers.{i}.0.weight" for i in range(count(r"stem\.conv_layers\.(\d+)"))
    ]
    stem = [shapes[name] for name in stem_names if name in shapes]
    if not stem:
        return None
    dim = shapes["stages.0.patch_embed.blocks.0._sp_qkv.conv.weight"][1]
    stages = count(r"stages\.(\d+)\.")
    kernels = [shape[-1] for shape in stem]
    strides = [2 if kernel == 3 else kernel for kernel in kernels]
    init = "lift_avgpool"
    if "sp_init.1.weight" in shapes and len(shapes["sp_init.1.weight"]) == 4:
        init = "avgpool_lift"
    elif shapes.get("sp_init.0.weight", (0,))[-1] > 1:
        init = "conv"
    last = f"stages.{stages - 1}."
    class_token = f"{last}cls_token" in shapes
    rows = shapes.get("stages.0.pos_embed", (1, 196, dim))[1]
    if class_token and stages == 1 and math.isqrt(rows) ** 2 != rows:
        rows -= 1
    cell = shapes["sp_init.0.weight"][-1] if init == "conv" else 4
    side = math.isqrt(rows) * cell * math.prod(strides)
    layer = "stages.0.patch_embed.blocks.0."
    position = "learnable" if f"{layer}sp_pos_embed" in shapes else "none"
    if f"{layer}sp_pos_conv.weight" in shapes:
        position = "depthwise"
    iterations = count(r"stages\.0\.patch_embed\.blocks\.(\d+)\.")
    final = f"stages.0.patch_embed.blocks.{iterations - 1}.pixel_ls1.gamma"
    segmentation = shapes.get("seg_head.weight", shapes.get("seg_head_conv.weight"))
    config: dict[str, Any] = {
        "img_size": [side, side],
        "in_channels": stem[0][1],
        "num_classes": shapes.get("head.weight", (0,))[0],
        "stem_channels_list": [shape[0] for shape in stem],
        "stem_kernel_sizes": kernels,
        "stem_strides": strides,
        "stem_conv_types": ["conv"] * len(stem),
        "depths": [count(rf"stages\.{i}\.blocks\.(\d+)\.") for i in range(stages)],
        "dims": [dim] * stages,
        "heads": [max(1, dim // 64)] * stages,
        "sp_sizes": [cell] * stages,
        "sp_heads": [3 if dim == 768 else 2] * stages,
        "sp_iter": iterations,
        "sp_global_init_method": init,
        "sp_position_embedding_method": position,
        "ls_init_value": 1e-5 if stages == 1 or "stages.0.pixel_delta_ls.gamma" in shapes else None,
        "sp_ls_init_value": 1e-5 if f"{layer}sp_ls1.gamma" in shapes else None,
        "class_token_position_method": "last_stage" if class_token else "none",
        "pos_embed_position_method": "every_stage" if "stages.0.pos_embed" in shapes else "none",
        "use_middle_pixel_features": stages > 1 and final in shapes,
        "stem_as_stored": "stem.conv_layers.0.1.running_mean" in shapes,
    }
    if class_token:
        first = shapes.get("stages.0.pos_embed", (1, 0, 0))[1]
        own = shapes.get(f"{last}pos_embed", (1, 0, 0))[1]
        config["no_embed_class"] = own == (first if stages > 1 else rows)
    if segmentation is not None:
        kind = "Conv" if "seg_head_conv.weight" in shapes else "Linear"
        config |= {"seg_specific_classifier": kind, "seg_num_classes": segmentation[0]}
    return config
