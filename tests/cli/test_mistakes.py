"""Every mistake that a user can make: one sentence, the nearest right answer, exit code 2."""

from __future__ import annotations

import pytest

CASES = [
    (["compare", "vit-nan"], "did you mean vit-nano?"),
    (["compare", "vit-nano+drat"], "did you mean dart?"),
    (["compare", "vit-nano(pach=4)"], "did you mean patch?"),
    (["compare", "vit-nano(patch=64)"], "does not fit into a resolution of 32"),
    (["compare", "vit-nano", "--data", "nowhere"], "nowhere"),
    (["compare", "vit-nano", "--data", "bundled:photo"], "photos"),
    (["compare", "vit-nano", "--budget", "60"], "60s, 10min, 500steps, 3epochs"),
    (["compare", "vit-nano", "--seeds", "0"], "at least one seed"),
    (["compare", "vit-nano", "--jobs", "0"], "at least one run at a time"),
    (["compare", "vit-nano", "--augment", "ran"], "did you mean rand?"),
    (["compare", "vit-nano", "--device", "cuda:9"], "there is cpu"),
    (["compare", "vit-nano", "--device", "gpu"], "use cpu, cuda or mps"),
    (["compare", "vit-nano", "--resolution", "4"], "from 8 to 4096"),
    (["train", "vit-nano+mat"], "does not work yet"),
    (["train", "vit-nano", "--batch", "0"], "at least 1 sample"),
    (["train", "vit-nano", "--mixup", "-1"], "mixup is 0 or positive"),
    (["train", "vit-nano", "--lr", "inf"], "must be positive"),
    (["train", "vit-nano", "--precision", "bf17"], "did you mean bf16?"),
    (["train", "vit-nano", "--from", "nowhere", "--budget", "1steps"], "there is no file nowhere"),
    (["evaluate", "nowhere"], "there is no run in nowhere"),
    (["predict", "nowhere", "x.png"], "there is no file nowhere"),
    (["papers", "qqqq"], "no paper has 'qqqq' in it"),
    (["papers", "--by", "rom"], "did you mean room?"),
    (["patches", "nowhere.jpg"], "there is no file nowhere.jpg"),
    (["patches", "nowhere.jpg", "--with", "quadtre"], "did you mean quadtree?"),
    (["patches", "nowhere.jpg", "--out", "x.bmp"], "neither .png nor .svg"),
    (["forecast", "nowhere.csv", "--horizon", "3"], "there is no file nowhere.csv"),
    (["forecast", "bundled:co", "--horizon", "3"], "did you mean co2?"),
    (["forecast", "bundled:co2", "--horizon", "3", "--models", "dlinea"], "did you mean dlinear?"),
    (["forecast", "bundled:co2", "--horizon", "3", "--quantiles", "low"], "are no quantiles"),
    (["forecast", "bundled:co2", "--horizon", "3", "--format", "xls"], "there is no format"),
    (["forecast", "bundled:co2", "--horizon", "0"], "at least 1 step"),
    (["claim", "flexvit"], "did you mean flexivit?"),
    (["claim", "dart", "--seeds", "2"], "at least 3 seeds"),
]


@pytest.mark.parametrize(("words", "said"), CASES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")  # fmt: skip  # noqa: E501
def test_one_sentence_and_exit_code_2(polypatch, words, said):
    outcome = polypatch(*words)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith("polypatch: ")
    assert said in last


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "--bugdet", "3s"], "--budget"),
        (["comapre"], "compare"),
        (["train"], "Missing argument 'spec'"),
        (["compare", "--seeds", "many"], "valid integer"),
    ],
)
def test_misspelt_words_of_the_command_line(polypatch, words, said):
    outcome = polypatch(*words)
    assert outcome.code == 2
    assert said in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_ray_cluster_that_is_not_there(polypatch, tmp_path, address):
    pytest.importorskip("ray")
    words = ["compare", "vit-nano", "--budget", "1steps", "--runs", str(tmp_path)]
    outcome = polypatch(*words, "--ray", address)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert f"no Ray cluster answers at '{address}'" in outcome.err.strip().splitlines()[-1]
