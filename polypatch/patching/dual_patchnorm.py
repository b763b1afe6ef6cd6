"""Dual PatchNorm: one layer norm before and one after the patch embedding, and nothing else.

Kumar, Dehghani, Houlsby: *Dual PatchNorm*, TMLR 2023, arXiv 2302.01327. The authors published no
repository; what is here follows the paper's text and its printed snippet::

    patches  x    (batch, tokens, p·p·channels), flattened as (row, column, channel)
    tokens   z  = LN_1(W LN_0(x) + b)          LN_0 over p·p·channels, LN_1 over dim
    then     z + position, class token, blocks, as ever

It adds 2 (p·p·channels + dim) parameters. ``placement`` gives the paper's alternatives: ``"pre"``
(only LN_0), ``"post"`` (only LN_1), ``"post-position"`` (one norm, behind the sum with the
position).
``norm`` gives its variants of the norm itself: ``"layer"``, ``"rms"``, ``"no-affine"`` (nothing
learned) and ``"scale-bias"`` (learned scale and bias, nothing normalised).

:func:`gradient_norms` is the paper's analysis: in a plain ViT the gradient of the patch embedding
is out of proportion to those of the blocks, and Dual PatchNorm brings it in line.

Traps:

* A convolution leaves no place for LN_0, so patches are cut explicitly; a host's convolution is
  converted (:func:`linear_of`), with its channels moved last. LN_0's scale and bias have the same
  order.
* Class token and registers join behind the patch embedding and pass neither norm (the paper doesn't
  say; its ViTs pool without a class token). Neither do they pass the norm of ``"post-position"``.
* LN_0 takes the brightness and contrast of each patch away. What needs absolute intensity loses it;
  with 3 values or fewer to a patch hardly anything is left, so that is refused.
* A host with trained weights computes something else with the norms in place: it keeps its weights,
  but must be trained on.
* The norms' epsilon (1e-6) is Flax's default, not stated in the paper. The paper's further study of
  norm placements *inside* the blocks, which found nothing to gain, is not part of the method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..hosts.vit import ViT
from ..nn import GridPatching, Position, linear_of, patchify
from ..tokens import Tokens, raster_geometry

__all__ = [
    "NORMS",
    "PLACEMENTS",
    "GradientNorms",
    "NormedEmbedding",
    "NormedPatching",
    "NormedPosition",
    "ScaleBias",
    "gradient_norms",
    "input_scale",
    "plug",
]

PLACEMENTS = ("dual", "pre", "post", "post-position")
NORMS = ("layer", "rms", "no-affine", "scale-bias")


class ScaleBias(nn.Module):
    """A learned scale and bias per channel, without normalising."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return x * self.weight + self.bias


def _norm(kind: str, dim: int, eps: float) -> nn.Module:
    if kind == "rms":
        return nn.RMSNorm(dim, eps=eps)
    if kind == "scale-bias":
        return ScaleBias(dim=dim)
    return nn.LayerNorm(dim, eps=eps, elementwise_affine=kind == "layer")


def _reset(norm: nn.Module) -> None:
    """Scale 1, bias 0, where the norm has them."""
    for name, value in norm.named_parameters():
        nn.init.constant_(value, 1.0 if name == "weight" else 0.0)


class NormedEmbedding(nn.Module):
    """Flattened patches → features: ``after(linear(before(patches)))``."""

    def __init__(self, *, before: nn.Module, linear: nn.Linear, after: nn.Module) -> None:
        super().__init__()
        self.before, self.linear, self.after = before, linear, after

    def init_weights(self) -> None:
        """Norms as identity maps, the projection as a ViT's patch convolution."""
        _reset(self.before)
        _reset(self.after)
        nn.init.trunc_normal_(self.linear.weight, std=self.linear.in_features**-0.5)

    def forward(self, patches: Float[Tensor, "*batch values"]) -> Float[Tensor, "*batch dim"]:
        return self.after(self.linear(self.before(patches)))


