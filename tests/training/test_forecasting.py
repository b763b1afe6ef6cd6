"""Training forecasters: the same loop, with the best weights of a validation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from polypatch.data.series import Series
from polypatch.data.windows import split_series
from polypatch.errors import PolypatchError
from polypatch.forecasters import create_forecaster, forecaster_names
from polypatch.training.forecasts import score
from polypatch.training.loop import train
from polypatch.training.recipe import Recipe
from polypatch.training.runs import RunConfig


def waves(steps: int = 600, width: int = 3, holes: int = 0) -> Series:
    time = np.arange(steps)[:, None]
    noise = np.random.default_rng(0).normal(size=(steps, width))
    values = np.sin(2 * np.pi * time / 12 + np.arange(width)) + 0.1 * noise + 0.002 * time
    if holes:
        values[np.random.default_rng(1).integers(0, steps, holes), 0] = np.nan
    index = pd.date_range("2000-01-01", periods=steps, freq="MS")
    return Series("waves", index, tuple(f"s{n}" for n in range(width)), values)


@pytest.fixture(scope="module")
def data():
    return split_series(waves(), lookback=24, horizon=6)


def config_of(data, spec="nlinear", **changes) -> RunConfig:
    config = RunConfig(
        spec=spec,
        data="waves",
        data_fingerprint=data.fingerprint,
        resolution=0,
        classes=0,
        seed=0,
        budget="60steps",
        recipe=Recipe(batch=32, lr=3e-3, weight_decay=0.0),
        task="forecast",
        lookback=data.lookback,
        horizon=data.horizon,
        series=len(data.columns),
        season=data.season,
        protocol=data.protocol,
    )
    return replace(config, **changes)


def test_a_linear_map_learns_waves_better_than_the_baselines(data, tmp_path):
    results = {
        spec: train(
            config_of(data, spec, budget="300steps"), data, root=tmp_path, device="cpu"
        ).result
        for spec in ("nlinear", "dlinear", "seasonal-naive", "drift")
    }
    learned = [results[name]["mse"] for name in ("nlinear", "dlinear")]
    assert max(learned) < results["seasonal-naive"]["mse"] < results["drift"]["mse"]
    assert results["seasonal-naive"]["steps"] == 0
    assert results["nlinear"]["windows"] == len(data.test)


def test_the_weights_kept_are_those_of_the_best_epoch(data, tmp_path):
    # A rate that grows until the error does.
    recipe = Recipe(batch=64, lr=1e-3, final_lr=3.0, weight_decay=0.0, clip=0, warmup=0.0)
    run = train(config_of(data, budget="80steps", recipe=recipe), data, root=tmp_path, device="cpu")
    scores = [row["val_mse"] for row in run.metrics() if "val_mse" in row]
    assert len(scores) > 3
    assert scores[-1] > min(scores)
    model = create_forecaster("nlinear", lookback=24, horizon=6, series=3)
    model.load_state_dict(load_file(run.model_file))
    assert score(model, data.val).mse == pytest.approx(min(scores), rel=1e-6)


def test_patience_ends_a_training(data, tmp_path):
    recipe = Recipe(batch=64, lr=0.3, weight_decay=0.0, clip=0, warmup=0.0, patience=2)
    run = train(
        config_of(data, budget="900steps", recipe=recipe), data, root=tmp_path, device="cpu"
    )
    assert run.result["steps"] < 900
    scores = [row["val_mse"] for row in run.metrics() if "val_mse" in row]
    assert min(scores) == scores[-3]


@pytest.mark.parametrize("stop", [7, 12, 13, 30])  # an epoch has 13 steps
def test_a_resumed_run_ends_bit_identical(data, tmp_path, stop):
    config = config_of(data, budget="45steps")
    whole = train(config, data, root=tmp_path / "a", device="cpu")
    halted = train(config, data, root=tmp_path / "b", device="cpu", stop_after=stop)
    assert halted.result is None
    resumed = train(config, data, root=tmp_path / "b", device="cpu")
    for name, value in load_file(whole.model_file).items():
        assert torch.equal(value, load_file(resumed.model_file)[name]), name
    same = ("mse", "mae", "steps")
    assert {k: whole.result[k] for k in same} == {k: resumed.result[k] for k in same}
    kept = [[r["val_mse"] for r in run.metrics() if "val_mse" in r] for run in (whole, resumed)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_losses_learn_and_gaps_dont_count(tmp_path, loss):
    data = split_series(waves(holes=60), lookback=24, horizon=6)
    recipe = Recipe(batch=32, lr=3e-3, weight_decay=0.0, loss=loss)
    run = train(
        config_of(data, recipe=recipe, budget="200steps"), data, root=tmp_path, device="cpu"
    )
    assert run.result["mse"] < 0.3


def test_accumulated_parts_and_the_average_of_weights(data, tmp_path):
    recipe = Recipe(batch=32, lr=3e-3, ema=0.9, accumulate=4, precision="bf16")
    run = train(config_of(data, "dlinear", recipe=recipe), data, root=tmp_path, device="cpu")
    assert np.isfinite(run.result["mse"])


@pytest.mark.parametrize("width", [1, 321])
def test_one_series_and_many(tmp_path, width):
    data = split_series(waves(width=width), lookback=24, horizon=6)
    spec = "nlinear(individual=true)"
    run = train(config_of(data, spec, budget="3steps"), data, root=tmp_path, device="cpu")
    assert np.isfinite(run.result["mse"])


def test_forecasters_by_name():
    assert {"seasonal-naive", "drift", "nlinear", "dlinear"} <= set(forecaster_names())
    sizes = dict(lookback=24, horizon=6, series=3, season=12)
    a, b = (create_forecaster("dlinear(width=5)", seed=3, **sizes) for _ in range(2))
    assert a.width == 5
    assert torch.equal(a.trend.weight, b.trend.weight)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nliner", "did you mean nlinear"),
        ("dlinear(widht=5)", "did you mean width"),
        ("drift(width=5)", "drift has no option 'width'"),
        ("nlinear+dart", "leave .dart out"),
        ("vit-nano", "there is no forecaster 'vit-nano'"),
    ],
)
def test_wrong_names_are_refused(spec, said):
    with pytest.raises(PolypatchError, match=said):
        create_forecaster(spec, lookback=24, horizon=6, series=3)


def test_data_of_another_task_is_refused(data, tmp_path):
    config = config_of(data, "vit-nano", task="classify", resolution=32, classes=2)
    with pytest.raises(PolypatchError, match="is data to forecast, not to classify"):
        train(config, data, root=tmp_path, device="cpu")
