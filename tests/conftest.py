from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# With POLYPATCH_CHECK_SHAPES=1 (as `make test` has it) the shapes in signatures are checked while
# the tests run. Off for the slow ones: torch.compile can't see through the checks.
if os.environ.get("POLYPATCH_CHECK_SHAPES"):
    install_import_hook("polypatch", "tests.check")

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        default=None,
        help="folder of golden cases to run tests/parity on (default: tests/goldens)",
    )


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Extra data that is not part of the project: $POLYPATCH_SHARED, default ../shared."""
    folder = Path(os.environ.get("POLYPATCH_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"extra data: no folder {folder} (set POLYPATCH_SHARED)")
    return folder
