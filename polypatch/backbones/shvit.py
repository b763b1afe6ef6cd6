"""SHViT: three stages of few tokens, and attention with one head over a part of the channels.

Yun and Ro, *SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design* (CVPR 2024,
arXiv 2401.16456). The paper finds redundancy in both designs of a small transformer and removes it:
the first stage gets cells of 16×16 pixels instead of 4×4, and attention gets a single head that
sees a part of the channels, beside which the others pass untouched.

A block of a stage, with DW a depthwise 3×3 convolution and every convolution followed by a batch
norm; C channels, N = height · width cells, and Cₚ of the channels attended::

    x ← x + DW(x)                                            places nearby
    x ← x + SHSA(x)                                          all places; stages 2 and 3 only
    x ← x + Conv(ReLU(Conv(x)))                              channels, C → 2C → C

    SHSA(x):  [a | r] = x                                    (N, Cₚ), (N, C - Cₚ)
              [q | k | v] = Conv(GroupNorm(a))               (N, d), (N, d), (N, Cₚ);  d = 16
              a' = softmax(q kᵀ / √d) v
              SHSA = Conv(ReLU([a' | r]))                    C → C

The stem is four 3×3 convolutions of stride 2 (C/8, C/4, C/2, C channels; ReLU between, none at the
end). Between stages stand a block without attention, a merging (1×1 to 4C, ReLU, depthwise of
stride 2, ReLU, squeeze-and-excitation, 1×1 to the next width) and again a block without attention.
The head is the mean over all cells, a batch norm and a linear layer.

Traps: the group norm has one group, its statistics are those of all cells and attended channels of
an image; the other channels are not normed. The depthwise branch has no activation. The width
inside of squeeze-and-excitation is C rounded to the nearest multiple of 8, at least 8. Blocks begin
as the identity (the last norm of a branch starts at 0), except that the depthwise branches beside a
merging start at 1.

With ``distilled=True`` there are two heads as in DeiT, whose mean is the answer in training, too;
for training with a teacher :meth:`SHViT.both` gives the logits one by one (the authors' network
does in train mode) and :func:`distillation_loss` joins them.

``polypatch.nn.folded`` makes the network for deployment as the authors do: norms go into the
convolutions before them, and the residual of a depthwise branch into its kernel. Other patches than
16 are ours: 2ⁿ pixels come from n convolutions in the stem.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..nn import (
    Backbone,
    ConvNorm,
    DropPath,
    FeatureInfo,
    FeatureMap,
    KeyMap,
    Linear,
    Preprocessing,
    Rule,
    fresh,
    linear,
    pointwise,
)

__all__ = [
    "VARIANTS",
    "SHViT",
    "SingleHead",
    "Variant",
    "assemble",
    "build",
    "distillation_loss",
    "from_official",
    "network",
    "official_config",
    "recognise",
    "to_official",
]


class Conv(ConvNorm):
    """Convolution and batch norm of maps (batch, height, width, dim)."""

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height2 width2 out"]:
        conv, norm = self.conv, self.norm
        weight = conv.weight
        if not isinstance(norm, nn.BatchNorm2d):  # folded
            x = self._convolve(x, weight, conv.bias)
        elif norm.training or torch.is_grad_enabled():
            x = self._convolve(x, weight, None)
            x = norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            # The norm goes onto whichever has fewer values, the weights or a map.
            scale, shift = fresh.affine_of(norm)
            if weight.numel() < x.shape[1] * x.shape[2] * conv.out_channels:
                x = self._convolve(x, weight * scale.view(-1, 1, 1, 1), shift)
            else:
                x = fresh.affine(self._convolve(x, weight, None), scale, shift)
        return x if self.activation is None else self.activation(x)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv = self.conv
        if conv.kernel_size == (1, 1):
            return linear(x, weight.flatten(1), bias)
        x = x.permute(0, 3, 1, 2)
        x = F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)
        return x.permute(0, 2, 3, 1)


class Local(Conv):
    """x + norm(depthwise 3×3 of x); folded, one convolution."""

    def __init__(self, *, dim: int, gain: float, drop_path: float) -> None:
        super().__init__(dim, dim, kernel=3, groups=dim, gain=gain)
        self.drop_path = DropPath(rate=drop_path)
        self.residual = True

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        mixed = super().forward(x)
        return fresh.add(x, self.drop_path(mixed)) if self.residual else mixed

    @torch.no_grad()
    def fold(self) -> None:
        super().fold()
        if self.residual:
            self.conv.weight[:, :, 1, 1] += 1
            self.residual = False


class SingleHead(nn.Module):
    """The branch SHSA, before the residual.

    Args:
        dim: channels of the map, C.
        partial: how many of them, the first, are attended and mixed, Cₚ.
        key: width d of queries and keys.
    """

    def __init__(self, *, dim: int, partial: int, key: int) -> None:
        super().__init__()
        self.partial, self.key = partial, key
        self.norm = nn.GroupNorm(1, partial)
        self.qkv = Conv(partial, 2 * key + partial)
        self.proj = Conv(dim, dim, gain=0.0)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        batch, height, width, dim = x.shape
        attended, rest = x.split([self.partial, dim - self.partial], dim=3)
        # A group norm with one group is a layer norm over the whole sample.
        flat = attended.flatten(1)
        flat = F.layer_norm(flat, flat.shape[1:], eps=self.norm.eps).view(attended.shape)
        qkv = self.qkv(fresh.affine(flat, self.norm.weight, self.norm.bias)).flatten(1, 2)
        q, k, v = qkv[:, None].split([self.key, self.key, self.partial], dim=3)
        wide = max(self.key, self.partial)
        mixed = F.scaled_dot_product_attention(
            F.pad(q, (0, wide - self.key)),
            F.pad(k, (0, wide - self.key)),
            F.pad(v, (0, wide - self.partial)),
            scale=self.key**-0.5,
        )[..., : self.partial]
        mixed = mixed.view(batch, height, width, self.partial)
        return self.proj(fresh.relu(torch.cat([mixed, rest], dim=3)))


class FeedForward(nn.Module):
    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.expand = Conv(dim, 2 * dim, activation=fresh.relu)
        self.reduce = Conv(2 * dim, dim, gain=0.0)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        return self.reduce(self.expand(x))


class Block(nn.Module):
    """Places nearby, all places (if there is a ``mixing``), channels; ``gain``: initial weight of
    the norm behind the depthwise convolution."""

    def __init__(
        self, *, dim: int, mixing: SingleHead | None = None, gain: float = 0.0, drop_path: float
    ) -> None:
        super().__init__()
        self.local = Local(dim=dim, gain=gain, drop_path=drop_path)
        self.mixing = mixing
        self.ffn = FeedForward(dim=dim)
        self.drop_path = DropPath(rate=drop_path)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        x = self.local(x)
        if self.mixing is not None:
            x = fresh.add(x, self.drop_path(self.mixing(x)))
        return fresh.add(x, self.drop_path(self.ffn(x)))


class SqueezeExcite(nn.Module):
    """Channels gated by what the whole map holds (Hu et al. 2018); no norms, ReLU and sigmoid."""

    def __init__(self, *, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        gate = self.fc2(fresh.relu(self.fc1(x.mean((1, 2))))).sigmoid()
        return x * gate[:, None, None]


class Merging(nn.Module):
    """Half as many cells a side, rounded up, of another width."""

    def __init__(self, *, dim: int, out: int) -> None:
        super().__init__()
        hidden = 4 * dim
        self.conv1 = Conv(dim, hidden, activation=fresh.relu)
        self.conv2 = Conv(hidden, hidden, kernel=3, stride=2, groups=hidden, activation=fresh.relu)
        self.se = SqueezeExcite(dim=hidden, hidden=max(8, (dim + 4) // 8 * 8))
        self.conv3 = Conv(hidden, out)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch half_height half_width out"]:
        return self.conv3(self.se(self.conv2(self.conv1(x))))


class Head(nn.Module):
    """Batch norm and classifier."""

    def __init__(self, *, dim: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.linear = Linear(dim, classes)

    def forward(self, pooled: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        return self.linear(self.norm(pooled))


class DistilledHead(nn.Module):
    """A second head that learns from a teacher; the answer is the mean of both."""

    def __init__(self, *, dim: int, classes: int) -> None:
        super().__init__()
        self.head = Head(dim=dim, classes=classes)
        self.distilled = Head(dim=dim, classes=classes)

    def both(self, pooled: Float[Tensor, "batch dim"]) -> tuple[Tensor, Tensor]:
        return self.head(pooled), self.distilled(pooled)

    def forward(self, pooled: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        own, distilled = self.both(pooled)
        return (own + distilled) / 2


class SHViT(Backbone):
    """The network.

    Args:
        dims: width of each stage.
        depths: blocks of each stage, those around the mergings not counted.
        partial: attended channels in each stage; 0: the stage has no attention.
        keys: width of queries and keys in each stage.
        merged: between which stages the cells are merged; without, the widths must agree.
        patch: pixels a side of a cell of the first stage, a power of 2.
        classes: 0 for none.
        distilled: a second head for a teacher.
        drop_path: rate of every branch; the authors train without.

    Raises:
        PolypatchError: quantities that don't fit each other.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        partial: Sequence[int],
        keys: Sequence[int],
        merged: Sequence[bool] = (True, True),
        patch: int = 16,
        classes: int = 1000,
        channels: int = 3,
        distilled: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(dims) == len(depths) == len(partial) == len(keys) == len(merged) + 1:
            raise PolypatchError(
                f"dims, depths, partial and keys have one value a stage and merged one less, got "
                f"{len(dims)}, {len(depths)}, {len(partial)}, {len(keys)} and {len(merged)}"
            )
        halvings = patch.bit_length() - 1
        if patch < 2 or patch != 2**halvings or dims[0] < patch // 2:
            raise PolypatchError(
                "patch is a power of 2, and the first stage at least half as wide; got "
                f"patch={patch} and dims[0]={dims[0]}"
            )
        for dim, share in zip(dims, partial):
            if not 0 <= share <= dim:
                raise PolypatchError(f"of {dim} channels {share} can't be attended")
        for number, (merging, dim, out) in enumerate(zip(merged, dims, dims[1:]), start=1):
            if not merging and dim != out:
                raise PolypatchError(
                    f"stages {number} and {number + 1} have no merging between them and differ in "
                    f"width: {dim} and {out}"
                )
        self.dim, self.patch, self.distilled = dims[-1], patch, distilled
        self.dims, self.depths, self.merged = tuple(dims), tuple(depths), tuple(merged)
        self.partial = tuple(share if depth else 0 for share, depth in zip(partial, depths))
        self.keys = tuple(key if share else 0 for key, share in zip(keys, self.partial))
        widths = [channels, *(dims[0] >> k for k in reversed(range(halvings)))]
        self.stem = nn.Sequential(
            *(
                Conv(
                    dim,
                    out,
                    kernel=3,
                    stride=2,
                    activation=fresh.relu if k < halvings - 1 else None,
                )
                for k, (dim, out) in enumerate(pairwise(widths))
            )
        )

        def pair(dim: int) -> Block:
            return Block(dim=dim, gain=1.0, drop_path=drop_path)

        self.stages = nn.ModuleList()
        for number, dim in enumerate(dims):
            stage = nn.ModuleList()
            if number and merged[number - 1]:
                before = dims[number - 1]
                stage += [pair(before), Merging(dim=before, out=dim), pair(dim)]
            for _ in range(depths[number]):
                share, key = self.partial[number], self.keys[number]
                mixing = SingleHead(dim=dim, partial=share, key=key) if share else None
                stage.append(Block(dim=dim, mixing=mixing, drop_path=drop_path))
            self.stages.append(stage)
        strides = [patch * 2 ** sum(merged[:number]) for number in range(len(dims))]
        self.feature_info = tuple(FeatureInfo(d, s) for d, s in zip(dims, strides))
        self.head = self._fresh_head(classes)
        self.channels_last()

    def _fresh_head(self, classes: int) -> nn.Module:
        if not classes:
            return nn.Identity()
        return (DistilledHead if self.distilled else Head)(dim=self.dim, classes=classes)

    def _maps(self, image: Tensor) -> Iterator[Tensor]:
        """The map behind each stage, (batch, height, width, dim)."""
        x = self.stem(image.permute(0, 2, 3, 1))
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x = self.through(block, x)
            yield x

    def pooled(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim"]:
        for last in self._maps(image):
            x = last
        return x.mean((1, 2))

    def features(self, image: Float[Tensor, "batch channels height width"]) -> list[FeatureMap]:
        """One map behind each stage, as the authors' detectors read them."""
        return [
            FeatureMap(x.permute(0, 3, 1, 2), info.stride)
            for x, info in zip(self._maps(image), self.feature_info)
        ]

    def both(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]]:
        """Logits of the two heads, the classifier's and the teacher's pupil, for
        :func:`distillation_loss`.

        Raises:
            PolypatchError: a network with one head.
        """
        if not isinstance(self.head, DistilledHead):
            raise PolypatchError("this SHViT has one head; build it with distilled=True for two")
        return self.head.both(self.pooled(image))

    def reset_head(self, classes: int) -> None:
        """Fresh heads of the network's kind: with their batch norms, and two if it was distilled;
        0: none, the pooled features come out."""
        like = next(self.parameters())
        self.head = self._fresh_head(classes).to(device=like.device, dtype=like.dtype)
        self.init_head()

    def init_head(self) -> None:
        """Linear: normal, std 0.02; zero bias. Batch norm: as fresh."""
        for module in self.head.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm1d):
                module.reset_parameters()

    def init_weights(self) -> None:
        """The authors'.

        | layer                                                      | weight           | bias    |
        |------------------------------------------------------------|------------------|---------|
        | convolutions, squeeze-and-excitation                       | uniform, ±1/√fan in | same |
        | batch norms at the end of a branch of a block              | 0                | 0       |
        | other norms; those of the depthwise branches at a merging  | 1                | 0       |
        | classifiers                                                | normal, std 0.02 | 0       |
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
                module.reset_parameters()
            elif isinstance(module, ConvNorm):
                module.init_weights()
        self.init_head()


def distillation_loss(
    both: tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]],
    targets: Float[Tensor, "batch classes"] | Int64[Tensor, " batch"],
    teacher: Float[Tensor, "batch classes"],
    *,
    kind: str = "hard",
    alpha: float = 0.5,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """(1 - α) · cross-entropy of the classifier + α · loss of the pupil against the teacher (DeiT,
    Touvron et al. 2021, eq. 2 and 3, in the authors' form).

    Args:
        both: what :meth:`SHViT.both` gives.
        targets: labels or class probabilities.
        teacher: the teacher's logits; no gradient goes there.
        kind: ``"hard"``, cross-entropy with the teacher's decision, or ``"soft"``, Kullback-Leibler
            divergence at ``temperature`` τ times τ², as a mean over samples *and classes*.

    Raises:
        PolypatchError: an unknown ``kind``.
    """
    own, pupil = both
    teacher = teacher.detach()
    if kind == "hard":
        learned = F.cross_entropy(pupil, teacher.argmax(1))
    elif kind == "soft":
        pupil, teacher = ((x / temperature).log_softmax(1) for x in (pupil, teacher))
        divergence = F.kl_div(pupil, teacher, reduction="sum", log_target=True)
        learned = divergence * temperature**2 / pupil.numel()
    else:
        known = ("hard", "soft")
        raise PolypatchError(f"there is no kind={kind!r}{suggest(kind, known, kind='kinds')}")
    return (1 - alpha) * F.cross_entropy(own, targets) + alpha * learned


@dataclass(frozen=True)
class Variant:
    dims: tuple[int, int, int]
    depths: tuple[int, int, int]
    partial: tuple[int, int, int]
    patch: int = 16
    resolution: int = 224


#: the authors' README and builders, without the attended channels that they write down for the
#: first stage, which has no attention; nano is ours, for demonstrations on a CPU
VARIANTS: dict[str, Variant] = {
    "shvit-nano": Variant((64, 96, 128), (1, 2, 2), (0, 20, 28), patch=4, resolution=32),
    "shvit-s1": Variant((128, 224, 320), (2, 4, 5), (0, 48, 68)),
    "shvit-s2": Variant((128, 308, 448), (2, 4, 5), (0, 66, 96)),
    "shvit-s3": Variant((192, 352, 448), (3, 5, 5), (0, 75, 96)),
    "shvit-s4": Variant((224, 336, 448), (4, 7, 6), (0, 72, 96), resolution=256),
}


def assemble(
    variant: Variant,
    *,
    patch: int | None = None,
    classes: int = 1000,
    channels: int = 3,
    distilled: bool = False,
    drop_path: float = 0.0,
) -> SHViT:
    """Wire a network without filling it."""
    model = SHViT(
        dims=variant.dims,
        depths=variant.depths,
        partial=variant.partial,
        keys=(16, 16, 16),
        patch=variant.patch if patch is None else patch,
        classes=classes,
        channels=channels,
        distilled=distilled,
        drop_path=drop_path,
    )
    model.preprocessing = Preprocessing(resolution=variant.resolution)
    return model


def build(
    variant: str,
    *,
    classes: int = 1000,
    resolution: int | None = None,
    patch: int | None = None,
    channels: int = 3,
    distilled: bool = False,
    drop_path: float = 0.0,
) -> SHViT:
    """A named network with fresh weights; the arguments are :class:`SHViT`'s. ``resolution``
    changes nothing: any input size works."""
    model = assemble(
        VARIANTS[variant],
        patch=patch,
        classes=classes,
        channels=channels,
        distilled=distilled,
        drop_path=drop_path,
    )
    model.init_weights()
    return model


# ---- authors' weights --------------------------------------------------------------------------

#: what no shape tells: nothing
ASSUMED: tuple[str, ...] = ()


def keymap(merged: Sequence[bool], *, distilled: bool) -> KeyMap:
    """Theirs ↔ ours, for stages with or without a merging in front of their blocks; its modules are
    the first three of a stage."""
    convs = [(f"patch_embed.{2 * k}", f"stem.{k}") for k in range(16)]
    others: list[Rule | tuple[str, str]] = []
    for number, merging in enumerate((False, *merged)):
        theirs, ours = f"blocks{number + 1}", f"stages.{number}"
        if merging:
            for k in (0, 2):
                convs += [
                    (f"{theirs}.{k}.0.m", f"{ours}.{k}.local"),
                    (f"{theirs}.{k}.1.m.pw1", f"{ours}.{k}.ffn.expand"),
                    (f"{theirs}.{k}.1.m.pw2", f"{ours}.{k}.ffn.reduce"),
                ]
            convs += [(f"{theirs}.1.conv{k}", f"{ours}.1.conv{k}") for k in (1, 2, 3)]
            others += [pointwise(f"{theirs}.1.se.fc{k}", f"{ours}.1.se.fc{k}") for k in (1, 2)]
        convs += [
            (f"{theirs}.{{i}}.conv.m", f"{ours}.{{i}}.local"),
            (f"{theirs}.{{i}}.mixer.m.qkv", f"{ours}.{{i}}.mixing.qkv"),
            (f"{theirs}.{{i}}.mixer.m.proj.1", f"{ours}.{{i}}.mixing.proj"),
            (f"{theirs}.{{i}}.ffn.m.pw1", f"{ours}.{{i}}.ffn.expand"),
            (f"{theirs}.{{i}}.ffn.m.pw2", f"{ours}.{{i}}.ffn.reduce"),
        ]
        others.append((f"{theirs}.{{i}}.mixer.m.pre_norm", f"{ours}.{{i}}.mixing.norm"))
    heads = {"head": "head.head", "head_dist": "head.distilled"} if distilled else {"head": "head"}
    for theirs, ours in heads.items():
        others += [(f"{theirs}.bn", f"{ours}.norm"), (f"{theirs}.l", f"{ours}.linear")]
    split = [
        (f"{theirs}.{short}", f"{ours}.{word}")
        for theirs, ours in convs
        for short, word in (("c", "conv"), ("bn", "norm"))
    ]
    return KeyMap([*split, *others])


def _encoder(named: Mapping[str, Any]) -> dict[str, Any]:
    """Of a file of the authors' detectors the encoder, which stands under ``backbone.`` there; the
    neck and the heads of detection are no part of it. Any other file as it is."""
    inner = {n.removeprefix("backbone."): v for n, v in named.items() if n.startswith("backbone.")}
    return inner or dict(named)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`from_official` from names and shapes, None if these are no
    SHViT's; widths of attention are 0 in stages without. Files of the authors' detectors count."""
    shapes = _encoder(shapes)
    stages = [
        int(found[1]) for n in shapes if (found := re.match(r"blocks(\d+)\.\d+\.conv\.m\.c\.", n))
    ]
    if not stages or not {"patch_embed.0.c.weight", "patch_embed.0.bn.weight"} <= shapes.keys():
        return None
    halvings = sum(bool(re.fullmatch(r"patch_embed\.\d+\.c\.weight", n)) for n in shapes)
    dim = shapes[f"patch_embed.{2 * halvings - 2}.c.weight"][0]
    config: dict[str, Any] = {
        "in_chans": shapes["patch_embed.0.c.weight"][1],
        "num_classes": shapes.get("head.l.weight", (0,))[0],
        "embed_dim": [],
        "partial_dim": [],
        "qk_dim": [],
        "depth": [],
        "types": [],
        "down_ops": [],
        "distillation": "head_dist.l.weight" in shapes,
        "patch_size": 2**halvings,
    }
    for stage in range(1, max(stages) + 1):
        merged = f"blocks{stage}.1.conv3.c.weight" in shapes
        dim = shapes[f"blocks{stage}.1.conv3.c.weight"][0] if merged else dim
        mixer = f"blocks{stage}.{3 if merged else 0}.mixer.m"
        partial = shapes.get(f"{mixer}.pre_norm.weight", (0,))[0]
        rows = shapes[f"{mixer}.qkv.c.weight"][0] if partial else 0
        local = re.compile(rf"blocks{stage}\.\d+\.conv\.m\.c\.weight")
        config["embed_dim"].append(dim)
        config["partial_dim"].append(partial)
        config["qk_dim"].append((rows - partial) // 2)
        config["depth"].append(sum(bool(local.fullmatch(n)) for n in shapes))
        config["types"].append("s" if partial else "i")
        if stage > 1:
            config["down_ops"].append(["subsample", 2] if merged else [""])
    config["down_ops"].append([""])
    return config


DOWN_OPS = (("subsample", 2), ("subsample", 2), ("",))


def network(config: Mapping[str, Any]) -> SHViT:
    """An unfilled network by the authors' argument names, with their defaults: ``in_chans``,
    ``num_classes``, ``embed_dim``, ``partial_dim``, ``qk_dim``, ``depth``, ``types`` (``"s"``: with
    attention, ``"i"``: without), ``down_ops`` (behind each stage ``["subsample", 2]`` or ``[""]``;
    the number does nothing), ``distillation``; and our ``patch_size`` (16).

    Raises:
        PolypatchError: settings that the authors' network has no meaning for, and frozen stages.
    """
    depths = list(config.get("depth", (1, 2, 3)))
    types = list(config.get("types", ("s",) * len(depths)))
    downs = [
        down[0] for down in config.get("down_ops", (("subsample", 2), ("subsample", 2), ("",)))
    ]
    if config.get("frozen_stages", -1) >= 0:
        raise PolypatchError("frozen_stages is not read; call model.stem.requires_grad_(False)")
    if len(types) != len(depths) or set(types) - {"s", "i"}:
        raise PolypatchError(f"types are 's' or 'i', one of {len(depths)} stages each, got {types}")
    if len(downs) != len(depths) or set(downs) - {"subsample", ""} or downs[-1]:
        raise PolypatchError(
            f"down_ops are 'subsample' or '', one of {len(depths)} stages each, the last '', got "
            f"{downs}"
        )

    def attended(name: str, default: tuple[int, ...]) -> list[int]:
        return [n if kind == "s" else 0 for n, kind in zip(config.get(name, default), types)]

    model = SHViT(
        dims=config.get("embed_dim", (128, 256, 384)),
        depths=depths,
        partial=attended("partial_dim", (32, 64, 96)),
        keys=attended("qk_dim", (16, 16, 16)),
        merged=[down == "subsample" for down in downs[:-1]],
        patch=config.get("patch_size", 16),
        classes=config.get("num_classes", 1000),
        channels=config.get("in_chans", 3),
        distilled=config.get("distillation", False),
    )
    for variant in VARIANTS.values():
        if (variant.dims, variant.depths) == (model.dims, model.depths):
            model.preprocessing = Preprocessing(resolution=variant.resolution)
    return model


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> SHViT:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    model = network(config)
    keys = keymap(model.merged, distilled=isinstance(model.head, DistilledHead))
    keys.load(model, _encoder(state), what="this SHViT")
    return model.eval()


def to_official(model: SHViT) -> dict[str, Tensor]:
    """The state dict under the authors' keys."""
    keys = keymap(model.merged, distilled=isinstance(model.head, DistilledHead))
    return keys.to_theirs(model.state_dict())


def official_config(model: SHViT) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network."""
    first = model.stem[0]
    assert isinstance(first, Conv)
    head = model.head.head if isinstance(model.head, DistilledHead) else model.head
    return {
        "in_chans": first.conv.in_channels,
        "num_classes": head.linear.out_features if isinstance(head, Head) else 0,
        "embed_dim": list(model.dims),
        "partial_dim": list(model.partial),
        "qk_dim": list(model.keys),
        "depth": list(model.depths),
        "types": ["s" if partial else "i" for partial in model.partial],
        "down_ops": [["subsample", 2] if merged else [""] for merged in (*model.merged, False)],
        "distillation": isinstance(model.head, DistilledHead),
        "patch_size": model.patch,
    }
