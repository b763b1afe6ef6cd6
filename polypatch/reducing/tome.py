"""Token merging (ToMe): in every block, the most similar tokens are averaged into one.

Bolya, Fu, Dai, Zhang, Feichtenhofer & Hoffman, *Token Merging: Your ViT But Faster*, ICLR 2023,
arXiv 2210.09461; code facebookresearch/ToMe. Works on a trained ViT without training, and in
training as well; there are no parameters.

Between the attention and the feed-forward network of block l (sec. 3, bipartite soft matching):

1. split the tokens alternately into A (even places) and B (odd places);
2. from each token of A draw one edge to the token of B that is most similar, by the cosine of their
   attention keys, averaged over heads (:func:`bipartite_soft_matching`);
3. keep the r edges of highest similarity;
4. merge what they connect: x' = Σ s_i x_i / Σ s_i, s' = Σ s_i, where the size s_i counts the
   patches that a token stands for (:func:`merge_wavg`);
5. the new sequence is: what is left of A, then B.

In the blocks behind, attention counts a key as often as the patches behind it, A = softmax(
q kᵀ / √d + log s) (proportional attention, eq. 1; ``proportional``). r may be constant or follow a
schedule (:func:`parse_r`).

Shapes: a matching maps each of ``tokens`` places to one of ``count`` groups (:class:`Matching`);
all merging, unmerging and source tracking is a function of that map. In a host it goes through
:meth:`Tokens.merge`, so that places, extents, sizes and regions follow the tokens.

As the authors' code does it, and easily got wrong:

* prefix tokens (class, distillation, registers) take no part, neither as source nor as target (the
  authors protect the first two only), and stay in front; r is at most half of the other tokens;
* with a prefix, what is left of A keeps its order; **without one it stands in order of descending
  similarity**, and as A and B alternate by place, that changes what the next block merges;
* the first block's attention is not proportional: nothing has been merged yet;
* keys are those that attention compares, so behind a query-key norm and a rotation where the host
  has them (the authors' code knows neither);
* the authors advise ``proportional=False`` for training and for MAE's models.

Padding of tokenizers with unequal token counts takes no part either; each sample merges as many of
its own tokens as it would alone, and its padding moves behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..errors import PolypatchError, suggest
from ..hosts import Block, Reducer, ViT
from ..nn import Mixed
from ..tokens import Tokens

__all__ = [
    "Matching",
    "TokenMerging",
    "bipartite_soft_matching",
    "kth_bipartite_soft_matching",
    "merge_source",
    "merge_wavg",
    "parse_r",
    "plug",
    "random_bipartite_soft_matching",
]

MODES = ("mean", "sum", "amax", "amin", "prod")


# ---- matching ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matching:
    """Which tokens become one: ``groups[b, i]`` in 0 … count - 1 is the place of token i in the new
    sequence. Where ``groups`` has fewer columns than there are tokens, the last ones are dropped.
    """

    groups: Int64[Tensor, "batch tokens"]
    count: int

    def merge(
        self, x: Float[Tensor, "batch tokens dim"], mode: str = "mean"
    ) -> Float[Tensor, "batch count dim"]:
        """Reduce each group to one token, every member counted alike."""
        if mode not in MODES:
            raise PolypatchError(f"there is no mode={mode!r}{suggest(mode, MODES, kind='modes')}")
        x = x[:, : self.groups.shape[1]]
        index = self.groups[..., None].expand_as(x)
        out = x.new_zeros(x.shape[0], self.count, x.shape[2])
        if mode == "sum":
            return out.scatter_add(1, index, x)
        return out.scatter_reduce(1, index, x, mode, include_self=False)

    def unmerge(self, x: Float[Tensor, "batch count dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Give each old token a copy of the one that it went into."""
        return x.gather(1, self.groups[..., None].expand(-1, -1, x.shape[-1]))


def _everything_stays(batch: int, tokens: int, device: torch.device) -> Matching:
    return Matching(torch.arange(tokens, device=device).expand(batch, -1), tokens)


