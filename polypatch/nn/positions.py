"""How tokens are told where they lie: modules that read ``Tokens.centre``, never a token count.

A position module has up to three answers; the host asks for all of them:

* ``forward(tokens)``: tokens with something added to their features, asked once;
* ``rotation(tokens)``: cosines and sines that turn queries and keys, asked again whenever the set
  of tokens changes;
* ``bias(tokens)``: something to add to the attention logits, asked likewise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..tokens import Tokens

__all__ = [
    "LearnedPosition",
    "NoPosition",
    "Position",
    "RotaryPosition",
    "SinCosPosition",
    "resample_grid",
    "rotate",
    "sincos",
]


class Position(nn.Module):
    """Base: adds nothing, turns nothing, biases nothing."""

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens

    def rotation(self, tokens: Tokens) -> tuple[Tensor, Tensor] | None:
        return None

    def bias(self, tokens: Tokens) -> Tensor | None:
        return None

    def init_weights(self) -> None:
        """Nothing to initialise, unless a subclass has parameters."""


class NoPosition(Position):
    """No position at all: with mean pooling the network becomes a function of a set."""


def resample_grid(
    table: Float[Tensor, "1 rows columns dim"], size: tuple[int, int], *, mode: str = "bicubic"
) -> Float[Tensor, "1 rows2 columns2 dim"]:
    """Position table for another grid, as timm does it: antialiased ``mode`` interpolation."""
    if table.shape[1:3] == size:
        return table
    maps = table.permute(0, 3, 1, 2).float()
    maps = F.interpolate(maps, size=size, mode=mode, antialias=True, align_corners=False)
    return maps.permute(0, 2, 3, 1).to(table.dtype)


class LearnedPosition(Position):
    """A learned table over a grid of cells (Dosovitskiy et al. 2021).

    Tokens that are the table's own grid read it as it is; another regular grid reads it resampled
    (bicubic, antialiased); tokens anywhere else read it bilinearly at their centre. ``canvas`` is
    the input size that the table was made for; only the relative place in the canvas matters.
    """

    def __init__(self, *, grid: tuple[int, int], dim: int, mode: str = "bicubic") -> None:
        super().__init__()
        self.mode = mode
        self.table = nn.Parameter(torch.zeros(1, *grid, dim))

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, tokens: Tokens) -> Tokens:
        if tokens.grid is not None:
            table = resample_grid(self.table, tokens.grid, mode=self.mode)  # type: ignore[arg-type]
            code = table.flatten(1, 2)
        else:
            code = self.at(tokens.centre[:, tokens.prefix :], tokens.canvas)
        placed = tokens.placed + code.to(tokens.x.dtype)
        if tokens.prefix:
            placed = torch.cat([tokens.x[:, : tokens.prefix], placed], dim=1)
        return tokens.with_x(placed)

    def at(
        self, centre: Float[Tensor, "batch placed 2"], canvas: tuple[int, ...]
    ) -> Float[Tensor, "batch placed dim"]:
        """The table read bilinearly at the centres (input units); constant beyond the outer cells'
        own centres."""
        size = torch.tensor(canvas, device=centre.device, dtype=centre.dtype)
        at = (centre / size * 2 - 1).flip(-1)[:, None]  # grid_sample wants (x, y)
        maps = self.table.permute(0, 3, 1, 2).expand(len(centre), -1, -1, -1)
        read = F.grid_sample(
            maps, at.to(maps.dtype), mode="bilinear", padding_mode="border", align_corners=False
        )
        return read[:, :, 0].transpose(1, 2)


def sincos(
    position: Float[Tensor, "*batch"], dim: int, *, temperature: float = 10000.0
) -> Float[Tensor, "*batch dim"]:
    """[sin | cos] of ``position`` at dim/2 frequencies from 1 down to 1/temperature."""
    steps = torch.arange(dim // 2, device=position.device, dtype=torch.float32) / (dim // 2)
    angle = position[..., None] * temperature**-steps
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class SinCosPosition(Position):
    """Fixed sine-cosine code of the centre, half of the channels for y, half for x (MoCo v3, Chen
    et al. 2021), in units of ``patch`` pixels, so that a regular grid gets 0, 1, 2, ... ."""

    def __init__(self, *, dim: int, patch: float, temperature: float = 10000.0) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"a 2-D sine-cosine code needs a width divisible by 4, got {dim}")
        self.dim, self.patch, self.temperature = dim, patch, temperature

    def forward(self, tokens: Tokens) -> Tokens:
        # A cell's index is (its centre in patches) - 1/2.
        place = tokens.centre[:, tokens.prefix :] / self.patch - 0.5
        code = sincos(place, self.dim // 2, temperature=self.temperature).flatten(-2)
        code = F.pad(code, (0, 0, tokens.prefix, 0))
        return tokens.with_x(tokens.x + code.to(tokens.x.dtype))


def rotate(
    x: Float[Tensor, "batch heads tokens head_dim"],
    cosine: Float[Tensor, "#batch 1 tokens head_dim"],
    sine: Float[Tensor, "#batch 1 tokens head_dim"],
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Rotate the pairs (channel i, channel i + head_dim/2) by the given angles (Su et al. 2021)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cosine + turned * sine


class RotaryPosition(Position):
    """Two-dimensional axial RoPE (Heo et al. 2024, sec. 3.1: base 100, in patches): a quarter of
    a head's channels turns with y, a quarter with x, each paired with the channel half a head
    away. Logits depend on *relative* places only, so they don't change when all placed tokens move
    together; prefix tokens are not turned."""

    def __init__(self, *, head_dim: int, patch: float, temperature: float = 100.0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"2-D rotary positions need heads divisible by 4, got {head_dim}")
        self.head_dim, self.patch, self.temperature = head_dim, patch, temperature

    def rotation(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        quarter = self.head_dim // 4
        steps = torch.arange(quarter, device=tokens.x.device, dtype=torch.float32) / quarter
        # Prefix tokens have centre 0, so their angle is 0 by construction.
        place = tokens.centre / self.patch
        angle = (place[..., None] * self.temperature**-steps).flatten(-2)
        angle = torch.cat([angle, angle], dim=-1)[:, None]
        return angle.cos().to(tokens.x.dtype), angle.sin().to(tokens.x.dtype)
