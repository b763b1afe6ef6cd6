"""The few layers that many papers share; one of each.

A layer stands here because at least three files use it; what belongs to one paper is in its file.
"""

from .attention import Attention, Mixed
from .layers import (
    DropPath,
    LayerNorm2d,
    LayerScale,
    Mlp,
    SwiGlu,
    init_transformer_weights,
    quick_gelu,
)
from .patches import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    GridPatching,
    linear_of,
    normalise,
    patchify,
    unpatchify,
)
from .pooling import AttentionPool, ClassAndMean, ClassToken, MeanPool
from .positions import (
    LearnedPosition,
    NoPosition,
    Position,
    RotaryPosition,
    SinCosPosition,
    rotate,
)
from .weights import check_fit, init_parts, load_exactly

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Attention",
    "AttentionPool",
    "ClassAndMean",
    "ClassToken",
    "DropPath",
    "GridPatching",
    "LayerNorm2d",
    "LayerScale",
    "LearnedPosition",
    "MeanPool",
    "Mixed",
    "Mlp",
    "NoPosition",
    "Position",
    "RotaryPosition",
    "SinCosPosition",
    "SwiGlu",
    "check_fit",
    "init_parts",
    "init_transformer_weights",
    "linear_of",
    "load_exactly",
    "normalise",
    "patchify",
    "quick_gelu",
    "rotate",
    "unpatchify",
]
