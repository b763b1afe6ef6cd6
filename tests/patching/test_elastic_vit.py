import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from polypatch import PolypatchError, create
from polypatch.patching import elastic_sampling as sampling
from polypatch.patching import elastic_vit
from polypatch.patching.elastic_vit import ElasticPosition, classify, patch_mix, position_code
from polypatch.tokens import Tokens
from tests.parity.goldens import find_cases

SPEC = "vit-nano+elastic-vit"


def alone(program):
    """Run a program by itself: the shape checks of the tests' own process can't be compiled."""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def host(spec=SPEC, resolution=32, **options):
    return create(spec, classes=3, resolution=resolution, seed=0, **options).eval()


def stepped(model, seed=0):
    model.train()
    for hook in model.hooks:
        hook.before_step(model, step=0, total=1, generator=torch.Generator().manual_seed(seed))
    return model


# ---- positions -----------------------------------------------------------------------------------


def test_code_is_the_formula():
    box = torch.tensor([[8, 24, 40, 56]])
    code = position_code(box, 16)[0]
    for corner, value in enumerate((0.5, 1.5, 2.5, 3.5)):
        for i in range(2):
            angle = value * 10000 ** (-i / 2)
            assert code[4 * corner + i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert code[4 * corner + 2 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_larger_crop_changes_the_second_corner_only():
    small, large = position_code(torch.tensor([[4, 8, 20, 24], [4, 8, 36, 40]]), 64)
    assert torch.equal(small[:32], large[:32])
    assert (small[32:] != large[32:]).any()


def grid_tokens(rows, columns, patch, dim):
    boxes = torch.from_numpy(sampling.grid_boxes((rows * patch, columns * patch), patch)).float()
    return Tokens(
        x=torch.zeros(1, rows * columns, dim),
        centre=(boxes[None, :, :2] + boxes[None, :, 2:]) / 2,
        extent=boxes[None, :, 2:] - boxes[None, :, :2],
        canvas=(rows * patch, columns * patch),
    )


def test_grid_has_the_code_of_its_indices():
    code = ElasticPosition(dim=16, unit=4).code(grid_tokens(3, 5, 4, 16))[0]
    i, j = torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij")
    corners = torch.stack([i, j, i + 1, j + 1], dim=-1).flatten(0, 1)
    torch.testing.assert_close(code, position_code(corners, 16, unit=1))


def test_learned_tables():
    quantised = ElasticPosition(dim=8, unit=4, mode="quantised", grid=(3, 3))
    with torch.no_grad():
        quantised.table.copy_(torch.arange(9.0).view(1, 3, 3, 1).expand(-1, -1, -1, 8))
    cells = quantised.code(grid_tokens(3, 3, 4, 8))[0, :, 0]
    assert cells.tolist() == list(range(9))
    tokens = grid_tokens(1, 4, 4, 8)
    # A fourth column reads from the next row, and what lies beyond the end from the last cell.
    assert quantised.code(tokens)[0, :, 0].tolist() == [0, 1, 2, 3]
    moved = Tokens(tokens.x, tokens.centre + torch.tensor([8.0, 2.0]), tokens.extent, (16, 20))
    assert quantised.code(moved)[0, :, 0].tolist() == [6, 8, 8, 8]  # 0.5 → 0, 1.5 → 2

    resized = ElasticPosition(dim=8, unit=4, mode="interpolated", grid=(3, 3))
    resized.init_weights()
    assert torch.equal(resized.code(grid_tokens(3, 3, 4, 8)), resized.table.flatten(1, 2))
    maps = F.interpolate(resized.table.permute(0, 3, 1, 2), scale_factor=4 / 3, mode="bicubic")
    larger = resized.code(grid_tokens(4, 4, 4, 8))
    torch.testing.assert_close(larger, maps.flatten(2).transpose(1, 2))
    with pytest.raises(PolypatchError, match="5 patches"):
        resized.code(grid_tokens(1, 5, 4, 8))
    with pytest.raises(PolypatchError, match="divisible by 8, got 12"):
        ElasticPosition(dim=12, unit=4)
    with pytest.raises(PolypatchError, match="grid"):
        ElasticPosition(dim=16, unit=4, mode="quantised")


# ---- boxes and crops -----------------------------------------------------------------------------


@given(data=st.data(), size=st.sampled_from([1, 4, 16]))
@settings(max_examples=40, deadline=None)
def test_crops_are_slices_resized(data, size):
    height, width = data.draw(st.integers(3, 24)), data.draw(st.integers(3, 24))
    image = torch.rand(2, 3, height, width)
    boxes = []
    for _ in range(4):
        y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
        h, w = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
        boxes.append([y, x, y + h, x + w])  # may hang over the border
    cut = sampling.crop(image, torch.tensor([boxes]), size)
    for number, (y0, x0, y1, x1) in enumerate(boxes):
        part = image[:, :, y0:y1, x0:x1]
        alone = F.interpolate(part, size=(size, size), mode="bilinear", align_corners=False)
        torch.testing.assert_close(cut[:, number], alone, atol=1e-4, rtol=1e-4)


@given(
    height=st.integers(20, 60),
    width=st.integers(20, 60),
    smallest=st.integers(1, 9),
    span=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_random_crops_lie_inside(height, width, smallest, span, seed):
    boxes = sampling.random_boxes(
        (height, width),
        np.random.default_rng(seed),
        count=50,
        smallest=smallest,
        largest=smallest + span,
        batch=2,
    )
    side = boxes[..., 2] - boxes[..., 0]
    assert boxes.shape == (2, 50, 4)
    assert (side == boxes[..., 3] - boxes[..., 1]).all()
    assert side.min() >= smallest
    assert side.max() < smallest + span
    assert boxes.min() >= 0
    assert (boxes[..., 2] < height).all()  # the exclusive bound: never at the very border
    assert (boxes[..., 3] < width).all()


def test_zoom_and_shake():
    plain = sampling.grid_boxes((64, 64), 16)
    zoomed, stays = sampling.modified_grid((64, 64), np.random.default_rng(0), zoom=5)
    assert stays is None
    assert (zoomed[:, :2] == plain[:, :2]).all()
    assert (zoomed[:, 2:] == plain[:, 2:] - 5).all()
    shaken, _ = sampling.modified_grid((64, 64), np.random.default_rng(0), shake=6)
    moved = shaken - plain
    assert (moved[:, :2] == moved[:, 2:]).all()
    assert ((moved[:, 0] == 0) | (moved[:, 1] == 0)).all()
    assert set(np.abs(moved).ravel().tolist()) == {0, 6}
    assert shaken.min() >= 0
    assert shaken.max() <= 64


def test_dropout_and_selection():
    def count(**options):
        _, stays = sampling.modified_grid((64, 64), np.random.default_rng(3), **options)
        return stays.reshape(4, 4)

    assert count(dropout=5).sum() == 11
    blocks = count(dropout=2, dropout_block=4)
    assert blocks.sum() == 8
    per_block = blocks.reshape(2, 2, 2, 2).sum((1, 3))
    assert sorted(per_block.ravel().tolist()) == [0, 0, 4, 4]
    selected = count(select=2).reshape(2, 2, 2, 2).sum((1, 3))
    assert sorted(selected.ravel().tolist()) == [1, 1, 4, 4]


def test_merging_still_covers_everything():
    model = host("vit-nano(patch=8)+elastic-vit", resolution=64)
    sampler = sampling.GridSampler(patch=8, select=3, select_mode="resize")
    drawn = sampler((64, 64), 2, np.random.default_rng(1))
    tokens = model.patching.sample(torch.rand(2, 3, 64, 64), drawn.boxes).check()
    assert tokens.x.shape[1] == 64 - 3 * 3
    assert (tokens.label_map() >= 0).all()
    assert sorted(set(tokens.extent.flatten().tolist())) == [8, 16]


def test_soft_dropout_blackens():
    sampler = sampling.GridSampler(patch=8, dropout=3, hard=False)
    drawn = sampler((32, 32), 2, np.random.default_rng(1))
    assert drawn.blank.sum(1).tolist() == [3, 3]
    model = host("vit-nano(patch=8)+elastic-vit")
    tokens = model.patching.sample(torch.rand(2, 3, 32, 32), drawn.boxes, blank=drawn.blank)
    bias = model.patching.proj.bias
    torch.testing.assert_close(tokens.x[drawn.blank], bias.expand(6, -1))


def test_central_frames_tile_the_image():
    boxes = sampling.central_boxes((64, 64), (16, 8, 8))
    covered = np.zeros((64, 64), dtype=int)
    for y0, x0, y1, x1 in boxes:
        covered[y0:y1, x0:x1] += 1
    assert (covered == 1).all()
    assert len(sampling.central_boxes((224, 224), (32,) * 7)) == 49


def test_edges_get_small_boxes():
    edges = np.zeros((96, 96), dtype=bool)
    edges[5:20, 5:20] = True
    boxes = sampling.edge_boxes(edges, count=18, smallest=4, largest=32)
    assert len(boxes) == 18
    side = boxes[:, 2] - boxes[:, 0]
    assert (boxes[side == side.min(), 2] <= 40).all()
    assert (side[boxes[:, 0] >= 64] == 32).all()
    with pytest.raises(PolypatchError, match="largest=30"):
        sampling.edge_boxes(edges, count=18, smallest=4, largest=30)


def test_edge_sampler_on_a_photo():
    from skimage.data import astronaut

    photo = torch.from_numpy(astronaut()[:448:2, :448:2].copy()).permute(2, 0, 1)[None] / 255
    sampler = sampling.EdgeSampler(count=40, smallest=8, largest=56, sigma=3)
    model = host("vit-nano(patch=16)+elastic-vit", resolution=224)
    model.patching.sampler = sampler
    tokens = model.patching(photo).check()
    assert tokens.x.shape[1] == 40
    assert len(set(tokens.extent.flatten().tolist())) > 1
    assert model(photo).shape == (1, 3)


def test_mixture_pads_behind():
    sampler = sampling.MixedSampler(
        samplers=(
            sampling.RandomSampler(count=5, smallest=4, largest=9),
            sampling.GridSampler(patch=16),
        ),
        weights=(3.0, 1.0),
    )
    drawn = sampler((32, 32), 200, np.random.default_rng(0))
    assert drawn.boxes.shape == (200, 5, 4)
    few = (drawn.real.sum(1) == 4).float().mean().item()
    assert few == pytest.approx(0.25, abs=0.1)
    assert (drawn.real.long().diff(dim=1) <= 0).all()
    # What is padding changes nothing.
    model, image = host(), torch.rand(200, 3, 32, 32)
    tokens = model.patching.sample(image, drawn.boxes, mask=drawn.real)
    together = classify(model, tokens)
    row = int((drawn.real.sum(1) == 4).nonzero()[0])
    alone = classify(model, model.patching.sample(image[row][None], drawn.boxes[row, :4]))
    torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-4)


def test_spans():
    boxes = sampling.random_spans((30, 50), np.random.default_rng(0), count=20)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= torch.tensor([30.0, 50.0])).all()
    ramp = torch.arange(10.0).expand(1, 1, 10, 10)
    whole = sampling.crop_spans(ramp, sampling.grid_spans((10, 10), across=1, down=1)[None], (4, 4))
    torch.testing.assert_close(whole[0, 0, 0, 0], torch.tensor([0.0, 3.0, 6.0, 9.0]))


# ---- the network ---------------------------------------------------------------------------------


@torch.no_grad()
def test_any_order_and_subsets():
    model, image = host(), torch.randn(2, 3, 32, 32)
    boxes = torch.from_numpy(sampling.random_boxes(
        (32, 32), np.random.default_rng(0), count=20, smallest=2, largest=14, batch=2
    ))  # fmt: skip
    logits = classify(model, model.patching.sample(image, boxes))
    order = torch.randperm(20)
    shuffled = classify(model, model.patching.sample(image, boxes[:, order]))
    torch.testing.assert_close(shuffled, logits, atol=1e-5, rtol=1e-4)
    keeps = torch.randperm(20)[:7].expand(2, -1)
    kept = classify(model, model.patching.sample(image, boxes), keeps=keeps)
    chosen = boxes.gather(1, keeps[..., None].expand(-1, -1, 4))
    subset = classify(model, model.patching.sample(image, chosen))
    torch.testing.assert_close(kept, subset, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_grid_boxes_are_the_grid():
    model, image = host(), torch.randn(2, 3, 32, 24)
    boxes = torch.from_numpy(sampling.grid_boxes((32, 24), 4))
    sampled = classify(model, model.patching.sample(image, boxes))
    torch.testing.assert_close(sampled, model(image), atol=1e-4, rtol=1e-4)
    model.patching.sampler = sampling.FixedSampler(boxes=boxes[:9])
    assert model.tokens(image).x.shape[1] == 10


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (17, 30), (4, 4), (5, 41)])
def test_odd_sizes(size):
    model, image = host(), torch.randn(1, 3, *size)
    tokens = model.patching(image).check()
    assert tokens.grid == (-(-size[0] // 4), -(-size[1] // 4))
    assert (tokens.label_map() >= 0).all()
    assert model(image).isfinite().all()
    with pytest.raises(PolypatchError, match="3×8"):
        model(torch.randn(1, 3, 3, 8))


@torch.no_grad()
def test_neutral_settings_change_nothing():
    plain = host("vit-nano")
    same = host("vit-nano+elastic-vit(position=host,train=grid,patchmix=0)")
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain(image), same(image))
    assert torch.equal(plain.train()(image), stepped(same)(image))


@torch.no_grad()
def test_class_tokens_place_is_kept():
    plain = host("vit-nano")
    elastic = host()
    torch.testing.assert_close(elastic.prefix.tokens, plain.prefix.tokens + plain.prefix.position)
    assert elastic.prefix.position is None


# ---- training ------------------------------------------------------------------------------------


def test_patch_mix():
    tokens = grid_tokens(1, 5, 4, 2)
    x = torch.arange(3.0).view(3, 1, 1).expand(-1, 5, 2)
    centre = tokens.centre + torch.arange(3.0).view(3, 1, 1)
    mixed, own = patch_mix(Tokens(x, centre, tokens.extent, (4, 20)), 0.5)
    assert mixed.x[..., 0].tolist() == [[0, 0, 2, 2, 2], [1] * 5, [2, 2, 0, 0, 0]]
    torch.testing.assert_close(mixed.centre[0, 3], tokens.centre[0, 3] + 2)
    assert own.tolist() == pytest.approx([0.4] * 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    mixed, own = patch_mix(Tokens(x, centre, tokens.extent, (4, 20), mask=mask), 0.7)
    assert mixed.mask.sum(1).tolist() == [4, 5, 3]  # two of their own, the rest the partner's
    assert own.tolist() == pytest.approx([2 / 4, 2 / 5, 2 / 3])


@torch.no_grad()
@pytest.mark.parametrize(
    "spec", [SPEC, "vit-nano+elastic-vit(train=random,patches=40,shuffle=true)"]
)
def test_a_step_is_its_generator(spec):
    model, image = host(spec), torch.randn(6, 3, 32, 32)
    first = stepped(model, seed=1)(image)
    torch.manual_seed(99)
    assert torch.equal(stepped(model, seed=1)(image), first)
    assert not torch.equal(stepped(model, seed=2)(image), first)


def test_targets_are_mixed_like_the_tokens():
    model = host("vit-nano+elastic-vit(train=grid)")
    hook = model.hooks[0]
    image, targets = torch.randn(4, 3, 32, 32), torch.eye(4)
    shares = []
    for seed in range(40):
        stepped(model, seed)
        before = hook.targets(model, targets)
        tokens = model.patching(image)
        after = hook.targets(model, targets)
        torch.testing.assert_close(before, after)
        torch.testing.assert_close(after.sum(1), torch.ones(4))
        plain = model.patching.proj(image).flatten(2).transpose(1, 2)
        own = (tokens.x == plain).all(-1).float().mean(1)
        torch.testing.assert_close(own, after.diagonal())
        shares.append(own[0].item())
    assert 0.3 < np.mean(shares) < 0.7  # Beta(1, 1) is uniform
    hook.after_training(model)
    assert torch.equal(hook.targets(model, targets), targets)


@torch.no_grad()
def test_without_a_hooks_step_nothing_is_mixed():
    model, image = host("vit-nano+elastic-vit(train=grid)"), torch.randn(4, 3, 32, 32)
    assert torch.equal(model.train()(image), model.eval()(image))
    random = host("vit-nano+elastic-vit(train=random)").train()
    torch.manual_seed(5)
    first = random(image)
    assert not torch.equal(random(image), first)
    torch.manual_seed(5)
    assert torch.equal(random(image), first)
    assert torch.equal(random.eval()(image), random(image))


def test_published_schedule():
    model = host("vit-nano(patch=16)+elastic-vit", resolution=224)
    grid, crops = model.patching.training_sampler.samplers
    assert model.patching.training_sampler.weights == (70, 30)
    assert (crops.count, crops.smallest, crops.largest) == (196, 16, 48)
    assert grid.patch == 16


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        "vit-nano(pooling=mean)+elastic-vit(train=random,patches=9)",
        "vit-nano+elastic-vit(position=quantised,train=grid)",
        "vit-nano+elastic-vit(position=interpolated,train=grid)",
        "elastic-vit-tiny",
    ],
)
def test_gradients_reach_everything(spec):
    model = create(spec, classes=3, resolution=64 if "tiny" in spec else 32, seed=0)
    stepped(model)
    model(torch.randn(4, 3, model.resolution, model.resolution)).square().sum().backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert not [n for n, p in trained if p.grad is None or not p.grad.any()]


