"""Baselines by their definitions; on ETT beside the published figures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polypatch.data.series import load_series
from polypatch.data.windows import split_series
from polypatch.errors import PolypatchError
from polypatch.forecasting.baselines import DLinear, Drift, NLinear, SeasonalNaive, moving_average
from polypatch.training.forecasts import score


def test_seasonal_naive_repeats_the_last_season():
    x = torch.arange(24.0).view(1, 12, 2)
    y = SeasonalNaive(lookback=12, horizon=7, season=3)(x)
    assert y.shape == (1, 7, 2)
    for step in range(7):
        assert torch.equal(y[:, step], x[:, 9 + step % 3])


def test_a_season_of_one_repeats_the_last_value():
    x = torch.randn(2, 5, 3)
    y = SeasonalNaive(lookback=5, horizon=4)(x)
    assert torch.equal(y, x[:, -1:].expand(-1, 4, -1))


def test_drift_goes_on_along_a_line():
    line = 2.0 + 0.5 * torch.arange(20.0).view(1, 20, 1)
    y = Drift(lookback=12, horizon=8)(line[:, :12])
    torch.testing.assert_close(y, line[:, 12:])


def test_moving_average_against_its_definition():
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    padded = torch.cat([x[:, :1].expand(-1, 2, -1), x, x[:, -1:].expand(-1, 2, -1)], 1)
    expected = torch.stack([padded[:, t : t + 5].mean(1) for t in range(9)], 1)
    torch.testing.assert_close(moving_average(x, 5), expected)


@pytest.mark.parametrize("kind", [NLinear, DLinear])
@pytest.mark.parametrize("individual", [False, True])
@pytest.mark.parametrize("series", [1, 3, 321])
def test_linear_maps_have_gradients_everywhere(kind, individual, series):
    model = kind(lookback=16, horizon=5, series=series, individual=individual)
    y = model(torch.randn(2, 16, series))
    assert y.shape == (2, 5, series)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert y.isfinite().all()


def test_individual_maps_are_one_linear_layer_a_series():
    model = NLinear(lookback=6, horizon=4, series=3, individual=True)
    x = torch.randn(2, 6, 3)
    y = model(x)
    for number in range(3):
        one = x[:, :, number]
        expected = nn.functional.linear(
            one - one[:, -1:], model.map.weight[number], model.map.bias[number]
        )
        torch.testing.assert_close(y[:, :, number], expected + one[:, -1:])


def test_nlinear_moves_with_the_level_and_dlinear_of_equal_maps_is_one():
    x = torch.randn(2, 16, 3)
    model = NLinear(lookback=16, horizon=5)
    torch.testing.assert_close(model(x + 7), model(x) + 7, atol=1e-5, rtol=1e-5)
    both = DLinear(lookback=16, horizon=5, width=3)
    with torch.no_grad():
        both.rest.weight.copy_(both.trend.weight)
    once = nn.functional.linear(x.transpose(1, 2), both.trend.weight).transpose(1, 2)
    bias = (both.trend.bias + both.rest.bias)[:, None]
    torch.testing.assert_close(both(x), once + bias, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SeasonalNaive(lookback=5, horizon=2, season=6), "a season of 6 steps"),
        (lambda: Drift(lookback=1, horizon=2), "look-back of 2"),
        (lambda: moving_average(torch.zeros(1, 5, 1), 4), "odd number of steps, not 4"),
    ],
)
def test_bad_sizes_are_refused(make, said):
    with pytest.raises(PolypatchError, match=said):
        make()


@pytest.mark.parametrize(("name", "mse", "mae"), [("ETTh1", 1.295, 0.713), ("ETTh2", 0.432, 0.422)])
def test_the_last_value_repeated_scores_as_published(shared, name, mse, mae):
    """Zeng et al. 2023, table 2, "Repeat", horizon 96: the same windows, scaling and scores."""
    series = load_series(str(shared / "data" / "ett" / f"{name}.csv"))
    data = split_series(series, lookback=336, horizon=96, protocol="ett-hour")
    found = score(SeasonalNaive(lookback=336, horizon=96), data.test)
    assert found.mse == pytest.approx(mse, rel=0.01)
    assert found.mae == pytest.approx(mae, rel=0.01)
    assert found.windows == 2785
