"""From an image to a branch's patch tokens: CrossViT's patch embeddings.

The linear one of ViT, the three convolutions of the † networks (table 1 of arXiv 2103.14899), and
the tokens-to-token module of the paper's last experiment (sec. 4.3, "Cooperation with Concurrent
Works"; Yuan et al. 2021, arXiv 2101.11986). All take sides that are multiples of the patch and give
(batch, rows, columns, dim), so that the grid is never guessed from a number of tokens. With patches
of 12 or 16 pixels, and k, s, p kernel, stride, padding of the three steps::

    three convolutions   12: k 7, 3, 3  s 4, 3, 1  p 3, 0, 1    widths dim/4, dim/2, dim;
                         16: k 7, 3, 3  s 4, 2, 2  p 3, 1, 1    ReLU between them
    tokens to token      12: k 7, 3, 3  s 4, 3, 1  p 2, 1, 1    soft split, attention, soft split,
                         16: k 7, 3, 3  s 4, 2, 2  p 2, 1, 1    attention, soft split, linear

A soft split takes overlapping patches, flattened as (channel, row, column). The attention between
the splits narrows them to 64 channels in one head; as its input is wider than its output, the
*values* are the residual::

    y = v + W softmax(q kᵀ/√dim) v,   z = y + MLP(LN(y)),   [q|k|v] = W' LN(x)
    performer:  softmax(q kᵀ) v ≈ φ(q) (φ(k)ᵀ v) / φ(q) Σ φ(k),   φ(x) = exp(w x − |x|²/2)/√m

Traps: products are divided by the root of the *input's* width (147 or 576), not of the head's 64;
the performer doesn't divide at all, and its linear map gives k, q, v in this order.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..nn import Linear, Mlp, fresh

__all__ = ["EMBEDDINGS", "KEYS", "ConvStem", "LinearPatches", "TokensToToken", "embedding"]

#: kernel, stride and padding of the three convolutions, by patch
_CONVOLUTIONS = {
    12: ((7, 4, 3), (3, 3, 0), (3, 1, 1)),
    16: ((7, 4, 3), (3, 2, 1), (3, 2, 1)),
}
#: of the three soft splits
_SPLITS = {
    12: ((7, 4, 2), (3, 3, 1), (3, 1, 1)),
    16: ((7, 4, 2), (3, 2, 1), (3, 2, 1)),
}


class LinearPatches(nn.Module):
    """Equal patches, one linear map of each."""

    def __init__(self, *, dim: int, patch: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        return self.proj(image).permute(0, 2, 3, 1)


class ConvStem(nn.Module):
    """Three convolutions with ReLU between them, † of table 1."""

    def __init__(self, *, dim: int, patch: int, channels: int) -> None:
        super().__init__()
        widths = (channels, dim // 4, dim // 2, dim)
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], kernel, stride, padding)
            for i, (kernel, stride, padding) in enumerate(_CONVOLUTIONS[patch])
        )

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        x = image  # as it is: three channels aren't worth a copy, the weights decide the layout
        for number, conv in enumerate(self.convs):
            x = conv(fresh.relu(x) if number else x)
        return x.permute(0, 2, 3, 1)


class NarrowingAttention(nn.Module):
    """T2T's transformer of one head, from ``dim`` to ``width`` channels."""

    def __init__(self, *, dim: int, width: int) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = Linear(dim, 3 * width, bias=False)
        self.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(dim=width, hidden=width)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens width"]:
        q, k, v = self.qkv(self.norm1(x))[:, None].chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        x = (v + self.proj(mixed))[:, 0]
        return x + self.mlp(self.norm2(x))