class NormedPatching(nn.Module):
    """Equal square patches as in :class:`~polypatch.nn.GridPatching`, embedded by ``embed``.

    Inputs that don't divide are padded with zeros at the bottom and on the right; LN_0 sees them.

    Raises:
        PolypatchError: where the image is smaller than one patch.
    """

    def __init__(self, *, patch: int, channels: int, embed: nn.Module) -> None:
        super().__init__()
        self.patch, self.channels, self.embed = patch, channels, embed

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        height, width = image.shape[-2:]
        patch = self.patch
        if height < patch or width < patch:
            raise PolypatchError(
                f"the input is {height}×{width}, smaller than one patch of {patch}×{patch}; "
                f"use inputs of at least {patch} pixels a side or a smaller patch"
            )
        image = F.pad(image, (0, -width % patch, 0, -height % patch))
        grid = (image.shape[-2] // patch, image.shape[-1] // patch)
        centre, extent = raster_geometry(
            grid, (image.shape[-2], image.shape[-1]), device=image.device
        )
        return Tokens(
            x=self.embed(patchify(image, (patch, patch))),
            centre=centre[None],
            extent=extent[None],
            canvas=(height, width),
            grid=grid,
        )


class NormedPosition(Position):
    """The host's position code, then a norm of the placed tokens ("Post PosEmb")."""

    def __init__(self, *, position: Position, norm: nn.Module) -> None:
        super().__init__()
        self.position, self.norm = position, norm

    def forward(self, tokens: Tokens) -> Tokens:
        tokens = self.position(tokens)
        placed = self.norm(tokens.placed)
        if tokens.prefix:
            placed = torch.cat([tokens.x[:, : tokens.prefix], placed], dim=1)
        return tokens.with_x(placed)

    def rotation(self, tokens: Tokens) -> tuple[Tensor, Tensor] | None:
        return self.position.rotation(tokens)

    def bias(self, tokens: Tokens) -> Tensor | None:
        return self.position.bias(tokens)

    def init_weights(self) -> None:
        _reset(self.norm)


def plug(host: ViT, *, placement: str = "dual", norm: str = "layer", eps: float = 1e-6) -> ViT:
    """Put the norms around the host's patch embedding, whose weights stay.

    Args:
        placement: "dual" (the method), "pre", "post" or "post-position".
        norm: "layer", "rms", "no-affine" or "scale-bias".
        eps: of the norms.

    Raises:
        PolypatchError: a host whose tokenizer has no linear patch embedding, patches of fewer than
            4 values in front of LN_0, or an unknown option.
    """
    for name, value, known in (("placement", placement, PLACEMENTS), ("norm", norm, NORMS)):
        if value not in known:
            raise PolypatchError(f"there is no {name}={value!r}{suggest(str(value), known)}")
    patching = host.patching
    reference = next(patching.parameters())
    linear = getattr(patching, "embed", None)  # tokenizers that embed flattened patches themselves
    if isinstance(patching, GridPatching):
        linear = linear_of(patching.proj)
    if not isinstance(linear, nn.Linear):
        raise PolypatchError(
            "dual-patchnorm needs a host whose patches are embedded by one linear map; this one's "
            f"patching is {type(patching).__name__}"
        )
    before = placement in ("dual", "pre")
    if before and norm != "scale-bias" and linear.in_features < 4:
        raise PolypatchError(
            f"a norm over the {linear.in_features} values of a patch leaves nothing of them; use "
            "larger patches or placement=post"
        )
    if placement == "post-position":
        normed = NormedPosition(position=host.position, norm=_norm(norm, host.dim, eps))
        normed.norm.to(device=reference.device, dtype=reference.dtype)
        host.position = normed
        return host.plugged("dual-patchnorm")
    embed = NormedEmbedding(
        before=_norm(norm, linear.in_features, eps) if before else nn.Identity(),
        linear=linear,
        after=_norm(norm, host.dim, eps) if placement != "pre" else nn.Identity(),
    ).to(device=reference.device, dtype=reference.dtype)
    if isinstance(patching, GridPatching):
        channels = patching.proj.in_channels
        host.patching = NormedPatching(patch=patching.patch, channels=channels, embed=embed)
    else:
        patching.embed = embed
    return host.plugged("dual-patchnorm")


# ---- the paper's analysis ------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientNorms:
    """Euclidean norms of gradients: of the patch embedding's matrix, and of each block."""

    embedding: float
    blocks: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The patch embedding's over the median block's."""
        return self.embedding / max(float(torch.tensor(self.blocks).median()), 1e-30)


def gradient_norms(host: ViT) -> GradientNorms:
    """Norms of the gradients that the last backward pass left on the host.

    The patch embedding counts with its matrix only, so that hosts with and without the norms are
    compared on the same numbers; a block counts with all of its parameters.

    Raises:
        PolypatchError: there are no gradients, or the host has no linear patch embedding.
    """
    embed = getattr(host.patching, "embed", getattr(host.patching, "proj", None))
    matrix = getattr(getattr(embed, "linear", embed), "weight", None)
    if not isinstance(matrix, Tensor):
        raise PolypatchError(f"{type(host.patching).__name__} has no linear patch embedding")
    if matrix.grad is None:
        raise PolypatchError("the host has no gradients: call backward() on a loss first")

    def norm(values: list[Tensor]) -> float:
        return float(torch.stack([v.detach().float().norm() for v in values]).norm())

    blocks = [[p.grad for p in block.parameters() if p.grad is not None] for block in host.blocks]
    return GradientNorms(
        embedding=norm([matrix.grad]), blocks=tuple(norm(grads) for grads in blocks if grads)
    )


def input_scale(host: ViT) -> Float[Tensor, "patch patch channels"]:
    """LN_0's learned scale as a picture of the patch (the paper finds centre and corners raised).

    Raises:
        PolypatchError: the host has no LN_0 with a learned scale.
    """
    before = getattr(getattr(host.patching, "embed", None), "before", None)
    scale = getattr(before, "weight", None)
    if not isinstance(scale, Tensor):
        raise PolypatchError("this host has no learned scale in front of its patch embedding")
    return scale.detach().unflatten(0, (host.patch, host.patch, -1))
