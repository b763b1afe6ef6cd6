"""Adventurer and plain ViTs down to patches of one pixel: equations, positions, weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polypatch import create
from polypatch.errors import PolypatchError
from polypatch.mixing.state_space import StateSpace
from polypatch.patching import patch_scaling
from polypatch.patching.patch_scaling import (
    VARIANTS,
    Adventurer,
    build,
    from_official,
    learning_rate_scales,
    network,
    official_config,
    recognise,
    resize_positions,
    to_official,
)
from polypatch.training.cost import count_flops, peak_memory


def small(*, seed: int = 0, **changed) -> Adventurer:
    """Weights unlike a fresh network's, in eval mode."""
    options = {"dim": 16, "depth": 5, "patch": 4, "resolution": 16, "classes": 5} | changed
    mixing = partial(StateSpace, dim=options["dim"], state=4, head_dim=8)
    torch.manual_seed(seed)
    model = Adventurer(**options, mixing=mixing)
    model.init_weights()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model.eval()


def images(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


# ---- the network ---------------------------------------------------------------------------------


def norm(layer, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight


def literal(model: Adventurer, image: Tensor, backwards: set[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the patches' sequence behind each block, from the equations."""
    patch = model.patch
    columns = image.unfold(2, patch, patch).unfold(3, patch, patch)  # b c rows columns p p
    flat = columns.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = flat @ model.patching.weight.flatten(1).T + model.patching.bias
    x = torch.cat([x, model.class_token.expand(len(x), 1, -1)], 1) + model.position
    behind = []
    for number, block in enumerate(model.blocks):
        n = norm(block.norm1, x)
        if number in backwards:
            n = torch.stack([*n[:, :-1].unbind(1)[::-1], n[:, -1]], 1)
        n = torch.cat([n.mean(1, keepdim=True), n], 1)
        n = block.mixer(n)[:, 1:]
        if number in backwards:
            n = torch.stack([*n[:, :-1].unbind(1)[::-1], n[:, -1]], 1)
        x = x + n
        m = norm(block.norm2, x)
        gate, value = (m @ block.mlp.fc1.weight.T + block.mlp.fc1.bias).chunk(2, -1)
        hidden = gate * torch.sigmoid(gate) * value
        x = x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
        behind.append(norm(model.norm, x[:, :-1]))
    return model.head(norm(model.norm, x[:, -1])), behind


@pytest.mark.parametrize(
    ("flips", "backwards"),
    [("published", {2, 3}), ("alternating", {1, 3}), ("none", set())],
)
@pytest.mark.parametrize("record", [False, True])
def test_the_network_is_its_equations(flips, backwards, record):
    model = small(flips=flips)
    x = images(16, 16)
    logits, behind = literal(model, x, backwards)
    with torch.set_grad_enabled(record):
        torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-5)
        maps = model.features(x)
    # Of five blocks, those behind 1, 2, 3 and 5: also behind one that reads backwards.
    assert len(maps) == 4
    for number, (found, stride) in zip((1, 2, 3, 5), maps):
        assert stride == 4
        expected = behind[number - 1].transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_only_the_mean_tells_a_patch_of_those_behind_it():
    """Without flips, what lies behind reaches a patch through the heading average alone."""
    model = small(flips="none", depth=1)

    def without_mean(_, args):
        (headed,) = args
        return torch.cat([torch.zeros_like(headed[:, :1]), headed[:, 1:]], 1)

    for block in model.blocks:
        block.mixer.register_forward_pre_hook(without_mean)
    first = images(16, 16)
    second = first.clone()
    second[:, :, 12:] = 0  # the last row of patches
    one, two = (model.features(x)[0].map for x in (first, second))
    torch.testing.assert_close(one[:, :, :3], two[:, :, :3])
    assert not torch.allclose(one[:, :, 3], two[:, :, 3])
    model = small(flips="none", depth=1)
    one, two = (model.features(x)[0].map for x in (first, second))
    assert not torch.allclose(one[:, :, 0], two[:, :, 0])


def test_patches_that_do_not_fill_their_side_are_dropped():
    model = small()
    x = images(18, 19)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(x[..., :16, :16]), rtol=0, atol=0)


def test_drop_path_starts_behind_the_second_block():
    model = create("patch-scaling-nano(drop_path=0.3)")
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0, 0, 0.1, 0.2])
    model = network({"depth": 12, "drop_path_rate": 0.22})
    assert model.blocks[11].drop_path.rate == pytest.approx(0.2)


