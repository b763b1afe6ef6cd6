"""RVSA: plain vision transformers for images from above; windows move, stretch and turn.

Wang, Zhang, Xu, Zhang, Du, Tao and Zhang, *Advancing Plain Vision Transformer Towards Remote
Sensing Foundation Model* (IEEE TGRS 2022, arXiv 2208.03987). A ViT-B or ViTAE-B is pre-trained as a
masked autoencoder. For fine-tuning on large images two of three blocks get rotated varied-size
window attention in place of full attention, because objects seen from above lie in any direction.
For every head and every window of w × w cells (w = 7) of the normed map x::

    (o, s, θ) = W LeakyReLU(mean of x over the window)        shift, stretch, angle
    p'        = c + R(θ) ((1 + s) ∘ p) + o                    of each cell p around the centre c
    K', V'    = K, V at the p', bilinearly                    beyond the map: zeros
    attention = softmax(Q K'ᵀ / √d + Q·R + T) V'              Q of the window's own cells

with decomposed relative positions R (tables for height and width, as MViTv2's) and Swin's table T
of cell pairs; both know the cells, not where the window went. With ``separate`` (the paper's
diamond) keys and values have (o, s, θ) of their own. Every third block attends to the whole map.
ViTAE's blocks (``local``) have a convolutional branch in parallel, of the unnormed x: 3 × 3, batch
norm, SiLU, 3 × 3, both in groups of four channels. The mean of all tokens is normed and classified.

Dense maps (``pyramid``) as the authors' networks have them: for detection the normed last map, for
segmentation those behind four blocks as they are; the first is enlarged four times by two
transposed convolutions, the second twice by one, the third stays, the fourth is halved by maxima.

Traps. Coordinates are in [-1, 1] over the map, so a turn isn't rigid where the map isn't square. A
map that windows don't divide gets zeros on both sides, the odd one behind, and they take part in
the softmax. Shifts are divided by the number of windows, x by that in a *column* (the authors' code
swaps them). The query that meets relative positions is scaled in full attention, and isn't in
windows. The windows of a fresh network are not at rest. ViTAE's projections have no bias for keys;
without ``bias`` (the authors' classifiers) there is none at all. ViTAE drops hidden features of its
MLP, ViT doesn't. The authors' networks take one size, square for ViTAE; here tables are resampled.

The attentions are in ``rvsa_attention.py``, the network in ``rvsa_network.py``, the authors' names
in ``rvsa_weights.py``. Pre-training is in ``rvsa_pretraining.py``: :func:`pretraining_host` is what
``polypatch.pretraining.mae`` trains (a plain ViT; or ViTAE with kernels of 1 × 1, since hidden
patches leave no grid), and :func:`adopt` starts from it or from the authors' pre-trained weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..nn import Preprocessing
from .rvsa_network import RVSA
from .rvsa_pretraining import adopt, pretraining_host
from .rvsa_weights import (
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
    "RVSA",
    "VARIANTS",
    "Variant",
    "adopt",
    "assemble",
    "build",
    "from_official",
    "keymap",
    "network",
    "official_config",
    "pretraining_host",
    "recognise",
    "to_official",
]


@dataclass(frozen=True)
class Variant:
    """A named network. With a pyramid, and only then, projections have biases and the table of
    positions has no spare row, as in the authors' code."""

    dim: int = 768
    depth: int = 12
    heads: int = 12
    patch: int = 16
    resolution: int = 224
    separate: bool = False
    local: bool = False
    pyramid: str = "none"
    drop_path: float = 0.1


def _tasks() -> dict[str, Variant]:
    return {
        f"rvsa-{name}-b{diamond}{task}": Variant(
            separate=bool(diamond),
            local=name == "vitae",
            pyramid=pyramid,
            resolution=resolution,
            drop_path=drop_path,
        )
        for name in ("vit", "vitae")
        for diamond in ("", "-kvdiff")
        for task, pyramid, resolution, drop_path in (
            ("", "none", 224, 0.1),
            ("-det", "last", 1024, 0.15),
            ("-seg", "stages", 512, 0.1),
        )
    }


#: the paper's four networks (section III), by the authors' code for scene classification, detection
#: (DOTA) and segmentation (Potsdam, LoveDA); nano and nano-vitae are ours, for a CPU
VARIANTS: dict[str, Variant] = {
    "rvsa-nano": Variant(64, 6, 4, 4, 32),
    "rvsa-nano-vitae": Variant(64, 3, 4, 4, 32, separate=True, local=True),
    **_tasks(),
}


def assemble(
    variant: Variant,
    *,
    classes: int = 1000,
    resolution: int | None = None,
    channels: int = 3,
    pyramid: str | None = None,
    drop_path: float | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> RVSA:
    """Wire a network without filling it; arguments as those of :func:`build`."""
    side = variant.resolution if resolution is None else resolution
    pyramid = variant.pyramid if pyramid is None else pyramid
    dense = pyramid != "none"
    return RVSA(
        dim=variant.dim,
        depth=variant.depth,
        heads=variant.heads,
        patch=variant.patch,
        resolution=(side, side),
        separate=variant.separate,
        local=variant.local,
        bias=dense,
        key_bias=pyramid == "last",
        spare_row=not dense,
        pyramid=pyramid,
        classes=classes,
        channels=channels,
        dropout=dropout,
        attention_dropout=attention_dropout,
        drop_path=variant.drop_path if drop_path is None else drop_path,
        preprocessing=Preprocessing(resolution=side, crop=1.0 if dense else 0.875),
    )


def build(
    variant: str,
    *,
    classes: int = 1000,
    resolution: int | None = None,
    channels: int = 3,
    pyramid: str | None = None,
    drop_path: float | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> RVSA:
    """A named network with fresh weights.

    Args:
        resolution: what the tables of positions are made for, default the variant's own; any input
            of at least one patch works.
        pyramid: see :class:`RVSA`; default the variant's own.
        drop_path: default the authors' of the variant's task.

    Raises:
        PolypatchError: less than a patch, an unknown pyramid.
    """
    model = assemble(
        VARIANTS[variant],
        classes=classes,
        resolution=resolution,
        channels=channels,
        pyramid=pyramid,
        drop_path=drop_path,
        dropout=dropout,
        attention_dropout=attention_dropout,
    )
    model.init_weights()
    return model


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`network` from names and shapes, None if these are no RVSA's.

    Also of a whole detector or segmentation network, whose names begin with ``backbone.``. Which
    maps an encoder gave to its task is told by such a network's other parts; of an encoder alone
    with its pyramid, segmentation is assumed. The input is taken as square.
    """
    return recognise_network(shapes)
