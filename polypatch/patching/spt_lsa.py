"""Shifted patch tokenization (SPT) and locality self-attention (LSA): ViTs for small data sets.

A patch is embedded together with copies of the image moved by half a patch, so that every token
sees its neighbourhood; and attention is made sharper, by a learned temperature, and looks at other
tokens only, by masking the diagonal. Lee, Lee and Song, *Vision Transformer for Small-Size
Datasets*, 2021, arXiv 2112.13492.

**SPT** (sec. 3.2), of a map x of c channels, patch side p and N moved copies s¹ … sᴺ, each moved by
p/2 with zeros coming in::

    S(x) = LN(P([x | s¹ | … | sᴺ])) E,    P: patches, flattened as (row, column, channel)
    (batch, c, h, w) → (batch, h/p · w/p, p·p·c·(N+1)) → (batch, h/p · w/p, dim)

The paper moves in the four diagonal directions and compares the four cardinal ones and all eight.
It stands for the patch embedding, and in pyramids (PiT, Swin) for the pooling between stages too;
a class token passes such a pooling through a linear map of its own.

**LSA** (sec. 3.3), per head, with queries q, keys k, values v::

    R = q kᵀ,   Rᴹ_ij = R_ij for i ≠ j, −∞ for i = j,   L = softmax(Rᴹ / τ) v,   τ learned

τ starts at the usual √head_dim. The class token's own diagonal is masked too. The parameter is
1/τ as in the authors' code, which has one per head (the paper speaks of τ without an index).

**Where the networks differ** (the authors apply both parts to five: ``spt-lsa-vit``, ``-cait``,
``-pit``, ``-t2t``, ``-swin``; see
``spt_lsa_networks.py`` and ``spt_lsa_pyramids.py``). As in their code,

* CaiT does not mask the diagonal but sets its logits to −1e-9, practically 0, before the heads are
  mixed, and its class attention has a temperature only. ``build("spt-lsa-cait",
  diagonal="masked")`` gives the paper's form, with the mask behind the head mixing (in front of it
  −∞ times a negative mixing weight would be +∞);
* T2T shifts the image by one pixel in front of its first soft split; there is no further norm or
  linear map;
* stochastic depth has the same rate in all blocks of ViT, CaiT and PiT and grows linearly in T2T
  and Swin.

**Traps**: a token whose only possible key is itself (a lone token, all others padding) keeps it:
the mask is a large finite number, so that the softmax has something to divide by. A token that
stands for several (after merging) is masked as one. The mask is a (tokens, tokens) matrix, added to
the logits in the fused kernel; very long sequences pay for it. SPT's tokens look p/2 beyond
their cell; :class:`~polypatch.tokens.Tokens` reports the cell, so that the cells tile the image.

**Training recipe** (sec. 4.1 and the authors' defaults; nothing of it is part of the modules but
stochastic depth): 100 epochs at batch 128; AdamW, learning rate 1e-3, weight decay 0.05 on *all*
parameters, 10 epochs of linear warm-up from 1e-6, cosine back to 1e-6; stochastic depth 0.1; label
smoothing 0.1; in half of the steps CutMix (β = 1) or Mixup (α = 1), equally likely; random erasing
with probability 0.25 (2–40 % of the area, aspect 0.3 to 1/0.3, filled with the data's mean);
AutoAugment (the CIFAR-10, SVHN or ImageNet policy); flips; crops with 4 pixels of padding. Their
"repeated augmentation 3" makes an epoch three passes over the data with fresh augmentation; an
image is not repeated within a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError, suggest
from ..hosts import ViT
from ..nn import Attention, GridPatching, LayerScale, Mixed, init_parts
from ..tokens import Tokens, raster_geometry

__all__ = [
    "DIRECTIONS",
    "VARIANTS",
    "LocalityAttention",
    "ShiftedPatchTokenization",
    "build",
    "from_official",
    "plug",
    "recognise",
    "shifted_copies",
]

_CARDINAL = ((0, 1), (0, -1), (1, 0), (-1, 0))
_DIAGONAL = ((1, 1), (1, -1), (-1, 1), (-1, -1))

#: Where each copy's content moves, (down, right) in shifts; the order is that of trained weights.
DIRECTIONS: dict[str, tuple[tuple[int, int], ...]] = {
    "diagonal": _DIAGONAL,
    "cardinal": _CARDINAL,
    "eight": _CARDINAL + _DIAGONAL,
}

#: The authors' five networks (sec. 4.1 and their model factory). ``patches``: the patch side for
#: inputs up to 32 pixels, and for larger ones; ``splits``: T2T's soft splits of stride 2, likewise;
#: ``ratio``: feed-forward width of a pyramid's stage, in widths of the stage.
VARIANTS: dict[str, dict[str, Any]] = {
    "spt-lsa-vit": dict(dim=192, depth=9, heads=12, head_dim=16, hidden=384, patches=(4, 8)),
    "spt-lsa-cait": dict(
        dim=192, depth=24, class_depth=2, heads=4, head_dim=64, hidden=384, patches=(4, 8)
    ),
    "spt-lsa-pit": dict(
        dim=96, depths=(2, 6, 4), heads=(2, 4, 8), head_dim=48, ratio=2.0, patches=(2, 4)
    ),
    "spt-lsa-t2t": dict(dim=256, depth=12, heads=4, hidden=512, token_dim=64, splits=(2, 3)),
    "spt-lsa-swin": dict(
        dim=96, depths=(2, 6, 4), heads=(3, 6, 12), window=4, ratio=2.0, patches=(2, 4)
    ),
}


# ---- shifted patch tokenization ----------------------------------------------------------------


def shifted_copies(
    x: Float[Tensor, "batch channels height width"], shift: int, directions: str = "diagonal"
) -> Float[Tensor, "batch copied_channels height width"]:
    """The map and its moved copies behind each other, zeros coming in from outside."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (shift, shift, shift, shift))

    def moved(down: int, right: int) -> Tensor:
        top, left = shift * (1 - down), shift * (1 - right)
        return padded[..., top : top + height, left : left + width]

    return torch.cat([x, *(moved(*way) for way in DIRECTIONS[directions])], dim=1)


