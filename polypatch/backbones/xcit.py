"""XCiT: attention between channels instead of tokens, at a cost linear in the number of patches.

El-Nouby, Touvron, Caron, Bojanowski, Douze, Joulin, Laptev, Neverova, Synnaeve, Verbeek and Jégou,
*XCiT: Cross-Covariance Image Transformers* (NeurIPS 2021, arXiv 2106.09681). What a token-to-token
attention map does over N tokens, a map between the d channels of a head does here: cross-covariance
attention (XCA). As it mixes all tokens only through sums, depthwise convolutions add local
exchange (LPI), and two class-attention layers (Touvron et al. 2021, CaiT) gather the image at the
end. Per block, with Q̂ and K̂ of unit length *along the tokens*, τ learned per head, γ LayerScale::

    XCA(X) = V · softmax(K̂ᵀQ̂ τ)            V, K̂, Q̂: N × d; softmax over the keys' channels
    LPI(X) = Conv₃ₓ₃(BN(σ(Conv₃ₓ₃(X))))    depthwise
    x ← x + γ₁ XCA(LN(x));  x ← x + γ₃ LPI(LN(x));  x ← x + γ₂ MLP(LN(x))

in front of them a stem of 3×3 convolutions of stride 2 and a Fourier code of the place, behind them
class attention, for which the class token comes in only then.

Traps, all as in the published weights:

* the authors' keys number the norms by 1, 3, 2 in the order of use;
* XCA has no 1/√d; class attention has. The paper divides by its temperature, the code multiplies;
* in a class-attention block ``norm2`` *replaces* the class token (with ``tokens_norm`` the patch
  tokens, too), so the residual of the MLP starts from normed tokens; patch tokens go through the
  block as 2·norm2(x + γ₁ norm1(x)), or without norm2 if ``tokens_norm`` is off;
* only XCA blocks drop paths, all at the same rate, class attention doesn't;
* ``XCA.no_weight_decay`` spares the temperature, but the training script never asks it: it decays.

In the authors' class ``in_chans`` and ``patch_proj`` do nothing and ``qk_scale`` reaches class
attention only; ``in_chans`` works here. Their stem takes patches of 8 and 16, this one any power
of two, by the same rule.

How it is computed: the class token is one query, so that its attention needs no keys or values:
q·(W_k x) = (W_kᵀq)·x, and the mean of W_v x is W_v times the mean of x, which leaves two products
of (heads × dim) with (dim × tokens). Patch tokens behind the last class block are read by nobody
and not computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..nn import (
    Backbone,
    ConvNorm,
    FeatureInfo,
    FeatureMap,
    InputRequirements,
    KeyMap,
    Preprocessing,
    fresh,
    load_exactly,
    pointwise,
)
from ..nn.arguments import expansion
from .xcit_blocks import (
    EPS,
    Block,
    ClassBlock,
    Position,
    Pyramid,
    class_attention,
    cross_covariance,
    fourier_code,
)

__all__ = [
    "VARIANTS",
    "Variant",
    "XCiT",
    "assemble",
    "build",
    "class_attention",
    "cross_covariance",
    "distillation_loss",
    "fourier_code",
    "from_official",
    "graft_stem",
    "network",
    "official_config",
    "recognise",
    "to_official",
]


# ---- the network ---------------------------------------------------------------------------------


def taps_of(depth: int) -> tuple[int, ...]:
    """A third, half, two thirds and the whole of the blocks: the authors' choice for 12 and 24."""
    return tuple(sorted({max(1, depth * k // 6) for k in (2, 3, 4, 6)}))


class XCiT(Backbone):
    """The network of figure 1.

    Args:
        patch: pixels a side, a power of two; a stem layer for each factor of 2.
        gain: where the LayerScale gains begin (the authors' ``eta``).
        class_depth: class-attention layers.
        class_scale: of the logits of class attention; default 1/√(dim / heads).
        tokens_norm: class-attention blocks norm the patch tokens, too (see the traps above).
        use_position: off: the code of the place is kept among the weights but not added.
        pyramid: the authors' backbone of detectors instead: no class attention; ``features`` are at
            strides 4 to 32. It has no classifier there; here the head reads the mean of the last
            map.
        taps: numbers of the blocks, from 1, behind which ``features`` looks; see :func:`taps_of`.

    Raises:
        PolypatchError: a patch that is no power of two, heads that don't divide the width, taps
            that are no blocks.
    """

    preprocessing = Preprocessing(crop=1.0)
    undecayed = ("class_token",)

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        patch: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        gain: float = 1.0,
        class_depth: int = 2,
        class_scale: float | None = None,
        tokens_norm: bool = True,
        use_position: bool = True,
        pyramid: bool = False,
        taps: tuple[int, ...] | None = None,
        classes: int = 1000,
        channels: int = 3,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        steps = patch.bit_length() - 1
        if patch < 2 or patch != 2**steps:
            raise PolypatchError(f"the stem halves the image: patches of 8 or 16, not {patch}")
        if dim % heads:
            raise PolypatchError(f"{heads} heads don't divide a width of {dim}")
        if class_depth < 1:
            raise PolypatchError("without class attention the class token would see no image")
        if not dim >> (steps - 1):
            raise PolypatchError(f"a width of {dim} can't begin {steps - 1} times halved")
        taps = tuple(sorted(taps or taps_of(depth)))
        if not all(1 <= tap <= depth for tap in taps) or (pyramid and len(taps) > 4):
            few = "up to four numbers" if pyramid else "numbers"
            raise PolypatchError(f"taps are {few} of blocks from 1 to {depth}, got {taps}")
        self.dim, self.patch, self.gain, self.taps = dim, patch, gain, taps
        self.use_position, self.tokens_norm = use_position, tokens_norm
        self.class_scale, self.dropout = class_scale, dropout
        widths = [channels, *(dim >> (steps - 1 - i) for i in range(steps))]
        self.stem = nn.Sequential(
            *(
                ConvNorm(
                    widths[i],
                    widths[i + 1],
                    kernel=3,
                    stride=2,
                    activation=fresh.gelu if i < steps - 1 else None,
                )
                for i in range(steps)
            )
        )
        self.position = Position(dim=dim)
        common: dict[str, Any] = {
            "dim": dim,
            "heads": heads,
            "hidden": int(dim * mlp_ratio),
            "qkv_bias": qkv_bias,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
        }
        self.blocks = nn.ModuleList(Block(**common, drop_path=drop_path) for _ in range(depth))
        self.pyramid = Pyramid(dim=dim, patch=patch) if pyramid else None
        if not pyramid:
            self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.class_blocks = nn.ModuleList(
                ClassBlock(**common, scale=class_scale, tokens_norm=tokens_norm)
                for _ in range(class_depth)
            )
            self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head: nn.Module = nn.Linear(dim, classes) if classes else nn.Identity()
        strides = (4, 8, 16, 32) if pyramid else (patch,) * len(taps)
        self.feature_info = tuple(FeatureInfo(dim, s) for _, s in zip(taps, strides))
        if pyramid:  # more than half of a cell of stride 32, or pooling would find nothing
            self.input_requirements = InputRequirements(minimum=33 - patch)
        self.stem_frozen = False
        self.channels_last()

    def train(self, mode: bool = True) -> XCiT:
        super().train(mode)
        if self.stem_frozen:
            self.stem.eval()
        return self

    def _maps(self, image: Tensor) -> Iterator[Tensor]:
        """The map behind each block, (batch, height, width, dim)."""
        self.input_requirements.check(image, name="this XCiT")
        x = self.stem(image.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        if self.use_position:
            x = x + self.position(x.shape[1], x.shape[2])
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = self.through(block, x)
            yield x

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        for last in self._maps(image):
            x = last
        if self.pyramid is not None:
            return x.mean((1, 2))
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)
        for number, block in enumerate(self.class_blocks, start=1):
            x = self.through(block, x, number == len(self.class_blocks))
        return self.norm(x[:, 0])

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """Four maps from a third, half, two thirds and the whole of the depth, all at the patch's
        stride; with ``pyramid`` resampled to strides 4, 8, 16 and 32."""
        kept = {n: x for n, x in enumerate(self._maps(image), start=1) if n in self.taps}
        maps = [kept[number].permute(0, 3, 1, 2) for number in self.taps]
        if self.pyramid is not None:
            maps = self.pyramid(maps, (image.shape[2], image.shape[3]))
        return [FeatureMap(x, info.stride) for x, info in zip(maps, self.feature_info)]

    def init_weights(self) -> None:
        """
        | what                      | weight                        | bias     |
        |---------------------------|-------------------------------|----------|
        | Linear, class token       | normal, std 0.02              | 0        |
        | convolutions, code's map  | torch's own: uniform, fan-in  | likewise |
        | norms                     | 1; running statistics 0 and 1 | 0        |
        | temperature; LayerScale   | 1; ``gain``                   |          |
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name != "position.proj":
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()  # type: ignore[operator]
        for name, value in self.named_parameters():
            if ".gain" in name:
                nn.init.constant_(value, self.gain)
            elif name.endswith(".temperature"):
                nn.init.ones_(value)
            elif name == "class_token":
                nn.init.trunc_normal_(value, std=0.02)


@dataclass(frozen=True)
class Variant:
    dim: int
    depth: int
    heads: int
    patch: int
    gain: float = 1.0
    tokens_norm: bool = True
    drop_path: float = 0.0


def _sizes() -> Iterator[tuple[str, Variant]]:
    for patch in (16, 8):
        for name, variant in {
            "nano-12": Variant(128, 12, 4, patch, tokens_norm=False),
            "tiny-12": Variant(192, 12, 4, patch),
            "small-12": Variant(384, 12, 8, patch, drop_path=0.05),
            "tiny-24": Variant(192, 24, 4, patch, 1e-5, drop_path=0.05),
            "small-24": Variant(384, 24, 8, patch, 1e-5, drop_path=0.1),
            "medium-24": Variant(512, 24, 8, patch, 1e-5, drop_path=0.15),
            "large-24": Variant(768, 24, 16, patch, 1e-5, drop_path=0.25 if patch == 16 else 0.3),
        }.items():
            yield f"xcit-{name}-p{patch}", variant


#: Table 1; gains and norms from the authors' registered models. Drop-path rates of tiny-12, small
#: and medium as in their files for detection; those of nano-12, tiny-24 and large-24 (table B.1)
#: could not be verified. xcit-nano is ours, for demonstrations on a CPU.
VARIANTS: dict[str, Variant] = {"xcit-nano": Variant(64, 4, 4, 4), **dict(_sizes())}


def assemble(
    variant: Variant,
    *,
    classes: int = 1000,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    channels: int = 3,
    pyramid: bool = False,
) -> XCiT:
    """Wire a network without filling it."""
    return XCiT(
        dim=variant.dim,
        depth=variant.depth,
        heads=variant.heads,
        patch=variant.patch,
        gain=variant.gain,
        tokens_norm=variant.tokens_norm,
        drop_path=variant.drop_path,
        dropout=dropout,
        attention_dropout=attention_dropout,
        channels=channels,
        pyramid=pyramid,
        classes=classes,
    )


def build(
    variant: str,
    *,
    classes: int = 1000,
    resolution: int | None = None,
    dim: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    patch: int | None = None,
    gain: float | None = None,
    drop_path: float | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    channels: int = 3,
    pyramid: bool = False,
) -> XCiT:
    """A named network with fresh weights.

    Args:
        resolution: of its preprocessing (the authors have 224 and 384); any input size works.
        dim, depth, heads, patch, gain, drop_path: in place of the variant's own.
        dropout: behind the positions, each attention's projection and both layers of each MLP.
        attention_dropout: of attention weights, between channels or tokens.
        channels: of the input.
        pyramid: the backbone of detectors, see :class:`XCiT`.
    """
    counts = {"dim": dim, "depth": depth, "heads": heads, "patch": patch}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise PolypatchError(f"{name} counts from 1, got {name}={value}")
    asked = counts | {"gain": gain, "drop_path": drop_path}
    changed = replace(VARIANTS[variant], **{k: v for k, v in asked.items() if v is not None})
    model = assemble(
        changed,
        classes=classes,
        dropout=dropout,
        attention_dropout=attention_dropout,
        channels=channels,
        pyramid=pyramid,
    )
    if resolution is not None:
        model.preprocessing = replace(model.preprocessing, resolution=resolution)
    model.init_weights()
    return model


# ---- training ------------------------------------------------------------------------------------


def distillation_loss(
    logits: Float[Tensor, "batch classes"],
    loss: Float[Tensor, ""],
    teacher: Float[Tensor, "batch classes"],
    *,
    kind: str = "hard",
    share: float = 0.5,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """(1 - share) · loss + share · distance to the teacher, from one set of logits.

    DeiT's distillation (Touvron et al. 2021) without its extra token: class and teacher are learned
    by the same head. ``hard``: cross-entropy with the teacher's first choice (the published
    weights; teacher RegNetY-16GF). ``soft``: T² KL(teacher ‖ student) at temperature T, divided by
    batch *and* classes, as the authors' code has it.

    Raises:
        PolypatchError: another kind.
    """
    teacher = teacher.detach()
    if kind == "hard":
        distance = F.cross_entropy(logits, teacher.argmax(1))
    elif kind == "soft":
        distance = F.kl_div(
            F.log_softmax(logits / temperature, 1),
            F.log_softmax(teacher / temperature, 1),
            reduction="sum",
            log_target=True,
        )
        distance = distance * temperature**2 / logits.numel()
    else:
        raise PolypatchError(f"there is no distillation {kind!r}{suggest(kind, ('hard', 'soft'))}")
    return (1 - share) * loss + share * distance


def graft_stem(model: XCiT, donor: XCiT) -> None:
    """Give ``model`` the trained stem of ``donor`` for good, norms included, and train the rest
    only: the authors' way to steady very large networks (their ``--surgery``).

    Raises:
        PolypatchError: stems of different widths or patches.
    """
    load_exactly(model.stem, donor.stem.state_dict(), what="the stem of this XCiT")
    model.stem.requires_grad_(False)
    model.stem_frozen = True
    model.train(model.training)


# ---- authors' weights --------------------------------------------------------------------------

KEYS = KeyMap(
    [
        # Their stem is a Sequential with an activation behind all layers but the last.
        *(
            rule
            for i in range(8)
            for rule in (
                (f"patch_embed.proj.{2 * i}.0", f"stem.{i}.conv"),
                (f"patch_embed.proj.{2 * i}.1", f"stem.{i}.norm"),
            )
        ),
        pointwise("pos_embeder.token_projection", "position.proj"),
        ("blocks.{i}.norm1", "blocks.{i}.norm_attention"),
        ("blocks.{i}.attn", "blocks.{i}.attention"),
        ("blocks.{i}.attn.qkv", "blocks.{i}.attention.qkv"),
        ("blocks.{i}.attn.proj", "blocks.{i}.attention.proj"),
        ("blocks.{i}.gamma1", "blocks.{i}.gain_attention"),
        ("blocks.{i}.norm3", "blocks.{i}.norm_local"),
        ("blocks.{i}.local_mp.conv{j}", "blocks.{i}.local.conv{j}"),
        ("blocks.{i}.local_mp.bn", "blocks.{i}.local.norm"),
        ("blocks.{i}.gamma3", "blocks.{i}.gain_local"),
        ("blocks.{i}.norm2", "blocks.{i}.norm_mlp"),
        ("blocks.{i}.mlp.fc{j}", "blocks.{i}.mlp.fc{j}"),
        ("blocks.{i}.gamma2", "blocks.{i}.gain_mlp"),
        ("cls_token", "class_token"),
        ("cls_attn_blocks.{i}.norm{j}", "class_blocks.{i}.norm{j}"),
        ("cls_attn_blocks.{i}.attn.qkv", "class_blocks.{i}.qkv"),
        ("cls_attn_blocks.{i}.attn.proj", "class_blocks.{i}.proj"),
        ("cls_attn_blocks.{i}.mlp.fc{j}", "class_blocks.{i}.mlp.fc{j}"),
        ("cls_attn_blocks.{i}.gamma{j}", "class_blocks.{i}.gain{j}"),
        ("norm", "norm"),
        ("head", "head"),
        *((f"fpn{i + 1}.{{j}}", f"pyramid.levels.{i}.{{j}}") for i in range(4)),
    ]
)


#: what no shape tells
ASSUMED = ("eta", "tokens_norm", "use_pos", "qk_scale", "out_indices")

#: arguments of the authors' classes and what they are where they are not given
ARGUMENTS: dict[str, Any] = {
    "patch_size": 16, "in_chans": 3, "num_classes": 1000, "embed_dim": 768, "depth": 12,
    "num_heads": 12, "mlp_ratio": 4.0, "qkv_bias": True, "qk_scale": None, "drop_rate": 0.0,
    "attn_drop_rate": 0.0, "drop_path_rate": 0.0, "cls_attn_layers": 2, "use_pos": True,
    "eta": None, "tokens_norm": False, "out_indices": None,
    "norm_layer": None, "img_size": 224, "patch_proj": "linear",
}  # fmt: skip


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`from_official` from names and shapes, None if these are no
    XCiT's. Assumed as in the authors' variants: ``tokens_norm`` but for a width of 128, ``eta``
    from the depth, and that the code of the place is in use."""
    pyramid = "fpn1.0.weight" in shapes
    needed = {"blocks.0.attn.temperature", "blocks.0.local_mp.conv1.weight"}
    if not needed | {"fpn1.0.weight" if pyramid else "cls_attn_blocks.0.gamma1"} <= shapes.keys():
        return None

    def count(pattern: str) -> int:
        return len([name for name in shapes if re.fullmatch(pattern, name)])

    depth, (dim,) = count(r"blocks\.\d+\.gamma1"), shapes["blocks.0.gamma1"]
    found: dict[str, Any] = {
        "patch_size": 2 ** count(r"patch_embed\.proj\.\d+\.0\.weight"),
        "in_chans": shapes["patch_embed.proj.0.0.weight"][1],
        "num_classes": shapes.get("head.weight", (0,))[0],
        "embed_dim": dim,
        "depth": depth,
        "num_heads": shapes["blocks.0.attn.temperature"][0],
        "mlp_ratio": expansion((shapes["blocks.0.mlp.fc1.weight"][0], dim)),
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "eta": 1.0 if depth <= 12 else 1e-5,
        "use_pos": True,
    }
    if pyramid:
        return found | {"out_indices": [tap - 1 for tap in taps_of(depth)]}
    return found | {
        "cls_attn_layers": count(r"cls_attn_blocks\.\d+\.gamma1"),
        "tokens_norm": dim != 128,
        "qk_scale": None,
    }


def network(config: Mapping[str, Any]) -> XCiT:
    """An unfilled network by the authors' argument names (:data:`ARGUMENTS`; those in the last line
    change nothing there and nothing here, ``in_chans`` does). With ``out_indices`` it is their
    backbone of detectors.

    Raises:
        PolypatchError: an argument that they don't have, or ``norm_layer`` or ``eta`` as they would
            not work.
    """
    for name in config:
        if name not in ARGUMENTS:
            raise PolypatchError(f"XCiT has no argument {name!r}{suggest(name, ARGUMENTS)}")
    given = ARGUMENTS | dict(config)
    if given["norm_layer"] is not None:
        raise PolypatchError("XCiT is built with layer norms; norm_layer can't be chosen")
    if given["eta"] is None:
        raise PolypatchError("XCiT needs a number for eta, the initial gain of its branches")
    taps = given["out_indices"]
    return XCiT(
        dim=given["embed_dim"],
        depth=given["depth"],
        heads=given["num_heads"],
        patch=given["patch_size"],
        mlp_ratio=given["mlp_ratio"],
        qkv_bias=given["qkv_bias"],
        gain=given["eta"],
        class_depth=given["cls_attn_layers"],
        class_scale=given["qk_scale"],
        tokens_norm=given["tokens_norm"],
        use_position=given["use_pos"],
        pyramid=taps is not None,
        taps=None if taps is None else tuple(tap + 1 for tap in taps),
        classes=given["num_classes"],
        channels=given["in_chans"],
        dropout=given["drop_rate"],
        attention_dropout=given["attn_drop_rate"],
        drop_path=given["drop_path_rate"],
    )


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> XCiT:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode.

    What their class ignores, the weights decide: ``in_chans``, and ``num_classes`` of a backbone
    of detectors.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    config = dict(config)
    if "patch_embed.proj.0.0.weight" in state:
        config["in_chans"] = state["patch_embed.proj.0.0.weight"].shape[1]
    if config.get("out_indices") is not None:
        config["num_classes"] = len(state.get("head.weight", ()))
    model = network(config)
    KEYS.load(model, state, what="this XCiT")
    return model.eval()


def to_official(model: XCiT) -> dict[str, Tensor]:
    """The state dict under the authors' keys."""
    return KEYS.to_theirs(model.state_dict())


def official_config(model: XCiT) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network."""
    first: Any = model.blocks[0]
    config: dict[str, Any] = {
        "patch_size": model.patch,
        "in_chans": model.stem[0].conv.in_channels,  # type: ignore[union-attr]
        "num_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "embed_dim": model.dim,
        "depth": len(model.blocks),
        "num_heads": first.attention.heads,
        "mlp_ratio": expansion((first.mlp.fc1.out_features, model.dim)),
        "qkv_bias": first.attention.qkv.bias is not None,
        "eta": model.gain,
        "use_pos": model.use_position,
        "drop_rate": model.dropout,
        "attn_drop_rate": first.attention.attention_dropout,
        "drop_path_rate": first.drop_path.rate,
    }
    if model.pyramid is not None:
        return config | {"out_indices": [tap - 1 for tap in model.taps]}
    return config | {
        "cls_attn_layers": len(model.class_blocks),
        "tokens_norm": model.tokens_norm,
        "qk_scale": model.class_scale,
    }
