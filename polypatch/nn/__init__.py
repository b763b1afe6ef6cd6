"""The few layers that many papers share; one of each.

A layer stands here because at least three files use it; what belongs to one paper is in its file.
"""

from . import fresh
from .attention import Attention, Mixed
from .convolutions import ConvNorm, folded
from .dense import DenseHead, Segmenter
from .keymaps import KeyMap, Rule, pointwise
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
from .pieces import in_pieces
from .pooling import AttentionPool, ClassAndMean, ClassToken, MeanPool
from .positions import (
    LearnedPosition,
    NoPosition,
    Position,
    RotaryPosition,
    SinCosPosition,
    rotate,
)
from .projection import Linear, linear
from .surface import (
    Backbone,
    FeatureInfo,
    FeatureMap,
    InputRequirements,
    Preprocessing,
    pad_to,
    sample_shape,
)
from .weights import check_fit, init_parts, load_exactly
from .windows import merge_windows, pad_to_windows, windows_of

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Attention",
    "AttentionPool",
    "Backbone",
    "ClassAndMean",
    "ClassToken",
    "ConvNorm",
    "DenseHead",
    "DropPath",
    "FeatureInfo",
    "FeatureMap",
    "GridPatching",
    "InputRequirements",
    "KeyMap",
    "LayerNorm2d",
    "LayerScale",
    "LearnedPosition",
    "Linear",
    "MeanPool",
    "Mixed",
    "Mlp",
    "NoPosition",
    "Position",
    "Preprocessing",
    "RotaryPosition",
    "Rule",
    "Segmenter",
    "SinCosPosition",
    "SwiGlu",
    "check_fit",
    "folded",
    "fresh",
    "in_pieces",
    "init_parts",
    "init_transformer_weights",
    "linear",
    "linear_of",
    "load_exactly",
    "merge_windows",
    "normalise",
    "pad_to",
    "pad_to_windows",
    "patchify",
    "pointwise",
    "quick_gelu",
    "rotate",
    "sample_shape",
    "unpatchify",
    "windows_of",
]
