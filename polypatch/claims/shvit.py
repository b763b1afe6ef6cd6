"""SHViT: one head over a part of the channels is less to fetch and faster than many heads over all
(Yun and Ro, CVPR 2024, arXiv 2401.16456).

**The claim**, in the abstract: attention heads of the later stages are redundant to compute;
attention with a single head over a part of the channels does without that redundancy, and is part
of what makes the network fast on GPUs, CPUs and phones.

**Why it can be tested here.** Nothing has to be trained to time a network. SHViT-S1 runs at the
paper's 224 pixels as it is, and with every attention exchanged for the usual one: all channels
normed, as many heads of 32 channels as there are, the same normed convolutions around, one fused
kernel in both. What differs is the paper's proposal and nothing else; the two are timed in turn.
The margin is set before looking: a tenth of the whole network's time, below which nobody would
notice. Counted operations, bytes that operations read and write (views are free), and peak memory
are shown beside it.

**What can't be tested**: that accuracy does not suffer, or gains, which takes ImageNet; throughput
on the paper's GPU and phone.
"""

from __future__ import annotations

from statistics import median

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..backbones.shvit import Block, Conv, SHViT, build
from ..nn import fresh
from ..training.cost import count_flops, latency, peak_memory
from .base import Claim, Evidence, Lab
from .evaluation import spread

VARIANT = "shvit-s1"
RESOLUTION = 224
HEAD = 32
BATCH = 16
ROUNDS = 15


class MultiHead(nn.Module):
    """What a transformer has where SHViT has :class:`polypatch.backbones.shvit.SingleHead`."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, dim)
        self.qkv = Conv(dim, 3 * dim)
        self.proj = Conv(dim, dim, gain=0.0)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        flat = x.flatten(1)
        normed = F.layer_norm(flat, flat.shape[1:], eps=self.norm.eps).view(x.shape)
        qkv = self.qkv(fresh.affine(normed, self.norm.weight, self.norm.bias)).flatten(1, 2)
        q, k, v = qkv.unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.proj(fresh.relu(mixed))


class Traffic(TorchDispatchMode):
    """Adds up the bytes of every tensor that an operation reads or writes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(
                value.numel() * value.element_size()
                for value in tree_leaves((args, kwargs, result))
                if isinstance(value, Tensor)
            )
        return result


def with_many_heads(model: SHViT) -> SHViT:
    """Every attention exchanged; changes the model and returns it."""
    for block in model.modules():
        if isinstance(block, Block) and block.mixing is not None:
            dim = block.mixing.proj.conv.in_channels
            block.mixing = MultiHead(dim=dim)  # type: ignore[assignment]
    return model.channels_last()


def traffic(model: SHViT, images: Tensor) -> int:
    with torch.no_grad(), Traffic() as counted:
        model(images)
    return counted.bytes


def once(model: SHViT, images: Tensor) -> float:
    return latency(lambda: model(images), seconds=0, least=1, warmup=0)


def experiment(lab: Lab) -> Evidence:
    images = torch.randn(BATCH, 3, RESOLUTION, RESOLUTION)
    arms = {
        "one head, a part of the channels": build(VARIANT).eval(),
        f"heads of {HEAD}, all channels": with_many_heads(build(VARIANT)).eval(),
    }
    single, many = arms.values()
    for model in arms.values():
        latency(lambda model=model: model(images), seconds=0, least=3)
    times: list[list[tuple[float, float]]] = [
        [(once(single, images), once(many, images)) for _ in range(ROUNDS)]
        for _ in range(lab.seeds)
    ]
    medians = [[1e3 * median(side) for side in zip(*turns, strict=True)] for turns in times]
    return Evidence(
        values=tuple(median([b / a for a, b in turns]) for turns in times),
        table={
            name: {
                "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
                "operations": f"{count_flops(model, images) / BATCH / 1e6:.0f} M",
                "read and written": f"{traffic(model, images[:1]) / 2**20:.0f} MiB",
                "peak memory": f"{peak_memory(lambda model=model: model(images)) / 2**20:.0f} MiB",
                "time": spread([found[k] for found in medians], " ms"),
            }
            for k, (name, model) in enumerate(arms.items())
        },
        remark=f"SHViT-S1, images of {RESOLUTION} pixels, {BATCH} at a time for time and peak "
        "memory; operations are for one image, bytes for a pass with a single image, weights "
        f"included. Each repeat passes {ROUNDS} times through both in turn and takes the median "
        "of the pairs' ratios.",
    )


CLAIM = Claim(
    slug="shvit",
    says="Attention with a single head over a part of the channels removes redundant computation "
    "and memory access of multi-head attention, which makes the network faster (abstract).",
    metric="time of SHViT-S1 with multi-head attention over all channels, relative to its own",
    margin=1.1,
    experiment=experiment,
    seeds=5,
)
