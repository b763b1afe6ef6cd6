"""MViT: a transformer whose blocks pool their own queries, keys and values.

Fan, Xiong, Mangalam, Li, Yan, Malik and Feichtenhofer, *Multiscale Vision Transformers* (ICCV 2021,
arXiv 2104.11227), for video and images; and its second version, Li et al., *MViTv2* (CVPR 2022,
arXiv 2112.01526), which is the same class in the authors' code. Resolution falls and channels grow
along the blocks, and both happen around attention. For the tokens X of a grid (time, height,
width), with a class token in front or without one (eq. 1 to 6)::

    Q, K, V = LN(P(X W_Q)), LN(P(X W_K)), LN(P(X W_V))   P: depthwise convolution, one for all
                                                         heads; it leaves the class token alone
    A  = softmax(Q Kᵀ / √d + B) V [+ Q]                  v2: residual pooling, not of the class
    X' = maxpool(X) + A W                                stride of Q, kernel stride + 1
    X″ = X' + MLP(LN(X'))                                last block of a stage: W' LN(X') + MLP

where X is normed first. A stage begins where Q is pooled by 2. K and V are pooled by 8 (images: 4)
in the first stage and by half as much in each further one, so that attention costs little where the
grid is fine. v2's B is the decomposed relative position, ``B[q, k] = Q_q · (R_time + R_height +
R_width)`` with the *unscaled* query, each R a row of a learned table that the distance of q and k
on this axis picks; it has no absolute positions, and widths grow in the attention of a stage's
first block (the residual is ``maxpool(W' LN(X))``) instead of in the MLP before.

An image is a video of one frame. A clip is (batch, 3, frames, height, width), and its maps have a
time axis, too. Any size works: tables of positions are interpolated linearly.

Traps: norms have eps 1e-6, and pooled Q, K, V are normed together with the class token. Blocks that
don't pool Q don't norm it. Where the width changes, the residual is a linear map of the *normed*
tokens. Pooling with stride 1 is still a convolution (v2 has one for Q in every block). Kernels are
3, except in v1's 24 blocks for video, where they are stride + 1 and nothing is pooled by stride 1.
``position="sincos"`` is added twice, as the authors' code does. Their network ends in a softmax in
eval mode; here logits come out, and :meth:`MViT.probabilities` gives what theirs does.

MViT-S and MViT-B-24-wide stand in the paper only; no configuration was published. The wide network
here has the paper's parameters and operations. MViT-S (3, 7 and 6 blocks from patches of 8 pixels)
has 26.0 of its 26.1 million parameters, but 30 of its 32.9 G operations, so a detail of it differs.

Not here: reversible blocks and masked pre-training, other papers' methods in the same code, and
the region head of the detection experiments, for which :meth:`MViT.features` gives the maps.

The operator is in ``mvit_attention.py``, blocks and network in ``mvit_network.py``, the authors'
names and settings in ``mvit_weights.py``. Maps stay channels-last, which pooling convolutions take
without a copy, keys and values of all heads at once. In inference the last block computes the class
token alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import PolypatchError
from ..nn import Preprocessing
from .mvit_attention import BlockShape, Pooling, relative_bias
from .mvit_network import MViT, plan
from .mvit_weights import (
    ASSUMED,
    from_official,
    keymap,
    network,
    official_config,
    recognise_network,
    to_official,
)

__all__ = [
    "ASSUMED",
    "VARIANTS",
    "BlockShape",
    "MViT",
    "Pooling",
    "Variant",
    "assemble",
    "build",
    "from_official",
    "keymap",
    "network",
    "official_config",
    "plan",
    "recognise",
    "relative_bias",
    "to_official",
]


@dataclass(frozen=True)
class Variant:
    """A named network. ``frames`` 0: of images. ``kernel`` 0: stride + 1."""

    dim: int
    heads: int
    depths: tuple[int, ...]
    version: int = 1
    frames: int = 0
    resolution: int = 224
    first_key_stride: int = 4
    kernel: int = 3
    patch: tuple[int, int] = (7, 4)
    patch_padding: int = 3
    class_token: bool = True
    widen_in_attention: bool = False
    mode: str = "conv"
    drop_path: float = 0.1
    preprocessing: Preprocessing | None = None

    @property
    def blocks(self) -> tuple[BlockShape, ...]:
        starts = [sum(self.depths[:k]) for k in range(1, len(self.depths))]
        depth = sum(self.depths)
        kernel = (self.kernel if self.frames else 1, self.kernel, self.kernel)
        return plan(
            dim=self.dim,
            heads=self.heads,
            depth=depth,
            dim_factors=dict.fromkeys(starts, 2.0),
            head_factors=dict.fromkeys(starts, 2.0),
            query_strides=dict.fromkeys(range(depth) if self.version == 2 else (), (1, 1, 1))
            | dict.fromkeys(starts, (1, 2, 2)),
            first_key_stride=(1, self.first_key_stride, self.first_key_stride),
            kernel=kernel if self.kernel else None,
            widen_in_attention=self.widen_in_attention,
        )


def _clips(frames: int, drop_path: float, **others: Any) -> dict[str, Any]:
    return {"frames": frames, "first_key_stride": 8, "drop_path": drop_path} | others


_B, _B24 = (96, 1, (1, 2, 11, 2)), (96, 1, (2, 3, 16, 3))
_LARGE = (144, 2, (2, 6, 36, 4))
_V2: dict[str, Any] = {"version": 2, "widen_in_attention": True}
_V2_IMAGE: dict[str, Any] = _V2 | {"class_token": False}
_L_CLIPS = Preprocessing(resolution=312, crop=1.0, interpolation="bilinear")

#: by the papers' tables of architectures and results, and by the configurations in the authors'
#: repositories where there is one; frames × sampling rate in the names of video networks. Also
#: stochastic depth is theirs, except for S, B 32x3 and 64x3, B-24-wide and v2-h, by analogy.
#: nano, nano-v2 and nano-video are ours, for demonstrations on a CPU.
VARIANTS: dict[str, Variant] = {
    "mvit-nano": Variant(32, 1, (1, 2, 3), resolution=32, patch=(7, 4), first_key_stride=4),
    "mvit-nano-v2": Variant(32, 1, (1, 2, 2), resolution=32, **_V2_IMAGE),
    "mvit-nano-video": Variant(
        32, 1, (1, 2, 2), **_clips(4, 0.1, resolution=32, first_key_stride=4)
    ),
    "mvit-s-16x4": Variant(
        128, 1, (3, 7, 6), patch=(8, 8), patch_padding=0,
        **_clips(16, 0.2, first_key_stride=4),
    ),
    "mvit-b-16x4": Variant(*_B, **_clips(16, 0.2)),
    "mvit-b-32x3": Variant(*_B, **_clips(32, 0.2)),
    "mvit-b-64x3": Variant(*_B, **_clips(64, 0.2)),
    "mvit-b-24-32x3": Variant(*_B24, **_clips(32, 0.3, kernel=0)),
    "mvit-b-16": Variant(*_B),
    "mvit-b-16-max": Variant(*_B, mode="max"),
    "mvit-b-24-wide": Variant(112, 1, (2, 3, 16, 3), drop_path=0.3),
    "mvit-b-24-wide-320": Variant(
        112, 1, (2, 3, 16, 3), resolution=320, drop_path=0.3,
        preprocessing=Preprocessing(resolution=320),
    ),
    "mvit-v2-t": Variant(96, 1, (1, 2, 5, 2), **_V2_IMAGE),
    "mvit-v2-s": Variant(*_B, **_V2_IMAGE),
    "mvit-v2-b": Variant(*_B24, drop_path=0.3, **_V2_IMAGE),
    "mvit-v2-l": Variant(*_LARGE, version=2, class_token=False, drop_path=0.5),
    "mvit-v2-h": Variant(192, 3, (4, 8, 60, 8), drop_path=0.8, **_V2_IMAGE),
    "mvit-v2-s-16x4": Variant(*_B, **_clips(16, 0.2), **_V2),
    "mvit-v2-b-32x3": Variant(*_B24, **_clips(32, 0.3), **_V2),
    "mvit-v2-l-40x3": Variant(
        *_LARGE, **_clips(40, 0.75, resolution=312, preprocessing=_L_CLIPS), **_V2
    ),
}  # fmt: skip


def assemble(
    variant: Variant,
    *,
    classes: int = 1000,
    channels: int = 3,
    resolution: int | None = None,
    frames: int | None = None,
    drop_path: float | None = None,
    dropout: float = 0.0,
    head_dropout: float | None = None,
) -> MViT:
    """Wire a network without filling it; arguments as those of :func:`build`."""
    video, (kernel, stride) = variant.frames > 0, variant.patch
    padding = variant.patch_padding
    if frames is not None and not video:
        raise PolypatchError("frames= is for the variants that take video")
    if head_dropout is None:
        head_dropout = 0.5 if video else 0.0
    return MViT(
        blocks=variant.blocks,
        patch=Pooling((3 if video else 1, kernel, kernel), (2 if video else 1, stride, stride)),
        patch_padding=(int(video), padding, padding),
        video=video,
        frames=(frames or variant.frames) if video else 1,
        resolution=variant.resolution if resolution is None else resolution,
        channels=channels,
        classes=classes,
        class_token=variant.class_token,
        position="none" if variant.version == 2 else "separate" if video else "joint",
        relative_space=variant.version == 2,
        relative_time=variant.version == 2 and video,
        residual_pooling=variant.version == 2,
        widen_in_attention=variant.widen_in_attention,
        mode=variant.mode,
        dropout=dropout,
        head_dropout=head_dropout,
        drop_path=variant.drop_path if drop_path is None else drop_path,
        preprocessing=variant.preprocessing,
    )


def build(
    variant: str,
    *,
    classes: int = 1000,
    resolution: int | None = None,
    frames: int | None = None,
    channels: int = 3,
    drop_path: float | None = None,
    dropout: float = 0.0,
    head_dropout: float | None = None,
) -> MViT:
    """A named network with fresh weights.

    Args:
        resolution, frames: what the tables of positions are made for, default the variant's own;
            any size of input works.
        drop_path, head_dropout: default the authors' recipe.

    Raises:
        PolypatchError: frames of an image network, less than one patch.
    """
    model = assemble(
        VARIANTS[variant],
        classes=classes,
        channels=channels,
        resolution=resolution,
        frames=frames,
        drop_path=drop_path,
        dropout=dropout,
        head_dropout=head_dropout,
    )
    model.init_weights()
    return model


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`network` from names and shapes, None if these are no MViT's.

    Strides are those of the published networks: patches by 4 (their kernel's size if that is 8 or
    more) and 2 frames; queries by 2 where widths grow, if tables of relative positions agree;
    keys and values by 8 (images: 4, small patches' half) in the first stage; or a kernel less 1,
    where kernels differ.
    """
    return recognise_network(shapes)
