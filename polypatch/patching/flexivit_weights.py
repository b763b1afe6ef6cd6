"""Weights of FlexiViT as flax keeps them: its names and layouts ↔ ours.

Kernels are HWIO and (in, out); attention has an axis for the heads and keeps queries, keys and
values apart; one table holds the positions in raster order. All of that are views of our tensors
(:func:`flax_views`), so one function serves both directions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import PolypatchError
from ..hosts import ViT
from ..hosts.layouts import rename
from ..nn import check_fit
from .flexivit import assemble

__all__ = ["flax_views", "read", "recognise_network"]

#: flax names → ours. ``#q``, ``#k``, ``#v`` are parts of our stacked projections.
FLAX = {
    "embedding": "patching.proj",
    "Transformer.encoderblock_{i}.LayerNorm_0": "blocks.{i}.norm1",
    "Transformer.encoderblock_{i}.MultiHeadDotProductAttention_0.query": "blocks.{i}.mixing.qkv#q",
    "Transformer.encoderblock_{i}.MultiHeadDotProductAttention_0.key": "blocks.{i}.mixing.qkv#k",
    "Transformer.encoderblock_{i}.MultiHeadDotProductAttention_0.value": "blocks.{i}.mixing.qkv#v",
    "Transformer.encoderblock_{i}.MultiHeadDotProductAttention_0.out": "blocks.{i}.mixing.proj",
    "Transformer.encoderblock_{i}.LayerNorm_1": "blocks.{i}.norm2",
    "Transformer.encoderblock_{i}.MlpBlock_0.Dense_0": "blocks.{i}.mlp.fc1",
    "Transformer.encoderblock_{i}.MlpBlock_0.Dense_1": "blocks.{i}.mlp.fc2",
    "Transformer.encoder_norm": "norm",
    "MAPHead_0.probe": "pooling.query",
    "MAPHead_0.MultiHeadDotProductAttention_0.query": "pooling.q",
    "MAPHead_0.MultiHeadDotProductAttention_0.key": "pooling.kv#k",
    "MAPHead_0.MultiHeadDotProductAttention_0.value": "pooling.kv#v",
    "MAPHead_0.MultiHeadDotProductAttention_0.out": "pooling.proj",
    "MAPHead_0.LayerNorm_0": "pooling.norm",
    "MAPHead_0.MlpBlock_0.Dense_0": "pooling.mlp.fc1",
    "MAPHead_0.MlpBlock_0.Dense_1": "pooling.mlp.fc2",
    "head": "head",
    "cls": "prefix.tokens",
    "pos_embedding": "position.table",
}


def read(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> ViT:
    """See :func:`polypatch.patching.flexivit.from_official`."""
    state = _plain(state)
    _, unknown = rename(state, FLAX)
    if unknown:
        raise PolypatchError(f"keys that no FlexiViT has: {', '.join(unknown[:8])}")
    inferred = recognise_network({name: tuple(value.shape) for name, value in state.items()})
    host = assemble({**(inferred or {}), **config})
    views = flax_views(host)
    check_fit(views, state, what="the FlexiViT of that configuration")
    for name, view in views.items():
        view.copy_(state[name])
    return host.eval()


def flax_views(host: ViT) -> dict[str, Tensor]:
    """Every weight of the host by its flax name, as a view in flax's layout: what is written there
    is written into the host."""
    state = host.state_dict()
    heads = host.blocks[0].mixing.heads  # type: ignore[union-attr]
    out: dict[str, Tensor] = {}
    for theirs, ours in FLAX.items():
        stem, _, mark = ours.partition("#")
        numbers = range(len(host.blocks)) if "{i}" in ours else [0]
        for i in numbers:
            name, key = stem.replace("{i}", str(i)), theirs.replace("{i}", str(i))
            if name in state:  # no weight and bias: tokens and positions
                value = state[name]
                out[key] = value.flatten(1, 2) if name == "position.table" else value
                continue
            for suffix in ("weight", "bias"):
                value = state.get(f"{name}.{suffix}")
                if value is None:
                    continue
                if mark:
                    order = "qkv" if name.endswith("qkv") else "kv"
                    value = value.chunk(len(order))[order.index(mark)]
                attention = "MultiHead" in key
                if value.ndim == 4:
                    value = value.permute(2, 3, 1, 0)
                elif suffix == "weight" and value.ndim == 2:
                    value = value.T
                    if attention and key.endswith("out"):
                        value = value.unflatten(0, (heads, -1))
                    elif attention:
                        value = value.unflatten(1, (heads, -1))
                elif attention and suffix == "bias" and not key.endswith("out"):
                    value = value.unflatten(0, (heads, -1))
                norm = "Norm" in key or "norm" in key
                label = "bias" if suffix == "bias" else "scale" if norm else "kernel"
                out[f"{key}.{label}"] = value
    return out


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Names as the model has them: files may put "params" in front."""
    return {re.sub(r"^params[./]", "", name).replace("/", "."): v for name, v in state.items()}


def recognise_network(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """See :func:`polypatch.patching.flexivit.recognise`."""
    shapes = _plain(shapes)
    _, unknown = rename(shapes, FLAX)
    query = shapes.get("Transformer.encoderblock_0.MultiHeadDotProductAttention_0.query.kernel")
    kernel = shapes.get("embedding.kernel", ())
    if unknown or query is None or len(kernel) != 4:
        return None
    numbers = [int(m[1]) for n in shapes if (m := re.search(r"encoderblock_(\d+)\.", n))]
    config: dict[str, Any] = {
        "width": kernel[3],
        "depth": 1 + max(numbers),
        "mlp_dim": shapes["Transformer.encoderblock_0.MlpBlock_0.Dense_0.kernel"][1],
        "num_heads": query[1],
        "num_classes": shapes["head.kernel"][1] if "head.kernel" in shapes else 0,
        "patch_size": (kernel[0], kernel[1]),
        "pool_type": "tok" if "cls" in shapes else "map" if "MAPHead_0.probe" in shapes else "gap",
        "posemb": "learn" if "pos_embedding" in shapes else "sincos2d",
    }
    if "pos_embedding" in shapes:
        side = math.isqrt(shapes["pos_embedding"][1])
        config["posemb_size"] = (side, side)
    return config
