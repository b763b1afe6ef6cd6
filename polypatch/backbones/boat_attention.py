"""FSLA: attention within balanced clusters of similar tokens, the new part of BOAT (Yu, Zhao, Li
and Yu, BMVC 2022, arXiv 2201.13027).

For N tokens and each head by itself (q, k, v of a projection of its own, d = C / heads):

1. The tokens are cut in two equal halves, each half again, … until clusters have ``cluster``
   tokens. One cut: two centroids begin as the directions of the mean query of the first and of the
   second half of the present order; twice, with s_ik the cosine of q_i and c_k,
   c_k ← direction of Σ_i softmax_k(100 s_ik) q_i; then the tokens are sorted by
   (s_i1 + 1) / (s_i2 + 1), rising, and the median is the cut.
2. A cluster's tokens attend to its keys and values and, across the last cut, to the ``overlap``
   nearest ones of its sibling: softmax(q kᵀ / √d) v of 49 queries with 69 keys.
3. Back in their places, a depthwise 3×3 convolution of v on the whole map is added, then a linear
   layer.

The clustering has no parameters and no gradient: that passes through q, k and v of a cluster. Cost
grows linearly with N.

Traps: the cut sorts by the ratio, so both halves are equally large even if all tokens are alike;
tokens nearer to the *second* centroid come first. A lone cluster has no sibling; the authors' code
pairs images of the batch there (the first borrows keys of the second, and the other way round; odd
batches fail), which is ``pair_across_batch``. Their code takes 49 · 2^L tokens only; here clusters
of any number are as equal as they can be, of ``cluster`` tokens or more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..errors import PolypatchError
from ..nn import DropPath, Linear, fresh
from .cswin import Block

__all__ = [
    "Bilateral",
    "FeatureAttention",
    "balanced_clusters",
    "feature_rules",
    "levels_of",
    "widened",
]


def levels_of(tokens: int, cluster: int) -> int:
    """How often ``tokens`` are cut in two so that no cluster has fewer than ``cluster``."""
    return max(1, tokens // cluster).bit_length() - 1


@torch.no_grad()
def balanced_clusters(
    x: Float[Tensor, "groups tokens dim"],
    levels: int,
    *,
    rounds: int = 2,
    sharpness: float = 100.0,
) -> Int64[Tensor, "groups clusters size"]:
    """Balanced hierarchical clustering: indices of the tokens of 2^levels clusters, sorted.

    Siblings of the last cut stand next to each other, and their tokens in the order of that cut.
    Where clusters can't be equally large, the smaller ones end in the index ``tokens``, which is
    none of a token.
    """
    groups, tokens, dim = x.shape
    size = -(-tokens >> levels)
    filled = size << levels
    # Which side of a cut a token falls on hangs on the last digits: in float64 the clusters are the
    # same in every batch and layout. Accelerators have it slowly or not at all.
    x = x.double() if x.is_cpu else x.float()
    x = F.pad(x, (0, 0, 0, filled - tokens)) if filled > tokens else x.contiguous()
    weight = torch.linalg.vector_norm(x, dim=-1)
    unit = x / weight.clamp_min(1e-12)[..., None]
    order = torch.arange(filled, device=x.device).clamp_max(tokens).expand(groups, -1)
    counts = [tokens]  # of each of a group's clusters, as far as it is cut
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(levels):
            # unit: (groups · clusters so far, places in each, dim)
            many, length, _ = unit.shape
            half = length // 2
            sums = weight.reshape(2 * many, 1, half) @ unit.reshape(2 * many, half, dim)
            centre = F.normalize(sums.view(many, 2, dim), dim=-1)
            for _ in range(rounds):
                soft = (sharpness * (centre @ unit.mT)).softmax(1)
                centre = F.normalize((soft * weight[:, None]) @ unit, dim=-1)
            first, second = (centre @ unit.mT + 1).unbind(1)
            ratio = first / second
            if filled > tokens:
                ratio = ratio.masked_fill(order == tokens, torch.inf)
            place = ratio.argsort(-1)
            if filled > tokens:
                at = _halved(counts, length).to(x.device).repeat(groups, 1)
                place = place.gather(1, at)
                counts = [n for count in counts for n in (count - count // 2, count // 2)]
            order = order.gather(1, place).view(2 * many, half)
            weight = weight.gather(1, place).view(2 * many, half)
            rows = place + length * torch.arange(many, device=x.device)[:, None]
            unit = unit.view(-1, dim).index_select(0, rows.flatten()).view(2 * many, half, dim)
    return order.view(groups, -1, size)


def _halved(counts: list[int], length: int) -> Int64[Tensor, "clusters length"]:
    """Of sorted clusters of ``length`` places, of which the first ``counts`` hold tokens: which
    place goes where so that both halves have as many tokens, or the first one more."""
    place = torch.arange(length)
    count = torch.tensor(counts)[:, None]
    first = count - count // 2
    half = length // 2
    empty = torch.tensor(length - 1)
    second = torch.where(place - half < count - first, place - half + first, empty)
    return torch.where(place < half, torch.where(place < first, place, empty), second)


def widened(pairs: Int64[Tensor, "*batch twice"], overlap: int) -> Int64[Tensor, "*batch 2 more"]:
    """What both halves of a sorted whole have if each reaches ``overlap`` beyond the cut."""
    half = pairs.shape[-1] // 2
    return torch.stack([pairs[..., : half + overlap], pairs[..., half - overlap :]], -2)


class FeatureAttention(nn.Module):
    """FSLA of a map.

    Args:
        cluster: tokens of a cluster, at least.
        overlap: keys that a cluster borrows from its sibling.
        scale: factor of the logits; None: 1 / √head dim.
        attention_dropout, dropout: of the attention's weights, of the result.
        pair_across_batch: a lone cluster has that of the next image as its sibling.

    Raises:
        PolypatchError: a dim that the heads don't divide; an odd batch to be paired.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        cluster: int = 49,
        overlap: int = 20,
        bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        pair_across_batch: bool = False,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise PolypatchError(f"{dim} channels don't divide into {heads} heads")
        self.heads, self.cluster, self.overlap, self.scale = heads, cluster, overlap, scale
        self.attention_dropout, self.dropout = attention_dropout, dropout
        self.pair_across_batch = pair_across_batch
        self.qkv = Linear(dim, 3 * dim, bias=bias)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = Linear(dim, dim)

    def clusters(
        self, qkv: Float[Tensor, "batch height width triple"]
    ) -> Int64[Tensor, "batch_heads clusters size"]:
        """Which tokens attend to each other, see :func:`balanced_clusters`."""
        q = qkv[..., : qkv.shape[-1] // 3].flatten(1, 2).unflatten(-1, (self.heads, -1))
        tokens = q.shape[1]
        return balanced_clusters(q.transpose(1, 2).flatten(0, 1), levels_of(tokens, self.cluster))

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        qkv = self.qkv(x)
        mixed = self.attend(qkv.flatten(1, 2), self.clusters(qkv)).view_as(x)
        places = self.lepe(qkv[..., 2 * x.shape[-1] :].permute(0, 3, 1, 2))
        mixed = self.proj(fresh.add(mixed, places.permute(0, 2, 3, 1)))
        return F.dropout(mixed, self.dropout, self.training)

    def attend(
        self,
        qkv: Float[Tensor, "batch tokens triple"],
        order: Int64[Tensor, "batch_heads clusters size"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attention within the clusters, tokens in their own order.

        Rows of ``head dim`` channels are picked by index straight from the projection, keys and
        values with their overlap, and the results put into their places likewise.
        """
        batch, tokens, triple = qkv.shape
        _, clusters, size = order.shape
        dim, heads = triple // 3, self.heads
        uneven = clusters * size > tokens
        if uneven:  # a row for the index that is none of a token
            qkv = F.pad(qkv, (0, 0, 0, 1))
        room = qkv.shape[1]
        group = torch.arange(batch * heads, device=qkv.device)[:, None, None]
        head = group % heads
        own = order + group // heads * room  # a token's number in the batch
        keys = self.borrowing(own, batch)
        rows = qkv.reshape(-1, dim // heads)  # (batch, tokens, 3, heads, head dim)

        def picked(token: Tensor, part: int) -> Tensor:
            row = (token * 3 + part) * heads + head
            return rows.index_select(0, row.flatten()).view(*token.shape, -1)

        mixed = F.scaled_dot_product_attention(
            picked(own, 0),
            picked(keys, 1),
            picked(keys, 2),
            attn_mask=(keys % room != tokens)[:, :, None] if uneven else None,
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scale,
        )
        out = mixed.new_empty(batch * room * heads, dim // heads)
        out.index_copy_(0, (own * heads + head).flatten(), mixed.flatten(0, 2))
        return out.view(batch, room, dim)[:, :tokens]

    def borrowing(
        self, own: Int64[Tensor, "batch_heads clusters size"], batch: int
    ) -> Int64[Tensor, "batch_heads clusters more"]:
        """Keys of each cluster: its own and those nearest to the last cut of its sibling."""
        clusters, size = own.shape[1:]
        overlap = min(self.overlap, size)
        if clusters > 1:
            pairs = own.unflatten(1, (-1, 2)).flatten(2)
            return widened(pairs, overlap).flatten(1, 2)
        if not self.pair_across_batch:
            return own
        if batch % 2:
            raise PolypatchError(
                f"pair_across_batch needs an even number of images, this batch has {batch}"
            )
        pairs = own.view(-1, 2, self.heads, size).transpose(1, 2).flatten(2)
        return widened(pairs, overlap).transpose(1, 2).reshape(*own.shape[:2], -1)


class Bilateral(nn.Module):
    """A block of Swin or CSWin with FSLA between its attention and its MLP."""

    def __init__(
        self, *, block: Block, feature: FeatureAttention, dim: int, drop_path: float
    ) -> None:
        super().__init__()
        self.block = block
        self.norm = nn.LayerNorm(dim)
        self.feature = feature
        self.drop_path = DropPath(rate=drop_path)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        x = self.block.mix(x)
        x = fresh.add(x, self.drop_path(self.feature(self.norm(x))))
        return self.block.feed(x)


def feature_rules(theirs: str, norm: str, ours: str) -> list[tuple[str, str]]:
    """The authors' names and ours of FSLA and its norm within one block."""
    return [
        (norm, f"{ours}.norm"),
        (f"{theirs}.qkv", f"{ours}.feature.qkv"),
        (f"{theirs}.proj", f"{ours}.feature.proj"),
        (f"{theirs}.get_v", f"{ours}.feature.lepe"),
    ]