@torch.no_grad()
def test_half_precision():
    model = host("vit-nano+elastic-vit(train=random)")
    image = torch.rand(2, 3, 32, 32)
    boxes = torch.from_numpy(sampling.random_boxes(
        (32, 32), np.random.default_rng(0), count=20, smallest=2, largest=14
    ))  # fmt: skip
    exact = classify(model, model.patching.sample(image, boxes))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = classify(model, model.patching.sample(image, boxes))
    model.bfloat16()
    halved = classify(model, model.patching.sample(image.bfloat16(), boxes))
    assert halved.dtype == torch.bfloat16
    for rounded in (mixed, halved):
        torch.testing.assert_close(rounded.float(), exact, atol=0.1, rtol=0.1)
    assert stepped(model)(image.bfloat16()).dtype == torch.bfloat16


@pytest.mark.slow
def test_compiles():
    alone("""
import torch
from polypatch import create
from polypatch.patching.elastic_vit import classify

torch.set_grad_enabled(False)
image = torch.randn(2, 3, 32, 32)
boxes = torch.tensor([[0.0, 0.0, 7.0, 9.0], [3.0, 5.0, 30.0, 20.0]])
model = create("vit-nano+elastic-vit", classes=3, resolution=32, seed=0).eval()


def sampled(image, boxes):
    return classify(model, model.patching.sample(image, boxes))


for backend in ("eager", "inductor"):
    for network, inputs in ((model, (image,)), (sampled, (image, boxes))):
        compiled = torch.compile(network, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(*inputs), network(*inputs), atol=1e-4, rtol=1e-3)
""")


