from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from polypatch.report.statistics import difference, interval, pareto_front

scores = st.lists(st.floats(0, 1), min_size=3, max_size=6)


def test_interval_is_students():
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.302653 * 1 / math.sqrt(3), rel=1e-5)
    assert math.isnan(interval([1.0]).half)


@given(st.integers(3, 6).flatmap(lambda n: st.tuples(*[st.lists(st.floats(0, 1), min_size=n, max_size=n)] * 2)))  # fmt: skip  # noqa: E501
def test_paired_differences_are_clear_where_the_t_test_says_so(pair):
    a, b = pair
    found = difference(a, b)
    p = ttest_rel(a, b).pvalue
    if not math.isnan(p) and abs(p - 0.05) > 1e-6:
        assert found.clear == (p < 0.05)


def test_welch_for_unequal_numbers():
    found = difference([1.0, 1.1, 0.9], [0.5, 0.6])
    assert found.mean == pytest.approx(0.45)
    assert found.low < 0.45 < found.high
    assert not difference([1.0], [0.0, 0.1]).clear


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_pareto_front_is_what_nobody_beats(points):
    cost, value = zip(*points)
    front = pareto_front(cost, value)
    for i, (c, v) in enumerate(points):
        beaten = any((d <= c and w >= v) and (d < c or w > v) for d, w in points)
        on_front = any((cost[j], value[j]) == (c, v) for j in front)
        assert on_front == (not beaten), i
    assert [cost[i] for i in front] == sorted(cost[i] for i in front)
