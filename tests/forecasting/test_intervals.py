"""Conformal quantiles: their guarantee, their ranks, and what is too little to tell."""

from __future__ import annotations

import pytest
import torch

from polypatch.data.windows import Windows
from polypatch.errors import PolypatchError
from polypatch.forecasting.baselines import SeasonalNaive
from polypatch.forecasting.intervals import LEVELS, conformal_offsets, coverage
from polypatch.training.forecasts import calibrate


@pytest.mark.parametrize("windows", [19, 20, 57, 200])
def test_exchangeable_errors_are_covered_as_promised(windows):
    """The expected share below the k-th of n errors is k / (n + 1), for any distribution."""
    trials = 4000
    errors = torch.randn(windows, 1, trials).exp()  # far from symmetric
    fresh = torch.randn(1, 1, trials).exp()
    offsets = conformal_offsets(errors, (0.05, 0.5, 0.95))
    below = [(fresh[0] <= offset).double().mean().item() for offset in offsets]
    sampling = 4 * (0.05 * 0.95 / trials) ** 0.5
    assert below[2] >= 0.95 - sampling
    assert below[2] <= 0.95 + 1 / (windows + 1) + sampling
    assert below[0] <= 0.05 + sampling
    assert below[1] == pytest.approx(0.5, abs=0.5 / (windows + 1) + 4 * (0.25 / trials) ** 0.5)


def test_ranks_are_exact():
    errors = torch.arange(1.0, 100.0).flip(0).view(99, 1, 1)  # of n = 99 errors, q has rank 100 q
    assert conformal_offsets(errors, LEVELS).flatten().tolist() == [5, 25, 50, 75, 95]


def test_steps_and_series_have_their_own_and_gaps_dont_count():
    errors = torch.arange(1.0, 40.0).view(39, 1, 1).repeat(1, 2, 3)
    errors[..., 1] *= 10
    errors[:20, 1, 2] = torch.nan
    offsets = conformal_offsets(errors, (0.05, 0.95))
    assert offsets.shape == (2, 2, 3)
    assert offsets[:, 0, 0].tolist() == [2, 38]
    assert offsets[:, 0, 1].tolist() == [20, 380]
    assert offsets[:, 1, 2].tolist() == [21, 39]  # 19 errors: the outermost


@pytest.mark.parametrize(
    ("count", "levels", "said"),
    [
        (18, LEVELS, "18 windows can't tell a quantile of 0.05; it takes 19"),
        (50, (0.1, 0.99), "can't tell a quantile of 0.99; it takes 99"),
        (50, (0.9, 0.1), "quantiles rise"),
        (50, (0.0, 0.5), "quantiles rise"),
        (50, (), "quantiles rise"),
    ],
)
def test_too_little_and_wrong_levels_are_refused(count, levels, said):
    with pytest.raises(PolypatchError, match=said):
        conformal_offsets(torch.randn(count, 2, 1), levels)


def test_coverage_counts_what_was_observed():
    truth = torch.tensor([0.0, 1, 2, 3, torch.nan]).view(5, 1, 1)
    assert coverage(truth, torch.ones(5, 1, 1), torch.full((5, 1, 1), 2.0)) == 0.5


def test_a_forecaster_calibrated_on_noise_covers_noise():
    def windows():
        values = torch.randn(2000, 3)
        return Windows(values, torch.ones_like(values, dtype=torch.bool), lookback=4, horizon=2)

    model = SeasonalNaive(lookback=4, horizon=2)
    offsets = calibrate(model, windows(), levels=(0.05, 0.95))
    test = windows()
    past, truth = test.read(torch.arange(len(test)))
    share = coverage(truth, model(past) + offsets[0], model(past) + offsets[1])
    assert share == pytest.approx(0.9, abs=0.02)
