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
from polypatch.errors import PolypatchError
from polypatch.hosts import build_vit
from polypatch.nn import Mixed
from polypatch.reducing.tome import (
    Matching,
    TokenMerging,
    bipartite_soft_matching,
    default_r,
    kth_bipartite_soft_matching,
    merge_source,
    merge_wavg,
    parse_r,
    plug,
    random_bipartite_soft_matching,
)
from polypatch.tokens import Pieces, Tokens


def alone(program: str) -> None:
    """Run a program by itself: the shape checks of the tests' own process can't be compiled."""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def small_host(spec: str = "tome", host: str = "vit-nano") -> nn.Module:
    return polypatch.create(f"{host}+{spec}", classes=5, resolution=32, seed=0)


def literal_matching(metric: torch.Tensor, r: int, protected: int) -> list[list[int]]:
    """The groups of one sample by the paper's five steps, in the order of the new sequence."""
    tokens = len(metric)
    a = list(range(0, tokens, 2))
    b = list(range(1, tokens, 2))
    edges = []
    for i in a:
        if i < protected:
            continue
        cosines = [
            (F.cosine_similarity(metric[i], metric[j], dim=0).item(), j)
            for j in b
            if j >= protected
        ]
        if cosines:
            best, target = max(cosines)
            edges.append((best, i, target))
    edges.sort(reverse=True)
    merged = {i: target for _, i, target in edges[: min(r, (tokens - protected) // 2)]}
    left = [i for i in a if i >= protected and i not in merged]
    if not protected:
        left.sort(key=lambda i: [edge[1] for edge in edges].index(i))
    groups = [[i] for i in range(protected)] + [[i] for i in left]
    return groups + [
        sorted([j, *[i for i in merged if merged[i] == j]]) for j in b if j >= protected
    ]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 21),
    r=st.integers(0, 12),
    protected=st.integers(0, 5),
    seed=st.integers(0, 10**6),
)
def test_matching_is_the_literal_one(tokens: int, r: int, protected: int, seed: int) -> None:
    protected = min(protected, tokens)
    metric = torch.randn(2, tokens, 6, generator=torch.Generator().manual_seed(seed))
    matching = bipartite_soft_matching(metric, r, protected=protected)
    assert matching.count == tokens - min(r, (tokens - protected) // 2)
    for sample, groups in zip(metric, matching.groups.tolist()):
        ours = [[i for i, g in enumerate(groups) if g == n] for n in range(matching.count)]
        if matching.count == tokens:
            assert ours == [[i] for i in range(tokens)]
        else:
            assert ours == literal_matching(sample, r, protected)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 17), min_size=1, max_size=4),
    r=st.one_of(st.integers(0, 9), st.sampled_from([0.1, 0.25, 0.4, 0.5])),
    protected=st.integers(0, 2),
    seed=st.integers(0, 10**6),
)
def test_padding_changes_nothing(
    lengths: list[int], r: int | float, protected: int, seed: int
) -> None:
    """Each sample of a padded batch is matched as it would be alone, its padding goes behind."""
    longest = max(lengths) + seed % 3
    metric = torch.randn(len(lengths), longest, 5, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    together = bipartite_soft_matching(metric, r, protected=protected, mask=mask)
    assert int(together.groups.max()) < together.count
    for n, length in enumerate(lengths):
        alone = bipartite_soft_matching(metric[n : n + 1, :length], r, protected=protected)
        assert together.groups[n, :length].tolist() == alone.groups[0].tolist()
        used = set(alone.groups[0].tolist())
        behind = set(together.groups[n, length:].tolist())
        assert behind <= {together.count - 1} or together.count == longest
        assert together.count - 1 not in used & behind or len(used) == together.count


def test_merge_modes_and_unmerge() -> None:
    matching = Matching(torch.tensor([[0, 1, 1, 2, 1]]), 3)
    x = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [7.0]]])
    expected = {"mean": 4.0, "sum": 12.0, "amax": 7.0, "amin": 2.0, "prod": 42.0}
    for mode, value in expected.items():
        assert matching.merge(x, mode).flatten().tolist() == [1.0, value, 4.0]
    assert matching.unmerge(matching.merge(x)).flatten().tolist() == [1.0, 4.0, 4.0, 4.0, 4.0]
    size = torch.tensor([[[1.0], [2.0], [1.0], [1.0], [1.0]]])
    merged, total = merge_wavg(matching, x, size)
    assert merged.flatten().tolist() == [1.0, 3.5, 4.0]
    assert total.flatten().tolist() == [1.0, 4.0, 1.0]
    with pytest.raises(PolypatchError, match="mode"):
        matching.merge(x, "median")


