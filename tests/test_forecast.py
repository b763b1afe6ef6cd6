"""From series to forecasts: what is chosen, what is written, what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import polypatch
from polypatch.checkpoints.describing import describe
from polypatch.data.calendar import step_in_words
from polypatch.data.series import Series, load_series
from polypatch.errors import PolypatchError
from polypatch.forecast import forecast, usual_lookback
from polypatch.inference import side_of
from polypatch.report.forecast_page import render_forecast
from polypatch.report.layouts import cutters_of


def months(steps=240, width=2, slope=0.0):
    time = np.arange(steps)[:, None]
    noise = np.random.default_rng(0).normal(size=(steps, width))
    values = 100 + 10 * np.sin(2 * np.pi * time / 12) + noise + slope * time
    index = pd.date_range("2000-01-01", periods=steps, freq="MS")
    return Series("months", index, tuple("ab"[:width]), values)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return forecast(months(), horizon=6, root=tmp_path_factory.mktemp("runs"), device="cpu")


def test_forecasts_follow_the_series_in_its_units(found):
    table = found.table
    assert list(table.columns) == [
        "time",
        "series",
        "forecast",
        "q0.05",
        "q0.25",
        "q0.5",
        "q0.75",
        "q0.95",
    ]
    assert list(table["series"]) == ["a", "b"] * 6
    assert table["time"].iloc[0] == pd.Timestamp("2020-01-01")
    assert table["time"].iloc[-1] == pd.Timestamp("2020-06-01")
    truth = 100 + 10 * np.sin(2 * np.pi * np.arange(240, 246) / 12)
    for _, rows in table.groupby("series"):
        np.testing.assert_allclose(rows["forecast"], truth, atol=3.5)
    quantiles = table[["q0.05", "q0.25", "q0.5", "q0.75", "q0.95"]].to_numpy()
    assert (np.diff(quantiles, axis=1) >= 0).all()


def test_the_lowest_validation_error_makes_the_forecast(found):
    errors = [candidate.val.mse for candidate in found.candidates]
    assert errors == sorted(errors)
    assert {c.spec for c in found.candidates} == {"nlinear", "dlinear", "seasonal-naive", "drift"}
    assert found.sentence.startswith(found.candidates[0].spec)
    assert 0.6 < found.covered <= 1


def test_a_straight_line_is_left_to_the_baseline(tmp_path):
    line = Series("line", pd.RangeIndex(120), ("a",), np.arange(120.0)[:, None])
    made = forecast(line, horizon=4, budget="1steps", root=tmp_path, device="cpu")
    assert made.candidates[0].spec == "drift"
    assert made.sentence.startswith("Nothing beat drift")
    np.testing.assert_allclose(made.table["forecast"], [120, 121, 122, 123], rtol=1e-4)
    assert list(made.table["time"]) == [120, 121, 122, 123]


def test_the_same_call_again_reuses_the_runs(found, tmp_path):
    first = forecast(months(), horizon=6, root=tmp_path, device="cpu")
    times = {run.name: run.stat().st_mtime_ns for run in tmp_path.glob("*/result.json")}
    again = forecast(months(), horizon=6, root=tmp_path, device="cpu")
    assert times == {run.name: run.stat().st_mtime_ns for run in tmp_path.glob("*/result.json")}
    pd.testing.assert_frame_equal(first.table, again.table)
    pd.testing.assert_frame_equal(first.table, found.table)


def test_quantiles_that_cant_be_told_are_left_out_with_a_word(tmp_path):
    made = forecast(months(100), horizon=4, budget="5steps", root=tmp_path, device="cpu")
    assert made.levels == (0.25, 0.5, 0.75)
    assert "7 windows of validation can't tell the quantiles 0.05, 0.95" in made.notes


def test_a_season_that_doesnt_fit_is_said(tmp_path):
    made = forecast(months(), horizon=2, lookback=6, budget="1steps", root=tmp_path, device="cpu")
    assert any("a season of 12 steps doesn't fit a look-back of 6" in note for note in made.notes)


@pytest.mark.parametrize(
    ("steps", "horizon", "season", "lookback"),
    [(10000, 96, 24, 192), (10000, 12, 24, 48), (100, 20, 1, 25), (20, 10, 12, 2)],
)
def test_the_usual_lookback(steps, horizon, season, lookback):
    assert usual_lookback(steps, horizon=horizon, season=season) == lookback


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (dict(horizon=0), "at least 1 step"),
        (dict(horizon=40), "have? .*24 for validation|so 24 for validation"),
        (dict(horizon=4, models=["nliner"]), "did you mean nlinear"),
        (dict(horizon=4, levels=(0.5, 0.5)), "quantiles rise"),
        (dict(horizon=4, levels=(0.0, 0.5)), "quantiles rise"),
        (dict(horizon=4, budget="9"), "is no budget"),
        (dict(horizon=4, lookback=1000), "for training"),
    ],
)
def test_what_cant_be_is_refused_before_training(tmp_path, words, said):
    with pytest.raises(PolypatchError, match=said):
        forecast(months(), root=tmp_path, device="cpu", **words)
    assert not list(tmp_path.iterdir())


def test_the_page_shows_all_of_it(found):
    page = render_forecast(found, command="polypatch forecast x.csv --horizon 6")
    assert page.count("<svg") == 2
    assert "240 steps of 1 month" in page
    for candidate in found.candidates:
        assert candidate.spec in page
    assert "http" not in page.split("</style>")[1].replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("freq", "words"),
    [
        ("MS", "1 month"),
        ("15min", "15 minutes"),
        ("W-SAT", "1 week"),
        ("h", "1 hour"),
        ("2D", "2 days"),
    ],
)
def test_steps_in_words(freq, words):
    assert step_in_words(pd.date_range("2024-01-01", periods=4, freq=freq)) == words


@pytest.mark.parametrize("name", ["co2", "elnino", "sunspots", "macro"])
def test_every_bundled_series_is_forecast(tmp_path, name):
    series = load_series(f"bundled:{name}")
    made = forecast(series, horizon=3, budget="3steps", root=tmp_path, device="cpu")
    assert np.isfinite(made.table["forecast"]).all()
    assert len(made.table) == 3 * len(series.columns)


def test_a_run_is_loaded_and_refused_by_what_is_for_images(found, tmp_path):
    run = next(c.run for c in found.candidates if c.spec == "dlinear")
    loaded = polypatch.load(run.model_file)
    assert loaded.task == "forecast"
    past, _ = found.data.test.read(torch.arange(2))
    assert loaded.model(past).shape == (2, 6, 2)
    with pytest.raises(PolypatchError, match="forecasts series, not images"):
        side_of(loaded)
    with pytest.raises(PolypatchError, match="forecasts series"):
        describe(run.model_file)
    with pytest.raises(PolypatchError, match="dlinear has no tokens"):
        cutters_of(str(run.folder), host="vit-nano", patch=4, resolution=32)
