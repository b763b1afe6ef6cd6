"""Which paper's network a set of named shapes is; and if none, which come closest."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from .. import catalogue
from ..errors import PolypatchError

__all__ = ["Recognised", "closest", "recognise", "variant_of", "weights_module"]

Shapes = Mapping[str, tuple[int, ...]]

#: what backbones are called inside of detectors, segmenters and self-supervised trainings
_INSIDE = ("backbone.", "encoder.", "student.backbone.", "teacher.backbone.", "model.backbone.",
           "module.backbone.", "backbone.body.", "trunk.", "visual.")  # fmt: skip


class Recognised(NamedTuple):
    """``prefix``: of the keys that are the network; all others are not part of it."""

    slug: str
    config: dict[str, Any]
    prefix: str = ""


def recognise(shapes: Shapes) -> tuple[str, dict[str, Any]] | None:
    """Which paper's network has tensors of these names and shapes: its slug and configuration by
    the authors' names. The most particular paper wins over the plain ViT that it builds on."""
    for slug, module in _readers():
        config = module.recognise(shapes)
        if config is not None:
            return slug, config
    return None


def recognise_inside(shapes: Shapes) -> Recognised | None:
    """As :func:`recognise`, also where the network is part of a larger one (``backbone.…``)."""
    found = recognise(shapes)
    if found is not None:
        return Recognised(*found)
    for prefix in _INSIDE:
        inner = {n[len(prefix) :]: s for n, s in shapes.items() if n.startswith(prefix)}
        found = recognise(inner) if inner else None
        if found is not None:
            return Recognised(*found, prefix)
    return None


def closest(shapes: Shapes, *, count: int = 3) -> str:
    """A sentence on the papers whose names of tensors resemble these most, and which don't fit.

    Numbers in names don't count; a paper's names are those of its smallest network.
    """
    given = {_kind(name) for name in shapes}
    scores: list[tuple[float, str, list[str]]] = []
    for slug, theirs in _names_of_all():
        shared = given & theirs
        if shared:
            unknown = sorted(given - theirs)
            scores.append((len(shared) / len(given | theirs), slug, unknown))
    scores.sort(key=lambda entry: (-entry[0], entry[1]))
    said = []
    for share, slug, unknown in scores[:count]:
        if share < 0.15:
            break
        misfits = f", which knows no {', '.join(unknown[:3])}" if unknown else ""
        said.append(f"{slug} ({100 * share:.0f} % alike{misfits})")
    return "; closest: " + "; ".join(said) if said else ""


def variant_of(slug: str, config: Mapping[str, Any]) -> str:
    """The authors' name of the network that ``config`` describes; "" if it has none.

    Words that say nothing of the architecture (number of classes, image size) may differ.
    """
    module = weights_module(slug)
    if not hasattr(module, "VARIANTS") or not hasattr(module, "official_config"):
        return ""
    for name in module.VARIANTS:
        with torch.device("meta"):
            theirs = module.official_config(module.build(name))
        same = [word for word in theirs if word in config and word not in _FREE]
        if same and all(_plain(theirs[word]) == _plain(config[word]) for word in same):
            return name
    return ""


#: configuration words that are the user's, not the architecture's
_FREE = frozenset(
    ("num_classes", "n_classes", "classes", "drop_path_rate", "drop_rate", "attn_drop_rate",
     "drop_path", "in_chans", "layout")
)  # fmt: skip


def weights_module(slug: str) -> ModuleType:
    """The module that reads a paper's weights."""
    return importlib.import_module(_module_name(slug))


def _module_name(slug: str) -> str:
    return "polypatch.hosts.layouts" if slug == "vit" else catalogue.paper(slug).module


def _readers() -> Iterator[tuple[str, ModuleType]]:
    """Modules that recognise weights, the plain ViT's last; others aren't imported."""
    for entry in sorted(catalogue.papers(peers=True), key=lambda p: p.slug == "vit"):
        if entry.works and _defines(entry.slug, "recognise"):
            yield entry.slug, weights_module(entry.slug)


def _defines(slug: str, function: str) -> bool:
    parts = _module_name(slug).split(".")[1:]
    file = Path(catalogue.__file__).parent.joinpath(*parts).with_suffix(".py")
    return f"\ndef {function}(" in file.read_text(encoding="utf-8")


def _names_of_all() -> Iterator[tuple[str, set[str]]]:
    """By paper, the kinds of names in the authors' layout of its smallest network."""
    for slug, module in _readers():
        if not hasattr(module, "to_official"):
            continue
        try:
            with torch.device("meta"):
                if slug == "vit":
                    from ..hosts import build_vit

                    model = build_vit("nano")
                else:
                    model = module.build(next(iter(module.VARIANTS)))
                yield slug, {_kind(name) for name in module.to_official(model)}
        except PolypatchError:
            continue


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
