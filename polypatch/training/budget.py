"""How long to train: ``60s``, ``5min``, ``500steps``, ``3epochs``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import PolypatchError

__all__ = ["Budget"]

_UNITS = {
    "s": ("seconds", 1.0),
    "sec": ("seconds", 1.0),
    "seconds": ("seconds", 1.0),
    "m": ("seconds", 60.0),
    "min": ("seconds", 60.0),
    "minutes": ("seconds", 60.0),
    "h": ("seconds", 3600.0),
    "hours": ("seconds", 3600.0),
    "step": ("steps", 1.0),
    "steps": ("steps", 1.0),
    "epoch": ("epochs", 1.0),
    "epochs": ("epochs", 1.0),
}


@dataclass(frozen=True)
class Budget:
    """An amount of training: ``amount`` of ``kind`` ``"seconds"``, ``"steps"`` or ``"epochs"``."""

    amount: float
    kind: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """
        >>> Budget.parse("10min")
        Budget(amount=600.0, kind='seconds')

        Raises:
            PolypatchError: no such unit, or an amount that is not positive.
        """
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]+)\s*", text.lower())
        if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
            raise PolypatchError(
                f"{text!r} is no budget; write an amount with a unit: 60s, 10min, 500steps, 3epochs"
            )
        kind, factor = _UNITS[match[2]]
        return cls(float(match[1]) * factor, kind)

    def steps(self, *, batch: int, samples: int, step_seconds: float | None = None) -> int:
        """How many optimiser steps that is; a time needs the measured seconds of one step."""
        if self.kind == "steps":
            return max(1, round(self.amount))
        if self.kind == "epochs":
            return max(1, round(self.amount * samples / batch))
        if step_seconds is None:
            raise ValueError("a budget in seconds needs the seconds that one step takes")
        return max(1, int(self.amount / step_seconds))

    @property
    def words(self) -> str:
        """For people: ``200 steps``."""
        return f"{self.amount:g} {self.kind if self.amount != 1 else self.kind[:-1]}"

    def __str__(self) -> str:
        unit = {"seconds": "s", "steps": "steps", "epochs": "epochs"}[self.kind]
        return f"{self.amount:g}{unit}"
