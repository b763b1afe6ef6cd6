"""DAT and DAT++ against slow literal versions of their equations; their options; their weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polypatch import create
from polypatch.backbones import dat
from polypatch.backbones.dat_attention import (
    DeformableAttention,
    query_points,
    reference_points,
    relative_bias,
    relative_bias_by_windows,
    sample,
)
from polypatch.backbones.dat_local import (
    NeighbourhoodAttention,
    PyramidAttention,
    SlideAttention,
    WindowAttention,
)
from polypatch.backbones.dat_network import FeedForward, ResidualDepthwise
from polypatch.errors import PolypatchError
from polypatch.nn import init_parts


def shaken(module, scale: float = 0.5):
    """All parameters away from their initial values, in double precision and eval mode."""
    init_parts(module)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(scale * torch.randn(value.shape, generator=generator))
    return module.double().eval()


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- deformable attention, place by place ------------------------------------------------------


def bilinear(maps: Tensor, y: float, x: float) -> Tensor:
    """(channels, height, width) at -1 … 1 between the middles of the outer cells, zeros beyond."""
    _, height, width = maps.shape
    row, column = (y + 1) / 2 * (height - 1), (x + 1) / 2 * (width - 1)
    total = torch.zeros(len(maps), dtype=maps.dtype)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * maps[:, i, j]
    return total


def literal(module: DeformableAttention, x: Tensor, *, conference: bool) -> Tensor:
    """One sample (height, width, dim), as the papers write it."""
    height, width, dim = x.shape
    heads, groups = module.heads, module.groups
    q = x @ module.q.weight.T + module.q.bias
    inner, size = dim // groups, dim // heads
    k_weight, v_weight = module.kv.weight.chunk(2)
    k_bias, v_bias = module.kv.bias.chunk(2)
    points, sampled = [], []
    for g in range(groups):
        part = slice(g * inner, (g + 1) * inner)
        y = module.offset_conv.weight, module.offset_conv.bias
        offset = F.conv2d(
            q[..., part].permute(2, 0, 1)[None], *y, module.stride, module.padding, groups=inner
        )[0].permute(1, 2, 0)
        offset = module.offset_out(F.gelu(module.offset_norm(offset)))
        rows, columns = offset.shape[:2]
        mine = []
        for i in range(rows):
            for j in range(columns):
                spot = []
                for axis, (cell, cells) in enumerate(((i, rows), (j, columns))):
                    d = float(offset[i, j, axis])
                    span = cells if conference else cells - 1
                    p = (cell + 0.5) / span * 2 - 1
                    if module.bound is not None:
                        p += math.tanh(d) * module.bound / span
                    else:
                        p = math.tanh(p + d) if conference else min(1.0, max(-1.0, p + d))
                    spot.append(p)
                mine.append(spot)
        points.append(mine)
        maps = x[..., part].permute(2, 0, 1)
        sampled.append(torch.stack([bilinear(maps, *p) for p in mine]))
    keys = torch.cat(sampled, dim=1)
    k, v = keys @ k_weight.T + k_bias, keys @ v_weight.T + v_bias
    out = torch.zeros_like(x)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        spots = points[h // (heads // groups)]
        for i in range(height):
            for j in range(width):
                if conference:
                    at = (i + 0.5) / height * 2 - 1, (j + 0.5) / width * 2 - 1
                else:
                    at = i / (height - 1) * 2 - 1, j / (width - 1) * 2 - 1
                logits = k[:, part] @ q[i, j, part] / math.sqrt(size)
                if module.position == "table":
                    logits = logits + torch.stack([
                        bilinear(module.rpe.table[h : h + 1], (at[0] - y) / 2, (at[1] - x_) / 2)[0]
                        for y, x_ in spots
                    ])  # fmt: skip
                elif module.position == "log":
                    step = 4 * (torch.tensor(at, dtype=x.dtype) - torch.tensor(spots).to(x.dtype))
                    step = step.sign() * torch.log2(step.abs() + 1) / math.log2(8)
                    bias = module.rpe.fc2(F.relu(module.rpe.fc1(step)))
                    logits = logits + bias[:, h % (heads // groups)]
                elif module.position == "fixed":
                    logits = logits + module.rpe.table[h, i * width + j]
                out[i, j, part] = logits.softmax(0) @ v[:, part]
    if module.position == "depthwise":
        out = out + module.rpe(q.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    return module.proj(out)


@pytest.mark.parametrize(
    ("position", "bound", "conference"),
    [
        *((p, b, False) for p in ("table", "log", "fixed", "depthwise", None) for b in (None, 2.0)),
        *((p, b, True) for p in ("table", "fixed", "depthwise", None) for b in (None, 1.5)),
    ],
)
def test_deformable_attention_is_the_papers(
    position: str | None, bound: float | None, conference: bool
) -> None:
    module = DeformableAttention(
        dim=8, heads=4, groups=2, size=(6, 4), stride=2, kernel=3, bound=bound, offsets=True,
        position=position, conference=conference, attn_drop=0.0, drop=0.0,
    )  # fmt: skip
    shaken(module)
    x = double(2, 6, 4, 8)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            ours = module(x)
        with torch.no_grad():
            theirs = torch.stack([literal(module, one, conference=conference) for one in x])
        torch.testing.assert_close(ours.detach(), theirs)


def test_a_bias_by_windows_is_the_sampled_one() -> None:
    for height, width in ((5, 7), (2, 2), (1, 4), (1, 1)):
        table = double(4, 2 * height - 1, 2 * width - 1)
        points = double(3, 2, 9, 2).clamp(-1, 1)
        points[0, 0, :4] = torch.tensor([[1, 1], [-1, -1], [1, -1], [0, 0]]).to(points)
        torch.testing.assert_close(
            relative_bias_by_windows(table, points), relative_bias(table, points, (height, width))
        )


def test_points_on_cells_read_cells() -> None:
    """Each group its own points, each point its cell, nothing beyond the map."""
    x = double(1, 3, 4, 6)
    grid = query_points((3, 4), like=x)
    points = torch.stack([grid, grid.flip(0, 1)])[None]
    read = sample(x, points).view(3, 4, 6)
    torch.testing.assert_close(read[..., :3], x[0, ..., :3])
    torch.testing.assert_close(read[..., 3:], x[0, ..., 3:].flip(0, 1))
    assert sample(x, points * 0 + 5).abs().max() == 0


def test_references_stand_half_a_cell_further() -> None:
    like = double(1)
    grid = reference_points((7, 7), like=like) - query_points((7, 7), like=like)
    torch.testing.assert_close(grid, torch.full_like(grid, 1 / 6))
    torch.testing.assert_close(
        reference_points((4, 1), conference=True, like=like)[:, 0, 0],
        torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=torch.float64),
    )
    assert torch.equal(reference_points((1, 1), like=like), torch.zeros(1, 1, 2).double())


def test_without_offsets_it_is_attention_to_means() -> None:
    module = DeformableAttention(
        dim=8, heads=2, groups=1, size=(4, 4), stride=2, kernel=3, bound=None, offsets=False,
        position="table", conference=False, attn_drop=0.0, drop=0.0,
    )  # fmt: skip
    shaken(module)
    assert module.rpe is None
    assert not any(p.requires_grad for n, p in module.named_parameters() if "offset" in n)
    x = double(2, 4, 4, 8)
    keys = x.view(2, 2, 2, 2, 2, 8).mean((2, 4)).flatten(1, 2)
    k, v = module.kv(keys).view(2, 4, 2, 2, 4).permute(2, 0, 3, 1, 4)
    q = module.q(x).view(2, 16, 2, 4).transpose(1, 2)
    mixed = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    torch.testing.assert_close(module(x), module.proj(mixed.transpose(1, 2).reshape(2, 4, 4, 8)))


# ---- local mixers ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 5), (7, 16), (17, 23), (3, 30), (2, 2)], ids=str)
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_neighbourhood_attention_is_the_literal_one(size: tuple[int, int], kernel: int) -> None:
    module = shaken(NeighbourhoodAttention(dim=4, heads=2, kernel=kernel, attn_drop=0, drop=0))
    height, width = size
    x = double(1, height, width, 4)
    padded = F.pad(x, (0, 0, 0, max(0, kernel - width), 0, max(0, kernel - height)))[0]
    tall, wide = padded.shape[:2]
    q, k, v = module.qkv(padded).view(tall, wide, 3, 2, 2).unbind(2)
    expected = torch.zeros(height, width, 4, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            top = min(max(i - kernel // 2, 0), tall - kernel)
            left = min(max(j - kernel // 2, 0), wide - kernel)
            window = slice(top, top + kernel), slice(left, left + kernel)
            for h in range(2):
                rows = torch.arange(top - i, top - i + kernel) + kernel - 1
                columns = torch.arange(left - j, left - j + kernel) + kernel - 1
                bias = module.rpb[h][rows][:, columns].flatten()
                logits = k[window][..., h, :].flatten(0, 1) @ q[i, j, h] / math.sqrt(2) + bias
                mixed = logits.softmax(0) @ v[window][..., h, :].flatten(0, 1)
                expected[i, j, 2 * h : 2 * h + 2] = mixed
    torch.testing.assert_close(module(x)[0], module.proj(expected))


def test_a_window_as_large_as_the_map_is_a_neighbourhood() -> None:
    """Two papers' modules, one function: their tables count distances in opposite directions."""
    near = shaken(NeighbourhoodAttention(dim=8, heads=2, kernel=5, attn_drop=0, drop=0))
    window = shaken(WindowAttention(dim=8, heads=2, window=5, shift=0, attn_drop=0, drop=0))
    window.qkv, window.proj = near.qkv, near.proj
    with torch.no_grad():
        window.relative_bias.copy_(near.rpb.flip(1, 2).flatten(1).T)
    x = double(2, 5, 5, 8)
    torch.testing.assert_close(window(x), near(x))


