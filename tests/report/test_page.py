"""The report in a real browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from polypatch.compare import compare
from polypatch.data.series import load_series
from polypatch.forecast import forecast
from polypatch.report.forecast_page import write_forecast_report
from polypatch.report.page import write_report
from polypatch.training.recipe import Recipe


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("report")
    comparison = compare(
        ["vit-nano(patch=8)", "vit-nano(patch=4)", "vit-nano(patch=4)+tome"],
        data="bundled:photos",
        budget="3steps",
        seeds=2,
        recipe=Recipe(batch=16),
        root=root / "runs",
        jobs=1,
        device="cpu",
    )
    return write_report(comparison, root / "out", command="polypatch compare")


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The page in Chromium; nothing may go wrong in it, or be asked of the network."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        problems: list[str] = []
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: problems.append(r.url) if r.url.startswith("http") else None)
        page.goto(file.as_uri())
        yield page
        # Nothing sticks out of the page at the side, on a phone either.
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert problems == []
        browser.close()


@pytest.mark.slow
def test_the_report_of_forecasts_works_in_chromium(tmp_path):
    found = forecast(
        load_series("bundled:macro"), horizon=4, budget="3steps", root=tmp_path, device="cpu"
    )
    with opened(write_forecast_report(found, tmp_path / "out", command="polypatch")) as page:
        assert page.locator("svg").count() == 12
        assert page.locator("tbody tr").count() == 4
        assert (
            page.locator("svg").evaluate_all("all => Math.min(...all.map(s => s.clientWidth))")
            > 800
        )


@pytest.mark.slow
def test_the_report_works_in_chromium(page_file):
    with opened(page_file) as page:
        assert page.locator("img").count() == 6 * 4
        widths = page.locator("img").evaluate_all("all => all.map(i => i.naturalWidth)")
        assert min(widths) >= 128
        assert page.locator(".plots svg").count() == 4
        rows = page.locator("#results tbody tr")
        assert rows.count() == 3

        def column(number: int) -> list[float]:
            cells = page.locator(f"#results tbody td:nth-child({number})")
            return cells.evaluate_all("all => all.map(c => parseFloat(c.dataset.value))")

        heads = page.locator("#results thead th")
        for number in range(2, heads.count() + 1):
            head = heads.nth(number - 1)
            head.click()
            assert column(number) == sorted(column(number), reverse=True)
            assert head.get_attribute("aria-sort") == "descending"
            head.press("Enter")
            assert column(number) == sorted(column(number))


def test_the_page_needs_nothing_else(page_file):
    text = page_file.read_text()
    assert 'src="http' not in text
    assert "@import" not in text
    words = re.sub(r"base64,[A-Za-z0-9+/=]*", "", text.split("<script")[0])
    assert not re.search(r"\bnan\b", words, flags=re.IGNORECASE)
    assert (page_file.parent / "results.json").exists()
