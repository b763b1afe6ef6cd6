from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polypatch
from polypatch import PolypatchError
from polypatch.patching import dart
from polypatch.tokens import Pieces, Tokens


def random_density(*shape, dtype=torch.float32):
    density = torch.rand(*shape, dtype=dtype) + 0.05
    return density / density.flatten(1).sum(1).view(-1, *[1] * (len(shape) - 1))


# ---- quantiles -----------------------------------------------------------------------------------


def slow_quantile(density, level):
    """Walk along the cells until the level is reached."""
    total = 0.0
    for cell, mass in enumerate(density):
        if total + mass >= level:
            return cell + (level - total) / mass
        total += mass
    return float(len(density))


def test_quantiles_are_the_inverse_of_the_cumulated_density():
    density = random_density(3, 9, dtype=torch.float64)
    levels = torch.rand(20, dtype=torch.float64)
    ours = dart.quantiles(density, levels, eps=0.0)
    for row, wanted in zip(density.tolist(), ours.tolist()):
        slow = [slow_quantile(row, level) for level in levels.tolist()]
        np.testing.assert_allclose(wanted, slow, atol=1e-9)


def test_quantile_gradients():
    raw = torch.rand(2, 7, dtype=torch.float64, requires_grad=True)

    def cut(values):
        density = values.softmax(1)
        return dart.quantiles(density, torch.tensor([0.13, 0.48, 0.77], dtype=torch.float64))

    assert torch.autograd.gradcheck(cut, raw)


def test_parts_have_equal_mass():
    density = random_density(2, 11, dtype=torch.float64)
    edges = dart.quantile_edges(density, 5)
    weights = []
    for row in edges:
        low, high = row[:-1, None], row[1:, None]
        start = torch.arange(11, dtype=torch.float64)
        overlap = (torch.minimum(high, start + 1) - torch.maximum(low, start)).clamp_min(0)
        weights.append(overlap)
    mass = (torch.stack(weights) * density[:, None]).sum(-1)
    torch.testing.assert_close(mass, torch.full_like(mass, 0.2), atol=1e-6, rtol=0)
    assert dart.quantile_edges(density, 1).tolist() == [[0.0, 11.0]] * 2


