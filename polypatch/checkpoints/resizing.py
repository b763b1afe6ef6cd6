"""A plain ViT's weights at another patch size and resolution."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import PolypatchError
from ..hosts import ViT
from ..nn import GridPatching, LearnedPosition
from ..nn.positions import resample_grid

__all__ = ["resize", "resized_state"]


def resize(model: ViT, *, patch: int | None = None, resolution: int | None = None) -> ViT:
    """A plain ViT's weights for another patch size or native resolution; changes and returns it.

    The patch embedding is resized by the pseudo-inverse (FlexiViT), so that tokens of images
    enlarged in proportion stay what they were; the positions are interpolated. Without
    ``resolution`` the number of tokens at the native resolution changes with the patch.

    Raises:
        PolypatchError: a host whose tokenizer or positions aren't the plain ones.
    """
    if not isinstance(model.patching, GridPatching):
        raise PolypatchError(
            f"only a plain grid of patches can be resized, not {type(model.patching).__name__}"
        )
    patch = model.patch if patch is None else patch
    resolution = model.resolution if resolution is None else resolution
    conv = model.patching.proj
    fresh = GridPatching(
        dim=model.dim, patch=patch, channels=conv.in_channels, bias=conv.bias is not None
    )
    cells = -(-resolution // patch)
    wanted = dict(model.state_dict())
    wanted["patching.proj.weight"] = fresh.proj.weight
    if isinstance(model.position, LearnedPosition):
        wanted["position.table"] = torch.empty(1, cells, cells, model.dim)
    state = resized_state(dict(model.state_dict()), wanted)
    model.patching = fresh.to(conv.weight)
    model.patch, model.resolution = patch, resolution
    if isinstance(model.position, LearnedPosition):
        model.position.table = nn.Parameter(state["position.table"])
    model.load_state_dict(state)
    return model


def resized_state(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Patch embeddings and position tables of ``state`` in the sizes that ``own`` has."""
    from ..patching.flexivit import resample_patch_embed

    state = dict(state)
    kernel, table = "patching.proj.weight", "position.table"
    if kernel in state and kernel in own and state[kernel].ndim == own[kernel].ndim == 4:
        height, width = own[kernel].shape[2:]
        state[kernel] = resample_patch_embed(state[kernel], (height, width))
    if table in state and table in own and state[table].ndim == own[table].ndim == 4:
        rows, columns = own[table].shape[1:3]
        state[table] = resample_grid(state[table], (rows, columns))
    return state