class NarrowingPerformer(nn.Module):
    """T2T's attention by positive random features (Choromanski et al. 2021), linear in the tokens.

    ``features`` is drawn once, orthogonal, and never trained. Dropout of 0.1 on both branches is
    the authors'.
    """

    def __init__(self, *, dim: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.kqv = Linear(dim, 3 * width)
        self.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(dim=width, hidden=width)
        self.features = nn.Parameter(torch.zeros(width // 2, width), requires_grad=False)

    def init_weights(self) -> None:
        count = len(self.features)
        nn.init.orthogonal_(self.features, gain=math.sqrt(count))

    def positive(self, x: Float[Tensor, "batch tokens width"]) -> Tensor:
        """φ(x): (batch, tokens, m), exp(w x − |x|²/2) / √m."""
        count = len(self.features)
        return torch.exp(x @ self.features.T - x.square().sum(-1, keepdim=True) / 2) / count**0.5

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens width"]:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        k, q = self.positive(k), self.positive(q)
        total = q @ k.sum(1)[..., None]
        mixed = q @ (k.transpose(1, 2) @ v) / (total + 1e-8)
        x = v + F.dropout(self.proj(mixed), 0.1, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), 0.1, self.training)


class TokensToToken(nn.Module):
    """Soft splits with attention between them. ``performer``: the linear attention."""

    def __init__(
        self, *, dim: int, patch: int, channels: int, width: int = 64, performer: bool = False
    ) -> None:
        super().__init__()
        self.splits = _SPLITS[patch]
        attention = NarrowingPerformer if performer else NarrowingAttention
        self.attention1 = attention(dim=channels * self.splits[0][0] ** 2, width=width)
        self.attention2 = attention(dim=width * self.splits[1][0] ** 2, width=width)
        self.project = Linear(width * self.splits[2][0] ** 2, dim)

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        x = image
        grid = (0, 0)
        for number, (kernel, stride, padding) in enumerate(self.splits):
            grid = tuple((side + 2 * padding - kernel) // stride + 1 for side in x.shape[-2:])
            split = F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2)
            if number == 2:
                break
            tokens = (self.attention1, self.attention2)[number](split)
            x = tokens.transpose(1, 2).unflatten(2, grid)
        return self.project(split).unflatten(1, grid)


#: names of the patch embeddings → which patches they know; None: any
EMBEDDINGS: dict[str, tuple[int, ...] | None] = {
    "linear": None,
    "conv": tuple(_CONVOLUTIONS),
    "t2t": tuple(_SPLITS),
    "t2t-performer": tuple(_SPLITS),
}


_NORMS = ((f"attention{n}.norm{m}", f"attention{n}.norm{m}") for n in (1, 2) for m in (1, 2))
_SPLIT = (*_NORMS, ("project", "project"))
#: by embedding, the authors' names in a branch's embedding → ours
KEYS: dict[str, tuple[tuple[str, str], ...]] = {
    "linear": (("proj", "proj"),),
    "conv": tuple((f"proj.{2 * n}", f"convs.{n}") for n in range(3)),
    "t2t": (
        *_SPLIT,
        *(
            (f"attention{n}.{theirs}", f"attention{n}.{ours}")
            for n in (1, 2)
            for theirs, ours in (
                ("attn.qkv", "qkv"),
                ("attn.proj", "proj"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            )
        ),
    ),
    "t2t-performer": (
        *_SPLIT,
        *(
            (f"attention{n}.{theirs}", f"attention{n}.{ours}")
            for n in (1, 2)
            for theirs, ours in (
                ("kqv", "kqv"),
                ("proj", "proj"),
                ("w", "features"),
                ("mlp.0", "mlp.fc1"),
                ("mlp.2", "mlp.fc2"),
            )
        ),
    ),
}


def embedding(kind: str, *, dim: int, patch: int, channels: int) -> nn.Module:
    """The patch embedding of one branch.

    Raises:
        PolypatchError: an unknown kind, or a patch that it doesn't know.
    """
    if kind not in EMBEDDINGS:
        raise PolypatchError(f"there is no embedding {kind!r}{suggest(kind, EMBEDDINGS)}")
    patches = EMBEDDINGS[kind]
    if patches is not None and patch not in patches:
        raise PolypatchError(
            f"embedding={kind} cuts patches of {' or '.join(map(str, patches))} pixels, not {patch}"
        )
    if kind == "linear":
        return LinearPatches(dim=dim, patch=patch, channels=channels)
    if kind == "conv":
        return ConvStem(dim=dim, patch=patch, channels=channels)
    return TokensToToken(dim=dim, patch=patch, channels=channels, performer=kind == "t2t-performer")