def test_a_uniform_density_is_cut_evenly():
    density = torch.full((1, 6, 8), 1 / 48)
    cut = dart.flow_partition(density, tokens=12, rows=3)
    torch.testing.assert_close(cut.rows[0], torch.linspace(0, 6, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(cut.strip[0], torch.linspace(0, 24, 13), atol=1e-5, rtol=0)


def slow_flow(density, tokens, rows):
    """The paper's partition of one image, cell by cell."""
    height, width = density.shape
    sums = [float(row.sum()) for row in density]
    edges = [0.0] + [slow_quantile(sums, r / rows) for r in range(1, rows)] + [float(height)]
    strip = []
    for top, bottom in itertools.pairwise(edges):
        for column in range(width):
            inside = [max(0.0, min(bottom, j + 1) - max(top, j)) for j in range(height)]
            mean = sum(w * float(density[j, column]) for j, w in enumerate(inside))
            strip.append(mean / sum(inside))
    total = sum(strip)
    strip = [value / total for value in strip]
    cuts = [0.0] + [slow_quantile(strip, t / tokens) for t in range(1, tokens)]
    return edges, [*cuts, float(len(strip))]


@pytest.mark.parametrize(("tokens", "rows"), [(20, 4), (7, 3), (3, 5), (40, 6), (1, 1)])
def test_flow_partition_is_the_papers(tokens, rows):
    density = random_density(2, 5, 6, dtype=torch.float64)
    cut = dart.flow_partition(density, tokens=tokens, rows=rows)
    for index in range(2):
        edges, strip = slow_flow(density[index], tokens, rows)
        np.testing.assert_allclose(cut.rows[index].tolist(), edges, atol=1e-5)
        np.testing.assert_allclose(cut.strip[index].tolist(), strip, atol=1e-4)


def test_grid_partition_cuts_rows_and_columns_by_their_own_sums():
    density = random_density(1, 5, 6, dtype=torch.float64)
    cut = dart.grid_partition(density, rows=3, columns=4)
    sums = density[0].sum(0).tolist()
    across = [0.0] + [slow_quantile(sums, k / 4) for k in range(1, 4)]
    wanted = [row * 6 + x for row in range(3) for x in across] + [18.0]
    np.testing.assert_allclose(cut.strip[0].tolist(), wanted, atol=1e-6)


# ---- regions -------------------------------------------------------------------------------------


def slow_sample(image, edges, strip, patch, grid):
    """Read one image's regions pixel by pixel: rows first, then columns of the strip."""
    channels, height, width = image.shape
    rows = len(edges) - 1

    def line(y):
        y = min(max(y, 0.0), height - 1.0)
        low = min(int(y), height - 1)
        high = min(low + 1, height - 1)
        return image[:, low] * (1 - (y - low)) + image[:, high] * (y - low)

    out = torch.zeros(len(strip) - 1, patch, patch, channels, dtype=image.dtype)
    for k in range(patch):
        lines = []
        for r in range(rows):
            top, bottom = (edge * height / grid[0] for edge in edges[r : r + 2])
            lines.append(line(top + (bottom - top) * k / patch))
        whole = torch.cat(lines, dim=1)
        for t in range(len(strip) - 1):
            left, right = (edge * width / grid[1] for edge in strip[t : t + 2])
            for q in range(patch):
                x = left + (right - left) * q / patch
                low = min(int(x), whole.shape[1] - 1)
                high = min(low + 1, whole.shape[1] - 1)
                out[t, k, q] = whole[:, low] * (1 - (x - low)) + whole[:, high] * (x - low)
    return out


@pytest.mark.parametrize("size", [(12, 18), (7, 5), (1, 3)])
def test_regions_are_read_as_written(size):
    image = torch.rand(2, 3, *size, dtype=torch.float64)
    cut = dart.flow_partition(random_density(2, 4, 3, dtype=torch.float64), tokens=7, rows=3)
    ours = dart.sample_regions(image, cut, 4)
    for index in range(2):
        edges, strip = cut.rows[index].tolist(), cut.strip[index].tolist()
        slow = slow_sample(image[index], edges, strip, 4, (4, 3))
        torch.testing.assert_close(ours[index], slow, atol=1e-6, rtol=0)


def test_zero_padding_differs_in_the_last_token_only():
    image = torch.rand(1, 3, 16, 16)
    density = torch.ones(1, 4, 4)
    density[:, -1, -1] = 5.0  # the last regions are narrower than a patch
    cut = dart.flow_partition(density / density.sum(), tokens=16, rows=4)
    border = dart.sample_regions(image, cut, 4)
    zeros = dart.sample_regions(image, cut, 4, padding="zeros")
    torch.testing.assert_close(border[:, :-1], zeros[:, :-1], atol=1e-4, rtol=0)
    assert (border[:, -1] - zeros[:, -1]).abs().max() > 0.01


def test_sampling_gradients():
    image = torch.rand(1, 2, 6, 8, dtype=torch.float64)
    raw = torch.rand(1, 3, 4, dtype=torch.float64, requires_grad=True)

    def sample(values):
        density = values.flatten(1).softmax(1).view_as(values)
        cut = dart.flow_partition(density, tokens=5, rows=2)
        return dart.sample_regions(image, cut, 3)

    assert torch.autograd.gradcheck(sample, raw, eps=1e-7, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 33), st.integers(1, 40)),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    tokens=st.integers(1, 40),
    rows=st.integers(1, 7),
    seed=st.integers(0, 99),
    power=st.sampled_from([0.0, 1.0, 6.0]),
)
def test_supports_cover_the_canvas_exactly_once(size, grid, tokens, rows, seed, power):
    generator = torch.Generator().manual_seed(seed)
    density = (torch.rand(2, *grid, generator=generator) + 0.01) ** power
    density = density / density.sum((1, 2), keepdim=True)
    cut = dart.flow_partition(density, tokens=tokens, rows=rows)
    centre, extent, pieces = dart.strip_pieces(cut, size)
    assert pieces.owner.shape[1] == tokens + rows - 1
    area = pieces.extent.prod(-1) * (pieces.owner >= 0)
    torch.testing.assert_close(area.sum(1), torch.full((2,), float(math.prod(size))))
    tall = Tokens(
        x=torch.zeros(2, tokens, 1), centre=centre, extent=extent, canvas=size, regions=pieces
    ).check()
    # Every pixel of the canvas and of a finer raster lies in exactly one box.
    for shape in (size, (2 * size[0], 3 * size[1])):
        assert (tall.label_map(shape) >= 0).all()
    low = pieces.centre - pieces.extent / 2
    high = pieces.centre + pieces.extent / 2
    y = torch.arange(size[0]) + 0.5
    x = torch.arange(size[1]) + 0.5
    inside = (low[..., :1] <= y) & (y < high[..., :1])
    across = (low[..., 1:] <= x) & (x < high[..., 1:])
    times = torch.einsum("bph,bpw->bhw", inside.float() * (area > 0)[..., None], across.float())
    assert (times == 1).all()


