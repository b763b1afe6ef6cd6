"""ViT weights of others: key layouts of timm, DeiT, DINOv2, CLIP, SigLIP and Hugging Face.

A layout is data: pairs of names, theirs and ours, ``{i}`` standing for a block's number. Names that
no pair covers are an error, never skipped in silence. ``#q``, ``#k``, ``#v`` mark the parts of our
stacked projections.

Traps: OpenAI's CLIP spells it ``pre_layrnorm``; transformers renamed its ViT modules in version 5
(both spellings are read); DINOv2's registers have no position while its class token has one;
layer-norm epsilons and GELU flavours differ by family and can't be told from shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PolypatchError
from ..nn import fresh, load_exactly, quick_gelu
from .vit import ViT, assemble_vit

__all__ = ["from_official", "recognise", "rename", "to_official"]

TIMM = {
    "patch_embed.proj": "patching.proj",
    "norm_pre": "norm_in",
    "blocks.{i}.norm1": "blocks.{i}.norm1",
    "blocks.{i}.attn.qkv": "blocks.{i}.mixing.qkv",
    "blocks.{i}.attn.q_norm": "blocks.{i}.mixing.q_norm",
    "blocks.{i}.attn.k_norm": "blocks.{i}.mixing.k_norm",
    "blocks.{i}.attn.proj": "blocks.{i}.mixing.proj",
    "blocks.{i}.ls1": "blocks.{i}.scale1",
    "blocks.{i}.norm2": "blocks.{i}.norm2",
    "blocks.{i}.mlp.fc1": "blocks.{i}.mlp.fc1",
    "blocks.{i}.mlp.fc2": "blocks.{i}.mlp.fc2",
    "blocks.{i}.mlp.w12": "blocks.{i}.mlp.fc1",  # DINOv2's own files, SwiGLU
    "blocks.{i}.mlp.w3": "blocks.{i}.mlp.fc2",
    "blocks.{i}.ls2": "blocks.{i}.scale2",
    "norm": "norm",
    "fc_norm": "pooling.norm",
    "attn_pool.latent": "pooling.query",
    "attn_pool.q": "pooling.q",
    "attn_pool.kv": "pooling.kv",
    "attn_pool.proj": "pooling.proj",
    "attn_pool.norm": "pooling.norm",
    "attn_pool.mlp.fc1": "pooling.mlp.fc1",
    "attn_pool.mlp.fc2": "pooling.mlp.fc2",
    "head": "head",
    "head_dist": "head.distilled",
}

_HF_BLOCK = {
    "layernorm_before": "norm1",
    "norm1": "norm1",
    "layer_norm1": "norm1",
    "attention.attention.query": "mixing.qkv#q",
    "attention.attention.key": "mixing.qkv#k",
    "attention.attention.value": "mixing.qkv#v",
    "attention.q_proj": "mixing.qkv#q",
    "attention.k_proj": "mixing.qkv#k",
    "attention.v_proj": "mixing.qkv#v",
    "self_attn.q_proj": "mixing.qkv#q",
    "self_attn.k_proj": "mixing.qkv#k",
    "self_attn.v_proj": "mixing.qkv#v",
    "attention.output.dense": "mixing.proj",
    "attention.o_proj": "mixing.proj",
    "self_attn.out_proj": "mixing.proj",
    "layer_scale1.lambda1": "scale1.gamma",
    "layernorm_after": "norm2",
    "norm2": "norm2",
    "layer_norm2": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "layer_scale2.lambda1": "scale2.gamma",
}

TRANSFORMERS = {
    "embeddings.patch_embeddings.projection": "patching.proj",
    "embeddings.patch_embedding": "patching.proj",
    "pre_layrnorm": "norm_in",
    "layernorm": "norm",
    "post_layernorm": "norm",
    "head.probe": "pooling.query",
    "head.attention.in_proj_weight": "pooling#in.weight",
    "head.attention.in_proj_bias": "pooling#in.bias",
    "head.attention.out_proj": "pooling.proj",
    "head.layernorm": "pooling.norm",
    "head.mlp.fc1": "pooling.mlp.fc1",
    "head.mlp.fc2": "pooling.mlp.fc2",
    "classifier": "head",
    "cls_classifier": "head.head",
    "distillation_classifier": "head.distilled",
    "visual_projection": "head",
} | {
    f"{stem}.{{i}}.{theirs}": f"blocks.{{i}}.{ours}"
    for stem in ("encoder.layer", "encoder.layers", "layers")
    for theirs, ours in _HF_BLOCK.items()
}

#: Tensors that carry no part of the forward pass: training-time mask tokens, the tanh pooler.
UNUSED = re.compile(r"(^|\.)(mask_token|pooler\.dense\.(weight|bias)|position_ids)$")

_PREFIXES = re.compile(r"^(vit|deit|dinov2|dinov2_with_registers|vision_model)\.")


def _compiled(table: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [
        (
            re.compile("^" + re.escape(theirs).replace(r"\{i\}", r"(\d+)") + r"(\.\w+)?$"),
            ours,
        )
        for theirs, ours in table.items()
    ]


def rename(state: Mapping[str, Any], table: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Their names → ours, and the names that ``table`` doesn't know."""
    patterns = _compiled(table)
    ours: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in state.items():
        for pattern, target in patterns:
            match = pattern.match(name)
            if match is None:
                continue
            groups = match.groups()
            suffix = groups[-1] or ""
            number = groups[0] if len(groups) > 1 else ""
            name_here = target.replace("{i}", number or "") + suffix
            if name_here in ours:
                raise PolypatchError(f"two keys for one weight, the second is {name}")
            ours[name_here] = value
            break
        else:
            unknown.append(name)
    return ours, unknown