def test_dropout_acts_on_the_tokens_that_enter():
    model = small(dropout=0.999999)
    x = images(16, 16)
    assert not torch.allclose(model(x)[0], model(x)[1])
    model.train()
    logits = model(x)  # all tokens are zero: nothing is left of the image
    torch.testing.assert_close(logits[0], logits[1])


def test_initialisation_is_the_authors():
    model = build("patch-scaling-tiny-patch16").requires_grad_(False)
    assert model.patching.weight.std() == pytest.approx(768**-0.5 / 0.8796, rel=0.01)
    assert model.position.std() == pytest.approx(0.02, rel=0.05)
    assert model.head.weight.std() == pytest.approx(0.02, rel=0.02)
    block = model.blocks[5]
    largest = block.mixer.out_proj.weight.abs().max()
    assert largest == pytest.approx((512 * 12) ** -0.5, rel=0.01)
    assert block.mlp.fc2.weight.abs().max() == pytest.approx(640**-0.5, rel=0.01)
    for zero in (model.patching.bias, model.head.bias, block.mlp.fc1.bias, block.mlp.fc2.bias):
        assert not zero.any()
    options = {"n_residuals_per_layer": 3}
    model = network({"depth": 2, "initializer_cfg": options}).requires_grad_(False)
    model.init_weights()
    assert model.blocks[0].mixer.out_proj.weight.abs().max() == pytest.approx(
        (512 * 6) ** -0.5, rel=0.01
    )
    unscaled = network({"depth": 2, "initializer_cfg": {"rescale_prenorm_residual": False}})
    assert unscaled.blocks[0].mixer.out_scale == 1


# ---- positions and learning rates ----------------------------------------------------------------


def ramp(rows: int, columns: int, extra: float) -> Tensor:
    """A table that holds each patch's place in the image, and ``extra`` in its last row."""
    y, x = (torch.arange(n) / n + 0.5 / n for n in (rows, columns))
    table = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)
    return torch.cat([table, torch.full((1, 2), extra)])[None]


def test_resized_positions_keep_their_places():
    found = resize_positions(ramp(8, 6, 7.0), (8, 6), (24, 12))
    right = ramp(24, 12, 7.0)
    assert (found[0, -1] == 7).all()
    # Away from the border, to a small part of a patch (1/8 and 1/6 of the image).
    inner = (slice(None), slice(7, -7), slice(5, -5))
    maps = [t[:, :-1].unflatten(1, (24, 12))[inner] for t in (found, right)]
    torch.testing.assert_close(*maps, rtol=0, atol=0.01)
    same = ramp(8, 6, 7.0)
    torch.testing.assert_close(resize_positions(same, (8, 6), (8, 6)), same)


def test_the_authors_resizing_is_off_by_one():
    """Their extra row is the first patch's, and the class token's ends up among the patches."""
    table = torch.randn(1, 17, 3)
    theirs = resize_positions(table, (4, 4), (6, 6), leading=True)
    turned = torch.cat([table[:, 1:], table[:, :1]], 1)
    ours = resize_positions(turned, (4, 4), (6, 6))
    torch.testing.assert_close(theirs[:, 1:], ours[:, :-1])
    torch.testing.assert_close(theirs[:, :1], table[:, :1])


def test_resizing_for_good_is_what_happens_on_the_way():
    model, other = small(), small()
    x = images(24, 20)
    with torch.no_grad():
        on_the_way = model(x)
        torch.testing.assert_close(other.resize((24, 20))(x), on_the_way)
        assert other.position.shape == (1, 31, 16)
        shifted = small().resize((24, 20), shifted=True)(x)
    assert not torch.allclose(shifted, on_the_way)
    assert official_config(other)["img_size"] == (24, 20)
    with pytest.raises(PolypatchError, match=r"patches of 4 pixels a side don't fit into 3×3"):
        model.resize(3)
    with pytest.raises(PolypatchError, match="17 positions are not 3×3 patches and 1 more"):
        resize_positions(model.position, (3, 3), (6, 6))


