"""The host: shapes at odd sizes, invariances, ragged batches, gradients, compile, bf16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polypatch.errors import PolypatchError
from polypatch.hosts import Reducer, build_vit
from polypatch.hosts.vit import SIZES
from polypatch.spec import create
from polypatch.tokens import Tokens

COUNTS = {
    "tiny": 5_717_416,
    "small": 22_050_664,
    "base": 86_567_656,
    "large": 304_326_632,
    "huge": 632_045_800,
    "giant": 1_012_611_432,
}


@pytest.mark.parametrize("size", SIZES)
def test_named_sizes_have_the_published_parameter_counts(size):
    with torch.device("meta"):
        model = build_vit(size)
    count = sum(p.numel() for p in model.parameters())
    assert count == COUNTS.get(size, count)
    if size == "so400m":  # published with attention pooling and without classifier
        with torch.device("meta"):
            model = build_vit(size, pooling="attention", classes=0)
        assert sum(p.numel() for p in model.parameters()) == 427_680_704


@pytest.mark.parametrize("position", ["learned", "sincos", "rope", "none"])
@pytest.mark.parametrize("pooling", ["class", "mean", "attention", "class+mean"])
def test_any_size_and_aspect(position, pooling):
    model = build_vit("nano", classes=7, position=position, pooling=pooling, registers=2).eval()
    for shape in [(1, 3, 32, 32), (2, 3, 20, 44), (1, 3, 33, 31), (1, 3, 4, 4)]:
        assert model(torch.randn(shape)).shape == (shape[0], 7)


def test_too_small_an_input_is_named():
    with pytest.raises(PolypatchError, match="smaller than one patch of 4×4"):
        build_vit("nano")(torch.zeros(1, 3, 3, 32))


def test_positions_follow_centres_not_order():
    """Permuting the tokens that enter the first block permutes those that leave the last."""
    for position in ("learned", "sincos", "rope"):
        model = build_vit("nano", classes=0, position=position).eval()
        tokens = model.tokens(torch.randn(2, 3, 32, 32))
        order = torch.randperm(64)
        shuffled = tokens.keep(order.expand(2, -1))
        plain, moved = model.encode(tokens), model.encode(shuffled)
        assert torch.allclose(plain.placed[:, order], moved.placed, atol=1e-5)
        assert torch.allclose(plain.x[:, 0], moved.x[:, 0], atol=1e-5)


def test_learned_positions_read_at_centres_are_the_table():
    model = build_vit("nano", classes=0)
    tokens = model.patching(torch.randn(1, 3, 32, 32))
    by_grid = model.position(tokens).x
    by_centre = model.position(tokens.keep(torch.arange(64)[None])).x
    assert torch.allclose(by_grid, by_centre, atol=1e-6)


def test_rotary_logits_depend_on_relative_places_only():
    model = build_vit("nano", position="rope", pooling="mean", classes=0).eval()
    tokens = model.tokens(torch.randn(1, 3, 32, 32))
    from dataclasses import replace

    moved = replace(tokens, centre=tokens.centre + torch.tensor([12.0, -7.0]))
    assert torch.allclose(model.encode(tokens).x, model.encode(moved).x, atol=1e-4)


def test_without_positions_and_with_mean_pooling_it_is_a_function_of_a_set():
    model = build_vit("nano", position="none", pooling="mean", classes=5).eval()
    image = torch.randn(1, 3, 32, 32)
    cells = image.unfold(2, 4, 4).unfold(3, 4, 4).reshape(1, 3, 64, 4, 4)
    shuffled = cells[:, :, torch.randperm(64)].view(1, 3, 8, 8, 4, 4)
    shuffled = shuffled.permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 32, 32)
    assert torch.allclose(model(image), model(shuffled), atol=1e-5)


def padded(tokens: Tokens, lengths: list[int]) -> Tokens:
    """The first ``lengths[i]`` placed tokens of each sample, the rest marked as padding."""
    most = max(lengths)
    index = torch.arange(most).expand(len(lengths), -1)
    return tokens.keep(index, mask=index < torch.tensor(lengths)[:, None])


def test_padding_changes_nothing():
    model = build_vit("nano", classes=5, pooling="attention", position="sincos").eval()
    lengths = [5, 64, 17, 40, 41]
    tokens = model.tokens(torch.randn(5, 3, 32, 32))
    together = model.encode(padded(tokens, lengths))
    assert together.counts.tolist() == lengths
    pooled = model.pooling(together)
    for i, length in enumerate(lengths):
        alone = padded(tokens.select(torch.tensor([i])), [length]).trim()
        single = model.encode(alone)
        assert torch.allclose(together.x[i, :length], single.x[0], atol=1e-5)
        assert torch.allclose(pooled[i], model.pooling(single)[0], atol=1e-5)


def test_a_mean_ignores_padding_however_wild():
    model = build_vit("nano", classes=0, pooling="mean").eval()
    tokens = padded(model.tokens(torch.randn(2, 3, 32, 32)), [3, 9])
    wild = tokens.with_x(tokens.x.masked_fill(~tokens.mask[..., None], 1e4))
    assert torch.allclose(model.pooling(tokens), model.pooling(wild), atol=1e-6)


class DropLast(Reducer):
    def __init__(self, count, where):
        super().__init__()
        self.count, self.where = count, where

    def forward(self, tokens, mixed):
        left = tokens.placed.shape[1] - self.count
        return tokens.keep(torch.arange(left).expand(tokens.batch, -1))


@pytest.mark.parametrize("where", ["middle", "end"])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_reducers_shorten_the_rest_of_the_way(where, position):
    model = build_vit("nano", classes=3, position=position).eval()
    for block in model.blocks:
        block.reducing = DropLast(10, where)
    out = model.forward_features(torch.randn(2, 3, 32, 32))
    assert out.placed.shape[1] == 24
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    maps = model.features(torch.randn(2, 3, 32, 32))
    assert maps[-1].map.shape == (2, 64, 8, 8)
    assert maps[-1].map[:, :, -1].eq(0).all()  # nobody covers the dropped cells


def test_features_are_maps_with_strides():
    model = build_vit("nano", classes=3)
    maps = model.features(torch.randn(2, 3, 24, 40))
    assert [m.stride for m in maps] == [4] * 4
    assert all(m.map.shape == (2, 64, 6, 10) for m in maps)
    last = model.forward_features(torch.ones(1, 3, 32, 32))
    assert torch.allclose(
        model.features(torch.ones(1, 3, 32, 32))[-1].map.flatten(2).transpose(1, 2),
        last.placed,
        atol=1e-5,
    )
    with pytest.raises(PolypatchError, match="from 1 to 4"):
        model.features(torch.zeros(1, 3, 32, 32), stages=(5,))


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(pooling="mean", position="sincos"),
        dict(pooling="attention", registers=3, layer_scale=1e-2),
        dict(pooling="class+mean", position="rope", qk_norm=True, gated=True),
    ],
    ids=str,
)
def test_gradients_reach_every_parameter(options):
    model = build_vit("nano", classes=5, **options)
    torch.nn.functional.cross_entropy(
        model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3])
    ).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_checkpointed_blocks_give_the_same_gradients():
    model = build_vit("nano", classes=5).train()
    image = torch.randn(2, 3, 32, 32)
    model(image).sum().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.checkpointed(True)(image).sum().backward()
    for name, value in model.named_parameters():
        assert torch.allclose(value.grad, plain[name], atol=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_compiles_without_a_graph_break(position):
    model = build_vit("nano", classes=5, position=position).eval()
    image = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True)
    assert torch.allclose(compiled(image), model(image), atol=1e-5)


def test_exports():
    model = build_vit("nano", classes=5).eval()
    image = torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (image,))
    assert torch.allclose(program.module()(image), model(image), atol=1e-5)


def test_bf16():
    model = build_vit("nano", classes=5, position="rope", pooling="attention").eval()
    image = torch.randn(2, 3, 32, 32)
    exact = model(image)
    half = model.bfloat16()(image.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), exact, atol=0.05)


def test_drop_path_only_in_training():
    model = build_vit("nano", classes=5, drop_path=0.5)
    image = torch.randn(8, 3, 32, 32)
    model.eval()
    assert torch.equal(model(image), model(image))
    model.train()
    assert not torch.equal(model(image), model(image))
    assert model.blocks[0].drop_path.rate == 0


def test_reset_head():
    model = build_vit("nano", classes=5)
    model.reset_head(11)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 11)
    model.reset_head(0)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 64)


def test_weight_decay_spares_tokens_positions_norms_and_biases():
    model = build_vit("nano", pooling="attention", registers=2)
    spared = model.no_decay()
    assert {"position.table", "prefix.tokens", "pooling.query"} <= spared
    assert "blocks.0.norm1.weight" in spared
    assert "blocks.0.mixing.qkv.weight" not in spared
    assert "patching.proj.weight" not in spared


def test_attention_weights_are_those_of_the_fused_kernel():
    model = build_vit("nano", classes=0).eval()
    attention: nn.Module = model.blocks[0].mixing
    x = torch.randn(2, 9, 64)
    weights = attention.weights(x)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 9), atol=1e-5)
    _, _, value = attention.project(x)
    mixed = attention.proj((weights @ value).transpose(1, 2).flatten(2))
    assert torch.allclose(mixed, attention(x).x, atol=1e-5)


def test_resolution_only_sets_the_position_grid():
    model = create("vit-nano(patch=4)", classes=3, resolution=64)
    assert model.position.table.shape == (1, 16, 16, 64)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
