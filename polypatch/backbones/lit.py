"""LIT: no attention where attention is local anyway, and tokens merged where it suits the image.

Pan, Zhuang, He, Liu and Cai, *Less is More: Pay Less Attention in Vision Transformers* (AAAI 2022,
arXiv 2105.14217). In a pyramid of four stages the early ones, where tokens are many and attention
looks at its neighbours only, consist of MLPs alone; attention over the whole map begins in the
third. Between stages *deformable token merging* (DTM) joins 2 × 2 tokens, each of which it fetches
from a place of its own (eq. 5 to 7; deformable convolution of 2 × 2 with stride 2, then batch norm,
then GELU). On a map x of H × W tokens::

    early block    x = x + W₂ GELU(W₁ LN x)
    late block     x = x + softmax(q kᵀ / √d + B) v W_o,  then the same MLP
    Δ = Conv(x; 2 × 2, stride 2)                      (H/2 · W/2, 4 taps, 2), as (y, x) in cells
    x̃(y, x, tap) = bilinear(x; (2y, 2x) + tap + Δ)    zeros beyond the map
    x = GELU(BN(W [x̃(tap 1) … x̃(tap 4)]))            (H/2 · W/2, out)

**Two families**, as the authors have two code bases. LIT-S, -M, -B are built like Swin: B is a
table of relative positions over the *whole* map, the mean of the normed tokens is classified.
LIT-Ti is built like PVT: no B, but a table of absolute positions in front of every stage, and a
class token that joins in the last one; its LNs have ε = 1e-6 but for the one behind the patches.

Traps: batch norm stands in front of GELU; offsets begin as zeros, where merging is an ordinary
convolution; they learn at a hundredth of the rate, that is, their matrices do, while their biases
are among the vectors that aren't decayed, at the full rate (:meth:`LIT.parameter_groups`). Their
``ape=True`` (absolute positions in the Swin-like family) fails; refused here.

Other input sizes: as in the authors' dense code images are padded with zeros to whole patches, odd
maps lose a row in merging, relative tables are resized bicubically, absolute ones bilinearly.

Sampling is a weighted sum of four rows of the channels-last map, which is what ``embedding_bag``
does; its result is what the merging's matrix reads. The variant ``lit-pvt-small-full-msa`` is the
paper's contrast (its figure 3), whose weights are published too: attention in all stages and plain
merging, a convolution and LN. ``early="attention"`` gives attention to all stages of any variant.

Here stand the sizes and the authors' weights, the network in ``lit_network.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..nn import KeyMap, Rule
from ..nn.arguments import expansion, norm_eps, norm_word
from .lit_network import LIT, relative_bias

__all__ = [
    "LIT",
    "VARIANTS",
    "Variant",
    "assemble",
    "build",
    "from_official",
    "keymap",
    "network",
    "official_config",
    "recognise",
    "to_official",
]


# ---- sizes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    expansions: tuple[float, ...]
    drop_path: float
    relative: bool = True
    deformable: bool = True
    attention: tuple[bool, ...] = (False, False, True, True)
    resolution: int = 224


_SWIN = ((96, 192, 384, 768), (3, 6, 12, 24), (4.0, 4.0, 4.0, 4.0))
_PVT = ((64, 128, 320, 512), (3, 4, 6, 3), (1, 2, 5, 8), (8.0, 8.0, 4.0, 4.0))

#: table 2 and the authors' configurations; lit-pvt-small-full-msa is what figure 3 looks at; nano
#: is ours, for demonstrations on a CPU. The rates of stochastic depth are their recipes'.
VARIANTS: dict[str, Variant] = {
    "lit-nano": Variant(
        (24, 48, 96, 192), (2, 2, 3, 1), (1, 2, 4, 8), (4.0, 4.0, 4.0, 4.0), 0.0, resolution=32
    ),
    "lit-ti": Variant(*_PVT, 0.1, relative=False),
    "lit-small": Variant(_SWIN[0], (2, 2, 6, 2), *_SWIN[1:], 0.2),
    "lit-medium": Variant(_SWIN[0], (2, 2, 18, 2), *_SWIN[1:], 0.3),
    "lit-base": Variant(
        (128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32), (4.0, 4.0, 4.0, 4.0), 0.5
    ),
    "lit-pvt-small-full-msa": Variant(
        *_PVT, 0.1, relative=False, deformable=False, attention=(True,) * 4
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
) -> LIT:
    """Wire a network without filling it."""
    return LIT(
        dims=variant.dims,
        depths=variant.depths,
        heads=variant.heads,
        expansions=variant.expansions,
        attention=variant.attention,
        relative=variant.relative,
        deformable=variant.deformable,
        eps=1e-5 if variant.relative else 1e-6,
        classes=classes,
        channels=channels,
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
    early: str | None = None,
    drop_path: float | None = None,
    drop: float = 0.0,
    attn_drop: float = 0.0,
) -> LIT:
    """A named network with fresh weights.

    Args:
        resolution: input side that the position tables are for; others are possible afterwards.
        early: ``"mlp"``, the paper's, or ``"attention"`` for its contrast; default: the variant's
            own.
        drop_path: default: the variant's own.

    Raises:
        PolypatchError: an unknown ``early``.
    """
    chosen = VARIANTS[variant]
    ways = {"mlp": (False, False, True, True), "attention": (True, True, True, True)}
    if early is not None:
        if early not in ways:
            raise PolypatchError(f"early stages have no {early!r}{suggest(early, ways)}")
        chosen = replace(chosen, attention=ways[early])
    model = assemble(
        chosen,
        classes=classes,
        channels=channels,
        resolution=resolution,
        drop_path=drop_path,
        drop=drop,
        attn_drop=attn_drop,
    )
    model.init_weights()
    return model


# ---- authors' weights --------------------------------------------------------------------------


def _merging_rules(theirs: str, ours: str, *, deformable: bool) -> list[Rule | tuple[str, str]]:
    if not deformable:
        return [(f"{theirs}.proj", f"{ours}.conv"), (f"{theirs}.norm", f"{ours}.norm")]
    matrix = Rule(
        (f"{theirs}.dconv.weight",),
        f"{ours}.proj.weight",
        to_ours=lambda w: w.permute(0, 2, 3, 1).flatten(1),
        to_theirs=lambda w: w.unflatten(1, (2, 2, -1)).permute(0, 3, 1, 2).contiguous(),
    )
    return [
        matrix,
        (f"{theirs}.dconv.bias", f"{ours}.proj.bias"),
        (f"{theirs}.dconv.conv_offset", f"{ours}.offset"),
        (f"{theirs}.norm_layer", f"{ours}.norm"),
    ]


def keymap(
    *, stages: int = 4, relative: bool = True, deformable: bool = True, map_norms: bool = False
) -> KeyMap:
    """Two layouts: ``layers.0.blocks.0`` of the Swin-like family, ``block1.0`` of the other."""
    rules: list[Rule | tuple[str, str]] = [("head", "head")]
    embedding = "patch_embed" if relative else "patch_embed1"
    rules += [(f"{embedding}.proj", "patches"), (f"{embedding}.norm", "patch_norm")]
    rules += [(f"norm{i}", f"map_norms.{i - 1}") for i in range(1, stages - 1) if map_norms]
    rules += [(f"norm{stages - 1}" if map_norms else "norm", "norm")]
    for i in range(stages):
        block = f"layers.{i}.blocks.{{j}}" if relative else f"block{i + 1}.{{j}}"
        ours = f"stages.{i}.{{j}}"
        rules += [
            (f"{block}.{part}", f"{ours}.{part}")
            for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        ]
        if relative:
            rules += [(f"{block}.attn.relative_position_bias_table", f"{ours}.relative")]
        else:
            rules += [(f"pos_embed{i + 1}", f"positions.{i}.table")]
        if i < stages - 1:
            merging = f"layers.{i}.downsample" if relative else f"patch_embed{i + 2}"
            rules += _merging_rules(merging, f"mergings.{i}", deformable=deformable)
    if not relative:
        rules += [("cls_token", "class_token")]
    index = "layers.{i}.blocks.{j}.attn.relative_position_index"
    return KeyMap(rules, unused=[index] if relative else [])


def _keymap_of(model: LIT) -> KeyMap:
    return keymap(
        stages=len(model.dims),
        relative=model.relative,
        deformable=model.deformable,
        map_norms=bool(len(model.map_norms)),
    )


#: what no shape tells, or not in every network
ASSUMED = ("img_size", "norm_layer", "num_heads", "qk_scale")


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`network` from names and shapes, None if these are no LIT's.

    Heads that no table tells are 64 channels wide in the PVT-like family and 32 in the other, as
    in all published networks; images are taken for square.
    """
    swin = "layers.0.downsample.dconv.conv_offset.weight" in shapes
    pvt = "patch_embed2.dconv.conv_offset.weight" in shapes
    plain = {"patch_embed2.proj.weight", "block1.0.attn.qkv.weight", "pos_embed4"} <= shapes.keys()
    embedding = shapes.get("patch_embed.proj.weight" if swin else "patch_embed1.proj.weight")
    if not (swin or pvt or plain) or embedding is None:
        return None
    dims, depths, ratios, attention, heads = [], [], [], [], []
    image = 0
    for i in range(99):
        prefix = f"layers.{i}.blocks." if swin else f"block{i + 1}."
        names = [name for name in shapes if name.startswith(prefix)]
        fc1 = shapes.get(f"{prefix}0.mlp.fc1.weight")
        if fc1 is None:
            break
        depths.append(len({name.removeprefix(prefix).split(".")[0] for name in names}))
        dims.append(fc1[1])
        ratios.append(expansion((fc1[0], fc1[1])))
        attention.append(int(f"{prefix}0.attn.qkv.weight" in shapes))
        table = shapes.get(f"{prefix}0.attn.relative_position_bias_table")
        heads.append(table[1] if table else max(1, fc1[1] // (32 if swin else 64)))
        if table and not image:
            image = (math.isqrt(table[0]) + 1) // 2 * embedding[-1] * 2**i
    if not dims or (not swin and "pos_embed1" not in shapes):
        return None
    if not swin:
        image = math.isqrt(shapes["pos_embed1"][1]) * embedding[-1]
    qkv = [name for name in shapes if name.endswith("attn.qkv.weight")]
    config: dict[str, Any] = {
        "code": "s_m_b" if swin else "ti",
        "img_size": image or 224,
        "patch_size": embedding[-1],
        "in_chans": embedding[1],
        "num_classes": shapes.get("head.weight", (0,))[0],
        "depths": depths,
        "num_heads": heads,
        "has_msa": attention,
        "qkv_bias": not qkv or qkv[0].replace("weight", "bias") in shapes,
        "qk_scale": None,
        "norm_layer": f"LayerNorm(eps={'1e-5' if swin else '1e-6'})",
    }
    if swin:
        config |= {"embed_dim": dims[0], "mlp_ratio": ratios[0]}
        config["patch_norm"] = "patch_embed.norm.weight" in shapes
        if "norm1.weight" in shapes:
            config["out_indices"] = tuple(range(len(dims)))
    else:
        config |= {"embed_dims": dims, "mlp_ratios": ratios, "deformable": not plain}
    return config


_SHARED: dict[str, Any] = {
    "img_size": 224,
    "in_chans": 3,
    "num_classes": 1000,
    "qk_scale": None,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "norm_layer": None,
    "has_msa": None,
    "use_checkpoint": False,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "s_m_b": {
        "patch_size": 4,
        "embed_dim": 96,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "drop_path_rate": 0.1,
        "ape": False,
        "patch_norm": True,
        "window_size": 7,
        "out_indices": None,
    },
    "ti": {
        "patch_size": 16,
        "embed_dims": [64, 128, 256, 512],
        "depths": [3, 4, 6, 3],
        "num_heads": [1, 2, 4, 8],
        "mlp_ratios": [4, 4, 4, 4],
        "qkv_bias": False,
        "drop_path_rate": 0.0,
        "sr_ratios": None,
        "deformable": True,
    },
}


def network(config: Mapping[str, Any]) -> LIT:
    """An unfilled network by the authors' argument names and defaults (``window_size`` and
    ``sr_ratios`` do nothing in their code). Words of ours: ``code``, which of their two code bases,
    ``"ti"`` or ``"s_m_b"`` (default: by the name of the widths); ``has_msa`` in both of them;
    ``deformable=False`` for their ``PVT_Full_MSA``. ``norm_layer`` is written
    ``"LayerNorm(eps=1e-6)"``. Their detection code's ``out_indices`` puts norms on the maps and
    leaves the classifier out.

    Raises:
        PolypatchError: an unknown argument, or a setting that isn't possible.
    """
    code = config.get("code", "ti" if "embed_dims" in config else "s_m_b")
    if code not in _FAMILIES:
        raise PolypatchError(f"there is no code {code!r}{suggest(str(code), _FAMILIES)}")
    known = {"code": code, **_SHARED, **_FAMILIES[code]}
    for word in config:
        if word not in known and not word.startswith("_"):
            raise PolypatchError(
                f"LIT has no argument {word!r} in {code}{suggest(word, known, kind='arguments')}"
            )
    given = {**known, **config}
    stages = len(given["depths"])
    swin = code == "s_m_b"
    if swin and given["ape"]:
        raise PolypatchError("ape=True fails in the authors' code, which lacks the table")
    maps = given.get("out_indices")
    if maps is not None and tuple(maps) != tuple(range(stages)):
        raise PolypatchError(f"out_indices are all {stages} stages or not given, got {maps}")
    if swin:
        dims = tuple(int(given["embed_dim"] * 2**i) for i in range(stages))
        ratios = (float(given["mlp_ratio"]),) * stages
    else:
        dims, ratios = tuple(given["embed_dims"]), tuple(map(float, given["mlp_ratios"]))
    early = 0 if not swin and not given["deformable"] else 2
    attention = given["has_msa"] or [int(i >= early) for i in range(stages)]
    side = given["img_size"]
    model = LIT(
        dims=dims,
        depths=tuple(given["depths"]),
        heads=tuple(given["num_heads"]),
        expansions=ratios,
        attention=tuple(value == 1 for value in attention),
        relative=swin,
        deformable=given.get("deformable", True),
        patch=given["patch_size"],
        patch_norm=given.get("patch_norm", True),
        map_norms=maps is not None,
        eps=norm_eps(given["norm_layer"]),
        classes=0 if maps is not None else given["num_classes"],
        channels=given["in_chans"],
        resolution=side if isinstance(side, int) else tuple(side),
        qkv_bias=given["qkv_bias"],
        scale=given["qk_scale"] or None,
        drop=given["drop_rate"],
        attn_drop=given["attn_drop_rate"],
        drop_path=given["drop_path_rate"],
    )
    return model.checkpointed(bool(given["use_checkpoint"]))


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> LIT:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    model = network(config)
    _keymap_of(model).load(model, state, what="this LIT")
    return model.eval()


def to_official(model: LIT) -> dict[str, Tensor]:
    """The state dict under the authors' keys, with the index that their attention keeps."""
    state = _keymap_of(model).to_theirs(model.state_dict())
    for i, blocks in enumerate(model.stages):
        for j, block in enumerate(blocks):  # type: ignore[arg-type]
            if block.size is not None:
                height, width = block.size
                numbers = torch.arange(len(block.relative), dtype=torch.float64)
                numbers = numbers.view(1, 2 * height - 1, 2 * width - 1)
                index = relative_bias(numbers, block.size)[0, 0].long()
                state[f"layers.{i}.blocks.{j}.attn.relative_position_index"] = index
    return state


def official_config(model: LIT) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network.

    Raises:
        PolypatchError: widths or expansions that the Swin-like family has no arguments for.
    """
    doubled = tuple(model.dims[0] * 2**i for i in range(len(model.dims)))
    if model.relative and (model.dims != doubled or len(set(model.expansions)) > 1):
        raise PolypatchError(
            "with relative positions the authors' widths double from stage to stage and all MLPs "
            f"expand alike, unlike {model.dims} and {model.expansions}"
        )
    height, width = model.sides
    config: dict[str, Any] = {
        "code": "s_m_b" if model.relative else "ti",
        "img_size": height if height == width else (height, width),
        "patch_size": model.patch,
        "in_chans": model.patches.in_channels,
        "num_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "depths": list(model.depths),
        "num_heads": list(model.heads),
        "has_msa": [int(has) for has in model.attention],
        "qkv_bias": model.options["qkv_bias"],
        "qk_scale": model.options["scale"],
        "norm_layer": norm_word(model.eps),
        "drop_rate": model.options["drop"],
        "attn_drop_rate": model.options["attn_drop"],
        "drop_path_rate": model.drop_path,
    }
    if model.relative:
        config |= {"embed_dim": model.dims[0], "mlp_ratio": model.expansions[0]}
        config["patch_norm"] = isinstance(model.patch_norm, nn.LayerNorm)
        if len(model.map_norms):
            config["out_indices"] = tuple(range(len(model.dims)))
        return config
    config |= {"embed_dims": list(model.dims), "mlp_ratios": list(model.expansions)}
    return config | {"deformable": model.deformable}