# ---- reading -----------------------------------------------------------------------------------


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> ViT:
    """A host with the given weights, in eval mode.

    Args:
        config: constructor arguments by timm's names (``embed_dim``, ``depth``, …) or by the
            names of transformers' configuration classes (``hidden_size``, ``class``: the model
            class, …); what shapes determine may be left out.
        state: the state dict with the authors' keys.

    Raises:
        PolypatchError: a key or shape that doesn't fit, each named.
    """
    if any(_PREFIXES.match(name) or name.startswith("embeddings.") for name in state):
        numbers, renamed = _read_transformers(config, state)
    else:
        numbers, renamed = _read_timm(config, state)
    _agree(config, numbers)
    model = assemble_vit(**numbers)
    load_exactly(model, renamed, what="the ViT of their shapes")
    return model.eval()


#: what shapes say too, by timm's and transformers' names: these must agree with the weights
_SAID = {
    "embed_dim": "dim", "hidden_size": "dim", "depth": "depth", "num_hidden_layers": "depth",
    "intermediate_size": "hidden", "in_chans": "channels", "num_channels": "channels",
}  # fmt: skip


def _agree(config: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
    for word, ours in _SAID.items():
        if word in config and config[word] != numbers[ours]:
            raise PolypatchError(
                f"{word}={config[word]} contradicts the weights, which have {numbers[ours]}"
            )


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration that :func:`from_official` takes, from names and shapes alone; None if
    these aren't a plain ViT's. Heads can't be read off shapes: 64 channels each are assumed, the
    convention of every published size but so400m (72), huge (80) and giant (88)."""
    if "patch_embed.proj.weight" in shapes and "blocks.0.attn.qkv.weight" in shapes:
        _, unknown = rename(_stripped(shapes), TIMM)
        left = [n for n in unknown if n not in _TIMM_SPECIAL and not UNUSED.search(n)]
        dim = shapes["patch_embed.proj.weight"][0]
        return None if left else {"layout": "timm", "num_heads": _usual_heads(dim)}
    kind = _transformers_class(shapes)
    if kind is None:
        return None
    names = [n for n in _stripped(shapes) if not n.startswith("embeddings.")]
    if [n for n in rename(dict.fromkeys(names), TRANSFORMERS)[1] if not UNUSED.search(n)]:
        return None
    weight = next(v for n, v in shapes.items() if "patch_embed" in n and n.endswith("weight"))
    heads = _usual_heads(weight[0])
    return {"layout": "transformers", "class": kind, "num_attention_heads": heads}


def _usual_heads(dim: int) -> int:
    return {1152: 16, 1280: 16, 1408: 16}.get(dim, max(1, dim // 64))


def _stripped(state: Mapping[str, Any]) -> dict[str, Any]:
    return {_PREFIXES.sub("", name): value for name, value in state.items()}


def _take_positions(
    table: Tensor, config: Mapping[str, Any]
) -> tuple[Tensor | None, Tensor, tuple[int, int]]:
    """Split a (1, rows, dim) table into rows of leading tokens and the grid."""
    rows, dim = table.shape[-2:]
    size = config.get("img_size", config.get("image_size"))
    patch = config.get("patch_size")
    if size is not None and patch is not None:
        height, width = (size, size) if isinstance(size, int) else size
        step = patch if isinstance(patch, int) else patch[0]
        grid = (height // step, width // step)
    else:
        leading = next((k for k in (0, 1, 2) if math.isqrt(rows - k) ** 2 == rows - k), None)
        if leading is None:
            raise PolypatchError(
                f"a position table of {rows} rows is no square grid; give the image size"
            )
        grid = (math.isqrt(rows - leading), math.isqrt(rows - leading))
    extra = rows - grid[0] * grid[1]
    if not 0 <= extra <= 2:
        raise PolypatchError(f"a position table of {rows} rows does not fit a grid of {grid}")
    table = table.reshape(1, rows, dim)
    front = table[:, :extra] if extra else None
    return front, table[:, extra:].reshape(1, *grid, dim), grid


_TIMM_SPECIAL = ("cls_token", "dist_token", "reg_token", "register_tokens", "pos_embed")

_TIMM_KNOWN = {
    "layout", "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth",
    "num_heads", "mlp_ratio", "qkv_bias", "qk_norm", "init_values", "class_token", "global_pool",
    "no_embed_class", "reg_tokens", "pre_norm", "fc_norm", "act_layer", "norm_layer", "mlp_layer",
    "dynamic_img_size", "dynamic_img_pad", "drop_rate", "pos_drop_rate", "patch_drop_rate",
    "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "weight_init", "distilled",
    "norm_eps", "strict_img_size",
}  # fmt: skip


def _activation(name: Any) -> Callable[[Tensor], Tensor]:
    word = str(name or "gelu").lower().replace("_", "").replace("-", "")
    if "quick" in word:
        return quick_gelu
    if "tanh" in word or word == "gelunew":
        return partial(F.gelu, approximate="tanh")
    if "silu" in word or "swish" in word:
        return F.silu
    if "relu" in word:
        return F.relu
    return fresh.gelu


def _read_timm(
    config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    unknown_words = sorted(set(config) - _TIMM_KNOWN)
    if unknown_words:
        raise PolypatchError(f"unknown arguments of a timm ViT: {', '.join(unknown_words)}")
    renamed, unknown = rename(state, TIMM)
    unknown = [n for n in unknown if n not in _TIMM_SPECIAL and not UNUSED.search(n)]
    if unknown:
        raise PolypatchError(f"keys that no plain ViT of timm has: {', '.join(unknown[:8])}")
    weight = _essential(renamed, "the ViT of their shapes")["patching.proj.weight"]
    dim, channels, patch = weight.shape[:3]
    registers = state.get("reg_token", state.get("register_tokens"))
    leading = [state[n] for n in ("cls_token", "dist_token") if n in state]
    numbers: dict[str, Any] = {}
    if "pos_embed" in state:
        front, table, grid = _take_positions(state["pos_embed"], {"patch_size": patch, **config})
        renamed["position.table"] = table
        if front is not None:
            renamed["prefix.position"] = front
        numbers |= {"grid": grid, "positioned": 0 if front is None else front.shape[1]}
    else:
        numbers |= {"grid": (1, 1), "position": "none"}
    front_tokens = [*leading, *([registers] if registers is not None else [])]
    if front_tokens:
        renamed["prefix.tokens"] = torch.cat(front_tokens, dim=1)
    pooled = "class" if leading else "mean"
    if "pooling.query" in renamed:
        pooled = "attention"
    elif "head.distilled.weight" in renamed:
        pooled = "class+distill"
        renamed |= {f"head.head.{k}": renamed.pop(f"head.{k}") for k in ("weight", "bias")}
    elif config.get("global_pool") == "avg":
        pooled = "mean"
    head = renamed.get("head.weight", renamed.get("head.head.weight"))
    hidden = renamed["blocks.0.mlp.fc2.weight"].shape[1]
    gated = renamed["blocks.0.mlp.fc1.weight"].shape[0] == 2 * hidden
    # torch's own LayerNorm (eps 1e-5) where it was asked for by name, timm's (1e-6) otherwise.
    eps = config.get("norm_eps", 1e-5 if config.get("norm_layer") == "LayerNorm" else 1e-6)
    numbers |= {
        "dim": dim,
        "depth": _depth(renamed),
        "heads": config.get("num_heads", _usual_heads(dim)),
        "hidden": hidden,
        "patch": patch,
        "channels": channels,
        "classes": 0 if head is None else head.shape[0],
        "pooling": pooled,
        "prefix": sum(t.shape[1] for t in front_tokens),
        "norm_pooled": "pooling.norm.weight" in renamed and pooled != "attention",
        "norm_in": "norm_in.weight" in renamed,
        "patch_bias": "patching.proj.bias" in renamed,
        "qkv_bias": "blocks.0.mixing.qkv.bias" in renamed,
        "qk_norm": "blocks.0.mixing.q_norm.weight" in renamed,
        "gated": gated,
        "layer_scale": 1e-5 if "blocks.0.scale1.gamma" in renamed else None,
        "activation": _activation(config.get("act_layer")),
        "eps": eps,
    }
    return numbers, renamed


def _essential(renamed: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """The same, if what sizes are read from is there."""
    needed = ("patching.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")
    lost = [name for name in needed if name not in renamed]
    if lost:
        raise PolypatchError(f"these weights don't fit {what}: missing keys {', '.join(lost)}")
    return renamed


def _depth(renamed: Mapping[str, Any]) -> int:
    return 1 + max(int(n.split(".")[1]) for n in renamed if n.startswith("blocks."))


_FAMILIES = {
    # family: (layer-norm eps, activation) where the configuration doesn't say
    "ViT": (1e-12, "gelu"),
    "DeiT": (1e-12, "gelu"),
    "Dinov2": (1e-6, "gelu"),
    "CLIP": (1e-5, "quick_gelu"),
    "Siglip": (1e-6, "gelu_pytorch_tanh"),
}


def _transformers_class(shapes: Mapping[str, Any]) -> str | None:
    names = set(_stripped(shapes))
    if not any(n.startswith("embeddings.patch_embedding") for n in names):
        return None
    if "pre_layrnorm.weight" in names:
        projected = "visual_projection.weight" in names
        return "CLIPVisionModelWithProjection" if projected else "CLIPVisionModel"
    if "embeddings.patch_embedding.bias" in names:
        return "SiglipVisionModel"
    classifies = "classifier.weight" in names
    if "embeddings.distillation_token" in names:
        if "cls_classifier.weight" in names:
            return "DeiTForImageClassificationWithTeacher"
        return "DeiTForImageClassification" if classifies else "DeiTModel"
    if any(n.endswith("layer_scale1.lambda1") for n in names):
        return "Dinov2ForImageClassification" if classifies else "Dinov2Model"
    return "ViTForImageClassification" if classifies else "ViTModel"


_HF_KNOWN = {
    "layout", "class", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "intermediate_size", "mlp_ratio", "hidden_act", "layer_norm_eps", "image_size", "patch_size",
    "num_channels", "num_labels", "qkv_bias", "layerscale_value", "use_swiglu_ffn",
    "num_register_tokens", "drop_path_rate", "hidden_dropout_prob", "attention_dropout",
    "attention_probs_dropout_prob", "initializer_range", "projection_dim", "apply_layernorm",
}  # fmt: skip


def _read_transformers(
    config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    strange = sorted(set(config) - _HF_KNOWN)
    if strange:
        raise PolypatchError(f"unknown arguments of a vision model: {', '.join(strange)}")
    plain = _stripped(state)
    kind = config.get("class") or _transformers_class(plain)
    family = next((f for f in _FAMILIES if str(kind).startswith(f)), None)
    if family is None:
        raise PolypatchError(f"{kind} is none of the families {', '.join(_FAMILIES)}")
    special = {
        name: plain.pop(name)
        for name in list(plain)
        if name.startswith("embeddings.") and ".patch_embedding" not in f".{name[10:]}"
        and "projection" not in name
    }  # fmt: skip
    renamed, unknown = rename(
        {n: v for n, v in plain.items() if not UNUSED.search(n)}, TRANSFORMERS
    )
    if unknown:
        raise PolypatchError(f"keys that {kind} does not have: {', '.join(unknown[:8])}")
    renamed = _essential(_stacked(renamed), str(kind))
    weight = renamed["patching.proj.weight"]
    dim, channels, patch = weight.shape[:3]
    positions = special.get(
        "embeddings.position_embeddings", special.get("embeddings.position_embedding.weight")
    )
    if positions is None:
        raise PolypatchError(f"{kind} without position embeddings can't be read")
    front, table, grid = _take_positions(positions, {"patch_size": patch, **config})
    renamed["position.table"] = table
    if front is not None:
        renamed["prefix.position"] = front
    leading = [
        special[f"embeddings.{n}"].reshape(1, -1, dim)
        for n in ("cls_token", "class_embedding", "distillation_token", "register_tokens")
        if f"embeddings.{n}" in special
    ]
    if leading:
        renamed["prefix.tokens"] = torch.cat(leading, dim=1)
    pooled, norm_pooled = ("class" if leading else "mean"), False
    if "pooling.query" in renamed:
        pooled = "attention"
    elif "head.distilled.weight" in renamed:
        pooled = "class+distill"
    elif family == "Dinov2" and "head.weight" in renamed:
        pooled = "class+mean"
    elif family == "CLIP":
        norm_pooled = True
        renamed |= {f"pooling.norm.{k}": renamed.pop(f"norm.{k}") for k in ("weight", "bias")}
    head = renamed.get("head.weight", renamed.get("head.head.weight"))
    hidden = renamed["blocks.0.mlp.fc2.weight"].shape[1]
    eps, act = _FAMILIES[family]
    numbers = {
        "dim": dim,
        "depth": _depth(renamed),
        "heads": config.get("num_attention_heads", _usual_heads(dim)),
        "hidden": hidden,
        "patch": patch,
        "channels": channels,
        "grid": grid,
        "classes": 0 if head is None else head.shape[0],
        "head_bias": "head.bias" in renamed or "head.head.bias" in renamed,
        "pooling": pooled,
        "prefix": sum(t.shape[1] for t in leading),
        "positioned": 0 if front is None else front.shape[1],
        "norm_pooled": norm_pooled,
        "norm_in": "norm_in.weight" in renamed,
        "patch_bias": "patching.proj.bias" in renamed,
        "qkv_bias": "blocks.0.mixing.qkv.bias" in renamed,
        "gated": renamed["blocks.0.mlp.fc1.weight"].shape[0] == 2 * hidden,
        "layer_scale": 1.0 if "blocks.0.scale1.gamma" in renamed else None,
        "activation": _activation(config.get("hidden_act", act)),
        "eps": config.get("layer_norm_eps", eps),
    }
    return numbers, renamed


def _stacked(renamed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the parts of stacked projections, split torch's in_proj of attention pooling."""
    out = {n: v for n, v in renamed.items() if "#" not in n}
    for name, value in renamed.items():
        if "#q" in name:
            parts = [value, *(renamed.get(name.replace("#q", f"#{c}"), value) for c in "kv")]
            lost = [c for c in "kv" if name.replace("#q", f"#{c}") not in renamed]
            if lost:
                raise PolypatchError(f"{name.replace('#q', '')} lacks its part {lost[0]}")
            out[name.replace("#q", "")] = torch.cat(parts)
        elif name.startswith("pooling#in."):
            suffix = name.split(".")[-1]
            size = value.shape[0] // 3
            out[f"pooling.q.{suffix}"], out[f"pooling.kv.{suffix}"] = value[:size], value[size:]
    return out


# ---- writing -----------------------------------------------------------------------------------


def to_official(model: ViT) -> dict[str, Tensor]:
    """The host's weights with timm's names, from which :func:`from_official` reads them back."""
    state = dict(model.state_dict())
    back = {ours: theirs for theirs, ours in reversed(TIMM.items())}
    if "pooling.query" in state:
        back["pooling.norm"] = "attn_pool.norm"
    if "head.distilled.weight" in state:
        back["head.head"] = "head"
    out: dict[str, Tensor] = {}
    table = state.pop("position.table", None)
    tokens, front = state.pop("prefix.tokens", None), state.pop("prefix.position", None)
    if table is not None:
        rows = table.flatten(1, 2)
        out["pos_embed"] = rows if front is None else torch.cat([front, rows], dim=1)
    if tokens is not None:
        distilled = "head.distilled.weight" in state
        with_class = _has_class_token(model)
        names = [("cls_token", int(with_class)), ("dist_token", int(distilled))]
        names.append(("reg_token", tokens.shape[1] - with_class - distilled))
        start = 0
        for name, count in names:
            if count:
                out[name] = tokens[:, start : start + count]
                start += count
    renamed, unknown = rename(state, back)
    if unknown:
        raise PolypatchError(
            f"timm's layout has no names for {', '.join(unknown[:6])}; "
            "only plain ViTs (no plugged parts) can be written in it"
        )
    return out | renamed


def _has_class_token(model: ViT) -> bool:
    """Whether the first prefix token is a class token (it has one where pooling reads it, or
    where it has a position of its own)."""
    prefix = model.prefix
    if prefix is None:
        return False
    reads_class = type(model.pooling).__name__.startswith("Class")
    return reads_class or prefix.position is not None
