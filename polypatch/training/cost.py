"""What a model costs: counted operations, measured latency and memory.

Operations are counted, not estimated: every matrix product, convolution and attention of one real
forward pass, at 2 operations for a multiplication with an addition. Latency is the median of
several passes in inference mode.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Cost", "count_flops", "latency", "measure", "peak_memory"]


@dataclass(frozen=True)
class Cost:
    """Of a forward pass.

    ``gflops``: per image, counted. ``latency_1``, ``latency_32``: milliseconds for a batch of 1
    and of 32. ``memory_mb``: peak of what a forward pass of 32 images allocates beyond the weights,
    in MiB. ``parameters``: all of them.
    """

    gflops: float
    latency_1: float
    latency_32: float
    memory_mb: float
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    *,
    seconds: float = 0.5,
) -> Cost:
    """Measure a model on real images (adaptive tokenizers cost what their input makes them cost).

    Args:
        images: normalised, on the model's device; operations are averaged over the first 32.
        seconds: how long to time each batch size.
    """
    images = images[:32]
    training = model.training
    model.eval()
    try:
        return Cost(
            gflops=count_flops(model, images) / len(images) / 1e9,
            latency_1=_latency_of_singles(model, images, seconds=seconds),
            latency_32=1e3 * latency(lambda: model(images), seconds=seconds),
            memory_mb=peak_memory(lambda: model(images), device=images.device) / 2**20,
            parameters=sum(p.numel() for p in model.parameters()),
        )
    finally:
        model.train(training)


@torch.no_grad()
def count_flops(model: nn.Module, x: Float[Tensor, "batch *rest"]) -> int:
    """Operations of one forward pass of a whole batch, of a network or of a layer."""
    # The counter knows fused attention only on some backends; the plain one is two products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def latency(
    function: Callable[[], Any], *, seconds: float = 0.5, least: int = 5, warmup: int = 2
) -> float:
    """Median seconds of a call in inference mode."""
    with torch.inference_mode():
        for _ in range(warmup):
            function()
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < least or time.perf_counter() - began < seconds:
            _synchronise()
            start = time.perf_counter()
            function()
            _synchronise()
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _latency_of_singles(model: nn.Module, images: Tensor, *, seconds: float) -> float:
    """Median milliseconds of batch 1, going round the images."""
    state = {"next": 0}

    def one() -> None:
        index = state["next"] % len(images)
        state["next"] += 1
        model(images[index : index + 1])

    return 1e3 * latency(one, seconds=seconds)


def peak_memory(function: Callable[[], Any], *, device: torch.device | str = "cpu") -> int:
    """Most bytes that a call in inference mode has allocated at one time, beyond what was there.

    On a GPU from the allocator's own statistics; on a CPU from the profiler's record of every
    allocation and release (the process' resident size hardly says anything about one call).
    """
    device = torch.device(device)
    with torch.inference_mode():
        function()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            function()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        # Kineto writes a line to the terminal at each start and stop unless told not to.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            function()
    results = record.profiler.kineto_results  # type: ignore[union-attr]
    changes = [
        (event.start_ns(), event.nbytes())  # type: ignore[attr-defined]
        for event in results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    ]
    level = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        level += change
        peak = max(peak, level)
    return peak


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