def test_source_tracks_two_rounds() -> None:
    first, second = (
        Matching(torch.tensor([[0, 1, 1, 2]]), 3),
        Matching(torch.tensor([[0, 0, 1]]), 2),
    )
    source = merge_source(second, merge_source(first))
    assert source.tolist() == [[[1, 1, 1, 0], [0, 0, 0, 1]]]


def test_identical_tokens_merge_without_loss() -> None:
    pair = torch.randn(1, 4, 1, 8).expand(-1, -1, 2, -1).flatten(1, 2)  # a a b b c c d d
    matching = bipartite_soft_matching(pair, 4)
    torch.testing.assert_close(matching.unmerge(matching.merge(pair)), pair)


def test_kth_and_random() -> None:
    metric = torch.randn(2, 14, 5)
    matching = kth_bipartite_soft_matching(metric, 4)
    assert matching.count == 3
    assert matching.groups.shape == (2, 12)
    assert matching.groups[:, 3::4].tolist() == [[0, 1, 2]] * 2
    assert torch.equal(kth_bipartite_soft_matching(metric, 1).groups[0], torch.arange(14))

    def drawn(seed: int) -> Matching:
        generator = torch.Generator().manual_seed(seed)
        return random_bipartite_soft_matching(metric, 5, generator=generator)

    matching = drawn(0)
    assert torch.equal(matching.groups, drawn(0).groups)
    assert not torch.equal(matching.groups, drawn(1).groups)
    assert matching.count == 9
    sizes = matching.merge(torch.ones(2, 14, 1), "sum")
    assert sizes.min() == 1
    assert sizes.sum() == 28
    with pytest.raises(PolypatchError, match="can't be merged"):
        random_bipartite_soft_matching(metric, 14)


def test_schedules() -> None:
    assert parse_r(4, 8) == [8, 8, 8, 8]
    assert parse_r(4, (8, -1.0)) == [16, 10, 5, 0]
    assert parse_r(4, (8, 1.0)) == [0, 5, 10, 16]
    assert parse_r(4, [3, 2]) == [3, 2, 0, 0]
    assert parse_r(1, (8, 0.5)) == [4]
    assert default_r(196, 12) == 8  # the paper's for ViT-S and DeiT-S
    assert default_r(4, 12) == 1


def test_reducing_is_the_weighted_average_of_the_paper() -> None:
    """Tokens.merge on placed tokens = merge_wavg on all of them."""
    tokens = Tokens.from_grid(torch.randn(2, 8, 4, 4), canvas=(16, 16)).with_prefix(
        torch.randn(1, 1, 8)
    )
    keys = torch.randn(2, 2, 17, 4)
    reduced = TokenMerging(r=5)(tokens, Mixed(tokens.x, keys)).check()
    matching = bipartite_soft_matching(keys.mean(1), 5, protected=1)
    expected, size = merge_wavg(matching, tokens.x)
    torch.testing.assert_close(reduced.x, expected)
    torch.testing.assert_close(reduced.weight, size[..., 0])
    again = torch.randn(2, 2, 12, 4)
    twice = TokenMerging(r=4)(reduced, Mixed(reduced.x, again)).check()
    second = bipartite_soft_matching(again.mean(1), 4, protected=1)
    expected, size = merge_wavg(second, expected, size)
    torch.testing.assert_close(twice.x, expected)
    torch.testing.assert_close(twice.weight, size[..., 0])
    source = merge_source(second, merge_source(matching))[:, 1:, 1:]
    assert isinstance(twice.regions, Pieces)
    owned = F.one_hot(twice.regions.owner, 7).transpose(1, 2).float()
    torch.testing.assert_close(owned, source)


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_half_of_the_tokens_remain_and_cover_the_image(pooling: str) -> None:
    model = small_host(host=f"vit-nano(pooling={pooling})").eval()
    image = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(image).check()
    assert tokens.placed.shape[1] == 32
    assert tokens.weight[:, tokens.prefix :].sum(1).tolist() == [64.0, 64.0]
    assert (tokens.label_map() >= 0).all()
    assert tokens.label_map().unique().numel() == 32
    assert [m.map.shape[-2:] for m in model.features(image)] == [(8, 8)] * 4


def test_class_token_and_registers_stay_in_front() -> None:
    model = small_host("tome(r=20)", host="vit-nano(registers=3)").eval()
    model.blocks[0].register_forward_hook(lambda m, i, out: seen.append(out))
    seen: list[Tokens] = []
    model(torch.randn(2, 3, 32, 32))
    assert seen[0].prefix == 4
    assert seen[0].x.shape[1] == 4 + 44
    assert (seen[0].weight[:, :4] == 1).all()
    assert (seen[0].centre[:, :4] == 0).all()


def test_zero_merges_nothing() -> None:
    plain = build_vit("nano", classes=5, resolution=32).eval()
    image = torch.randn(2, 3, 32, 32)
    expected = plain(image)
    plug(plain, r=0)
    assert torch.equal(plain(image), expected)


