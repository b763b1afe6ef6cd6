"""``"vit-tiny(patch=8)+dart(tokens=49)"`` → a model: the words for hosts, techniques and options.

A spec is ``host[+technique]...``, each with options in parentheses: Python literals, or bare words
for strings. The host is ``vit-<size>`` or a complete network of the catalogue by the name of its
variant (``spformer-tiny``). A technique is a paper whose module has ``plug(host, *, ...)``; its
keyword arguments are the options. Nothing is registered: names resolve through the catalogue.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import catalogue
from .errors import PolypatchError, suggest
from .hosts.vit import SIZES, ViT, build_vit

__all__ = [
    "Part",
    "Spec",
    "create",
    "host_names",
    "options_of",
    "parse",
    "plug",
    "split_list",
    "technique_names",
]


@dataclass(frozen=True)
class Part:
    """A name with its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.options:
            return self.name
        inner = ",".join(f"{key}={_written(self.options[key])}" for key in sorted(self.options))
        return f"{self.name}({inner})"


@dataclass(frozen=True)
class Spec:
    """A host and the techniques on it. ``str(spec)`` is its canonical form: options sorted."""

    host: Part
    techniques: tuple[Part, ...] = ()

    def __str__(self) -> str:
        return "+".join(str(part) for part in (self.host, *self.techniques))


def parse(text: str) -> Spec:
    """Read a spec. Only the grammar is checked; names and options are by :func:`create`.

    >>> str(parse("vit-nano( position=rope, patch=8 ) + dart"))
    'vit-nano(patch=8,position=rope)+dart'
    """
    parts = [_parse_part(piece, text) for piece in _split(text, "+")]
    return Spec(parts[0], tuple(parts[1:]))


