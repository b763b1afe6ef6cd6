"""The commands on small real input, end to end."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from PIL import Image

SMALL = ["--data", "bundled:digits", "--resolution", "16", "--budget", "3steps", "--batch", "16",
         "--device", "cpu"]  # fmt: skip


def test_papers_lists_all(polypatch):
    outcome = polypatch("papers")
    assert outcome.code == 0
    assert "122 papers" in outcome.out
    assert "restormer" in outcome.out
    by_taxonomy = polypatch("papers", "--by", "taxonomy")
    assert "module/patchification" in by_taxonomy.out
    assert "ours" in by_taxonomy.out


def test_papers_shows_one(polypatch):
    outcome = polypatch("papers", "dart")
    assert "DART: Differentiable Dynamic Adaptive Region Tokenizer" in outcome.out
    assert "vit-nano+dart" in outcome.out
    assert "tokens=" in outcome.out
    assert "Not in the library yet" in polypatch("papers", "put").out


def test_papers_searches(polypatch):
    outcome = polypatch("papers", "superpixel")
    assert "spformer" in outcome.out
    assert "restormer" not in outcome.out


def test_compare_leaves_a_report_and_reuses_runs(polypatch, tmp_path):
    words = [
        "compare",
        "vit-nano(patch=8)",
        "vit-nano(patch=4)",
        *SMALL,
        "--seeds",
        "2",
        "--jobs",
        "1",
    ]
    first = polypatch(*words)
    assert first.code == 0
    assert "Report: report/index.html" in first.out
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert [c["tokens"] for c in results["candidates"]] == [4, 16]
    assert results["candidates"][0]["gflops"] < results["candidates"][1]["gflops"]
    assert results["recommendation"] in first.out
    page = (tmp_path / "report/index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")  # namespaces only
    assert "https://" not in page
    assert page.count("data:image/png;base64") == 6 * 3
    models = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/model.safetensors")}
    assert len(models) == 4
    again = polypatch(*words)
    assert "(4 of 4 runs are there already)" in again.err
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in models.items())


@pytest.mark.slow
def test_jobs_share_the_runs(polypatch, tmp_path):
    one = polypatch("compare", "vit-nano(patch=8)", *SMALL, "--runs", "one", "--jobs", "1")
    two = polypatch("compare", "vit-nano(patch=8)", *SMALL, "--runs", "two", "--jobs", "2")
    assert one.code == two.code == 0
    names = [sorted(p.name for p in (tmp_path / r).iterdir()) for r in ("one", "two")]
    assert names[0] == names[1]
    assert len(names[0]) == 3


@pytest.mark.slow
def test_compare_on_a_local_ray(polypatch, tmp_path):
    pytest.importorskip("ray")
    outcome = polypatch("compare", "vit-nano(patch=8)", *SMALL, "--seeds", "2", "--ray", "local")
    assert outcome.code == 0
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 2


def test_train_evaluate_predict(polypatch, tmp_path, photo):
    trained = polypatch("train", "vit-nano(patch=8)", *SMALL, "--no-tensorboard")
    assert trained.code == 0
    run = next((tmp_path / "runs").iterdir())
    assert f"Run: runs/{run.name}" in trained.out
    evaluated = polypatch("evaluate", str(run), "--json")
    outcome = json.loads(evaluated.out)
    assert outcome["samples"] == 355
    assert outcome["accuracy"] == json.loads((run / "result.json").read_text())["accuracy"]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    predicted = polypatch("predict", str(run), str(photo), str(broken), "--top", "2")
    assert predicted.code == 1
    assert "left out" in predicted.err
    rows = list(csv.DictReader(io.StringIO(predicted.out)))
    assert [row["file"] for row in rows] == [str(photo)]
    assert rows[0]["class_1"] in [str(d) for d in range(10)]
    assert float(rows[0]["probability_1"]) >= float(rows[0]["probability_2"])
    as_json = polypatch("predict", str(run), str(photo), "--out", "p/out.json")
    assert as_json.code == 0
    read = json.loads((tmp_path / "p/out.json").read_text())
    assert read[0]["predictions"][0]["class"] == rows[0]["class_1"]


def test_patches_draws_and_counts(polypatch, tmp_path, photo):
    outcome = polypatch("patches", str(photo), "--with", "grid,quadtree", "--resolution", "128")
    assert outcome.code == 0
    assert "grid      96 tokens" in outcome.out
    quadtree = int(outcome.out.split("quadtree")[1].split()[0])
    assert 6 <= quadtree <= 96
    picture = Image.open(tmp_path / "astronaut-patches.png")
    assert picture.width > 3 * 256
    svg = polypatch("patches", str(photo), "--with", "grid", "--out", "x.svg")
    assert svg.code == 0
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_a_run_of_another_torch_default_dtype_is_left_alone(polypatch):
    """Commands don't leave torch's global settings changed."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    polypatch("papers", "vit")
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
