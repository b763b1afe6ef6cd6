import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from polypatch import PolypatchError, create
from polypatch.patching import spformer
from polypatch.patching.spformer import (
    SuperpixelCrossAttention,
    fold,
    from_cells,
    hard_labels,
    neighbours,
    similarities,
    spread,
    to_cells,
    update,
    update_weights,
)
from polypatch.patching.spformer_network import Variant, assemble
from tests.parity.goldens import find_cases

SPEC = "vit-nano+spformer"


def alone(program):
    """Run a program by itself: the shape checks of the tests' own process can't be compiled."""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def literal_sca(layer, pixels, superpixels):
    """The equations, pixel by pixel: two softmax axes, both from the old features."""
    _, height, width, _ = pixels.shape
    _, rows, columns, _ = superpixels.shape
    p, q = height // rows, width // columns

    def parts(x, place, qkv, norm, sizes):
        return norm(qkv(place(x))).split(sizes, dim=-1)

    sq, sk, sv = parts(
        superpixels,
        layer.superpixel_place,
        layer.superpixel_qkv,
        layer.superpixel_norm,
        layer.superpixel_parts,
    )
    iq, ik, iv = parts(
        pixels, layer.pixel_place, layer.pixel_qkv, layer.pixel_norm, layer.pixel_parts
    )
    new_s, new_i = superpixels.clone(), pixels.clone()
    for b in range(len(pixels)):
        for r in range(rows):
            for c in range(columns):
                seen = [
                    (y, x)
                    for y in range(max(0, (r - 1) * p), min(height, (r + 2) * p))
                    for x in range(max(0, (c - 1) * q), min(width, (c + 2) * q))
                ]
                delta = []
                for head in range(layer.heads):
                    d, v = sq.shape[-1] // layer.heads, iv.shape[-1] // layer.heads
                    mine = sq[b, r, c, head * d : (head + 1) * d]
                    keys = torch.stack([ik[b, y, x, head * d : (head + 1) * d] for y, x in seen])
                    values = torch.stack([iv[b, y, x, head * v : (head + 1) * v] for y, x in seen])
                    delta.append((keys @ mine / math.sqrt(d)).softmax(0) @ values)
                new_s[b, r, c] += layer.superpixel_scale(torch.cat(delta))
        for y in range(height):
            for x in range(width):
                near = [
                    (r, c)
                    for r in range(max(0, y // p - 1), min(rows, y // p + 2))
                    for c in range(max(0, x // q - 1), min(columns, x // q + 2))
                ]
                delta = []
                for head in range(layer.pixel_heads):
                    d, v = iq.shape[-1] // layer.pixel_heads, sv.shape[-1] // layer.pixel_heads
                    mine = iq[b, y, x, head * d : (head + 1) * d]
                    keys = torch.stack([sk[b, r, c, head * d : (head + 1) * d] for r, c in near])
                    values = torch.stack([sv[b, r, c, head * v : (head + 1) * v] for r, c in near])
                    delta.append((keys @ mine / math.sqrt(d)).softmax(0) @ values)
                new_i[b, y, x] += layer.pixel_scale(torch.cat(delta))
    return new_i, new_s


@torch.no_grad()
@pytest.mark.parametrize(
    ("grid", "cell", "heads"),
    [((3, 2), (2, 3), (2, 1)), ((1, 4), (2, 2), (1, 4)), ((1, 1), (3, 2), (2, 2))],
)
def test_layer_is_the_equations(grid, cell, heads):
    layer = SuperpixelCrossAttention(
        pixel_dim=8, superpixel_dim=12, heads=heads[0], pixel_heads=heads[1], gamma=0.7
    ).double()
    for parameter in layer.parameters():
        parameter.normal_(std=0.5)
    pixels = torch.randn(2, grid[0] * cell[0], grid[1] * cell[1], 8).double()
    superpixels = torch.randn(2, *grid, 12).double()
    ours = layer(pixels, superpixels)
    theirs = literal_sca(layer, pixels, superpixels)
    torch.testing.assert_close(ours.pixels, theirs[0])
    torch.testing.assert_close(ours.superpixels, theirs[1])


def drawn(grid=(3, 4), cell=(2, 3), heads=2, dim=4):
    pixels = torch.randn(2, grid[0] * cell[0], grid[1] * cell[1], heads * dim)
    superpixels = torch.randn(2, *grid, heads, dim)
    return similarities(to_cells(pixels, grid, heads), superpixels), cell


def test_cells_are_a_permutation():
    x = torch.randn(2, 6, 8, 6)
    assert torch.equal(from_cells(to_cells(x, (3, 2), 3), (2, 4)), x)
    assert torch.equal(
        to_cells(x, (3, 2))[1, 2, 1, 0, 5], x[1, 5, 5]
    )  # row 2 · 2 + 1, column 4 + 1


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), largest=st.booleans())
@settings(max_examples=20, deadline=None)
def test_fold_is_the_adjoint_of_neighbours(rows, columns, largest):
    x, y = torch.randn(1, rows, columns, 2), torch.randn(1, rows, columns, 9, 2)
    if largest:  # everybody gives the receiver's own value: the largest of it is that value
        assert torch.equal(fold(neighbours(x), largest=True), x)
        return
    torch.testing.assert_close((neighbours(x) * y).sum(), (x * fold(y)).sum())


def test_update_is_a_mean_and_its_weights_say_which():
    logits, _ = drawn()
    values = torch.randn(2, 3, 4, 2, 6, 5)
    ones = update(logits * 30, torch.ones_like(values))
    torch.testing.assert_close(ones, torch.ones_like(ones))
    weights = update_weights(logits)
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(2, 3, 4, 2))
    around = neighbours(values, axis=4)  # values of the nine cells
    by_weights = torch.einsum("brchnp,brchnpd->brchd", weights, around)
    torch.testing.assert_close(update(logits, values), by_weights)
    assert (weights[:, 0, :, :, :3] == 0).all()  # nothing comes from beyond the top


def test_update_survives_large_logits():
    logits, _ = drawn()
    logits = (logits * 1e4).requires_grad_()
    update(logits, torch.randn(2, 3, 4, 2, 6, 5)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_spread_keeps_constants_and_looks_at_nine():
    logits, cell = drawn()
    values = torch.ones(2, 3, 4, 2, 3)
    torch.testing.assert_close(spread(logits, values), torch.ones(2, 3, 4, 2, 6, 3))
    far = torch.zeros(2, 3, 4, 2, 3)
    far[:, 2] = 1.0  # the last row of superpixels does not reach the first row of cells
    reached = from_cells(spread(logits, far), cell)
    assert (reached[:, :2] == 0).all()
    assert (reached[:, 2:] > 0).all()


def test_hard_labels():
    equal = torch.zeros(1, 3, 4, 2, 6, 9)
    labels = hard_labels(equal, (2, 3))
    home = torch.arange(12).view(3, 4).repeat_interleave(2, 0).repeat_interleave(3, 1)
    assert torch.equal(labels[0], home)
    equal[..., 1] = 1e-3  # everybody wants the superpixel above; the first row has none there
    labels = hard_labels(equal, (2, 3))[0]
    assert torch.equal(labels[2:], home[2:] - 4)
    assert torch.equal(labels[:2], home[:2])


def test_enlarging_never_mixes_cells():
    logits = torch.zeros(1, 2, 2, 1, 4, 9)
    logits[:, 0, 0] = 1.0
    larger = spformer.enlarge(logits, (2, 2), 2)
    assert larger.shape == (1, 2, 2, 1, 16, 9)
    assert (larger[:, 0, 0] == 1).all()
    assert larger.sum() == 16 * 9


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        "vit-nano+spformer(cell=2,stem=stacked,init=conv)",
        "vit-nano+spformer(init=learned,iterations=1,position=none)",
        "spformer-tiny",
    ],
)
def test_gradients_reach_everything(spec):
    model = create(spec, classes=3, resolution=32, seed=0).train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@pytest.mark.parametrize("size", [(32, 32), (17, 30), (4, 4), (5, 41)])
