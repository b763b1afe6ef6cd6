"""polypatch: adaptive-patch transformers in one tested library.

>>> import polypatch
>>> model = polypatch.create("vit-tiny(patch=8)+dual-patchnorm", classes=10, resolution=64)
>>> tokens = model.forward_features(images)     # Tokens: features with their places
>>> polypatch.papers(room="patching")           # what there is
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .catalogue import papers
from .errors import PolypatchError

if TYPE_CHECKING:
    from .checkpoints import load, recognise
    from .spec import create, plug
    from .tokens import Tokens

__version__ = "0.1.0"

__all__ = ["PolypatchError", "Tokens", "create", "load", "papers", "plug", "recognise"]

# Resolved on first use, so that `import polypatch` (and every command that only looks something
# up) costs neither torch nor a paper's module.
_LAZY = {
    "Tokens": "tokens",
    "create": "spec",
    "load": "checkpoints",
    "plug": "spec",
    "recognise": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'polypatch' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
