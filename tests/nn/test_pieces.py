"""Batches in groups of samples."""

from __future__ import annotations

import pytest
import torch

from polypatch.nn import in_pieces, pieces


@pytest.mark.parametrize(
    ("samples", "widest", "groups"),
    [
        (5, 6, [2, 2, 1]),
        (5, 12, [1] * 5),
        (5, 100, [1] * 5),
        (5, 2, [5]),
        (1, 100, [1]),
        (0, 4, [0]),
    ],
)
def test_groups(monkeypatch, samples: int, widest: int, groups: list[int]) -> None:
    monkeypatch.setattr(pieces, "PIECE", 12)
    x = torch.randn(samples, 3)
    seen = []

    def double(part: torch.Tensor) -> torch.Tensor:
        seen.append(len(part))
        return 2 * part

    with torch.no_grad():
        assert torch.equal(in_pieces(double, x, widest=widest), 2 * x)
    assert seen == groups


def test_nothing_is_cut_with_gradients(monkeypatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 1)
    seen = []
    in_pieces(lambda x: seen.append(len(x)) or x, torch.randn(5, 3), widest=3)
    assert seen == [5]