def test_regions_cover_the_canvas(size):
    model = create(SPEC, classes=3, resolution=32, seed=0).eval()
    tokens = model.patching(torch.randn(2, 3, *size)).check()
    labels = tokens.label_map()
    assert labels.shape == (2, *size)
    assert labels.min() >= 0
    assert labels.max() < tokens.x.shape[1]
    assert model(torch.randn(1, 3, *size)).shape == (1, 3)
    # Geometry is that of the regions.
    for token in range(tokens.x.shape[1]):
        y, x = (labels[0] == token).nonzero(as_tuple=True)
        if len(y):
            box = torch.stack([y.max() - y.min() + 1, x.max() - x.min() + 1]).float()
            torch.testing.assert_close(tokens.extent[0, token], box)
            middle = torch.stack([y.float().mean(), x.float().mean()]) + 0.5
            torch.testing.assert_close(tokens.centre[0, token], middle)


def test_one_superpixel_per_patch_of_the_host():
    for spec, cells in (("vit-nano", 8), ("vit-nano(patch=8)", 4), ("vit-nano(patch=14)", 2)):
        host = create(spec, classes=3, resolution=28 if "14" in spec else 32)
        count = host.tokens(torch.randn(1, 3, host.resolution, host.resolution)).x.shape[1]
        plugged = create(f"{spec}+spformer", classes=3, resolution=host.resolution)
        tokens = plugged.tokens(torch.randn(1, 3, host.resolution, host.resolution))
        assert tokens.x.shape[1] == count == cells**2 + 1


