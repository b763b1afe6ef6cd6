"""The catalogue is data, so the tests ask whether the data hold together and can be found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from polypatch import catalogue
from polypatch.catalogue import ROOMS, TAXONOMY, Paper, by_taxonomy, paper, papers, search
from polypatch.errors import PolypatchError

ROOT = Path(__file__).resolve().parent.parent
# Relative to the repository's root, not to where pytest was started.
SHARED = ROOT / os.environ.get("POLYPATCH_SHARED", "../shared")
EVERY = papers(peers=True)
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def each(entries: tuple[Paper, ...] = EVERY):
    return pytest.mark.parametrize("entry", entries, ids=lambda p: p.slug)


# --- the data hold together ---------------------------------------------------------------------


def test_there_are_119_papers_and_three_peers():
    assert len(papers()) == 119
    assert not any(p.peer for p in papers())
    assert [p.slug for p in EVERY if p.peer] == ["quadtree", "tome", "vit"]


@pytest.mark.parametrize("field", ["slug", "title", "summary", "module", "arxiv"])
def test_no_two_papers_share_a(field):
    values = [getattr(p, field) for p in EVERY if getattr(p, field)]
    assert len(set(values)) == len(values)


@each()
def test_fields_have_their_form(entry):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", entry.slug)
    assert entry.room in ROOMS
    assert entry.authors
    assert entry.title == " ".join(entry.title.split())
    assert 0 < len(entry.summary) < 110
    assert not entry.summary.endswith(".")
    assert "\n" not in entry.summary
    assert re.fullmatch(r"(\d{4}\.\d{4,5})?", entry.arxiv)
    for repository in filter(None, (entry.official, *entry.other_code)):
        assert REPOSITORY.fullmatch(repository)
    assert entry.official not in entry.other_code


@each()
def test_year_does_not_precede_the_preprint(entry):
    if not entry.arxiv:
        pytest.skip("no preprint")
    preprint = 2000 + int(entry.arxiv[:2])
    assert 1 <= int(entry.arxiv[2:4]) <= 12
    if entry.slug == "sparse-coding":  # a technical report, uploaded two years later
        assert (entry.year, preprint) == (2008, 2010)
    elif entry.venue:
        assert preprint <= entry.year <= preprint + 3
    else:
        assert entry.year == preprint


@each()
def test_taxonomy_names_places(entry):
    assert entry.taxonomy
    assert len(set(entry.taxonomy)) == len(entry.taxonomy)
    assert set(entry.taxonomy) <= {place.path for place in TAXONOMY}


def test_entries_stand_together_by_room():
    assert [room for room, _ in groupby(EVERY, key=lambda p: p.room)] == list(ROOMS)


def test_an_entry_cannot_be_changed():
    with pytest.raises(AttributeError):
        paper("dart").title = "another"  # type: ignore[misc]


# --- the taxonomy --------------------------------------------------------------------------------


def test_taxonomy_follows_the_survey():
    theirs = [place for place in TAXONOMY if not place.ours]
    assert all(place.section for place in theirs)
    assert [place.section for place in theirs] == sorted(place.section for place in theirs)
    levels = [level for level, _ in groupby(place.path.split("/")[0] for place in theirs)]
    assert levels == ["module", "architecture", "pre-training", "applications"]
    assert len({place.path for place in TAXONOMY}) == len(TAXONOMY)


def test_what_is_ours_is_marked():
    ours = [place for place in TAXONOMY if place.ours]
    assert [place.path for place in ours] == ["module/patchification", "survey"]
    assert not any(place.section or place.models for place in ours)


def test_what_is_called_in_the_survey_is_named_at_one_of_its_places():
    named = [p for p in EVERY if p.in_survey]
    assert [p.slug for p in named] == ["tnt", "vit"]
    models = {place.path: [m.lower() for m in place.models] for place in TAXONOMY}
    for p in named:
        assert any(p.slug in models[path] for path in p.taxonomy)


def test_by_taxonomy_lists_every_paper_in_the_order_of_the_survey():
    places = by_taxonomy()
    assert list(places) == [place.path for place in TAXONOMY]
    assert {p.slug for found in places.values() for p in found} == {p.slug for p in papers()}
    assert [p.slug for p in places["survey"]] == ["survey"]
    assert places["module/attention/prior/multi-task-adapters"] == ()
    for path, found in places.items():
        assert found == tuple(p for p in papers() if path in p.taxonomy)


def test_by_taxonomy_adds_peers_on_demand():
    assert paper("tome") not in by_taxonomy()["architecture/lightweight"]
    assert paper("tome") in by_taxonomy(peers=True)["architecture/lightweight"]


# --- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slug", "module"),
    [
        ("dart", "polypatch.patching.dart"),
        ("dual-patchnorm", "polypatch.patching.dual_patchnorm"),
        ("survey", "polypatch.catalogue"),
        ("vit", "polypatch.hosts.vit"),
        ("quadtree", "polypatch.patching.quadtree"),
        ("tome", "polypatch.reducing.tome"),
    ],
)
def test_module(slug, module):
    assert paper(slug).module == module


@each()
def test_module_can_be_written_in_an_import(entry):
    assert all(part.isidentifier() for part in entry.module.split("."))


def test_works_tells_what_lies_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "_PACKAGE", tmp_path)
    flat, folder, missing = paper("dual-patchnorm"), paper("cswin"), paper("dart")
    assert not any(p.works for p in (flat, folder, missing))
    (tmp_path / "patching").mkdir()
    # What the module does when imported must not matter.
    (tmp_path / "patching" / "dual_patchnorm.py").write_text("raise RuntimeError")
    (tmp_path / "backbones" / "cswin").mkdir(parents=True)
    assert not folder.works, "a folder without __init__.py is not the paper's module"
    (tmp_path / "backbones" / "cswin" / "__init__.py").touch()
    assert flat.works
    assert folder.works
    assert not missing.works


def test_the_survey_works():
    assert paper("survey").works


def test_the_catalogue_imports_neither_torch_nor_a_paper():
    # The parent package may import torch for its public names; here only the catalogue counts.
    script = f"""
