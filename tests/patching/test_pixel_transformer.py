from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import polypatch
from polypatch import PolypatchError
from polypatch.hosts import build_vit
from polypatch.patching import pixel_transformer as pixel


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    with torch.device("meta"):
        tiny = pixel.build("pixel-transformer-tiny", classes=100, resolution=32)
        large = [
            count(pixel.build(f"pixel-transformer-{size}", classes=1000, resolution=28)) / 1e6
            for size in ("small", "base", "large")
        ]
    assert count(tiny) == 5_555_812
    # The paper gives 21.8, 86 and 303 million.
    assert [round(n) for n in large] == [22, 86, 304]


def test_sizes_are_the_papers():
    rows = {name: tuple(size) for name, size in pixel.VARIANTS.items()}
    assert rows["pixel-transformer-tiny"] == (192, 12, 12, 768)
    assert rows["pixel-transformer-large"] == (1024, 24, 16, 4096)
    with torch.device("meta"):
        model = pixel.build("pixel-transformer-small")
    assert [block.mixing.heads for block in model.blocks] == [12] * 12


def test_a_token_is_a_linear_map_of_its_pixel():
    model = polypatch.create("vit-nano(resolution=6)+pixel-transformer", classes=5, seed=0)
    image = torch.rand(2, 3, 6, 6)
    tokens = model.patching(image).check()
    weight, bias = model.patching.proj.weight[:, :, 0, 0], model.patching.proj.bias
    torch.testing.assert_close(tokens.x, image.flatten(2).transpose(1, 2) @ weight.T + bias)
    assert tokens.grid == (6, 6)
    assert model.patch == 1


def test_shuffled_pixels_with_shuffled_positions_change_nothing():
    model = polypatch.create("vit-nano(resolution=8)+pixel-transformer", classes=5, seed=0).eval()
    image = torch.rand(3, 3, 8, 8)
    wanted = model(image)
    order = pixel.pixel_permutation((8, 8), swaps=200)
    shuffled = pixel.shuffle_pixels(image, order)
    assert (model(shuffled) - wanted).abs().max() > 1e-4  # positions matter
    table = model.position.table.data
    model.position.table.data = table.flatten(1, 2)[:, order].view_as(table)
    torch.testing.assert_close(model(shuffled), wanted, atol=1e-5, rtol=1e-4)


def test_without_positions_it_is_a_function_of_a_set():
    model = polypatch.create(
        "vit-nano(resolution=8,pooling=mean)+pixel-transformer(position=none)", classes=5, seed=0
    ).eval()
    image = torch.rand(3, 3, 8, 8)
    order = torch.randperm(64)
    torch.testing.assert_close(
        model(pixel.shuffle_pixels(image, order)), model(image), atol=1e-5, rtol=1e-4
    )
    patches = build_vit("nano", resolution=8, patch=2, pooling="mean", position="none").eval()
    moved = patches(pixel.shuffle_pixels(image, order))
    assert (moved - patches(image)).abs().max() > 1e-3  # patches are not


def test_learned_positions_start_random_and_are_not_interpolated():
    model = polypatch.create("vit-nano(resolution=8)+pixel-transformer", classes=5, seed=0)
    table = model.position.table
    assert table.shape == (1, 8, 8, 64)
    assert 0.015 < table.std() < 0.025
    with pytest.raises(PolypatchError, match=r"positions for 8×8 pixels, the input has 8 × 9"):
        model(torch.rand(1, 3, 8, 9))


@pytest.mark.parametrize("position", pixel.POSITIONS)
def test_gradients_reach_every_parameter(position):
    model = polypatch.create(
        f"vit-nano(resolution=6)+pixel-transformer(position={position})", classes=5, seed=0
    ).train()
    model(torch.rand(4, 3, 6, 6)).square().sum().backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert value.grad.abs().max() > 0, name


@pytest.mark.parametrize("position", ["sincos", "none"])
def test_other_positions_take_any_size(position):
    model = polypatch.create(
        f"vit-nano(resolution=8)+pixel-transformer(position={position})", classes=5, seed=0
    )
    assert model(torch.rand(1, 3, 5, 11)).shape == (1, 5)
    assert model(torch.rand(1, 3, 1, 1)).shape == (1, 5)


def test_oblong_images():
    model = polypatch.create(
        "vit-nano+pixel-transformer(resolution=(5,9))", classes=5, seed=0
    ).eval()
    image = torch.rand(1, 3, 5, 9)
    tokens = model.forward_features(image)
    assert tokens.x.shape == (1, 46, 64)
    assert (tokens.label_map()[0].flatten() == torch.arange(45)).all()