def test_without_gains_it_is_pooling():
    model = create("vit-nano+spformer(gamma=0.0)", classes=3, resolution=32, seed=0)
    patching, image = model.patching, torch.randn(2, 3, 32, 32)
    stem = patching.stem(image)
    lifted = F.gelu(patching.init.norm(patching.init.lift(stem))).permute(0, 3, 1, 2)
    pooled = F.avg_pool2d(lifted, 4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patching(image).x, pooled)


def test_stem_pads_like_tensorflow():
    stem = spformer.Stem(layers=(spformer.StemLayer(4, 3, 2),), channels=1)
    seen = {}
    stem.convs[0].register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    image = torch.rand(1, 1, 6, 6) + 1
    stem(image)
    assert seen["x"].shape[-2:] == (7, 7)
    assert torch.equal(seen["x"][..., :6, :6], image)
    assert (seen["x"][..., 6, :] == 0).all()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("spformer-tiny", 5_740_488),
        ("spformer-small", 22_334_376),
        ("spformer-base", 87_581_320),
        ("spformer-small-once", 22_108_712),
        ("spformer-small-stage", 22_008_744),
        ("spformer-small-32", 22_230_696),
        ("spformer-base-stacked", 87_619_576),
    ],
)
def test_parameter_counts(name, parameters):
    with torch.device("meta"):
        model = spformer.build(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_published_initialisation():
    model = create("spformer-tiny", seed=0)
    layer = model.stages[0].layers[0]
    assert (layer.superpixel_scale.gamma == 1e-5).all()
    assert layer.pixel_qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    lift = model.init.lift.weight
    assert lift.std().item() == pytest.approx(math.sqrt(2 / 192), rel=0.1)
    assert model.stages[1].layers[1].updates_pixels is False
    assert model.stages[1].blocks[0].mixing.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.stages[1].position.table.std().item() == pytest.approx(0.02, rel=0.1)


def tiny(**options):
    variant = Variant(stem=(spformer.StemLayer(8, 4, 4),), dim=24, heads=3, depths=(1, 1))
    model = assemble(variant, classes=5, grid=(2, 3), **options)
    model.init_weights()
    return model.eval()


@torch.no_grad()
def test_segmentation():
    model = tiny(segmentation=4, gamma=0.5)
    image = torch.randn(2, 3, 32, 48)
    logits = model.segment(image)
    assert logits.superpixels.shape == (2, 4, 2, 3)
    assert logits.pixels.shape == (2, 4, 8, 12)
    fine = model.segment(image, stride=1).pixels
    assert fine.shape == (2, 4, 32, 48)
    # Mixtures of nine superpixels stay within their range, and one label everywhere stays itself.
    assert fine.max() <= logits.superpixels.max() + 1e-5
    assert model.hard_maps(image, stride=2)[-1].shape == (2, 16, 24)
    with pytest.raises(PolypatchError, match="stride=3"):
        model.segment(image, stride=3)
    with pytest.raises(PolypatchError, match="segmentation"):
        tiny().segment(image)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (50, 77)])
