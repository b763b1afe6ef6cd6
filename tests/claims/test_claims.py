"""Claims: the files, the verdict, the page, and the small measures that experiments rest on."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from polypatch import catalogue, create
from polypatch.claims import base
from polypatch.claims.base import Claim, Evidence, Lab, claim_of, claim_slugs, verdict
from polypatch.data import load_images
from polypatch.errors import PolypatchError
from polypatch.training.recipe import Recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "claims.md"
VERDICTS = ("holds", "does not hold here", "too close to call")


# ---- the files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", claim_slugs())
def test_every_file_holds_a_claim(slug):
    claim = claim_of(slug)
    assert claim.slug == slug
    assert catalogue.paper(slug).works
    assert claim.says.endswith(".")
    assert len(claim.metric) > 20
    assert math.isfinite(claim.margin)
    assert claim.seeds >= 3
    module = __import__(claim.experiment.__module__, fromlist=["x"])
    for words in ("**The claim**", "**Why it can be tested here.**", "**What can't be tested**"):
        assert words in module.__doc__


def test_helpers_are_no_claims():
    assert {"base", "evaluation"} & set(claim_slugs()) == set()
    with pytest.raises(PolypatchError, match="did you mean quadtree"):
        claim_of("quadtre")


def test_every_outcome_has_a_claim_and_every_claim_an_outcome():
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    outcomes = dict(section.split("\n")[0].split(": ") for section in sections)
    assert set(outcomes) == set(claim_slugs())
    assert set(outcomes.values()) <= set(VERDICTS)


@pytest.mark.parametrize("slug", claim_slugs())
def test_the_page_tells_of_the_claim_as_it_is_and_draws_the_verdict_from_its_values(slug):
    claim = claim_of(slug)
    (section,) = re.findall(rf"\n## {slug}: (.*?)(?=\n## |\Z)", PAGE.read_text(), re.DOTALL)
    assert claim.says in section
    assert f"**Metric.** {claim.metric}; it has to be above {claim.margin:g}.\n" in section
    (found,) = re.findall(r"over (\d+) seeds; each: (.*?)\)", section)
    values = [float(value) for value in found[1].split(", ")]
    assert len(values) == int(found[0]) >= claim.seeds
    assert section.startswith(verdict(values, claim.margin) + "\n")


# ---- verdict and page ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "margin", "expected"),
    [
        ([2.0, 2.1, 1.9], 0.0, "holds"),
        ([-2.0, -2.1, -1.9], 0.0, "does not hold here"),
        ([2.0, 2.1, 1.9], 3.0, "does not hold here"),
        ([2.0, -1.0, 1.0], 0.0, "too close to call"),
        ([-0.1, -0.2, -0.15], -1.0, "holds"),
        ([1.0, 1.0, 1.0], 0.5, "holds"),  # equal values: an interval without width
        ([0.0, 0.0, 0.0], 0.0, "too close to call"),  # on the margin
        ([5.0, 5.0], 0.0, "too close to call"),  # two seeds show nothing
    ],
)
def test_verdict(values, margin, expected):
    assert verdict(values, margin) == expected


def outcome(slug: str, values: tuple[float, ...]) -> base.Outcome:
    evidence = Evidence(
        values=values,
        table={"one": {"tokens": "4"}, "other": {"tokens": "9", "accuracy": "50 %"}},
        remark="A remark.",
    )
    claim = Claim(slug, "It is so.", "points", 0.0, lambda lab: evidence)
    return base.test(claim, Lab(root=Path("nowhere")))


def test_a_section_is_replaced_and_others_stay(tmp_path):
    page = tmp_path / "claims.md"
    base.write_section(page, outcome("tome", (1.0, 1.1, 0.9)))
    base.write_section(page, outcome("dart", (1.0, 1.1, 0.9)))
    first = page.read_text()
    assert first.startswith("# Claims\n")
    assert re.findall(r"^## (.*)$", first, re.MULTILINE) == ["dart: holds", "tome: holds"]
    base.write_section(page, outcome("dart", (-1.0, -1.1, -0.9)))
    second = page.read_text()
    headings = re.findall(r"^## (.*)$", second, re.MULTILINE)
    assert headings == ["dart: does not hold here", "tome: holds"]
    assert second.split("\n## ")[0] == first.split("\n## ")[0]
    assert second.split("\n## ")[2] == first.split("\n## ")[2]
    assert "each: -1, -1.1, -0.9" in second
    assert "| | tokens | accuracy |\n|---|---|---|\n| one | 4 |  |\n| other | 9 | 50 % |" in second
    assert sorted(p.name for p in tmp_path.iterdir()) == ["claims.md"]


# ---- an experiment from end to end ---------------------------------------------------------------


def halved(data):
    """A view for the test below: half as many training images."""
    from dataclasses import replace

    from polypatch.claims.spt_lsa import First

    return replace(
        data,
        name=f"{data.name}, halved",
        fingerprint=f"{data.fingerprint} halved",
        train=First(data.train, len(data.train) // 2),
        endless=False,
    )


def test_a_tiny_experiment_trains_judges_and_keeps_its_runs(tmp_path):
    spec = "vit-nano( patch=8, position=none )"
    seen: list[int] = []

    def experiment(lab: Lab) -> Evidence:
        recipe = Recipe(batch=8)
        arguments = dict(data="bundled:digits", resolution=8, budget="1steps", recipe=recipe)
        plain = lab.train([spec], **arguments)[spec]
        viewed = lab.train([spec], **arguments, view=halved)[spec]
        assert [run.config.seed for run in plain] == [0, 1, 2]
        assert plain[0].config.data == "bundled:digits"
        assert viewed[0].config.data == "bundled:digits, halved"
        assert viewed[0].folder != plain[0].folder
        assert not lab.host(plain[0]).training
        assert len(lab.data(plain[0]).classes) == 10
        first, second = lab.accuracy(plain), lab.accuracy(viewed)
        assert all(0 <= value <= 100 for value in first + second)
        return Evidence(tuple(a - b for a, b in zip(first, second)))

    claim = Claim("stub", "A stub.", "points", 0.0, experiment)
    lab = Lab(root=tmp_path, jobs=1, device="cpu", refresh=lambda work: seen.append(len(work)))
    done = base.test(claim, lab)
    assert done.verdict in VERDICTS
    assert done.interval.count == 3
    assert set(seen) == {3}
    files = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/result.json")}
    assert len(files) == 6
    again = base.test(claim, lab)
    assert again.evidence.values == done.evidence.values
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/result.json")} == files


# ---- what experiments measure with ---------------------------------------------------------------


def test_accuracy_and_batches():
    from polypatch.claims.evaluation import accuracy, batches, spread

    data = load_images("bundled:digits", resolution=8)
    test = batches(data, size=100)
    labels = torch.cat([labels for _, labels in test])
    assert [len(labels) for _, labels in test][:-1] == [100] * (len(test) - 1)
    assert len(labels) == len(data.test)

    class Always(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot(torch.full((len(images),), 3), 10)

    share = 100 * float((labels == 3).double().mean())
    assert accuracy(Always(), test) == pytest.approx(share)
    assert spread([1.0, 1.0, 1.0], " %") == "1.0 ± 0.0 %"


def test_a_small_training_set_holds_the_first_images_only():
    from polypatch.claims.spt_lsa import SAMPLES, few

    data = load_images("bundled:photos", resolution=8)
    small = few(data)
    assert len(small.train) == SAMPLES
    assert not small.endless
    assert small.fingerprint != data.fingerprint
    assert torch.equal(small.train.read(torch.arange(4))[0], data.train.read(torch.arange(4))[0])
    assert len(small.test) == len(data.test)


def test_shuffled_images_have_the_same_pixels_elsewhere():
    from polypatch.claims.pixel_transformer import permutation, shuffled

    data = load_images("bundled:photos", resolution=8)
    moved = shuffled(data)
    order = permutation(8)
    assert sorted(order.tolist()) == list(range(64))
    assert (order != torch.arange(64)).float().mean() > 0.9
    for before, after in ((data.train, moved.train), (data.test, moved.test)):
        old, labels = before.read(torch.arange(5))
        new, same = after.read(torch.arange(5))
        assert torch.equal(labels, same)
        assert torch.equal(new.flatten(2), old.flatten(2)[..., order])


def test_a_pixel_network_does_not_notice_a_shuffle_of_pixels_and_positions():
    from polypatch.claims.pixel_transformer import PIXELS, largest_change

    data = load_images("bundled:photos", resolution=8)
    model = create(PIXELS, classes=16, resolution=8, seed=0).eval()
    kept = model.position.table.clone()
    assert largest_change(model, data) < 1e-5
    assert torch.equal(model.position.table, kept)


def test_a_fixed_vit_at_its_own_patch_size_is_itself():
    from polypatch.claims.flexivit import at_patch_size

    model = create("vit-nano(patch=8)", classes=5, resolution=24, seed=0).eval()
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(at_patch_size(model, 8)(images), model(images))
        assert at_patch_size(model, 4).tokens(images).x.shape[1] == 1 + 36
    assert model.patch == 8


def test_explained_variation_against_a_loop():
    from polypatch.claims.spformer import explained_variation, of_grid

    images = torch.rand(3, 3, 8, 8)
    labels = torch.randint(0, 5, (3, 4, 4))
    expected = []
    for image, small in zip(images, labels):
        fine = small.repeat_interleave(2, 0).repeat_interleave(2, 1)
        painted = torch.zeros_like(image)
        for region in fine.unique():
            painted[:, fine == region] = image[:, fine == region].mean(1, keepdim=True)
        mean = image.mean((1, 2), keepdim=True)
        expected.append(float((painted - mean).square().sum() / (image - mean).square().sum()))
    found = explained_variation(images, labels)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    pixels = torch.arange(64).view(1, 8, 8)
    assert explained_variation(images, pixels).tolist() == pytest.approx([1.0] * 3)
    whole = torch.zeros(1, 8, 8, dtype=torch.long)
    assert explained_variation(images, whole).tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    assert explained_variation(torch.ones(1, 3, 8, 8), whole).tolist() == [1.0]
    assert of_grid(load_images("bundled:digits", resolution=8), 8) == pytest.approx(100.0)


def test_gradients_of_the_embedding_relative_to_the_blocks():
    from polypatch.claims.dual_patchnorm import NORMED, PLAIN, embedding_ratio

    data = load_images("bundled:photos", resolution=16)
    for spec in (PLAIN, NORMED):
        model = create(spec, classes=16, resolution=16, seed=0)
        ratio = embedding_ratio(model, data)
        assert 0 < ratio < 100
        assert all(p.grad is None for p in model.parameters())


def test_dropping_leaves_as_many_tokens_as_merging():
    from polypatch.claims.tome import RandomDropping
    from polypatch.reducing.tome import plug

    images = torch.randn(2, 3, 32, 32)
    dropped, merged = (create("vit-nano(patch=8)", classes=4, resolution=32) for _ in range(2))
    plug(merged, r=5)
    for block in dropped.blocks:
        block.reducing = RandomDropping(r=5)
    with torch.no_grad():
        counts = [m.eval().forward_features(images).x.shape[1] for m in (dropped, merged)]
    assert counts[0] == counts[1] < 17
