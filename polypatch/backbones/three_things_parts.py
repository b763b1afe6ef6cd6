"""What *Three things everyone should know about Vision Transformers* (arXiv 2203.09795) is made of:
the hMLP stem, blocks beside each other, and which parameters are trained. Equations and sources
stand in ``three_things.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..hosts.vit import Block, Context
from ..nn import Attention, InputRequirements, LayerNorm2d, LayerScale, Mixed, Mlp, fresh, linear
from ..tokens import Tokens, raster_geometry

__all__ = [
    "FINETUNING",
    "STEMS",
    "Branches",
    "HMlpPatching",
    "HMlpStem",
    "ParallelBlock",
    "check",
    "padded",
    "train_only",
]

STEMS = ("linear", "hmlp", "hmlp-layer")
FINETUNING = ("full", "attention", "ffn")


def check(name: str, value: str, known: Sequence[str]) -> None:
    """
    Raises:
        PolypatchError: a word that isn't known.
    """
    if value not in known:
        raise PolypatchError(f"there is no {name}={value!r}{suggest(str(value), known)}")


def padded(
    image: Float[Tensor, "batch channels height width"], patch: int
) -> Float[Tensor, "batch channels tall wide"]:
    """Zeros below and on the right, up to multiples of the patch; the image itself if it fits."""
    bottom, right = -image.shape[-2] % patch, -image.shape[-1] % patch
    return F.pad(image, (0, right, 0, bottom)) if bottom or right else image


# ---- the hMLP stem -----------------------------------------------------------------------------


class HMlpStem(nn.Module):
    """Patches → features without looking beyond a patch (fig. 5).

    Args:
        patch: side of a patch, a multiple of 4.
        norm: ``"batch"`` (the authors' choice) or ``"layer"``, for small batches.

    Raises:
        PolypatchError: a patch or width that isn't a multiple of 4, or an unknown norm.
    """

    def __init__(self, *, dim: int, patch: int, channels: int = 3, norm: str = "batch") -> None:
        super().__init__()
        if patch % 4 or dim % 4:
            raise PolypatchError(
                f"the hMLP stem needs patches and a width that 4 divides, got {patch} and {dim}"
            )
        check("norm", norm, ("batch", "layer"))
        self.patch, self.channels = patch, channels
        widths, kernels = (channels, dim // 4, dim // 4, dim), (patch // 4, 2, 2)
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], kernel, kernel) for i, kernel in enumerate(kernels)
        )
        layer = nn.BatchNorm2d if norm == "batch" else LayerNorm2d
        self.norms = nn.ModuleList(layer(width) for width in widths[1:])

    def init_weights(self) -> None:
        """torch's defaults, as the authors: uniform by fan-in; norms 1 and 0, fresh statistics."""
        for layer in (*self.convs, *self.norms):
            layer.reset_parameters()  # type: ignore[operator]

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        x = image
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = norm(conv(fresh.gelu(x) if number else x))
        return x.permute(0, 2, 3, 1)


class HMlpPatching(nn.Module):
    """The stem as a host's tokenizer. Sides that the patch doesn't divide are padded with zeros at
    the bottom and on the right.

    Raises:
        PolypatchError: where the image is smaller than one patch.
    """

    def __init__(self, *, stem: HMlpStem) -> None:
        super().__init__()
        self.stem = stem
        self.patch, self.channels = stem.patch, stem.channels

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        height, width = image.shape[-2:]
        InputRequirements(minimum=self.patch).check(image, name="the hMLP stem")
        x = self.stem(padded(image, self.patch))
        grid = (x.shape[1], x.shape[2])
        covered = (grid[0] * self.patch, grid[1] * self.patch)
        centre, extent = raster_geometry(grid, covered, device=image.device)
        return Tokens(
            x=x.flatten(1, 2),
            centre=centre[None],
            extent=extent[None],
            canvas=(height, width),
            grid=grid,
        )


# ---- parallel blocks ---------------------------------------------------------------------------


class Branches(nn.Module):
    """Eq. 2 on plain tokens: blocks of a ViT that all read the same."""

    def __init__(self, branches: Sequence[Block]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], first: bool = False
    ) -> Float[Tensor, "batch out dim"]:
        """``first``: only the first token comes out; keys and values are of all."""
        total = x[:, :1] if first else x
        for branch in self.branches:
            assert isinstance(branch, Block)
            assert isinstance(branch.mixing, Attention)
            mixed = attended(branch.mixing, branch.norm1(x), first=first)
            total = added(total, branch.mixing.proj, mixed, branch.scale1, branch.drop_path)
        x = total
        for branch in self.branches:
            assert isinstance(branch, Block)
            assert isinstance(branch.mlp, Mlp)
            hidden = branch.mlp.fc1(branch.norm2(x), fresh.gelu)
            total = added(total, branch.mlp.fc2, hidden, branch.scale2, branch.drop_path)
        return total