def test_dense_maps_follow_the_superpixels(size):
    model = create("spformer-tiny", classes=3, resolution=64, seed=0).eval()
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        maps = model.features(image)
        tokens = model.forward_features(image)
    assert [(m.map.shape[1], m.stride) for m in maps] == [tuple(i) for i in model.feature_info]
    last, stride = maps[-1]
    assert last.shape[2:] == tuple(-(-side // stride) for side in size)
    labels = tokens.label_map(tuple(last.shape[2:]))
    normed = model.norm(tokens.placed)[0]
    torch.testing.assert_close(last[0].flatten(1).T, normed[labels[0].flatten()])


def test_checkpointing_changes_no_gradient():
    model = create("spformer-tiny", classes=3, resolution=32, seed=0).train()
    image, gradients = torch.randn(2, 3, 32, 32), []
    for on in (False, True):
        model.zero_grad()
        model.checkpointed(on)(image).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)


def test_stages_and_head():
    model = tiny()
    image = torch.randn(1, 3, 32, 48)
    tokens = model.forward_features(image).check()
    assert tokens.grid == (2, 3)
    torch.testing.assert_close(model.head(model.norm(tokens.x.mean(1))), model(image))
    assert len(model.hard_maps(image)) == 2
    assert model(torch.randn(1, 3, 50, 33)).shape == (1, 5)  # padded, positions resampled
    model.reset_head(7)
    assert model(image).shape == (1, 7)
    kept = model.no_decay()
    assert "stages.0.position.table" in kept
    assert "stages.0.blocks.0.mlp.fc1.weight" not in kept
    assert "stages.0.layers.0.pixel_place.conv.weight" not in kept


@torch.no_grad()
def test_class_token_reads_the_first_token():
    model = tiny(class_token=True)
    image = torch.randn(2, 3, 32, 48)
    tokens = model.forward_features(image).check()
    assert tokens.prefix == 1
    torch.testing.assert_close(model.head(model.norm(tokens.x)[:, 0]), model(image))


@torch.no_grad()
def test_hand_over_starts_from_the_entered_pixels():
    torch.manual_seed(3)
    old, carried = tiny(gamma=0.5), tiny(gamma=0.5, carries_pixels=True)
    carried.load_state_dict(old.state_dict(), strict=False)
    image = torch.randn(1, 3, 32, 48)
    stage, pixels = old.stages[0], old.stem(image)
    after, tokens, refined = stage(pixels, old.init(pixels), (32, 48))
    given = after - pixels
    values = stage.hand_over.norm(stage.hand_over.project(tokens.placed.unflatten(1, (2, 3))))
    given_again = from_cells(spread(refined.similarities, values.unflatten(-1, (2, 4))), (4, 4))
    torch.testing.assert_close(given, stage.hand_over.scale(given_again), atol=1e-6, rtol=1e-4)
    updated = carried.stages[0].layers[-1].updates_pixels
    assert updated
    assert not stage.layers[-1].updates_pixels


GOLDENS = [
    case
    for case in find_cases(Path(__file__).parent.parent / "goldens")
    if case.slug == "spformer" and "stem_channels_list" in case.config
]


@pytest.mark.parametrize("case", GOLDENS, ids=str)
def test_recognises_the_authors_weights(case):
    shapes = {name: tuple(value.shape) for name, value in case.state.items()}
    found = spformer.recognise(shapes)
    assert found is not None
    not_in_shapes = {"heads"}  # 24 channels are no published width
    for name, value in found.items():
        if name in case.config and name not in not_in_shapes:
            assert value == case.config[name], name
    left_out = {"heads": case.config["heads"]}
    image = case.inputs["image"]
    with torch.no_grad():
        again = spformer.from_official(left_out, case.state)(image)
    torch.testing.assert_close(again, case.outputs["logits"], atol=1e-5, rtol=1e-4)


def test_foreign_weights_are_refused_by_name():
    case = GOLDENS[0]
    state = dict(case.state)
    state["stages.0.something.weight"] = torch.zeros(2)
    del state["fc_norm.weight"]
    with pytest.raises(PolypatchError, match=r"norm\.weight.*stages\.0\.something\.weight"):
        spformer.from_official(case.config, state)
    with pytest.raises(PolypatchError, match="sp_method"):
        spformer.from_official({**case.config, "sp_method": "sp_cross"}, case.state)
    with pytest.raises(PolypatchError, match="nonsense"):
        spformer.from_official({**case.config, "nonsense": 1}, case.state)
    assert spformer.recognise({"patch_embed.proj.weight": (8, 3, 4, 4)}) is None


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("vit-nano+spformer(cell=3)", "cell=3"),
        ("vit-nano+spformer(iterations=0)", "iterations=0"),
        ("vit-nano+spformer(stem=stacked)", "stride of 1"),
        ("vit-nano+spformer(stem=deep)", "stem='deep'"),
        ("vit-nano+spformer(init=pooled)", "init='pooled'"),
        ("vit-nano+spformer(position=rope)", "position='rope'"),
        ("vit-nano+spformer(heads=5)", "5 heads"),
        ("vit-nano+spformer+spformer(cell=3)", "cell=3"),
        ("spformer-tiny(resolution=8)", "resolution of 8"),
    ],
)
def test_bad_options(spec, sentence):
    with pytest.raises(PolypatchError, match=sentence):
        create(spec, classes=3, **({} if "resolution" in spec else {"resolution": 32}))