def test_merging_equal_patches_is_exact_with_proportional_attention() -> None:
    """Two equal tokens and one of size two give the same output (eq. 1)."""
    plain = build_vit("nano", classes=5, resolution=32, position="none").eval()
    pairs = torch.randn(2, 3, 8, 4, 4, 1, 4).expand(-1, -1, -1, -1, -1, 2, -1)
    image = pairs.flatten(4).flatten(2, 3)  # every patch of 4 × 4 pixels twice, side by side
    expected = plain(image)
    plug(plain, r=[32])
    # A starts with the class token, so pairs (1, 2), (3, 4), ... are (B, A).
    torch.testing.assert_close(plain(image), expected, atol=1e-5, rtol=1e-4)
    for block in plain.blocks:
        block.proportional = False
    assert (plain(image) - expected).abs().max() > 1e-4


def varied(batch: int = 4) -> torch.Tensor:
    images = torch.randn(batch, 3, 32, 32)
    for number, image in enumerate(images):
        image[:, :, : 8 * number] = 0.1 * number
    return images


@pytest.mark.parametrize("options", ["r=8", "ratio=0.2", "r=30"])
@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_behind_a_tokenizer_with_unequal_counts(options: str, pooling: str) -> None:
    model = polypatch.create(
        f"vit-nano(pooling={pooling})+quadtree(scales=3,thresholds=[5,5])+tome({options})",
        classes=5,
        resolution=32,
        seed=1,
    ).eval()
    images = varied()
    assert len(set(model.tokens(images).counts.tolist())) > 1
    together = model(images)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    padded = model.run_blocks(model.tokens(images)).check()  # one padded batch
    assert padded.mask is None or (padded.mask.int().diff(dim=1) <= 0).all()
    area = padded.weight if padded.mask is None else padded.weight * padded.mask
    assert area[:, padded.prefix :].sum(1).tolist() == [
        float(n - padded.prefix) for n in model.tokens(images).counts.tolist()
    ]
    logits = model.head(model.pooling(padded.with_x(model.norm(padded.x))))
    torch.testing.assert_close(logits, together, atol=1e-5, rtol=1e-4)
    assert (model.forward_features(images).label_map() >= 0).all()


def test_gradients_reach_every_parameter() -> None:
    model = small_host().train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("position", ["learned", "sincos", "rope"])
def test_other_positions_and_sizes(position: str) -> None:
    model = small_host(host=f"vit-nano(position={position})").eval()
    assert model(torch.randn(1, 3, 27, 41)).isfinite().all()
    assert model(torch.randn(2, 3, 4, 4)).isfinite().all()  # one token: nothing to merge
    assert model(torch.randn(2, 3, 4, 9)).isfinite().all()


def test_half_precision() -> None:
    model = small_host().eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(image).isfinite().all()
    model.bfloat16()
    assert model(image.bfloat16()).dtype == torch.bfloat16


def test_checkpointing_gives_the_same_gradients() -> None:
    model = small_host().train()
    image = torch.randn(2, 3, 32, 32)
    grads = []
    for on in (False, True):
        model.checkpointed(on).zero_grad()
        model(image).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for first, second in zip(*grads):
        torch.testing.assert_close(first, second)


@pytest.mark.slow
def test_compiles_without_breaks() -> None:
    alone("""
import torch
from polypatch import create

model = create("vit-nano+tome", classes=5, resolution=32, seed=0)
image = torch.randn(2, 3, 32, 32)
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(image), model(image), atol=1e-5, rtol=1e-4)
compiled(image).sum().backward()
""")


def test_bad_options() -> None:
    for options, message in (
        (dict(r=8, ratio=0.2), "not both"),
        (dict(ratio=0.7), "0 to 0.5"),
        (dict(r=-1), "negative"),
        (dict(r=[1] * 9), "4 blocks"),
    ):
        with pytest.raises(PolypatchError, match=message):
            plug(build_vit("nano"), **options)
    with pytest.raises(PolypatchError, match="reduce tokens already"):
        plug(plug(build_vit("nano")))
    tokens = Tokens.from_grid(torch.randn(1, 8, 4, 4), canvas=(16, 16))
    with pytest.raises(PolypatchError, match="none to show"):
        TokenMerging(r=2)(tokens, Mixed(tokens.x))


def test_defaults_of_other_sizes() -> None:
    model = polypatch.create("vit-tiny+tome", classes=2)
    assert [block.reducing.r for block in model.blocks] == [8] * 12
    assert model.plugs == ("tome",)
    model = polypatch.create("vit-tiny+tome(r=(8,-1.0),proportional=false)", classes=2)
    assert model.blocks[0].reducing.r == 16
    assert model.blocks[11].reducing is None
    assert not model.blocks[3].proportional
