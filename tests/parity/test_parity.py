"""Every golden case through the library: what the authors' code computed, ours computes.

``pytest tests/parity --goldens DIR`` runs any other folder of the same form.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from polypatch.catalogue import paper
from polypatch.nn import Backbone

from .goldens import Case

# Relative to the largest value of the output: 1e-4 is what another order of float32 sums may cost.
TOLERANCE = 1e-4


def module_of(slug: str) -> Any:
    entry = paper(slug)
    if not entry.works:
        pytest.skip(f"{slug} is in the catalogue but not implemented yet")
    return importlib.import_module(entry.module)


def adapter_of(slug: str) -> Any | None:
    name = f"{__package__}.adapters.{slug.replace('-', '_')}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def plain_run(module: Any, case: Case) -> dict[str, Tensor]:
    model = module.from_official(case.config, case.state)
    inputs = list(case.inputs.values())
    if isinstance(model, Backbone):
        return backbone_run(model, inputs[0], set(case.outputs))
    result = model(*inputs)
    return result if isinstance(result, dict) else {"": result}


def backbone_run(model: Backbone, image: Tensor, wanted: set[str]) -> dict[str, Tensor]:
    """A complete encoder's outputs: ``logits`` (or the lone output), ``features`` (what the head
    reads), ``features.0``, … (the maps)."""
    outputs: dict[str, Tensor] = {}
    if wanted & {"", "logits"}:
        outputs[""] = outputs["logits"] = model(image)
    if "features" in wanted:
        outputs["features"] = model.pooled(image)
    if any(name.startswith("features.") for name in wanted):
        maps = model.features(image)
        outputs |= {f"features.{number}": value.map for number, value in enumerate(maps)}
    return outputs


def plain_count(module: Any, config: dict[str, Any]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in module.network(config).parameters())


def assert_close(name: str, ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape, f"{name}: shape {tuple(ours.shape)}, {tuple(theirs.shape)}"
    if not theirs.is_floating_point():
        differing = (ours != theirs).float().mean().item() if theirs.numel() else 0.0
        assert differing == 0, f"{name}: {differing:.2%} of the whole numbers differ"
        return
    ours, theirs = ours.double(), theirs.double()
    assert torch.equal(ours.isnan(), theirs.isnan()), f"{name}: NaNs in other places"
    ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
    finite = theirs.isfinite()
    assert torch.equal(ours[~finite], theirs[~finite]), f"{name}: infinities in other places"
    if not finite.any():
        return
    worst = (ours - theirs)[finite].abs().max().item()
    scale = theirs[finite].abs().max().item()
    assert worst <= TOLERANCE * max(scale, 1e-6), f"{name}: off by {worst:.2e} of {scale:.2e}"


def test_outputs_agree(case: Case) -> None:
    module = module_of(case.slug)
    adapter = adapter_of(case.slug)
    run: Callable[[Case], dict[str, Tensor]] = (
        adapter.run if adapter else lambda c: plain_run(module, c)
    )
    with torch.no_grad():
        ours = run(case)
    missing = sorted(set(case.outputs) - set(ours))
    assert not missing, f"the adapter gives no {', '.join(missing)}"
    for name, theirs in case.outputs.items():
        assert_close(name or "output", torch.as_tensor(ours[name]), theirs)


def test_parameter_counts(variant: tuple[Case, str, dict[str, Any]]) -> None:
    case, name, entry = variant
    if entry["params"] is None:
        pytest.skip(f"the authors' code can't build it: {entry.get('runs', 'no count')}")
    module = module_of(case.slug)
    adapter = adapter_of(case.slug)
    counter = getattr(adapter, "count", lambda name, config: plain_count(module, config))
    assert counter(name, entry["config"]) == entry["params"]