def test_large_inputs_are_refused_unless_asked_for():
    with pytest.raises(PolypatchError, match=r"224×224 pixels are 50176 tokens.*set limit=None"):
        polypatch.create("vit-tiny+pixel-transformer", classes=5)
    with pytest.raises(PolypatchError, match="4225 tokens"):
        polypatch.create("pixel-transformer-tiny", classes=5, resolution=65)
    model = polypatch.create("vit-nano+pixel-transformer(position=sincos)", classes=5)
    with pytest.raises(PolypatchError, match="6400 tokens"):
        model.patching(torch.rand(1, 3, 80, 80))
    model = polypatch.create("vit-nano+pixel-transformer(position=none,limit=None)", classes=5)
    assert model.patching(torch.rand(1, 3, 80, 80)).x.shape[1] == 6400


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("vit-nano+pixel-transformer(position=sincso)", "did you mean sincos"),
        ("vit-nano+dual-patchnorm+pixel-transformer", "NormedPatching"),
        ("vit-nano+pixel-transformer(resolution=0)", "at least one pixel"),
        ("pixel-transformer-tiny(pooling=max)", "pooling"),
        ("pixel-transformer-tin", "did you mean pixel-transformer-tiny"),
    ],
)
def test_bad_options(spec, said):
    with pytest.raises(PolypatchError, match=said):
        polypatch.create(spec, classes=5)


def test_bfloat16():
    model = polypatch.create("vit-nano(resolution=8)+pixel-transformer", classes=5, seed=0).eval()
    image = torch.rand(2, 3, 8, 8)
    wanted = model(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (model(image).float() - wanted).abs().max() < 0.1
    assert (model.bfloat16()(image.bfloat16()).float() - wanted).abs().max() < 0.2


def test_a_named_network_runs():
    model = polypatch.create("pixel-transformer-tiny", classes=7, resolution=6, seed=0).eval()
    assert model(torch.rand(2, 3, 6, 6)).shape == (2, 7)
    assert {"position.table", "prefix.tokens"} <= model.no_decay()
    model.reset_head(3)
    assert model(torch.rand(1, 3, 6, 6)).shape == (1, 3)
    means = pixel.build("pixel-transformer-tiny", resolution=4, pooling="mean", position="none")
    assert means.prefix is None


# ---- the study of locality -----------------------------------------------------------------------


@pytest.mark.parametrize("distance", [None, 1, 3])
def test_permutations_are_permutations(distance):
    order = pixel.pixel_permutation((7, 5), swaps=60, distance=distance)
    assert sorted(order.tolist()) == list(range(35))
    assert (order != torch.arange(35)).any()


@pytest.mark.parametrize("distance", [1, 2])
def test_one_swap_stays_within_its_distance(distance):
    far = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        order = pixel.pixel_permutation((6, 8), swaps=1, distance=distance, generator=generator)
        moved = (order != torch.arange(48)).nonzero().flatten()
        assert len(moved) == 2  # never a pixel with itself
        y, x = moved // 8, moved % 8
        apart = max((y[0] - y[1]).abs().item(), (x[0] - x[1]).abs().item())
        assert 1 <= apart <= distance
        far = max(far, apart)
    assert far == distance


def test_permutations_repeat_with_their_generator():
    first, second = (
        pixel.pixel_permutation((8, 8), swaps=30, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(pixel.pixel_permutation((4, 4), swaps=0), torch.arange(16))
    image = torch.rand(2, 3, 8, 8)
    shuffled = pixel.shuffle_pixels(image, first)
    back = pixel.shuffle_pixels(shuffled, first.argsort())
    assert torch.equal(back, image)
    assert not torch.equal(shuffled, image)
    with pytest.raises(PolypatchError, match="does not fit"):
        pixel.shuffle_pixels(image, torch.arange(9))
    with pytest.raises(PolypatchError, match="nothing to swap"):
        pixel.pixel_permutation((1, 1), swaps=1)
    with pytest.raises(PolypatchError, match="out of range"):
        pixel.pixel_permutation((4, 4), swaps=1, distance=0)


# ---- masked autoencoding -------------------------------------------------------------------------


def test_masked_pixels_are_predicted():
    host = polypatch.create("vit-nano(resolution=8)+pixel-transformer", classes=5, seed=0)
    model = pixel.masked_autoencoder(host, width=32, depth=1, heads=4)
    images = torch.rand(2, 3, 8, 8)
    result = model(images, torch.Generator().manual_seed(0))
    assert result.prediction.shape == (2, 64, 3)
    assert result.mask.sum(1).tolist() == [48, 48]
    target = images.flatten(2).transpose(1, 2)
    wanted = (result.prediction - target).square().mean(-1)[result.mask].mean()
    torch.testing.assert_close(result.loss, wanted)
    with pytest.raises(PolypatchError, match="patches of 4 pixels"):
        pixel.masked_autoencoder(polypatch.create("vit-nano", classes=5))


# In a process of its own: here, signatures are checked at run time, which can't be compiled.
COMPILED = """
import torch
from polypatch import create

image = torch.rand(2, 3, 8, 8)
for spec in ("vit-nano(resolution=8)+pixel-transformer",):
    model = create(spec, classes=5, seed=0).eval()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(image), model(image), atol=1e-4, rtol=1e-4)
"""


@pytest.mark.slow
def test_compiles_whole():
    subprocess.run([sys.executable, "-c", COMPILED], check=True)
