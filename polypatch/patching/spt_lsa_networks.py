"""ViT, CaiT and T2T-ViT as *Vision Transformer for Small-Size Datasets* trains them.

The plain networks among the five to which Lee et al. (2021, arXiv 2112.13492) apply SPT and LSA, in
their small versions, with and without the two parts, from the blocks of :mod:`polypatch.hosts`
(ViT: Dosovitskiy et al. 2021; CaiT: Touvron et al. 2021; T2T-ViT: Yuan et al. 2021). The pyramids
PiT and Swin are in ``spt_lsa_pyramids.py``. Norms have eps 1e-5.

| network | built as                                  | SPT is          | LSA in                   |
|---------|-------------------------------------------|-----------------|--------------------------|
| ViT     | ``ViT``                                   | patch embedding | every block              |
| CaiT    | ``ViT`` whose pooling is class attention  | patch embedding | blocks, class attention  |
| T2T     | ``ViT`` whose patching is tokens-to-token | shifts only     | all transformers         |
| PiT     | ``Pyramid``                               | every pooling   | every block              |
| Swin    | ``Pyramid``                               | every merging   | every window             |

Traps of the authors' versions, kept because trained weights depend on them: T2T's blocks add the
*normed* input to attention beside the residual, its token transformers add their values and scale
logits by the input's width; CaiT's class attention reads patches that were never normed, and not
itself; CaiT's layer scale starts by the block's number, not by the network's depth.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..hosts.vit import Block, InputRequirements, Prefix, ViT
from ..nn import ClassToken, GridPatching, LearnedPosition, Mixed, Mlp
from ..tokens import Tokens, raster_geometry
from .spt_lsa import LocalityAttention, ShiftedPatchTokenization, shifted_copies

__all__ = ["cait", "growing", "head_attention", "plain_or_shifted", "pre_norm_block", "t2t", "vit"]


# ---- shared by all -----------------------------------------------------------------------------


def plain_or_shifted(*, dim: int, patch: int, channels: int, spt: bool) -> nn.Module:
    if spt:
        return ShiftedPatchTokenization(dim=dim, patch=patch, channels=channels)
    return GridPatching(dim=dim, patch=patch, channels=channels)


def head_attention(*, dim: int, heads: int, head_dim: int, lsa: bool) -> LocalityAttention:
    """ViT's and PiT's: no bias in front, and no projection behind a single head of full width."""
    attention = LocalityAttention(
        dim=dim,
        heads=heads,
        head_dim=head_dim,
        qkv_bias=False,
        learn_temperature=lsa,
        mask_diagonal=lsa,
    )
    if heads == 1 and head_dim == dim:
        attention.proj = nn.Identity()  # type: ignore[assignment]
    return attention


def pre_norm_block(
    *,
    dim: int,
    mixing: nn.Module,
    hidden: int,
    drop_path: float,
    dropout: float,
    kind: type[Block] = Block,
    layer_scale: float | None = None,
) -> Block:
    """A pre-norm block with dropout behind both branches and in the feed-forward network."""
    block = kind(
        dim=dim,
        mixing=mixing,
        mlp=Mlp(dim=dim, hidden=hidden, dropout=dropout),
        layer_scale=layer_scale,
        drop_path=drop_path,
    )
    if dropout:
        block.drop_path = nn.Sequential(nn.Dropout(dropout), block.drop_path)  # type: ignore
    return block


def growing(rate: float, depth: int) -> list[float]:
    return [rate * index / max(1, depth - 1) for index in range(depth)]


# ---- ViT ---------------------------------------------------------------------------------------


def vit(
    *,
    grid: tuple[int, int],
    patch: int,
    classes: int,
    dim: int,
    depth: int,
    heads: int,
    head_dim: int,
    hidden: int,
    spt: bool,
    lsa: bool,
    channels: int = 3,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    embed_dropout: float = 0.0,
) -> ViT:
    """The plain ViT, without bias in front of attention; weights aren't filled.

    Args:
        grid: cells of the position table; times ``patch`` it is the native input size.
        drop_path: the same rate in every block.
    """
    return ViT(
        dim=dim,
        patch=patch,
        resolution=max(grid) * patch,
        patching=plain_or_shifted(dim=dim, patch=patch, channels=channels, spt=spt),
        position=LearnedPosition(grid=grid, dim=dim),
        prefix=Prefix(dim=dim, count=1, positioned=1),
        norm_in=nn.Dropout(embed_dropout) if embed_dropout else None,
        blocks=[
            pre_norm_block(
                dim=dim,
                mixing=head_attention(dim=dim, heads=heads, head_dim=head_dim, lsa=lsa),
                hidden=hidden,
                drop_path=drop_path,
                dropout=dropout,
            )
            for _ in range(depth)
        ],
        norm=nn.LayerNorm(dim),
        pooling=ClassToken(),
        head=nn.Linear(dim, classes) if classes else nn.Identity(),
    )


# ---- CaiT --------------------------------------------------------------------------------------


class TalkingHeads(LocalityAttention):
    """Attention whose heads are mixed before and after the softmax (Shazeer et al. 2020), so no
    fused kernel fits; with ``source``, queries come from x, keys and values from the source.

    Args:
        diagonal: ``"zeroed"``: the own logit becomes −1e-9 before the heads are mixed (CaiT with
            LSA as trained); ``"masked"``: −∞ behind the mixing; None: as it is.
    """

    def __init__(
        self, *, dim: int, heads: int, head_dim: int, lsa: bool, diagonal: str | None
    ) -> None:
        super().__init__(
            dim=dim,
            heads=heads,
            head_dim=head_dim,
            qkv_bias=False,
            learn_temperature=lsa,
            mask_diagonal=diagonal == "masked",
        )
        self.zeroed = diagonal == "zeroed"
        self.mix_before = nn.Parameter(torch.zeros(heads, heads))
        self.mix_after = nn.Parameter(torch.zeros(heads, heads))

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.mix_before)
        nn.init.normal_(self.mix_after)

    def probabilities(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        """What each head's values are mixed by; rows need not sum to 1 behind the second mix."""
        logits = self.sharpened(q) @ k.transpose(-2, -1)
        if self.zeroed:
            own = torch.eye(q.shape[-2], device=q.device, dtype=torch.bool)
            logits = logits.masked_fill(own, -1e-9)
        logits = torch.einsum("bhij,hg->bgij", logits, self.mix_before.to(logits.dtype))
        bias = self.masked(bias, q)
        shares = (logits if bias is None else logits + bias).softmax(-1)
        return torch.einsum("bhij,hg->bgij", shares, self.mix_after.to(shares.dtype))

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        bias: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        source: Float[Tensor, "batch others dim"] | None = None,
    ) -> Mixed:
        if source is None:
            q, k, v = self.project(x, rotation)
        else:
            width = self.heads * self.head_dim
            q = F.linear(x, self.qkv.weight[:width])
            kv = F.linear(source, self.qkv.weight[width:])
            q = rearrange(q, "b n (h d) -> b h n d", h=self.heads)
            k, v = rearrange(kv, "b n (t h d) -> t b h n d", t=2, h=self.heads).unbind(0)
        shares = self.probabilities(q, k, bias)
        return Mixed(self.proj((shares.to(v.dtype) @ v).transpose(1, 2).flatten(2)), k)

    @torch.no_grad()
    def weights(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        bias: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        q, k, _ = self.project(x, rotation)
        return self.probabilities(q, k, bias)


class ClassBlock(Block):
    """A block that updates the class token only; it reads patches as they come, without norm."""

    def read(
        self, token: Float[Tensor, "batch 1 dim"], patches: Tokens
    ) -> Float[Tensor, "batch 1 dim"]:
        bias = patches.key_bias()
        mixed = self.mixing(self.norm1(token), bias=bias, source=patches.x).x
        token = token + self.drop_path(self.scale1(mixed))
        return token + self.drop_path(self.scale2(self.mlp(self.norm2(token))))


class ClassAttention(nn.Module):
    """CaiT's second part as a pooling: a class token looks at the patches a few times."""

    def __init__(self, *, dim: int, blocks: list[ClassBlock], skip: float = 0.0) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.skip = skip

    def init_weights(self) -> None:
        nn.init.normal_(self.token)

    def forward(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        token = self.token.expand(tokens.batch, -1, -1)
        for block in _kept(self.blocks, self.skip if self.training else 0.0):
            token = block.read(token, tokens)  # type: ignore[operator]
        return self.norm(token[:, 0])


def _kept(blocks: nn.ModuleList, rate: float) -> list[nn.Module]:
    """Layer dropout: each block is left out of this step with probability ``rate``; one stays."""
    if not rate:
        return list(blocks)
    drawn = torch.rand(len(blocks) + 1)
    chosen = [block for block, u in zip(blocks, drawn[1:].tolist()) if u >= rate]
    return chosen or [blocks[int(drawn[0] * len(blocks))]]


class Cait(ViT):
    """A ViT that may leave out whole blocks in training (``layer_dropout``, 0 in the paper; the
    authors' code would leave them out in evaluation too)."""

    skip = 0.0

    def no_decay(self) -> set[str]:
        return super().no_decay() | {"pooling.token"}

    def run_blocks(self, tokens: Tokens) -> Tokens:
        if not (self.skip and self.training):
            return super().run_blocks(tokens)
        for block in _kept(self.blocks, self.skip):
            tokens = block(tokens, self.context(tokens))
        return tokens


def _layer_scale(number: int) -> float:
    """Start of layer scale in the block of this number, counted from 1. CaiT's table (sec. 2) is
    by the network's depth; the authors read it by block."""
    return 0.1 if number <= 18 else 1e-5 if number <= 24 else 1e-6


def cait(
    *,
    grid: tuple[int, int],
    patch: int,
    classes: int,
    dim: int,
    depth: int,
    class_depth: int,
    heads: int,
    head_dim: int,
    hidden: int,
    spt: bool,
    lsa: bool,
    masked: bool = False,
    channels: int = 3,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    embed_dropout: float = 0.0,
    layer_dropout: float = 0.0,
) -> ViT:
    """CaiT: blocks over patches alone, then a class token that reads them.

    Args:
        masked: LSA masks the diagonal (the paper) instead of zeroing it (its code).
    """
    diagonal = ("masked" if masked else "zeroed") if lsa else None

    def block(number: int, kind: type[Block], diagonal: str | None) -> Any:
        return pre_norm_block(
            dim=dim,
            mixing=TalkingHeads(
                dim=dim, heads=heads, head_dim=head_dim, lsa=lsa, diagonal=diagonal
            ),
            hidden=hidden,
            drop_path=drop_path,
            dropout=dropout,
            kind=kind,
            layer_scale=_layer_scale(number),
        )

    model = Cait(
        dim=dim,
        patch=patch,
        resolution=max(grid) * patch,
        patching=plain_or_shifted(dim=dim, patch=patch, channels=channels, spt=spt),
        position=LearnedPosition(grid=grid, dim=dim),
        prefix=None,
        norm_in=nn.Dropout(embed_dropout) if embed_dropout else None,
        blocks=[block(i + 1, Block, diagonal) for i in range(depth)],
        norm=nn.Identity(),
        pooling=ClassAttention(
            dim=dim,
            blocks=[block(i + 1, ClassBlock, None) for i in range(class_depth)],
            skip=layer_dropout,
        ),
        head=nn.Linear(dim, classes) if classes else nn.Identity(),
    )
    model.skip = layer_dropout
    return model


# ---- T2T ---------------------------------------------------------------------------------------


class ValueAttention(LocalityAttention):
    """T2T's attention, with a residual inside: x + attention(x), or with a single head, where the
    width may change, values + attention."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        width: int,
        qkv_bias: bool,
        lsa: bool,
        scale: float | None = None,
        dropout: float = 0.0,
        proj_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            dim=dim,
            heads=heads,
            head_dim=width // heads,
            qkv_bias=qkv_bias,
            dropout=dropout,
            # By the width of the input: in token transformers it isn't that of the head.
            scale=(dim // heads) ** -0.5 if scale is None else scale,
            learn_temperature=lsa,
            mask_diagonal=lsa,
        )
        self.proj = nn.Linear(width, width)
        self.proj_dropout = nn.Dropout(proj_dropout)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        bias: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Mixed:
        q, k, v = self.project(x, rotation)
        mixed = self.attend(self.sharpened(q), k, v, bias).transpose(1, 2).flatten(2)
        residual = v[:, 0] if self.heads == 1 else x
        return Mixed(residual + self.proj_dropout(self.proj(mixed)), k)


class TokenTransformer(nn.Module):
    """One block that narrows the patches of a soft split to ``width``."""

    def __init__(self, *, dim: int, width: int, lsa: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixing = ValueAttention(dim=dim, heads=1, width=width, qkv_bias=False, lsa=lsa)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(dim=width, hidden=width)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens width"]:
        x = self.mixing(self.norm1(x)).x
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """Soft splits (overlapping 3×3 patches, stride 2) with a token transformer between two of
    them; the last one's patches are mapped to ``dim``. SPT shifts the image by one pixel first."""

    input_requirements = InputRequirements()

    def __init__(
        self, *, dim: int, width: int, splits: int, channels: int, spt: bool, lsa: bool
    ) -> None:
        super().__init__()
        self.spt = spt
        values = 9 * channels * (5 if spt else 1)
        self.transformers = nn.ModuleList(
            TokenTransformer(dim=9 * width if index else values, width=width, lsa=lsa)
            for index in range(splits - 1)
        )
        # The authors' networks have this norm and never use it: it is kept, frozen, so that their
        # weights load whole and parameter counts are theirs.
        self.norm = nn.LayerNorm(9 * width).requires_grad_(False)
        self.project = nn.Linear(9 * width, dim)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tokens:
        canvas = (image.shape[-2], image.shape[-1])
        x = shifted_copies(image, 1) if self.spt else image
        patches, grid = self.soft_split(x)
        for transformer in self.transformers:
            x = transformer(patches).transpose(1, 2).unflatten(2, grid)
            patches, grid = self.soft_split(x)
        centre, extent = raster_geometry(grid, canvas, device=image.device)
        return Tokens(self.project(patches), centre[None], extent[None], canvas=canvas, grid=grid)

    @staticmethod
    def soft_split(
        x: Float[Tensor, "batch channels height width"],
    ) -> tuple[Float[Tensor, "batch tokens values"], tuple[int, int]]:
        grid = ((x.shape[-2] + 1) // 2, (x.shape[-1] + 1) // 2)
        return F.unfold(x, 3, stride=2, padding=1).transpose(1, 2), grid


def sinusoid(count: int, dim: int) -> Float[Tensor, "count dim"]:
    """Sines in even and cosines in odd channels of the index in the sequence (Vaswani et al. 2017,
    sec. 3.5)."""
    power = torch.arange(dim).div(2, rounding_mode="floor") * 2 / dim
    angle = torch.arange(count, dtype=torch.float64)[:, None] / 10000 ** power.double()
    even = torch.arange(dim) % 2 == 0
    return torch.where(even, angle.sin(), angle.cos()).float()


class SequencePosition(LearnedPosition):
    """A frozen sine-cosine code of the raster *index*, class token first."""

    def __init__(self, *, grid: tuple[int, int], dim: int) -> None:
        super().__init__(grid=grid, dim=dim)
        self.table.requires_grad_(False)

    def init_weights(self) -> None:
        rows, columns, dim = self.table.shape[1:]
        with torch.no_grad():
            self.table.copy_(sinusoid(1 + rows * columns, dim)[1:].view_as(self.table))


class FirstOfSequence(Prefix):
    """The class token, at index 0 of the sequence."""

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim, count=1, positioned=1)
        self.position.requires_grad_(False)  # type: ignore[union-attr]

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.tokens, std=0.02)
        with torch.no_grad():
            self.position.copy_(sinusoid(1, self.tokens.shape[-1]))  # type: ignore[union-attr]


def t2t(
    *,
    grid: tuple[int, int],
    splits: int,
    classes: int,
    dim: int,
    depth: int,
    heads: int,
    hidden: int,
    token_dim: int,
    spt: bool,
    lsa: bool,
    channels: int = 3,
    qkv_bias: bool = False,
    scale: float | None = None,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> ViT:
    """T2T-ViT with token *transformers*.

    Args:
        splits: soft splits, each halving the sides.
        scale: of the blocks' logits, default head_dim^-1/2.
        drop_path: rate of the last block, growing from 0.
    """

    def block(rate: float) -> Block:
        mixing = ValueAttention(
            dim=dim,
            heads=heads,
            width=dim,
            qkv_bias=qkv_bias,
            lsa=lsa,
            scale=scale,
            dropout=attention_dropout,
            proj_dropout=dropout,
        )
        block = Block(
            dim=dim,
            mixing=mixing,
            mlp=Mlp(dim=dim, hidden=hidden, dropout=dropout),
            drop_path=rate,
        )
        if dropout:  # attention has its own, in front of its inner residual
            block.scale2 = nn.Dropout(dropout)  # type: ignore[assignment]
        return block

    return ViT(
        dim=dim,
        patch=2**splits,
        resolution=max(grid) * 2**splits,
        patching=TokensToToken(
            dim=dim, width=token_dim, splits=splits, channels=channels, spt=spt, lsa=lsa
        ),
        position=SequencePosition(grid=grid, dim=dim),
        prefix=FirstOfSequence(dim=dim),
        norm_in=nn.Dropout(dropout) if dropout else None,
        blocks=[block(rate) for rate in growing(drop_path, depth)],
        norm=nn.LayerNorm(dim),
        pooling=ClassToken(),
        head=nn.Linear(dim, classes) if classes else nn.Identity(),
    )
