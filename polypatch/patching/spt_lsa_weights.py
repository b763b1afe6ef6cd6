"""Weights of *Vision Transformer for Small-Size Datasets*: the authors' keys and arguments → ours.

The key maps are data, theirs → ours (``{i}``: a block's number); keys that no map has are an error.
What their layout has otherwise: the plain patch embedding of ViT and CaiT is a linear map of
(row, column, channel), ours a convolution; one table holds the positions of class token and
patches; CaiT keeps the queries' projection apart; Swin's state holds index and mask buffers, which
follow from the sizes.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..hosts.layouts import rename
from ..nn import GridPatching, load_exactly
from ..nn.arguments import expansion, pair
from .spt_lsa_networks import cait, t2t, vit
from .spt_lsa_pyramids import pit, swin

__all__ = ["read", "recognise_network"]

# ---- keys --------------------------------------------------------------------------------------

#: A pre-norm block of ViT and PiT.
_BLOCK = {
    "0.norm": "norm1",
    "0.fn.scale": "mixing.inverse_temperature",
    "0.fn.to_qkv": "mixing.qkv",
    "0.fn.to_out.0": "mixing.proj",
    "1.norm": "norm2",
    "1.fn.net.0": "mlp.fc1",
    "1.fn.net.3": "mlp.fc2",
}

#: A block of CaiT; ``#q`` and ``#kv`` are parts of our stacked projection.
_CAIT_BLOCK = {
    "0.scale": "scale1.gamma",
    "0.fn.norm": "norm1",
    "0.fn.fn.scale": "mixing.inverse_temperature",
    "0.fn.fn.mix_heads_pre_attn": "mixing.mix_before",
    "0.fn.fn.mix_heads_post_attn": "mixing.mix_after",
    "0.fn.fn.to_q": "mixing.qkv#q",
    "0.fn.fn.to_kv": "mixing.qkv#kv",
    "0.fn.fn.to_out.0": "mixing.proj",
    "1.scale": "scale2.gamma",
    "1.fn.norm": "norm2",
    "1.fn.fn.net.0": "mlp.fc1",
    "1.fn.fn.net.3": "mlp.fc2",
}

#: A block of T2T and Swin.
_TIMM_BLOCK = {
    "norm1": "norm1",
    "attn.scale": "mixing.inverse_temperature",
    "attn.relative_position_bias_table": "mixing.relative_bias",
    "attn.qkv": "mixing.qkv",
    "attn.proj": "mixing.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}

_POSITIONS = "position#table"

#: Buffers of Swin that follow from its sizes.
_DERIVED = re.compile(r"\.(attn_mask|relative_position_index)$")


def _inside(theirs: str, ours: str, table: Mapping[str, str]) -> dict[str, str]:
    return {f"{theirs}.{key}": f"{ours}.{value}" for key, value in table.items()}


def _spt(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.merging.1": f"{ours}.norm", f"{theirs}.merging.2": f"{ours}.proj"}


_VIT = {
    "pos_embedding": _POSITIONS,
    "cls_token": "prefix.tokens",
    "to_patch_embedding.1": "patching.proj",
    **_spt("to_patch_embedding", "patching"),
    **_inside("transformer.layers.{i}", "blocks.{i}", _BLOCK),
    "mlp_head.0": "norm",
    "mlp_head.1": "head",
}

_CAIT = {
    "pos_embedding": _POSITIONS,
    "cls_token": "pooling.token",
    "to_patch_embedding.1": "patching.proj",
    **_spt("to_patch_embedding.0", "patching"),
    **_inside("patch_transformer.layers.{i}", "blocks.{i}", _CAIT_BLOCK),
    **_inside("cls_transformer.layers.{i}", "pooling.blocks.{i}", _CAIT_BLOCK),
    "mlp_head.0": "pooling.norm",
    "mlp_head.1": "head",
}

_T2T = {
    "pos_embed": _POSITIONS,
    "cls_token": "prefix.tokens",
    **_inside("tokens_to_token.attention1", "patching.transformers.0", _TIMM_BLOCK),
    **_inside("tokens_to_token.attention2", "patching.transformers.1", _TIMM_BLOCK),
    "tokens_to_token.norm": "patching.norm",
    "tokens_to_token.project": "patching.project",
    **_inside("blocks.{i}", "blocks.{i}", _TIMM_BLOCK),
    "norm": "norm",
    "head": "head",
}

_PIT = {
    "pos_embedding": _POSITIONS,
    "cls_token": "prefix.tokens",
    "to_patch_embedding.0": "patching.proj",
    **_spt("to_patch_embedding", "patching"),
    "mlp_head.0": "norm",
    "mlp_head.1": "head",
}

_SWIN = {
    "absolute_pos_embed": _POSITIONS,
    "patch_embed.proj": "patching.proj",
    "patch_embed.norm": "patching.norm",
    **_spt("patch_embed", "patching"),
    "norm": "norm",
    "head": "head",
}


def _pit_keys(stages: int) -> dict[str, str]:
    """Stages and poolings take turns in one list of theirs."""
    table = dict(_PIT)
    for stage in range(stages):
        table |= _inside(f"layers.{2 * stage}.layers.{{i}}", f"stages.{stage}.{{i}}", _BLOCK)
        pooling, merge = f"layers.{2 * stage + 1}", f"merges.{stage}"
        table |= _spt(pooling, f"{merge}.spt") | {
            f"{pooling}.class_linear": f"{merge}.class_linear",
            f"{pooling}.cls_ff": f"{merge}.class_linear",
            f"{pooling}.downsample.net.0": f"{merge}.depthwise",
            f"{pooling}.downsample.net.1": f"{merge}.pointwise",
        }
    return table


def _swin_keys(stages: int) -> dict[str, str]:
    table = dict(_SWIN)
    for stage in range(stages):
        table |= _inside(f"layers.{stage}.blocks.{{i}}", f"stages.{stage}.{{i}}", _TIMM_BLOCK)
        merging, merge = f"layers.{stage}.downsample", f"merges.{stage}"
        table |= _spt(merging, f"{merge}.spt") | {
            f"{merging}.norm": f"{merge}.norm",
            f"{merging}.reduction": f"{merge}.proj",
        }
    return table


# ---- arguments ---------------------------------------------------------------------------------

_PARTS = {"is_LSA": False, "is_SPT": False}
_NEEDED = object()

#: The authors' classes: their arguments with their defaults.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ViT": dict.fromkeys(
        ("img_size", "patch_size", "num_classes", "dim", "depth", "heads", "mlp_dim_ratio"), _NEEDED
    )
    | dict(channels=3, dim_head=16, dropout=0.0, emb_dropout=0.0, stochastic_depth=0.0)
    | _PARTS,
    "CaiT": dict.fromkeys(("img_size", "patch_size", "num_classes"), _NEEDED)
    | dict(dim=192, depth=24, cls_depth=2, heads=4, mlp_dim=384, dim_head=64)
    | dict(dropout=0.0, emb_dropout=0.0, layer_dropout=0.0, stochastic_depth=0.0)
    | _PARTS,
    "PiT": dict.fromkeys(
        ("img_size", "patch_size", "num_classes", "dim", "depth", "heads", "mlp_dim_ratio"), _NEEDED
    )
    | dict(dim_head=64, dropout=0.0, emb_dropout=0.0, stochastic_depth=0.0)
    | _PARTS,
    "T2T_ViT": dict(img_size=224, in_chans=3, num_classes=1000, embed_dim=256, depth=12)
    | dict(num_heads=4, mlp_ratio=2.0, qkv_bias=False, qk_scale=None, token_dim=64)
    | dict(drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.0, norm_layer=None)
    | _PARTS,
    "SwinTransformer": dict(img_size=224, patch_size=4, in_chans=3, num_classes=1000)
    | dict(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7)
    | dict(mlp_ratio=4.0, qkv_bias=True, qk_scale=None, patch_norm=True, use_checkpoint=False)
    | dict(drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.1, norm_layer=None)
    | _PARTS,
}

#: The key that only this network's weights have.
_SIGNATURES = {
    "ViT": "transformer.layers.0.0.fn.to_qkv.weight",
    "CaiT": "patch_transformer.layers.0.0.fn.fn.to_q.weight",
    "PiT": "layers.0.layers.0.0.fn.to_qkv.weight",
    "T2T_ViT": "tokens_to_token.attention1.attn.qkv.weight",
    "SwinTransformer": "layers.0.blocks.0.attn.relative_position_bias_table",
}


def _grid(a: Mapping[str, Any], step: int) -> tuple[int, int]:
    height, width = pair(a["img_size"])
    return height // step, width // step


def _patch(a: Mapping[str, Any]) -> int:
    height, width = pair(a["patch_size"])
    if height != width:
        raise PolypatchError(f"patches of {height}×{width} are not square, which SPT needs")
    return height


def _each(value: Any, count: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * count


def _vit_numbers(a: Mapping[str, Any]) -> dict[str, Any]:
    patch = _patch(a)
    return dict(
        grid=_grid(a, patch),
        patch=patch,
        classes=a["num_classes"],
        dim=a["dim"],
        depth=a["depth"],
        heads=a["heads"],
        head_dim=a["dim_head"],
        hidden=int(a["dim"] * a["mlp_dim_ratio"]),
        channels=a["channels"],
        drop_path=a["stochastic_depth"],
        dropout=a["dropout"],
        embed_dropout=a["emb_dropout"],
    )


def _cait_numbers(a: Mapping[str, Any]) -> dict[str, Any]:
    patch = _patch(a)
    return dict(
        grid=_grid(a, patch),
        patch=patch,
        classes=a["num_classes"],
        dim=a["dim"],
        depth=a["depth"],
        class_depth=a["cls_depth"],
        heads=a["heads"],
        head_dim=a["dim_head"],
        hidden=a["mlp_dim"],
        drop_path=a["stochastic_depth"],
        dropout=a["dropout"],
        embed_dropout=a["emb_dropout"],
        layer_dropout=a["layer_dropout"],
    )


def _pit_numbers(a: Mapping[str, Any]) -> dict[str, Any]:
    patch, depths = _patch(a), tuple(a["depth"])
    return dict(
        grid=_grid(a, patch),
        patch=patch,
        classes=a["num_classes"],
        dim=a["dim"],
        depths=depths,
        heads=_each(a["heads"], len(depths)),
        head_dim=a["dim_head"],
        ratio=a["mlp_dim_ratio"],
        drop_path=a["stochastic_depth"],
        dropout=a["dropout"],
        embed_dropout=a["emb_dropout"],
    )


def _t2t_numbers(a: Mapping[str, Any]) -> dict[str, Any]:
    splits = 3 if pair(a["img_size"])[0] == 64 else 2  # their rule
    return dict(
        grid=_grid(a, 2**splits),
        splits=splits,
        classes=a["num_classes"],
        dim=a["embed_dim"],
        depth=a["depth"],
        heads=a["num_heads"],
        hidden=int(a["embed_dim"] * a["mlp_ratio"]),
        token_dim=a["token_dim"],
        channels=a["in_chans"],
        qkv_bias=a["qkv_bias"],
        scale=a["qk_scale"] or None,
        drop_path=a["drop_path_rate"],
        dropout=a["drop_rate"],
        attention_dropout=a["attn_drop_rate"],
    )


def _swin_numbers(a: Mapping[str, Any]) -> dict[str, Any]:
    patch = _patch(a)
    return dict(
        grid=_grid(a, patch),
        patch=patch,
        classes=a["num_classes"],
        dim=a["embed_dim"],
        depths=tuple(a["depths"]),
        heads=tuple(a["num_heads"]),
        window=a["window_size"],
        ratio=a["mlp_ratio"],
        channels=a["in_chans"],
        qkv_bias=a["qkv_bias"],
        scale=a["qk_scale"] or None,
        patch_norm=a["patch_norm"],
        drop_path=a["drop_path_rate"],
        dropout=a["drop_rate"],
        attention_dropout=a["attn_drop_rate"],
    )


# ---- what shapes tell --------------------------------------------------------------------------

Shapes = Mapping[str, tuple[int, ...]]


def _count(shapes: Shapes, template: str) -> int:
    """How many of the numbered keys there are, from 0 on."""
    numbers = itertools.count()
    return sum(1 for _ in itertools.takewhile(lambda i: template.format(i) in shapes, numbers))


def _told_patch(shapes: Shapes, spt: str, plain: str) -> dict[str, Any]:
    """Patch side and channels (3 unless a convolution says otherwise) of the patch embedding."""
    with_spt = spt in shapes
    values = shapes[spt][0] // 5 if with_spt else math.prod(shapes[plain][1:])
    channels = 3 if with_spt or len(shapes[plain]) == 2 else shapes[plain][1]
    return {"is_SPT": with_spt, "patch_size": math.isqrt(values // channels)}


def _told_side(shapes: Shapes, name: str, leading: int) -> int:
    return math.isqrt(shapes[name][1] - leading)


def _usual_width(inner: list[int], dim: int, usual: int, projected: bool) -> int:
    """Channels of a head: the authors' where they divide the projections' widths, else the largest
    that does. Only a single head of the full width has no projection behind it."""
    if not projected:
        return dim
    width = usual if all(value % usual == 0 for value in inner) else math.gcd(*inner)
    return width // 2 if width == inner[0] == dim else width


def _told_vit(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    block = "transformer.layers.0."
    inner, dim = shapes[block + "0.fn.to_qkv.weight"][0] // 3, shapes["cls_token"][-1]
    lsa = block + "0.fn.scale" in shapes
    heads = given.get("heads")
    if heads is None and lsa:
        heads = shapes[block + "0.fn.scale"][0]
    elif heads is None:
        heads = inner // _usual_width([inner], dim, 16, block + "0.fn.to_out.0.weight" in shapes)
    told = _told_patch(shapes, "to_patch_embedding.merging.1.weight", "to_patch_embedding.1.weight")
    return told | {
        "img_size": _told_side(shapes, "pos_embedding", 1) * told["patch_size"],
        "num_classes": shapes["mlp_head.1.weight"][0],
        "dim": dim,
        "depth": _count(shapes, "transformer.layers.{}.0.norm.weight"),
        "heads": heads,
        "dim_head": inner // heads,
        "mlp_dim_ratio": shapes[block + "1.fn.net.0.weight"][0] // dim,
        "is_LSA": lsa,
    }


def _told_cait(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    block = "patch_transformer.layers.0."
    heads = shapes[block + "0.fn.fn.mix_heads_pre_attn"][0]
    told = _told_patch(
        shapes, "to_patch_embedding.0.merging.1.weight", "to_patch_embedding.1.weight"
    )
    return told | {
        "img_size": _told_side(shapes, "pos_embedding", 0) * told["patch_size"],
        "num_classes": shapes["mlp_head.1.weight"][0],
        "dim": shapes["cls_token"][-1],
        "depth": _count(shapes, "patch_transformer.layers.{}.0.scale"),
        "cls_depth": _count(shapes, "cls_transformer.layers.{}.0.scale"),
        "heads": heads,
        "dim_head": shapes[block + "0.fn.fn.to_q.weight"][0] // heads,
        "mlp_dim": shapes[block + "1.fn.fn.net.0.weight"][0],
        "is_LSA": block + "0.fn.fn.scale" in shapes,
    }


def _told_pit(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    pattern = re.compile(r"layers\.(\d+)\.layers\.0\.0\.norm\.weight")
    stages = sorted(int(match[1]) for name in shapes if (match := pattern.fullmatch(name)))
    inner = [shapes[f"layers.{s}.layers.0.0.fn.to_qkv.weight"][0] // 3 for s in stages]
    lsa = "layers.0.layers.0.0.fn.scale" in shapes
    dim = shapes["cls_token"][-1]
    heads = given.get("heads")
    if heads is None:
        if lsa:
            heads = [shapes[f"layers.{s}.layers.0.0.fn.scale"][0] for s in stages]
        else:
            width = _usual_width(inner, dim, 48, "layers.0.layers.0.0.fn.to_out.0.weight" in shapes)
            heads = [value // width for value in inner]
    told = _told_patch(shapes, "to_patch_embedding.merging.1.weight", "to_patch_embedding.0.weight")
    return told | {
        "img_size": _told_side(shapes, "pos_embedding", 1) * told["patch_size"],
        "num_classes": shapes["mlp_head.1.weight"][0],
        "dim": dim,
        "depth": [_count(shapes, f"layers.{s}.layers.{{}}.0.norm.weight") for s in stages],
        "heads": heads,
        "dim_head": inner[0] // _each(heads, len(stages))[0],
        "mlp_dim_ratio": shapes["layers.0.layers.0.1.fn.net.0.weight"][0] // dim,
        "is_LSA": lsa,
    }


def _told_t2t(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    values = shapes["tokens_to_token.attention1.norm1.weight"][0] // 9
    spt = given.get("is_SPT", values == 15)
    dim = shapes["cls_token"][-1]
    lsa = "blocks.0.attn.scale" in shapes
    step = 8 if "tokens_to_token.attention2.norm1.weight" in shapes else 4
    return {
        "img_size": _told_side(shapes, "pos_embed", 1) * step,
        "in_chans": values // 5 if spt else values,
        "num_classes": shapes["head.weight"][0] if "head.weight" in shapes else 0,
        "embed_dim": dim,
        "depth": _count(shapes, "blocks.{}.norm1.weight"),
        "num_heads": shapes["blocks.0.attn.scale"][0] if lsa else 4,
        "mlp_ratio": expansion((shapes["blocks.0.mlp.fc1.weight"][0], dim)),
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "token_dim": shapes["tokens_to_token.attention1.norm2.weight"][0],
        "is_SPT": spt,
        "is_LSA": lsa,
    }


def _told_swin(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    stages = range(_count(shapes, "layers.{}.blocks.0.norm1.weight"))
    table = "layers.{}.blocks.0.attn.relative_position_bias_table"
    dim = shapes["absolute_pos_embed"][-1]
    told = _told_patch(shapes, "patch_embed.merging.1.weight", "patch_embed.proj.weight")
    plain = shapes.get("patch_embed.proj.weight")
    return told | {
        "img_size": _told_side(shapes, "absolute_pos_embed", 0) * told["patch_size"],
        "in_chans": plain[1] if plain else 3,
        "num_classes": shapes["head.weight"][0] if "head.weight" in shapes else 0,
        "embed_dim": dim,
        "depths": [_count(shapes, f"layers.{s}.blocks.{{}}.norm1.weight") for s in stages],
        "num_heads": [shapes[table.format(s)][1] for s in stages],
        "window_size": max((math.isqrt(shapes[table.format(s)][0]) + 1) // 2 for s in stages),
        "mlp_ratio": expansion((shapes["layers.0.blocks.0.mlp.fc1.weight"][0], dim)),
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in shapes,
        "patch_norm": plain is None or "patch_embed.norm.weight" in shapes,
        "is_LSA": "layers.0.blocks.0.attn.scale" in shapes,
    }


#: class → (network, its numbers, key map by number of stages, what shapes tell)
_READERS: dict[str, tuple[Callable[..., nn.Module], Callable, Callable, Callable]] = {
    "ViT": (vit, _vit_numbers, lambda stages: _VIT, _told_vit),
    "CaiT": (cait, _cait_numbers, lambda stages: _CAIT, _told_cait),
    "PiT": (pit, _pit_numbers, _pit_keys, _told_pit),
    "T2T_ViT": (t2t, _t2t_numbers, lambda stages: _T2T, _told_t2t),
    "SwinTransformer": (swin, _swin_numbers, _swin_keys, _told_swin),
}


# ---- reading -----------------------------------------------------------------------------------


def _class_of(shapes: Shapes) -> str | None:
    return next((name for name, key in _SIGNATURES.items() if key in shapes), None)


def _told(name: str, shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes tell, or nothing where keys are missing: the comparison will name them."""
    try:
        return _READERS[name][3](shapes, given)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return {}


