"""The rules of the house: imports run one way, nothing heavy is loaded before it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from polypatch.catalogue import ROOMS

PACKAGE = Path(__file__).resolve().parent.parent / "polypatch"

#: who may import whom: a part may import itself, parts below it, and nothing above
LAYERS = [
    {"errors"},
    {"tokens"},
    {"nn"},
    {"hosts"},
    set(ROOMS) - {"hosts", "catalogue"},
    {"catalogue"},
    {"spec", "checkpoints", "forecasters"},
    {"data"},
    {"training"},
    {"report", "compare", "forecast", "inference"},
    {"claims"},
    {"cli", "__main__"},
]
#: everybody may look something up in the catalogue; it imports errors only
FREE = {"errors", "catalogue", ""}


def part_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE).parts
    return inside[0].removesuffix(".py") if inside[0] != "__init__.py" else ""


def imports(path: Path) -> set[str]:
    """Parts of polypatch that a file imports when it is imported itself; lazy ones don't count."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    inner = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if node in typing_only or node in inner:
            continue
        if isinstance(node, ast.ImportFrom):
            if node.level:
                up = depth - node.level
                base = path.relative_to(PACKAGE).parts[:up]
                full = [*base, *(node.module or "").split(".")]
            elif (node.module or "").startswith("polypatch"):
                full = (node.module or "").split(".")[1:]
            else:
                continue
            full = [p for p in full if p]
            found |= {full[0]} if full else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                ([*alias.name.split("."), ""])[1]
                for alias in node.names
                if alias.name.startswith("polypatch")
            }
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    part = part_of(path)
    if part == "":
        return
    level = next((i for i, layer in enumerate(LAYERS) if part in layer), None)
    assert level is not None, f"{part} stands in no layer; put it into LAYERS"
    allowed = set().union(*LAYERS[: level + 1]) | FREE
    assert imports(path) <= allowed, f"{path.name} reaches up to {imports(path) - allowed}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_device_literals_and_no_swallowed_arguments(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert node.attr != "cuda" or not isinstance(getattr(node, "ctx", None), ast.Store)
        if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "forward"):
            assert node.args.kwarg is None, f"{node.name} in line {node.lineno} swallows arguments"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "cuda", f".cuda() in line {node.lineno}"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_importing_the_package_loads_neither_torch_nor_papers():
    loaded = run(
        "import sys, polypatch; polypatch.papers();"
        "print([m for m in sys.modules if m in ('torch', 'numpy', 'datasets', 'matplotlib')"
        " or m.startswith('polypatch.patching')])"
    )
    assert loaded == "[]"


def test_creating_a_plain_model_imports_no_paper():
    loaded = run(
        "import sys, polypatch; polypatch.create('vit-nano', classes=2);"
        "print([m for m in sys.modules if m.startswith(('polypatch.patching.', "
        "'polypatch.reducing.')) or m in ('datasets', 'accelerate', 'matplotlib', 'skimage')])"
    )
    assert loaded == "[]"
