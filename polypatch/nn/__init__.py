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
from .patches import GridPatching, linear_of, patchify, unpatchify
from .pooling import AttentionPool, ClassAndMean, ClassToken, MeanPool
from .positions import (
    LearnedPosition,
    NoPosition,
    Position,
    RotaryPosition,
    SinCosPosition,
    rotate,
)

__all__ = [
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
    "init_transformer_weights",
    "linear_of",
    "patchify",
    "quick_gelu",
    "rotate",
    "unpatchify",
]
