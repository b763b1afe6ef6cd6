"""Authors' names of tensors ↔ ours, as data that reads both ways and fails on what it can't name.

A rule pairs two names of modules or tensors; ``{i}``, ``{j}``, … stand for numbers, and one last
word (``.weight``, ``.running_mean``) is carried over. The first rule that fits a name counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PolypatchError
from .weights import load_exactly

__all__ = ["KeyMap", "Rule", "pointwise"]


@dataclass(frozen=True)
class Rule:
    """One or several of their tensors for one of ours.

    Attributes:
        theirs: their name, or several, whose tensors are stacked along the first axis.
        ours: our name.
        parts: sizes of the stacked tensors, relative to each other.
        to_ours, to_theirs: reshape a single tensor; must undo each other.
    """

    theirs: tuple[str, ...]
    ours: str
    parts: tuple[int, ...] = (1,)
    to_ours: Callable[[Tensor], Tensor] | None = None
    to_theirs: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if len(self.parts) != len(self.theirs):
            raise ValueError(f"{self.ours}: {len(self.theirs)} names, {len(self.parts)} parts")


def pointwise(theirs: str, ours: str) -> Rule:
    """Their 1×1 convolution is our linear layer. Biases pass as they are."""
    return Rule(
        (theirs,),
        ours,
        to_ours=lambda w: w.flatten(1) if w.ndim == 4 else w,
        to_theirs=lambda w: w[:, :, None, None] if w.ndim == 2 else w,
    )


class KeyMap:
    """Rules in order, and patterns of their keys that carry nothing (buffers that we compute).

    Args:
        rules: a :class:`Rule`, or a pair (theirs, ours) for plain renaming.
        unused: their names, in the same notation, that are dropped.
    """

    def __init__(
        self, rules: Sequence[Rule | tuple[str, str]], *, unused: Sequence[str] = ()
    ) -> None:
        self.rules = tuple(
            rule if isinstance(rule, Rule) else Rule((rule[0],), rule[1]) for rule in rules
        )
        self.unused = tuple(unused)

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], Rule, int]]:
        return [
            (_pattern(name), rule, part)
            for rule in self.rules
            for part, name in enumerate(rule.theirs)
        ]

    @cached_property
    def _dropped(self) -> list[re.Pattern[str]]:
        return [_pattern(name) for name in self.unused]

    def find(self, name: str) -> tuple[Rule, int, str] | None:
        """Rule, part of it, and our name for one of theirs; None if no rule fits."""
        for pattern, rule, part in self._patterns:
            match = pattern.match(name)
            if match is not None:
                return rule, part, _filled(rule.ours, match)
        return None

    def unknown(self, names: Mapping[str, Any]) -> list[str]:
        """Those of their names that neither a rule nor ``unused`` covers."""
        return [
            name
            for name in names
            if self.find(name) is None and not any(p.match(name) for p in self._dropped)
        ]

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Their state dict under our names; and by our names what they called them."""
        pieces: dict[str, dict[int, Tensor]] = {}
        rules: dict[str, Rule] = {}
        names: dict[str, str] = {}
        for name, value in state.items():
            found = self.find(name)
            if found is None:
                continue
            rule, part, ours = found
            if part in pieces.get(ours, {}):
                raise PolypatchError(f"two keys for one weight: {names[ours]} and {name}")
            pieces.setdefault(ours, {})[part] = value
            rules[ours], names[ours] = rule, name
        renamed: dict[str, Tensor] = {}
        for ours, parts in pieces.items():
            rule = rules[ours]
            if len(parts) < len(rule.theirs):
                lacking = [t for k, t in enumerate(rule.theirs) if k not in parts]
                raise PolypatchError(
                    f"the file has {names[ours]} but lacks its companions {', '.join(lacking)}"
                )
            value = parts[0]
            if len(parts) > 1:
                tails = {tuple(parts[k].shape[1:]) for k in parts}
                if len(tails) > 1:
                    raise PolypatchError(f"{names[ours]} and its companions differ in shape")
                value = torch.cat([parts[k] for k in range(len(parts))])
            renamed[ours] = rule.to_ours(value) if rule.to_ours else value
        return renamed, names

    def to_theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict under their names; without ``unused``.

        Raises:
            PolypatchError: a name of ours that no rule covers.
        """
        patterns = [(_pattern(rule.ours), rule) for rule in self.rules]
        theirs: dict[str, Tensor] = {}
        for name, value in state.items():
            for pattern, rule in patterns:
                match = pattern.match(name)
                if match is None:
                    continue
                value = rule.to_theirs(value) if rule.to_theirs else value
                if len(rule.theirs) == 1:
                    theirs[_filled(rule.theirs[0], match)] = value
                else:
                    unit = len(value) // sum(rule.parts)
                    split = value.split([unit * part for part in rule.parts])
                    for their, piece in zip(rule.theirs, split):
                        theirs[_filled(their, match)] = piece.clone()
                break
            else:
                raise PolypatchError(f"no name in the authors' layout for {name}")
        return theirs

    def load(self, model: nn.Module, state: Mapping[str, Tensor], *, what: str) -> None:
        """Load their state dict into our model: all of it, nothing else, every shape as it is.

        Raises:
            PolypatchError: unknown, missing or misfitting keys, each named as the file names it.
        """
        renamed, names = self.to_ours(state)
        load_exactly(model, renamed, what=what, names=names, unknown=self.unknown(state))


_WORD = re.compile(r"\\\{(\w+)\\\}")


def _pattern(name: str) -> re.Pattern[str]:
    """``a.{i}.b`` → a pattern; a number that stands twice must be the same both times."""
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
        word = match.group(1)
        if word in seen:
            return f"(?P={word})"
        seen.add(word)
        return rf"(?P<{word}>\d+)"

    return re.compile("^" + _WORD.sub(group, re.escape(name)) + r"(?P<tail_>\.\w+)?$")


def _filled(name: str, match: re.Match[str]) -> str:
    words = match.groupdict()
    tail = words.pop("tail_") or ""
    return name.format(**words) + tail
