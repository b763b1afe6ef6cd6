from __future__ import annotations

import pytest
import torch
from torch import nn

from polypatch.spec import create
from polypatch.training.cost import count_flops, measure, peak_memory


def test_operations_are_the_formulas():
    """12 L (D² multiplications for projections and MLP per token + attention) + stem + head."""
    model = create("vit-nano(patch=4)", classes=10).eval()
    tokens, dim, depth = 65, 64, 4
    block = tokens * (4 * dim**2 + 2 * dim * 256) + 2 * tokens**2 * dim
    expected = 2 * (depth * block + 64 * 48 * dim + dim * 10)
    assert count_flops(model, torch.randn(1, 3, 32, 32)) == expected
    assert count_flops(model, torch.randn(3, 3, 32, 32)) == 3 * expected


def test_vit_tiny_at_224_is_the_published_1_3_gmacs():
    model = create("vit-tiny", classes=1000).eval()
    assert count_flops(model, torch.randn(1, 3, 224, 224)) / 2e9 == pytest.approx(1.25, abs=0.01)


def test_peak_memory_counts_what_lives_together():
    x = torch.randn(1000, 1000)
    assert peak_memory(lambda: (x + 1).sum()) == pytest.approx(4e6, rel=0.05)
    assert peak_memory(lambda: ((x + 1).mul(2)).sum()) == pytest.approx(8e6, rel=0.05)
    assert peak_memory(lambda: [(x + 1).sum() for _ in range(4)]) == pytest.approx(4e6, rel=0.05)


def test_measuring_leaves_the_mode():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).train()
    cost = measure(model, torch.randn(4, 3, 2, 2), seconds=0.01)
    assert model.training
    assert cost.gflops == pytest.approx(2 * 60 / 1e9)
    assert cost.parameters == 65
    assert cost.latency_1 > 0
