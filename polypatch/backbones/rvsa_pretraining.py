"""Masked pre-training for :mod:`polypatch.backbones.rvsa`, and fine-tuning from its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError
from ..hosts.vit import Block, Context, ViT, assemble_vit
from ..nn import GridPatching, Mixed, check_fit
from ..nn.positions import resample_grid
from ..tokens import Tokens
from .rvsa_network import RVSA, LocalBranch
from .rvsa_weights import keymap

__all__ = ["LocalBlock", "adopt", "pretraining_host"]


#: parts of a host's names and what the authors call them
RENAMES = (
    ("patching.proj", "patch_embed.proj"),
    ("pooling.norm", "norm"),
    (".mixing.", ".attn."),
    (".local.conv1", ".PCM.0"),
    (".local.norm", ".PCM.1"),
    (".local.conv2", ".PCM.3"),
)

BIASES = (".attn.qkv.bias", ".attn.q_bias", ".attn.v_bias")


class LocalBlock(Block):
    """ViTAE's block on a set of tokens: the kernels of its local branch are 1 × 1, so that no token
    needs to know its neighbours. Prefix tokens have no local branch."""

    def __init__(self, block: Block, *, dim: int, hidden: int, eps: float) -> None:
        super().__init__(
            dim=dim,
            mixing=block.mixing,
            mlp=block.mlp,
            norm=lambda width: nn.LayerNorm(width, eps=eps),
        )
        self.local = LocalBranch(dim=dim, hidden=hidden, kernel=1)

    def mix(self, tokens: Tokens, context: Context) -> Mixed:
        mixed = super().mix(tokens, context)
        local = self.local(tokens.placed[:, :, None])[:, :, 0]
        return mixed._replace(x=mixed.x + F.pad(local, (0, 0, tokens.prefix, 0)))


def pretraining_host(model: RVSA) -> ViT:
    """The network to pre-train in place of ``model``: a plain ViT with a class token and fixed
    sine-cosine positions, or ViTAE on sets of tokens; initialised.

    ``MaskedAutoencoder(encoder=pretraining_host(model))`` is trained, then
    ``adopt(model, mae.encoder)`` starts fine-tuning. The authors hide three quarters of the patches
    of MillionAID's images, for 1600 epochs, and predict the pixels as they are.
    """
    inner = int(model.dim * model.mlp_ratio)
    host = assemble_vit(
        dim=model.dim,
        depth=len(model.blocks),
        heads=model.heads,
        hidden=model.hidden or inner,
        patch=model.patch,
        grid=model.grid,
        classes=0,
        channels=model.stem.in_channels,
        position="sincos",
        prefix=1,
        eps=model.eps,
    )
    if model.has_local:
        host.blocks = nn.ModuleList(
            LocalBlock(plain, dim=model.dim, hidden=inner, eps=model.eps)
            for plain in host.blocks
            if isinstance(plain, Block)
        )
    host.init_weights()
    return host


def adopt(model: RVSA, source: ViT | Mapping[str, Tensor]) -> list[str]:
    """Start fine-tuning from masked pre-training; changes ``model`` in place.

    Positions are resampled to the model's grid and 1 × 1 kernels of ViTAE's local branch become the
    centres of 3 × 3 ones, as the authors convert them; biases that the model doesn't have, the
    class token and the decoder stay behind.

    Args:
        source: a pre-trained host (:func:`pretraining_host`, or any plain ViT of that size), or the
            authors' state dict of a masked autoencoder.

    Returns:
        Names of what stays fresh: what moves the windows, relative positions, classifier, pyramid.

    Raises:
        PolypatchError: weights of another architecture, each misfit named.
    """
    if isinstance(source, ViT):
        theirs, places = _of_host(source, model)
    else:
        theirs = {name.removeprefix("encoder."): value for name, value in source.items()}
        places = theirs.pop("pos_embed", None)
        if places is not None:
            places = _resampled(places, model.grid)
    left = ("decoder_", "mask_token", "cls_token", "head.")
    theirs = {name: value for name, value in theirs.items() if not name.startswith(left)}
    theirs = _with_biases_of(model, theirs)
    for name, value in theirs.items():
        if ".PCM." in name and value.ndim == 4 and value.shape[-1] == 1:
            theirs[name] = F.pad(value, (1, 1, 1, 1))
    if places is not None and model.position is not None:
        theirs["pos_embed"] = F.pad(places, (0, 0, model.spare, 0))
    names = keymap(model)
    renamed, called = names.to_ours(theirs)
    own = model.state_dict()
    parts = (".sample.", ".rel_", ".table", "head.", "pyramid.", "position")
    fresh = sorted(name for name in own.keys() - renamed.keys() if any(p in name for p in parts))
    check_fit(
        {name: value for name, value in own.items() if name not in fresh},
        renamed,
        what="this RVSA to start from",
        names=called,
        unknown=names.unknown(theirs),
    )
    model.load_state_dict(renamed, strict=False)
    return fresh


def _resampled(
    table: Float[Tensor, "1 rows dim"], grid: tuple[int, int]
) -> Float[Tensor, "1 places dim"]:
    """The authors' table, of a square image, for another grid; without the class token's row."""
    rows = table.shape[1]
    side = math.isqrt(rows)
    if rows - side * side not in (0, 1):
        raise PolypatchError(f"a table of {rows} positions is of no square image")
    square = table[:, rows - side * side :].unflatten(1, (side, side))
    return resample_grid(square, grid).flatten(1, 2)


def _with_biases_of(model: RVSA, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Biases of the projections as the model has them. Pre-training attends to the whole image,
    where a bias of keys changes nothing: it may come or go."""
    kept = {name: value for name, value in theirs.items() if not name.endswith(BIASES)}
    wanted = keymap(model).to_theirs(model.state_dict())
    for number in range(len(model.blocks)):
        where = f"blocks.{number}.attn."
        whole, q, v = (theirs.get(where + name) for name in ("qkv.bias", "q_bias", "v_bias"))
        if whole is not None:
            q, _, v = whole.chunk(3)
        elif q is not None and v is not None:
            whole = torch.cat([q, torch.zeros_like(q), v])
        made = {f"{where}qkv.bias": whole, f"{where}q_bias": q, f"{where}v_bias": v}
        kept |= {
            name: value for name, value in made.items() if name in wanted and value is not None
        }
    return kept


@torch.no_grad()
def _of_host(host: ViT, model: RVSA) -> tuple[dict[str, Tensor], Tensor]:
    """A host's weights under the authors' names, and its positions on the model's grid."""
    if not isinstance(host.patching, GridPatching):
        raise PolypatchError("only a plain grid of patches can be started from")
    weight = host.patching.proj.weight
    rows, columns = model.grid
    image = weight.new_zeros(1, weight.shape[1], rows * model.patch, columns * model.patch)
    tokens: Tokens = host.patching(image)
    places = host.position(tokens.with_x(torch.zeros_like(tokens.x))).x
    theirs: dict[str, Tensor] = {}
    for name, value in host.state_dict().items():
        if name.startswith(("prefix.", "position.", "head.")):
            continue
        for ours, other in RENAMES:
            name = name.replace(ours, other)
        theirs[name] = value
    return theirs, places