@torch.no_grad()
def bipartite_soft_matching(
    metric: Float[Tensor, "batch tokens dim"],
    r: int | float,
    *,
    protected: int = 0,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Matching:
    """Bipartite soft matching (sec. 3.2, appendix D): removes ``r`` tokens.

    Args:
        metric: what is compared by its cosine.
        r: tokens to remove, at most half of those that aren't protected; a float is a share of
            them (of each sample's own, where there is a ``mask``).
        protected: leading tokens that are neither merged nor merged into, and stay in front.
        mask: True where a token is real. Padding, which must stand behind, never merges with real
            tokens: it goes to the new sequence's last place, where it must weigh nothing
            (:meth:`Tokens.merge` sees to that).
    """
    batch, tokens, _ = metric.shape
    device = metric.device
    free = max(0, tokens - protected)
    most = min(int(r * free) if isinstance(r, float) else r, free // 2)
    if most <= 0:
        return _everything_stays(batch, tokens, device)
    unit = F.normalize(metric.float(), dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # (batch, A, B)
    kept_prefix = ((protected + 1) // 2, protected // 2)  # protected tokens in A and in B
    scores[:, : kept_prefix[0]] = float("-inf")
    scores[:, :, : kept_prefix[1]] = float("-inf")
    limit = torch.full((1, 1), most, device=device)
    if mask is not None:
        real = mask[:, ::2, None] & mask[:, None, 1::2]
        scores = scores.masked_fill(~real, float("-inf"))
        own = mask.sum(1, keepdim=True) - protected
        # In double precision, as ``most`` is: the same share of the same number for everyone.
        wanted = (own.double() * r).long() if isinstance(r, float) else torch.full_like(own, r)
        limit = torch.minimum(wanted, own // 2).clamp_min(0)
    similarity, partner = scores.max(-1)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(order.shape[1], device=device).expand(batch, -1)
    rank = torch.empty_like(order).scatter(1, order, place)
    merged = rank < limit
    left = ~merged if mask is None else ~merged & mask[:, ::2]
    if protected:
        slot_a = left.cumsum(1) - 1
        slot_a = torch.where(place < kept_prefix[0], 2 * place, slot_a + kept_prefix[1])
    else:
        slot_a = rank - limit
    place_b = torch.arange(tokens // 2, device=device).expand(batch, -1)
    slot_b = torch.where(
        place_b < kept_prefix[1], 2 * place_b + 1, left.sum(1, keepdim=True) + place_b
    )
    slot_a = torch.where(merged, slot_b.gather(1, partner), slot_a)
    # Back to the tokens' own order: A and B take turns; with an odd number, A has one more.
    slot_b = F.pad(slot_b, (0, slot_a.shape[1] - slot_b.shape[1]))
    groups = torch.stack([slot_a, slot_b], dim=2).flatten(1)[:, :tokens]
    count = tokens - most
    if mask is not None:
        # A sample too short to merge anything keeps its order, as it would alone.
        unchanged = torch.arange(tokens, device=device).expand(batch, -1)
        groups = torch.where(limit == 0, unchanged, groups).where(mask, count - 1)
    return Matching(groups, count)


@torch.no_grad()
def kth_bipartite_soft_matching(metric: Float[Tensor, "batch tokens dim"], k: int) -> Matching:
    """Of every ``k`` tokens the first k - 1 are merged into their most similar k-th one of the
    whole sequence; tokens beyond a multiple of ``k`` are dropped. ``tokens // k`` are left."""
    batch, tokens, _ = metric.shape
    if k <= 1:
        return _everything_stays(batch, tokens, metric.device)
    count = tokens // k
    unit = F.normalize(metric.float(), dim=-1)[:, : count * k].unflatten(1, (count, k))
    targets = unit[:, :, -1]
    partner = (unit[:, :, :-1].flatten(1, 2) @ targets.transpose(1, 2)).argmax(-1)
    own = torch.arange(count, device=metric.device).expand(batch, -1)
    groups = torch.cat([partner.unflatten(1, (count, k - 1)), own[..., None]], dim=2)
    return Matching(groups.flatten(1), count)


@torch.no_grad()
def random_bipartite_soft_matching(
    metric: Float[Tensor, "batch tokens dim"],
    r: int,
    *,
    generator: torch.Generator | None = None,
) -> Matching:
    """``r`` tokens drawn at random are merged into the most similar of the others, which keep
    their order (the authors' code leaves them shuffled)."""
    batch, tokens, _ = metric.shape
    if r <= 0:
        return _everything_stays(batch, tokens, metric.device)
    if r >= tokens:
        raise PolypatchError(f"{r} of {tokens} tokens can't be merged into the others")
    drawn = torch.rand(batch, tokens, generator=generator, device=metric.device)
    source = drawn.argsort(1).argsort(1) < r
    unit = F.normalize(metric.float(), dim=-1)
    scores = (unit @ unit.transpose(1, 2)).masked_fill(source[:, None], float("-inf"))
    slot = (~source).cumsum(1) - 1
    groups = torch.where(source, slot.gather(1, scores.argmax(-1)), slot)
    return Matching(groups, tokens - r)


def merge_wavg(
    matching: Matching,
    x: Float[Tensor, "batch tokens dim"],
    size: Float[Tensor, "batch tokens 1"] | None = None,
) -> tuple[Float[Tensor, "batch count dim"], Float[Tensor, "batch count 1"]]:
    """Mean of each group weighted by ``size`` (default: one each), and the groups' sizes."""
    size = torch.ones_like(x[..., :1]) if size is None else size
    total = matching.merge(size, "sum")
    return matching.merge(x * size, "sum") / total, total


def merge_source(
    matching: Matching, source: Float[Tensor, "batch tokens patches"] | None = None
) -> Float[Tensor, "batch count patches"]:
    """Which patches went into which token, as 0 and 1; ``source`` says it of the tokens before
    (default: each is a patch of its own)."""
    if source is None:
        batch, tokens = matching.groups.shape
        source = torch.eye(tokens, device=matching.groups.device).expand(batch, -1, -1)
    return matching.merge(source, "amax")


def parse_r(layers: int, r: int | tuple[int, float] | list[int]) -> list[int]:
    """How many tokens each layer removes.

    Args:
        r: a constant; or (r, inflection), which changes linearly from r (1 - inflection) to
            r (1 + inflection), cut to whole numbers: -1 is the paper's decreasing schedule; or a
            *list* with a number for each layer, filled up with zeros.
    """
    if isinstance(r, list):
        return [*r, *[0] * (layers - len(r))][:layers]
    mean, inflection = r if isinstance(r, tuple) else (r, 0.0)
    first = int(mean * (1.0 - inflection))
    step = (2 * mean - first - first) / max(1, layers - 1)
    return [int(first + step * layer) for layer in range(layers)]


# ---- in a host -----------------------------------------------------------------------------------


class TokenMerging(Reducer):
    """Merges ``r`` tokens (a float: that share of them) behind a block's attention."""

    where = "middle"

    def __init__(self, *, r: int | float) -> None:
        super().__init__()
        self.r = r

    def forward(self, tokens: Tokens, mixed: Mixed) -> Tokens:
        if not self.r:
            return tokens
        if mixed.keys is None:
            raise PolypatchError(
                "tome compares attention keys, and this host's mixing has none to show"
            )
        start = tokens.prefix
        matching = bipartite_soft_matching(
            mixed.keys.mean(1), self.r, protected=start, mask=tokens.mask
        )
        return tokens.merge(matching.groups[:, start:] - start, matching.count - start)

    def extra_repr(self) -> str:
        return f"r={self.r}"


def default_r(tokens: int, depth: int) -> int:
    """The constant r with which ``depth`` blocks halve ``tokens``: 8 for a ViT of 12 blocks at 224
    pixels and patches of 16, as in the paper; at least 1."""
    return max(1, tokens // (2 * depth))


def plug(
    host: ViT,
    *,
    r: int | tuple[int, float] | list[int] | None = None,
    ratio: float | None = None,
    proportional: bool = True,
) -> ViT:
    """Merge tokens in every block of the host.

    Args:
        r: tokens that each block removes: a number, (number, inflection) or a list, see
            :func:`parse_r`. Default: :func:`default_r` of the host's native resolution, so that
            about half of the tokens come out of the last block.
        ratio: in place of ``r``, the share of its tokens that each block removes, at most 0.5; it
            suits inputs of many sizes and tokenizers with unequal counts.
        proportional: count merged tokens as often as the patches behind them in attention.

    Raises:
        PolypatchError: options out of range, or a host whose blocks reduce tokens already.
    """
    taken = [type(b.reducing).__name__ for b in host.blocks if b.reducing is not None]
    if taken:
        raise PolypatchError(f"the host's blocks reduce tokens already ({taken[0]})")
    if r is not None and ratio is not None:
        raise PolypatchError("give tome either r or ratio, not both")
    depth = len(host.blocks)
    if ratio is not None:
        if not 0 <= ratio <= 0.5:
            raise PolypatchError(f"a ratio lies from 0 to 0.5, got ratio={ratio}")
        amounts: list[int] | list[float] = [float(ratio)] * depth
    else:
        if r is None:
            r = default_r((-(-host.resolution // host.patch)) ** 2, depth)
        amounts = parse_r(depth, r)
        if isinstance(r, list) and len(r) > depth:
            raise PolypatchError(f"the host has {depth} blocks, got {len(r)} numbers for r")
        if min(amounts) < 0:
            raise PolypatchError(f"no block can remove a negative number of tokens: {amounts}")
    for block, amount in zip(host.blocks, amounts):
        assert isinstance(block, Block)
        block.reducing = TokenMerging(r=amount) if amount else None
        block.proportional = proportional
    return host.plugged("tome")