def test_shifted_windows_keep_strangers_apart() -> None:
    """What lies beyond the shifted window's true borders doesn't matter."""
    module = shaken(WindowAttention(dim=4, heads=1, window=4, shift=2, attn_drop=0, drop=0))
    x = double(1, 8, 8, 4)
    changed = x.clone()
    changed[:, 2:6, 2:6] += 1  # the one whole window in the middle
    difference = (module(changed) - module(x)).abs().amax(-1)[0]
    assert difference[2:6, 2:6].min() > 0
    difference[2:6, 2:6] = 0
    assert difference.max() < 1e-12


def test_slide_attention_reads_its_neighbours() -> None:
    """With its fixed shift alone it is attention to 3 × 3 neighbours, zeros outside."""
    module = SlideAttention(dim=16, heads=2)
    shaken(module)
    with torch.no_grad():
        for value in (*module.learned.parameters(), module.shift.bias):
            value.zero_()
    init = SlideAttention(dim=16, heads=2)
    init_parts(init)
    init.init_weights()
    with torch.no_grad():
        module.shift.weight.copy_(init.shift.weight)
    x = double(1, 4, 3, 16)
    q, k, v = module.qkv(x)[0].view(4, 3, 2, 3, 2).unbind(3)
    k, v = (F.pad(t, (0, 0, 0, 0, 1, 1, 1, 1)) for t in (k, v))
    expected = torch.zeros(4, 3, 4, dtype=x.dtype)
    for i in range(4):
        for j in range(3):
            for h in range(2):
                keys = k[i : i + 3, j : j + 3, h].reshape(9, 2) + module.relative_bias[h][:, None]
                logits = keys @ q[i, j, h] / math.sqrt(8)
                values = v[i : i + 3, j : j + 3, h].reshape(9, 2)
                expected[i, j, 2 * h : 2 * h + 2] = logits.softmax(0) @ values
    torch.testing.assert_close(module(x)[0], module.proj(expected))


