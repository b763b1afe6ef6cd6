from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import polypatch
from polypatch.errors import PolypatchError
from polypatch.hosts import build_vit
from polypatch.nn import GridPatching
from polypatch.patching.quadtree import (
    QuadtreePatching,
    ScaledPosition,
    default_thresholds,
    entropy_maps,
    flat_layout,
    group_patches,
    laplacian_maps,
    plug,
    reconstruction_maps,
    select_patches,
    to_pixels,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def half_flat(batch: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    """Images, flat on the left by an amount that differs between samples, noise elsewhere."""
    images = torch.randn(batch, 3, height, width)
    for number, image in enumerate(images):
        image[:, :, : width * (number + 1) // (batch + 1)] = 0.1 * number
    return images


def small_host(spec: str = "quadtree", host: str = "vit-nano") -> torch.nn.Module:
    return polypatch.create(f"{host}+{spec}", classes=5, resolution=32, seed=0)


# ---- importance ----------------------------------------------------------------------------------


def literal_entropy(grey: list[float], bins: int, span: float) -> float:
    counts = [0] * bins
    for value in grey:
        counts[min(int(value * bins / span), bins - 1)] += 1
    shares = [count / len(grey) for count in counts]
    return -sum(q * math.log2(q + 1e-10) for q in shares)


@pytest.mark.parametrize(("side", "bins"), [(4, 512), (8, 32)])  # few pixels, few bins
def test_entropy_against_a_literal_count(side: int, bins: int) -> None:
    levels = torch.randint(0, 12, (2, 1, 16, 24)) * 20.0
    ours = entropy_maps(levels, [side], bins=bins)[side]
    for b in range(2):
        for i in range(16 // side):
            for j in range(24 // side):
                cell = levels[b, 0, i * side : (i + 1) * side, j * side : (j + 1) * side]
                expected = literal_entropy(cell.flatten().tolist(), bins, 256.0)
                assert ours[b, i, j].item() == pytest.approx(expected, abs=1e-5)


def test_single_image_form_is_histc() -> None:
    grey = torch.rand(1, 1, 16, 16) * 255
    grey[0, 0, 0, 0] = 255.0
    ours = entropy_maps(grey, [16], span=255.0)[16]
    share = torch.histc(grey.flatten(), bins=512, min=0, max=255) / 256
    torch.testing.assert_close(ours.item(), -(share * (share + 1e-10).log2()).sum().item())


def test_entropy_bounds_and_incomplete_border() -> None:
    flat = torch.full((1, 3, 20, 16), 90.0)
    maps = entropy_maps(flat, [8, 16])
    assert maps[8][:, :2].abs().max() < 1e-6
    assert (maps[8][:, 2] == 1e6).all()
    assert maps[16].tolist() == [[[pytest.approx(0, abs=1e-6)], [1e6]]]
    distinct = torch.arange(64.0).view(1, 1, 8, 8) * 4
    assert entropy_maps(distinct, [8])[8].item() == pytest.approx(6, abs=1e-5)


def test_laplacian_literal() -> None:
    pixels = torch.rand(1, 3, 9, 8) * 255
    grey = (0.2989 * pixels[0, 0] + 0.5870 * pixels[0, 1] + 0.1140 * pixels[0, 2]) / 255
    padded = F.pad(grey[None, None], (1, 1, 1, 1), mode="reflect")[0, 0]
    response = torch.zeros(12, 8)  # filled up to whole squares
    for y in range(9):
        for x in range(8):
            response[y, x] = (padded[y : y + 3, x : x + 3].sum() - 9 * padded[y + 1, x + 1]).abs()
    cells = response.view(3, 4, 2, 4).permute(0, 2, 1, 3).flatten(2)
    wanted = {"mean": cells.mean(-1), "max": cells.amax(-1), "std": cells.std(-1)}
    for aggregate, expected in wanted.items():
        ours = laplacian_maps(pixels, [4], aggregate=aggregate)[4][0]
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_images_in_unit_range_are_not_divided_again() -> None:
    unit = torch.rand(2, 3, 16, 16)
    for function in (laplacian_maps, reconstruction_maps):
        torch.testing.assert_close(function(unit, [8])[8], function(unit * 255, [8])[8])


def test_reconstruction_error_of_smooth_and_rough() -> None:
    ramp = torch.linspace(0, 255, 32).expand(1, 3, 32, 32)
    rough = torch.rand(1, 3, 32, 32) * 255
    smooth, noisy = (reconstruction_maps(x, [8, 16])[16].mean().item() for x in (ramp, rough))
    assert smooth < 1e-4 < 0.01 < noisy
    assert reconstruction_maps(rough, [8], factors=(1.0,))[8].abs().max() == 0


def test_pixels_are_restored_and_clamped() -> None:
    levels = torch.randint(0, 256, (2, 3, 4, 4)) / 255
    shape = (3, 1, 1)
    image = (levels - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)
    torch.testing.assert_close(to_pixels(image, MEAN, STD), levels * 255, atol=1e-3, rtol=0)
    assert to_pixels(torch.full((1, 3, 1, 1), 9.0), MEAN, STD).max() == 255
    assert to_pixels(image.bfloat16(), MEAN, STD).dtype == torch.float32


# ---- choice --------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), scales=st.integers(2, 4), seed=st.integers(0)
)
def test_masks_cover_every_base_cell_once(rows: int, columns: int, scales: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    maps = {
        4 * 2**i: torch.rand(2, rows >> i, columns >> i, generator=generator)
        for i in range(1, scales)
    }
    thresholds = [0.6] * (scales - 1)
    masks = select_patches(maps, thresholds, patch=4, grid=(rows, columns))
    cover = torch.zeros(2, rows, columns)
    for level, mask in enumerate(masks.values()):
        big = mask.repeat_interleave(2**level, 1).repeat_interleave(2**level, 2)
        cover[:, : big.shape[1], : big.shape[2]] += big.float()
    assert (cover == 1).all()


def test_strictly_below_and_largest_first() -> None:
    maps = {8: torch.tensor([[[1.0, 3.0], [3.0, 3.0]]]), 16: torch.tensor([[[2.0]]])}
    strict = select_patches(maps, [1.0, 2.0], patch=4, grid=(4, 4))
    assert not strict[8].any()
    assert not strict[16].any()
    assert strict[4].all()
    nested = select_patches(maps, [2.0, 2.5], patch=4, grid=(4, 4))
    assert nested[16].all()
    assert not nested[8].any()
    assert not nested[4].any()
    with pytest.raises(PolypatchError, match="as many thresholds"):
        select_patches(maps, [1.0], patch=4, grid=(4, 4))


def test_default_thresholds_fit_the_side() -> None:
    assert default_thresholds("entropy", 16, 2) == (5.5,)
    assert default_thresholds("entropy", 16, 3) == (5.5, 4.0)
    assert default_thresholds("entropy", 4, 3) == (4.8, 4.0)  # 8-pixel squares: at most 6 bits
    assert default_thresholds("entropy", 16, 1) == ()


# ---- the tokenizer -------------------------------------------------------------------------------


def test_flat_layout_and_groups() -> None:
    image = half_flat(2, 16, 16)
    maps = {8: torch.tensor([[[0.0, 1.0], [1.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])}
    masks = select_patches(maps, [0.5], patch=4, grid=(4, 4))
    scale, lengths = flat_layout(masks)
    assert lengths.tolist() == [1 + 12 + 1, 1 + 8 + 2]
    assert scale.tolist() == [-1] + [1] * 12 + [2] + [-1] + [1] * 8 + [2] * 2
    groups = group_patches(image, masks, patch=4)
    assert groups.resized[4].shape == (20, 3, 4, 4)
    torch.testing.assert_close(groups.resized[4][0], image[0, :, :4, 8:12])
    assert groups.constituents[8].shape == (3, 4, 3, 4, 4)
    torch.testing.assert_close(groups.constituents[8][2, 1], image[1, :, 8:12, 4:8])
    block = image[1, :, 8:16, :8].unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4))
    torch.testing.assert_close(groups.resized[8][2], block)


@pytest.mark.parametrize("size", [(32, 32), (30, 45), (9, 33), (4, 4)])
@pytest.mark.parametrize("scales", [2, 3])
def test_supports_cover_the_canvas(size: tuple[int, int], scales: int) -> None:
    model = small_host(f"quadtree(scales={scales})").eval()
    tokens = model.tokens(half_flat(3, *size)).check()
    assert (tokens.label_map() >= 0).all()
    area = tokens.extent[:, 1:].prod(-1).sum(1)
    rows, columns = -(-size[0] // 4), -(-size[1] // 4)
    assert area.tolist() == [rows * columns * 16.0] * 3
    if tokens.mask is not None:  # padding behind
        assert (tokens.mask.int().diff(dim=1) <= 0).all()
    assert model(half_flat(3, *size)).shape == (3, 5)


def test_coarse_embedding_is_resized_patch_plus_zero_branch() -> None:
    model = small_host("quadtree(scales=3,thresholds=[9,9])").eval()
    patching = model.patching
    image = half_flat(2)
    tokens = patching(image)
    assert tokens.x.shape == (2, 4, 64)  # 16-pixel squares only
    small = F.interpolate(image, scale_factor=0.25, mode="bilinear")
    expected = patching.proj(small).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens.x, expected, atol=1e-5, rtol=1e-4)
    torch.nn.init.normal_(patching.zero.weight, std=0.1)
    full = patching.down(patching.down(patching.proj(image))).flatten(2).transpose(1, 2)
    expected = expected + patching.zero(full)
    torch.testing.assert_close(patching(image).x, expected, atol=1e-5, rtol=1e-4)


def test_nothing_coarse_is_the_plain_host() -> None:
    plain = build_vit("nano", classes=5, resolution=32).eval()
    image = torch.randn(2, 3, 32, 40)
    expected = plain(image)
    plug(plain, thresholds=-1.0)
    torch.testing.assert_close(plain(image), expected, atol=1e-5, rtol=1e-4)
    alone = plug(build_vit("nano", classes=5), scales=1)
    assert isinstance(alone.patching, GridPatching)
    assert alone.plugs == ("quadtree",)


def test_positions_are_the_resampled_table() -> None:
    model = small_host("quadtree(scales=2,thresholds=99)").eval()
    assert isinstance(model.position, ScaledPosition)
    table = torch.randn_like(model.position.table)
    model.position.table.data.copy_(table)
    tokens = model.patching(half_flat(2))
    added = model.position(tokens).x - tokens.x
    small = F.interpolate(table.permute(0, 3, 1, 2), size=(4, 4), mode="bicubic", antialias=True)
    expected = small.flatten(2).transpose(1, 2).expand(2, -1, -1)
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-4)


def test_positions_of_base_patches_are_the_table_itself() -> None:
    model = small_host("quadtree(scales=3)").eval()
    torch.nn.init.normal_(model.position.table)
    tokens = model.patching(half_flat(3))
    added = model.position(tokens).x - tokens.x
    rows = model.position.table.flatten(1, 2)[0]
    base = tokens.extent[..., 0] == 4
    cell = (tokens.centre / 4).long()
    expected = rows[cell[..., 0] * 8 + cell[..., 1]]
    torch.testing.assert_close(added[base], expected[base], atol=1e-5, rtol=1e-4)


def test_samples_do_not_depend_on_their_batch() -> None:
    model = small_host("quadtree(scales=3)").eval()
    images = half_flat(4)
    together = model(images)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert len(set(model.tokens(images).counts.tolist())) > 1


@pytest.mark.parametrize("method", ["entropy", "laplacian", "upsample_mse"])
def test_flat_places_get_large_patches(method: str) -> None:
    model = small_host(f"quadtree(method={method})")
    tokens = model.patching(half_flat(1))
    coarse = tokens.extent[0, :, 0] == 8
    assert coarse.any()
    assert not coarse.all()
    assert (tokens.centre[0, coarse, 1] < 17).all()


def test_gradients_reach_every_parameter() -> None:
    model = small_host("quadtree(scales=3)").train()
    torch.nn.init.normal_(model.patching.zero.weight, std=0.1)
    model(half_flat(4)).square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


def test_a_batch_without_coarse_patches_still_has_gradients() -> None:
    """None instead of zeros would stall distributed training."""
    model = small_host("quadtree(thresholds=-1)").train()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("position", ["sincos", "rope", "'none'"])
def test_other_positions(position: str) -> None:
    model = small_host("quadtree", host=f"vit-nano(position={position})").eval()
    assert not isinstance(model.position, ScaledPosition)
    assert model(half_flat(2)).isfinite().all()


def test_initialisation_and_saved_weights() -> None:
    model = small_host("quadtree")
    torch.nn.init.ones_(model.patching.zero.weight)
    model.init_weights()
    assert not model.patching.zero.weight.any()
    assert model.patching.down.weight.std() > 0.01
    plain = build_vit("nano", classes=5, resolution=32)
    extra = set(model.state_dict()) - set(plain.state_dict())
    assert {name.split(".")[1] for name in extra} == {"down", "zero"}
    dim = 64
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, plain)]
    assert counts[0] - counts[1] == 4 * dim * dim + dim + dim * dim + dim


def test_half_precision() -> None:
    image = half_flat(2)
    model = small_host("quadtree").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(image).isfinite().all()
    full = model.patching.masks(image.bfloat16())
    model.bfloat16()
    half = model.patching.masks(image.bfloat16())
    assert all(torch.equal(full[side], half[side]) for side in full)
    assert model(image.bfloat16()).dtype == torch.bfloat16


def test_grey_images() -> None:
    host = build_vit("nano", channels=1, classes=3)
    with pytest.raises(PolypatchError, match="1 channels"):
        plug(host)
    plug(host, mean=(0.5,), std=(0.25,))
    assert host(half_flat(2)[:, :1]).shape == (2, 3)


def test_bad_options() -> None:
    for options, message in (
        (dict(scales=0), "at least one scale"),
        (dict(method="entrpy"), "entropy"),
        (dict(aggregate="median"), "aggregate"),
        (dict(bins=1), "at least 2 bins"),
        (dict(scales=3, thresholds=(5.0,)), "3 scales need 2"),
    ):
        with pytest.raises(PolypatchError, match=message):
            plug(build_vit("nano"), **options)
    with pytest.raises(PolypatchError, match="plain grid"):
        plug(plug(build_vit("nano")))
    with pytest.raises(PolypatchError, match="smaller than one patch"):
        small_host()(torch.randn(1, 3, 3, 8))


def test_larger_hosts_build() -> None:
    model = polypatch.create("vit-tiny(patch=16)+quadtree(scales=3)", classes=2, resolution=224)
    assert model.patching.thresholds == (5.5, 4.0)
    with torch.no_grad():
        tokens = model.tokens(half_flat(1, 224, 224))
    assert set(tokens.extent[0, 1:, 0].tolist()) == {16.0, 32.0, 64.0}
    assert isinstance(model.patching, QuadtreePatching)
