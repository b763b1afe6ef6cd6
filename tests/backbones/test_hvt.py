"""HVT: pooling along the sequence, positions for other grids, its variants and files."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from polypatch import create
from polypatch.backbones import hvt
from polypatch.backbones.hvt import (
    HVT,
    TokenPooling,
    nearest_tokens,
    pooled_length,
    resample_positions,
)
from polypatch.errors import PolypatchError
from polypatch.nn import DropPath
from polypatch.training.cost import count_flops


def small(**options) -> HVT:
    given = {
        "dim": 24, "depth": 4, "heads": 3, "patch": 4, "grid": (6, 8), "every": 2, "classes": 5
    }  # fmt: skip
    model = HVT(**(given | options))
    model.init_weights()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


# ---- equations, token by token ------------------------------------------------------------------


def pooled_literally(x: Tensor, kernel: int, kind: str) -> Tensor:
    """x: (tokens, dim); windows that don't fit at the end are left out."""
    rows = []
    start = 0
    while start + kernel <= len(x):
        window = x[start : start + kernel]
        rows.append(window.amax(0) if kind == "max" else window.mean(0))
        start += 2
    return torch.stack(rows)


def attended(x: Tensor, qkv: nn.Linear, proj: nn.Linear, heads: int) -> Tensor:
    dim = x.shape[1]
    width = dim // heads
    q, k, v = qkv(x).split(dim, dim=1)
    mixed = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        share = (q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(1)
        mixed.append(share @ v[:, part])
    return proj(torch.cat(mixed, dim=1))


def literal(model: HVT, image: Tensor) -> Tensor:
    """The class scores of one image of the native size."""
    patches = []
    for row in range(model.grid[0]):
        for column in range(model.grid[1]):
            top, left = row * model.patch, column * model.patch
            cell = image[:, top : top + model.patch, left : left + model.patch]
            patches.append((model.stem.weight * cell).sum((1, 2, 3)) + model.stem.bias)
    x = torch.stack(patches) + model.position[0]
    for block in model.blocks:
        x = x + attended(block.norm1(x), block.attention.qkv, block.attention.proj, 3)
        hidden = block.mlp.fc1(block.norm2(x))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + block.mlp.fc2(hidden)
        if block.pooling is not None:
            x = pooled_literally(x, model.kernel, "max") + block.pooling.position[0]
    return model.head(model.norm(x).mean(0))


@pytest.mark.parametrize("options", [{}, {"every": 1}, {"every": 0}, {"every": 9, "kernel": 4}])
def test_the_network_is_the_papers(options) -> None:
    model = small(**options)
    x = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        wanted = torch.stack([literal(model, image) for image in x])
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x).detach(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["max", "average"])
@pytest.mark.parametrize(("tokens", "kernel"), [(7, 3), (8, 3), (9, 2), (5, 5), (6, 1), (11, 4)])
def test_pooling_window_by_window(tokens, kernel, kind) -> None:
    left = pooled_length(tokens, kernel)
    pooling = TokenPooling(dim=3, tokens=left, kernel=kernel, kind=kind)
    nn.init.normal_(pooling.position)
    x = torch.randn(2, tokens, 3)
    wanted = torch.stack([pooled_literally(s, kernel, kind) for s in x]) + pooling.position
    with torch.no_grad():
        torch.testing.assert_close(pooling(x.clone(), pooling.position), wanted)
    pool = F.max_pool1d if kind == "max" else F.avg_pool1d
    theirs = pool(x.mT, kernel, 2).mT + pooling.position
    torch.testing.assert_close(pooling(x, pooling.position), theirs)


def test_lengths_are_the_papers() -> None:
    """196 patches and four poolings of three tokens."""
    lengths = [196]
    for _ in range(4):
        lengths.append(pooled_length(lengths[-1], 3))
    assert lengths == [196, 97, 48, 23, 11]
    with torch.device("meta"):
        model = hvt.assemble(hvt.VARIANTS["hvt-s-4"])
    pooled = {i: b.pooling.position.shape[1] for i, b in enumerate(model.blocks) if b.pooling}
    assert pooled == {0: 97, 3: 48, 6: 23, 9: 11}


# ---- what follows from the design ---------------------------------------------------------------


def test_windows_run_across_the_ends_of_rows() -> None:
    """A grid of 2×3: the second window holds a patch of the first row and two of the next."""
    pooling = TokenPooling(dim=1, tokens=2, kernel=3, kind="max")
    x = torch.tensor([0.0, 0, 0, 0, 9, 0]).view(1, 6, 1)
    with torch.no_grad():
        assert pooling(x, pooling.position).flatten().tolist() == [0, 9]


def test_more_stages_cost_less() -> None:
    costs = []
    for every in (0, 12, 6, 4, 3):
        model = HVT(dim=24, depth=12, heads=3, patch=4, grid=(14, 14), every=every).eval()
        costs.append(count_flops(model, torch.zeros(1, 3, 56, 56)))
    assert costs == sorted(costs, reverse=True)
    assert costs[4] < costs[0] / 3


# ---- other sizes --------------------------------------------------------------------------------


