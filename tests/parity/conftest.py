from __future__ import annotations

from pathlib import Path

import pytest

from .goldens import find_cases

HERE = Path(__file__).resolve().parent
DEFAULT = HERE.parent / "goldens"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames and "variant" not in metafunc.fixturenames:
        return
    folder = Path(metafunc.config.getoption("--goldens") or DEFAULT)
    cases = find_cases(folder)
    if not cases:
        raise pytest.UsageError(f"there are no goldens (<slug>/<case>.json) in {folder}")
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases, ids=str)
    else:
        named = {
            (case.slug, name): (case, name, variant)
            for case in cases
            for name, variant in case.variants.items()
            if "params" in variant
        }
        metafunc.parametrize("variant", named.values(), ids=[f"{s}/{n}" for s, n in named])
