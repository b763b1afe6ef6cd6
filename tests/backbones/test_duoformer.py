"""DuoFormer: windows and their order, local and global attention, its ResNet, its weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from polypatch import create
from polypatch.backbones import duoformer
from polypatch.backbones.duoformer import cells_of_windows, windows_of_cells
from polypatch.backbones.duoformer_resnet import RESNETS, ResNet
from polypatch.errors import PolypatchError


def lived_in(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif value.is_floating_point():
                size = 0.1 if value.ndim <= 1 else 0.4 * value[0].numel() ** -0.5
                value.add_(size * torch.randn(value.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_windows_hold_their_cells(side):
    rows, columns = 2, 3
    x = torch.arange(2 * rows * side * columns * side * 1.0).view(2, rows * side, columns * side, 1)
    windows = windows_of_cells(x, side)
    assert windows.shape == (2, 6, side * side, 1)
    for r in range(rows):
        for c in range(columns):
            cells = x[1, r * side : (r + 1) * side, c * side : (c + 1) * side, 0]
            # column by column at side 2, row by row elsewhere
            wanted = cells.T.flatten() if side == 2 else cells.flatten()
            assert torch.equal(windows[1, r * columns + c, :, 0], wanted)
    assert torch.equal(cells_of_windows(windows, side, (rows, columns)), x)


def attention(layer, x, heads):
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, -1)
    parts = []
    for q_h, k_h, v_h in zip(*(t.chunk(heads, -1) for t in (q, k, v))):
        parts.append((q_h @ k_h.T / q_h.shape[-1] ** 0.5).softmax(-1) @ v_h)
    return torch.cat(parts, -1) @ layer.proj.weight.T + layer.proj.bias


@pytest.mark.parametrize("normed", [False, True])
def test_the_encoder_window_by_window(normed):
    model = lived_in(create(f"duoformer-nano(normed_head={normed})", classes=3, seed=0))
    image = torch.randn(1, 3, 64, 64)
    tokens = model.window_tokens(image)[0]
    assert tokens.shape == (4, 86, 48)
    encoder, heads = model.encoder, model.heads
    behind = []
    for window in tokens:
        x = window + encoder.scale_position[0, 0]
        for block in encoder.scale_blocks:
            x = x + attention(block.attn, block.norm1(x), heads)
            hidden = F.gelu(block.mlp.fc1(block.norm2(x)))
            x = x + block.mlp.fc2(hidden)
        behind.append(x[0])
    z = torch.stack([encoder.class_token[0, 0], *behind])
    z = z + torch.cat([encoder.class_position[0], encoder.position[0].flatten(0, 1)])
    for block in encoder.patch_blocks:
        z = attention(block.attn, z, heads)  # no norm, no residual
    first = encoder.norm(z[0]) if normed else z[0]
    torch.testing.assert_close(model(image)[0], model.head(first), rtol=1e-3, atol=1e-4)


def test_windows_are_strangers_until_the_global_blocks():
    model = lived_in(create("duoformer-nano", classes=3, seed=0))
    x = torch.randn(1, 4, 86, 48)
    other = x.clone()
    other[:, 3] += 1
    local = model.encoder.local
    plain = local(x, lambda block, x: block(x))
    changed = local(other, lambda block, x: block(x))
    assert torch.equal(plain[:, :3], changed[:, :3])
    assert not torch.equal(plain[:, 3], changed[:, 3])


@pytest.mark.parametrize("kind", ["r18", "r50", "nano"])
def test_the_resnet(kind):
    """Strides, widths, and a literal forward of every block."""
    torch.manual_seed(0)
    net = ResNet(RESNETS[kind])
    net.init_weights()
    net.eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = net(image)
    assert [m.shape[1:] for m in maps] == [
        (dim, 64 // stride, 96 // stride) for dim, stride in zip(RESNETS[kind].dims, (4, 8, 16, 32))
    ]

    def conv_norm(layer, x, act):
        x = F.conv2d(x, layer.conv.weight, None, layer.conv.stride, layer.conv.padding)
        n = layer.norm
        x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias)
        return F.relu(x) if act else x

    x = F.max_pool2d(conv_norm(net.stem, image, True), 3, 2, 1)
    for stage in net.stages:
        for block in stage:
            y = x
            for k, layer in enumerate(block.convs):
                y = conv_norm(layer, y, k < len(block.convs) - 1)
            short = x if isinstance(block.shortcut, torch.nn.Identity) else None
            x = F.relu(y + (conv_norm(block.shortcut, x, False) if short is None else x))
    torch.testing.assert_close(maps[-1], x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "millions"), [("r18", 11.69), ("r50", 25.56)])
def test_sizes_of_the_resnets(kind, millions):
    """As published, with the classifier of 1,000 classes that ours lack."""
    with torch.device("meta"):
        net = ResNet(RESNETS[kind])
    head = 1000 * (RESNETS[kind].dims[-1] + 1)
    total = sum(p.numel() for p in net.parameters()) + head
    assert total / 1e6 == pytest.approx(millions, abs=0.005)


def test_a_resnet_to_start_from():
    model = create("duoformer-nano", classes=3, seed=0)
    source = ResNet(RESNETS["nano"])
    source.init_weights()
    rules = {
        "stem.conv": "conv1", "stem.norm": "bn1",
        ".convs.0.conv": ".conv1", ".convs.0.norm": ".bn1",
        ".convs.1.conv": ".conv2", ".convs.1.norm": ".bn2", ".shortcut.conv": ".downsample.0",
        ".shortcut.norm": ".downsample.1",
    }  # fmt: skip
    state = {}
    for name, value in source.state_dict().items():
        for ours, theirs in rules.items():
            name = name.replace(ours, theirs)
        for stage in range(4):
            name = name.replace(f"stages.{stage}.", f"layer{stage + 1}.")
        state[name] = value
    state["fc.weight"] = torch.zeros(1000, 128)
    duoformer.load_resnet(model, state)
    for name, value in source.state_dict().items():
        assert torch.equal(model.resnet.state_dict()[name], value), name
    del state["layer2.0.conv1.weight"]
    with pytest.raises(PolypatchError, match="missing keys"):
        duoformer.load_resnet(model, state)


@pytest.mark.parametrize("scales", [2, 3, 4])
@pytest.mark.parametrize("token", ["random", "channel"])
def test_configurations_come_back_from_the_weights(scales, token):
    spec = f"duoformer-nano(scales={scales},scale_token={token},depth=1)"
    model = lived_in(create(spec, classes=4, resolution=96, seed=0))
    state = duoformer.to_official(model)
    found = duoformer.recognise({k: tuple(v.shape) for k, v in state.items()})
    config = duoformer.official_config(model)
    assert {k: v for k, v in found.items() if k not in duoformer.ASSUMED} == {
        k: v for k, v in config.items() if k not in duoformer.ASSUMED
    }
    again = duoformer.from_official(config, state)
    image = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(again(image), model(image))
    strides = [stride for _, stride in model.features(image)]
    assert strides == [32 >> k for k in range(scales)][::-1]


def test_freezing():
    model = create("duoformer-nano(freeze=true)", classes=3, seed=0).train()
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is None for p in model.resnet.parameters())
    assert model.head.weight.grad is not None


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("duoformer-nano(scales=5)", "2, 3 or 4 scales"),
        ("duoformer-nano(scale_token=chanel)", "did you mean"),
        ("duoformer-nano(depth=0)", "depth counts from 1"),
    ],
)
def test_bad_options(spec, said):
    with pytest.raises(PolypatchError, match=said):
        create(spec)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"backbone": "r101"}, "no backbone 'r101'"),
        ({"proj_dim": 10}, "must be embed_dim"),
        ({"num_patches": 50}, "no square"),
        ({"attn_drop_rate": 0.1}, "not part of DuoFormer"),
        ({"num_heads": 5}, "does not divide into 5 heads"),
    ],
)
def test_bad_configurations(config, said):
    with pytest.raises(PolypatchError, match=said), torch.device("meta"):
        duoformer.network({"depth": 1, **config})
