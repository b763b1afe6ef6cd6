from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polypatch.errors import PolypatchError
from polypatch.nn.arguments import expansion, norm_eps, norm_word, pair


@given(st.integers(1, 2048), st.floats(0.5, 8.0))
def test_a_ratio_gives_its_hidden_width_again(dim, ratio) -> None:
    """Also where hidden / dim · dim is one less than hidden when it is rounded down."""
    hidden = int(dim * ratio)
    assert int(dim * expansion((hidden, dim))) == hidden


def test_hidden_over_dim_may_miss_by_one() -> None:
    assert int(11 * (15 / 11)) == 14
    assert int(11 * expansion((15, 11))) == 15


@given(st.integers(1, 512), st.integers(1, 512), st.floats(1.0, 8.0))
def test_one_ratio_for_several_widths(first, second, ratio) -> None:
    sizes = [(int(dim * ratio), dim) for dim in (first, second)]
    found = expansion(*sizes)
    assert [int(dim * found) for _, dim in sizes] == [hidden for hidden, _ in sizes]


@pytest.mark.parametrize(
    ("word", "eps"),
    [
        (None, 1e-5),
        ("LayerNorm", 1e-5),
        ("nn.LayerNorm", 1e-5),
        ("LayerNorm(eps=1e-6)", 1e-6),
        ("LayerNorm(1e-06)", 1e-6),
        ("LayerNorm(eps=0.001)", 1e-3),
    ],
)
def test_norms(word, eps) -> None:
    assert norm_eps(word) == eps
    assert norm_eps(norm_word(eps)) == eps


def test_other_norms_are_refused() -> None:
    with pytest.raises(PolypatchError, match="BatchNorm2d"):
        norm_eps("BatchNorm2d")


def test_pairs() -> None:
    assert pair(7) == (7, 7)
    assert pair([7, 9]) == (7, 9)
