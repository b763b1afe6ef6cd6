"""RevIN by its definition; there and back."""

from __future__ import annotations

import pytest
import torch

from polypatch.nn.reversible import ReversibleNorm


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("subtract_last", [False, True])
def test_there_and_back(affine, subtract_last):
    norm = ReversibleNorm(series=3, affine=affine, subtract_last=subtract_last)
    if affine:
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
        torch.nn.init.normal_(norm.bias)
    x = 5 + 3 * torch.randn(4, 20, 3)
    y, moments = norm(x)
    torch.testing.assert_close(norm.inverse(y, moments), x)


def test_each_window_and_series_has_mean_0_and_deviation_1():
    x = torch.randn(4, 50, 3) * torch.tensor([1.0, 10, 100]) + 7
    y, moments = ReversibleNorm(series=3)(x)
    torch.testing.assert_close(y.mean(1), torch.zeros(4, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(4, 3), atol=1e-4, rtol=0)
    assert moments.centre.shape == moments.scale.shape == (4, 1, 3)


def test_the_last_value_becomes_0():
    x = torch.randn(4, 50, 3)
    y, _ = ReversibleNorm(series=3, subtract_last=True)(x)
    assert (y[:, -1] == 0).all()


def test_constant_windows_stay_finite_and_come_back():
    x = torch.full((1, 10, 2), 4.0)
    norm = ReversibleNorm(series=2)
    y, moments = norm(x)
    assert (y == 0).all()
    assert torch.equal(norm.inverse(y, moments), x)


def test_no_gradient_passes_through_the_moments():
    x = torch.randn(1, 10, 1, requires_grad=True)
    y, _ = ReversibleNorm(series=1)(x)
    y.sum().backward()
    scale = (x.detach().var(1, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(x.grad, (1 / scale).expand_as(x))
