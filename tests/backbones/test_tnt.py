"""TNT: its equations, its traps, its variants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polypatch import create
from polypatch.backbones import tnt
from polypatch.backbones.tnt import TNT
from polypatch.errors import PolypatchError
from polypatch.nn.positions import resample_grid
from polypatch.training.cost import count_flops


def lived_in(model: TNT) -> TNT:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


def small(**changed) -> TNT:
    sizes = {
        "dim": 24, "inner_dim": 8, "depth": 3, "heads": 3, "inner_heads": 2, "patch": 8,
        "stride": 4, "resolution": (24, 32), "classes": 5,
    }  # fmt: skip
    model = TNT(**(sizes | changed))
    model.init_weights()
    return lived_in(model)


# ---- the equations, literally ----------------------------------------------------------------


def norm(layer, x: torch.Tensor) -> torch.Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt() * layer.weight + layer.bias


def attend(layer, x: torch.Tensor, scale: float | None) -> torch.Tensor:
    """x: (tokens, dim)."""
    q, k, v = F.linear(x, layer.qkv.weight, layer.qkv.bias).chunk(3, dim=-1)
    width = x.shape[-1] // layer.heads
    heads = [
        (qh @ kh.T * (scale or width**-0.5)).softmax(-1) @ vh
        for qh, kh, vh in zip(q.split(width, -1), k.split(width, -1), v.split(width, -1))
    ]
    return layer.proj(torch.cat(heads, -1))


def transform(layer, x: torch.Tensor, scale: float | None) -> torch.Tensor:
    x = x + attend(layer.attention, norm(layer.norm1, x), scale)
    t = layer.mlp.fc2(F.gelu(layer.mlp.fc1(norm(layer.norm2, x))))
    if layer.squeeze is not None:
        squeezed = norm(layer.squeeze.norm, t.mean(0))
        gate = layer.squeeze.fc2(layer.squeeze.fc1(squeezed).clamp_min(0)).tanh()
        t = t + t * gate
    return x + t


def tell(layer, words: torch.Tensor) -> torch.Tensor:
    return norm(layer.norm2, layer.proj(norm(layer.norm1, words.reshape(-1))))


def literal(model: TNT, image: torch.Tensor) -> torch.Tensor:
    """One image, sentence by sentence."""
    p, conv = model.patch, model.words.conv
    rows, columns = image.shape[1] // p, image.shape[2] // p
    sentences = []
    for r in range(rows):
        for c in range(columns):
            cut = image[None, :, r * p : (r + 1) * p, c * p : (c + 1) * p]
            seen = F.conv2d(cut, conv.weight, conv.bias, model.stride, conv.padding)
            sentences.append(seen[0].flatten(1).T + model.inner_position[0])
    z = torch.stack([model.class_token[0, 0], *(tell(model.tell, y) for y in sentences)])
    table = model.outer_position
    if (rows, columns) != model.grid:
        grid = resample_grid(table[:, 1:].unflatten(1, model.grid), (rows, columns))
        table = torch.cat([table[:, :1], grid.flatten(1, 2)], 1)
    z = z + table[0]
    for block in model.blocks:
        sentences = [transform(block.inner, y, model.scale) for y in sentences]
        told = torch.stack([tell(block.tell, y) for y in sentences])
        z = transform(block.outer, torch.cat([z[:1], z[1:] + told]), model.scale)
    return model.head(norm(model.norm, z[0]))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (24, 32)),
        ({"squeeze": True, "qkv_bias": True, "mlp_ratio": 2.5}, (24, 32)),
        ({"overlap": False, "scale": 0.7}, (24, 32)),
        ({"stride": 3}, (24, 32)),  # 3 words a side of 8 pixels
        ({}, (29, 47)),  # the remainder is not seen, positions are resampled
    ],
)
def test_the_equations(options, size):
    model = small(**options)
    images = torch.randn(2, 3, *size)
    wanted = torch.stack([literal(model, image) for image in images])
    torch.testing.assert_close(model(images), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(images), wanted, rtol=1e-4, atol=1e-5)


# ---- what follows from them ------------------------------------------------------------------


def test_a_sentence_does_not_see_its_neighbours_pixels():
    """Although its words overlap: beyond the border of the patch there are zeros."""
    words = small().words
    image = torch.randn(1, 3, 24, 32)
    other = image.clone()
    other[:, :, :8, 8:16] = torch.randn(3, 8, 8)
    changed = (words(image) != words(other)).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [1]


def test_without_positions_the_sentences_are_a_set():
    model = small()
    with torch.no_grad():
        model.outer_position[:, 1:] = 0
    patches = torch.randn(1, 3, 3, 8, 4, 8)
    order = torch.randperm(12)
    cells = patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]
    shuffled = cells.unflatten(1, (3, 4)).permute(0, 3, 1, 4, 2, 5)
    one, other = (x.flatten(4).flatten(2, 3) for x in (patches, shuffled))
    torch.testing.assert_close(model(one), model(other), rtol=1e-4, atol=1e-5)
    # the words are none: their positions are their own
    turned = patches.flip(3).flatten(4).flatten(2, 3)
    assert (model(one) - model(turned)).abs().max() > 1e-3


def test_paths_are_dropped_sentence_by_sentence_inside():
    layer = small(drop_path=0.5).blocks[2].inner
    layer.norm1.bias.data.fill_(1)
    layer.mlp.fc2.weight.data.zero_()
    layer.mlp.fc2.bias.data.zero_()
    words = torch.zeros(64, 4, 8)
    branch = layer.eval()(words)[0]
    out = layer.train()(words)
    kept = [torch.equal(sentence, 2 * branch) for sentence in out]
    assert 10 < sum(kept) < 54
    assert not out[[not k for k in kept]].any()


def test_dropped_paths_grow_with_depth():
    with torch.device("meta"):
        model = create("tnt-s")
    rates = [block.outer.drop_path.rate for block in model.blocks]
    assert rates == pytest.approx([0.1 * k / 11 for k in range(12)])
    assert [block.inner.drop_path.rate for block in model.blocks] == rates


def test_the_class_token_hears_no_words():
    model = small(depth=1)
    block = model.blocks[0]
    tokens, heard = torch.randn(2, 13, 24), []
    block.outer.register_forward_hook(lambda module, inputs, output: heard.append(inputs[0]))
    block(torch.randn(24, 4, 8), tokens)
    assert torch.equal(heard[0][:, 0], tokens[:, 0])
    assert not torch.equal(heard[0][:, 1:], tokens[:, 1:])


def test_an_image_of_the_native_size_reads_the_table_as_it_is():
    model = small()
    assert model.positions((3, 4)) is model.outer_position
    assert model.positions((5, 2)).shape == (1, 11, 24)
    with torch.no_grad():
        model.outer_position[:, 1:] = torch.arange(24.0)  # the same everywhere
    torch.testing.assert_close(model.positions((5, 2))[0, 1:], torch.arange(24.0).expand(10, -1))


# ---- variants and options --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions", "billions"), [("tnt-ti", 6.1, 1.4), ("tnt-s", 23.8, 5.2),
                                       ("tnt-b", 65.6, 14.1)],
)  # fmt: skip
def test_published_sizes(name, millions, billions):
    """Table 1, to its precision; its FLOPs are multiplications with an addition."""

    class Maps(nn.Module):
        def forward(self, image):
            return model.features(image)

    with torch.device("meta"):
        model = create(name).eval()
        image = torch.empty(1, 3, 224, 224)
        operations = count_flops(Maps(), image)
        # For the class alone most of the last block's outer layer is left out.
        assert 0.92 < count_flops(model, image) / operations < 0.95
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert operations / 2e9 == pytest.approx(billions, abs=0.06)


@pytest.mark.parametrize("options", ["dropout=0.5", "attention_dropout=0.5", "drop_path=0.5"])
def test_noise_acts_in_training_only(options):
    model = create(f"tnt-nano({options})", classes=3, resolution=16, seed=0).train()
    image = torch.randn(2, 3, 16, 16)
    plain = create("tnt-nano", classes=3, resolution=16, seed=0).eval()(image)
    assert not torch.equal(model(image), model(image))
    torch.testing.assert_close(model.eval()(image), plain)


def test_options():
    model = create("tnt-nano(dim=48,heads=2,inner_dim=6,depth=2,stride=4,channels=1)",
                   classes=3, resolution=48)  # fmt: skip
    assert (model.grid, model.words.side, model.preprocessing.resolution) == ((6, 6), 2, 48)
    assert [m.map.shape[1:] for m in model.features(torch.randn(1, 1, 20, 48))] == [(48, 2, 6)] * 2
    assert create("tnt-nano(squeeze=True,overlap=False)").words.conv.kernel_size == (2, 2)
    with pytest.raises(PolypatchError, match="heads don't divide a width of 96"):
        create("tnt-nano(heads=5)")
    with pytest.raises(PolypatchError, match="depth counts from 1"):
        create("tnt-nano(depth=0)")
    with pytest.raises(PolypatchError, match="4×4 does not hold a patch of 8"):
        create("tnt-nano", resolution=4)
    with pytest.raises(PolypatchError, match="3 pixels don't divide a patch of 8"):
        create("tnt-nano(stride=3,overlap=False)")


# ---- authors' weights ------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    width=st.integers(1, 8), heads=st.integers(1, 3), inner_heads=st.integers(1, 3),
    depth=st.integers(1, 3), stride=st.integers(1, 5), mlp_ratio=st.sampled_from([1, 2.7, 3.3, 4]),
    qkv_bias=st.booleans(), squeeze=st.booleans(), classes=st.integers(0, 4),
    channels=st.integers(1, 4), resolution=st.tuples(st.integers(8, 30), st.integers(8, 30)),
    scale=st.sampled_from([None, 0.3]), overlap=st.booleans(),
)  # fmt: skip
def test_configurations_come_back_from_the_weights(width, heads, inner_heads, overlap, **drawn):
    # without overlap the words must divide the patch
    overlap = overlap or drawn["stride"] not in (1, 2, 4)
    model = TNT(dim=4 * width * heads, inner_dim=2 * width * inner_heads, heads=heads,
                inner_heads=inner_heads, patch=8, overlap=overlap, **drawn)  # fmt: skip
    model = lived_in(model)
    state = tnt.to_official(model)
    found = tnt.recognise({k: tuple(v.shape) for k, v in state.items()})
    config = tnt.official_config(model)
    assumed = {name: config[name] for name in tnt.ASSUMED}
    noise = dict.fromkeys(("drop_rate", "attn_drop_rate", "drop_path_rate"), 0.0)
    assert found | assumed | noise == config
    again = tnt.from_official(config, state)
    image = torch.randn(1, drawn["channels"], 16, 25)
    torch.testing.assert_close(again(image), model(image))


def test_published_files_are_known():
    for name in ("tnt-s", "tnt-b", "tnt-ti"):
        with torch.device("meta"):
            model = create(f"{name}(drop_path=0)")
        state = tnt.to_official(model)
        assert state["blocks.3.outer_attn.qk.weight"].shape == (2 * model.dim, model.dim)
        shapes = {k: tuple(v.shape) for k, v in state.items()}
        found = tnt.recognise(shapes)
        assert found | {"drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": 0.0} == (
            tnt.official_config(model)
        )
        headless = {k: v for k, v in shapes.items() if not k.startswith("head.")}
        assert tnt.recognise(headless) == found | {"num_classes": 0}
    assert tnt.recognise({"inner_pos": (1, 16, 24)}) is None


def test_queries_and_values_that_are_apart_in_the_file_come_together():
    model = small(qkv_bias=True)
    state = tnt.to_official(model)
    with pytest.raises(PolypatchError, match="lacks its companions"):
        tnt.from_official(
            tnt.official_config(model),
            {k: v for k, v in state.items() if k != "blocks.1.inner_attn.v.weight"},
        )
    qkv = model.blocks[1].inner.attention.qkv
    assert torch.equal(state["blocks.1.inner_attn.qk.weight"], qkv.weight[:16])
    assert torch.equal(state["blocks.1.inner_attn.v.bias"], qkv.bias[16:])


def test_the_authors_arguments():
    base = {"outer_dim": 12, "inner_dim": 4, "depth": 1, "outer_num_heads": 2, "img_size": (32, 48)}
    model = tnt.network(base | {"se": 1, "patch_size": (16, 16), "num_classes": 0})
    assert model.grid == (2, 3)
    assert model.blocks[0].outer.squeeze is not None
    with pytest.raises(PolypatchError, match=r"no argument 'outer_dims'; did you mean outer_dim\?"):
        tnt.network({"outer_dims": 3})
    with pytest.raises(PolypatchError, match="square patches, not 16×8"):
        tnt.network(base | {"patch_size": (16, 8)})
    with pytest.raises(PolypatchError, match="norm_layer"):
        tnt.network(base | {"norm_layer": "batch"})