def test_a_token_that_wraps_has_a_box_in_each_row():
    cut = dart.Partition(
        rows=torch.tensor([[0.0, 1.0, 2.0, 3.0]]),
        strip=torch.tensor([[0.0, 3.0, 11.0, 12.0]]),  # rows of 4 cells: the second token spans all
        grid=(3, 4),
    )
    centre, extent, pieces = dart.strip_pieces(cut, (6, 8))
    assert pieces.owner.tolist() == [[0, 1, 1, 1, 2]]
    assert pieces.centre[0].tolist() == [[1, 3], [1, 7], [3, 4], [5, 3], [5, 7]]
    assert pieces.extent[0].tolist() == [[2, 6], [2, 2], [2, 8], [2, 6], [2, 2]]
    assert extent[0].tolist() == [[2, 6], [6, 8], [2, 2]]
    torch.testing.assert_close(centre[0, 1], torch.tensor([3.5, 4.0]))  # centroid of its boxes


def test_region_position_averages_the_table():
    table = torch.randn(1, 3, 4, 5)
    position = dart.RegionPosition(grid=(3, 4), dim=5)
    position.table.data.copy_(table)
    cut = dart.flow_partition(random_density(2, 3, 4), tokens=7, rows=2)
    centre, extent, pieces = dart.strip_pieces(cut, (30, 40))
    tokens = Tokens(
        x=torch.zeros(2, 7, 5), centre=centre, extent=extent, canvas=(30, 40), regions=pieces
    )
    code = position(tokens).x
    for sample in range(2):
        rows, strip = cut.rows[sample].tolist(), cut.strip[sample].tolist()
        # The paper's way: the table over the new rows, side by side, then over each token.
        laid = []
        for top, bottom in itertools.pairwise(rows):
            share = [max(0.0, min(bottom, j + 1) - max(top, j)) for j in range(3)]
            laid.append(sum(w * table[0, j] for j, w in enumerate(share)) / sum(share))
        laid = torch.cat(laid)
        for t, (left, right) in enumerate(itertools.pairwise(strip)):
            share = torch.tensor([max(0.0, min(right, j + 1) - max(left, j)) for j in range(8)])
            mean = (share[:, None] * laid).sum(0) / share.sum()
            torch.testing.assert_close(code[sample, t], mean, atol=2e-3, rtol=0)


def test_warp_of_a_flat_density_is_the_image():
    image = torch.rand(2, 3, 12, 16)
    density = torch.full((2, 3, 4), 1 / 12)
    torch.testing.assert_close(
        dart.warp(image, density, grid=(3, 4), patch=4), image, atol=1e-4, rtol=0
    )


# ---- scores --------------------------------------------------------------------------------------


