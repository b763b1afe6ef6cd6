from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polypatch
from polypatch.checkpoints import recognise as recognise_any
from polypatch.errors import PolypatchError
from polypatch.hosts import build_vit
from polypatch.patching.flexivit import (
    VARIANTS,
    FixedTable,
    FlexiPatching,
    RandomPatchSize,
    assemble,
    build,
    default_sizes,
    distill,
    distillation_loss,
    from_official,
    init_weights,
    initialise_from,
    plug,
    recognise,
    resample_patch_embed,
    resample_positions,
    resize_matrix,
    set_patch,
    to_official,
)

SIZES = (48, 40, 30, 24, 20, 16, 15, 12, 10, 8, 6, 5)


def alone(program: str) -> None:
    """Run a program by itself: the shape checks of the tests' own process can't be compiled."""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def small_host(spec: str = "flexivit", host: str = "vit-nano") -> nn.Module:
    return polypatch.create(f"{host}+{spec}", classes=5, resolution=32, seed=0)


def resized(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False)


# ---- resizing weights ----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(old=st.tuples(*[st.integers(1, 12)] * 2), new=st.tuples(*[st.integers(1, 12)] * 2))
def test_resize_matrix_is_bilinear_resizing(old: tuple[int, int], new: tuple[int, int]) -> None:
    image = torch.randn(1, 1, *old, dtype=torch.float64)
    matrix = torch.kron(resize_matrix(old[0], new[0]), resize_matrix(old[1], new[1]))
    expected = resized(image, new)
    torch.testing.assert_close((matrix @ image.flatten()).reshape(1, 1, *new), expected)


