"""What differs between tasks: the network, a step's batch, the loss, what is kept of the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..data.base import ImageData
from ..data.masks import IGNORED
from ..data.windows import ForecastData
from ..errors import PolypatchError, suggest
from ..forecasters import create_forecaster
from ..nn import Segmenter, normalise
from ..spec import Spec, create
from .augment import Draws, augment, augment_masks, draw, mix, one_hot
from .recipe import Recipe
from .runs import RunConfig
from .sampling import generator_of, shard

__all__ = [
    "TASKS",
    "Classify",
    "Data",
    "Forecast",
    "Place",
    "Segment",
    "Task",
    "check_task",
    "mean_iou",
    "task_of",
]


Data = ImageData | ForecastData


@dataclass(frozen=True)
class Place:
    """Where a batch is made: which step, and which part of it by which process."""

    step: int
    rank: int
    world: int
    device: torch.device


class _OnImages(ABC):
    """What tasks on images share: how a batch is made, and what is said of the data."""

    @abstractmethod
    def prepare(
        self, images: Tensor, labels: Tensor, draws: Draws, recipe: Recipe, *, classes: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Augmented images and their targets."""

    def batch(
        self, data: ImageData, chosen: Int64[Tensor, " batch"], config: RunConfig, place: Place
    ) -> tuple[Tensor, Tensor]:
        """Augmented, normalised images and targets of this process. Everything random is drawn for
        the global batch, of which each process takes its part."""
        recipe = config.recipe
        images, labels = data.train.read(shard(chosen, place.rank, place.world))
        images, labels = images.to(place.device), labels.to(place.device)
        generator = generator_of(config.seed, "augment", place.step)
        draws = draw(recipe.augment, recipe.batch, flip=data.flippable, generator=generator)
        images, targets = self.prepare(
            images,
            labels,
            {name: shard(value, place.rank, place.world) for name, value in draws.items()},
            recipe,
            classes=config.classes,
            generator=generator,
        )
        return normalise(images, data.mean, data.std), targets

    def about(self, data: ImageData) -> dict[str, Any]:
        """What a trained network's file says of its data."""
        return {"classes": data.classes, "mean": data.mean, "std": data.std}


@dataclass(frozen=True)
class Classify(_OnImages):
    """One class an image; cross-entropy on soft targets; accuracy."""

    name: str = "classify"
    #: what a sample is
    unit: str = "images"
    #: whether all parameters get a gradient in every step
    uses_everything: bool = True

    def create(self, spec: Spec, config: RunConfig) -> nn.Module:
        return create(spec, classes=config.classes, resolution=config.resolution, seed=config.seed)

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
class Segment(_OnImages):
    """One class a pixel; cross-entropy over pixels that count; mean intersection over union."""

    name: str = "segment"
    unit: str = "images"
    # An encoder's classification norm and its last blocks may lie behind the last map.
    uses_everything: bool = False

    def create(self, spec: Spec, config: RunConfig) -> nn.Module:
        encoder = create(spec, classes=0, resolution=config.resolution, seed=config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = Segmenter(encoder, classes=config.classes)
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


@dataclass(frozen=True)
class Forecast:
    """The steps behind a look-back, of all series; a loss on standardised values that were
    observed; mean squared and mean absolute error."""

    name: str = "forecast"
    uses_everything: bool = True
    unit: str = "windows"

    def create(self, spec: Spec, config: RunConfig) -> nn.Module:
        return create_forecaster(
            spec,
            lookback=config.lookback,
            horizon=config.horizon,
            series=config.series,
            season=config.season,
            seed=config.seed,
        )

    def batch(
        self, data: ForecastData, chosen: Int64[Tensor, " batch"], config: RunConfig, place: Place
    ) -> tuple[Tensor, Tensor]:
        """Look-backs and what follows them, of this process."""
        past, future = data.train.read(shard(chosen, place.rank, place.world))
        return past.to(place.device), future.to(place.device)

    def loss(self, forecast: Tensor, truth: Tensor, recipe: Recipe) -> Tensor:
        """Mean over what was observed; 0, with a gradient of 0, where nothing was."""
        observed = truth.isfinite()
        error = torch.where(observed, forecast - truth, 0.0)
        match recipe.loss:
            case "mae":
                each = error.abs()
            case "huber":
                each = F.huber_loss(error, torch.zeros_like(error), reduction="none")
            case _:
                each = error.square()
        return each.sum() / observed.sum().clamp_min(1)

    def about(self, data: ForecastData) -> dict[str, Any]:
        return {
            "columns": data.columns,
            "mean": data.mean.tolist(),
            "std": data.std.tolist(),
            "frequency": getattr(data.index, "freqstr", None),
        }


Task = Classify | Segment | Forecast
TASKS: dict[str, Task] = {"classify": Classify(), "segment": Segment(), "forecast": Forecast()}


def task_of(name: str) -> Task:
    """
    Raises:
        PolypatchError: no such task.
    """
    if name not in TASKS:
        raise PolypatchError(f"there is no task {name!r}{suggest(name, TASKS, kind='tasks')}")
    return TASKS[name]


def check_task(task: Task, data: Data) -> None:
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