def _arguments(config: Mapping[str, Any], shapes: Shapes) -> tuple[str, dict[str, Any]]:
    name = config.get("cls") or _class_of(shapes)
    if name is None:
        raise PolypatchError(
            "these weights are none of the authors' five networks: no key is one of "
            + ", ".join(_SIGNATURES.values())
        )
    if name not in ARGUMENTS:
        raise PolypatchError(f"cls={name!r} is no network of theirs{suggest(str(name), ARGUMENTS)}")
    given = {key: value for key, value in config.items() if key != "cls" and key[:1] != "_"}
    unknown = sorted(set(given) - set(ARGUMENTS[name]))
    if unknown:
        raise PolypatchError(f"unknown arguments of {name}: {', '.join(unknown)}")
    full = ARGUMENTS[name] | _told(name, shapes, given) | given
    missing = [key for key, value in full.items() if value is _NEEDED]
    if missing:
        raise PolypatchError(f"{name} needs {', '.join(missing)}, which these weights don't tell")
    return name, full


def _translated(
    state: Mapping[str, Tensor], table: Mapping[str, str], numbers: Mapping[str, Any], conv: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Our names and layouts, and the keys that the table doesn't know."""
    ours, unknown = rename({n: v for n, v in state.items() if not _DERIVED.search(n)}, table)
    if (positions := ours.pop(_POSITIONS, None)) is not None:
        rows, columns = numbers["grid"]
        leading = positions.shape[1] - rows * columns
        if leading in (0, 1):
            if leading:
                ours["prefix.position"] = positions[:, :1]
            ours["position.table"] = positions[:, leading:].unflatten(1, (rows, columns))
        else:
            ours["position.table"] = positions  # the comparison will name it
    weight = ours.get("patching.proj.weight")
    if conv and weight is not None and weight.ndim == 2:
        patch = numbers["patch"]
        if weight.shape[1] % patch**2 == 0:
            ours["patching.proj.weight"] = rearrange(
                weight, "o (p q c) -> o c p q", p=patch, q=patch
            )
    for name in [n for n in ours if n.endswith(".gamma")]:
        ours[name] = ours[name].flatten()
    for name in [n for n in ours if "#q." in n]:
        other = name.replace("#q", "#kv")
        if other in ours:
            ours[name.replace("#q", "")] = torch.cat([ours.pop(name), ours.pop(other)])
    return ours, unknown


def _filled(
    config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[nn.Module, dict[str, Any]]:
    """The network with these weights, and its full configuration."""
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    name, full = _arguments(config, shapes)
    network, read_numbers, keys, _ = _READERS[name]
    numbers = read_numbers(full)
    model = network(**numbers, spt=bool(full["is_SPT"]), lsa=bool(full["is_LSA"]))
    table = keys(len(numbers.get("depths", ())))
    conv = isinstance(getattr(model, "patching", None), GridPatching)
    ours, unknown = _translated(state, table, numbers, conv)
    theirs = {value: key for key, value in table.items()}
    told, _ = rename({key: key for key in (*model.state_dict(), *ours)}, theirs)
    names = {our_name: key for key, our_name in told.items()}
    names |= {"position.table": theirs[_POSITIONS], "prefix.position": theirs[_POSITIONS]}
    load_exactly(model, ours, what=f"{name} so configured", names=names, unknown=unknown)
    return model, {"cls": name, **full}


def read(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """See :func:`polypatch.patching.spt_lsa.from_official`."""
    return _filled(config, state)[0].eval()


def recognise_network(shapes: Shapes) -> dict[str, Any] | None:
    """See :func:`polypatch.patching.spt_lsa.recognise`."""
    if _class_of(shapes) is None:
        return None
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
        try:
            return _filled({}, state)[1]
        except PolypatchError:
            return None