# ---- elasticity ----------------------------------------------------------------------------------


def test_elasticity():
    assert sampling.elasticity([0, 2, 4], [0.8, 0.8, 0.8]) == pytest.approx(1)
    assert sampling.elasticity([0, 4], [0.8, 0.0]) == pytest.approx(0.5)
    assert sampling.elasticity([0, 1, 4], [1.0, 0.5, 0.5]) == pytest.approx((0.75 + 1.5) / 4)
    for strengths, accuracies in (([0], [1.0]), ([0, 0], [1.0, 1.0]), ([0, 1], [0.0, 0.0])):
        with pytest.raises(PolypatchError):
            sampling.elasticity(strengths, accuracies)


def test_accuracy_curves():
    model = host().train()
    images = torch.randn(12, 3, 32, 32)
    labels = model.eval()(images).argmax(-1)
    model.train()
    batches = [(images[:6], labels[:6]), (images[6:], labels[6:])]
    for kind, strengths in (("zoom", [0, 2]), ("shake", [0, 2]), ("dropout", [0, 60]),
                            ("select", [0, 16]), ("merge", [0, 16])):  # fmt: skip
        curve = sampling.accuracy_curve(model, batches, kind=kind, strengths=strengths)
        assert curve[0] == 1.0, kind
        assert 0 <= curve[1] <= 1
        again = sampling.accuracy_curve(model, batches, kind=kind, strengths=strengths)
        assert curve == again
    assert model.training
    assert model.patching.sampler is None
    with pytest.raises(PolypatchError, match="perturbation 'blur'"):
        sampling.accuracy_curve(model, batches, kind="blur", strengths=[0])
    assert model.patching.sampler is None
    with pytest.raises(PolypatchError, match="plug elastic-vit"):
        sampling.accuracy_curve(host("vit-nano"), batches, kind="zoom", strengths=[0])


