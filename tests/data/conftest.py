"""Small image folders and parquet files, drawn for each test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.pictures import picture


@pytest.fixture
def cifar10(shared: Path) -> Path:
    """The folder with CIFAR-10 as two parquet files; tests that need it skip without it."""
    folder = shared / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"extra data: no folder {folder} (set POLYPATCH_SHARED)")
    return folder


@pytest.fixture
def class_folder(tmp_path: Path) -> Callable[..., Path]:
    """``class_folder(cat=5, dog=3)``: a folder with that many PNG files for each class."""

    def make(below: str = "pictures", **counts: int) -> Path:
        root = tmp_path / below
        for c, (name, count) in enumerate(counts.items()):
            (root / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                picture(100 * c + i).save(root / name / f"{i}.png")
        return root

    return make


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``datasets`` writes its copies here, not into the home directory."""
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache
