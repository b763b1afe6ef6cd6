"""BOAT: clusters, attention within them and within windows against literal versions; both forms."""

from __future__ import annotations

from math import log2

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from polypatch import create
from polypatch.backbones import boat, boat_swin
from polypatch.backbones.boat_attention import (
    Bilateral,
    FeatureAttention,
    balanced_clusters,
    levels_of,
)
from polypatch.backbones.boat_swin import BoatSwin, PatchMerging, WindowAttention
from polypatch.errors import PolypatchError
from polypatch.training.cost import count_flops

SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "num_classes": 5,
    "embed_dim": 12,
    "depths": [2, 3],
    "num_heads": [2, 4],
    "window_size": 4,
    "cluster": 16,
    "overlap": 6,
}
CSWIN = {
    "img_size": 64,
    "num_classes": 5,
    "embed_dim": 8,
    "depth": [1, 2, 3, 1],
    "split_size": [1, 2, 2, 2],
    "num_heads": [2, 2, 4, 4],
    "cluster": 16,
    "overlap": 6,
    "pair_across_batch": False,
}


def randomised(model: nn.Module, *, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            std = value[0].numel() ** -0.5 if value.ndim > 1 else 0.3
            value.copy_(std * torch.randn(value.shape, generator=generator))
    return model.eval()


# ---- clusters ------------------------------------------------------------------------------------


def literal_clusters(q: Tensor, tokens: list[int], levels: int, places: int = 0) -> list[list[int]]:
    """Of one head: lists of token numbers, cut in two again and again. ``places``: how many tokens
    there would be if all clusters were as large as the largest; their halves make the first means.
    """
    if levels == 0:
        return [tokens]
    places = places or -(-len(tokens) // 2**levels) * 2**levels
    x = q[tokens].double()
    half = -(-len(tokens) // 2)
    unit = F.normalize(x, dim=1)
    first = places // 2
    centres = [F.normalize(part.sum(0), dim=0) for part in (x[:first], x[first:])]
    for _ in range(2):
        scores = torch.stack([unit @ c for c in centres], 1)
        soft = (100 * scores).softmax(1)
        centres = [F.normalize((soft[:, k : k + 1] * x).sum(0), dim=0) for k in (0, 1)]
    ratio = (unit @ centres[0] + 1) / (unit @ centres[1] + 1)
    ordered = [tokens[k] for k in ratio.argsort()]
    return [
        *literal_clusters(q, ordered[:half], levels - 1, first),
        *literal_clusters(q, ordered[half:], levels - 1, first),
    ]


def as_lists(order: Tensor, tokens: int) -> list[list[int]]:
    return [[n for n in cluster if n < tokens] for cluster in order.tolist()]


@pytest.mark.parametrize(("tokens", "levels"), [(32, 0), (32, 3), (28, 1), (31, 2), (37, 3)])
def test_clusters_are_the_papers(tokens: int, levels: int) -> None:
    x = torch.randn(3, tokens, 5)
    order = balanced_clusters(x, levels)
    for one, clusters in zip(x, order):
        expected = literal_clusters(one, list(range(tokens)), levels)
        assert as_lists(clusters, tokens) == expected


@given(tokens=st.integers(1, 90), cluster=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_clusters_are_balanced(tokens: int, cluster: int, seed: int) -> None:
    """Every token is in one cluster; sizes differ by one at most and reach ``cluster``."""
    levels = levels_of(tokens, cluster)
    x = torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(seed))
    order = balanced_clusters(x, levels)
    assert order.shape[1] == 2**levels
    for clusters in order:
        found = as_lists(clusters, tokens)
        assert sorted(n for c in found for n in c) == list(range(tokens))
        sizes = {len(c) for c in found}
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= min(cluster, tokens)
        assert max(sizes) < 2 * cluster + 1 or levels == 0


@pytest.mark.parametrize("tokens", [1, 48, 49, 97, 98, 196, 784, 3136])
def test_levels_are_the_authors(tokens: int) -> None:
    assert levels_of(tokens, 49) == (int(log2(tokens // 49)) if tokens >= 49 else 0)


def test_equal_tokens_are_still_cut_in_half() -> None:
    order = balanced_clusters(torch.ones(1, 16, 4), 2)
    assert order.shape == (1, 4, 4)
    assert sorted(order.flatten().tolist()) == list(range(16))


def test_clusters_find_what_windows_miss() -> None:
    """Four kinds of tokens, interleaved over the map as a checkerboard of 2 × 2: each cluster has
    one kind, each window of the map all four."""
    directions = torch.eye(4, 8) * 3
    row, column = torch.arange(8)[:, None] % 2, torch.arange(8) % 2
    kind = (2 * row + column).flatten()
    x = directions[kind] + 0.05 * torch.randn(64, 8)
    order = balanced_clusters(x[None], 2)
    for cluster in order[0]:
        assert kind[cluster].unique().numel() == 1


# ---- attention within clusters -------------------------------------------------------------------


def literal_attention(model: FeatureAttention, x: Tensor) -> Tensor:
    """FSLA of one map (height, width, dim), head by head, cluster by cluster."""
    height, width, dim = x.shape
    tokens, heads = height * width, model.heads
    q, k, v = F.linear(x.view(tokens, dim), model.qkv.weight, model.qkv.bias).split(dim, 1)
    out = torch.zeros(tokens, dim)
    for head in range(heads):
        of = slice(head * dim // heads, (head + 1) * dim // heads)
        levels = levels_of(tokens, model.cluster)
        clusters = literal_clusters(q[:, of], list(range(tokens)), levels)
        for number, own in enumerate(clusters):
            keys = list(own)
            if levels:
                sibling = clusters[number ^ 1]
                keys += sibling[: model.overlap] if number % 2 == 0 else sibling[-model.overlap :]
            scale = model.scale or (dim // heads) ** -0.5
            weights = (q[own][:, of] @ k[keys][:, of].T * scale).softmax(1)
            out[own, of] = weights @ v[keys][:, of]
    places = F.conv2d(
        v.T.view(1, dim, height, width), model.lepe.weight, model.lepe.bias, padding=1, groups=dim
    )
    out = out.view(height, width, dim) + places[0].permute(1, 2, 0)
    return F.linear(out, model.proj.weight, model.proj.bias)


@pytest.mark.parametrize(
    ("size", "cluster", "scale"),
    [
        ((8, 8), 16, None),
        ((8, 8), 16, 1.0),
        ((4, 8), 4, None),
        ((3, 5), 16, None),  # one cluster
        ((1, 1), 16, None),
    ],
)
def test_attention_is_the_papers(size: tuple[int, int], cluster: int, scale: float | None) -> None:
    model = FeatureAttention(dim=12, heads=3, cluster=cluster, overlap=3, scale=scale)
    randomised(model)
    x = torch.randn(2, *size, 12)
    with torch.no_grad():
        expected = torch.stack([literal_attention(model, one) for one in x])
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_clusters_of_unequal_size_borrow_from_a_filled_one() -> None:
    """43 tokens in 4 clusters of 11, 11, 11 and 10: the empty place is never attended to, and the
    last cluster's sibling still has all of its own keys."""
    model = randomised(FeatureAttention(dim=8, heads=2, cluster=10, overlap=3))
    x = torch.randn(2, 1, 43, 8)
    with torch.no_grad():
        qkv = model.qkv(x)
        order = model.clusters(qkv)
        assert order.shape == (4, 4, 11)
        assert (order == 43).sum((1, 2)).tolist() == [1] * 4
        found = model.attend(qkv.flatten(1, 2), order).view(2, 43, 2, 4)
        q, k, v = qkv.view(2, 43, 3, 2, 4).permute(2, 0, 3, 1, 4)
        for sample in range(2):
            for head in range(2):
                clusters = order[2 * sample + head].tolist()
                for number, cluster in enumerate(clusters):
                    pair = [*clusters[number & ~1], *clusters[number | 1]]
                    keys = [n for n in (pair[8:] if number % 2 else pair[:14]) if n < 43]
                    own = [n for n in cluster if n < 43]
                    weights = q[sample, head, own] @ k[sample, head, keys].T / 2
                    expected = weights.softmax(1) @ v[sample, head, keys]
                    torch.testing.assert_close(found[sample, own, head], expected)


def test_gradients_pass_with_unequal_clusters() -> None:
    model = randomised(FeatureAttention(dim=8, heads=2, cluster=10, overlap=3))
    x = torch.randn(2, 1, 43, 8, requires_grad=True)
    model(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad.abs().sum(-1) > 0).all()


def test_one_cluster_is_plain_attention() -> None:
    """And LePE, on the whole map."""
    model = randomised(FeatureAttention(dim=8, heads=2, cluster=16))
    x = torch.randn(1, 4, 5, 8)
    with torch.no_grad():
        q, k, v = model.qkv(x).view(1, 20, 3, 2, 4).permute(2, 0, 3, 1, 4)
        plain = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 4, 5, 8)
        places = model.lepe(v.transpose(1, 2).reshape(1, 4, 5, 8).permute(0, 3, 1, 2))
        expected = model.proj(plain + places.permute(0, 2, 3, 1))
        torch.testing.assert_close(model(x), expected)


def test_images_pair_where_that_was_asked_for() -> None:
    """One cluster an image: each of a pair attends to 6 keys of the other, so the batch matters."""
    options = {"dim": 8, "heads": 2, "cluster": 16, "overlap": 6}
    alone = FeatureAttention(**options)
    paired = FeatureAttention(**options, pair_across_batch=True)
    randomised(alone)
    paired.load_state_dict(alone.state_dict())
    x = torch.randn(4, 4, 4, 8)
    with torch.no_grad():
        torch.testing.assert_close(alone(x.flip(0)), alone(x).flip(0))
        both = paired(x)
        assert (paired(x[[0, 3, 2, 1]])[0] - both[0]).abs().max() > 1e-3
        torch.testing.assert_close(paired(x[:2]), both[:2])
        q, k, v = paired.qkv(x).view(4, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
        # image 0 has the first 6 of image 1, image 1 the last 6 of image 0
        for image, mate, of in ((0, 1, slice(0, 6)), (1, 0, slice(10, 16))):
            keys = torch.cat([k[image], k[mate][:, of]], 1)
            values = torch.cat([v[image], v[mate][:, of]], 1)
            expected = (q[image] @ keys.mT / 2).softmax(-1) @ values
            qkv = paired.qkv(x)
            found = paired.attend(qkv.flatten(1, 2), paired.clusters(qkv))
            torch.testing.assert_close(found[image], expected.transpose(0, 1).flatten(1))
        with pytest.raises(PolypatchError, match="even number of images"):
            paired(x[:3])
        larger = torch.randn(3, 8, 8, 8)  # siblings at home
        torch.testing.assert_close(paired(larger), alone(larger))


@pytest.mark.parametrize("side", [8, 16])
def test_operations_grow_with_the_tokens(side: int) -> None:
    """Projections 4 N C², attention 2 N (cluster + overlap) C, and 11 N C a level of clustering."""
    dim, cluster, overlap = 16, 16, 6

    class OfMap(FeatureAttention):
        def forward(self, x: Tensor) -> Tensor:
            values = torch.randn(1, *x.shape[2:], dim)
            return self.proj(
                self.attend((qkv := self.qkv(values)).flatten(1, 2), self.clusters(qkv)).view_as(
                    values
                )
            )

    model = OfMap(dim=dim, heads=2, cluster=cluster, overlap=overlap)
    tokens = side * side
    levels = levels_of(tokens, cluster)
    found = count_flops(model, torch.zeros(1, 3, side, side))
    expected = 4 * dim * dim + 2 * (cluster + overlap) * dim + 11 * dim * levels
    assert found == 2 * tokens * expected


# ---- attention within windows --------------------------------------------------------------------


def literal_windows(model: WindowAttention, x: Tensor) -> Tensor:
    """(Shifted) windows of one map whose sides they divide: each place with those of its window
    that the shift hasn't brought there from the other side."""
    height, width, dim = x.shape
    w, shift, heads = model.window, model.shift, model.heads
    q, k, v = F.linear(x, model.qkv.weight, model.qkv.bias).split(dim, -1)
    out = torch.zeros_like(x)
    rows = [range(max(a, 0), min(a + w, height)) for a in range(shift - w, height, w)]
    columns = [range(max(a, 0), min(a + w, width)) for a in range(shift - w, width, w)]
    for some_rows in rows:
        for some_columns in columns:
            places = [(i, j) for i in some_rows for j in some_columns]
            for i, j in places:
                for head in range(heads):
                    of = slice(head * dim // heads, (head + 1) * dim // heads)
                    logits = torch.stack(
                        [
                            q[i, j, of] @ k[a, b, of] * (dim // heads) ** -0.5
                            + model.table[(i - a + w - 1) * (2 * w - 1) + j - b + w - 1, head]
                            for a, b in places
                        ]
                    )
                    values = torch.stack([v[a, b, of] for a, b in places])
                    out[i, j, of] = logits.softmax(0) @ values
    return F.linear(out, model.proj.weight, model.proj.bias)


@pytest.mark.parametrize(("size", "shift"), [((8, 4), 0), ((8, 12), 2), ((12, 8), 1)])
def test_windows_are_swins(size: tuple[int, int], shift: int) -> None:
    model = WindowAttention(dim=6, heads=2, window=4, shift=shift)
    randomised(model)
    x = torch.randn(2, *size, 6)
    with torch.no_grad():
        expected = torch.stack([literal_windows(model, one) for one in x])
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_map_of_one_window_is_not_shifted() -> None:
    shifted = randomised(WindowAttention(dim=4, heads=1, window=4, shift=2))
    plain = randomised(WindowAttention(dim=4, heads=1, window=4))
    x = torch.randn(1, 4, 8, 4)
    with torch.no_grad():
        assert torch.equal(shifted(x), plain(x))


def test_neighbours_are_joined_column_by_column() -> None:
    merging = PatchMerging(dim=1, out=2)
    merging.norm = nn.Identity()  # type: ignore[assignment]
    merging.reduction = nn.Identity()  # type: ignore[assignment]
    x = torch.arange(12.0).view(1, 3, 4, 1)
    joined = merging(x)
    assert joined.shape == (1, 2, 2, 4)
    assert joined[0, 0, 1].tolist() == [2, 6, 3, 7]
    assert joined[0, 1, 0].tolist() == [8, 0, 9, 0]


# ---- networks ------------------------------------------------------------------------------------

#: counted in the authors' code; and how many blocks have FSLA
PUBLISHED = {
    "boat-swin-tiny": (30_265_186, 5),
    "boat-swin-small": (55_158_898, 11),
    "boat-swin-base": (97_612_960, 11),
    "boat-cswin-tiny": (26_390_952, 14),
    "boat-cswin-small": (40_112_488, 20),
    "boat-cswin-base": (89_628_712, 20),
    "boat-cswin-large": (200_728_648, 20),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_variants_are_the_authors(name: str) -> None:
    with torch.device("meta"):
        model = create(name)
    blocks = sum(isinstance(module, Bilateral) for module in model.modules())
    assert (sum(p.numel() for p in model.parameters()), blocks) == PUBLISHED[name]
    assert set(PUBLISHED) | {"boat-nano"} == set(boat.VARIANTS)


def test_swins_last_stage_has_none() -> None:
    with torch.device("meta"):
        model = boat.assemble(boat.VARIANTS["boat-swin-tiny"])
    assert isinstance(model, BoatSwin)
    assert model.shifted == (True, True, True, False)
    with torch.device("meta"):
        larger = boat.assemble(boat.VARIANTS["boat-swin-tiny"], resolution=448)
    assert isinstance(larger, BoatSwin)
    assert larger.shifted == (True,) * 4


def test_drop_path_is_cswins_alone() -> None:
    with torch.device("meta"):
        cswin = boat.assemble(boat.VARIANTS["boat-cswin-tiny"])
        swin = boat.assemble(boat.VARIANTS["boat-swin-tiny"])
    for model in (cswin, swin):
        for module in model.modules():
            if isinstance(module, Bilateral):
                rate = module.block.drop_path.rate if model is cswin else 0.0
                assert module.drop_path.rate == rate
    assert cswin.stages[3][0].drop_path.rate == pytest.approx(0.2)
    assert swin.stages[3][1].drop_path.rate == pytest.approx(0.2)


@pytest.mark.parametrize("bias", [True, False])
def test_cswins_features_are_not_scaled(bias: bool) -> None:
    """Wherever there are biases."""
    model = boat.network(CSWIN | {"qkv_bias": bias})
    features = [m for m in model.modules() if isinstance(m, FeatureAttention)]
    assert {m.scale for m in features} == {1.0 if bias else None}
    assert {m.scale for m in boat.network(SWIN).modules() if isinstance(m, FeatureAttention)} == {
        None
    }


def test_the_authors_words_alone_pair_images() -> None:
    words = {name: value for name, value in CSWIN.items() if name != "pair_across_batch"}
    model = randomised(boat.network(words))
    with torch.no_grad(), pytest.raises(PolypatchError, match="even number"):
        model(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("size", [(32, 32), (30, 57), (9, 40), (64, 48)], ids=str)
@pytest.mark.parametrize("position", [False, True])
def test_any_size_works_in_swin(size: tuple[int, int], position: bool) -> None:
    model = randomised(boat.network(SWIN | {"ape": position}))
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = model.features(x)
        together = model(x)
        alone = torch.cat([model(one[None]) for one in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    for (value, stride), info in zip(maps, model.feature_info):
        assert (value.shape[1], stride) == (info.dim, info.stride)
        assert value.shape[2:] == tuple(-(-side // stride) for side in size)


def test_dropout_reaches_what_it_should() -> None:
    x = torch.randn(1, 3, 32, 32)
    for words in ({"drop_rate": 0.5}, {"attn_drop_rate": 0.5}):
        model = boat.network(SWIN | words).train()
        feature = model.stages[0][1].feature  # type: ignore[index]
        y = torch.randn(1, 16, 16, 12)
        assert not torch.equal(feature(y), feature(y))
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("words", [SWIN, CSWIN], ids=["swin", "cswin"])
def test_gradients_reach_every_parameter(words: dict) -> None:
    model = boat.network(words)
    model.init_weights()
    for value in model.parameters():
        if value.ndim <= 1:
            nn.init.normal_(value, 0.5, 0.1)
    size = words["img_size"]
    (model(torch.randn(4, 3, size, size)) * torch.randn(4, 5)).sum().backward()
    assert not [n for n, p in model.named_parameters() if not p.grad.abs().sum() > 0]  # type: ignore[union-attr]


def test_initialisation_refills_swins_buffers() -> None:
    model = boat.network(SWIN)
    for value in model.buffers():
        value.fill_(10**6)
    model.init_weights()
    assert all((value < 100).all() for value in model.buffers())
    assert model.no_decay() >= {n for n, _ in model.named_parameters() if n.endswith("table")}


@pytest.mark.slow
def test_swin_compiles_and_exports() -> None:
    model = randomised(boat.network(SWIN | {"depths": [2], "num_heads": [2], "ape": True}))
    x = torch.randn(2, 3, 32, 32)
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True)(x), expected, rtol=1e-3, atol=1e-4
        )
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        more = torch.randn(3, 3, 32, 32)
        torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-5)


# ---- weights -------------------------------------------------------------------------------------


@st.composite
def swins(draw: st.DrawFn) -> dict:
    stages = draw(st.integers(1, 3))
    return {
        "img_size": draw(st.sampled_from([32, 64])),
        "patch_size": draw(st.sampled_from([2, 4])),
        "in_chans": draw(st.sampled_from([1, 3])),
        "num_classes": draw(st.sampled_from([0, 4])),
        "embed_dim": draw(st.sampled_from([12, 24])),
        "depths": [2, *draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages))],
        "num_heads": draw(st.sampled_from([[2, 4, 3, 6], [3, 6, 12, 12]]))[: stages + 1],
        "window_size": draw(st.sampled_from([2, 4])),
        "mlp_ratio": draw(st.sampled_from([4.0, 2.0])),
        "qkv_bias": draw(st.booleans()),
        "qk_scale": draw(st.sampled_from([None, 0.3])),
        "ape": draw(st.booleans()),
        "patch_norm": draw(st.booleans()),
        "cluster": 16,
        "overlap": draw(st.sampled_from([0, 6])),
    }


@st.composite
def cswins(draw: st.DrawFn) -> dict:
    return {
        "img_size": draw(st.sampled_from([32, 64])),
        "in_chans": draw(st.sampled_from([1, 3])),
        "num_classes": draw(st.sampled_from([0, 4])),
        "embed_dim": draw(st.sampled_from([12, 24])),
        "depth": draw(st.lists(st.integers(1, 3), min_size=4, max_size=4)),
        "split_size": draw(st.lists(st.integers(1, 5), min_size=4, max_size=4)),
        "num_heads": draw(st.sampled_from([[2, 2, 4, 4], [2, 4, 8, 8]])),
        "mlp_ratio": draw(st.sampled_from([4.0, 2.0])),
        "qkv_bias": draw(st.booleans()),
        "qk_scale": draw(st.sampled_from([None, 0.3])),
        "cluster": 16,
        "overlap": draw(st.sampled_from([0, 6])),
        "pair_across_batch": draw(st.booleans()),
    }


@given(config=swins() | cswins())
@settings(max_examples=16, deadline=None)
def test_configurations_round_trip(config: dict) -> None:
    """Authors' words → network → keys → recognised → rebuilt."""
    model = randomised(boat.network(config))
    said = boat.official_config(model)
    assert {name: said[name] for name in config} == config
    theirs = boat.to_official(model)
    found = boat.recognise({name: tuple(value.shape) for name, value in theirs.items()})
    assert found is not None
    for name, value in found.items():
        assert name in boat.ASSUMED or value == said[name], name
    if "depths" in config:
        assert found["img_size"] == config["img_size"]
    boat.from_official(found, theirs)  # what is assumed fits the weights, too
    again = boat.from_official(found | said, theirs)
    x = torch.randn(2, config["in_chans"], 32, 28)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)


def test_swins_file_holds_what_its_loader_wants() -> None:
    theirs = boat.to_official(boat.network(SWIN))
    masks = [name for name in theirs if name.endswith("attn_mask")]
    assert masks == ["layers.0.blocks.1.attn_mask", "layers.1.blocks.1.attn_mask"]
    assert theirs[masks[0]].shape == (16, 16, 16)
    assert set(theirs[masks[0]].unique().tolist()) == {0.0, -100.0}
    assert theirs["layers.1.blocks.2.attn.relative_position_index"].shape == (16, 16)
    without = {k: v for k, v in theirs.items() if "attn_mask" not in k}
    boat.from_official(SWIN, without)
    with pytest.raises(PolypatchError, match=r"stages\.0\.1\.norm"):
        boat.from_official(SWIN, {k: v for k, v in theirs.items() if "norm4" not in k})


def test_hosts_without_clusters_are_not_boats() -> None:
    from polypatch.backbones import cswin

    plain = cswin.to_official(cswin.build("cswin-nano"))
    assert boat.recognise({k: tuple(v.shape) for k, v in plain.items()}) is None
    own = boat.to_official(boat.build("boat-nano"))
    shapes = {k: tuple(v.shape) for k, v in own.items()}
    assert cswin.recognise(shapes) is None
    found = boat.recognise(shapes)
    assert found is not None
    assert (found["cluster"], found["overlap"]) == (16, 6)
    swin = boat.to_official(boat.network(SWIN))
    shapes = {k: tuple(v.shape) for k, v in swin.items() if "attnC" not in k}
    assert boat_swin.recognise(shapes) is None


@pytest.mark.parametrize(
    ("words", "change", "sentence"),
    [
        (SWIN, {"num_heads": [2]}, "2 depths need as many heads"),
        (SWIN, {"num_heads": [5, 4]}, "don't divide into 5 heads"),
        (SWIN, {"norm_layer": "BatchNorm"}, "norm_layer='BatchNorm'"),
        (CSWIN, {"num_heads": [2, 2, 4, 5]}, "don't divide into 5 heads"),
        (CSWIN, {"hybrid_backbone": "resnet26d"}, "hybrid_backbone"),
    ],
)
def test_bad_configurations_are_named(words: dict, change: dict, sentence: str) -> None:
    with pytest.raises(PolypatchError, match=sentence):
        boat.network(words | change)


def test_the_claims_measure() -> None:
    """Tokens on a circle: with the two beside it, each has its nearest; with the opposite, none."""
    from polypatch.claims.boat import recall

    angle = torch.arange(12) * 2 * torch.pi / 12
    unit = torch.stack([angle.cos(), angle.sin()], -1)[None]
    apart = (torch.arange(12)[:, None] - torch.arange(12)) % 12
    beside = (apart <= 1) | (apart == 11)
    opposite = (apart == 0) | (apart == 5) | (apart == 6)
    assert recall(unit @ unit.mT, beside[None, None]) == 100
    assert recall(unit @ unit.mT, opposite[None, None]) == 0
