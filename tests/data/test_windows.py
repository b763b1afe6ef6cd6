"""Windows of series: in the order of time, scaled by the training part, never of the future."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from polypatch.data.series import Series, load_series
from polypatch.data.windows import filled, split_series
from polypatch.errors import PolypatchError


def counted(steps: int, width: int = 2) -> Series:
    """Series whose values tell their step: step + 1000 × column."""
    values = np.arange(steps)[:, None] + 1000.0 * np.arange(width)
    index = pd.date_range("2024-01-01", periods=steps, freq="h")
    return Series("counted", index, tuple("abcdefgh"[:width]), values)


def unscaled(data, x):
    return x * data.std + data.mean


def test_windows_are_a_look_back_and_what_follows_it():
    data = split_series(counted(100), lookback=10, horizon=3)
    past, future = data.train.read(torch.tensor([0, 5, len(data.train) - 1]))
    assert past.shape == (3, 10, 2)
    assert future.shape == (3, 3, 2)
    steps = unscaled(data, torch.cat([past, future], 1))[..., 0]
    first = torch.tensor([0.0, 5, 70 - 13])
    torch.testing.assert_close(steps, first[:, None] + torch.arange(13.0), atol=1e-4, rtol=1e-5)


def test_parts_follow_each_other_and_look_back_into_the_one_before():
    data = split_series(counted(100), lookback=10, horizon=3)
    ends = {"train": (10, 70), "val": (70, 80), "test": (80, 100)}  # of what is forecast
    for part, (start, stop) in ends.items():
        windows = getattr(data, part)
        _, future = windows.read(torch.arange(len(windows)))
        steps = unscaled(data, future)[..., 0].round()
        assert (steps.min(), steps.max()) == (start, stop - 1)


def test_scaling_is_of_the_training_part_alone():
    series = counted(100)
    series.values[75:] *= 1e6
    data = split_series(series, lookback=10, horizon=3)
    scaler = StandardScaler().fit(series.values[:70])
    np.testing.assert_allclose(data.mean, scaler.mean_, rtol=1e-6)
    np.testing.assert_allclose(data.std, scaler.scale_, rtol=1e-6)


def test_a_constant_series_is_not_divided_by_nothing():
    series = counted(100)
    series.values[:, 1] = 7
    data = split_series(series, lookback=10, horizon=3)
    past, future = data.test.read(torch.arange(len(data.test)))
    assert (past[..., 1] == 0).all()
    assert (future[..., 1] == 0).all()


def test_what_was_filled_in_comes_from_before_and_is_not_scored():
    series = counted(100)
    series.values[[0, 1, 50, 51, 52], 0] = np.nan
    values, notes = filled(series)
    np.testing.assert_array_equal(values[[0, 1, 50, 51, 52], 0], [2, 2, 49, 49, 49])
    assert "5 missing values" in notes[0]
    data = split_series(series, lookback=10, horizon=3)
    past, future = data.train.read(torch.tensor([38]))  # forecasts steps 48, 49, 50
    assert past.isfinite().all()
    assert future[0, :, 0].isnan().tolist() == [False, False, True]
    assert future[0, :, 1].isfinite().all()


def test_a_look_back_that_ends_in_a_gap_says_nothing_of_its_future():
    seen, other = counted(100), counted(100)
    for series in (seen, other):
        series.values[50:55] = np.nan
    other.values[55:70] = other.values[55:70][::-1]  # the same mean and deviation
    data = [split_series(series, lookback=10, horizon=3) for series in (seen, other)]
    a, b = (d.train.read(torch.tensor([45]))[0] for d in data)
    assert torch.equal(a, b)


@pytest.mark.parametrize("horizon", [96, 192, 336, 720])
def test_the_papers_protocol_on_ett(shared, horizon):
    series = load_series(str(shared / "data" / "ett" / "ETTh1.csv"))
    data = split_series(series, lookback=336, horizon=horizon, protocol="ett-hour")
    # 8,640, 2,880 and 2,880 steps
    assert len(data.train) == 8640 - 336 - horizon + 1
    assert len(data.val) == len(data.test) == 2880 - horizon + 1
    assert data.season == 24


@pytest.mark.parametrize(
    ("steps", "words", "said"),
    [
        (100, dict(lookback=80, horizon=3), "70 for training, where .* need 83"),
        (100, dict(lookback=10, horizon=15), "10 for validation, where .* need 15"),
        (100, dict(lookback=0, horizon=3), "at least 1 step"),
        (100, dict(lookback=10, horizon=3, protocol="ett-hours"), "did you mean ett-hour"),
        (100, dict(lookback=10, horizon=3, protocol="ett-hour"), "has 100 steps; .* needs 14400"),
    ],
)
def test_series_too_short_and_wrong_words_are_refused(steps, words, said):
    with pytest.raises(PolypatchError, match=said):
        split_series(counted(steps), **words)


def test_windows_past_the_last_are_an_index_error():
    data = split_series(counted(100), lookback=10, horizon=3)
    with pytest.raises(IndexError, match="numbered 0 to"):
        data.test.read(torch.tensor([len(data.test)]))
    with pytest.raises(IndexError):
        data.test.read(torch.tensor([-1]))
