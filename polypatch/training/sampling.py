"""Which samples and which random numbers a step gets: functions of seed and step alone.

Nothing here has a state, so a resumed run and each process of a distributed one know what any step
draws without having made the steps before it.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from jaxtyping import Int64
from torch import Tensor

__all__ = ["generator_of", "indices_of", "seed_of", "shard"]


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from numbers and words, the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator_of(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`seed_of`."""
    return torch.Generator().manual_seed(seed_of(*parts))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, samples: int) -> Tensor:
    return torch.randperm(samples, generator=generator_of(seed, "order", epoch))


def indices_of(
    step: int, *, batch: int, samples: int, seed: int, endless: bool
) -> Int64[Tensor, " batch"]:
    """Samples of a step's global batch. Epochs are shuffled anew and follow each other without a
    gap; an endless source just counts on and never repeats itself."""
    position = torch.arange(step * batch, (step + 1) * batch)
    if endless:
        return position
    epochs, places = position // samples, position % samples
    chosen = torch.empty_like(position)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        chosen[here] = _permutation(seed, epoch, samples)[places[here]]
    return chosen


def shard(values: Tensor, process: int, processes: int) -> Tensor:
    """The part of a global batch that one process works on: equal, contiguous parts."""
    if len(values) % processes:
        raise ValueError(f"a batch of {len(values)} can't be shared by {processes} processes")
    return values.chunk(processes)[process]
