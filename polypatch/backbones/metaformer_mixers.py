"""What stands in a MetaFormer's block: token mixers and norms of channels-last maps.

Of Yu et al., *MetaFormer Is Actually What You Need for Vision* (arXiv 2111.11418), eq. 4 and the
ablations and hybrids of table 5. All take and give (batch, height, width, dim), and what they give
is a tensor of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..nn import Attention, Linear

__all__ = [
    "MIXER_NAMES",
    "NORM_NAMES",
    "BatchNorm",
    "Depthwise",
    "Pooling",
    "RandomMixing",
    "SampleNorm",
    "SelfAttention",
    "SpatialFc",
    "entry_of",
    "mixer_of",
    "norm_of",
    "position_of",
    "recognised_mixer",
]


class SampleNorm(nn.GroupNorm):
    """The paper's modified layer norm: one mean and deviation for a sample's whole map."""

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        super().__init__(1, dim, eps=eps)

    def forward(
        self, input: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm, of table 5."""

    def forward(
        self, input: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Pooling(nn.Module):
    """Mean over the ``size`` × ``size`` places around each, as far as they are within the map,
    minus the place itself (eq. 4)."""

    def __init__(self, *, dim: int, size: int = 3) -> None:
        super().__init__()
        if size % 2 == 0:
            raise PolypatchError(f"a mean around a place has an odd size, not {size}")
        self.size = size

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        mean = F.avg_pool2d(
            x.permute(0, 3, 1, 2), self.size, 1, self.size // 2, count_include_pad=False
        ).permute(0, 2, 3, 1)
        return mean - x if torch.is_grad_enabled() else mean.sub_(x)


class SelfAttention(nn.Module):
    """Every place attends to all."""

    def __init__(
        self,
        *,
        dim: int,
        head_dim: int = 32,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % head_dim:
            raise PolypatchError(f"a width of {dim} does not divide into heads of {head_dim}")
        self.head_dim, self.qkv_bias = head_dim, qkv_bias
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.attention = Attention(
            dim=dim, heads=dim // head_dim, qkv_bias=qkv_bias, dropout=attention_dropout
        )

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        mixed = self.attention(x.flatten(1, 2)).x.view(x.shape)
        return F.dropout(mixed, self.dropout, self.training)


def _mixed(
    matrix: Float[Tensor, "places places"], x: Float[Tensor, "batch height width dim"]
) -> Float[Tensor, "batch height width dim"]:
    if x.shape[1] * x.shape[2] != len(matrix):
        raise PolypatchError(
            f"the token mixer was made for {len(matrix)} places, the map has "
            f"{x.shape[1]}×{x.shape[2]}"
        )
    return (matrix @ x.flatten(1, 2)).view(x.shape)


class SpatialFc(nn.Module):
    """One linear map over the places of ``grid``, the same for all channels (ResMLP's)."""

    def __init__(self, *, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = (grid[0], grid[1])
        self.fc = Linear(math.prod(grid), math.prod(grid), bias=False)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        return _mixed(self.fc.weight, x)


class RandomMixing(nn.Module):
    """The frozen random matrix of table 5: each place reads a random mean of all, softmax of
    uniform numbers, as in the authors' later code (arXiv 2210.13452)."""

    def __init__(self, *, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = (grid[0], grid[1])
        places = math.prod(grid)
        self.matrix = nn.Parameter(torch.empty(places, places), requires_grad=False)

    def init_weights(self) -> None:
        with torch.no_grad():
            self.matrix.copy_(torch.rand_like(self.matrix).softmax(1))

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        return _mixed(self.matrix, x)


class Depthwise(nn.Module):
    """The depthwise convolution of table 5."""

    def __init__(self, *, dim: int, kernel: int = 3) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv = nn.Conv2d(dim, dim, kernel, padding="same", groups=dim)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


# ---- as configurations name them ----------------------------------------------------------------

#: the authors' classes by the names that configurations use, with their arguments and ours; the
#: last two are not in their code: a random matrix is called as in their later code, the depthwise
#: convolution is the plain nn.Conv2d that they recommend
MIXER_NAMES: dict[str, tuple[type[nn.Module], dict[str, str]]] = {
    "Identity": (nn.Identity, {}),
    "Pooling": (Pooling, {"pool_size": "size"}),
    "Attention": (
        SelfAttention,
        {
            "head_dim": "head_dim",
            "qkv_bias": "qkv_bias",
            "attn_drop": "attention_dropout",
            "proj_drop": "dropout",
        },
    ),
    "SpatialFc": (SpatialFc, {"spatial_shape": "grid"}),
    "RandomMixing": (RandomMixing, {"spatial_shape": "grid"}),
    "Conv2d": (Depthwise, {"kernel_size": "kernel"}),
}
NORM_NAMES: dict[str, type[nn.Module]] = {
    "GroupNorm": SampleNorm,
    "LayerNormChannel": nn.LayerNorm,
    "BatchNorm2d": BatchNorm,
}


def _grid(shape: int | Sequence[int]) -> tuple[int, int]:
    """A spatial shape as two numbers; one number of places is taken for a square if it is one."""
    shape = [shape] if isinstance(shape, int) else list(shape)
    if len(shape) == 1:
        side = math.isqrt(shape[0])
        return (side, side) if side**2 == shape[0] else (shape[0], 1)
    if len(shape) != 2:
        raise PolypatchError(f"a spatial shape has one or two numbers, got {shape}")
    return (shape[0], shape[1])


def _named(entry: Any, known: Mapping[str, Any], kind: str) -> tuple[str, dict[str, Any]]:
    """A class as configurations name it, ``"Name"`` or ``{"type": "Name", …}``, and its options."""
    options: dict[str, Any] = {"type": entry} if isinstance(entry, str) else dict(entry)
    name = str(options.pop("type", None)).removeprefix("nn.")
    if name not in known:
        hint = suggest(name, known, kind=f"{kind}s")
        raise PolypatchError(f"a MetaFormer here has no {kind} {name!r}{hint}")
    return name, options


def mixer_of(entry: Any) -> Callable[..., nn.Module]:
    """What makes a mixer of ``dim=``, from ``"Pooling"`` or ``{"type": "Pooling", …}``.

    Raises:
        PolypatchError: an unknown class or argument.
    """
    name, options = _named(entry, MIXER_NAMES, "token mixer")
    maker, words = MIXER_NAMES[name]
    for word in options:
        if word not in words:
            raise PolypatchError(f"{name} has no argument {word!r}{suggest(word, words)}")
    if "spatial_shape" in words:
        options = {"spatial_shape": _grid(options.get("spatial_shape", (14, 14)))}
    return partial(maker, **{words[word]: value for word, value in options.items()})


def position_of(entry: Any) -> tuple[int, int] | None:
    """The grid of a position table, from None, a shape or ``{"type": "AddPositionEmb", …}``."""
    if isinstance(entry, Mapping):
        _, options = _named(entry, {"AddPositionEmb": None}, "position embedding")
        entry = options.get("spatial_shape", (14, 14))
    return None if entry is None else _grid(entry)


def norm_of(entry: str) -> Callable[[int], nn.Module]:
    """What makes a norm of a width, from ``"GroupNorm"`` or ``"GroupNorm(eps=1e-6)"``."""
    found = re.fullmatch(r"([\w.]+)(?:\(eps=([\d.e+-]+)\))?", str(entry))
    name, _ = _named(found.group(1) if found else str(entry), NORM_NAMES, "norm")
    eps = found.group(2) if found else None
    return partial(NORM_NAMES[name], **({"eps": float(eps)} if eps else {}))


def entry_of(
    module: nn.Module, known: Mapping[str, tuple[type[nn.Module], Mapping[str, str]]]
) -> dict[str, Any]:
    """A module's class and options as configurations name them."""
    for name, (kind, words) in known.items():
        if type(module) is kind:
            return {"type": name} | {word: getattr(module, ours) for word, ours in words.items()}
    raise PolypatchError(f"the authors' code has no name for {type(module).__name__}")


def recognised_mixer(shapes: Mapping[str, tuple[int, ...]], prefix: str, dim: int) -> Any:
    """The entry for :func:`mixer_of` from the shapes below a block's ``token_mixer.``."""
    if f"{prefix}qkv.weight" in shapes:
        bias = f"{prefix}qkv.bias" in shapes
        return {"type": "Attention", "head_dim": 32 if dim % 32 == 0 else dim, "qkv_bias": bias}
    for word, name in (("fc.weight", "SpatialFc"), ("random_matrix", "RandomMixing")):
        if prefix + word in shapes:
            return {"type": name, "spatial_shape": list(_grid(shapes[prefix + word][0]))}
    if f"{prefix}weight" in shapes:
        return {"type": "Conv2d", "kernel_size": shapes[f"{prefix}weight"][-1]}
    return "Pooling"
