"""The authors' names and settings of :mod:`polypatch.backbones.mvit`, both ways."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..nn import KeyMap, Preprocessing, Rule
from .mvit_attention import BlockShape, Grid, Pooling, kernel_of
from .mvit_network import KINETICS, Block, MViT, plan

__all__ = [
    "ASSUMED",
    "from_official",
    "keymap",
    "network",
    "official_config",
    "recognise_network",
    "to_official",
]


def keymap(*, separate_qkv: bool = False) -> KeyMap:
    """The authors' names. Their image networks hold pooling kernels of two or of three axes."""
    b, o = "blocks.{i}", "blocks.{i}.attention"

    def kernels(theirs: tuple[str, ...], ours: str) -> Rule:
        return Rule(
            tuple(f"{b}.attn.{name}" for name in theirs),
            f"{o}.{ours}.conv",
            (1,) * len(theirs),
            to_ours=lambda w: w.unsqueeze(2) if w.ndim == 4 else w,
        )

    qkv = ("q", "k", "v") if separate_qkv else ("qkv",)
    return KeyMap(
        [
            ("patch_embed.proj", "stem"),
            ("cls_token", "class_token"),
            ("pos_embed", "position.joint"),
            ("pos_embed_spatial", "position.space"),
            ("pos_embed_temporal", "position.time"),
            ("pos_embed_class", "position.first"),
            ("norm_stem", "norm_patches"),
            (f"{b}.norm1", f"{b}.norm1"),
            (f"{b}.norm2", f"{b}.norm2"),
            Rule(tuple(f"{b}.attn.{n}" for n in qkv), f"{o}.qkv", (1,) * len(qkv)),
            (f"{b}.attn.proj", f"{o}.proj"),
            kernels(("pool_q",), "pool_q"),
            kernels(("pool_k", "pool_v"), "pool_kv"),
            (f"{b}.attn.norm_q", f"{o}.pool_q.norm"),
            Rule((f"{b}.attn.norm_k", f"{b}.attn.norm_v"), f"{o}.pool_kv.norm", (1, 1)),
            (f"{b}.attn.rel_pos_t", f"{o}.rel_time"),
            (f"{b}.attn.rel_pos_h", f"{o}.rel_height"),
            (f"{b}.attn.rel_pos_w", f"{o}.rel_width"),
            (f"{b}.mlp.fc1", f"{b}.fc1"),
            (f"{b}.mlp.fc2", f"{b}.fc2"),
            (f"{b}.proj", f"{b}.widen"),
            ("norm", "norm"),
            ("head.projection", "head"),
        ]
    )


#: what no shape tells
ASSUMED = (
    "DATA.NUM_FRAMES",
    "DATA.TRAIN_CROP_SIZE",
    "MVIT.MLP_RATIO",
    "MVIT.MODE",
    "MVIT.NUM_HEADS",
    "MVIT.HEAD_MUL",
    "MVIT.PATCH_PADDING",
    "MVIT.PATCH_STRIDE",
    "MVIT.POOL_FIRST",
    "MVIT.POOL_KVQ_KERNEL",
    "MVIT.POOL_KV_STRIDE",
    "MVIT.POOL_Q_STRIDE",
    "MVIT.RESIDUAL_POOLING",
    "MVIT.SEPARATE_QKV",
)

