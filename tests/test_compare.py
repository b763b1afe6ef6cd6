"""The recommendation follows from the numbers, and says when they say nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from polypatch.compare import Candidate, Job, compare, recommend, run_jobs
from polypatch.data import load_images
from polypatch.errors import PolypatchError
from polypatch.training.cost import Cost
from polypatch.training.recipe import Recipe
from polypatch.training.runs import Run, RunConfig


@dataclass(frozen=True)
class Finished(Run):
    """A run of which only the result is asked."""

    scores: dict[str, Any]

    @property
    def result(self) -> dict[str, Any]:
        return self.scores


def candidate(spec: str, gflops: float, *scores: float) -> Candidate:
    runs = tuple(
        Finished(
            Path(spec),
            {"accuracy": s, "tokens": 4.0, "tokens_spread": 0.0, "images_per_second": 1.0},
        )
        for s in scores
    )
    return Candidate(spec, runs, Cost(gflops, 1.0, 1.0, 1.0, 1))


def test_a_clear_winner_is_taken():
    text = recommend([candidate("a", 1, 0.5, 0.51, 0.52), candidate("b", 2, 0.7, 0.71, 0.72)])
    assert text.startswith("Take b: it has the highest accuracy")
    assert "clearly ahead of a by 20.0" in text


def test_within_the_noise_the_cheaper_one_is_taken():
    text = recommend([candidate("a", 1, 0.70, 0.71, 0.69), candidate("b", 4, 0.71, 0.70, 0.72)])
    assert text.startswith("Take a")
    assert "4.0 times fewer operations than b" in text
    assert "within the noise" in text


def test_the_best_may_be_the_cheapest():
    text = recommend([candidate("a", 1, 0.71, 0.70, 0.72), candidate("b", 4, 0.70, 0.71, 0.69)])
    assert text.startswith("Take a")
    assert "cheapest of those within the noise of it (b)" in text


def test_noise_that_hides_everything_is_named():
    text = recommend([candidate("a", 1, 0.2, 0.9, 0.5), candidate("b", 4, 0.6, 0.3, 0.95)])
    assert text.startswith("Too few or too short runs to choose")


def test_one_seed_shows_nothing():
    text = recommend([candidate("a", 1, 0.5), candidate("b", 2, 0.9)])
    assert "with one seed nobody can say what is noise" in text
    assert "nothing to compare" in recommend([candidate("a", 1, 0.5)])


def test_pairs_of_seeds_are_compared_not_their_spread():
    """A shift that all seeds share is clear, however far the seeds themselves lie apart."""
    a = candidate("a", 1, 0.50, 0.60, 0.70)
    b = candidate("b", 2, 0.53, 0.63, 0.73)
    assert "clearly ahead of a by 3.0" in recommend([a, b])


def test_everything_wrong_with_a_spec_shows_before_training(tmp_path):
    with pytest.raises(PolypatchError, match="did you mean tome"):
        compare(["vit-nano", "vit-nano+tme"], data="bundled:digits", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_specs_that_mean_the_same_are_compared_once(tmp_path):
    comparison = compare(
        ["vit-nano(patch=8)", " vit-nano( patch = 8 )"],
        data="bundled:digits",
        resolution=16,
        budget="1steps",
        seeds=1,
        recipe=Recipe(batch=8),
        root=tmp_path,
        jobs=1,
        device="cpu",
    )
    assert [c.spec for c in comparison.candidates] == ["vit-nano(patch=8)"]
    assert "nothing to compare it with" in comparison.recommendation


def test_a_job_that_fails_raises_its_error(tmp_path):
    data = load_images("bundled:digits", resolution=16)
    config = RunConfig(
        spec="vit-nano(patch=8)",
        data="bundled:digits",
        data_fingerprint=data.fingerprint,
        resolution=16,
        classes=10,
        seed=0,
        budget="30steps",
        recipe=Recipe(batch=8, lr=1e30, clip=0, warmup=0.0),
    )
    with pytest.raises(PolypatchError, match="the loss is"):
        run_jobs([Job(config, tmp_path, "cpu")], jobs=1)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_workers_leave_with_a_killed_parent(tmp_path, sign):
    command = [
        sys.executable, "-m", "polypatch", "compare", "vit-nano(patch=4)", "vit-nano(patch=2)",
        "--budget", "100000steps", "--seeds", "1", "--jobs", "2", "--device", "cpu",
        "--runs", str(tmp_path),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path
    )
    try:
        deadline = time.monotonic() + 90
        while len(list(tmp_path.glob("*/metrics.jsonl"))) < 2:  # both workers train
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        process.send_signal(sign)
        process.wait()
    time.sleep(3)
    sizes = [path.stat().st_size for path in tmp_path.glob("*/metrics.jsonl")]
    time.sleep(3)
    assert sizes == [path.stat().st_size for path in tmp_path.glob("*/metrics.jsonl")]
