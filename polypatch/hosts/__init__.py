"""Plain transformers with sockets, into which the papers' parts plug."""

from .hooks import TrainingHook
from .vit import Block, FeatureMap, InputRequirements, Prefix, Reducer, ViT, build_vit

__all__ = [
    "Block",
    "FeatureMap",
    "InputRequirements",
    "Prefix",
    "Reducer",
    "TrainingHook",
    "ViT",
    "build_vit",
]
