"""Pictures of how models cut images, as PNG."""

from __future__ import annotations

import base64
import io

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..data.base import ImageData
from ..nn import normalise
from ..tokens import Tokens

__all__ = ["cut", "data_uri", "sample_images", "to_png", "tokens_for_drawing"]


def sample_images(
    data: ImageData, count: int = 6
) -> tuple[Float[Tensor, "count 3 height width"], list[str]]:
    """Test images of as many classes as there are, the same ones at every call, and their classes.

    Of each class the most varied of its first few images is taken: flat ones show nothing.
    """
    images, labels = data.test.read(torch.arange(min(len(data.test), 64 * count)))
    detail = images.flatten(1).std(1)
    order = detail.argsort(descending=True)
    seen: dict[int, int] = {}
    for index in order.tolist():
        seen.setdefault(int(labels[index]), index)
    chosen = list(seen.values())[:count]
    chosen += [i for i in order.tolist() if i not in chosen][: max(0, count - len(chosen))]
    picked = torch.tensor(chosen)
    return images[picked], [data.classes[int(labels[i])] for i in chosen]


@torch.no_grad()
def tokens_for_drawing(model: nn.Module, images: Float[Tensor, "batch 3 height width"]) -> Tokens:
    """The tokens whose supports tell most: those that leave the last block where a model merges
    or drops tokens on the way, else those that enter the first."""
    if not hasattr(model, "tokens"):
        return model.forward_features(images)  # type: ignore[operator]
    tokens = model.tokens(images)  # type: ignore[operator]
    reduces = any(getattr(b, "reducing", None) is not None for b in getattr(model, "blocks", ()))
    return model.encode(tokens) if reduces else tokens  # type: ignore[operator]


def cut(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    side: int = 192,
) -> tuple[Float[Tensor, "batch 3 side side"], list[int]]:
    """Each image as its model sees it, at least ``side`` pixels large, and its token counts.

    Args:
        images: in [0, 1], not normalised.
    """
    device = next(model.parameters()).device
    tokens = tokens_for_drawing(model, normalise(images, mean, std).to(device))
    scale = max(1, -(-side // min(images.shape[-2:])))
    drawn = tokens.draw(images.to(device), fill=0.55, scale=scale)
    return drawn.cpu(), (tokens.counts - tokens.prefix).tolist()


def enlarged(
    images: Float[Tensor, "batch 3 height width"], side: int = 192
) -> Float[Tensor, "batch 3 tall wide"]:
    """Images enlarged by a whole number, as :meth:`Tokens.draw` enlarges them."""
    scale = max(1, -(-side // min(images.shape[-2:])))
    return F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)


def to_png(image: Float[Tensor, "3 height width"]) -> bytes:
    """An RGB image in [0, 1] as PNG."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