@pytest.mark.parametrize("old", SIZES)
def test_enlarged_patches_keep_their_embedding(old: int) -> None:
    """The theorem: ⟨B x, ŵ⟩ = ⟨x, w⟩ for every patch x, where the patch grows."""
    weight, patches = torch.randn(7, 3, old, old), torch.randn(20, 3, old, old)
    expected = torch.einsum("nchw,dchw->nd", patches, weight)
    for new in (size for size in SIZES if size >= old):
        ours = resample_patch_embed(weight, (new, new))
        embedded = torch.einsum("nchw,dchw->nd", resized(patches, (new, new)), ours)
        torch.testing.assert_close(embedded, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(("old", "new"), [((8, 10), (10, 12)), ((8, 6), (9, 15)), ((8, 6), (8, 9))])
def test_rectangular_patches(old: tuple[int, int], new: tuple[int, int]) -> None:
    weight, patches = torch.randn(7, 2, *old), torch.randn(20, 2, *old)
    expected = torch.einsum("nchw,dchw->nd", patches, weight)
    ours = resample_patch_embed(weight, new)
    embedded = torch.einsum("nchw,dchw->nd", resized(patches, new), ours)
    torch.testing.assert_close(embedded, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(("old", "new"), [((8, 8), (3, 5)), ((6, 8), (5, 12)), ((6, 8), (7, 7))])
def test_whole_pseudo_inverse_also_where_it_is_rank_deficient(
    old: tuple[int, int], new: tuple[int, int]
) -> None:
    matrix = torch.kron(resize_matrix(old[0], new[0]), resize_matrix(old[1], new[1]))
    weight = torch.randn(1, 1, *old)
    literal = torch.linalg.pinv(matrix.T, rtol=1e-10) @ weight.double().flatten()
    ours = resample_patch_embed(weight, new)
    torch.testing.assert_close(ours.flatten(), literal.float(), atol=1e-4, rtol=1e-4)
    assert ours.abs().max() < 1e3


def test_every_pair_of_sizes_is_well_conditioned() -> None:
    for old in range(1, 49, 3):
        for new in range(1, 49, 4):
            values = torch.linalg.svdvals(resize_matrix(old, new))
            assert values.min() / values.max() > 1e-2, (old, new)


def test_layouts_and_bad_sizes() -> None:
    weight = torch.randn(5, 3, 8, 6)
    ours = resample_patch_embed(weight, (4, 9))
    flax = resample_patch_embed(weight.permute(2, 3, 1, 0), (4, 9), layout="HWIO")
    torch.testing.assert_close(flax.permute(3, 2, 0, 1), ours)
    assert resample_patch_embed(weight, (8, 6)) is weight
    with pytest.raises(PolypatchError, match="layout"):
        resample_patch_embed(weight, (4, 4), layout="HWCN")
    with pytest.raises(PolypatchError, match="1 pixel"):
        resample_patch_embed(weight, (0, 4))


def test_positions_by_both_methods() -> None:
    table = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 4, 1)  # the row number
    zoomed = resample_positions(table, (7, 7), method="zoom")[0, :, 0, 0]
    torch.testing.assert_close(zoomed, torch.arange(7) / 2)  # corners stay
    grown = resample_positions(table, (8, 8))[0, :, 0, 0]
    assert grown.tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    shrunk = resample_positions(table, (2, 2))[0, :, 0, 0]
    # Triangle of twice the width, cut off at the border: weights 3, 3, 1 of 7.
    torch.testing.assert_close(shrunk, torch.tensor([5 / 7, 16 / 7]))
    with pytest.raises(PolypatchError, match="method"):
        resample_positions(table, (2, 2), method="cubic")


def test_fixed_table_is_the_sine_code_of_the_grid() -> None:
    table = FixedTable(grid=(3, 5), dim=12).table[0]
    for y in range(3):
        for x in range(5):
            angles = [[at * w for w in (1.0, 0.01, 0.0001)] for at in (x, y)]
            (ax, ay) = (torch.tensor(a) for a in angles)
            code = torch.cat([ax.sin(), ax.cos(), ay.sin(), ay.cos()])
            torch.testing.assert_close(table[y, x], code)


# ---- in a host -----------------------------------------------------------------------------------


def test_default_sizes_are_the_papers() -> None:
    assert default_sizes(240, 16) == (8, 10, 12, 15, 16, 20, 24, 30, 40, 48)
    assert default_sizes(32, 4) == (2, 4, 8)
    assert default_sizes(31, 4) == (2, 3, 4, 6, 8, 12)


def test_patch_size_is_a_knob() -> None:
    model = small_host().eval()
    image = torch.randn(2, 3, 32, 32)
    assert model.patching.patch == 4
    counts = {}
    for size in (2, 4, 5, 8, 16, (4, 8)):
        tokens = set_patch(model, size).tokens(image).check()
        counts[size] = tokens.placed.shape[1]
        assert (tokens.label_map() >= 0).all()
        assert model(image).shape == (2, 5)
    assert counts == {2: 256, 4: 64, 5: 49, 8: 16, 16: 4, (4, 8): 32}
    model.patching.patch = 8
    assert model.patching.patch == 8


def test_grid_side_gives_the_patch() -> None:
    model = small_host("flexivit(seqhw=[4,8])").eval()
    assert model.patching.seqhw == 8
    assert model.tokens(torch.randn(1, 3, 48, 32)).extent[0, 1].tolist() == [6.0, 4.0]
    model.patching.seqhw = 5  # 24 // 5 = 4 pixels: six patches fit, as in the authors' code
    assert model.tokens(torch.randn(1, 3, 24, 24)).grid == (6, 6)
    assert model.tokens(torch.randn(1, 3, 32, 32)).grid == (5, 5)  # 2 pixels are cut off
    model.patching.patch = 4
    assert model.patching.seqhw is None
    with pytest.raises(PolypatchError, match="too small"):
        set_patch(model, 40)(torch.randn(1, 3, 32, 32))
    with pytest.raises(PolypatchError, match="1 patch a side"):
        model.patching.seqhw = 0


def test_enlarged_images_get_the_same_patch_embeddings() -> None:
    model = small_host("flexivit(underlying=4)").eval()
    image = torch.randn(2, 3, 4, 4)  # one patch: resizing doesn't mix neighbours
    expected = model.patching(image).x
    for size in (5, 8, 12):
        set_patch(model, size)
        torch.testing.assert_close(
            model.patching(resized(image, (size, size))).x, expected, atol=1e-4, rtol=1e-4
        )


def test_neutral_settings_change_nothing() -> None:
    plain = build_vit("nano", classes=5, resolution=32).eval()
    image = torch.randn(2, 3, 32, 32)
    expected = plain(image)
    plug(plain, underlying=4, grid=8)
    assert torch.equal(plain(image), expected)


def test_hook_draws_and_restores() -> None:
    model = small_host("flexivit(patch=8)")
    (hook,) = model.hooks
    drawn = []
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        hook.before_step(model, step=step, total=30, generator=generator)
        drawn.append(model.patching.patch)
        again = torch.Generator().manual_seed(step)
        assert hook.draw(again) == drawn[-1]
    assert set(drawn) == {2, 4, 8}
    hook.after_training(model)
    assert model.patching.patch == 8
    one = RandomPatchSize(sizes=(2, 4, 8), weights=(0, 1, 0), default=4)
    assert one.draw(torch.Generator().manual_seed(0)) == 4
    grids = small_host("flexivit(seqhw=[4,8],weights=[1,0])")
    grids.hooks[0].before_step(grids, step=0, total=1, generator=torch.Generator())
    assert grids.patching.seqhw == 4


@pytest.mark.parametrize("size", [2, 4, 8])
def test_gradients_reach_every_parameter(size: int) -> None:
    model = set_patch(small_host(), size).train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_gradients_add_up_in_the_underlying_embedding() -> None:
    weight = torch.randn(3, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w: resample_patch_embed(w, (4, 9)), (weight,), eps=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("position", ["sincos", "rope", "'none'"])
def test_other_positions_and_sizes(position: str) -> None:
    model = small_host(host=f"vit-nano(position={position})").eval()
    for size in (4, 7):
        assert set_patch(model, size)(torch.randn(1, 3, 27, 41)).isfinite().all()


def test_half_precision() -> None:
    model = set_patch(small_host().eval(), 5)
    image = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(image).isfinite().all()
    expected = model.patching.kernel((5, 5))
    model.bfloat16()
    assert model(image.bfloat16()).dtype == torch.bfloat16
    kernel = model.patching.kernel((5, 5)).float()
    assert (kernel - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.slow
def test_compiles_without_breaks() -> None:
    alone("""
import torch
from polypatch import create
from polypatch.patching.flexivit import set_patch

model = create("vit-nano+flexivit", classes=5, resolution=32, seed=0).eval()
image = torch.randn(2, 3, 32, 32)
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
for size in (4, 5, 8):
    set_patch(model, size)
    torch.testing.assert_close(compiled(image), model(image), atol=1e-5, rtol=1e-4)
""")


def test_bad_options() -> None:
    for options, message in (
        (dict(sizes=(4,), seqhw=(8,)), "not both"),
        (dict(sizes=(4, 40)), "1 to the host's resolution"),
        (dict(sizes=(4, 8), weights=(1,)), "as many weights"),
        (dict(sizes=(4, 8), weights=(0, 0)), "as many weights"),
        (dict(patch=0), "1 pixel"),
        (dict(underlying=0), "at least 1"),
    ):
        with pytest.raises(PolypatchError, match=message):
            plug(build_vit("nano"), **options)
    with pytest.raises(PolypatchError, match="plain grid"):
        plug(plug(build_vit("nano")))
    with pytest.raises(PolypatchError, match="fixed"):
        set_patch(build_vit("nano"), 8)


# ---- distillation --------------------------------------------------------------------------------


def test_student_starts_as_its_teacher() -> None:
    torch.manual_seed(1)
    teacher = build_vit("nano", classes=5, resolution=32).eval()
    student = small_host("flexivit(underlying=4,grid=8)").eval()
    image = torch.randn(2, 3, 32, 32)
    assert not torch.equal(student(image), teacher(image))
    assert initialise_from(student, teacher) is student
    assert torch.equal(student(image), teacher(image))
    larger = initialise_from(small_host("flexivit(underlying=8,grid=4)"), teacher)
    torch.testing.assert_close(
        larger.patching.proj.weight, resample_patch_embed(teacher.patching.proj.weight, (8, 8))
    )
    zoomed = resample_positions(teacher.position.table, (4, 4), method="zoom")
    torch.testing.assert_close(larger.position.table.detach(), zoomed.detach())
    assert larger.position.table.requires_grad
    with pytest.raises(PolypatchError, match=r"another shape: .*head"):
        initialise_from(student, build_vit("nano", classes=6, resolution=32))
    with pytest.raises(PolypatchError, match="fixed"):
        initialise_from(teacher, teacher)


def test_distance_is_the_divergence() -> None:
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    literal = (p * (p.log() - q.log())).sum(1).mean() * 4
    torch.testing.assert_close(distillation_loss(student, teacher, temperature=2.0), literal)
    assert distillation_loss(teacher, teacher).abs() < 1e-6


def test_distillation_hook() -> None:
    teacher = build_vit("nano", classes=5, resolution=48)
    student = distill(small_host(), teacher, share=0.75)
    hook = student.hooks[-1]
    targets = torch.eye(5)[:2]
    assert torch.equal(hook.targets(student, targets), targets * 0.25)
    image = torch.randn(2, 3, 32, 32)
    logits = student.train()(image)
    large = F.interpolate(image, size=(48, 48), mode="bilinear", antialias=True)
    loss = hook.loss(student, image, logits)
    torch.testing.assert_close(loss, 0.75 * distillation_loss(logits, teacher(large)))
    loss.backward()
    assert student.patching.proj.weight.grad.any()
    assert all(p.grad is None for p in teacher.parameters())
    assert not any("teacher" in name for name in student.state_dict())
    with pytest.raises(PolypatchError, match="share"):
        distill(student, teacher, share=2)


# ---- the authors' networks -----------------------------------------------------------------------


@pytest.mark.parametrize("pool_type", ["tok", "gap", "map"])
@pytest.mark.parametrize("posemb", ["learn", "sincos2d"])
@pytest.mark.parametrize("num_classes", [0, 4])
def test_round_trip(pool_type: str, posemb: str, num_classes: int) -> None:
    config = dict(
        width=24, depth=2, mlp_dim=40, num_heads=3, num_classes=num_classes, patch_size=(6, 6),
        posemb_size=(3, 3), pool_type=pool_type, posemb=posemb,
    )  # fmt: skip
    model = assemble(config).eval()
    for value in model.parameters():
        nn.init.normal_(value, std=0.2)
    state = to_official(model)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    inferred = recognise(shapes)
    if posemb == "sincos2d":
        assert inferred is not None
        assert "posemb_size" not in inferred
        inferred["posemb_size"] = (3, 3)
    assert inferred == config
    assert recognise_any(shapes)[0] == "flexivit"
    again = from_official(inferred, {f"params/{n.replace('.', '/')}": v for n, v in state.items()})
    image = torch.randn(2, 3, 18, 18)
    assert torch.equal(again(image), model(image))
    for first, second in zip(to_official(again).values(), state.values()):
        assert torch.equal(first, second)


def test_foreign_and_broken_weights_are_named() -> None:
    model = assemble(dict(variant="mu/8", num_classes=3))
    state = to_official(model)
    with pytest.raises(PolypatchError, match="keys that no FlexiViT has: extra"):
        from_official({}, state | {"extra": torch.zeros(1)})
    with pytest.raises(PolypatchError, match=r"missing keys head\.bias"):
        from_official({}, {n: v for n, v in state.items() if n != "head.bias"})
    with pytest.raises(PolypatchError, match="unknown arguments of a FlexiViT: widht"):
        from_official({"widht": 3}, state)
    with pytest.raises(PolypatchError, match="no variant"):
        assemble({"variant": "XL"})
    with pytest.raises(PolypatchError, match="pool_type"):
        assemble({"pool_type": "max"})
    assert recognise({"conv.weight": (3, 3, 3, 3)}) is None


def test_variants() -> None:
    stated = {
        "flexivit-small": 21_993_832,
        "flexivit-base": 86_453_992,
        "flexivit-large": 304_175_080,
    }
    for name, parameters in stated.items():
        with torch.device("meta"):
            model = build(name)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model.hooks[0].sizes == (8, 10, 12, 15, 16, 20, 24, 30, 40, 48)
    assert set(VARIANTS) == set(stated)
    with pytest.raises(PolypatchError, match="flexivit-small"):
        build("flexivit-smal")


def test_a_variant_by_name() -> None:
    model = polypatch.create("flexivit-small", classes=7, resolution=48, seed=0).eval()
    assert isinstance(model.patching, FlexiPatching)
    assert model(torch.randn(1, 3, 48, 48)).tolist() == [[0.0] * 7]  # the head starts at zero
    qkv = model.blocks[0].mixing.qkv.weight
    assert qkv.abs().max().item() == pytest.approx((6 / (384 + 384)) ** 0.5, rel=1e-3)
    assert model.patching.proj.weight.std().item() == pytest.approx(384**-0.5, rel=0.02)
    assert 0 < model.blocks[0].mlp.fc1.bias.abs().max() < 1e-5
    with_head = assemble(dict(variant="mu", num_classes=3))
    init_weights(with_head, head_zeroinit=False)
    assert with_head.head.weight.any()


def test_sizes_seen_in_inference_mode_can_be_trained_with() -> None:
    host = small_host()
    with torch.inference_mode():
        set_patch(host, 7)
        host(torch.randn(1, 3, 35, 35))
    host.train()(torch.randn(1, 3, 35, 35)).sum().backward()
    assert host.patching.proj.weight.grad.any()
