from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from PIL import Image
from skimage import data as samples

from polypatch.cli import main


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def polypatch(monkeypatch, capsys, tmp_path) -> Callable[..., Outcome]:
    """The command line, in a folder of its own: polypatch("papers", "dart")."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["polypatch", *words])
        code = 0
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "astronaut.png"
    Image.fromarray(samples.astronaut()[:256, :384]).save(path)
    return path
