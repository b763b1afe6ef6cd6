"""The authors' names and arguments of :mod:`polypatch.backbones.rvsa`, both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..nn import KeyMap, Preprocessing, Rule
from ..nn.arguments import expansion
from .rvsa_attention import WindowAttention
from .rvsa_network import RVSA

__all__ = [
    "ARGUMENTS",
    "ASSUMED",
    "CLASSES",
    "from_official",
    "keymap",
    "network",
    "official_config",
    "recognise_network",
    "to_official",
]

#: the authors' classes: keys and values apart, ViTAE's blocks, dense maps
CLASSES: dict[str, tuple[bool, bool, bool]] = {
    f"{name}_Win_RVSA{task[0]}{diamond}{task[1]}": (bool(diamond), name != "ViT", bool(task[0]))
    for name in ("ViT", "ViTAE_NC")
    for diamond in ("", "_KVDIFF")
    for task in (("", ""), ("_V3", "_WSZ7"))
}

#: their arguments and defaults; the last three are said in their code: the MLP's width is ViTAE's,
#: window and epsilon have no argument
ARGUMENTS: dict[str, Any] = {
    "cls": "ViT_Win_RVSA",
    "img_size": 224,
    "patch_size": 16,
    "in_chans": 3,
    "num_classes": 80,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "qkv_bias": False,
    "qk_scale": None,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "hybrid_backbone": None,
    "init_values": None,
    "use_checkpoint": False,
    "checkpoint": False,
    "use_abs_pos_emb": False,
    "use_rel_pos_bias": False,  # this and the next two are never read by their networks
    "use_shared_rel_pos_bias": False,
    "restart_regression": True,
    "out_indices": (11,),
    "interval": 3,
    "pretrained": None,
    "class_token": False,
    "norm_layer": None,
    "mlp_hidden_dim": None,
    "window_size": 7,
    "norm_eps": 1e-6,
}

#: what no shape tells
ASSUMED = ("img_size", "init_values", "out_indices")

#: parts of the authors' whole detectors and segmentation networks
OTHERS = ("neck.", "rpn_head.", "roi_head.", "decode_head.", "auxiliary_head.")


def keymap(model: RVSA) -> KeyMap:
    """The authors' names of this network's tensors."""
    b, o = "blocks.{i}", "blocks.{i}.attention"
    sets = ("_k", "_v") if model.separate else ("",)
    moves = [f"{b}.attn.sampling_{part}{which}.2" for which in sets
             for part in ("offsets", "scales", "angles")]  # fmt: skip
    if model.pyramid is not None and model.pyramid.finest == 2:
        pyramid = [("fpn1.0", "pyramid.up2")]
    else:
        pyramid = [
            ("fpn1.0", "pyramid.up4_first"),
            ("fpn1.1.ln", "pyramid.up4_norm"),
            ("fpn1.3", "pyramid.up4_second"),
            ("fpn2.0", "pyramid.up2"),
        ]
    return KeyMap(
        [
            ("patch_embed.proj", "stem"),
            ("pos_embed", "position"),
            (f"{b}.norm1", f"{b}.norm1"),
            (f"{b}.norm2", f"{b}.norm2"),
            (f"{b}.attn.qkv", f"{o}.qkv"),
            (f"{b}.attn.q_bias", f"{o}.q_bias"),
            (f"{b}.attn.v_bias", f"{o}.v_bias"),
            (f"{b}.attn.proj", f"{o}.proj"),
            (f"{b}.attn.rel_pos_h", f"{o}.rel_height"),
            (f"{b}.attn.rel_pos_w", f"{o}.rel_width"),
            (f"{b}.attn.relative_position_bias_table", f"{o}.table"),
            Rule(
                tuple(moves),
                f"{o}.sample",
                (2, 2, 1) * len(sets),
                to_ours=lambda w: w.flatten(1) if w.ndim == 4 else w,
                to_theirs=lambda w: w[:, :, None, None] if w.ndim == 2 else w,
            ),
            (f"{b}.mlp.fc1", f"{b}.fc1"),
            (f"{b}.mlp.fc2", f"{b}.fc2"),
            (f"{b}.gamma_1", f"{b}.gamma1"),
            (f"{b}.gamma_2", f"{b}.gamma2"),
            (f"{b}.PCM.0", f"{b}.local.conv1"),
            (f"{b}.PCM.1", f"{b}.local.norm"),
            (f"{b}.PCM.3", f"{b}.local.conv2"),
            *pyramid,
            ("norm", "norm"),
            ("head", "head"),
        ],
        unused=[f"{b}.attn.relative_position_index"],
    )


def encoder_of(names: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's part of a whole detector or segmentation network, else everything."""
    if not any(name.startswith("backbone.blocks.") for name in names):
        return dict(names)
    return {
        name.removeprefix("backbone."): value
        for name, value in names.items()
        if not name.startswith(OTHERS)
    }