def test_a_residual_convolution_is_one_convolution() -> None:
    module = ResidualDepthwise(dim=6).double()
    x = double(2, 5, 4, 6)
    plain = F.conv2d(x.permute(0, 3, 1, 2), module.weight, module.bias, padding=1, groups=6)
    torch.testing.assert_close(module(x), x + plain.permute(0, 2, 3, 1))
    mlp = FeedForward(dim=6, hidden=12, conv=True, drop=0.0).double()
    h = mlp.fc1(x)
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.conv(h))))


# ---- network -----------------------------------------------------------------------------------

#: the authors' networks, counted
PARAMETERS = {
    "dat-tiny": 23_962_876,
    "dat-small": 53_127_366,
    "dat-base": 93_690_640,
    "dat-base-384": 94_119_440,
    "dat-p": 22_772_796,
    "dat-2022-tiny": 28_319_138,
    "dat-2022-small": 49_700_402,
    "dat-2022-base": 87_881_632,
    "dat-2022-base-384": 88_178_272,
}


@pytest.mark.parametrize("name", sorted(dat.VARIANTS))
def test_published_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in create(name).parameters())
    assert count == PARAMETERS[name] if name in PARAMETERS else count < 1.5e6


def small(**changes: Any) -> dict[str, Any]:
    return {
        "img_size": 64, "patch_size": 4, "num_classes": 5, "expansion": 2, "dim_stem": 16,
        "dims": [16, 32, 48, 64], "depths": [2, 1, 1, 1], "use_conv_patches": True,
        "stage_spec": [["N", "D"], ["D"], ["D"], ["D"]], "heads": [2, 4, 4, 8],
        "groups": [1, 2, 2, 4], "strides": [8, 4, 2, 1], "offset_range_factor": [-1] * 4,
        "use_pes": [True] * 4, "use_lpus": [True] * 4, "use_dwc_mlps": [True] * 4, **changes,
    }  # fmt: skip


