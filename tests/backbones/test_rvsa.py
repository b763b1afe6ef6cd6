"""RVSA: moving windows against slow versions; ViTAE; dense maps; pre-training; weights."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from polypatch import create
from polypatch.backbones import rvsa
from polypatch.backbones.rvsa import RVSA
from polypatch.backbones.rvsa_attention import FullAttention, WindowAttention, table_bias
from polypatch.backbones.rvsa_network import Block, LocalBranch
from polypatch.backbones.rvsa_pretraining import LocalBlock
from polypatch.errors import PolypatchError
from polypatch.hosts.vit import assemble_vit
from polypatch.nn import load_exactly
from polypatch.pretraining.mae import MaskedAutoencoder


def lived_in(module: nn.Module) -> Any:
    """Weights, gains and statistics that hide nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in module.parameters():
            drawn = torch.randn(value.shape, generator=generator)
            value.copy_(0.4 * drawn if value.ndim == 1 else drawn / value[0].numel() ** 0.5)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(0, 0.2, generator=generator)
                norm.running_var.uniform_(0.5, 1.5, generator=generator)
            elif isinstance(norm, nn.LayerNorm):
                norm.weight.add_(1)
    return module.eval()


# ---- windows -------------------------------------------------------------------------------------


def bilinear(maps: Tensor, y: float, x: float) -> Tensor:
    """A map (height, width, dim) at a place between cells; zeros beyond it."""
    value = torch.zeros(maps.shape[2])
    for a, b in itertools.product((0, 1), (0, 1)):
        row, column = math.floor(y) + a, math.floor(x) + b
        if 0 <= row < maps.shape[0] and 0 <= column < maps.shape[1]:
            value = value + maps[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return value


def literal_windows(module: WindowAttention, x: Tensor) -> Tensor:
    """One map (height, width, dim), query by query; places in cells of the padded map."""
    height, width, dim = x.shape
    w, heads, d = module.window, module.heads, dim // module.heads
    rows, columns = -(-height // w), -(-width // w)
    top, left = (rows * w - height) // 2, (columns * w - width) // 2
    inside = (slice(top, top + height), slice(left, left + width))

    def padded(maps: Tensor) -> Tensor:
        whole = torch.zeros(rows * w, columns * w, maps.shape[2])
        whole[inside] = maps
        return whole

    whole = padded(x)
    qkv = F.linear(x, module.qkv.weight, module.biases())
    q, k, v = (padded(part) for part in qkv.chunk(3, dim=-1))
    across = torch.tensor([rows * w - 1.0, columns * w - 1.0]) / 2  # cells to a unit, y and x
    out = torch.zeros_like(whole)
    for row, column, head in itertools.product(range(rows), range(columns), range(heads)):
        cells = [(row * w + i, column * w + j) for i in range(w) for j in range(w)]
        part = slice(head * d, (head + 1) * d)
        mean = torch.stack([whole[cell] for cell in cells]).mean(0)
        geometry = module.sample(F.leaky_relu(mean)).view(module.sets, 5 * heads)
        read = []
        for of, numbers in enumerate((geometry[0], geometry[-1])):
            shift = numbers[2 * head : 2 * head + 2]
            stretch = numbers[2 * heads + 2 * head : 2 * heads + 2 * head + 2]
            angle = numbers[4 * heads + head]
            tokens = []
            for i, j in itertools.product(range(w), range(w)):
                dy = (i - (w - 1) / 2) / across[0] * (1 + stretch[1])
                dx = (j - (w - 1) / 2) / across[1] * (1 + stretch[0])
                turned_x = dx * angle.cos() - dy * angle.sin()
                turned_y = dx * angle.sin() + dy * angle.cos()
                y = row * w + (w - 1) / 2
                x_ = column * w + (w - 1) / 2
                y = y + across[0] * (turned_y + shift[1] / max(1, width // w))
                x_ = x_ + across[1] * (turned_x + shift[0] / max(1, height // w))
                tokens.append(bilinear((k, v)[of][..., part], float(y), float(x_)))
            read.append(torch.stack(tokens))
        keys, values = read
        table = module.table.view(2 * w - 1, 2 * w - 1, heads)
        for n, (i, j) in enumerate(itertools.product(range(w), range(w))):
            query = q[cells[n]][part]
            logits = keys @ query * module.scale
            for m, (a, b) in enumerate(itertools.product(range(w), range(w))):
                up, side = i - a + w - 1, j - b + w - 1
                logits[m] += query @ (module.rel_height[up] + module.rel_width[side])
                logits[m] += table[up, side, head]
            out[cells[n]][part] = logits.softmax(0) @ values
    return module.proj(out[inside])


def windows(*, separate: bool = False, bias: str = "all", window: int = 3) -> WindowAttention:
    return lived_in(
        WindowAttention(
            dim=8, heads=2, bias=bias, scale=None, dropout=0.0, window=window, separate=separate
        )
    )


@pytest.mark.parametrize("size", [(6, 6), (3, 9), (7, 5), (2, 4)], ids=str)
@pytest.mark.parametrize(("separate", "bias"), [(False, "all"), (True, "qv"), (False, "none")])
@torch.no_grad()
def test_window_attention(size, separate, bias):
    """Also where windows don't divide the map, and where it is smaller than one."""
    module = windows(separate=separate, bias=bias)
    x = torch.randn(2, *size, 8)
    wanted = torch.stack([literal_windows(module, sample) for sample in x])
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-4)


def resting(module: WindowAttention, *, angle: float = 0.0, shift: float = 0.0) -> WindowAttention:
    """Every head of every window turned or shifted to the right alike."""
    with torch.no_grad():
        module.sample.weight.zero_()
        numbers = module.sample.bias.zero_().view(module.sets, -1)
        numbers[:, 4 * module.heads :] = angle
        numbers[:, : 2 * module.heads : 2] = shift
    return module


def test_windows_at_rest_read_their_own_cells():
    """Also where the map has zeros around it."""
    for height, width in ((6, 9), (7, 4)):
        module = resting(windows())
        points = module.points(torch.randn(1, height, width, 8))[0, 0]
        top, left = -height % 3 // 2, -width % 3 // 2
        places = itertools.product(range(-(-height // 3)), range(-(-width // 3)))
        for number, (row, column) in enumerate(places):
            for cell, (i, j) in enumerate(itertools.product(range(3), range(3))):
                y, x = row * 3 + i - top, column * 3 + j - left
                wanted = torch.tensor([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1])
                torch.testing.assert_close(points[0, number, cell], wanted)


def test_a_quarter_turn_turns_what_is_read():
    """On a square map of one window, keys and values are the map's turned by 90 degrees."""
    still, turned = resting(windows()), resting(windows(), angle=math.pi / 2)
    x = torch.randn(1, 3, 3, 8)

    def read(module: WindowAttention, maps: Tensor) -> Tensor:
        points = module.points(x)[0, 0, :1]
        return F.grid_sample(maps, points, align_corners=False).view(1, -1, 3, 3)

    maps = torch.randn(1, 2, 3, 3)
    torch.testing.assert_close(read(still, maps), maps)
    torch.testing.assert_close(read(turned, maps), maps.rot90(1, (2, 3)))


def test_a_shift_in_x_is_counted_in_windows_of_a_column():
    """The authors' code divides it by them: of twice as many the windows move half as far."""
    far = {}
    for height in (6, 12):
        x = torch.zeros(1, height, 9, 8)
        moved = resting(windows(), shift=0.5).points(x) - resting(windows()).points(x)
        assert moved[..., 1].abs().max() < 1e-6
        far[height] = moved[..., 0].mean().item()
        torch.testing.assert_close(moved[..., 0], torch.full_like(moved[..., 0], far[height]))
    assert far[6] == pytest.approx(2 * far[12], rel=1e-4)


def test_nothing_is_read_beyond_the_map():
    """A window that went far away sees zeros only: values, and so the output, are the bias."""
    module = resting(windows(), shift=1000.0)
    out = module(torch.randn(1, 6, 6, 8))
    torch.testing.assert_close(out, module.proj.bias.expand_as(out))


def test_cell_pairs_read_swins_table():
    table = torch.randn(25, 4)
    place = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"), -1)
    place = place.reshape(9, 2)
    offset = place[:, None] - place[None] + 2
    wanted = table[offset[..., 0] * 5 + offset[..., 1]].permute(2, 0, 1)
    assert torch.equal(table_bias(table, 3), wanted)


# ---- full attention ------------------------------------------------------------------------------


def full(grid: tuple[int, int]) -> FullAttention:
    return lived_in(
        FullAttention(
            dim=8, heads=2, bias="all", scale=0.3, dropout=0.0, grid=grid, attention_dropout=0.0
        )
    )


@pytest.mark.parametrize("grid", [(4, 4), (5, 3)], ids=str)
def test_full_attention(grid):
    """Scaled queries meet the relative positions; fewer columns read the table's first entries."""
    module, (height, width) = full(grid), grid
    x = torch.randn(1, height, width, 8)
    qkv = F.linear(x[0], module.qkv.weight, module.biases()).flatten(0, 1)
    q, k, v = qkv.chunk(3, dim=-1)
    cells = list(itertools.product(range(height), range(width)))
    heads = []
    for head in range(2):
        part = slice(head * 4, head * 4 + 4)
        query = q[:, part] * 0.3
        logits = query @ k[:, part].T
        for (n, (i, j)), (m, (a, b)) in itertools.product(enumerate(cells), enumerate(cells)):
            rows = module.rel_height[i - a + height - 1] + module.rel_width[j - b + width - 1]
            logits[n, m] += query[n] @ rows
        heads.append(logits.softmax(-1) @ v[:, part])
    wanted = module.proj(torch.cat(heads, -1)).view(1, height, width, 8)
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (3, 5)], ids=str)
def test_full_attention_of_other_sizes(grid):
    for size in ((4, 4), (6, 3), (2, 9), (1, 1)):
        assert full(grid)(torch.randn(1, *size, 8)).isfinite().all()


# ---- blocks --------------------------------------------------------------------------------------


def test_the_local_branch_with_its_norm_in_the_weights():
    branch = lived_in(LocalBranch(dim=8, hidden=16))
    x = torch.randn(2, 5, 7, 8)
    maps = branch.norm(branch.conv1(x.permute(0, 3, 1, 2)))
    wanted = branch.conv2(F.silu(maps)).permute(0, 2, 3, 1)
    torch.testing.assert_close(branch(x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(branch(x), wanted, rtol=1e-4, atol=1e-5)


def test_a_vitae_block_adds_what_it_makes_of_the_unnormed_map():
    attention = full((4, 4))
    block = lived_in(
        Block(
            dim=8, attention=attention, hidden=12, local=LocalBranch(dim=8, hidden=16), eps=1e-6,
            layer_scale=None, dropout=0.0, drop_path=0.0,
        )
    )  # fmt: skip
    x = torch.randn(2, 4, 4, 8)
    y = x + block.attention(block.norm1(x)) + block.local(x)
    wanted = y + block.fc2(F.gelu(block.fc1(block.norm2(y))))
    torch.testing.assert_close(block(x), wanted)


def test_dropout():
    """ViTAE drops hidden features, too; windows have no dropout of probabilities."""
    for local, calls in ((False, 1), (True, 2)):
        block = Block(
            dim=8, attention=nn.Identity(), hidden=8, eps=1e-6, layer_scale=None, dropout=1.0,
            local=LocalBranch(dim=8, hidden=8) if local else None, drop_path=0.0,
        )  # fmt: skip
        seen: list[Tensor] = []
        block._drop = lambda x, seen=seen: seen.append(x) or x  # type: ignore[method-assign]
        block.train()(torch.randn(1, 2, 2, 8))
        assert len(seen) == calls
    model = rvsa.build("rvsa-nano", classes=5, drop_path=0.5)
    assert [b.drop_path.rate for b in model.blocks] == pytest.approx([0.1 * k for k in range(6)])


# ---- the network ---------------------------------------------------------------------------------

OURS = ("rvsa-nano", "rvsa-nano-vitae")


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("pyramid", ["none", "last", "stages"])
@pytest.mark.parametrize("size", [(32, 32), (33, 50), (97, 4), (4, 5)], ids=str)
def test_any_size(name, pyramid, size):
    model = lived_in(rvsa.build(name, classes=5, pyramid=pyramid))
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).shape == (1, 5)
        maps = model.features(torch.randn(1, 3, *size))
    for (found, stride), info in zip(maps, model.feature_info, strict=True):
        assert (found.shape[1], stride) == tuple(info)
        assert all(
            cells in (max(1, side // stride), -(-side // stride))
            for cells, side in zip(found.shape[2:], size)
        )
    if pyramid != "none":
        assert [stride for _, stride in maps] == [1, 2, 4, 8]


def test_every_third_block_sees_the_whole_map():
    model = rvsa.build("rvsa-nano")
    kinds = [type(block.attention) for block in model.blocks]
    assert kinds == [WindowAttention, WindowAttention, FullAttention] * 2


def test_maps_for_detection_and_segmentation():
    options: dict[str, Any] = {
        "dim": 16,
        "depth": 4,
        "heads": 2,
        "patch": 8,
        "resolution": (64, 64),
    }
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        last = lived_in(RVSA(**options, pyramid="last"))
        *_, behind = last._maps(x)
        normed = last.norm(behind).permute(0, 3, 1, 2)
        maps = [found.map for found in last.features(x)]
        torch.testing.assert_close(maps[1], last.pyramid.up2(normed))
        torch.testing.assert_close(maps[2], normed)
        torch.testing.assert_close(maps[3], F.max_pool2d(normed, 2))
        staged = lived_in(RVSA(**options, pyramid="stages", taps=(1, 2, 3, 4), finest=2))
        behind = [found.permute(0, 3, 1, 2) for found in staged._maps(x)]
        maps = [found.map for found in staged.features(x)]
        torch.testing.assert_close(maps[0], staged.pyramid.up2(behind[0]))
        torch.testing.assert_close(maps[1], behind[1])
        torch.testing.assert_close(maps[2], F.max_pool2d(behind[2], 2))
        torch.testing.assert_close(maps[3], F.max_pool2d(behind[3], 4))
    assert [info.stride for info in staged.feature_info] == [4, 8, 16, 32]


COUNTS = {
    "rvsa-vit-b": 86221939,
    "rvsa-vit-b-kvdiff": 86591059,
    "rvsa-vitae-b": 88995955,
    "rvsa-vitae-b-kvdiff": 89365075,
    "rvsa-vit-b-det": 96337728,
    "rvsa-vit-b-kvdiff-det": 96706848,
    "rvsa-vitae-b-det": 99108672,
    "rvsa-vitae-b-kvdiff-det": 99477792,
    "rvsa-vit-b-seg": 93945664,
    "rvsa-vit-b-kvdiff-seg": 94314784,
    "rvsa-vitae-b-seg": 96710464,
    "rvsa-vitae-b-kvdiff-seg": 97079584,
}


@pytest.mark.parametrize("name", [n for n in rvsa.VARIANTS if "nano" not in n])
def test_parameter_counts_of_the_authors_networks(name):
    """Of their classifiers with 51 classes; the others have none."""
    with torch.device("meta"):
        model = rvsa.build(name, classes=0 if name.endswith(("det", "seg")) else 51)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_learning_rates_fall_towards_the_patches():
    rates = rvsa.build("rvsa-nano").layer_decay(0.5)
    assert rates["stem.weight"] == rates["position"] == 0.5**7
    assert [rates[f"blocks.{k}.fc1.weight"] for k in range(6)] == [0.5 ** (6 - k) for k in range(6)]
    assert rates["head.weight"] == rates["norm.bias"] == 1


def test_initial_values():
    model = rvsa.build("rvsa-nano", classes=50)
    window, whole = model.blocks[0].attention, model.blocks[2].attention
    assert window.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert window.table.std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(t.any() for t in (window.rel_height, whole.rel_width, model.head.bias))
    assert window.sample.weight.abs().max().item() == pytest.approx(1 / 8, rel=0.05)  # 64 wide
    assert model.position.std().item() == pytest.approx(0.02, rel=0.1)
    assert "position" in model.no_decay()


# ---- pre-training --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_masked_pretraining_reaches_every_parameter(name):
    model = rvsa.build(name, classes=5)
    mae = MaskedAutoencoder(
        encoder=rvsa.pretraining_host(model), norm_pix=False, width=32, depth=1, heads=2
    )
    mae(torch.randn(4, 3, 32, 32)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mae.parameters())
    fresh = rvsa.adopt(model, mae.encoder)
    assert any(".sample." in key for key in fresh)
    assert not any(".qkv." in key or ".fc" in key or "position" in key for key in fresh)


@pytest.mark.parametrize("local", [False, True])
def test_what_is_adopted_computes_what_was_pretrained(local):
    """Without windows, class token and relative positions the network is the host."""
    host = assemble_vit(
        dim=16, depth=2, heads=2, hidden=32, patch=4, grid=(5, 6), classes=0, pooling="mean",
        position="sincos", norm_pooled=True,
    )  # fmt: skip
    if local:
        host.blocks = nn.ModuleList(
            LocalBlock(block, dim=16, hidden=32, eps=1e-6) for block in host.blocks
        )
    host = lived_in(host)
    model = RVSA(
        dim=16, depth=2, heads=2, patch=4, resolution=(20, 24), interval=1, mlp_ratio=2.0,
        local=local, classes=3,
    )  # fmt: skip
    model.init_weights()
    fresh = rvsa.adopt(model.eval(), host)
    assert set(fresh) == {"head.weight", "head.bias"} | {
        f"blocks.{k}.attention.rel_{axis}" for k in range(2) for axis in ("height", "width")
    }
    x = torch.randn(2, 3, 20, 24)
    with torch.no_grad():
        torch.testing.assert_close(model.pooled(x), host(x), rtol=1e-4, atol=1e-5)


def test_the_authors_pretrained_weights():
    """Of ViTAE with 1 × 1 kernels, for another grid and a network without biases."""
    source = lived_in(
        RVSA(
            dim=16, depth=2, heads=2, patch=4, resolution=(20, 20), interval=1, local=True,
            classes=0,
        )
    )  # fmt: skip
    theirs = {
        f"encoder.{key}": value[:, :, 1:2, 1:2] if ".PCM." in key and value.ndim == 4 else value
        for key, value in rvsa.to_official(source).items()
        if ".rel_pos" not in key
    }
    theirs |= {"cls_token": torch.zeros(1, 1, 16), "mask_token": torch.zeros(1), "decoder_x": x0()}
    model = RVSA(
        dim=16, depth=2, heads=2, patch=4, resolution=(32, 24), local=True, bias=False, classes=3
    )
    model.init_weights()
    rvsa.adopt(model, theirs)
    state = model.state_dict()
    kernel = state["blocks.1.local.conv1.weight"]
    assert torch.equal(kernel[:, :, 1, 1], source.blocks[1].local.conv1.weight[:, :, 1, 1])
    assert kernel.sum() == pytest.approx(kernel[:, :, 1, 1].sum().item())
    assert torch.equal(state["blocks.1.fc1.weight"], source.blocks[1].fc1.weight)
    table = source.position[:, 1:].view(1, 5, 5, 16).permute(0, 3, 1, 2)
    table = F.interpolate(table, (8, 6), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(state["position"][:, 1:], table)
    with pytest.raises(PolypatchError, match="decorder"):
        rvsa.adopt(model, theirs | {"decorder": torch.zeros(1)})
    with pytest.raises(PolypatchError, match=r"missing keys .*fc1"):
        rvsa.adopt(model, {k: v for k, v in theirs.items() if "fc1" not in k})


def x0() -> Tensor:
    return torch.zeros(1)


# ---- authors' weights ----------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_drawn_configurations_round_trip(data):
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    local, pyramid = draw(True, False), draw("none", "last", "stages")
    side = draw(32, 40)
    model = RVSA(
        dim=draw(16, 32),
        depth=draw(3, 4),
        heads=draw(2, 4),
        patch=8 if pyramid == "stages" else 4,
        resolution=(side, side),
        window=draw(3, 7),
        interval=draw(2, 3, 9),
        separate=draw(True, False),
        local=local,
        mlp_ratio=draw(2.0, 4.0),
        hidden=20 if local and draw(True, False) else None,
        bias=draw(True, False),
        key_bias=pyramid == "last",
        absolute=draw(True, False),
        spare_row=pyramid == "none",
        layer_scale=None if local else draw(None, 0.1),
        pyramid=pyramid,
        finest=2 if pyramid == "stages" else 4,
        classes=draw(0, 3),
        channels=draw(1, 3),
    )
    model = lived_in(model)
    theirs = rvsa.to_official(model)
    found = rvsa.recognise({key: tuple(value.shape) for key, value in theirs.items()})
    config = rvsa.official_config(model)
    assert found is not None
    told = {key: value for key, value in found.items() if key not in rvsa.ASSUMED}
    assert {key: config[key] for key in told} == told
    again = rvsa.from_official(config, theirs)
    x = torch.randn(1, model.stem.in_channels, side, side)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)
        for mine, other in zip(again.features(x), model.features(x), strict=True):
            torch.testing.assert_close(mine.map, other.map, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", rvsa.VARIANTS)
def test_variants_are_recognised(name):
    dense = name.endswith(("det", "seg"))
    with torch.device("meta"):
        model = rvsa.build(name, classes=0 if dense else 7)
    shapes = {key: tuple(value.shape) for key, value in rvsa.to_official(model).items()}
    if dense:  # as the authors save them: whole networks
        head = "roi_head.cls.weight" if name.endswith("det") else "decode_head.cls.weight"
        shapes = {f"backbone.{key}": shape for key, shape in shapes.items()} | {head: (1, 1)}
    found = rvsa.recognise(shapes)
    config = rvsa.official_config(model)
    assert found is not None
    assert {key: config[key] for key in found} == found


def test_the_encoder_of_a_whole_network():
    model = lived_in(rvsa.build("rvsa-nano", classes=0, pyramid="stages"))
    theirs = rvsa.to_official(model)
    whole = {f"backbone.{key}": value for key, value in theirs.items()}
    whole |= {"decode_head.conv_seg.weight": torch.zeros(3, 4), "auxiliary_head.x.bias": x0()}
    found = rvsa.recognise({key: tuple(value.shape) for key, value in whole.items()})
    assert found is not None
    again = rvsa.from_official(rvsa.official_config(model), whole)
    load_exactly(again, model.state_dict(), what="the same")
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again.features(x)[0].map, model.features(x)[0].map)
    with pytest.raises(PolypatchError, match="another_head"):
        rvsa.from_official(found, whole | {"another_head.weight": torch.zeros(1)})


def test_others_are_not_recognised():
    assert rvsa.recognise({}) is None
    shapes = {k: tuple(v.shape) for k, v in rvsa.to_official(rvsa.build("rvsa-nano")).items()}
    assert rvsa.recognise({k: v for k, v in shapes.items() if "sampling" not in k}) is None
    assert rvsa.recognise({k: v for k, v in shapes.items() if "patch_embed" not in k}) is None


# ---- what doesn't fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pyramid": "first"}, "there is no pyramid 'first'"),
        ({"heads": 5}, "doesn't divide by its 5 heads"),
        ({"local": True, "layer_scale": 0.1}, "no layer scale"),
        ({"pyramid": "last", "patch": 6}, "divides the patch of 6"),
        ({"pyramid": "stages", "taps": (1, 2)}, "taps are four blocks"),
        ({"taps": (1, 9)}, "from 1 to 3"),
        ({"resolution": (3, 32)}, "less than a patch"),
    ],
)
def test_options_that_do_not_fit_are_named(options, sentence):
    usual: dict[str, Any] = {"dim": 16, "depth": 3, "heads": 2, "patch": 4, "resolution": (32, 32)}
    with pytest.raises(PolypatchError, match=sentence):
        RVSA(**usual | options)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"cls": "ViT_Win"}, "there is no class 'ViT_Win'"),
        ({"windows": 7}, "no argument 'windows'"),
        ({"hybrid_backbone": 1}, "hybrid_backbone is a module"),
        ({"class_token": True}, "no place for a class token"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, sentence):
    with pytest.raises(PolypatchError, match=sentence):
        rvsa.network(arguments)


def test_smaller_than_a_patch():
    with pytest.raises(PolypatchError, match="at least 4"):
        create("rvsa-nano")(torch.zeros(1, 3, 3, 32))


# ---- exporters -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiles_and_exports():
    model = lived_in(rvsa.build("rvsa-nano-vitae", classes=5))
    x = torch.randn(2, 3, 48, 32)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
        program = torch.export.export(
            model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
        )
        more = torch.randn(3, 3, 48, 32)
        torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-5)
