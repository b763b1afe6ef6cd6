from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import polypatch
from polypatch.errors import PolypatchError
from polypatch.spec import Part, Spec, create, parse


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("vit-nano", "vit-nano"),
        (" vit-nano ( patch = 8 ) + dart ", "vit-nano(patch=8)+dart"),
        ("a(z=1,b=2)", "a(b=2,z=1)"),
        ("a(pooling=class+mean)+b", "a(pooling=class+mean)+b"),
        ("a(sizes=[4, 8])", "a(sizes=[4,8])"),
        ("a(word='it, is')", "a(word='it, is')"),
        ("a(x=1e-3,y=None,z=true)", "a(x=0.001,y=None,z=True)"),
        ("a()", "a"),
    ],
)
def test_parsing_gives_a_canonical_form(text, canonical):
    spec = parse(text)
    assert str(spec) == canonical
    assert str(parse(canonical)) == canonical


names = st.from_regex(r"[a-z][a-z0-9-]{0,8}[a-z]", fullmatch=True)
values = st.one_of(
    st.integers(-99, 99),
    st.floats(-9, 9, allow_nan=False),
    st.booleans(),
    st.none(),
    st.from_regex(r"[a-z][a-z+-]{0,6}", fullmatch=True),
    st.lists(st.integers(0, 9), max_size=3),
    st.text(max_size=6),
)
options = st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), values, max_size=3)


@given(st.lists(st.builds(Part, names, options), min_size=1, max_size=3))
def test_writing_and_reading_are_inverse(parts):
    spec = Spec(parts[0], tuple(parts[1:]))
    read = parse(str(spec))
    assert [p.name for p in (read.host, *read.techniques)] == [p.name for p in parts]
    assert [dict(p.options) for p in (read.host, *read.techniques)] == [
        dict(p.options) for p in parts
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vit-tny", "did you mean vit-tiny"),
        ("vit-nano(ptach=8)", "did you mean patch"),
        ("vit-nano(patch=64)", "does not fit into a resolution of 32"),
        ("vit-nano(patch=8", "is not closed"),
        ("vit-nano)", "closes too often"),
        ("vit-nano(8)", "is no option=value"),
        ("vit-nano(patch=8,patch=4)", "stands twice"),
        ("+dart", "is no name with options"),
        ("", "is no name with options"),
        ("vit-nano+quadtre", "did you mean quadtree"),
        ("vit-nano+vit-tiny", "must stand first"),
        ("vit-nano+restormer", "does not work yet"),
        ("dart", "is a technique"),
        ("vit-nano(pooling=maen)", "did you mean mean"),
        ("vit-nano+tome(rr=3)", "has no option 'rr'"),
    ],
)
def test_mistakes_get_one_clear_sentence(text, said):
    with pytest.raises(PolypatchError, match=said) as caught:
        create(text, classes=3, resolution=32)
    assert "\n" not in str(caught.value)


def test_a_seed_decides_the_weights_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    a = create("vit-nano", classes=3, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    b = create("vit-nano", classes=3, seed=5).state_dict()
    c = create("vit-nano", classes=3, seed=6).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["patching.proj.weight"], c["patching.proj.weight"])


def test_a_complete_network_has_no_sockets():
    with pytest.raises(PolypatchError, match="complete network and has none"):
        polypatch.plug(torch.nn.Linear(1, 1), "tome")
