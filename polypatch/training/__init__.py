"""Training, evaluation and measuring: one loop for every model."""

from .budget import Budget
from .recipe import Recipe
from .runs import Run, RunConfig

__all__ = ["Budget", "Recipe", "Run", "RunConfig"]