def create(
    spec: str | Spec,
    *,
    classes: int = 1000,
    resolution: int | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Build a model from a spec, with fresh weights.

    Args:
        classes: number of classes; 0 for the pooled features.
        resolution: input side in pixels, where the spec doesn't say; default: the size's own.
        seed: initialise from this seed, without touching torch's global generator.

    Raises:
        PolypatchError: unknown names or options, and parts that don't fit each other; the sentence
            names the nearest right answer.
    """
    parsed = parse(spec) if isinstance(spec, str) else spec
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = _build_host(parsed.host, classes=classes, resolution=resolution)
        for part in parsed.techniques:
            model = plug(model, part.name, **part.options)
    return model


def plug(model: nn.Module, technique: str, **options: Any) -> nn.Module:
    """Plug a technique into a host that exists already; changes the host and returns it.

    Raises:
        PolypatchError: an unknown technique or option, or a host that lacks what it needs.
    """
    module = _technique(technique)
    known = options_of(technique)
    for word in options:
        if word not in known:
            raise PolypatchError(
                f"{technique} has no option {word!r}{suggest(word, known, kind='options')}"
            )
    if not isinstance(model, ViT):
        raise PolypatchError(
            f"{technique} needs a host with sockets such as vit-tiny; "
            f"{type(model).__name__} is a complete network and has none"
        )
    return module.plug(model, **options)


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """The options of a host or technique, by name."""
    if name.startswith("vit-"):
        builder: Any = build_vit
    else:
        builder = getattr(_module_of(name), "plug", None) or _module_of(name).build
    parameters = inspect.signature(builder).parameters.values()
    hidden = {"host", "size", "variant", "classes"}
    return {p.name: p for p in parameters if p.name not in hidden}


def technique_names() -> list[str]:
    """Slugs of all papers that plug into a host and work today."""
    return [p.slug for p in catalogue.papers(peers=True) if p.works and _has(p, "def plug(")]


def host_names() -> list[str]:
    """Names that a spec may begin with: ViT sizes and the variants of complete networks."""
    names = [f"vit-{size}" for size in SIZES]
    for entry in catalogue.papers(peers=True):
        if entry.room != "forecasting" and entry.works and _has(entry, "def build("):
            names += list(importlib.import_module(entry.module).VARIANTS)
    return names


def split_list(text: str) -> list[str]:
    """The items of a comma-separated list; commas inside of brackets don't separate.

    >>> split_list("grid, dart(tokens=49, version=v1)")
    ['grid', 'dart(tokens=49, version=v1)']
    """
    return [item.strip() for item in _split(text, ",") if item.strip()]


# ---- resolving names ---------------------------------------------------------------------------


def _has(entry: catalogue.Paper, text: str) -> bool:
    """Whether the paper's file defines something, without importing it."""
    path = catalogue.__file__.rsplit("catalogue.py", 1)[0]
    file = path + "/".join(entry.module.split(".")[1:]) + ".py"
    with open(file, encoding="utf-8") as handle:
        return f"\n{text}" in handle.read()


def _module_of(name: str) -> ModuleType:
    return importlib.import_module(catalogue.paper(name).module)


def _technique(name: str) -> ModuleType:
    names = technique_names()
    if name in names:
        return _module_of(name)
    slugs = {p.slug: p for p in catalogue.papers(peers=True)}
    if name in slugs and slugs[name].works:
        raise PolypatchError(f"{name} is a complete network, not a technique; it can be a host")
    if name in slugs:
        raise PolypatchError(
            f"{name} ({slugs[name].title}) is in the catalogue but does not work yet; "
            "`polypatch papers` shows what does"
        )
    hosts = host_names()
    if name in hosts:
        raise PolypatchError(f"{name} is a host and must stand first in a spec")
    raise PolypatchError(f"there is no technique {name!r}{suggest(name, names, kind='techniques')}")


def _build_host(part: Part, *, classes: int, resolution: int | None) -> nn.Module:
    options = dict(part.options)
    if resolution is not None:
        options.setdefault("resolution", resolution)
    if part.name.startswith("vit-") and part.name[4:] in SIZES:
        _check_options(part, options_of(part.name))
        return build_vit(part.name[4:], classes=classes, **options)
    for entry in catalogue.papers(peers=True):
        if entry.room == "forecasting":
            continue  # of series: forecasters.py
        if part.name.startswith(entry.slug) and entry.works and _has(entry, "def build("):
            module = importlib.import_module(entry.module)
            if part.name in module.VARIANTS:
                parameters = inspect.signature(module.build).parameters
                _check_options(part, parameters)
                return module.build(part.name, classes=classes, **options)
    names = host_names()
    if part.name in technique_names():
        raise PolypatchError(f"{part.name} is a technique: write it behind a host, vit-tiny+{part}")
    raise PolypatchError(
        f"there is no model {part.name!r}{suggest(part.name, names, kind='hosts')}"
    )


def _check_options(part: Part, known: Mapping[str, Any]) -> None:
    known = {name: value for name, value in known.items() if name not in ("variant", "classes")}
    for word in part.options:
        if word not in known:
            raise PolypatchError(
                f"{part.name} has no option {word!r}{suggest(word, known, kind='options')}"
            )


# ---- grammar -----------------------------------------------------------------------------------


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside of brackets and quotes."""
    pieces, depth, quote, start = [], 0, "", 0
    for index, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "([":
            depth += 1
        elif sign in ")]":
            depth -= 1
            if depth < 0:
                raise PolypatchError(f"a bracket closes too often in {text!r}")
        elif sign == separator and depth == 0:
            pieces.append(text[start:index])
            start = index + 1
    if depth or quote:
        raise PolypatchError(f"a {'quote' if quote else 'bracket'} is not closed in {text!r}")
    return [*pieces, text[start:]]


def _parse_part(piece: str, text: str) -> Part:
    piece = piece.strip()
    name, bracket, inner = piece.partition("(")
    name = name.strip()
    if not name or not all(sign.isalnum() or sign in "-_." for sign in name):
        raise PolypatchError(
            f"{piece!r} in {text!r} is no name with options; "
            "write host+technique(option=value), such as vit-tiny(patch=8)+dart(tokens=49)"
        )
    if not bracket:
        return Part(name)
    if not inner.endswith(")"):
        raise PolypatchError(f"the options of {name} must end the part in {text!r}")
    options: dict[str, Any] = {}
    for item in _split(inner[:-1], ","):
        if not item.strip():
            continue
        key, sign, value = item.partition("=")
        key = key.strip()
        if not sign or not key.isidentifier():
            raise PolypatchError(f"{item.strip()!r} in {piece!r} is no option=value")
        if key in options:
            raise PolypatchError(f"the option {key} stands twice in {piece!r}")
        options[key] = _value(value.strip())
    return Part(name, options)


def _value(text: str) -> Any:
    # None is Python's; the bare word none stays a word (position=none).
    named = {"true": True, "false": False}
    if text in named:
        return named[text]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _written(value: Any) -> str:
    if isinstance(value, str):
        plain = bool(value) and all(sign.isalnum() or sign in "-_.+/" for sign in value)
        return value if plain and _value(value) == value else repr(value)
    return repr(value).replace(" ", "")