CONFIGS = {
    "plus plus": small(),
    "no convolutions": small(
        use_conv_patches=False, use_lpus=[False] * 4, use_dwc_mlps=[False] * 4, dim_stem=12
    ),
    "bounded": small(offset_range_factor=[2, 2, -1, 1]),
    "positions": small(dwc_pes=[True, False, False, False], fixed_pes=[False, True, False, False],
                       log_cpb=[False, False, True, False]),
    "no position": small(use_pes=[False] * 4),
    "no offsets": small(no_offs=[True] * 4),
    "windows": small(stage_spec=[["L", "S"], ["S"], ["D"], ["D"]], window_sizes=[4, 4, 4, 2]),
    "others": small(stage_spec=[["P", "E"], ["X"], ["P"], ["N"]], heads=[2, 4, 2, 8],
                    sr_ratios=[4, 1, 2, 1], window_sizes=[5] * 4, nat_ksizes=[3] * 4),
    "layer scale": small(layer_scale_values=[0.1, 0.1, -1, -1]),
    "2022": small(stage_spec=[["L", "S"], ["L"], ["D"], ["D"]], use_conv_patches=False,
                  use_lpus=[False] * 4, use_dwc_mlps=[False] * 4, window_sizes=[4] * 4,
                  strides=[-1, -1, 1, 1], groups=[-1, -1, 2, 4], conference=True,
                  offset_range_factor=[-1, -1, 2, 2]),
    "dense": small(out_indices=(0, 1, 2, 3)),
}  # fmt: skip
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


def filled(config: dict[str, Any]) -> dat.DAT:
    model = dat.network(config)
    model.init_weights()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


