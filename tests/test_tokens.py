"""The invariants of Tokens: supports cover, pack and select invert, merging adds up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from polypatch.tokens import Pieces, Tokens, length_buckets, raster_geometry


def grid(rows=3, columns=4, *, batch=2, dim=5, cell=4, prefix=0) -> Tokens:
    features = torch.randn(batch, dim, rows, columns)
    tokens = Tokens.from_grid(features, canvas=(rows * cell, columns * cell))
    if prefix:
        tokens = tokens.with_prefix(torch.randn(1, prefix, dim))
    return tokens.check()


def ragged(lengths=(3, 5, 1), *, dim=4) -> Tokens:
    most = max(lengths)
    centre = torch.rand(len(lengths), most, 2) * 16
    mask = torch.arange(most) < torch.tensor(lengths)[:, None]
    return Tokens(
        torch.randn(len(lengths), most, dim), centre, torch.ones_like(centre), (16, 16), mask=mask
    ).check()


def test_raster_covers_the_canvas_once():
    tokens = grid(3, 4)
    labels = tokens.label_map()
    assert labels.shape == (2, 12, 16)
    expected = torch.arange(12).view(3, 4).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert (labels == expected).all()


@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 40), st.integers(1, 40), st.integers(0, 3)
)
@settings(max_examples=40, deadline=None)
def test_every_pixel_has_a_token_at_any_size(rows, columns, height, width, prefix):
    centre, extent = raster_geometry((rows, columns), (height, width))
    tokens = Tokens(
        torch.randn(1, rows * columns, 3), centre[None], extent[None], (height, width)
    ).with_prefix(torch.zeros(1, prefix, 3))
    labels = tokens.label_map()
    assert int(labels.min()) >= 0
    assert int(labels.max()) < rows * columns
    # A cell that is at least a pixel each way shows.
    if height >= rows and width >= columns:
        assert labels.unique().numel() == rows * columns


def test_scatter_inverts_from_grid():
    features = torch.randn(2, 5, 3, 4)
    tokens = Tokens.from_grid(features, canvas=(12, 16))
    assert torch.equal(tokens.scatter_to_grid((3, 4)), features)
    dense = tokens.scatter_to_grid()
    assert torch.equal(dense[:, :, ::4, ::4], features)
    kept = tokens.keep(torch.arange(12).expand(2, -1))  # a raster no more, the same tokens
    assert torch.equal(kept.scatter_to_grid(), dense)


def test_smaller_supports_are_drawn_on_top():
    centre = torch.tensor([[[8.0, 8.0], [8.0, 8.0]]])
    extent = torch.tensor([[[4.0, 4.0], [16.0, 16.0]]])
    labels = Tokens(torch.zeros(1, 2, 1), centre, extent, (16, 16)).label_map()
    assert int((labels == 0).sum()) == 16
    assert int((labels == 1).sum()) == 240


def test_uncovered_pixels_read_zero():
    tokens = Tokens(
        torch.ones(1, 1, 1), torch.tensor([[[2.0, 2.0]]]), torch.tensor([[[4.0, 4.0]]]), (8, 8)
    )
    dense = tokens.scatter_to_grid()
    assert dense[0, 0, :4, :4].eq(1).all()
    assert dense.sum() == 16


def test_prefix_moves_no_index():
    tokens = grid()
    with_class = tokens.with_prefix(torch.zeros(1, 2, 5))
    assert torch.equal(with_class.label_map(), tokens.label_map())
    assert torch.equal(with_class.scatter_to_grid(), tokens.scatter_to_grid())
    kept = with_class.keep(torch.tensor([[3, 1], [0, 2]]))
    assert kept.x.shape[1] == 4
    assert torch.equal(kept.placed[0, 0], tokens.x[0, 3])


def test_keep_selects_features_and_places():
    tokens = grid(prefix=1)
    index = torch.tensor([[5, 0, 7], [2, 3, 11]])
    kept = tokens.keep(index).check()
    assert kept.grid is None
    assert torch.equal(kept.x[:, 0], tokens.x[:, 0])
    for sample in range(2):
        assert torch.equal(kept.placed[sample], tokens.placed[sample, index[sample]])
        assert torch.equal(kept.centre[sample, 1:], tokens.centre[0, 1:][index[sample]])
    labels = kept.label_map()
    assert set(labels.unique().tolist()) == {-1, 0, 1, 2}


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_merging_averages_and_remembers(prefix):
    tokens = grid(2, 4, prefix=prefix)
    groups = torch.tensor([[0, 0, 1, 1, 2, 2, 2, 3], [3, 2, 1, 0, 0, 1, 2, 3]])
    merged = tokens.merge(groups, 4).check()
    assert merged.prefix == prefix
    assert torch.equal(merged.x[:, :prefix], tokens.x[:, :prefix])
    for sample in range(2):
        for group in range(4):
            members = tokens.placed[sample][groups[sample] == group]
            assert torch.allclose(merged.placed[sample, group], members.mean(0), atol=1e-6)
            assert merged.weight[sample, prefix + group] == len(members)
    # Every pixel still belongs to the token that its first token went into.
    before = tokens.label_map()
    after = merged.label_map()
    expected = groups.gather(1, before.flatten(1)).view_as(before)
    assert torch.equal(after, expected)


def test_merging_twice_weights_by_size():
    tokens = grid(1, 4, batch=1)
    once = tokens.merge(torch.tensor([[0, 0, 0, 1]]), 2)
    twice = once.merge(torch.tensor([[0, 0]]), 1)
    assert torch.allclose(twice.x[0, 0], tokens.x[0].mean(0), atol=1e-6)
    assert twice.weight.item() == 4
    assert twice.extent[0, 0].tolist() == [4.0, 16.0]
    assert twice.label_map().eq(0).all()


def test_padding_contributes_nothing_to_a_merge():
    tokens = ragged((2, 4))
    groups = torch.zeros(2, 4, dtype=torch.long)
    merged = tokens.merge(groups, 1)
    assert torch.allclose(merged.x[0, 0], tokens.x[0, :2].mean(0), atol=1e-6)
    assert merged.weight[:, 0].tolist() == [2.0, 4.0]
    assert torch.isfinite(merged.extent).all()


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_pack_and_unpack_are_inverse(lengths):
    tokens = ragged(tuple(lengths))
    packed = tokens.pack()
    assert packed.x.shape[0] == sum(lengths)
    assert packed.offsets.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    back = packed.unpack()
    assert torch.equal(back.x, tokens.x * tokens.mask[..., None])
    assert torch.equal(back.pack().x, packed.x)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_select_and_join_are_inverse(lengths, prefix):
    tokens = ragged(tuple(lengths)).with_prefix(torch.randn(1, prefix, 4))
    groups = length_buckets(tokens.counts)
    assert torch.cat(groups).sort().values.tolist() == list(range(len(lengths)))
    joined = Tokens.join([tokens.select(rows) for rows in groups], order=torch.cat(groups))
    assert torch.equal(joined.counts, tokens.counts)
    assert torch.equal(joined.pack().x, tokens.pack().x)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=64))
@settings(max_examples=60, deadline=None)
def test_buckets_waste_less_than_a_tenth(lengths):
    counts = torch.tensor(lengths)
    groups = length_buckets(counts, waste=0.1, most=64)
    slots = sum(len(rows) * int(counts[rows].max()) for rows in groups)
    assert 1 - counts.sum().item() / slots <= 0.1


def test_few_buckets_suffice_for_a_real_batch():
    counts = torch.randint(16, 65, (64,))
    groups = length_buckets(counts)
    slots = sum(len(rows) * int(counts[rows].max()) for rows in groups)
    assert len(groups) <= 8
    assert 1 - counts.sum().item() / slots < 0.1


def test_pieces_belong_to_their_owner():
    pieces = Pieces(
        centre=torch.tensor([[[2.0, 6.0], [6.0, 2.0], [2.0, 2.0], [6.0, 6.0]]]),
        extent=torch.full((1, 4, 2), 4.0),
        owner=torch.tensor([[0, 0, 1, -1]]),
    )
    tokens = Tokens(
        torch.randn(1, 2, 3), torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), (8, 8), regions=pieces
    )
    labels = tokens.label_map()[0]
    assert labels[0, 5] == 0
    assert labels[5, 0] == 0
    assert labels[0, 0] == 1
    assert labels[5, 5] == -1


def test_key_bias_hides_padding_and_counts_sizes():
    tokens = ragged((1, 2))
    assert tokens.key_bias()[0, 0, 0].tolist() == [0.0, float("-inf")]
    merged = grid(1, 4, batch=1).merge(torch.tensor([[0, 0, 0, 1]]), 2)
    assert torch.allclose(merged.key_bias()[0, 0, 0].exp(), torch.tensor([3.0, 1.0]))
    assert merged.key_bias(proportional=False) is None


def test_drawing_shows_borders_and_mean_colours():
    tokens = grid(2, 2, batch=1, cell=4)
    image = torch.rand(1, 3, 8, 8)
    drawn = tokens.draw(image, fill=1.0, scale=4)
    assert drawn.shape == (1, 3, 32, 32)
    assert drawn[0, :, 16].eq(1).all()  # the border between the rows
    assert drawn[0, :, 2:14, 2:14].flatten(1).std(1).max() < 1e-6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(centre=torch.zeros(1, 11, 2)), "centre has shape"),
        (dict(mask=torch.ones(2, 3, dtype=torch.bool)), "mask has shape"),
        (dict(grid=(5, 5)), "a grid of"),
    ],
)
def test_contradictions_are_named(change, said):
    try:
        replace(grid(), **change).check()
    except TypeCheckError:  # where signatures are checked, the constructor refuses already
        return
    except ValueError as error:
        assert said in str(error)  # noqa: PT017
    else:
        pytest.fail("nothing was refused")


def test_join_takes_boxes_and_pieces_together():
    boxes = grid(1, 4, batch=1)
    merged = grid(1, 4, batch=1).merge(torch.tensor([[0, 0, 1, 1]]), 2)
    joined = Tokens.join([merged, boxes])
    assert torch.equal(joined.label_map()[0], merged.label_map()[0])
    assert torch.equal(joined.label_map()[1], boxes.label_map()[0])
