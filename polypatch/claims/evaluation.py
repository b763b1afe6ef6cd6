"""What several claims measure alike: test batches, accuracy on them, and cells of their tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..data import ImageData
from ..nn import normalise
from ..report.statistics import interval
from ..training.runs import Run

__all__ = ["accuracy", "arm", "batches", "differences", "geometric_mean", "spread"]

# Batches differ in size, so that axis has no name.
Batch = tuple[Float[Tensor, "_ 3 height width"], Int64[Tensor, " _"]]


def batches(data: ImageData, *, size: int = 256, device: torch.device | str = "cpu") -> list[Batch]:
    """The test split, normalised."""
    return list(_read(data, size, device))


def _read(data: ImageData, size: int, device: torch.device | str) -> Iterator[Batch]:
    for start in range(0, len(data.test), size):
        chosen = torch.arange(start, min(start + size, len(data.test)))
        images, labels = data.test.read(chosen)
        yield normalise(images, data.mean, data.std).to(device), labels.to(device)


@torch.no_grad()
def accuracy(model: nn.Module, test: Sequence[Batch]) -> float:
    """Top-1 accuracy in per cent, in the mode that the model is in."""
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test)
    return 100 * right / sum(len(labels) for _, labels in test)


def differences(first: Sequence[float], second: Sequence[float]) -> tuple[float, ...]:
    """Seed by seed, the first minus the second."""
    return tuple(a - b for a, b in zip(first, second, strict=True))


def geometric_mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).log().mean().exp())


def spread(values: Sequence[float], unit: str = "", *, digits: int = 1) -> str:
    """Mean and half of the 95 % interval for a table: ``63.2 ± 1.1 %``."""
    found = interval(values)
    return f"{found.mean:.{digits}f} ± {found.half:.{digits}f}{unit}"


def arm(runs: Sequence[Run]) -> dict[str, str]:
    """Columns that every trained arm has: tokens (where it has some), parameters, accuracy."""
    results = [run.result or {} for run in runs]
    counted = [float(r["tokens"]) for r in results if r["tokens"] is not None]
    return {
        "tokens": f"{sum(counted) / len(counted):.3g}" if counted else "–",
        "parameters": f"{results[0]['parameters']:,}",
        "accuracy": spread([100 * float(result["accuracy"]) for result in results], " %"),
    }