@each_config
def test_checkpoints_are_recognised_and_rebuilt(config: dict[str, Any]) -> None:
    model = filled(config)
    state = dat.to_official(model)
    found = dat.recognise({name: tuple(value.shape) for name, value in state.items()})
    assert found is not None
    built = dat.official_config(model)
    for word in set(found) - set(dat.ASSUMED):
        assert found[word] == built[word], word
    again = dat.from_official({**found, **{k: built[k] for k in dat.ASSUMED}}, state)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))
        for one, other in zip(again.features(x), model.features(x)):
            torch.testing.assert_close(one.map, other.map)
    rewritten = dat.to_official(again)
    assert rewritten.keys() == state.keys()
    assert all(torch.equal(rewritten[name], state[name]) for name in state)


@each_config
@pytest.mark.parametrize("size", [(64, 64), (90, 51), (33, 130)], ids=str)
def test_any_size_goes(config: dict[str, Any], size: tuple[int, int]) -> None:
    """Above, below and beside the size that the tables are for; with and without gradients."""
    model = filled(config)
    x = torch.randn(2, 3, *size)
    with_gradients = model(x)
    assert with_gradients.isfinite().all()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), with_gradients.detach(), rtol=1e-4, atol=1e-5)


@each_config
def test_gradients_reach_what_has_one(config: dict[str, Any]) -> None:
    model = filled(config).train()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "offset_out" in name:  # clamped points have no gradient
                value.mul_(0.1)
    x = torch.randn(2, 3, 64, 64)
    if "out_indices" in config:
        loss = sum(m.map.pow(3).sum() for m in model.features(x))
    else:
        loss = (model(x) * torch.randn(2, 5)).sum()
    loss.backward()
    for name, value in model.named_parameters():
        if value.requires_grad:
            assert value.grad is not None, name
            assert value.grad.abs().sum() > 0, name


def test_published_networks_are_known_by_their_sizes() -> None:
    for name in ("dat-2022-tiny", "dat-2022-base-384", "dat-small", "dat-p"):
        with torch.device("meta"):
            model = create(name)
        found = dat.recognise({k: tuple(v.shape) for k, v in dat.to_official(model).items()})
        assert found is not None
        built = dat.official_config(model)
        assert {k: built[k] for k in found} == found


def test_other_weights_are_no_dat() -> None:
    assert dat.recognise({"patch_embed.proj.weight": (96, 3, 4, 4)}) is None
    shapes = {k: tuple(v.shape) for k, v in dat.to_official(filled(small())).items()}
    assert dat.recognise({k: v for k, v in shapes.items() if "mlps" not in k}) is None
    assert dat.recognise({k: v for k, v in shapes.items() if "attns.0" not in k}) is None


def test_dense_maps_are_normed_by_their_own_norms() -> None:
    model = filled(CONFIGS["dense"])
    plain = filled({k: v for k, v in CONFIGS["dense"].items() if k != "out_indices"})
    plain.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps, raw = model.features(x), plain.features(x)
        for norm, one, other in zip((*model.map_norms, model.norm), maps, raw):
            normed = norm(other.map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            torch.testing.assert_close(one.map, normed)
        torch.testing.assert_close(model(x), maps[-1].map.mean((2, 3)))


def test_points_can_be_drawn() -> None:
    model = filled(small())
    points = model.sampling_points(torch.randn(2, 3, 64, 96))
    assert [tuple(p.shape) for p in points] == [
        (2, 1, 2, 3, 2), (2, 2, 2, 3, 2), (2, 2, 2, 3, 2), (2, 4, 2, 3, 2)
    ]  # fmt: skip
    assert all(p.abs().max() <= 1 for p in points)
    assert model.sampling_points(torch.randn(1, 3, 64, 64))[0].unique().numel() > 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stage_spec": [["Q", "D"], ["D"], ["D"], ["D"]]}, "QnA isn't in the paper"),
        ({"stage_spec": [["Z", "D"], ["D"], ["D"], ["D"]]}, "no block 'Z'"),
        ({"depths": [1, 1, 1, 1]}, "1 blocks and 2 letters"),
        ({"groups": [3, 2, 2, 4]}, "groups that divide"),
        ({"groups": [-1, 2, 2, 4]}, "groups that divide"),
        ({"heads": [3, 4, 4, 8]}, "3 heads don't divide the width 16"),
        ({"nat_ksizes": [4, 3, 3, 3]}, "odd and above 1"),
        ({"stage_spec": [["X", "D"], ["D"], ["D"], ["D"]], "window_sizes": [4] * 4}, "odd"),
        ({"stage_spec": [["S", "D"], ["D"], ["D"], ["D"]], "window_sizes": [1] * 4}, "shifted"),
        ({"stage_spec": [["E", "D"], ["D"], ["D"], ["D"]], "heads": [8, 4, 4, 8]}, "slide"),
        ({"dim_stem": 7}, "even"),
        ({"conference": True}, "code of 2022"),
        ({"out_indices": (1, 2)}, "out_indices"),
        ({"use_lpu": True}, "did you mean use_lpus"),
    ],
)
def test_what_is_not_possible_is_said(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PolypatchError, match=sentence):
        dat.network(small(**changes))


