from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import polypatch
from polypatch import PolypatchError
from polypatch.nn import patchify
from polypatch.pretraining.mae import MaskedAutoencoder, normalised_patches, random_masking


def autoencoder(spec="vit-nano", seed=0, **options):
    host = polypatch.create(spec, classes=0, seed=seed)
    return MaskedAutoencoder(encoder=host, width=32, depth=2, heads=4, **options)


def first(count):
    """A masking that keeps the first tokens."""
    return lambda tokens, keep, generator: torch.arange(count).expand(tokens.batch, -1)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_loss_is_the_mean_over_hidden_patches(norm_pix):
    model = autoencoder(norm_pix=norm_pix)
    images = torch.rand(3, 3, 32, 32)
    result = model(images, torch.Generator().manual_seed(0))
    assert result.mask.sum(1).tolist() == [48] * 3  # 75 % of 64
    total, patches = 0.0, 0
    for sample in range(3):
        for index in range(64):
            row, column = divmod(index, 8)
            pixels = images[sample, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            target = pixels.permute(1, 2, 0).flatten()
            if norm_pix:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            each = (result.prediction[sample, index] - target).square().mean()
            torch.testing.assert_close(result.per_patch[sample, index], each, atol=1e-5, rtol=1e-4)
            if result.mask[sample, index]:
                total, patches = total + each, patches + 1
    torch.testing.assert_close(result.loss, total / patches)


def test_hidden_patches_are_not_seen():
    model = autoencoder(norm_pix=False, masking=first(16)).eval()
    images = torch.rand(2, 3, 32, 32)
    seen = model(images)
    other = images.clone()
    other[:, :, 8:] = torch.rand(2, 3, 24, 32)  # the first 16 of 64 patches are the upper rows
    torch.testing.assert_close(model(other).prediction, seen.prediction)
    other = images.clone()
    other[:, :, 0, 0] += 1
    assert (model(other).prediction - seen.prediction).abs().max() > 1e-4


def test_the_order_of_the_visible_patches_does_not_matter():
    model = autoencoder().eval()
    images = torch.rand(2, 3, 32, 32)
    order = torch.stack([torch.randperm(64)[:16] for _ in range(2)])
    forward = model(images, masking=lambda *_: order)
    backward = model(images, masking=lambda *_: order.flip(1))
    assert torch.equal(forward.mask, backward.mask)
    torch.testing.assert_close(forward.prediction, backward.prediction, atol=1e-5, rtol=1e-4)


def test_predictions_know_where_they_are():
    model = autoencoder(masking=first(16)).eval()
    prediction = model(torch.rand(1, 3, 32, 32)).prediction[0, 16:]
    # Mask tokens are the same; the decoder's positions tell them apart.
    assert torch.pdist(prediction).min() > 1e-5


def test_random_masking_is_uniform_and_repeats():
    host = polypatch.create("vit-nano", classes=0, seed=0)
    tokens = host.patching(torch.rand(500, 3, 16, 16))
    kept = random_masking(tokens, 4, torch.Generator().manual_seed(1))
    assert kept.shape == (500, 4)
    assert all(len(set(row)) == 4 for row in kept.tolist())
    share = torch.bincount(kept.flatten(), minlength=16) / 500
    assert (share - 0.25).abs().max() < 0.08
    assert torch.equal(kept, random_masking(tokens, 4, torch.Generator().manual_seed(1)))
    assert not torch.equal(kept, random_masking(tokens, 4, torch.Generator().manual_seed(2)))


def test_a_masking_for_one_call():
    model = autoencoder()
    images = torch.rand(2, 3, 32, 32)
    seen = []

    def even(tokens, keep, generator):
        seen.append((tokens.grid, keep))
        return (2 * torch.arange(keep)).expand(tokens.batch, -1)

    result = model(images, masking=even)
    assert seen == [((8, 8), 16)]
    assert (~result.mask[0]).nonzero().flatten().tolist() == list(range(0, 32, 2))


def test_normalised_patches():
    patches = normalised_patches(5 + 3 * torch.randn(2, 4, 48))
    torch.testing.assert_close(patches.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches.var(-1), torch.ones(2, 4), atol=1e-4, rtol=0)
    assert normalised_patches(torch.ones(1, 1, 48)).isfinite().all()


@pytest.mark.parametrize(
    "spec",
    ["vit-nano", "vit-nano(pooling=mean,position=rope)", "vit-nano(registers=2,position=sincos)",
     "vit-nano+dual-patchnorm"],
)  # fmt: skip
def test_gradients_reach_every_parameter_that_takes_part(spec):
    model = autoencoder(spec).train()
    model(torch.rand(4, 3, 32, 32)).loss.backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert value.grad.abs().max() > 0, name


def test_the_host_is_trained_in_place():
    host = polypatch.create("vit-nano", classes=5, seed=0)
    model = MaskedAutoencoder(encoder=host, width=32, depth=1, heads=4)
    before = host(torch.ones(1, 3, 32, 32)).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.rand(4, 3, 32, 32)).loss.backward()
    optimizer.step()
    assert (host(torch.ones(1, 3, 32, 32)) - before).abs().max() > 1e-4


