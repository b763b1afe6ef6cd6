"""The best weights of a training by a score on validation windows, and when to give up."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..data.windows import Windows
from .forecasts import score

__all__ = ["Best"]


class Best:
    """Keeps a copy of the weights with the lowest mean squared error; part of a checkpoint.

    Args:
        windows: to score on.
        patience: looks without a better score after which :attr:`exhausted` is true; 0: never.
    """

    def __init__(self, windows: Windows, *, patience: int = 0) -> None:
        self.windows, self.patience = windows, patience
        self.error: float | None = None
        self.weights: dict[str, Tensor] = {}
        self.waited = 0

    def look(self, model: nn.Module, *, accelerator: Any = None) -> float:
        """Score the model as it stands; keep its weights if they are the best so far."""
        error = score(model, self.windows, accelerator=accelerator).mse
        if self.error is None or error < self.error:
            self.error, self.waited = error, 0
            self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        else:
            self.waited += 1
        return error

    @property
    def exhausted(self) -> bool:
        return bool(self.patience) and self.waited >= self.patience

    def restore(self, model: nn.Module) -> None:
        """Give the model its best weights back."""
        if self.error is not None:
            model.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"error": self.error, "weights": self.weights, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.error, self.weights, self.waited = state["error"], state["weights"], state["waited"]