def recognise_network(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """See :func:`polypatch.backbones.rvsa.recognise`."""
    first = "blocks.0.attn."
    detector = any(name.startswith(("rpn_head.", "roi_head.")) for name in shapes)
    shapes = encoder_of(shapes)
    detector |= "blocks.0.PCM.0.weight" in shapes and f"{first}qkv.bias" in shapes
    separate = f"{first}sampling_offsets_k.2.weight" in shapes
    angles = shapes.get(f"{first}sampling_angles{'_k' if separate else ''}.2.weight")
    fc1, stem = shapes.get("blocks.0.mlp.fc1.weight"), shapes.get("patch_embed.proj.weight")
    window = shapes.get(f"{first}rel_pos_h")
    if angles is None or fc1 is None or window is None or stem is None or len(stem) != 4:
        return None
    depth = 0
    while f"blocks.{depth}.norm1.weight" in shapes:
        depth += 1
    moving = "sampling_offsets" + ("_k" if separate else "")
    interval = next(
        (i for i in range(depth) if f"blocks.{i}.attn.{moving}.2.weight" not in shapes), depth
    ) + 1  # fmt: skip
    dense, local = "fpn1.0.weight" in shapes, shapes.get("blocks.0.PCM.0.weight")
    full = shapes.get(f"blocks.{interval - 1}.attn.rel_pos_h")
    table, patch = shapes.get("pos_embed"), stem[-1]
    rows = full[0] // 2 + 1 if full else math.isqrt(table[1]) if table else 224 // patch
    cells = table[1] - (not dense) if table else rows * rows
    columns = cells // rows
    ratio = expansion((local[0] if local else fc1[0], stem[0]))
    taps = tuple(depth * k // 12 - 1 for k in (4, 6, 8, 12))
    return {
        "cls": f"ViT{'AE_NC' if local else ''}_Win_RVSA{'_V3' if dense else ''}"
        f"{'_KVDIFF' if separate else ''}{'_WSZ7' if dense else ''}",
        "img_size": rows * patch if rows == columns else (rows * patch, columns * patch),
        "patch_size": patch,
        "in_chans": stem[1],
        "num_classes": shapes.get("head.weight", (0,))[0],
        "embed_dim": stem[0],
        "depth": depth,
        "num_heads": angles[0],
        "mlp_ratio": ratio,
        "qkv_bias": f"{first}qkv.bias" in shapes or f"{first}q_bias" in shapes,
        "init_values": 0.1 if "blocks.0.gamma_1" in shapes else None,
        "use_abs_pos_emb": table is not None,
        "out_indices": taps if dense and not detector else (depth - 1,),
        "interval": interval,
        "mlp_hidden_dim": fc1[0] if local and fc1[0] != local[0] else None,
        "window_size": window[0] // 2 + 1,
    }


def network(config: Mapping[str, Any]) -> RVSA:
    """An unfilled network by the authors' arguments (:data:`ARGUMENTS`), ``cls`` being one of their
    classes. Of the classes for dense tasks, ``out_indices`` of four blocks makes the network for
    segmentation, another that for detection; ``num_classes`` gives them a classifier, too, which
    theirs lack: none unless it is said.

    Raises:
        PolypatchError: an unknown class or argument, and what there is no network for.
    """
    for key in config:
        if key not in ARGUMENTS:
            raise PolypatchError(f"RVSA has no argument {key!r}{suggest(key, ARGUMENTS)}")
    given = ARGUMENTS | dict(config)
    if given["cls"] not in CLASSES:
        hint = suggest(given["cls"], CLASSES, kind="classes")
        raise PolypatchError(f"there is no class {given['cls']!r}{hint}")
    for key in ("hybrid_backbone", "norm_layer"):
        if given[key] is not None:
            raise PolypatchError(f"{key} is a module of theirs, which this network can't take")
    if given["class_token"]:
        raise PolypatchError("windows have no place for a class token: class_token=True")
    separate, local, dense = CLASSES[given["cls"]]
    side, patch = given["img_size"], given["patch_size"]
    height, width = (side, side) if isinstance(side, int) else side
    taps = tuple(index + 1 for index in given["out_indices"])
    pyramid = "none" if not dense else "stages" if len(taps) == 4 else "last"
    model = RVSA(
        dim=given["embed_dim"],
        depth=given["depth"],
        heads=given["num_heads"],
        patch=patch,
        resolution=(height, width),
        window=given["window_size"],
        interval=given["interval"],
        separate=separate,
        local=local,
        mlp_ratio=given["mlp_ratio"],
        hidden=given["mlp_hidden_dim"],
        bias=given["qkv_bias"],
        key_bias=pyramid == "last",
        scale=given["qk_scale"],
        absolute=given["use_abs_pos_emb"],
        spare_row=not dense,
        layer_scale=given["init_values"],
        pyramid=pyramid,
        taps=taps if pyramid == "stages" else None,
        finest=2 if pyramid == "stages" and patch == 8 else 4,
        classes=config.get("num_classes", 0 if dense else given["num_classes"]),
        channels=given["in_chans"],
        dropout=given["drop_rate"],
        attention_dropout=given["attn_drop_rate"],
        drop_path=given["drop_path_rate"],
        eps=given["norm_eps"],
        preprocessing=Preprocessing(resolution=height, crop=1.0 if dense else 0.875),
    )
    return model.checkpointed(given["use_checkpoint"] or given["checkpoint"])


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> RVSA:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode; of a
    whole detector or segmentation network, its encoder.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    model = network(config)
    keymap(model).load(model, encoder_of(state), what="this RVSA")
    return model.eval()


def to_official(model: RVSA) -> dict[str, Tensor]:
    """The state dict under the authors' keys, with the index of cell pairs that theirs hold."""
    theirs = keymap(model).to_theirs(model.state_dict())
    for number, block in enumerate(model.blocks):
        if isinstance(block.attention, WindowAttention):
            place = torch.arange(model.window)
            offset = place[:, None] - place + model.window - 1
            index = offset[:, None, :, None] * (2 * model.window - 1) + offset[None, :, None, :]
            theirs[f"blocks.{number}.attn.relative_position_index"] = index.reshape(
                model.window**2, model.window**2
            )
    return theirs


def official_config(model: RVSA) -> dict[str, Any]:
    """The arguments of :func:`network` that build this network."""
    dense = model.pyramid is not None
    found = (model.separate, model.has_local, dense)
    height, width = model.resolution
    depth = len(model.blocks)
    stages = [tap - 1 for tap in model.taps] if model.pyramid_kind == "stages" else [depth - 1]
    return {
        "cls": next(name for name, kind in CLASSES.items() if kind == found),
        "img_size": height if height == width else (height, width),
        "patch_size": model.patch,
        "in_chans": model.stem.in_channels,
        "num_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "embed_dim": model.dim,
        "depth": depth,
        "num_heads": model.heads,
        "mlp_ratio": model.mlp_ratio,
        "qkv_bias": model.bias,
        "qk_scale": model.scale,
        "drop_rate": model.dropout,
        "attn_drop_rate": model.attention_dropout,
        "drop_path_rate": model.drop_path,
        "init_values": model.layer_scale,
        "use_abs_pos_emb": model.position is not None,
        "out_indices": tuple(stages),
        "interval": model.interval,
        "mlp_hidden_dim": model.hidden,
        "window_size": model.window,
        "norm_eps": model.eps,
    }
