"""Windows, steps that reuse memory, folded norms, input requirements, the dense head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import polypatch
from polypatch.errors import PolypatchError
from polypatch.nn import (
    ConvNorm,
    DenseHead,
    FeatureInfo,
    FeatureMap,
    InputRequirements,
    Segmenter,
    folded,
    fresh,
    merge_windows,
    pad_to,
    pad_to_windows,
    windows_of,
)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_windows_and_back(height, width, tall, wide):
    x = torch.arange(2.0 * height * width * 3).view(2, height, width, 3)
    padded = pad_to_windows(x, (tall, wide))
    assert padded.shape[1] % tall == padded.shape[2] % wide == 0
    assert torch.equal(padded[:, :height, :width], x)
    assert padded[:, height:].abs().sum() == padded[:, :, width:].abs().sum() == 0
    windows = windows_of(padded, (tall, wide))
    again = merge_windows(windows, (tall, wide), (padded.shape[1], padded.shape[2]))
    assert torch.equal(again, padded)
    # literally: the first window of the second sample
    first = len(windows) // 2
    assert torch.equal(windows[first], padded[1, :tall, :wide].reshape(-1, 3))


STEPS = {
    "gelu": (lambda f, x, s: fresh.gelu(f), lambda f, x, s: F.gelu(f)),
    "relu": (lambda f, x, s: fresh.relu(f), lambda f, x, s: F.relu(f)),
    "silu": (lambda f, x, s: fresh.silu(f), lambda f, x, s: F.silu(f)),
    "add": (lambda f, x, s: fresh.add(x, f), lambda f, x, s: x + f),
    "add_scaled": (lambda f, x, s: fresh.add_scaled(x, f, s), lambda f, x, s: x + f * s),
    "affine": (lambda f, x, s: fresh.affine(f, s, s), lambda f, x, s: f * s + s),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("mixed", [False, True])
def test_steps_that_reuse_memory(name, mixed):
    ours, plain = STEPS[name]
    value, x, scale = torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(4)
    if mixed:  # an autocast branch beside a float32 residual
        value = value.bfloat16()
    wanted = plain(value, x, scale)
    with torch.no_grad():
        mine = value.clone()
        result = ours(mine, x.clone(), scale)
    assert result.dtype == wanted.dtype
    torch.testing.assert_close(result, wanted)
    if not mixed:
        assert result.data_ptr() == mine.data_ptr(), "nothing was saved"
    kept = value.clone().requires_grad_()
    before = kept.detach().clone()
    ours(kept, x, scale).sum().backward()
    assert torch.equal(kept.detach(), before)
    assert kept.grad is not None


def test_a_norms_affine_form_and_folding():
    torch.manual_seed(0)
    layer = ConvNorm(3, 6, kernel=3, stride=2, activation=F.relu)
    layer.norm.running_mean.normal_()
    layer.norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    model = nn.Sequential(layer).eval()
    x = torch.randn(2, 3, 9, 9)
    once = folded(model)
    torch.testing.assert_close(once(x), model(x), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in once.modules())
    assert isinstance(layer.norm, nn.BatchNorm2d), "the original stays trainable"
    scale, shift = fresh.affine_of(layer.norm)
    y = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(
        y * scale[:, None, None] + shift[:, None, None], layer.norm(y), rtol=1e-4, atol=1e-5
    )


def test_input_requirements_say_the_nearest_right_size():
    needs = InputRequirements(multiple_of=8, minimum=16)
    assert needs.nearest(3, 41) == (16, 48)
    assert InputRequirements(multiple_of=8, square=True).nearest(9, 30) == (32, 32)
    assert InputRequirements(exact=(7, 9)).nearest(100, 1) == (7, 9)
    needs.check(torch.zeros(1, 3, 16, 24))
    with pytest.raises(PolypatchError, match="17×24; cswin takes sides that are multiples of 8"):
        needs.check(torch.zeros(1, 3, 17, 24), name="cswin")
    image = torch.randn(1, 3, 17, 30)
    padded = pad_to(image, needs)
    assert padded.shape[2:] == (24, 32)
    assert torch.equal(padded[:, :, :17, :30], image)
    assert torch.equal(padded[:, :, 17:, :30], image[:, :, -1:].expand(-1, -1, 7, -1))
    with pytest.raises(PolypatchError, match="takes 7×9"):
        pad_to(image, InputRequirements(exact=(7, 9)))


def test_the_dense_head_literally():
    """Equation 4 of SegFormer, one map and one place at a time."""
    torch.manual_seed(0)
    head = DenseHead([FeatureInfo(3, 4), FeatureInfo(5, 8)], classes=2, width=6).eval()
    fine, coarse = torch.randn(1, 3, 4, 4), torch.randn(1, 5, 2, 2)
    out = head([FeatureMap(fine, 4), FeatureMap(coarse, 8)])
    assert out.shape == (1, 2, 4, 4)
    large = F.interpolate(coarse, size=(4, 4), mode="bilinear")

    def linear(layer, vector):
        bias = 0 if layer.bias is None else layer.bias
        return layer.weight.flatten(1) @ vector + bias

    for y, x in ((0, 0), (1, 3), (3, 2)):
        parts = [
            linear(head.project[0], fine[0, :, y, x]), linear(head.project[1], large[0, :, y, x])
        ]  # fmt: skip
        fused = F.relu(F.layer_norm(linear(head.fuse, torch.cat(parts)), (6,)))
        torch.testing.assert_close(out[0, :, y, x], linear(head.classify, fused))


@pytest.mark.parametrize("size", [(33, 50), (32, 32), (7, 90)])
def test_a_segmenter_takes_any_size(size):
    model = Segmenter(polypatch.create("convmixer-nano", classes=0, seed=0), classes=3).eval()
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert model(image).shape == (2, 3, *size)
    spared = model.no_decay()
    assert spared < {n for n, _ in model.named_parameters()}
    with pytest.raises(PolypatchError, match="gives no dense maps"):
        Segmenter(nn.Linear(2, 2), classes=3)