import sys, types
package = types.ModuleType("polypatch")
package.__path__ = [{str(ROOT / "polypatch")!r}]
sys.modules["polypatch"] = package
from polypatch import catalogue
[(p.module, p.works) for p in catalogue.papers(peers=True)]
catalogue.search("attention"), catalogue.by_taxonomy()
assert "torch" not in sys.modules and "numpy" not in sys.modules
ours = sorted(m for m in sys.modules if m.startswith("polypatch."))
assert ours == ["polypatch.catalogue", "polypatch.errors"], ours
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# --- looking up ----------------------------------------------------------------------------------


def test_papers_of_a_room():
    assert [p.slug for p in papers(room="positioning")] == ["lape", "urpe"]
    assert papers(room="hosts") == ()
    assert [p.slug for p in papers(room="hosts", peers=True)] == ["vit"]
    assert sum(len(papers(room=room)) for room in ROOMS) == 119


def test_unknown_room_names_the_nearest():
    with pytest.raises(PolypatchError, match="no room 'patchin'; did you mean patching"):
        papers(room="patchin")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("flexi-vit", "flexivit"),
        ("dual_patchnorm", "dual-patchnorm"),
        ("Restormer", "restormer"),
        ("patchstt", "patchtst"),
    ],
)
def test_unknown_slug_names_the_nearest(wrong, right):
    with pytest.raises(PolypatchError, match=f"no paper '{wrong}'; did you mean {right}"):
        paper(wrong)


def test_hopeless_slug_lists_what_there_is():
    with pytest.raises(PolypatchError, match="known papers: adafortitran, adapterbias"):
        paper("????")


def slugs(query: str) -> list[str]:
    return [p.slug for p in search(query)]


def test_search_puts_slug_before_title_before_the_rest():
    found = search("superpixel")
    assert found[:2] == (paper("asc"), paper("spformer"))  # in both titles, catalogue order
    assert slugs("looped") == ["looped"]
    ranks = [
        0 if "patch" in p.slug else 1 if "patch" in p.title.lower() else 2 for p in search("patch")
    ]
    assert ranks == sorted(ranks)
    assert set(ranks) == {0, 1, 2}


def test_search_puts_the_slug_that_was_typed_first():
    assert slugs("hat")[0] == "hat"
    assert slugs("dat")[0] == "dat"
    assert slugs("Dual PatchNorm")[0] == "dual-patchnorm"
    assert slugs("mat")[0] == "mat"


def test_search_wants_every_word_wherever_it_stands():
    assert slugs("mei superpixel") == slugs("SUPERPIXEL   Mei") == ["spformer"]
    assert "restormer" in slugs("restoring linearized")  # room, taxonomy
    assert slugs("superpixel nowhere-to-be-found") == []


@pytest.mark.parametrize("query", ["goncalves", "Gonçalves", "GONÇALVES", "Gonc\u0327alves"])
def test_search_ignores_case_and_accents(query):
    assert slugs(query) == ["adasplash"]


def test_search_finds_peers():
    assert slugs("token merging")[0] == "tome"


@pytest.mark.parametrize(
    "query", ["", "  \t\n", "zzzz", ".*", "[)", "%", "\x00", "patch " + "y" * 9999]
)
def test_search_for_nothing_that_is_there(query):
    assert search(query) == ()


# --- against the list that the project started from ----------------------------------------------


def roster() -> dict[str, tuple[str, str, str]]:
    path = SHARED / "papers.tsv"
    if not path.is_file():
        pytest.skip(f"{path} is not here (set POLYPATCH_SHARED to the folder that holds it)")
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return {slug: (room, code, title) for slug, room, code, title in rows}


def test_slugs_rooms_and_titles_equal_the_roster():
    rows = roster()
    ours = {p.slug: (p.room, "".join(p.title.split())) for p in papers()}
    assert ours == {slug: (room, "".join(title.split())) for slug, (room, _, title) in rows.items()}


def test_code_agrees_with_the_roster():
    for slug, (_, code, _) in roster().items():
        ours = paper(slug)
        if code == "-":
            assert not ours.official, slug
        elif REPOSITORY.fullmatch(code):
            assert ours.official == code, slug
        else:  # a remark, or several: which is the authors' is told apart in the catalogue
            named = set(REPOSITORY.findall(re.sub(r"\(.*?\)", "", code)))
            assert named <= {ours.official, *ours.other_code}, slug
            assert ours.code_note or slug == "dam", slug


def test_code_that_made_the_goldens_is_named():
    roster()
    known = {p.slug: {p.official, *p.other_code} for p in EVERY}
    for folder in sorted((SHARED / "goldens").glob("*/")):
        if folder.name == "causal":  # a host, not a paper
            continue
        for case in folder.glob("*.json"):
            repository = json.loads(case.read_text(encoding="utf-8")).get("repo")
            assert repository in known[folder.name], case