class ShiftedPatchTokenization(nn.Module):
    """SPT: image and moved copies → patches → norm → linear map (sec. 3.2).

    Sides that the patch does not divide are padded with zeros at the bottom and on the right.

    Args:
        patch: side of a patch; 2 where it pools between the stages of a pyramid.
        directions: a key of :data:`DIRECTIONS`.
        shift: in patches; rounded down to whole pixels, but at least one.

    Raises:
        PolypatchError: unknown directions or a shift that is not positive.
    """

    def __init__(
        self,
        *,
        dim: int,
        patch: int,
        channels: int = 3,
        directions: str = "diagonal",
        shift: float = 0.5,
    ) -> None:
        super().__init__()
        if directions not in DIRECTIONS:
            raise PolypatchError(
                f"spt-lsa has no directions={directions!r}{suggest(str(directions), DIRECTIONS)}"
            )
        if shift <= 0:
            raise PolypatchError(f"spt-lsa needs a shift above 0 patches, got {shift}")
        self.patch, self.directions = patch, directions
        self.shift = max(1, int(patch * shift))
        copies = 1 + len(DIRECTIONS[directions])
        values = copies * channels * patch**2
        self.norm = nn.LayerNorm(values)
        self.proj = nn.Linear(values, dim)

    def init_weights(self) -> None:
        nn.init.xavier_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def embed(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch cells dim"], tuple[int, int]]:
        """Tokens in raster order, and their grid."""
        patch = self.patch
        bottom, right = -x.shape[-2] % patch, -x.shape[-1] % patch
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        grid = (x.shape[-2] // patch, x.shape[-1] // patch)
        copies = shifted_copies(x, self.shift, self.directions)
        patches = rearrange(copies, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)
        return self.proj(self.norm(patches)), grid

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        height, width = image.shape[-2:]
        if height < self.patch or width < self.patch:
            raise PolypatchError(
                f"the input is {height}×{width}, smaller than one patch of "
                f"{self.patch}×{self.patch}; use larger inputs or a smaller patch"
            )
        x, grid = self.embed(image)
        covered = (grid[0] * self.patch, grid[1] * self.patch)
        centre, extent = raster_geometry(grid, covered, device=image.device)
        return Tokens(x, centre[None], extent[None], canvas=(height, width), grid=grid)


# ---- locality self-attention -------------------------------------------------------------------


class LocalityAttention(Attention):
    """LSA: softmax attention with a learned temperature per head and without the own key (sec.
    3.3). With both parts switched off it is plain attention.

    Args:
        scale: factor of the logits, or where the learned 1/τ starts; default head_dim^-1/2.
        learn_temperature: 1/τ is a parameter (heads,).
        mask_diagonal: no token attends to itself.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        scale: float | None = None,
        learn_temperature: bool = True,
        mask_diagonal: bool = True,
    ) -> None:
        super().__init__(
            dim=dim, heads=heads, head_dim=head_dim, qkv_bias=qkv_bias, dropout=dropout
        )
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.mask_diagonal = mask_diagonal
        start = torch.full((heads,), self.scale)
        self.inverse_temperature = nn.Parameter(start) if learn_temperature else None

    @classmethod
    def like(
        cls, attention: Attention, *, learn_temperature: bool = True, mask_diagonal: bool = True
    ) -> LocalityAttention:
        """LSA with the projections (the same parameters) of plain attention."""
        new = cls(
            dim=attention.qkv.in_features,
            heads=attention.heads,
            head_dim=attention.head_dim,
            dropout=attention.dropout,
            scale=attention.scale,
            learn_temperature=learn_temperature,
            mask_diagonal=mask_diagonal,
        )
        new.qkv, new.proj = attention.qkv, attention.proj
        new.q_norm, new.k_norm = attention.q_norm, attention.k_norm
        return new.to(attention.qkv.weight).train(attention.training)

    def init_weights(self) -> None:
        if self.inverse_temperature is not None:
            nn.init.constant_(self.inverse_temperature, self.scale)

    def sharpened(
        self, q: Float[Tensor, "*batch heads tokens head_dim"]
    ) -> Float[Tensor, "*batch heads tokens head_dim"]:
        """Queries divided by the temperature, so that logits are plain products with keys."""
        if self.inverse_temperature is None:
            return q * self.scale
        return q * self.inverse_temperature[:, None, None].to(q.dtype)

    def masked(
        self, bias: Float[Tensor, "#batch #heads #tokens tokens"] | None, q: Tensor
    ) -> Float[Tensor, "..."] | None:
        """The bias of the logits with the diagonal masked, for queries ``q``."""
        if not self.mask_diagonal:
            return bias
        tokens = q.shape[-2]
        # Finite: where every other key is -inf (padding), a row must keep its own.
        lowest = max(-1e9, torch.finfo(q.dtype).min / 2)
        diagonal = torch.eye(tokens, device=q.device, dtype=q.dtype) * lowest
        return diagonal if bias is None else bias + diagonal

    def attend(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        v: Float[Tensor, "batch heads tokens head_dim"],
        bias: Float[Tensor, "#batch #heads #tokens tokens"] | None = None,
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Mixed values for queries that are :meth:`sharpened` already."""
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self.masked(bias, q),
            dropout_p=self.dropout if self.training else 0.0,
            scale=1.0,
        )

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        bias: Float[Tensor, "#batch #heads #tokens tokens"] | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Mixed:
        q, k, v = self.project(x, rotation)
        mixed = self.attend(self.sharpened(q), k, v, bias)
        return Mixed(self.proj(mixed.transpose(1, 2).flatten(2)), k)

    @torch.no_grad()
    def weights(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        bias: Float[Tensor, "#batch #heads #tokens tokens"] | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """The attention probabilities, for looking at."""
        q, k, _ = self.project(x, rotation)
        logits = self.sharpened(q) @ k.transpose(-2, -1)
        bias = self.masked(bias, q)
        return (logits if bias is None else logits + bias).softmax(-1)

    def extra_repr(self) -> str:
        learned = self.inverse_temperature is not None
        return f"learn_temperature={learned}, mask_diagonal={self.mask_diagonal}"


# ---- into a host -------------------------------------------------------------------------------


def plug(
    host: ViT,
    *,
    spt: bool = True,
    lsa: bool = True,
    directions: str = "diagonal",
    shift: float = 0.5,
    temperature: bool = True,
    mask: bool = True,
) -> ViT:
    """Give a host shifted patch tokenization and locality self-attention.

    SPT replaces the host's grid patching with new weights of the same patch side; LSA keeps the
    projections of every block and starts at their temperature.

    Args:
        spt, lsa: the two parts; without both the host stays as it is.
        directions: ``"diagonal"`` (the paper's), ``"cardinal"`` or ``"eight"``.
        shift: how far the copies move, in patches.
        temperature, mask: the two parts of LSA, which the paper ablates (sec. 4.3).

    Raises:
        PolypatchError: the host's patching is not a plain grid (for SPT), a block's mixing is not
            plain attention (for LSA), or an option is out of range.
    """
    if spt:
        grid = host.patching
        if type(grid) is not GridPatching:
            raise PolypatchError(
                "spt-lsa(spt=true) replaces a plain grid of patches; this host's patching is "
                f"{type(grid).__name__}: plug spt-lsa first or use spt=false"
            )
    if lsa:
        for number, block in enumerate(host.blocks):
            if type(block.mixing) is not Attention:
                raise PolypatchError(
                    "spt-lsa(lsa=true) needs plain attention in every block; that of block "
                    f"{number} is {type(block.mixing).__name__}: plug spt-lsa first or use "
                    "lsa=false"
                )
    if spt:
        old = host.patching.proj.weight  # type: ignore[union-attr]
        new = ShiftedPatchTokenization(
            dim=old.shape[0],  # type: ignore[index]
            channels=old.shape[1],  # type: ignore[index]
            patch=host.patching.patch,  # type: ignore[arg-type]
            directions=directions,
            shift=shift,
        )
        new.init_weights()
        host.patching = new.to(old).train(host.training)  # type: ignore[arg-type]
    if lsa:
        for block in host.blocks:
            block.mixing = LocalityAttention.like(
                block.mixing,  # type: ignore[arg-type]
                learn_temperature=temperature,
                mask_diagonal=mask,
            )
    return host.plugged("spt-lsa")


# ---- complete networks -------------------------------------------------------------------------


def build(
    variant: str,
    *,
    classes: int = 1000,
    resolution: int = 32,
    spt: bool = True,
    lsa: bool = True,
    drop_path: float = 0.1,
    diagonal: str = "published",
) -> nn.Module:
    """One of the authors' networks, with their initialisation.

    Args:
        variant: a key of :data:`VARIANTS`.
        resolution: input side; up to 32 pixels the authors' layout for 32 (CIFAR, SVHN), above
            theirs for 64 (Tiny-ImageNet): patches of twice the side, a third soft split in T2T.
        spt, lsa: the two parts; without both: the authors' baseline.
        drop_path: rate of stochastic depth, 0.1 in the paper.
        diagonal: ``"published"``, as the authors trained, or ``"masked"``, which differs for CaiT
            only (see the module's docstring).

    Raises:
        PolypatchError: an unknown variant or diagonal, or a resolution that the network can't take.
    """
    from .spt_lsa_networks import cait, t2t, vit
    from .spt_lsa_pyramids import pit, swin

    if variant not in VARIANTS:
        raise PolypatchError(f"there is no {variant!r}{suggest(variant, VARIANTS)}")
    if diagonal not in ("published", "masked"):
        raise PolypatchError(f'diagonal is "published" or "masked", got {diagonal!r}')
    name = variant.removeprefix("spt-lsa-")
    numbers = dict(VARIANTS[variant])
    large = resolution > 32
    if name == "t2t":
        numbers["splits"] = numbers["splits"][large]
        cell = 2 ** numbers["splits"]
    else:
        numbers["patch"] = cell = numbers.pop("patches")[large]
    if resolution < cell:
        raise PolypatchError(f"{variant} needs a resolution of at least {cell}, got {resolution}")
    if name == "cait":
        numbers["masked"] = diagonal == "masked"
    cells = -(-resolution // cell)
    network = {"vit": vit, "cait": cait, "pit": pit, "t2t": t2t, "swin": swin}[name]
    model: nn.Module = network(
        grid=(cells, cells), classes=classes, spt=spt, lsa=lsa, drop_path=drop_path, **numbers
    )
    if not next(model.parameters()).is_meta:  # on the meta device there is nothing to fill
        _initialise(model, name)
    return model


def _initialise(model: nn.Module, name: str) -> None:
    """The authors' initialisation, in place.

    | network        | linear maps, convolutions  | biases  | positions, class token             |
    |----------------|----------------------------|---------|------------------------------------|
    | ViT, CaiT, PiT | normal (Glorot)            | 0       | normal, std 1                      |
    | T2T            | normal, std 0.02           | 0       | sines and cosines; normal, 0.02    |
    | Swin           | PyTorch's own              | its own | normal, std 0.02                   |

    Head mixing starts normal with std 1, layer scale by the block's number, temperatures at the
    usual √head_dim, norms at 1 and 0.
    """
    init_parts(model)
    glorot = name in ("vit", "cait", "pit")
    for module in model.modules():
        if isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, module.init)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            if name == "swin":
                module.reset_parameters()
                continue
            if glorot:
                nn.init.xavier_normal_(module.weight)
            else:
                nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if glorot:
        for key, value in model.named_parameters():
            if key in ("position.table", "prefix.tokens", "prefix.position"):
                nn.init.normal_(value)


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """A network with the authors' weights, in eval mode.

    Args:
        config: their class as ``cls`` (``"ViT"``, ``"CaiT"``, ``"PiT"``, ``"T2T_ViT"``,
            ``"SwinTransformer"``) and its constructor's arguments by their names; what the shapes
            tell may be left out (see :func:`recognise`).
        state: the state dict with their keys.

    Raises:
        PolypatchError: unknown or missing keys or arguments, or shapes that don't fit, each named.
    """
    from .spt_lsa_weights import read

    return read(config, state)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration that :func:`from_official` takes, from names and shapes; None if these
    aren't the weights of one of the five networks.

    Square inputs are assumed. Without LSA the number of heads leaves no trace in ViT, PiT and T2T:
    the authors' 16 and 48 channels per head and 4 heads are assumed.
    """
    from .spt_lsa_weights import recognise_network

    return recognise_network(shapes)
