"""What differs between tasks: the network around the encoder, targets, loss and score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..data.base import ImageData
from ..data.masks import IGNORED
from ..errors import PolypatchError, suggest
from ..nn import Segmenter
from ..spec import Spec, create
from .augment import Draws, augment, augment_masks, mix, one_hot
from .recipe import Recipe

__all__ = ["TASKS", "Classify", "Segment", "Task", "mean_iou", "task_of"]


@dataclass(frozen=True)
class Classify:
    """One class an image; cross-entropy on soft targets; accuracy."""

    name: str = "classify"
    #: whether all parameters get a gradient in every step
    uses_everything: bool = True

    def create(self, spec: Spec, *, classes: int, resolution: int, seed: int | None) -> nn.Module:
        return create(spec, classes=classes, resolution=resolution, seed=seed)

    def prepare(
        self, images: Tensor, labels: Tensor, draws: Draws, recipe: Recipe, *, classes: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Augmented images and class probabilities."""
        images = augment(images, draws)
        targets = one_hot(labels, classes, recipe.smoothing)
        return mix(images, targets, mixup=recipe.mixup, cutmix=recipe.cutmix, generator=generator)

    def loss(self, logits: Tensor, targets: Tensor, recipe: Recipe) -> Tensor:
        return F.cross_entropy(logits, targets)

    def confusion(
        self, logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]
    ) -> Int64[Tensor, "classes classes"]:
        """Counts of (true, predicted)."""
        return _confusion(labels, logits.argmax(1), logits.shape[1])


@dataclass(frozen=True)
class Segment:
    """One class a pixel; cross-entropy over pixels that count; mean intersection over union."""

    name: str = "segment"
    # An encoder's classification norm and its last blocks may lie behind the last map.
    uses_everything: bool = False

    def create(self, spec: Spec, *, classes: int, resolution: int, seed: int | None) -> nn.Module:
        encoder = create(spec, classes=0, resolution=resolution, seed=seed)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            model = Segmenter(encoder, classes=classes)
            model.head.init_weights()
        return model

    def prepare(
        self, images: Tensor, labels: Tensor, draws: Draws, recipe: Recipe, *, classes: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Images and masks, warped alike.

        Raises:
            PolypatchError: mixing of images, which has no meaning for masks here.
        """
        if recipe.mixup or recipe.cutmix:
            raise PolypatchError("mixup and cutmix are for classification; leave them at 0")
        return augment(images, draws), augment_masks(labels, draws)

    def loss(self, logits: Tensor, targets: Tensor, recipe: Recipe) -> Tensor:
        return F.cross_entropy(
            logits, targets, ignore_index=IGNORED, label_smoothing=recipe.smoothing
        )

    def confusion(
        self,
        logits: Float[Tensor, "batch classes height width"],
        labels: Int64[Tensor, "batch height width"],
    ) -> Int64[Tensor, "classes classes"]:
        """Counts of (true, predicted) over the pixels that count."""
        counts = labels != IGNORED
        return _confusion(labels[counts], logits.argmax(1)[counts], logits.shape[1])


Task = Classify | Segment
TASKS: dict[str, Task] = {"classify": Classify(), "segment": Segment()}


def task_of(name: str) -> Task:
    """
    Raises:
        PolypatchError: no such task.
    """
    if name not in TASKS:
        raise PolypatchError(f"there is no task {name!r}{suggest(name, TASKS, kind='tasks')}")
    return TASKS[name]


def check_task(task: Task, data: ImageData) -> None:
    """
    Raises:
        PolypatchError: data of another task.
    """
    if data.task != task.name:
        raise PolypatchError(f"{data.name} is data to {data.task}, not to {task.name}")


def _confusion(true: Tensor, predicted: Tensor, classes: int) -> Tensor:
    pairs = true.flatten() * classes + predicted.flatten()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def mean_iou(confusion: Float[Tensor, "classes classes"]) -> float:
    """Intersection over union, averaged over the classes that occur, in truth or prediction."""
    both = confusion.diagonal()
    either = confusion.sum(0) + confusion.sum(1) - both
    occurs = either > 0
    return float((both[occurs] / either[occurs]).mean()) if occurs.any() else float("nan")