@given(
    rows=st.integers(6, 9),
    columns=st.integers(6, 9),
    level=st.integers(0, 3),
    kernel=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_positions_of_the_native_grid_survive_the_round(rows, columns, level, kernel) -> None:
    """Spread to the patches and read at the centres again: the same, by the interpolation itself
    and not only by the shortcut; and lengths for other grids are those of the pooling."""
    tokens = rows * columns
    for _ in range(level):
        tokens = pooled_length(tokens, kernel)
    if tokens < 1:
        return
    table = torch.randn(1, tokens, 2)
    spread = hvt.read_at(
        table,
        (torch.arange(rows * columns) - hvt.centre_of_first(level, kernel)) / 2**level,
    )
    again = hvt.read_at(
        spread, torch.arange(tokens) * 2.0**level + hvt.centre_of_first(level, kernel)
    )
    if kernel % 2:  # else centres lie between patches
        torch.testing.assert_close(again, table, rtol=1e-4, atol=1e-4)
    other = resample_positions(
        table, (rows, columns), (rows + 2, columns + 1), level=level, kernel=kernel
    )
    left = (rows + 2) * (columns + 1)
    for _ in range(level):
        left = pooled_length(left, kernel)
    assert other.shape == (1, left, 2)


def test_positions_that_rise_down_the_image_do_so_in_any_grid() -> None:
    """A table of row numbers (as fractions) stays one, however often it was pooled."""
    native, grid = (16, 16), (24, 32)

    def rows_of(size: tuple[int, int], level: int) -> Tensor:
        tokens = size[0] * size[1]
        places = torch.arange(tokens)
        for _ in range(level):
            tokens = pooled_length(tokens, 3)
        centres = hvt.centre_of_first(level, 3) + 2.0**level * torch.arange(tokens)
        return ((places // size[1] + 0.5) / size[0])[centres.long()][None, :, None]

    for level in (0, 1, 2):
        found = resample_positions(rows_of(native, level), native, grid, level=level, kernel=3)
        wanted = rows_of(grid, level)
        assert (found - wanted).abs().max() < 1 / native[0]
        assert (found - wanted).abs().mean() < 0.2 / native[0]


@pytest.mark.parametrize("size", [(24, 32), (25, 35), (40, 24), (64, 96)])
def test_other_sizes_work_and_remainders_are_lost(size) -> None:
    model = small()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        found = model(x)
        cut = x[:, :, : size[0] // 4 * 4, : size[1] // 4 * 4]
        torch.testing.assert_close(model(cut), found)
        maps = model.features(x)
    assert all(value.shape[2:] == (size[0] // 4, size[1] // 4) for value, _ in maps)


def test_a_patch_shows_the_token_that_covers_it() -> None:
    for level, tokens in ((0, 20), (1, 9), (2, 4)):
        nearest = nearest_tokens(20, tokens, level=level, kernel=3, device=torch.device("cpu"))
        for patch, token in enumerate(nearest.tolist()):
            low, high = 2**level * token, 2**level * token + 2 ** (level + 1) - 2
            assert low <= patch <= high or token == tokens - 1


def test_sizes_with_too_few_patches() -> None:
    model = small(every=1)  # 31 patches at least, so 6×6
    assert model.input_requirements.minimum == 24
    with pytest.raises(PolypatchError, match="the input is 20×64"):
        model(torch.zeros(1, 3, 20, 64))
    with pytest.raises(PolypatchError, match="4 poolings of 3 tokens need 31 patches"):
        small(every=1, grid=(5, 6))


# ---- options ------------------------------------------------------------------------------------


def test_drop_path_rises_from_nothing() -> None:
    with torch.device("meta"):
        rates = [
            m.rate
            for m in hvt.assemble(hvt.VARIANTS["hvt-s-1"]).modules()
            if isinstance(m, DropPath)
        ]
        none = hvt.assemble(hvt.VARIANTS["hvt-s-1"], drop_path=0.0)
    assert rates == pytest.approx([0.1 * k / 11 for k in range(12)])
    assert not any(m.rate for m in none.modules() if isinstance(m, DropPath))


def test_dropouts_act_in_training_only() -> None:
    model = create("hvt-nano(dropout=0.3,attention_dropout=0.2)", classes=3)
    assert isinstance(model, HVT)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))
    assert model.blocks[0].attention.dropout == 0.2
    assert hvt.official_config(model)["drop_rate"] == 0.3


@pytest.mark.parametrize("pooling", ["average", "convolution"])
def test_other_poolings_than_the_authors(pooling) -> None:
    model = hvt.build("hvt-nano", classes=3, pooling=pooling).eval()
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 3)
    with pytest.raises(PolypatchError, match=f"pooling='{pooling}'"):
        hvt.official_config(model)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pooling": "maximum"}, "did you mean max"),
        ({"heads": 5}, "does not divide into 5 heads"),
    ],
)
def test_options_without_meaning(options, says) -> None:
    with pytest.raises(PolypatchError, match=says):
        small(**options)


def test_the_resolution_must_hold_the_poolings() -> None:
    with pytest.raises(PolypatchError, match="use a larger resolution"):
        create("hvt-nano", resolution=16)
    assert create("hvt-nano(patch=2)", resolution=16).grid == (8, 8)
    with pytest.raises(PolypatchError, match="patch=0"):
        create("hvt-nano(patch=0)")


# ---- variants and authors' files ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ti-1", 5_735_656),
        ("s-0", 22_049_896),
        ("s-1", 22_087_144),
        ("s-2", 22_105_576),
        ("s-3", 22_114_408),
        ("s-4", 22_118_632),
        ("scale-ti-4", 22_118_632),
    ],
)
def test_published_sizes(name, count) -> None:
    """Of S-0 the authors give 22.05 M; the number here is S-1's without its pooled positions."""
    with torch.device("meta"):
        model = hvt.assemble(hvt.VARIANTS[f"hvt-{name}"])
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("name", "published"), [("ti-1", 0.64), ("s-0", 4.57), ("s-1", 2.40), ("s-4", 1.39)]
)
def test_published_operations(name, published) -> None:
    """The authors' GFLOPs are multiplications with an addition, of the patches and the blocks."""
    full = hvt.VARIANTS[f"hvt-{name}"]
    with torch.device("meta"):
        model = hvt.assemble(full).eval()
    operations, tokens = 196 * 768 * full.dim, 196
    for block in model.blocks:
        operations += 12 * tokens * full.dim**2 + 2 * tokens**2 * full.dim
        tokens = block.pooling.position.shape[1] if block.pooling else tokens
    assert operations / 1e9 == pytest.approx(published, rel=0.02)