def test_layer_wise_learning_rates():
    scales = learning_rate_scales(small(), 0.5)
    for name, steps in {
        "head.weight": 0,
        "norm.weight": 0,
        "blocks.4.mixer.D": 1,
        "blocks.0.norm1.weight": 5,
        "patching.weight": 6,
        "class_token": 6,
        "position": 6,
    }.items():
        assert scales[name] == 0.5**steps, name
    assert set(scales) == {name for name, _ in small().named_parameters()}


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("patch-scaling-tiny-patch16", 12),
        ("patch-scaling-base-patch16", 99),
        ("patch-scaling-large-patch16", 346),
        ("patch-scaling-huge-patch16", 718),  # the table's sizes; it says 759
        ("patch-scaling-base-patch1", 136),
    ],
)
def test_published_sizes(name, millions):
    with torch.device("meta"):
        model = create(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize(
    ("spec", "resolution", "crop"),
    [
        ("patch-scaling-base-patch16", 224, 0.875),
        ("patch-scaling-base-patch16(resolution=448)", 448, 1.0),
        ("patch-scaling-base-patch8", 224, 1.0),
        ("patch-scaling-tiny-patch1(resolution=64)", 64, 0.875),
        ("patch-scaling-tiny-patch1(resolution=128)", 128, 1.0),
    ],
)
def test_preprocessing_is_the_authors(spec, resolution, crop):
    with torch.device("meta"):
        model = create(spec)
    assert (model.preprocessing.resolution, model.preprocessing.crop) == (resolution, crop)


def test_cost_is_linear_in_the_tokens():
    flops = []
    for patch in (4, 2, 1):
        model = create(f"patch-scaling-nano(patch={patch})", resolution=64).eval()
        flops.append(count_flops(model, images(64, 64, batch=1)))
    assert flops[1] / flops[0] == pytest.approx(4, rel=0.2)
    assert flops[2] / flops[1] == pytest.approx(4, rel=0.05)


def test_a_plain_vit_of_single_pixels_needs_no_square_of_memory():
    """4096 tokens and the class token: attention as a matrix would take 67 MB a head."""
    model = create("vit-nano(patch=1)", classes=5, resolution=64).eval()
    x = images(64, 64, batch=1)
    assert model(x).shape == (1, 5)
    tokens = model.tokens(x).x
    assert tokens.shape == (1, 4097, 64)
    assert peak_memory(lambda: model(x)) < 4097**2 * 4 / 2


@pytest.mark.slow
def test_fifty_thousand_pixels():
    """224×224 tokens; the memory is that of a few of the widest activations."""
    model = create("patch-scaling-nano(patch=1)", classes=5, resolution=224).eval()
    x = images(224, 224, batch=1)
    with torch.no_grad():
        assert model(x).isfinite().all()
        (*_, last) = model.features(x)
    assert last.map.shape == (1, 64, 224, 224)
    widest = 50_178 * model.blocks[0].mixer.in_proj.out_features * 4
    assert peak_memory(lambda: model(x)) < 4 * widest


# ---- weights and options -------------------------------------------------------------------------

SSM = [
    None,
    {"headdim": 16},
    {"headdim": 8, "d_conv": 3, "conv_bias": False},
    {"headdim": 8, "bias": True},
    {"headdim": 8, "rmsnorm": False},
    {"headdim": 8, "D_has_hdim": True},
    {"headdim": 8, "d_ssm": 32},
]


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_configurations_come_back_from_the_weights(data):
    draw = data.draw
    patch = draw(st.sampled_from([1, 2, 4]))
    ssm = draw(st.sampled_from(SSM))
    config = {
        "img_size": patch * draw(st.integers(1, 4)),
        "patch_size": patch,
        "depth": draw(st.integers(1, 4)),
        "embed_dim": 32 if ssm else 64,
        "channels": draw(st.sampled_from([1, 3])),
        "num_classes": draw(st.sampled_from([0, 2, 7])),
        "ssm_cfg": ssm,
        "norm_epsilon": 1e-5,
        "rms_norm": draw(st.booleans()),
        "mamba_expand": draw(st.sampled_from([2, 3])),
        "mamba_d_state": draw(st.sampled_from([1, 4, 16])),
        "flips": "published",
    }
    model = network(config)
    model.init_weights()
    theirs = to_official(model.eval())
    assert recognise({name: tuple(v.shape) for name, v in theirs.items()}) == config
    assert {**official_config(model), **config} == official_config(model)
    again = from_official(config, theirs)
    x = torch.randn(2, config["channels"], config["img_size"], config["img_size"])
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "words",
    [
        {"ngroups": 2},
        {"norm_before_gate": True},
        {"dt_limit": (0.01, 0.2)},
        {"use_mem_eff_path": False, "chunk_size": 64},
        {"A_init_range": (2, 3), "dt_min": 0.01, "dt_max": 0.02, "dt_init_floor": 0.015},
        {"conv_init": 0.1},
    ],
    ids=str,
)
def test_what_no_shape_tells_is_taken_from_the_configuration(words):
    config = {"embed_dim": 32, "img_size": 32, "depth": 2, "ssm_cfg": {"headdim": 8, **words}}
    model = network(config)
    model.init_weights()
    kept = official_config(model)
    again = network(kept)
    assert official_config(again) == kept
    again.load_state_dict(model.state_dict())
    x = images(32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=0, atol=0)
    plain = network(config | {"ssm_cfg": {"headdim": 8}})
    if "ngroups" not in words:
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            same = torch.equal(plain.eval()(x), model(x))
        assert same == (not {"norm_before_gate", "dt_limit"} & words.keys())
    if "A_init_range" in words:
        mixer = model.blocks[0].mixer
        assert 2 <= mixer.A_log.exp().min() <= mixer.A_log.exp().max() <= 3.0001


