"""Budgets, schedules, sampling, augmentation: the parts of a step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polypatch.errors import PolypatchError
from polypatch.spec import create
from polypatch.training.augment import augment, draw, mix, one_hot
from polypatch.training.budget import Budget
from polypatch.training.recipe import Recipe, learning_rate, parameter_groups
from polypatch.training.sampling import generator_of, indices_of, seed_of, shard


@pytest.mark.parametrize(
    ("text", "amount", "kind"),
    [
        ("60s", 60, "seconds"),
        ("10min", 600, "seconds"),
        ("1.5h", 5400, "seconds"),
        ("500 steps", 500, "steps"),
        ("0.5epochs", 0.5, "epochs"),
    ],
)
def test_budgets(text, amount, kind):
    assert Budget.parse(text) == Budget(amount, kind)


@pytest.mark.parametrize("text", ["", "60", "s", "-5s", "0steps", "5 parsecs", "nan s"])
def test_bad_budgets(text):
    with pytest.raises(PolypatchError, match="is no budget"):
        Budget.parse(text)


def test_budget_steps():
    assert Budget.parse("3epochs").steps(batch=64, samples=640) == 30
    assert Budget.parse("10s").steps(batch=64, samples=1, step_seconds=0.5) == 20
    assert Budget.parse("1s").steps(batch=64, samples=1, step_seconds=9) == 1


@given(st.integers(1, 500))
def test_the_rate_warms_up_and_ends_low(total):
    recipe = Recipe(lr=1.0, final_lr=0.01, warmup=0.2)
    rates = [learning_rate(recipe, step, total) for step in range(total)]
    assert max(rates) <= 1.0
    peak = max(range(total), key=rates.__getitem__)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if total > 20:
        assert rates[-1] < 0.05


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(batch=0), "at least 1 sample"),
        (dict(lr=-1), "must be positive"),
        (dict(warmup=1.0), "fraction"),
        (dict(augment="randd"), "did you mean rand"),
        (dict(precision="bf32"), "known: bf16, float32, fp16"),
        (dict(accumulate=100), "can't be accumulated"),
    ],
)
def test_bad_recipes(options, said):
    with pytest.raises(PolypatchError, match=said):
        Recipe(**options)


def test_decay_groups_hold_every_parameter_once():
    model = create("vit-nano", classes=3)
    groups = parameter_groups(model, 0.1)
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert groups[1]["weight_decay"] == 0
    assert all(p.ndim > 1 for p in groups[0]["params"])


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_epochs_visit_every_sample_once(batch, samples, seed):
    steps = -(-3 * samples // batch)
    seen = torch.cat(
        [
            indices_of(s, batch=batch, samples=samples, seed=seed, endless=False)
            for s in range(steps)
        ]
    )
    for epoch in range(3):
        part = seen[epoch * samples : (epoch + 1) * samples]
        assert part.sort().values.tolist() == list(range(samples))


def test_endless_sources_never_repeat():
    seen = torch.cat([indices_of(s, batch=8, samples=16, seed=0, endless=True) for s in range(10)])
    assert seen.unique().numel() == 80


def test_shards_make_up_the_batch():
    batch = torch.arange(12)
    assert torch.equal(torch.cat([shard(batch, r, 3) for r in range(3)]), batch)
    with pytest.raises(ValueError, match="can't be shared"):
        shard(batch, 0, 5)


def test_seeds_differ_and_stay():
    assert seed_of(0, "order", 1) == seed_of("0", "order", "1") >= 0
    assert seed_of(0, "a") != seed_of(0, "b")
    assert seed_of(1, 23) != seed_of(12, 3)


@pytest.mark.parametrize("kind", ["none", "light", "rand"])
def test_augmentation_of_a_part_is_a_part_of_the_augmentation(kind):
    images = torch.rand(8, 3, 32, 32)
    draws = draw(kind, 8, flip=True, generator=generator_of(1))
    whole = augment(images, draws)
    half = augment(images[4:], {k: v[4:] for k, v in draws.items()})
    assert torch.allclose(whole[4:], half, atol=1e-6)
    assert whole.shape == images.shape
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1
    assert (kind == "none") == torch.equal(whole, images)


def test_light_augmentation_moves_whole_pixels():
    images = torch.rand(1, 3, 16, 16)
    draws = {"mirror": torch.tensor([True]), "shift": torch.zeros(1, 2)}
    assert torch.equal(augment(images, draws), images.flip(-1))
    draws = {"mirror": torch.tensor([False]), "shift": torch.tensor([[0.125, 0.0]])}
    moved = augment(images, draws)
    assert torch.equal(moved[:, :, :14], images[:, :, 2:])
    assert torch.equal(moved[:, :, 14], images[:, :, 14])  # mirrored at the border


def test_digits_are_not_mirrored():
    draws = draw("rand", 64, flip=False, generator=generator_of(2))
    assert not draws["mirror"].any()


def test_smoothed_targets_sum_to_one():
    targets = one_hot(torch.tensor([0, 2]), 4, 0.2)
    assert targets[0].tolist() == pytest.approx([0.85, 0.05, 0.05, 0.05])


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_keeps_pixels_and_probabilities_in_step(mixup, cutmix):
    for seed in range(5):
        images = torch.stack([torch.zeros(3, 20, 20), torch.ones(3, 20, 20)])
        targets = torch.eye(2)
        mixed, probabilities = mix(
            images, targets, mixup=mixup, cutmix=cutmix, generator=generator_of(seed)
        )
        assert torch.allclose(probabilities.sum(1), torch.ones(2))
        # The part of white pixels is the probability of the white image's class.
        assert torch.allclose(mixed.mean((1, 2, 3)), probabilities[:, 1], atol=1e-5)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 50.0])
def test_the_ratio_of_mixup_is_of_the_beta_distribution(alpha):
    generator = generator_of(0)
    images = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 1, 1)
    targets = torch.eye(2)
    ratios = torch.stack(
        [
            mix(images, targets, mixup=alpha, cutmix=0, generator=generator)[1][0, 0]
            for _ in range(2000)
        ]
    )
    assert ratios.mean() == pytest.approx(0.5, abs=0.03)
    assert ratios.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_without_mixing_nothing_happens():
    images, targets = torch.rand(2, 3, 4, 4), torch.eye(2)
    same = mix(images, targets, mixup=0, cutmix=0, generator=generator_of(0))
    assert same[0] is images
    assert same[1] is targets
