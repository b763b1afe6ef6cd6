from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import polypatch
from polypatch import PolypatchError
from polypatch.hosts import build_vit
from polypatch.nn import linear_of
from polypatch.patching import dual_patchnorm as dpn


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_it_is_two_norms_around_the_projection():
    model = polypatch.create("vit-nano+dual-patchnorm", classes=5, seed=0)
    embed = model.patching.embed
    for value in (embed.before.weight, embed.before.bias, embed.after.weight, embed.after.bias):
        value.data.normal_()
    image = torch.rand(1, 3, 8, 12)
    tokens = model.patching(image)
    for row in range(2):
        for column in range(3):
            patch = image[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            x = patch.permute(1, 2, 0).flatten()  # row, column, channel
            x = (x - x.mean()) / (x.var(correction=0) + 1e-6).sqrt()
            x = x * embed.before.weight + embed.before.bias
            z = embed.linear.weight @ x + embed.linear.bias
            z = (z - z.mean()) / (z.var(correction=0) + 1e-6).sqrt()
            z = z * embed.after.weight + embed.after.bias
            torch.testing.assert_close(tokens.x[0, 3 * row + column], z, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", ["nano", "tiny"])
@pytest.mark.parametrize(
    ("placement", "norm", "inputs", "outputs"),
    [
        ("dual", "layer", 2, 2),
        ("pre", "layer", 2, 0),
        ("post", "layer", 0, 2),
        ("post-position", "layer", 0, 2),
        ("dual", "rms", 1, 1),
        ("dual", "scale-bias", 2, 2),
        ("dual", "no-affine", 0, 0),
    ],
)
def test_parameters_that_it_adds(size, placement, norm, inputs, outputs):
    plain = build_vit(size, classes=10)
    host = build_vit(size, classes=10)
    dpn.plug(host, placement=placement, norm=norm)
    values, dim = host.patch**2 * 3, host.dim
    assert count(host) - count(plain) == inputs * values + outputs * dim
    if (size, placement, norm) == ("tiny", "dual", "layer"):
        assert count(host) - count(plain) == 2 * (768 + 192)


def test_a_hosts_convolution_becomes_the_same_linear_map():
    plain = build_vit("nano", classes=5)
    host = dpn.plug(build_vit("nano", classes=5), placement="post", norm="scale-bias")
    host.patching.embed.linear = linear_of(plain.patching.proj)
    for size in ((32, 32), (30, 41)):  # padded alike
        image = torch.rand(2, 3, *size)
        ours, theirs = host.patching(image).check(), plain.patching(image)
        torch.testing.assert_close(ours.x, theirs.x, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.centre, theirs.centre)
        assert (ours.grid, ours.canvas) == (theirs.grid, theirs.canvas)


def test_neutral_norms_change_nothing():
    plain = polypatch.create("vit-nano", classes=5, seed=0)
    host = polypatch.create("vit-nano+dual-patchnorm(norm=scale-bias)", classes=5, seed=0)
    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(host(image), plain(image), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("placement", ["pre", "dual"])
def test_brightness_and_contrast_of_a_patch_do_not_matter(placement):
    host = polypatch.create(
        f"vit-nano+dual-patchnorm(norm=no-affine,placement={placement})", classes=5, seed=0
    ).eval()
    image = torch.rand(2, 3, 32, 32)
    gain = F.interpolate(1 + torch.rand(2, 1, 8, 8), scale_factor=4)
    shift = F.interpolate(torch.randn(2, 1, 8, 8), scale_factor=4)
    torch.testing.assert_close(host(image * gain + shift), host(image), atol=1e-3, rtol=1e-3)


def test_constant_patches_have_finite_gradients():
    host = polypatch.create("vit-nano+dual-patchnorm", classes=5, seed=0)
    image = torch.zeros(1, 3, 32, 32, requires_grad=True)
    host(image).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()


def test_post_position_norms_the_sum_of_patch_and_position():
    host = polypatch.create("vit-nano+dual-patchnorm(placement=post-position)", classes=5, seed=0)
    image = torch.rand(2, 3, 32, 32)
    tokens = host.tokens(image)
    inner = host.position.position(host.patching(image)).x
    torch.testing.assert_close(tokens.placed, F.layer_norm(inner, (64,), eps=1e-6))
    prefix = host.prefix.tokens + host.prefix.position  # the class token passes no norm
    torch.testing.assert_close(tokens.x[:, :1], prefix.expand(2, -1, -1))
    rope = polypatch.create(
        "vit-nano(position=rope)+dual-patchnorm(placement=post-position)", classes=5, seed=0
    )
    assert rope.context(rope.tokens(image)).rotation is not None


@pytest.mark.parametrize("placement", dpn.PLACEMENTS)
@pytest.mark.parametrize("norm", dpn.NORMS)
def test_gradients_reach_every_parameter(placement, norm):
    host = polypatch.create(
        f"vit-nano+dual-patchnorm(placement={placement},norm={norm})", classes=5, seed=0
    ).train()
    host(torch.rand(4, 3, 32, 32)).square().sum().backward()
    for name, value in host.named_parameters():
        assert value.grad is not None, name
        assert value.grad.abs().max() > 0, name


def test_norms_and_positions_have_no_weight_decay():
    host = polypatch.create("vit-nano+dual-patchnorm", classes=5, seed=0)
    names = host.no_decay()
    assert {"patching.embed.before.weight", "patching.embed.after.bias"} <= names
    assert "patching.embed.linear.weight" not in names


def test_bfloat16_and_batch_of_one():
    host = polypatch.create("vit-nano+dual-patchnorm", classes=5, seed=0).eval()
    image = torch.rand(1, 3, 30, 35)
    wanted = host(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (host(image).float() - wanted).abs().max() < 0.1
    assert (host.bfloat16()(image.bfloat16()).float() - wanted).abs().max() < 0.2


def test_initialisation_can_be_repeated():
    host = polypatch.create("vit-nano+dual-patchnorm(norm=rms)", classes=5, seed=0)
    host.patching.embed.before.weight.data.normal_()
    host.init_weights()
    assert (host.patching.embed.before.weight == 1).all()
    assert abs(host.patching.embed.linear.weight.std().item() - 48**-0.5) < 0.02


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("vit-nano+dual-patchnorm(placement=both)", "placement"),
        ("vit-nano+dual-patchnorm(norm=layr)", "did you mean layer"),
        ("vit-nano+dual-patchnorm+dual-patchnorm", "NormedPatching"),
        ("vit-nano+pixel-transformer+dual-patchnorm", "3 values"),
    ],
)
def test_bad_options(spec, said):
    with pytest.raises(PolypatchError, match=said):
        polypatch.create(spec, classes=5)


def test_small_images_are_refused():
    host = polypatch.create("vit-nano+dual-patchnorm", classes=5)
    with pytest.raises(PolypatchError, match="smaller than one patch"):
        host(torch.rand(1, 3, 3, 8))


def test_gradient_norms():
    image = torch.rand(8, 3, 32, 32)
    for spec in ("vit-nano", "vit-nano+dual-patchnorm", "vit-nano+dart+dual-patchnorm"):
        host = polypatch.create(spec, classes=5, seed=0)
        with pytest.raises(PolypatchError, match="no gradients"):
            dpn.gradient_norms(host)
        host(image).logsumexp(1).sum().backward()
        norms = dpn.gradient_norms(host)
        assert len(norms.blocks) == 4
        squares = sum(p.grad.square().sum() for p in host.blocks[2].parameters())
        assert norms.blocks[2] == pytest.approx(squares.sqrt().item(), rel=1e-4)
        assert norms.ratio == pytest.approx(norms.embedding / sorted(norms.blocks)[1], rel=1e-4)


def test_bright_images_raise_the_plain_embeddings_gradient_only():
    # What the norms are for: the projection's gradient grows with its input in a plain ViT.
    ratios = {}
    for spec in ("vit-nano", "vit-nano+dual-patchnorm"):
        for brightness in (0.0, 5.0):
            host = polypatch.create(spec, classes=5, seed=0)
            generator = torch.Generator().manual_seed(0)
            image = torch.randn(16, 3, 32, 32, generator=generator) + brightness
            host(image).logsumexp(1).sum().backward()
            ratios[spec, brightness] = dpn.gradient_norms(host).ratio
    assert ratios["vit-nano", 5.0] > 2 * ratios["vit-nano", 0.0]
    normed = ratios["vit-nano+dual-patchnorm", 5.0] / ratios["vit-nano+dual-patchnorm", 0.0]
    assert normed == pytest.approx(1, abs=0.05)


def test_the_input_scale_is_a_picture():
    host = polypatch.create("vit-nano+dual-patchnorm", classes=5)
    host.patching.embed.before.weight.data.copy_(torch.arange(48.0))
    picture = dpn.input_scale(host)
    assert picture.shape == (4, 4, 3)
    assert picture[1, 2, 0] == 1 * 12 + 2 * 3
    with pytest.raises(PolypatchError, match="no learned scale"):
        dpn.input_scale(polypatch.create("vit-nano+dual-patchnorm(placement=post)", classes=5))


# In a process of its own: here, signatures are checked at run time, which can't be compiled.
COMPILED = """
import torch
from polypatch import create

image = torch.rand(2, 3, 32, 32)
for spec in ("vit-nano+dual-patchnorm",):
    model = create(spec, classes=5, seed=0).eval()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(image), model(image), atol=1e-4, rtol=1e-4)
"""


@pytest.mark.slow
def test_compiles_whole():
    subprocess.run([sys.executable, "-c", COMPILED], check=True)
