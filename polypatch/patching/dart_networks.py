"""DARViT, the authors' complete network, and its weights: their keys and arguments → ours.

A DeiT whose patches are those of :mod:`polypatch.patching.dart` (Yin et al. 2025, arXiv 2506.10390;
code HCPLab-SYSU/DART, ``models_deit.py``): 12 blocks, patches of 16 pixels, scores standardised
over the batch, zeros beyond the strip's end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PolypatchError
from ..hosts.layouts import TIMM, rename
from ..hosts.vit import ViT, assemble_vit
from ..nn import ClassToken, GridPatching, LearnedPosition, linear_of, load_exactly
from .dart import DartPatching, RegionPosition, ScoreNetwork
from .dart_features import score_features

__all__ = ["assemble", "published", "read", "recognise_network"]

_PATCH = 16


# ---- networks ------------------------------------------------------------------------------------


def published(
    *,
    dim: int,
    heads: int,
    score: str,
    version: str,
    tokens: int,
    classes: int,
    resolution: int,
    standardise: str,
    frozen: bool,
    drop_path: float,
) -> ViT:
    """See :func:`polypatch.patching.dart.build`."""
    cells = math.ceil(resolution / (2 * _PATCH))
    features = score_features(score, version)
    model = assemble(
        dim=dim,
        depth=12,
        heads=heads,
        hidden=4 * dim,
        classes=classes,
        grid=(cells, cells),
        cell=2 * _PATCH,
        tokens=tokens,
        score=ScoreNetwork(
            features=features.make(3),
            feature_dim=features.dim,
            hidden=features.hidden,
            version=version,
            standardise=standardise,
            frozen=frozen,
            last_bias=True,
        ),
        drop_path=drop_path,
    )
    if not next(model.parameters()).is_meta:
        model.init_weights()
    return model


def assemble(
    *,
    grid: tuple[int, int],
    cell: int,
    tokens: int | None,
    rows: int | None = None,
    score: ScoreNetwork,
    representation: int = 0,
    classes: int,
    **numbers: Any,
) -> ViT:
    """Wire a DARViT, without filling the weights; ``numbers`` are those of ``assemble_vit``."""
    model = assemble_vit(
        grid=grid, patch=_PATCH, classes=classes, prefix=1, positioned=1, **numbers
    )
    assert isinstance(model.patching, GridPatching)
    assert isinstance(model.position, LearnedPosition)
    model.resolution = grid[0] * cell
    model.patching = DartPatching(
        score=score,
        embed=linear_of(model.patching.proj),
        patch=_PATCH,
        cell=cell,
        tokens=tokens,
        rows=rows,
        padding="zeros",
    )
    model.position = RegionPosition.like(model.position)
    if score.frozen:
        score.features.requires_grad_(False)
    if representation:
        fc = nn.Linear(model.dim, representation)
        model.pooling = ClassToken(norm=nn.Sequential(fc, nn.Tanh()))
        model.head = nn.Linear(representation, classes) if classes else nn.Identity()
    return model.plugged("dart")


# ---- weights -------------------------------------------------------------------------------------

#: Theirs → ours, beside what a plain ViT of timm has. Both spellings of the score network occur:
#: inside of a MobileNet wrapper or bare. ``features.*`` keep their names below the prefix.
KEYS = {name: ours for name, ours in TIMM.items() if name.startswith(("blocks.", "norm", "head"))}
KEYS |= {"pre_logits.fc": "pooling.norm.0"}
KEYS |= {
    f"{stem}.mlp.net.{theirs}": f"patching.score.mlp.{ours}"
    for stem in ("patch_embed.spn.spn", "patch_embed.spn.spn.spn")
    for theirs, ours in ((0, "fc1"), (2, "fc2"))
}
_STEMS = ("patch_embed.spn.spn.spn.features.", "patch_embed.spn.spn.features.")
_SPECIAL = ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")

#: Constructor arguments of DARViT and its tokenizer, and what a variant is told by.
_KNOWN = {
    "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads",
    "mlp_ratio", "qkv_bias", "representation_size", "distilled", "drop_rate", "attn_drop_rate",
    "drop_path_rate", "norm_eps", "weight_init", "high_res", "num_patches", "target_h", "spn",
}  # fmt: skip


def read(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> ViT:
    """See :func:`polypatch.patching.dart.from_official`."""
    words = sorted(word for word in set(config) - _KNOWN if not word.startswith("_"))
    if words:
        raise PolypatchError(f"unknown arguments of DARViT: {', '.join(words)}")
    if config.get("distilled"):
        raise PolypatchError("DARViT has no working distilled form: its forward pass fails")
    missing = [name for name in (*_SPECIAL, "blocks.0.mlp.fc1.weight") if name not in state]
    if missing:
        raise PolypatchError(f"weights that every DARViT has are missing: {', '.join(missing)}")
    renamed, unknown = _renamed(state)
    if unknown:
        raise PolypatchError(f"keys that no DARViT has: {', '.join(unknown[:8])}")
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    weight = state["patch_embed.proj.weight"]
    dim, channels = weight.shape[:2]
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    high_res = config.get("high_res", True)
    cell = 2 * _PATCH if high_res else _PATCH
    size = config.get("img_size", side * cell)
    if size != side * cell or side * side != state["pos_embed"].shape[1] - 1:
        raise PolypatchError(
            f"a position table of {state['pos_embed'].shape[1] - 1} cells does not belong to "
            f"images of {size} pixels with high_res={high_res}"
        )
    head = state.get("head.weight")
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    representation = state.get("pre_logits.fc.weight")
    cells = side * side
    model = assemble(
        dim=dim,
        depth=1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks.")),
        heads=config.get("num_heads", max(1, dim // 64)),
        hidden=hidden,
        channels=channels,
        classes=0 if head is None else head.shape[0],
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        eps=config.get("norm_eps", 1e-6),
        drop_path=config.get("drop_path_rate", 0.0),
        representation=0 if representation is None else representation.shape[0],
        grid=(side, side),
        cell=cell,
        tokens=config.get("num_patches") or cells,
        rows=config.get("target_h"),
        score=_official_score(config.get("spn"), shapes, channels),
    )
    renamed["patching.embed.weight"] = weight.permute(0, 2, 3, 1).flatten(1)
    renamed["patching.embed.bias"] = state["patch_embed.proj.bias"]
    renamed["prefix.tokens"] = state["cls_token"]
    renamed["prefix.position"] = state["pos_embed"][:, :1]
    renamed["position.table"] = state["pos_embed"][:, 1:].reshape(1, side, side, dim)
    load_exactly(model, renamed, what="the DARViT of their shapes")
    return model.eval()


def _renamed(state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    features, rest = {}, {}
    for name, value in state.items():
        stem = next((s for s in _STEMS if name.startswith(s)), None)
        if stem is not None:
            features[f"patching.score.features.{name.removeprefix(stem)}"] = value
        elif name not in _SPECIAL:
            rest[name] = value
    renamed, unknown = rename(rest, KEYS)
    return renamed | features, unknown


def _official_score(spn: Any, shapes: Mapping[str, tuple[int, ...]], channels: int) -> ScoreNetwork:
    """The score network of a state dict, with what ``spn`` says beyond the shapes."""
    ours, _ = _renamed(shapes)
    first = ours.get("patching.score.mlp.fc1.weight")
    second = ours.get("patching.score.mlp.fc2.weight")
    if first is None or second is None:
        raise PolypatchError("the score network's weights (patch_embed.spn...mlp.net) are missing")
    hidden, feature_dim = first
    given = dict(spn) if isinstance(spn, Mapping) else {}
    strange = sorted(set(given) - {"cls", "features", "feature_dim", "hidden_dim", "version"})
    if strange:
        raise PolypatchError(f"unknown arguments of a score network: {', '.join(strange)}")
    version = given.get("version", "v1" if second[0] == 1 and feature_dim != 1 else "v2")
    features = given.get("features")
    if isinstance(features, str):
        features = score_features(features, version, channels=channels).make(channels)
    if features is None:
        features = _features_of(ours, channels)
    if features is None:
        raise PolypatchError(
            "the score network's features are none of those known "
            "(pixels, MobileNetV3, EfficientNet-B0, one convolution): give spn={'features': module}"
        )
    return ScoreNetwork(
        features=features,
        feature_dim=feature_dim,
        hidden=hidden,
        version=version,
        standardise="batch",
        frozen=True,
        last_bias=True,
    )


def _features_of(ours: Mapping[str, tuple[int, ...]], channels: int) -> nn.Module | None:
    """Which features have weights of these shapes."""
    stem = "patching.score.features."
    wanted = {n.removeprefix(stem): tuple(s) for n, s in ours.items() if n.startswith(stem)}
    if not wanted:
        return nn.Identity()
    if set(wanted) <= {"weight", "bias"} and len(wanted["weight"]) == 4:
        # A convolution's stride can't be told; patches that touch are the natural guess.
        out, inner, *kernel = wanted["weight"]
        size = (kernel[0], kernel[1])
        return nn.Conv2d(inner, out, size, stride=size, bias="bias" in wanted)
    for name in ("mobilenet-small", "mobilenet-large", "efficientnet-b0"):
        for version in ("v1", "v2"):
            make = score_features(name, version).make
            with torch.device("meta"):
                shapes = {n: tuple(v.shape) for n, v in make(channels).state_dict().items()}
            if shapes == wanted:
                return make(channels)
    return None


def recognise_network(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """See :func:`polypatch.patching.dart.recognise`."""
    if any(name not in shapes for name in (*_SPECIAL, "blocks.0.attn.qkv.weight")):
        return None
    ours, unknown = _renamed(shapes)
    if unknown or "patching.score.mlp.fc1.weight" not in ours:
        return None
    with torch.device("meta"):
        if _features_of(ours, shapes["patch_embed.proj.weight"][1]) is None:
            return None
    dim = shapes["patch_embed.proj.weight"][0]
    cells = shapes["pos_embed"][1] - 1
    return {
        "img_size": 2 * _PATCH * math.isqrt(cells),
        "embed_dim": dim,
        "num_heads": max(1, dim // 64),
        "high_res": True,
        "num_patches": cells,
    }