def test_scores_depend_on_the_batch_only_where_asked():
    images = torch.rand(3, 3, 16, 16) * torch.tensor([1.0, 0.2, 3.0])[:, None, None, None]
    for over, same in (("image", True), ("batch", False)):
        network = dart.ScoreNetwork(
            features=torch.nn.Identity(), feature_dim=3, hidden=8, standardise=over
        )
        together = network(images, (4, 4))
        alone = torch.cat([network(image[None], (4, 4)) for image in images])
        assert torch.allclose(together, alone, atol=1e-4) == same


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_score_heads_are_the_papers(version):
    network = dart.ScoreNetwork(
        features=torch.nn.Conv2d(3, 6, 4, stride=4), feature_dim=6, hidden=5, version=version,
        standardise="batch", last_bias=True,
    )  # fmt: skip
    image = torch.rand(2, 3, 16, 24)
    features = network.features(image)
    mlp = torch.nn.Sequential(network.mlp.fc1, torch.nn.GELU(), network.mlp.fc2)
    if version == "v1":
        score = mlp(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    else:
        gate = mlp(features.mean((2, 3))).sigmoid()
        score = (features * gate[:, :, None, None]).sum(1, keepdim=True)
    score = torch.nn.functional.interpolate(score, size=(5, 7), mode="bilinear")
    score = (score - score.mean()) / (score.std() + 1e-8)
    wanted = score.sigmoid() + 0.1 if version == "v1" else (2 * score).sigmoid()
    torch.testing.assert_close(network(image, (5, 7)), wanted[:, 0])


@pytest.mark.parametrize("over", ["image", "batch"])
def test_a_flat_image_gives_flat_scores_and_finite_gradients(over):
    score = torch.full((2, 3, 3), 0.7, requires_grad=True)
    flat = dart.standardised(score, over=over)
    if over == "image":
        assert flat.abs().max() < 1e-3
    flat.sum().backward()
    assert score.grad is not None
    assert score.grad.isfinite().all()


def test_imagenet_features_have_torchvisions_parameter_counts():
    # torchvision's classifiers without their last layers.
    with torch.device("meta"):
        small = dart.score_features("mobilenet-small", "v2").make(3)
        large = dart.score_features("mobilenet-large", "v2").make(3)
        efficient = dart.score_features("efficientnet-b0").make(3)
    counts = [sum(p.numel() for p in f.parameters()) for f in (small, large, efficient)]
    assert counts == [927_008, 2_971_952, 4_007_548]


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("score", ["mobilenet-small", "mobilenet-large", "efficientnet-b0"])
def test_imagenet_features_reach_stride_32(score, version):
    features = dart.score_features(score, version)
    assert features.make(3).eval()(torch.rand(1, 3, 64, 96)).shape == (1, features.dim, 2, 3)


def test_features_of_a_classifier_are_filled_in():
    model = polypatch.create("vit-nano+dart(score=mobilenet-small)", classes=3, seed=0)
    whole = dart.score_features("mobilenet-small", "v2").make(3)
    state = {
        f"features.{name}": torch.randn_like(v.float()) for name, v in whole.state_dict().items()
    }
    state["classifier.0.weight"] = torch.zeros(1)
    dart.load_features(model, state)
    first = model.patching.score.features[0][0].weight
    torch.testing.assert_close(first.data, state["features.0.0.weight"])
    with pytest.raises(PolypatchError, match=r"missing keys 0\.0\.weight"):
        dart.load_features(model, {"classifier.0.weight": torch.zeros(1)})
    with pytest.raises(PolypatchError, match="ImageNet"):
        dart.load_features(polypatch.create("vit-nano+dart", classes=3), state)


# ---- on a host -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_equal_scores_give_the_hosts_own_patches(size):
    plain = polypatch.create("vit-nano", classes=5, seed=0).eval()
    model = polypatch.create("vit-nano", classes=5, seed=0).eval()
    images = torch.rand(2, 3, *size)
    dart.plug(model)
    model.patching.score.mlp.fc2.weight.data.zero_()
    torch.testing.assert_close(
        model.patching(images).x, plain.patching(images).x, atol=1e-4, rtol=0
    )
    if size == (32, 32):  # other grids read the host's table resampled, not averaged
        torch.testing.assert_close(model(images), plain(images), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "(tokens=20,rows=3)",
        "(score=pixel,version=v2)",
        "(partition=grid,tokens=30)",
        "(standardise=batch)",
        "(position=centre)",
        "(score=mobilenet-small,cell=8)",
    ],
)
def test_gradients_reach_every_parameter(options):
    model = polypatch.create(f"vit-nano+dart{options}", classes=5, seed=0).train()
    model(torch.rand(4, 3, 32, 32)).square().sum().backward()
    for name, value in model.named_parameters():
        if "mobilenet" in options and ".block." in name and value.ndim == 1:
            continue  # a ReLU may be off for a whole channel
        assert value.grad is not None, name
        assert value.grad.abs().max() > 0, name


def test_frozen_features_get_no_gradients():
    model = polypatch.create("vit-nano+dart(frozen=true)", classes=5, seed=0).train()
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is None for p in model.patching.score.features.parameters())
    assert model.patching.score.mlp.fc1.weight.grad.abs().max() > 0


