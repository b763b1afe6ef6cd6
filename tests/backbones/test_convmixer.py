"""ConvMixer: its equations, its traps, its variants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from polypatch import create
from polypatch.backbones import convmixer
from polypatch.backbones.convmixer import ConvMixer
from polypatch.errors import PolypatchError


def lived_in(model: ConvMixer) -> ConvMixer:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif value.is_floating_point():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


def literal(model: ConvMixer, image: torch.Tensor, *, act) -> torch.Tensor:
    """Equations 1 to 3, in the plain layout, one operation after the other."""

    def norm(layer, x):
        mean, var = layer.running_mean, layer.running_var
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return x * layer.weight[:, None, None] + layer.bias[:, None, None]

    z = norm(model.stem_norm, act(F.conv2d(image, model.stem.weight, model.stem.bias, model.patch)))
    for layer in model.layers:
        k = layer.depthwise.kernel_size[0]
        before, behind = (k - 1) // 2, k // 2  # the odd zero goes below and to the right
        padded = F.pad(z, (before, behind, before, behind))
        mixed = F.conv2d(padded, layer.depthwise.weight, layer.depthwise.bias, groups=model.dim)
        y = z + norm(layer.norm1, act(mixed))
        weight = layer.pointwise.weight[:, :, None, None]
        z = norm(layer.norm2, act(F.conv2d(y, weight, layer.pointwise.bias)))
    return F.linear(z.mean((2, 3)), model.head.weight, model.head.bias)


@pytest.mark.parametrize("kernel", [1, 4, 5])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_the_equations(kernel, activation):
    model = lived_in(
        ConvMixer(dim=8, depth=2, kernel=kernel, patch=3, classes=4, activation=activation)
    )
    image = torch.randn(2, 3, 20, 25)
    act = {"gelu": F.gelu, "relu": F.relu}[activation]
    wanted = literal(model, image, act=act)
    torch.testing.assert_close(model(image), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(image), wanted, rtol=1e-4, atol=1e-5)


def test_the_remainder_of_the_image_is_dropped():
    model = lived_in(ConvMixer(dim=8, depth=1, kernel=3, patch=4, classes=2))
    image = torch.randn(1, 3, 11, 14)
    other = image.clone()
    other[:, :, 8:] = 0
    other[:, :, :, 12:] = 5
    assert torch.equal(model(image), model(other))
    with pytest.raises(PolypatchError, match="at least 4"):
        model(torch.randn(1, 3, 3, 8))


@pytest.mark.parametrize(
    ("name", "millions"),
    # table 1, to its precision; exact counts are checked against the authors' code
    [("convmixer-1536-20", 51.6), ("convmixer-768-32", 21.1), ("convmixer-1024-20", 24.4)],
)
def test_published_sizes(name, millions):
    with torch.device("meta"):
        model = create(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@settings(max_examples=15, deadline=None)
@given(
    dim=st.integers(2, 9), depth=st.integers(1, 4), kernel=st.integers(1, 6),
    patch=st.integers(1, 5), classes=st.integers(1, 5),
    activation=st.sampled_from(["gelu", "relu"]),
)  # fmt: skip
def test_configurations_come_back_from_the_weights(**drawn):
    model = lived_in(ConvMixer(**drawn))
    state = convmixer.to_official(model)
    found = convmixer.recognise({k: tuple(v.shape) for k, v in state.items()})
    assert found | {"activation": drawn["activation"]} == convmixer.official_config(model)
    again = convmixer.from_official(found | {"activation": drawn["activation"]}, state)
    image = torch.randn(1, 3, 12, 13)
    torch.testing.assert_close(again(image), model(image))


def test_the_published_relu_weights_are_known_by_their_size():
    with torch.device("meta"):
        state = convmixer.to_official(create("convmixer-768-32"))
    found = convmixer.recognise({k: tuple(v.shape) for k, v in state.items()})
    assert found["activation"] == "relu"


def test_options():
    model = create("convmixer-nano(dim=24,depth=2,kernel=3,patch=8,activation=relu)", classes=3)
    assert (model.dim, len(model.layers), model.patch) == (24, 2, 8)
    assert [m.map.shape[1:] for m in model.features(torch.randn(1, 3, 16, 24))] == [(24, 2, 3)] * 2
    with pytest.raises(PolypatchError, match="no activation 'silu'"):
        create("convmixer-nano(activation=silu)")
    with pytest.raises(PolypatchError, match="depth counts from 1"):
        create("convmixer-nano(depth=0)")
