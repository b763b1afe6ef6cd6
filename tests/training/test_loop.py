"""Runs: exact resume, kill -9, several processes, precision, the folder's files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polypatch.compare import trained
from polypatch.data import load_images
from polypatch.errors import PolypatchError
from polypatch.training.evaluate import evaluate
from polypatch.training.loop import train
from polypatch.training.recipe import Recipe
from polypatch.training.runs import Run, RunConfig


@pytest.fixture(scope="module")
def digits():
    return load_images("bundled:digits", resolution=16)


def config_of(data, spec="vit-nano(patch=8)", **changes) -> RunConfig:
    base = RunConfig(
        spec=spec,
        data=data.name,
        data_fingerprint=data.fingerprint,
        resolution=data.resolution,
        classes=len(data.classes),
        seed=0,
        budget="12steps",
        recipe=Recipe(batch=16, lr=2e-3),
    )
    return replace(base, **changes)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.model_file)


def assert_same_weights(a: Run, b: Run) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


@pytest.mark.parametrize(
    ("spec", "recipe"),
    [
        ("vit-nano(patch=8,drop_path=0.3)", Recipe(batch=16, mixup=0.8, cutmix=1.0)),
        ("vit-nano(patch=8)", Recipe(batch=16, ema=0.9, augment="rand", accumulate=2)),
    ],
    ids=["mixing", "ema"],
)
def test_a_resumed_run_is_bit_identical(tmp_path, digits, spec, recipe):
    config = config_of(digits, spec, recipe=recipe)
    whole = train(config, digits, root=tmp_path / "whole", device="cpu")
    for stop in (3, 7):
        part = train(config, digits, root=tmp_path / "parts", device="cpu", stop_after=stop)
        assert part.result is None
        assert part.latest_checkpoint()[0] == stop
    part = train(config, digits, root=tmp_path / "parts", device="cpu")
    assert_same_weights(whole, part)
    assert whole.result["accuracy"] == part.result["accuracy"]
    steps = [row["step"] for row in part.metrics() if "loss" in row]
    assert steps == sorted(set(steps))


def test_a_finished_run_is_reused(tmp_path, digits):
    config = config_of(digits, budget="2steps")
    first = train(config, digits, root=tmp_path, device="cpu")
    stamp = first.model_file.stat().st_mtime_ns
    again = train(config, digits, root=tmp_path, device="cpu")
    assert again.folder == first.folder
    assert again.model_file.stat().st_mtime_ns == stamp


def test_the_address_depends_on_everything_that_matters(digits):
    config = config_of(digits)
    changes = [
        dict(seed=1),
        dict(budget="13steps"),
        dict(data_fingerprint="x"),
        dict(spec="vit-nano(patch=4)"),
        dict(recipe=Recipe(batch=16, lr=3e-3)),
    ]
    addresses = {config.address} | {replace(config, **c).address for c in changes}
    assert len(addresses) == len(changes) + 1
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_time_budget_is_planned_once(tmp_path, digits):
    config = config_of(digits, budget="1s")
    run = train(config, digits, root=tmp_path, device="cpu", stop_after=1)
    steps = run.plan["steps"]
    assert steps >= 1
    assert run.plan["step_seconds"] > 0
    done = train(config, digits, root=tmp_path, device="cpu")
    assert done.result["steps"] == steps


def test_planning_by_time_does_not_train(tmp_path, digits):
    """The steps that are timed leave no trace: the same plan gives the same weights."""
    timed = train(config_of(digits, budget="0.4s"), digits, root=tmp_path / "a", device="cpu")
    steps = timed.result["steps"]
    fixed = train(config_of(digits, budget=f"{steps}steps"), digits, root=tmp_path, device="cpu")
    assert_same_weights(timed, fixed)


def test_accumulating_gives_the_same_gradients(tmp_path, digits):
    plain = train(config_of(digits, budget="3steps"), digits, root=tmp_path / "a", device="cpu")
    recipe = Recipe(batch=16, lr=2e-3, accumulate=4)
    parts = train(
        config_of(digits, budget="3steps", recipe=recipe), digits, root=tmp_path, device="cpu"
    )
    first, second = weights(plain), weights(parts)
    for name in first:
        assert torch.allclose(first[name], second[name], atol=2e-5), name


def test_it_learns(tmp_path, digits):
    config = config_of(digits, budget="80steps", recipe=Recipe(batch=32, lr=3e-3))
    run = train(config, digits, root=tmp_path, device="cpu")
    assert run.result["accuracy"] > 0.5  # ten classes
    assert run.result["tokens"] == 4
    outcome = evaluate(trained(run), digits)
    assert outcome.accuracy == pytest.approx(run.result["accuracy"])


def test_bf16_trains(tmp_path, digits):
    recipe = Recipe(batch=16, precision="bf16")
    config = config_of(digits, budget="2steps", recipe=recipe)
    assert train(config, digits, root=tmp_path, device="cpu").result is not None


def test_fp16_needs_an_accelerator(tmp_path, digits):
    config = config_of(digits, recipe=Recipe(batch=16, precision="fp16"))
    with pytest.raises(PolypatchError, match="needs an accelerator"):
        train(config, digits, root=tmp_path, device="cpu")


def test_a_loss_that_explodes_is_named(tmp_path, digits):
    recipe = Recipe(batch=16, lr=1e30, clip=0, warmup=0.0)
    config = config_of(digits, budget="30steps", recipe=recipe)
    with pytest.raises(PolypatchError, match="the loss is"):
        train(config, digits, root=tmp_path, device="cpu")


def test_starting_from_another_run(tmp_path, digits):
    first = train(config_of(digits, budget="2steps"), digits, root=tmp_path, device="cpu")
    config = config_of(digits, budget="1steps", init=str(first.folder))
    second = train(config, digits, root=tmp_path, device="cpu")
    assert second.folder != first.folder
    config = config_of(digits, spec="vit-nano(qk_norm=True)", init=str(first.folder))
    with pytest.raises(PolypatchError, match="another architecture"):
        train(config, digits, root=tmp_path, device="cpu")


def test_torn_metric_lines_are_left_out(tmp_path, digits):
    run = train(config_of(digits, budget="2steps"), digits, root=tmp_path, device="cpu")
    whole = run.metrics()
    with run.metrics_file.open("a") as handle:
        handle.write('{"step": 3, "lo')
    assert run.metrics() == whole


def test_tensorboard_events(tmp_path, digits):
    run = train(
        config_of(digits, budget="2steps"), digits, root=tmp_path, device="cpu", tensorboard=True
    )
    assert list((run.folder / "tensorboard").glob("events.*"))


def command(tmp_path: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "polypatch", "train", "vit-nano(patch=8)", "--data", "bundled:digits",
        "--resolution", "16", "--budget", "400steps", "--batch", "16", "--no-tensorboard",
        "--device", "cpu", "--runs", str(tmp_path), *more,
    ]  # fmt: skip


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.mark.slow
def test_kill_9_loses_at_most_the_work_since_the_last_checkpoint(tmp_path, digits):
    config = config_of(digits, budget="400steps", recipe=Recipe(batch=16))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed ones: another number may sum in another order
    try:
        whole = train(config, digits, root=tmp_path / "whole", device="cpu")
    finally:
        torch.set_num_threads(threads)
    # A frequent checkpoint, so that kills hit the writing of one as well.
    code = (
        "import sys; from pathlib import Path; from polypatch.data import load_images;"
        "from polypatch.training.loop import train; from polypatch.training.runs import Run;"
        "run = Run.open(Path(sys.argv[1])); d = load_images('bundled:digits', resolution=16);"
        "train(run.config, d, root=run.folder.parent, device='cpu', checkpoint_seconds=0.02)"
    )
    run = Run.of(config, tmp_path / "killed")
    kills, before = 0, 0
    while run.result is None:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(run.folder)], env=ENVIRONMENT, cwd=tmp_path
        )
        began = time.monotonic()
        while process.poll() is None:
            latest = run.latest_checkpoint()
            step = latest[0] if latest else 0
            assert step >= before  # nothing that was saved is lost
            if kills < 4 and step > before + 20:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills, before = kills + 1, step
            assert time.monotonic() - began < 120
            time.sleep(0.01)
    assert kills >= 2
    assert_same_weights(whole, run)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """The same global batch gives the same loss curve and weights, up to the order of sums."""
    one = subprocess.run(command(tmp_path / "one", "--budget", "40steps"), env=ENVIRONMENT)
    two = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu",
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            *command(tmp_path / "two", "--budget", "40steps")[1:],
        ],
        env=ENVIRONMENT,
    )  # fmt: skip
    assert one.returncode == two.returncode == 0
    runs = [Run(next((tmp_path / name).iterdir())) for name in ("one", "two")]
    assert runs[0].folder.name == runs[1].folder.name
    assert runs[1].result["samples"] == runs[0].result["samples"]
    first, second = weights(runs[0]), weights(runs[1])
    for name in first:
        assert torch.allclose(first[name], second[name], atol=1e-3), name
    assert runs[0].result["loss"] == pytest.approx(runs[1].result["loss"], rel=1e-3)
