"""What a run is trained with: every number of the recipe in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from torch import nn

from ..errors import PolypatchError, suggest

__all__ = ["Recipe", "learning_rate", "parameter_groups"]


@dataclass(frozen=True)
class Recipe:
    """AdamW on soft targets.

    Attributes:
        batch: global batch size, all processes and accumulated parts together.
        lr: peak learning rate; cosine to ``final_lr`` after a linear warm-up.
        warmup: fraction of all steps.
        weight_decay: on matrices only, see :func:`parameter_groups`.
        clip: largest gradient norm; 0: no clipping.
        smoothing: label smoothing.
        mixup, cutmix: Beta parameters, 0 for off; with both on, each step draws one of them.
        augment: ``none``, ``light`` (flips and shifts) or ``rand`` (RandAugment-like).
        ema: decay of an exponential moving average of the weights, which is then what is
            evaluated and kept; 0: off.
        precision: ``float32``, ``bf16`` or ``fp16`` (the last on accelerators only).
        accumulate: parts into which a batch is cut to save memory; the result is the same (of
            forecasts where no value is missing: a part's loss is the mean over what it has).
        loss: of forecasts: ``mse``, ``mae`` or ``huber``; other tasks have their own.
        patience: of forecasts: epochs without a better validation score after which training ends;
            0: never. The weights of the best epoch are kept in any case.
    """

    batch: int = 64
    lr: float = 1e-3
    final_lr: float = 1e-5
    warmup: float = 0.1
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: str = "light"
    ema: float = 0.0
    precision: str = "float32"
    accumulate: int = 1
    loss: str = "mse"
    patience: int = 0

    def __post_init__(self) -> None:
        def check(ok: bool, sentence: str) -> None:
            if not ok:
                raise PolypatchError(sentence)

        check(self.batch >= 1, f"a batch has at least 1 sample, got batch={self.batch}")
        check(0 < self.lr < math.inf, f"the learning rate must be positive, got lr={self.lr}")
        for name in ("final_lr", "weight_decay", "clip", "mixup", "cutmix"):
            value = getattr(self, name)
            check(0 <= value < math.inf, f"{name} is 0 or positive, got {name}={value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            check(0 <= value < 1, f"{name} lies in [0, 1), got {name}={value}")
        check(0 <= self.warmup < 1, f"warmup is a fraction of all steps, got {self.warmup}")
        check(0 <= self.smoothing < 1, f"smoothing lies in [0, 1), got {self.smoothing}")
        check(0 <= self.ema < 1, f"an EMA decay lies in [0, 1), got ema={self.ema}")
        check(self.patience >= 0, f"patience is 0 or more epochs, got patience={self.patience}")
        check(
            1 <= self.accumulate <= self.batch,
            f"a batch of {self.batch} can't be accumulated in {self.accumulate} parts",
        )
        for name, known in (
            ("augment", ("none", "light", "rand")),
            ("precision", ("float32", "bf16", "fp16")),
            ("loss", ("mse", "mae", "huber")),
        ):
            value = getattr(self, name)
            check(value in known, f"there is no {name}={value!r}{suggest(value, known)}")

    @classmethod
    def known(cls) -> list[str]:
        return [f.name for f in fields(cls)]


def learning_rate(recipe: Recipe, step: int, total: int) -> float:
    """The rate of step 0 … total-1: linear warm-up, then half a cosine."""
    warm = max(1, round(recipe.warmup * total))
    if step < warm:
        return recipe.lr * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    return recipe.final_lr + (recipe.lr - recipe.final_lr) * (1 + math.cos(math.pi * done)) / 2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: decayed matrices, and everything that weight decay
    leaves alone (a model's ``no_decay()``, else all vectors and scalars)."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if callable(getattr(model, "no_decay", None)):
        spared = set(model.no_decay())  # type: ignore[operator]
    else:
        spared = {n for n, p in named.items() if p.ndim <= 1}
    return [
        {"params": [p for n, p in named.items() if n not in spared], "weight_decay": weight_decay},
        {"params": [p for n, p in named.items() if n in spared], "weight_decay": 0.0},
    ]