CONFIGS = {
    "plain": {},
    "pooling everywhere": {"every": 1},
    "one pooling": {"every": 4},
    "no classes": {"classes": 0},
    "wide windows": {"kernel": 4, "grid": (7, 7)},
    "narrow windows": {"kernel": 2, "grid": (8, 8)},
    "no bias": {"qkv_bias": False, "hidden": 36, "channels": 1},
    "one block": {"depth": 1, "every": 3},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_what_was_built_is_recognised(options) -> None:
    model = small(**options)
    state = hvt.to_official(model)
    found = hvt.recognise({name: tuple(value.shape) for name, value in state.items()})
    assert found is not None
    built = hvt.official_config(model)
    assert found.keys() == built.keys()
    assert {k for k in found if found[k] != built[k]} <= set(hvt.ASSUMED)
    assert tuple(found["img_size"]) == tuple(built["img_size"])
    again = hvt.from_official({**found, "num_heads": 3}, state)
    x = torch.randn(2, options.get("channels", 3), 40, 32)
    if again.kernel == model.kernel:
        with torch.no_grad():
            torch.testing.assert_close(again(x), model(x))
    else:  # 49 patches give 23 tokens by windows of 3 and of 4 alike
        assert options["kernel"] == 4


def test_heads_are_those_of_the_authors_variants() -> None:
    for name in ("hvt-ti-1", "hvt-s-2", "hvt-nano"):
        with torch.device("meta"):
            state = hvt.to_official(hvt.assemble(hvt.VARIANTS[name]))
        found = hvt.recognise({n: tuple(v.shape) for n, v in state.items()})
        assert found is not None
        assert found["num_heads"] == hvt.VARIANTS[name].heads
        assert found["pool_block_width"] == hvt.VARIANTS[name].every


def test_a_file_without_poolings_needs_to_be_told() -> None:
    model = small(every=0)
    state = hvt.to_official(model)
    assert hvt.recognise({name: tuple(value.shape) for name, value in state.items()}) is None
    again = hvt.from_official(hvt.official_config(model), state)
    x = torch.randn(1, 3, 24, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))


def test_other_networks_are_not_recognised() -> None:
    state = hvt.to_official(small())
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert hvt.recognise({}) is None
    assert hvt.recognise({k: v for k, v in shapes.items() if k != "norm.weight"}) is None
    assert hvt.recognise(shapes | {"blocks.0.pos_embed": (1, 40, 24)}) is None
    assert hvt.recognise(shapes | {"blocks.1.pos_embed": (1, 11, 24)}) is None


def test_the_authors_words() -> None:
    with torch.device("meta"):
        plain = hvt.network({"pool_block_width": 12})
        scaled = hvt.network(
            {"embed_dim": 24, "num_heads": 3, "img_size": (32, 64), "patch_size": (4, 4),
             "qk_scale": 0.7, "norm_layer": "LayerNorm(eps=1e-6)", "pool_stride": 3}
        )  # fmt: skip
    assert (plain.dim, plain.norm.eps, plain.blocks[0].attention.heads) == (768, 1e-5, 12)
    assert (scaled.grid, scaled.norm.eps) == ((8, 16), 1e-6)
    assert scaled.blocks[0].attention.scale == 0.7
    with pytest.raises(PolypatchError, match="patches are square"):
        hvt.network({"patch_size": (16, 8)})
    with pytest.raises(PolypatchError, match="BatchNorm"):
        hvt.network({"norm_layer": "BatchNorm"})