#: settings of the authors' networks and their defaults
DEFAULTS: dict[str, Any] = {
    "DATA.INPUT_CHANNEL_NUM": [3],
    "DATA.MEAN": None,
    "DATA.NUM_FRAMES": 8,
    "DATA.STD": None,
    "DATA.TEST_CROP_SIZE": None,
    "DATA.TRAIN_CROP_SIZE": 224,
    "MODEL.ACT_CHECKPOINT": False,
    "MODEL.DROPOUT_RATE": 0.5,
    "MODEL.HEAD_ACT": "softmax",
    "MODEL.NUM_CLASSES": 400,
    "MVIT.CLS_EMBED_ON": True,
    "MVIT.DEPTH": 16,
    "MVIT.DIM_MUL": [],
    "MVIT.DIM_MUL_IN_ATT": False,
    "MVIT.DROPOUT_RATE": 0.0,
    "MVIT.DROPPATH_RATE": 0.1,
    "MVIT.EMBED_DIM": 96,
    "MVIT.HEAD_INIT_SCALE": 1.0,
    "MVIT.HEAD_MUL": [],
    "MVIT.LAYER_SCALE_INIT_VALUE": 0.0,  # never read by their network
    "MVIT.MLP_RATIO": 4.0,
    "MVIT.MODE": "conv",
    "MVIT.NORM": "layernorm",
    "MVIT.NORM_STEM": False,
    "MVIT.NUM_HEADS": 1,
    "MVIT.PATCH_2D": False,
    "MVIT.PATCH_KERNEL": [3, 7, 7],
    "MVIT.PATCH_PADDING": [2, 4, 4],
    "MVIT.PATCH_STRIDE": [2, 4, 4],
    "MVIT.POOL_FIRST": False,
    "MVIT.POOL_KVQ_KERNEL": None,
    "MVIT.POOL_KV_STRIDE": [],
    "MVIT.POOL_KV_STRIDE_ADAPTIVE": None,
    "MVIT.POOL_Q_STRIDE": [],
    "MVIT.QKV_BIAS": True,
    "MVIT.REL_POS_SPATIAL": False,
    "MVIT.REL_POS_TEMPORAL": False,
    "MVIT.REL_POS_ZERO_INIT": False,
    "MVIT.RESIDUAL_POOLING": False,
    "MVIT.SEPARATE_QKV": False,
    "MVIT.SEP_POS_EMBED": False,
    "MVIT.USE_ABS_POS": True,
    "MVIT.USE_FIXED_SINCOS_POS": False,
    "MVIT.USE_MEAN_POOLING": False,
    "MVIT.ZERO_DECAY_POS_CLS": True,
}

#: settings that make another paper's network of theirs, with the only value that is taken here
FIXED: dict[str, Any] = {
    "CONTRASTIVE.NUM_MLP_LAYERS": 1,
    "DETECTION.ENABLE": False,
    "MASK.ENABLE": False,
    "MODEL.DETACH_FINAL_FC": False,
    "MODEL.MODEL_NAME": "MViT",
    "MVIT.NORM": "layernorm",
    "MVIT.REV.ENABLE": False,
}


def grid_of(values: Sequence[int]) -> Grid:
    """Theirs of two axes (image networks) or of three."""
    a, b, c = (1,) * (3 - len(values)) + tuple(int(v) for v in values)
    return a, b, c


def lists_of(blocks: Sequence[BlockShape], *, widen_in_attention: bool) -> dict[str, Any]:
    """The authors' lists from which :func:`plan` makes these blocks.

    Raises:
        PolypatchError: no such lists exist.
    """
    later = 0 if widen_in_attention else 1
    widths = {i + later: b.out / b.dim for i, b in enumerate(blocks) if b.out != b.dim}
    heads = {
        i: b.heads / a.heads for i, (a, b) in enumerate(itertools.pairwise(blocks), start=1)
        if b.heads != a.heads
    }  # fmt: skip
    queries = {i: b.queries for i, b in enumerate(blocks) if b.queries}
    keys = {i: b.keys for i, b in enumerate(blocks) if b.keys}
    pools = (*queries.values(), *keys.values())
    kernels = {pool.kernel for pool in pools}
    kernel = None
    if any(pool.kernel != kernel_of(pool.stride) for pool in pools):
        kernel = kernels.pop()
    made = plan(
        dim=blocks[0].dim,
        heads=blocks[0].heads,
        depth=len(blocks),
        dim_factors=widths,
        head_factors=heads,
        query_strides={i: pool.stride for i, pool in queries.items()},
        key_strides={i: pool.stride for i, pool in keys.items()},
        kernel=kernel,
        widen_in_attention=widen_in_attention,
    )
    if made != tuple(blocks):
        raise PolypatchError("no configuration of the authors' describes these blocks")
    return {
        "MVIT.DEPTH": len(blocks),
        "MVIT.DIM_MUL": [[i, factor] for i, factor in widths.items()],
        "MVIT.DIM_MUL_IN_ATT": widen_in_attention,
        "MVIT.EMBED_DIM": blocks[0].dim,
        "MVIT.HEAD_MUL": [[i, factor] for i, factor in heads.items()],
        "MVIT.NUM_HEADS": blocks[0].heads,
        "MVIT.POOL_KVQ_KERNEL": kernel and list(kernel),
        "MVIT.POOL_KV_STRIDE": [[i, *pool.stride] for i, pool in keys.items()],
        "MVIT.POOL_Q_STRIDE": [[i, *pool.stride] for i, pool in queries.items()],
    }