def test_weights_without_a_classifier():
    model = small(classes=0)
    found = recognise({name: tuple(v.shape) for name, v in to_official(model).items()})
    assert found is not None
    assert found["num_classes"] == 0
    x = images(16, 16)
    torch.testing.assert_close(model(x), model.pooled(x))


def test_other_networks_are_not_taken_for_this_one():
    shapes = {name: tuple(v.shape) for name, v in to_official(small()).items()}
    assert recognise(shapes) is not None
    for name in ("layers.0.mixer.A_log", "pos_embed", "layers.0.norm_mlp.weight"):
        assert recognise({n: s for n, s in shapes.items() if n != name}) is None
    assert recognise(shapes | {"pos_embed": (1, 19, 16)}) is None, "18 patches are no square"
    assert recognise(shapes | {"layers.0.mixer.in_proj.weight": (4,)}) is None


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"ssm_cfg": {"head_dim": 8}}, "there is no 'head_dim' in ssm_cfg.*headdim"),
        ({"initializer_cfg": {"std": 1}}, "there is no 'std' in initializer_cfg"),
        ({"patch_size": (16, 8)}, r"patches must be square, got \(16, 8\)"),
        ({"img_size": 8}, "patches of 16 pixels a side don't fit into 8×8 pixels"),
        ({"embed_dim": 40}, "80 of an inner width of 80 can't be cut into heads of 64"),
        ({"flips": "alternate"}, "there is no flips='alternate'.*alternating"),
    ],
    ids=str,
)
def test_configurations_that_do_not_work_are_named(config, sentence):
    with pytest.raises(PolypatchError, match=sentence):
        network(config)


def test_options():
    model = create("patch-scaling-nano(patch=2,flips=alternating,dropout=0.1)", resolution=16)
    assert isinstance(model, Adventurer)
    assert (model.patch, model.grid, model.flips, model.dropout) == (2, (8, 8), "alternating", 0.1)
    with pytest.raises(PolypatchError, match="has no option 'drop_paths'"):
        create("patch-scaling-nano(drop_paths=0.1)")
    with pytest.raises(PolypatchError, match="patches of 0 pixels"):
        create("patch-scaling-nano(patch=0)")
    assert (
        patch_scaling.assemble(VARIANTS["patch-scaling-nano"], channels=1).patching.in_channels == 1
    )
