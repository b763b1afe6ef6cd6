"""Attention between channels: the cost of a token does not depend on how many there are (El-Nouby
et al., *XCiT*, NeurIPS 2021, arXiv 2106.09681).

**The claim**, in the abstract and figure 2: cross-covariance attention is linear in the number of
tokens, in time and in memory, where attention between tokens is quadratic.

**Why it can be tested here.** Complexity shows in one block, without training. A block of XCiT-T12
(192 channels, 4 heads; XCA, LPI and MLP) is measured on maps of 784, 3 136 and 12 544 tokens, which
are images of 448 to 1 792 pixels at patches of 16, beside a plain transformer block of the same
width. Were cost linear, a second and a MiB would serve as many tokens on the largest map as on the
smallest; the metric is the ratio of the two, of time or memory, whichever is less. The margin
leaves a fifth to what doesn't belong to the block: caches that larger maps don't fit into. Seeds
draw weights and maps.

**What can't be tested**: that accuracy is kept, for which the paper trains on ImageNet. The plain
block stands in the table, not judged. Its time is quadratic as the paper has it; its memory isn't,
since today's fused attention never writes its map down, which was not so when the paper compared.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..backbones.xcit_blocks import Block
from ..nn import Attention, Mlp
from ..training.cost import latency, peak_memory
from .base import Claim, Evidence, Lab
from .evaluation import spread

DIM, HEADS = 192, 4
SIDES = (28, 56, 112)


class PlainBlock(nn.Module):
    """Attention between tokens and an MLP, each normed and added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = Attention(dim=DIM, heads=HEADS)
        self.mlp = Mlp(dim=DIM, hidden=4 * DIM)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Tensor:
        tokens = x.flatten(1, 2)
        tokens = tokens + self.attention(self.norm1(tokens)).x
        return (tokens + self.mlp(self.norm2(tokens))).view_as(x)


def blocks() -> dict[str, nn.Module]:
    xcit = Block(
        dim=DIM,
        heads=HEADS,
        hidden=4 * DIM,
        qkv_bias=True,
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=0.0,
    )
    xcit.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return {"attention between tokens": PlainBlock().eval(), "XCiT": xcit.eval()}


def experiment(lab: Lab) -> Evidence:
    microseconds: dict[str, dict[int, list[float]]] = {}
    kibibytes: dict[str, dict[int, list[float]]] = {}
    for seed in range(lab.seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            named = blocks()
            maps = {side: torch.randn(1, side, side, DIM) for side in SIDES}
        for name, block in named.items():
            for side, x in maps.items():
                call = partial(block, x)
                for found, value in (
                    (microseconds, 1e6 * latency(call, seconds=0.5)),
                    (kibibytes, peak_memory(call) / 1024),
                ):
                    found.setdefault(name, {}).setdefault(side, []).append(value / side**2)

    def kept(found: dict[str, dict[int, list[float]]]) -> list[float]:
        """Cost of a token on the smallest map over that on the largest, of each seed."""
        times = found["XCiT"]
        return [a / b for a, b in zip(times[SIDES[0]], times[SIDES[-1]], strict=True)]

    def row(name: str) -> dict[str, str]:
        return {
            f"{side**2} tokens": f"{spread(microseconds[name][side], ' µs')}, "
            f"{spread(kibibytes[name][side], ' KiB')}"
            for side in SIDES
        }

    return Evidence(
        values=tuple(min(both) for both in zip(kept(microseconds), kept(kibibytes), strict=True)),
        table={name: row(name) for name in microseconds},
        remark=f"Time and peak memory per token, of one block of {DIM} channels and {HEADS} heads.",
    )


CLAIM = Claim(
    slug="xcit",
    says="Attention between channels is linear in the number of tokens, in time and memory "
    "(abstract, figure 2).",
    metric="tokens per second and tokens per MiB of an XCiT block, 12 544 tokens over 784 tokens, "
    "the lesser of the two ratios",
    margin=0.8,
    experiment=experiment,
    seeds=5,
)