# ---- weights and words ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "trained"),
    [
        ("elastic-vit-tiny", 5_721_832, 5_684_200),
        ("elastic-vit-small", 22_059_496, 21_984_232),
        ("elastic-vit-medium", 38_849_512, 38_749_160),
        ("elastic-vit-base", 86_585_320, 86_434_792),
        ("elastic-vit-large", 304_374_760, 304_174_056),
    ],
)
def test_parameter_counts(name, parameters, trained):
    with torch.device("meta"):
        model = elastic_vit.build(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


GOLDENS = [
    case
    for case in find_cases(Path(__file__).parent.parent / "goldens")
    if case.slug == "elastic-vit" and case.state
]


@pytest.mark.parametrize("case", [c for c in GOLDENS if c.name in ("main", "keeps")], ids=str)
def test_recognises_the_authors_weights(case):
    found = elastic_vit.recognise({n: tuple(v.shape) for n, v in case.state.items()})
    assert found is not None
    for name, value in found.items():
        if name != "num_heads":  # 32 channels are no published width
            assert value == case.config[name], name
    again = elastic_vit.from_official({"num_heads": case.config["num_heads"]}, case.state)
    tokens = again.patching.embed(case.inputs["x"], case.inputs["coords"], canvas=(224, 224))
    with torch.no_grad():
        logits = classify(again, tokens, keeps=case.inputs.get("keeps"))
    torch.testing.assert_close(logits, case.outputs[""], atol=1e-5, rtol=1e-4)


def test_foreign_weights_are_refused_by_name():
    case = GOLDENS[0]
    state = dict(case.state)
    state["blocks.0.gamma_9"] = torch.zeros(2)
    del state["norm.weight"]
    with pytest.raises(PolypatchError, match=r"norm\.weight.*gamma_9"):
        elastic_vit.from_official(case.config, state)
    with pytest.raises(PolypatchError, match="nonsense"):
        elastic_vit.from_official({**case.config, "nonsense": 1}, case.state)
    with pytest.raises(PolypatchError, match="paralx2"):
        elastic_vit.from_official({**case.config, "block_layers": "Block_paralx2"}, case.state)
    timm = {
        "patch_embed.proj.weight": (8, 3, 4, 4),
        "blocks.0.attn.qkv.weight": (24, 8),
        "cls_token": (1, 1, 8),
        "pos_embed": (1, 17, 8),
    }
    assert elastic_vit.recognise(timm) is None


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("vit-nano+elastic-vit(train=often)", "train='often'"),
        ("vit-nano+elastic-vit(train=random130)", "train='random130'"),
        ("vit-nano+elastic-vit(position=rope)", "position='rope'"),
        ("vit-nano+elastic-vit(patches=0)", "patches=0"),
        ("vit-nano+elastic-vit(smallest=9,largest=9)", "smallest=9"),
        ("vit-nano+elastic-vit(patchmix=-1)", "patchmix"),
        ("vit-nano+elastic-vit+elastic-vit", "ElasticPatching"),
        ("vit-nano+spformer+elastic-vit", "SuperpixelPatching"),
        ("elastic-vit-tiny(resolution=8)", "resolution of 8"),
    ],
)
def test_bad_options(spec, sentence):
    with pytest.raises(PolypatchError, match=sentence):
        create(spec, classes=3, **({} if "resolution" in spec else {"resolution": 32}))