def test_too_small_an_image():
    model = create(SPEC, classes=3, resolution=32)
    with pytest.raises(PolypatchError, match="3×8"):
        model(torch.randn(1, 3, 3, 8))


@torch.no_grad()
def test_half_precision():
    model = create(SPEC, classes=3, resolution=32, seed=0).eval()
    image = torch.randn(2, 3, 32, 32)
    exact = model(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(image)
    halved = model.bfloat16()(image.bfloat16())
    assert halved.dtype == torch.bfloat16
    for rounded in (mixed, halved):
        torch.testing.assert_close(rounded.float(), exact, atol=0.1, rtol=0.1)


@pytest.mark.slow
def test_compiles():
    alone("""
import torch
from polypatch import create

torch.set_grad_enabled(False)
image = torch.randn(1, 3, 32, 48)
for name in ("vit-nano+spformer", "spformer-tiny"):
    model = create(name, classes=3, resolution=32, seed=0).eval()
    whole = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(image), model(image))
patching = create("vit-nano+spformer(iterations=1)", resolution=32, seed=0).patching
compiled, eager = torch.compile(patching, fullgraph=True)(image), patching(image)
torch.testing.assert_close(compiled.x, eager.x, atol=1e-4, rtol=1e-3)
assert torch.equal(compiled.regions, eager.regions)
""")
