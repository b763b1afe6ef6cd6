"""Dense prediction on any encoder's maps: a light head, and encoder and head as one network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError
from .layers import LayerNorm2d, init_transformer_weights
from .surface import FeatureInfo, FeatureMap, InputRequirements, Preprocessing, pad_to

__all__ = ["DenseHead", "Segmenter"]


class DenseHead(nn.Module):
    """Every map through a linear layer to one width, enlarged to the finest, stacked, fused by
    another, classified (SegFormer's all-MLP decoder; Xie et al. 2021, arXiv 2105.15203, eq. 4).

    Layer norm stands for the original's batch norm, so that small batches train alike.
    """

    def __init__(
        self, maps: Sequence[FeatureInfo], *, classes: int, width: int = 128, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.maps = tuple(maps)
        self.project = nn.ModuleList(nn.Conv2d(info.dim, width, 1) for info in maps)
        self.fuse = nn.Conv2d(width * len(self.maps), width, 1, bias=False)
        self.norm = LayerNorm2d(width)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, classes, 1)

    def init_weights(self) -> None:
        """Convolutions normal by fan-in, norm 1 and 0."""
        init_transformer_weights(self)

    def forward(self, maps: list[FeatureMap]) -> Float[Tensor, "batch classes rows columns"]:
        """Logits at the finest map's size."""
        size = maps[0].map.shape[-2:]
        same = [
            F.interpolate(project(found.map), size=size, mode="bilinear", align_corners=False)
            for project, found in zip(self.project, maps)
        ]
        x = self.norm(self.fuse(torch.cat(same, 1)))
        return self.classify(self.dropout(F.relu(x)))


class Segmenter(nn.Module):
    """An encoder's maps through a :class:`DenseHead`, enlarged to the image.

    Any image size: what the encoder doesn't permit is padded and cut off again.

    Raises:
        PolypatchError: an encoder without dense maps.
    """

    def __init__(self, backbone: nn.Module, *, classes: int, width: int = 128) -> None:
        super().__init__()
        maps = getattr(backbone, "feature_info", None)
        if maps is None:
            raise PolypatchError(
                f"{type(backbone).__name__} gives no dense maps, so nothing can be segmented on it"
            )
        self.backbone = backbone
        self.head = DenseHead(maps, classes=classes, width=width)
        self.hooks = getattr(backbone, "hooks", ())
        self.preprocessing = getattr(backbone, "preprocessing", Preprocessing())
        self.input_requirements = InputRequirements()

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        size = image.shape[-2:]
        padded = pad_to(image, self.backbone.input_requirements)  # type: ignore[arg-type]
        logits = self.head(self.backbone.features(padded))  # type: ignore[operator]
        logits = F.interpolate(logits, size=padded.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., : size[0], : size[1]]

    def checkpointed(self, on: bool = True) -> Segmenter:
        self.backbone.checkpointed(on)  # type: ignore[operator]
        return self

    def no_decay(self) -> set[str]:
        """The encoder's, and the head's vectors."""
        spared = {f"backbone.{n}" for n in self.backbone.no_decay()}  # type: ignore[operator]
        return spared | {f"head.{n}" for n, p in self.head.named_parameters() if p.ndim <= 1}