def test_bad_boxes():
    model, image = host(), torch.randn(1, 3, 32, 32)
    for box in ([4, 4, 4, 8], [0, 33, 4, 40], [-5, 0, 0, 4]):
        with pytest.raises(PolypatchError, match="32×32"):
            model.patching.sample(image, torch.tensor([box]))
    with pytest.raises(PolypatchError, match="8×8"):
        model.patching.embed(torch.zeros(1, 1, 3, 8, 8), torch.ones(1, 1, 4), canvas=(8, 8))
    bad = [dict(zoom=16), dict(shake=9), dict(dropout=1, select=1), dict(select_mode="both"),
           dict(dropout=16), dict(select=5), dict(dropout=1, dropout_block=3)]  # fmt: skip
    for options in bad:
        with pytest.raises(PolypatchError):
            sampling.modified_grid((64, 64), np.random.default_rng(0), **options)


def test_complete_networks_are_hosts():
    model = create("elastic-vit-tiny(train=random50)", classes=4, resolution=64, seed=0).eval()
    assert model.plugs == ("elastic-vit",)
    assert model(torch.randn(1, 3, 48, 80)).shape == (1, 4)
    assert {block.drop_path.rate for block in model.blocks} == {0.0}
    assert (model.blocks[0].scale1.gamma == 1e-4).all()
    assert model.position.unit == 16
    assert "position.table" in model.no_decay()
    assert not model.position.table.requires_grad
    model.reset_head(7)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