def test_it_learns():
    torch.manual_seed(0)
    model = autoencoder(norm_pix=False)
    ramp = torch.linspace(0, 1, 32)
    images = (ramp[:, None] + ramp)[None, None].expand(8, 3, -1, -1) / 2
    images = images * torch.linspace(0.5, 1, 8)[:, None, None, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(120):
        loss = model(images, torch.Generator().manual_seed(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Better than predicting the mean colour of all images.
    assert losses[-1] < 0.5 * images.var().item() < losses[0]


def test_odd_and_oblong_images_are_padded():
    model = autoencoder()
    images = torch.rand(1, 3, 30, 41)
    result = model(images)
    assert result.mask.shape == (1, 8 * 11)
    assert model.padded(images).shape == (1, 3, 32, 44)
    assert model.picture(images, result).shape == images.shape


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_picture_of_a_perfect_prediction_is_the_image(norm_pix):
    model = autoencoder(norm_pix=norm_pix)
    images = torch.rand(2, 3, 32, 32)
    result = model(images)
    target = model.target(images)
    perfect = type(result)(result.loss, target, result.mask, result.per_patch)
    torch.testing.assert_close(model.picture(images, perfect), images, atol=1e-5, rtol=0)
    assert torch.equal(target, patchify(images, (4, 4))) != norm_pix


def test_bfloat16():
    model = autoencoder().eval()
    images = torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(images).loss
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert model.bfloat16()(images.bfloat16()).loss.isfinite()


def test_weight_decay_leaves_tokens_and_norms_alone():
    names = autoencoder().no_decay()
    assert {"encoder.position.table", "decoder.mask_token", "decoder.norm.weight"} <= names
    assert "decoder.head.weight" not in names


def test_bad_settings():
    with pytest.raises(PolypatchError, match="mask_ratio"):
        autoencoder(mask_ratio=1.0)
    host = polypatch.create("vit-nano", classes=0)
    with pytest.raises(PolypatchError, match="width"):
        MaskedAutoencoder(encoder=host, width=30, heads=4)
    with pytest.raises(PolypatchError, match="leaves none to see"):
        autoencoder(mask_ratio=0.95)(torch.rand(1, 3, 8, 8))
    with pytest.raises(PolypatchError, match="regular grid"):
        autoencoder("vit-nano+dart")(torch.rand(1, 3, 32, 32))


def test_the_papers_decoder():
    host = polypatch.create("vit-nano", classes=0)
    with torch.device("meta"):
        model = MaskedAutoencoder(encoder=host)  # 512 wide, 8 blocks, 16 heads
    width, values = 512, 48
    block = 12 * width**2 + 13 * width
    wanted = (64 + 1) * width + width + 8 * block + 2 * width + (width + 1) * values
    assert sum(p.numel() for p in model.decoder.parameters()) == wanted


# In a process of its own: here, signatures are checked at run time, which can't be compiled.
COMPILED = """
import torch
from polypatch import create
from polypatch.pretraining.mae import MaskedAutoencoder

host = create("vit-nano", classes=0, seed=0)
model = MaskedAutoencoder(encoder=host, width=32, depth=2, heads=4).eval()
images = torch.rand(2, 3, 32, 32)
visible = torch.stack([torch.randperm(64)[:16] for _ in range(2)])
compiled = torch.compile(model, fullgraph=True)
ours = compiled(images, masking=lambda *_: visible).loss
torch.testing.assert_close(ours, model(images, masking=lambda *_: visible).loss)
"""


@pytest.mark.slow
def test_compiles_whole():
    subprocess.run([sys.executable, "-c", COMPILED], check=True)
