"""Accuracy of a model on the test split, and how many tokens it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data.base import ImageData
from ..data.masks import IGNORED
from ..nn import normalise
from .tasks import Forecast, mean_iou, task_of

__all__ = ["Outcome", "evaluate"]


@dataclass(frozen=True)
class Outcome:
    """Results on a test split.

    ``accuracy`` is over images, for segmentation over pixels, of which there is ``mean_iou`` then.
    ``tokens`` is the mean number of placed tokens that enter the first block, over samples;
    ``tokens_spread`` its standard deviation (adaptive tokenizers vary). Both are None for networks
    without tokens.
    """

    accuracy: float
    loss: float
    samples: int
    tokens: float | None
    tokens_spread: float | None
    mean_iou: float | None = None

    def scores(self) -> dict[str, float]:
        """For the log."""
        scores = {"accuracy": self.accuracy, "test_loss": self.loss}
        return scores if self.mean_iou is None else {**scores, "mean_iou": self.mean_iou}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: nn.Module, data: ImageData, *, batch: int = 256, accelerator: Any = None
) -> Outcome:
    """Evaluate in eval mode; the mode is restored. With ``accelerator``, processes share the work
    and all get the result."""
    device = next(model.parameters()).device
    samples = len(data.test)
    task = task_of(data.task)
    assert not isinstance(task, Forecast)  # of ImageData
    rank = accelerator.process_index if accelerator else 0
    world = accelerator.num_processes if accelerator else 1
    batch = batch if task.name == "classify" else max(1, batch // 8)
    # loss, what it was averaged over, images, tokens, tokens²
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    classes = len(data.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.float64, device=device)
    counter = _TokenCounter(model)
    training = model.training
    model.eval()
    try:
        for start in range(rank * batch, samples, world * batch):
            images, labels = data.test.read(torch.arange(start, min(start + batch, samples)))
            images, labels = images.to(device), labels.to(device)
            counter.counts = None
            logits = model(normalise(images, data.mean, data.std)).float()
            confusion += task.confusion(logits, labels)
            sums[0] += F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
            sums[1] += (labels != IGNORED).sum()
            sums[2] += len(labels)
            if counter.counts is not None:
                counts = counter.counts.double()
                sums[3] += counts.sum()
                sums[4] += counts.square().sum()
    finally:
        counter.close()
        model.train(training)
    if accelerator is not None:
        sums = accelerator.reduce(sums, reduction="sum")
        confusion = accelerator.reduce(confusion, reduction="sum")
    loss, counted, seen, tokens, squares = sums.tolist()
    spread = max(0.0, squares / seen - (tokens / seen) ** 2) ** 0.5
    return Outcome(
        accuracy=float(confusion.diagonal().sum()) / counted,
        loss=loss / counted,
        samples=int(seen),
        tokens=tokens / seen if tokens else None,
        tokens_spread=spread if tokens else None,
        mean_iou=mean_iou(confusion) if task.name == "segment" else None,
    )


class _TokenCounter:
    """Listens to what a model's ``patching`` gives."""

    def __init__(self, model: nn.Module) -> None:
        self.counts: torch.Tensor | None = None
        patching = getattr(getattr(model, "backbone", model), "patching", None)
        self._handle = None
        if isinstance(patching, nn.Module):
            self._handle = patching.register_forward_hook(self._listen)

    def _listen(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if hasattr(output, "counts"):
            self.counts = output.counts - output.prefix

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()
