"""The pages say what is so: the catalogue's page, links, commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from polypatch.catalogue import papers
from polypatch.report.catalogue_page import calls_of, catalogue_text
from polypatch.spec import create

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WORKING = [p for p in papers(peers=True) if p.works and p.room not in ("catalogue", "pretraining")]


def test_the_page_of_papers_is_what_the_catalogue_says():
    page = ROOT / "docs" / "papers.md"
    assert page.read_text() == catalogue_text(), "run: make docs"


@pytest.mark.parametrize("entry", WORKING, ids=lambda p: p.slug)
def test_what_works_has_a_picture_and_a_call_that_works(entry):
    assert (ROOT / "docs" / "pictures" / f"{entry.slug}.png").is_file()
    calls = calls_of(entry)
    assert calls.spec
    assert create(calls.spec, classes=3, resolution=32) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_on_the_pages_exist(page):
    from polypatch.cli import app

    known = {command.name for command in app.registered_commands}
    for name in re.findall(r"polypatch ([a-z]+)\b(?= [A-Z'\"-]| \w+/|`)", page.read_text()):
        assert name in known, f"polypatch {name}"