def test_arguments_without_effect_are_accepted() -> None:
    dat.network(small(heads_q=[6] * 4, nqs=[2] * 4, lower_lr_kvs={"conv_offset": 0.01}, _run="x"))


# ---- training ----------------------------------------------------------------------------------


def test_stochastic_depth_rises_over_all_blocks() -> None:
    model = create("dat-nano(drop_path=0.6)", classes=3)
    rates = [block.drop_path.rate for stage in model.stages for block in stage]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.6, len(rates)))
    with torch.device("meta"):
        assert create("dat-base").stages[-1][-1].drop_path.rate == pytest.approx(0.7)


def test_dropout_drops_in_training_only() -> None:
    model = create("dat-nano(drop=0.5,attn_drop=0.5)", classes=3)
    x = torch.randn(1, 3, 32, 32)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_parameter_groups() -> None:
    model = filled(CONFIGS["windows"])
    groups = model.parameter_groups(rate=1e-3, decay=0.05, slower={"offset": 0.1})
    spared = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    slow = {id(p) for g in groups if g["lr"] < 1e-3 for p in g["params"]}
    for name, value in model.named_parameters():
        tables = "rpe" in name or "relative_bias" in name
        assert (id(value) in spared) == (value.ndim == 1 or tables), name
        assert (id(value) in slow) == ("offset" in name), name
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    torch.optim.AdamW(groups)


def test_tables_are_resized_for_another_resolution() -> None:
    model = filled(CONFIGS["windows"])
    larger = dat.resized(model, 96, window=6)
    assert larger.resolution == 96
    mixers = [block.mixer for stage in larger.stages for block in stage]
    deformable = [m for m in mixers if isinstance(m, DeformableAttention)]
    assert [m.rpe.table.shape[1] for m in deformable] == [11, 5]
    window = larger.stages[0][1].mixer
    assert window.relative_bias.shape == (11 * 11, 2)
    old = model.stages[0][1].mixer.relative_bias.T.unflatten(1, (7, 7))
    new = F.interpolate(old[None], (11, 11), mode="bicubic")[0]
    torch.testing.assert_close(window.relative_bias.T.unflatten(1, (11, 11)), new)
    torch.testing.assert_close(larger.norm.weight, model.norm.weight)
    assert larger(torch.randn(1, 3, 96, 96)).isfinite().all()
    with pytest.raises(PolypatchError, match="fixed positions"):
        dat.resized(filled(CONFIGS["positions"]), 96)


def test_preprocessing_follows_the_recipes() -> None:
    with torch.device("meta"):
        assert create("dat-base-384").preprocessing.crop == 1.0
        assert create("dat-2022-base-384").preprocessing.crop == 0.875
        assert create("dat-tiny").preprocessing.resolution == 224


def test_pyramid_attention_on_a_small_map() -> None:
    module = shaken(PyramidAttention(dim=8, heads=2, reduction=4, attn_drop=0, drop=0))
    x = double(1, 3, 5, 8)
    padded = F.pad(x, (0, 0, 0, 0, 0, 1))
    assert torch.equal(module(x), module(padded)[:, :3])