def recognise_network(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """See :func:`polypatch.backbones.mvit.recognise`."""
    depth = 0
    while f"blocks.{depth}.mlp.fc2.weight" in shapes:
        depth += 1
    parts = ("norm1", "attn.proj", "mlp.fc1")
    needed = {f"blocks.{i}.{part}.weight" for i in range(depth) for part in parts}
    patch = shapes.get("patch_embed.proj.weight", ())
    if not depth or len(patch) not in (4, 5) or not needed <= shapes.keys():
        return None
    pools = any(re.fullmatch(r"blocks\.\d+\.attn\.pool_[qkv]\.weight", n) for n in shapes)
    if not pools and "head.projection.weight" not in shapes:
        return None
    video, with_class = len(patch) == 5, "cls_token" in shapes

    def first(key: str) -> tuple[int, ...]:
        return shapes.get(f"blocks.0.{key}", ())

    kernel = grid_of(patch[2:])
    large = kernel[2] >= 8
    space = kernel[2] if large else 4
    stride = (2 if kernel[0] > 1 else 1, space, space)
    padding = (kernel[0] // 2, *(0 if large else k // 2 for k in kernel[1:]))

    time, side = 16 // stride[0] if video else 1, 224 // space
    joint, places = shapes.get("pos_embed"), shapes.get("pos_embed_spatial")
    if joint:
        cells = joint[1] - with_class
        times = [t for t in (range(1, cells + 1) if video else (1,)) if cells % t == 0
                 and math.isqrt(cells // t) ** 2 == cells // t]  # fmt: skip
        if not times:
            return None
        time = time if time in times else times[-1]
        side = math.isqrt(cells // time)
    elif places:
        side, time = math.isqrt(places[1]), shapes.get("pos_embed_temporal", (1, time))[1]
    else:
        side = (first("attn.rel_pos_h") or (2 * side - 1,))[0] // 2 + 1
        time = (first("attn.rel_pos_t") or (2 * time - 1,))[0] // 2 + 1
    try:
        blocks = _blocks_of(shapes, depth, video=video, large=large, side=side)
    except PolypatchError:
        return None
    return {
        "DATA.INPUT_CHANNEL_NUM": [patch[1]],
        "DATA.NUM_FRAMES": time * stride[0],
        "DATA.TRAIN_CROP_SIZE": side * space,
        "MODEL.NUM_CLASSES": shapes.get("head.projection.weight", (0,))[0],
        "MVIT.CLS_EMBED_ON": with_class,
        "MVIT.NORM_STEM": "norm_stem.weight" in shapes,
        "MVIT.PATCH_2D": not video,
        "MVIT.PATCH_KERNEL": list(patch[2:]),
        "MVIT.PATCH_PADDING": list(padding[not video :]),
        "MVIT.PATCH_STRIDE": list(stride[not video :]),
        "MVIT.QKV_BIAS": bool(first("attn.qkv.bias") or first("attn.q.bias")),
        "MVIT.REL_POS_SPATIAL": bool(first("attn.rel_pos_h")),
        "MVIT.REL_POS_TEMPORAL": bool(first("attn.rel_pos_t")),
        "MVIT.RESIDUAL_POOLING": bool(first("attn.rel_pos_h")),
        "MVIT.SEP_POS_EMBED": bool(places),
        "MVIT.USE_ABS_POS": bool(joint or places),
        **blocks,
    }


def _blocks_of(
    shapes: Mapping[str, tuple[int, ...]], depth: int, *, video: bool, large: bool, side: int
) -> dict[str, Any]:
    """The part of :func:`recognise_network` that is about blocks."""

    def of(key: str) -> list[tuple[int, ...]]:
        return [shapes.get(f"blocks.{i}.{key}", ()) for i in range(depth)]

    dims, inner = [s[0] for s in of("norm1.weight")], [s[0] for s in of("attn.proj.weight")]
    outs, hidden = [s[0] for s in of("mlp.fc2.weight")], [s[0] for s in of("mlp.fc1.weight")]
    widening = inner != dims
    before = dims if widening else [inner[0], *inner]
    starts = [i for i in range(depth) if inner[i] != before[i]]
    kernels = [[s[2:] for s in of(f"attn.pool_{n}.weight")] for n in ("q", "k")]
    norms = [a or b for a, b in zip(of("attn.norm_k.weight"), of("attn.norm_q.weight"))]
    mode, separate = "conv", bool(of("attn.q.weight")[0])
    if separate and len(set(dims)) > 1 and [(d,) for d in dims] == norms:
        mode = "conv_unshared"
    if starts and not any(kernels[0] + kernels[1]):
        mode, flat = "max", (3 if video else 1, 3, 3)
        kernels = [[flat if i in starts else () for i in range(depth)], [flat] * depth]

    # A head's width stands in its norm or in its relative positions, else it is the published one.
    heads = [{144: 2, 192: 3}.get(dims[0], 1)]
    for i, relative in enumerate(of("attn.rel_pos_h")):
        width = relative[1:] or (norms[i] if mode == "conv" else ())
        grown = heads[-1] * inner[i] // (inner[i - 1] if i else inner[0])
        heads.append(max(1, inner[i] // width[0]) if width else grown)

    kinds = {grid_of(k) for k in kernels[0] + kernels[1] if k}

    def pooling(kernel: tuple[int, ...], across: int) -> Pooling | None:
        if not kernel:
            return None
        a, b, c = (
            (max(k - 1, 1) for k in grid_of(kernel)) if len(kinds) > 1 else (1, across, across)
        )
        return Pooling(grid_of(kernel), (a, b, c))

    key_stride = (8 if video else 4) // (2 if large else 1)
    blocks: list[BlockShape] = []
    for i, relative in enumerate(of("attn.rel_pos_h")):
        likely = (2, 1) if i in starts else (1, 2)
        tables = {a: 2 * max(side // a, side // max(key_stride // a, 1)) - 1 for a in likely}
        across = next((a for a in likely if relative[:1] in ((), (tables[a],))), likely[0])
        side, key_stride = side // across, max(key_stride // across, 1)
        queries, keys = pooling(kernels[0][i], across), pooling(kernels[1][i], key_stride)
        blocks.append(BlockShape(dims[i], outs[i], heads[i + 1], queries, keys))

    ratio = hidden[0] / inner[0]
    for nice in (round(ratio, 2), round(ratio, 1)):
        ratio = nice if [int(n * nice) for n in inner] == hidden else ratio
    return {
        **lists_of(blocks, widen_in_attention=widening),
        "MVIT.MLP_RATIO": ratio,
        "MVIT.MODE": mode,
        "MVIT.POOL_FIRST": mode == "conv_unshared",
        "MVIT.SEPARATE_QKV": separate and mode != "conv_unshared",
    }


def network(config: Mapping[str, Any]) -> MViT:
    """An unfilled network by the authors' settings, as ``MVIT.EMBED_DIM``, with the defaults of
    their code; settings of data, training and testing that make no network are passed over.

    Raises:
        PolypatchError: an unknown ``MVIT.`` setting, or one of another paper's networks.
    """
    for key, only in FIXED.items():
        if config.get(key, only) != only:
            raise PolypatchError(f"{key}={config[key]!r} is no MViT of this library, only {only!r}")
    for key in config:
        if key.startswith("MVIT.") and key not in DEFAULTS and not key.startswith("MVIT.REV."):
            raise PolypatchError(f"MViT has no setting {key}{suggest(key, DEFAULTS)}")
    given = DEFAULTS | {k: v for k, v in config.items() if k in DEFAULTS}

    def of(name: str) -> Any:
        return given[f"MVIT.{name}"]

    def factors(name: str) -> dict[int, float]:
        return {int(i): float(factor) for i, factor in of(name)}

    def strides(name: str) -> dict[int, Grid]:
        return {int(i): grid_of(stride) for i, *stride in of(name)}

    channels = given["DATA.INPUT_CHANNEL_NUM"]
    if len(channels) != 1:
        raise PolypatchError(f"MViT has one pathway, DATA.INPUT_CHANNEL_NUM has {len(channels)}")
    position = "none"
    if of("USE_FIXED_SINCOS_POS"):
        if of("SEP_POS_EMBED") or not of("USE_ABS_POS"):
            raise PolypatchError(
                "MVIT.USE_FIXED_SINCOS_POS needs MVIT.USE_ABS_POS and no MVIT.SEP_POS_EMBED"
            )
        position = "sincos"
    elif of("USE_ABS_POS"):
        position = "separate" if of("SEP_POS_EMBED") else "joint"
    video, padding = not of("PATCH_2D"), grid_of(of("PATCH_PADDING"))
    adaptive, kernel = of("POOL_KV_STRIDE_ADAPTIVE"), of("POOL_KVQ_KERNEL")
    usual = KINETICS if video else Preprocessing()
    model = MViT(
        blocks=plan(
            dim=of("EMBED_DIM"),
            heads=of("NUM_HEADS"),
            depth=of("DEPTH"),
            dim_factors=factors("DIM_MUL"),
            head_factors=factors("HEAD_MUL"),
            query_strides=strides("POOL_Q_STRIDE"),
            key_strides=strides("POOL_KV_STRIDE"),
            first_key_stride=grid_of(adaptive) if adaptive else None,
            kernel=grid_of(kernel) if kernel else None,
            widen_in_attention=of("DIM_MUL_IN_ATT"),
        ),
        patch=Pooling(grid_of(of("PATCH_KERNEL")), grid_of(of("PATCH_STRIDE"))),
        patch_padding=padding if video else (0, *padding[1:]),
        video=video,
        frames=given["DATA.NUM_FRAMES"],
        resolution=given["DATA.TRAIN_CROP_SIZE"],
        channels=channels[0],
        classes=given["MODEL.NUM_CLASSES"],
        class_token=of("CLS_EMBED_ON"),
        position=position,
        relative_space=of("REL_POS_SPATIAL"),
        relative_time=of("REL_POS_TEMPORAL"),
        relative_zero=of("REL_POS_ZERO_INIT"),
        residual_pooling=of("RESIDUAL_POOLING"),
        widen_in_attention=of("DIM_MUL_IN_ATT"),
        mode=of("MODE"),
        pool_first=of("POOL_FIRST"),
        separate_qkv=of("SEPARATE_QKV"),
        mlp_ratio=of("MLP_RATIO"),
        qkv_bias=of("QKV_BIAS"),
        norm_patches=of("NORM_STEM"),
        mean_pooling=of("USE_MEAN_POOLING"),
        dropout=of("DROPOUT_RATE"),
        head_dropout=given["MODEL.DROPOUT_RATE"],
        head_scale=of("HEAD_INIT_SCALE"),
        head_activation=given["MODEL.HEAD_ACT"],
        drop_path=of("DROPPATH_RATE"),
        decay_positions=not of("ZERO_DECAY_POS_CLS"),
        preprocessing=replace(
            usual,
            resolution=given["DATA.TEST_CROP_SIZE"] or given["DATA.TRAIN_CROP_SIZE"],
            mean=tuple(given["DATA.MEAN"] or usual.mean),
            std=tuple(given["DATA.STD"] or usual.std),
        ),
    )
    return model.checkpointed(given["MODEL.ACT_CHECKPOINT"])


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> MViT:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    model = network(config)
    keymap(separate_qkv=model.separate_qkv).load(model, state, what="this MViT")
    return model.eval()


def to_official(model: MViT) -> dict[str, Tensor]:
    """The state dict under the authors' keys; pooling kernels with three axes."""
    return keymap(separate_qkv=model.separate_qkv).to_theirs(model.state_dict())


def official_config(model: MViT) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network.

    Raises:
        PolypatchError: blocks that the authors' settings can't describe.
    """
    skipped = not model.video
    position = model.position.kind if model.position is not None else "none"
    block = model.blocks[0]
    assert isinstance(block, Block)
    return {
        **lists_of(
            [b.shape for b in model.blocks if isinstance(b, Block)],
            widen_in_attention=model.widen_in_attention,
        ),
        "DATA.INPUT_CHANNEL_NUM": [model.stem.in_channels],
        "DATA.MEAN": list(model.preprocessing.mean),
        "DATA.NUM_FRAMES": model.frames,
        "DATA.STD": list(model.preprocessing.std),
        "DATA.TEST_CROP_SIZE": model.preprocessing.resolution,
        "DATA.TRAIN_CROP_SIZE": model.resolution,
        "MODEL.DROPOUT_RATE": model.head_dropout,
        "MODEL.HEAD_ACT": model.head_activation,
        "MODEL.NUM_CLASSES": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "MVIT.CLS_EMBED_ON": model.class_token is not None,
        "MVIT.DROPOUT_RATE": model.dropout,
        "MVIT.DROPPATH_RATE": model.drop_path,
        "MVIT.HEAD_INIT_SCALE": model.head_scale,
        "MVIT.MLP_RATIO": model.mlp_ratio,
        "MVIT.MODE": model.mode,
        "MVIT.NORM_STEM": model.norm_patches is not None,
        "MVIT.PATCH_2D": not model.video,
        "MVIT.PATCH_KERNEL": list(model.patch.kernel[skipped:]),
        "MVIT.PATCH_PADDING": list(model.patch_padding[skipped:]),
        "MVIT.PATCH_STRIDE": list(model.patch.stride[skipped:]),
        "MVIT.POOL_FIRST": model.pool_first,
        "MVIT.QKV_BIAS": block.attention.qkv.bias is not None,
        "MVIT.REL_POS_SPATIAL": block.attention.rel_height is not None,
        "MVIT.REL_POS_TEMPORAL": block.attention.rel_time is not None,
        "MVIT.REL_POS_ZERO_INIT": model.relative_zero,
        "MVIT.RESIDUAL_POOLING": model.residual_pooling,
        "MVIT.SEPARATE_QKV": model.separate_qkv and not model.pool_first,
        "MVIT.SEP_POS_EMBED": position == "separate",
        "MVIT.USE_ABS_POS": position != "none",
        "MVIT.USE_FIXED_SINCOS_POS": position == "sincos",
        "MVIT.USE_MEAN_POOLING": model.mean_pooling,
        "MVIT.ZERO_DECAY_POS_CLS": not model.decay_positions,
    }
