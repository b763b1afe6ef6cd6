"""CSWin: stripes against a literal version, what a block can see, costs, options, weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from polypatch import create
from polypatch.backbones import cswin
from polypatch.backbones.cswin import CrossShapedAttention
from polypatch.errors import PolypatchError
from polypatch.training.cost import count_flops

SMALL = {
    "img_size": 64,
    "in_chans": 3,
    "num_classes": 5,
    "embed_dim": 8,
    "depth": [1, 2, 1, 1],
    "split_size": [1, 3, 3, 7],
    "num_heads": [2, 2, 4, 4],
}


def randomised(model: nn.Module, *, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            std = value[0].numel() ** -0.5 if value.ndim > 1 else 0.3
            value.copy_(std * torch.randn(value.shape, generator=generator))
    return model.eval()


# ---- the paper's equations -----------------------------------------------------------------------


def literal(attention: CrossShapedAttention, x: Tensor, *, stripe: int | None) -> Tensor:
    """Eq. 1, 2 and 7 for one map (height, width, dim), stripe by stripe, head by head. Zeros
    around a map that the stripes don't divide, the same on both sides, stand behind the projection.
    """
    height, width, dim = x.shape
    q, k, v = F.linear(x, attention.qkv.weight, attention.qkv.bias).split(dim, -1)
    joined = []
    directions = [(height, width)] if stripe is None else [(height, stripe), (stripe, width)]
    for number, (tall, wide) in enumerate(directions):
        part = dim // len(directions)
        heads = attention.stripes[number].heads
        channels = slice(number * part, (number + 1) * part)
        above, left = (-height % tall) // 2, (-width % wide) // 2
        rows, columns = -(-height // tall), -(-width // wide)
        padded = []
        for one in (q, k, v):
            frame = torch.zeros(rows * tall, columns * wide, part)
            frame[above : above + height, left : left + width] = one[..., channels]
            padded.append(frame)
        out = torch.zeros(rows * tall, columns * wide, part)
        lepe = attention.stripes[number].lepe
        for row in range(rows):
            for column in range(columns):
                place = (
                    slice(row * tall, (row + 1) * tall),
                    slice(column * wide, (column + 1) * wide),
                )
                values = padded[2][place]
                around = F.pad(values, (0, 0, 1, 1, 1, 1))
                result = torch.zeros(tall, wide, part)
                for head in range(heads):
                    of = slice(head * part // heads, (head + 1) * part // heads)
                    queries, keys = (p[place][..., of].reshape(tall * wide, -1) for p in padded[:2])
                    weights = (queries @ keys.T * (part // heads) ** -0.5).softmax(-1)
                    mixed = weights @ values[..., of].reshape(tall * wide, -1)
                    result[..., of] = mixed.view(tall, wide, -1)
                if lepe is not None:
                    result += lepe.bias
                    for i in range(3):
                        for j in range(3):
                            shifted = around[i : i + tall, j : j + wide]
                            result += shifted * lepe.weight[:, 0, i, j]
                out[place] = result
        joined.append(out[above : above + height, left : left + width])
    return F.linear(torch.cat(joined, -1), attention.proj.weight, attention.proj.bias)


@pytest.mark.parametrize(
    ("stripe", "size", "lepe"),
    [
        (1, (4, 6), True),
        (2, (4, 6), True),
        (2, (5, 7), True),  # zeros on one side only
        (3, (4, 7), True),  # on both
        (4, (3, 5), True),  # stripes wider than the map
        (None, (3, 5), True),
        (2, (4, 4), False),
    ],
)
def test_attention_is_the_papers(stripe: int | None, size: tuple[int, int], lepe: bool) -> None:
    attention = CrossShapedAttention(dim=12, heads=6, stripe=stripe, lepe=lepe)
    randomised(attention)
    x = torch.randn(2, *size, 12)
    with torch.no_grad():
        expected = torch.stack([literal(attention, one, stripe=stripe) for one in x])
        torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-5)


def seen_from(module: nn.Module, x: Tensor, place: tuple[int, int]) -> Tensor:
    """Which places of ``x`` (1, height, width, dim) the output at ``place`` depends on."""
    x = x.clone().requires_grad_()
    module(x)[0, place[0], place[1]].square().sum().backward()
    assert x.grad is not None
    return x.grad[0].abs().sum(-1) > 0


def test_one_block_sees_a_cross_and_two_see_everything() -> None:
    blocks = [
        cswin.Block(attention=CrossShapedAttention(dim=8, heads=2, stripe=2), dim=8, hidden=8)
        for _ in range(2)
    ]
    for number, block in enumerate(blocks):
        randomised(block, seed=number)
    x = torch.randn(1, 6, 8, 8)
    cross = torch.zeros(6, 8, dtype=torch.bool)
    cross[2:4], cross[:, 4:6] = True, True
    assert torch.equal(seen_from(blocks[0], x, (3, 5)), cross)
    assert seen_from(nn.Sequential(*blocks), x, (3, 5)).all()


def test_first_channels_see_vertical_stripes() -> None:
    attention = CrossShapedAttention(dim=8, heads=2, stripe=2)
    randomised(attention)
    attention.proj = nn.Identity()  # type: ignore[assignment]
    x = torch.randn(1, 6, 6, 8)
    for channels, expected in ((slice(0, 4), (slice(None), slice(2, 4))),
                               (slice(4, 8), (slice(2, 4), slice(None)))):  # fmt: skip
        cross = torch.zeros(6, 6, dtype=torch.bool)
        cross[expected] = True

        class Half(nn.Module):
            def forward(self, x: Tensor, channels: slice = channels) -> Tensor:
                return attention(x)[..., channels]

        assert torch.equal(seen_from(Half(), x, (3, 3)), cross)


def test_turning_the_image_swaps_the_directions() -> None:
    """Transposing the map and swapping the halves transposes the result."""
    attention = CrossShapedAttention(dim=8, heads=4, stripe=2)
    randomised(attention)
    swapped = CrossShapedAttention(dim=8, heads=4, stripe=2)
    swap = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    rows = torch.cat([swap, 8 + swap, 16 + swap])
    with torch.no_grad():
        swapped.qkv.weight.copy_(attention.qkv.weight[rows])
        swapped.qkv.bias.copy_(attention.qkv.bias[rows])
        swapped.proj.weight.copy_(attention.proj.weight[:, swap])
        swapped.proj.bias.copy_(attention.proj.bias)
        for ours, theirs in zip(swapped.stripes, reversed(list(attention.stripes))):
            ours.lepe.weight.copy_(theirs.lepe.weight.transpose(2, 3))  # type: ignore[union-attr]
            ours.lepe.bias.copy_(theirs.lepe.bias)  # type: ignore[union-attr]
        x = torch.randn(2, 6, 4, 8)
        torch.testing.assert_close(
            swapped(x.transpose(1, 2)), attention(x).transpose(1, 2), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(("stripe", "height", "width"), [(1, 8, 12), (4, 8, 12), (None, 6, 5)])
def test_operations_are_the_papers(stripe: int | None, height: int, width: int) -> None:
    """HWC (4C + sw H + sw W) multiplications with the projections (sec. 3.2), 2 H²W²C + 4HWC² over
    the whole map; each counts as two operations. LePE is left away."""
    dim = 16

    class OfMap(CrossShapedAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.zeros(1, *x.shape[2:], dim))

    attention = OfMap(dim=dim, heads=4, stripe=stripe, lepe=False)
    places = height * width
    within = 2 * places * places * dim
    if stripe is not None:
        within = places * dim * stripe * (height + width)
    found = count_flops(attention, torch.zeros(1, 3, height, width))
    assert found == 2 * (4 * places * dim * dim + within)


def test_scale_multiplies_logits() -> None:
    plain = CrossShapedAttention(dim=8, heads=2, stripe=2)
    scaled = CrossShapedAttention(dim=8, heads=2, stripe=2, scale=0.25)
    randomised(plain)
    scaled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        scaled.qkv.weight[:8] *= 0.5 / 0.25  # 1 / √4 with plain queries
        scaled.qkv.bias[:8] *= 0.5 / 0.25
        x = torch.randn(1, 4, 4, 8)
        torch.testing.assert_close(scaled(x), plain(x), rtol=1e-5, atol=1e-6)


# ---- networks ------------------------------------------------------------------------------------

#: counted in the authors' code
PARAMETERS = {
    "cswin-tiny": 22_320_552,
    "cswin-small": 34_643_304,
    "cswin-base": 77_382_184,
    "cswin-large": 173_262_664,
    "cswin-base-384": 77_382_184,
    "cswin-large-384": 173_262_664,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_variants_have_the_authors_parameters(name: str) -> None:
    with torch.device("meta"):
        model = create(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert set(PARAMETERS) | {"cswin-nano"} == set(cswin.VARIANTS)


def test_preprocessing_is_the_authors() -> None:
    with torch.device("meta"):
        small, large = create("cswin-base"), create("cswin-base-384")
    assert (small.preprocessing.resolution, small.preprocessing.crop) == (224, 0.9)
    assert (large.preprocessing.resolution, large.preprocessing.crop) == (384, 1.0)


def test_drop_path_grows_to_the_recipes() -> None:
    with torch.device("meta"):
        model = create("cswin-tiny")
        other = create("cswin-tiny(drop_path=0.1)")
    rates = [block.drop_path.rate for blocks in model.stages for block in blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.2, 25).tolist())
    assert other.stages[3][0].drop_path.rate == pytest.approx(0.1)


def test_dropout_reaches_what_it_should() -> None:
    """``dropout`` the MLP alone, ``attention_dropout`` the weights of the attention alone."""
    for option, part in (("dropout", "mlp"), ("attention_dropout", "attention")):
        model = cswin.build("cswin-nano", classes=3, resolution=32, **{option: 0.5})
        block = model.train().stages[0][0]
        x = torch.randn(1, 8, 8, 24)
        for name in ("mlp", "attention"):
            same = torch.equal(getattr(block, name)(x), getattr(block, name)(x))
            assert same == (name != part)


@pytest.mark.parametrize(
    ("resolution", "expected"),
    [(64, (False, False, False, True)), (32, (False, False, True, True))],
)
def test_a_map_of_one_stripe_is_one_window(resolution: int, expected: tuple[bool, ...]) -> None:
    model = cswin.build("cswin-nano", resolution=resolution)
    assert model.whole == expected
    for whole, blocks in zip(expected, model.stages):
        assert len(blocks[0].attention.stripes) == (1 if whole else 2)  # type: ignore[index]


@pytest.mark.parametrize("size", [(3, 3), (32, 57), (90, 41), (128, 160)], ids=str)
def test_any_size_works(size: tuple[int, int]) -> None:
    model = cswin.build("cswin-nano", classes=4, resolution=32).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = model.features(x)
        assert model(x).isfinite().all()
    rows, columns = (size[0] + 1) // 4, (size[1] + 1) // 4
    for value, stride in maps:
        assert value.shape[2:] == (rows, columns)
        assert stride in (4, 8, 16, 32)
        rows, columns = -(-rows // 2), -(-columns // 2)


def test_dense_prediction_has_a_norm_in_every_stage() -> None:
    config = SMALL | {"stage_norms": True, "num_classes": 0}
    model = randomised(cswin.network(config))
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim <= 1:
                value.zero_()
        for norm in (*model.stage_norms, model.norm):
            norm.weight.fill_(1)
        maps = model.features(torch.randn(1, 3, 70, 50))
    for value, _ in maps:
        assert value.mean(1).abs().max() < 1e-5


# ---- weights -------------------------------------------------------------------------------------


@st.composite
def configurations(draw: st.DrawFn) -> dict:
    dense = draw(st.booleans())
    heads = draw(st.sampled_from([[2, 2, 4, 4], [2, 4, 8, 8], [4, 4, 4, 4], [3, 3, 3, 3]]))
    config = {
        "img_size": draw(st.sampled_from([32, 64, 96])),
        "in_chans": draw(st.sampled_from([1, 3])),
        "num_classes": 0 if dense else draw(st.sampled_from([0, 4])),
        "embed_dim": draw(st.sampled_from([12, 24])),
        "depth": draw(st.lists(st.integers(1, 3), min_size=4, max_size=4)),
        "split_size": draw(st.lists(st.integers(1, 5), min_size=4, max_size=4)),
        "num_heads": heads,
        "mlp_ratio": draw(st.sampled_from([4.0, 2.0, 3.5])),
        "qkv_bias": dense or draw(st.booleans()),
        "qk_scale": draw(st.sampled_from([None, 0.3])),
        "stage_norms": dense,
    }
    return config


@given(config=configurations())
@settings(max_examples=25, deadline=None)
def test_configurations_round_trip(config: dict) -> None:
    """Authors' words → network → keys → recognised → rebuilt. What shapes tell is told right, and
    also with what is assumed the weights fit."""
    model = randomised(cswin.network(config))
    said = cswin.official_config(model)
    assert {name: said[name] for name in config} == config
    theirs = cswin.to_official(model)
    found = cswin.recognise({name: tuple(value.shape) for name, value in theirs.items()})
    assert found is not None
    for name, value in found.items():
        assert name in cswin.ASSUMED or value == said[name], name
    # a dense network's dims are those that its heads imply
    heads = {"num_heads": config["num_heads"]} if config["stage_norms"] else {}
    cswin.from_official(found | heads, theirs)
    again = cswin.from_official(found | said, theirs)
    x = torch.randn(1, config["in_chans"], 40, 36)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)


def test_published_sizes_are_recognised() -> None:
    for name, variant in cswin.VARIANTS.items():
        with torch.device("meta"):
            model = create(name)
        shapes = {k: tuple(v.shape) for k, v in cswin.to_official(model).items()}
        found = cswin.recognise(shapes)
        assert found is not None
        assert found["num_heads"] == list(variant.heads)
        if not name.endswith("-384"):  # the same shapes as at 224 pixels
            assert found["split_size"] == list(variant.stripes)
            assert found["img_size"] == variant.resolution


def test_a_segmentation_networks_file_gives_its_encoder() -> None:
    model = randomised(cswin.network(SMALL | {"stage_norms": True, "num_classes": 0}))
    file = {f"backbone.{name}": value for name, value in cswin.to_official(model).items()}
    file["decode_head.conv_seg.weight"] = torch.zeros(150, 8, 1, 1)
    file["auxiliary_head.conv_seg.weight"] = torch.zeros(150, 8, 1, 1)
    found = cswin.recognise({name: tuple(value.shape) for name, value in file.items()})
    assert found is not None
    assert found["stage_norms"]
    again = cswin.from_official(SMALL | {"num_classes": 0}, file)
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        for ours, theirs in zip(again.features(x), model.features(x)):
            torch.testing.assert_close(ours.map, theirs.map)
    with pytest.raises(PolypatchError, match="neck"):
        cswin.from_official(SMALL | {"num_classes": 0}, {**file, "neck.x": torch.zeros(1)})


def test_checkpointing_is_use_chk() -> None:
    assert cswin.network(SMALL | {"use_chk": True})._checkpointed
    assert not cswin.network(SMALL)._checkpointed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_heads": 4}, "a number for each stage"),
        ({"num_heads": [1, 2, 4, 8]}, "two heads"),
        ({"num_heads": [2, 2, 4, 5]}, "don't divide into 5 heads"),
        ({"depth": [1, 2, 3]}, "4 stages"),
        ({"embed_dim": 7}, "even dim"),
        ({"norm_layer": "BatchNorm"}, "norm_layer='BatchNorm'"),
        ({"hybrid_backbone": "resnet26d"}, "hybrid_backbone='resnet26d'"),
    ],
)
def test_bad_configurations_are_named(change: dict, sentence: str) -> None:
    with pytest.raises(PolypatchError, match=sentence):
        cswin.network(SMALL | change)


def test_without_lepe() -> None:
    """The ablation: fewer parameters, nothing that tells places of one stripe apart, and no layout
    of the authors'."""
    model = cswin.build("cswin-nano", lepe=False)
    assert not any("lepe" in name for name, _ in model.named_parameters())
    with pytest.raises(PolypatchError, match="without LePE"):
        cswin.to_official(model)
    attention = randomised(CrossShapedAttention(dim=8, heads=2, stripe=None, lepe=False))
    x = torch.randn(1, 3, 4, 8)
    order = torch.randperm(12)
    with torch.no_grad():
        shuffled = x.flatten(1, 2)[:, order].view_as(x)
        expected = attention(x).flatten(1, 2)[:, order]
        torch.testing.assert_close(attention(shuffled).flatten(1, 2), expected)
