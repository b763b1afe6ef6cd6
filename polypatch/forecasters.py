"""``"dlinear(width=25)"`` → a forecaster: words for models of series, as in ``spec.py`` for images.

A name is a baseline's or a variant of a paper in the room ``forecasting``, whose module has
``VARIANTS`` and ``build(variant, *, lookback, horizon, series, season, ...)``; what else ``build``
takes are the options.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from . import catalogue
from .errors import PolypatchError, suggest
from .forecasting.baselines import DLinear, Drift, NLinear, SeasonalNaive
from .spec import Spec, parse

__all__ = ["create_forecaster", "forecaster_names"]

_BASELINES: Mapping[str, Callable[..., nn.Module]] = {
    "seasonal-naive": SeasonalNaive,
    "drift": Drift,
    "nlinear": NLinear,
    "dlinear": DLinear,
}
#: what the data says, not the user
_SIZES = ("variant", "lookback", "horizon", "series", "season")


def create_forecaster(
    spec: str | Spec,
    *,
    lookback: int,
    horizon: int,
    series: int,
    season: int = 1,
    seed: int | None = None,
) -> nn.Module:
    """Build a forecaster, (batch, look-back, series) → (batch, horizon, series), of fresh weights.

    Args:
        lookback, horizon: steps that it sees and that it forecasts.
        series: how many.
        season: steps of the season, for those that repeat it.
        seed: initialise from this seed, without touching torch's global generator.

    Raises:
        PolypatchError: unknown names or options, and sizes that don't fit.
    """
    parsed = parse(spec) if isinstance(spec, str) else spec
    if parsed.techniques:
        raise PolypatchError(
            f"{parsed.host.name} is a forecaster, onto which nothing plugs; leave "
            f"+{parsed.techniques[0].name} out"
        )
    part = parsed.host
    build = _builders().get(part.name)
    if build is None:
        hint = suggest(part.name, forecaster_names(), kind="forecasters")
        raise PolypatchError(f"there is no forecaster {part.name!r}{hint}")
    known = inspect.signature(build).parameters
    options = [word for word in known if word not in _SIZES]
    for word in part.options:
        if word not in options:
            hint = suggest(word, options, kind="options") if options else ""
            raise PolypatchError(f"{part.name} has no option {word!r}{hint}")
    sizes = dict(lookback=lookback, horizon=horizon, series=series, season=season)
    wanted = {word: value for word, value in sizes.items() if word in known}
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return build(**wanted, **part.options)


def forecaster_names() -> list[str]:
    """Baselines, and the variants of the papers that work today."""
    return list(_builders())


def _builders() -> dict[str, Callable[..., nn.Module]]:
    found = dict(_BASELINES)
    for entry in catalogue.papers(room="forecasting"):
        if entry.works:
            module: Any = importlib.import_module(entry.module)
            found |= {name: partial(module.build, name) for name in module.VARIANTS}
    return found