@pytest.mark.parametrize("size", [(32, 32), (17, 23), (3, 50), (1, 1)])
@pytest.mark.parametrize("partition", ["flow", "grid"])
def test_any_size(size, partition):
    model = polypatch.create(f"vit-nano+dart(partition={partition})", classes=5, seed=0).eval()
    tokens = model.tokens(torch.rand(1, 3, *size)).check()
    assert tokens.canvas == size
    assert (tokens.label_map() >= 0).all()
    count, rows = model.patching.counts(*size)
    if partition == "flow":
        assert tokens.x.shape[1] == count + 1 == math.ceil(size[0] / 4) * math.ceil(size[1] / 4) + 1
        assert isinstance(tokens.regions, Pieces)
        assert tokens.regions.owner.shape[1] == count + rows - 1
    assert model(torch.rand(1, 3, *size)).isfinite().all()


def test_images_do_not_depend_on_their_batch():
    model = polypatch.create("vit-nano+dart", classes=5, seed=0).eval()
    images = torch.rand(3, 3, 32, 32)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, atol=1e-4, rtol=1e-4)


def test_bfloat16():
    model = polypatch.create("vit-nano+dart", classes=5, seed=0).eval()
    images = torch.rand(2, 3, 32, 32)
    wanted = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (model(images).float() - wanted).abs().max() < 0.1
    model.bfloat16()
    tokens = model.tokens(images.bfloat16())
    assert tokens.x.dtype == torch.bfloat16
    assert tokens.centre.dtype == torch.float32
    assert (model(images.bfloat16()).float() - wanted).abs().max() < 0.2


def test_other_positions_and_techniques_go_along():
    specs = (
        "vit-nano(position=rope)+dart",
        "vit-nano(position=sincos)+dart",
        "vit-nano+dart+dual-patchnorm",
        "vit-nano+dual-patchnorm+dart",
    )
    for spec in specs:
        model = polypatch.create(spec, classes=5, seed=0)
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    assert model.features(torch.rand(1, 3, 32, 32))[-1].map.shape == (1, 64, 8, 8)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("vit-nano+dart(score=mobilnet-small)", "did you mean mobilenet-small"),
        ("vit-nano+dart(version=v3)", "version"),
        ("vit-nano+dart(partition=flows)", "did you mean flow"),
        ("vit-nano+dart(position=corner)", "position"),
        ("vit-nano+dart(standardise=all)", "standardise"),
        ("vit-nano+dart(tokens=0)", "tokens must be at least 1"),
        ("vit-nano+dart+dart+pixel-transformer", "DartPatching"),
    ],
)
def test_bad_options(spec, said):
    with pytest.raises(PolypatchError, match=said):
        polypatch.create(spec, classes=5)


# In a process of its own: here, signatures are checked at run time, which can't be compiled.
COMPILED = """
import torch
from polypatch import create

image = torch.rand(2, 3, 32, 32)
for spec in ("vit-nano+dart", "vit-nano+dart(partition=grid)"):
    model = create(spec, classes=5, seed=0).eval()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(image), model(image), atol=1e-4, rtol=1e-4)
"""


@pytest.mark.slow
def test_compiles_whole():
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


# ---- the authors' networks -----------------------------------------------------------------------

COUNTS = {  # all, trainable
    "dart-tiny": (6_303_289, 5_726_825),
    "dart-tiny-v2": (6_755_688, 5_828_680),
    "dart-tiny-121": (6_303_289, 5_726_825),
    "dart-small": (24_095_657, 22_076_585),
    "dart-small-144": (24_095_657, 22_076_585),
    "dart-small-288": (24_095_657, 22_076_585),
    "dart-small-392": (24_095_657, 22_076_585),
}