def attended(
    attention: Attention, x: Float[Tensor, "batch tokens dim"], *, first: bool
) -> Float[Tensor, "batch out width"]:
    """Attention without its last linear map."""
    if first:
        width = attention.heads * attention.head_dim
        weight, bias = attention.qkv.weight, attention.qkv.bias
        q = linear(x[:, :1], weight[:width], None if bias is None else bias[:width])
        kv = linear(x, weight[width:], None if bias is None else bias[width:])
        q = q.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        k, v = kv.unflatten(-1, (2, attention.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = attention.project(x)
    rate = attention.dropout if attention.training else 0.0
    mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, scale=attention.scale)
    return mixed.transpose(1, 2).flatten(2)


def added(
    x: Float[Tensor, "batch tokens dim"],
    layer: nn.Linear,
    update: Float[Tensor, "batch tokens width"],
    scale: nn.Module,
    drop_path: nn.Module,
) -> Float[Tensor, "batch tokens dim"]:
    """x + scale(layer(update)), with as few passes over the tokens as there can be."""
    update = layer(update)
    if isinstance(scale, LayerScale) and not layer.training:
        return fresh.add_scaled(x, update, scale.gamma)
    return fresh.add(x, drop_path(scale(update)))


class ParallelBlock(Block):
    """Eq. 2 on a host: some of its blocks, which keep their weights, run beside each other.

    Reducers act on the sum, with the keys of all branches as further heads. A technique that
    replaces the mixing of blocks must be plugged before.
    """

    def __init__(self, branches: Sequence[Block]) -> None:
        nn.Module.__init__(self)
        self.branches = nn.ModuleList(branches)
        self.reducing = None
        self.proportional = True

    @property
    def mixing(self) -> nn.Module:  # type: ignore[override]
        raise PolypatchError(
            f"a parallel block has {len(self.branches)} mixings; plug techniques that change the "
            "mixing of blocks in front of three-things"
        )

    def mix(self, tokens: Tokens, context: Context) -> Mixed:
        """The sum over branches, scaled and dropped as they are."""
        bias = context.proportional_bias if self.proportional else context.bias
        context = Context(context.rotation, bias, bias)
        updates, keys = [], []
        for branch in self._blocks():
            mixed = branch.mix(tokens, context)
            updates.append(branch.drop_path(branch.scale1(mixed.x)))
            keys += [] if mixed.keys is None else [mixed.keys]
        return Mixed(torch.stack(updates).sum(0), torch.cat(keys, dim=1) if keys else None)

    def forward(self, tokens: Tokens, context: Context) -> Tokens:
        mixed = self.mix(tokens, context)
        tokens = tokens.with_x(tokens.x + mixed.x)
        reducing = self.reducing
        if reducing is not None and reducing.where == "middle":
            tokens = reducing(tokens, mixed)
        x = tokens.x
        for branch in self._blocks():
            x = x + branch.drop_path(branch.scale2(branch.mlp(branch.norm2(tokens.x))))
        tokens = tokens.with_x(x)
        if reducing is not None and reducing.where == "end":
            tokens = reducing(tokens, mixed)
        return tokens

    def _blocks(self) -> Iterator[Block]:
        for branch in self.branches:
            assert isinstance(branch, Block)
            yield branch


# ---- fine-tuning -------------------------------------------------------------------------------


def train_only(
    model: nn.Module, part: str = "attention", *, first_branch: bool = False
) -> nn.Module:
    """Freeze all but one part's parameters: of a network of the paper, or of a plain host.

    Args:
        part: ``"attention"`` (the method), ``"ffn"``, the paper's counterpart, or ``"full"``. The
            first two also train positions and classifier, and freeze all else.
        first_branch: of parallel blocks only the first branch, as the authors' code has it.

    Returns:
        The model, whose parameters have ``requires_grad`` set.

    Raises:
        PolypatchError: an unknown part.
    """
    check("part to train", part, FINETUNING)
    inner = {"attention": "mixing", "ffn": "mlp", "full": ""}[part]
    for name, value in model.named_parameters():
        words = name.split(".")
        chosen = inner in words if words[0] == "blocks" else words[0] in ("head", "position")
        chosen |= words[:2] == ["prefix", "position"]  # a class token's row of the position table
        if first_branch and "branches" in words:
            chosen &= words[words.index("branches") + 1] == "0"
        value.requires_grad_(chosen or part == "full")
    return model