@pytest.mark.parametrize("name", dart.VARIANTS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = dart.build(name)
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    assert (total, sum(p.numel() for p in parameters if p.requires_grad)) == COUNTS[name]


def test_a_network_of_the_authors_runs_at_other_sizes():
    model = polypatch.create("dart-tiny-121(standardise=image)", classes=5, seed=0).eval()
    for size in ((448, 448), (224, 320)):
        tokens = model.tokens(torch.rand(1, 3, *size))
        assert tokens.x.shape[1] == 122
        assert (tokens.label_map((56, 80)) >= 0).all()
    model.reset_head(3)
    assert model(torch.rand(1, 3, 96, 96)).shape == (1, 3)
    assert "position.table" in model.no_decay()


def official_state(score="mobilenet-small", version="v1", dim=64, depth=2, side=14, classes=4):
    """A state dict with the authors' keys."""
    features = dart.score_features(score, version)
    hidden, out = features.hidden, 1 if version == "v1" else features.dim
    stem = "patch_embed.spn.spn.spn" if score != "pixel" else "patch_embed.spn.spn"
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, side * side + 1, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
        f"{stem}.mlp.net.0.weight": (hidden, features.dim),
        f"{stem}.mlp.net.0.bias": (hidden,),
        f"{stem}.mlp.net.2.weight": (out, hidden),
        f"{stem}.mlp.net.2.bias": (out,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "head.weight": (classes, dim),
        "head.bias": (classes,),
    }
    for index in range(depth):
        block = {
            "norm1": (dim,),
            "norm2": (dim,),
            "attn.qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            "mlp.fc1": (2 * dim, dim),
            "mlp.fc2": (dim, 2 * dim),
        }
        for name, shape in block.items():
            shapes[f"blocks.{index}.{name}.weight"] = shape
            shapes[f"blocks.{index}.{name}.bias"] = shape[:1]
    state = {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    made = features.make(3)
    if score != "pixel":
        made.init_weights()
    return state | {f"{stem}.features.{name}": v for name, v in made.state_dict().items()}


@pytest.mark.parametrize(
    ("score", "version"),
    [
        ("pixel", "v1"),
        ("mobilenet-small", "v1"),
        ("mobilenet-small", "v2"),
        ("mobilenet-large", "v1"),
        ("efficientnet-b0", "v2"),
    ],
)
def test_weights_are_recognised(score, version):
    state = official_state(score, version)
    config = dart.recognise({name: tuple(value.shape) for name, value in state.items()})
    assert config == {
        "img_size": 448, "embed_dim": 64, "num_heads": 1, "high_res": True, "num_patches": 196
    }  # fmt: skip
    model = dart.from_official(config, state)
    assert not model.training
    assert model.patching.score.version == version
    assert model.patching.score.standardise == "batch"
    told = {"num_patches": 25, "high_res": False}
    small = dart.from_official({**config, **told, "img_size": 224}, state)
    assert small.tokens(torch.rand(1, 3, 224, 224)).x.shape[1] == 26


def test_foreign_weights_are_not_recognised():
    shapes = {name: tuple(value.shape) for name, value in official_state().items()}
    assert dart.recognise({n: s for n, s in shapes.items() if "spn" not in n}) is None
    assert dart.recognise(shapes | {"layers.0.mixer.A_log": (4, 4)}) is None
    assert dart.recognise({}) is None


def test_wrong_weights_are_named():
    state = official_state()
    with pytest.raises(PolypatchError, match=r"blocks\.0\.extra"):
        dart.from_official({}, state | {"blocks.0.extra": torch.zeros(1)})
    lacking = {name: value for name, value in state.items() if name != "norm.bias"}
    with pytest.raises(PolypatchError, match=r"norm\.bias"):
        dart.from_official({}, lacking)
    with pytest.raises(PolypatchError, match="cls_token"):
        dart.from_official({}, {n: v for n, v in state.items() if n != "cls_token"})
    with pytest.raises(PolypatchError, match="unknown arguments of DARViT: patches"):
        dart.from_official({"patches": 3}, state)
    with pytest.raises(PolypatchError, match="distilled"):
        dart.from_official({"distilled": True}, state)
    with pytest.raises(PolypatchError, match="does not belong to images of 224"):
        dart.from_official({"img_size": 224}, state)


def test_a_representation_layer_is_read():
    state = official_state("pixel")
    state |= {"pre_logits.fc.weight": torch.randn(24, 64), "pre_logits.fc.bias": torch.randn(24)}
    state["head.weight"] = torch.randn(4, 24)
    model = dart.from_official({"representation_size": 24}, state)
    image = torch.rand(1, 3, 448, 448)
    latent = model.forward_features(image).x[:, 0]
    hidden = torch.tanh(latent @ state["pre_logits.fc.weight"].T + state["pre_logits.fc.bias"])
    wanted = hidden @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(model(image), wanted, atol=1e-4, rtol=1e-4)
