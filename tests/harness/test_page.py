"""The report in a real browser: Debian's Chromium, driven by playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ibp_triton.harness import grid, loading
from ibp_triton.harness.launch import Job, launch
from ibp_triton.harness.report import write_report

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
EXPECTED = "EXPECT_CHROMIUM"


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium; the test is skipped where there is none, and fails there if EXPECT_CHROMIUM is set."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if program is None or sync_playwright is None:
        missing = "no Chromium to look at the report with: install Debian's package chromium, and playwright with pip"
        (pytest.fail if os.environ.get(EXPECTED) else pytest.skip)(missing)
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page_file(tree: Tree, write: Write, tmp_path: Path) -> Path:
    """The report of a tiny experiment with every kind of figure and a long label."""
    tree["methods"] |= {"a rather long label of a method with many words": {"method": "fast_at", "epsilon": 0.1}}
    tree["evaluate"] = {"adversarial": [0.0, 0.05, 0.1, 0.2], "gaussian": [0.1, 0.2], "masking": 0.1}
    plan = loading.load(write(tree))
    launch(Job(grid.runs(plan), tmp_path / "runs", evaluate=plan.experiment.evaluate), 1, lambda _: None)
    write_report(plan, tmp_path / "runs", tmp_path / "report")
    return tmp_path / "report" / "report.html"


def test_the_page_sorts_toggles_and_tells_values_at_every_width(browser: Any, page_file: Path) -> None:
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            wrong: list[str] = []
            asked: list[str] = []
            page.on("console", lambda message, wrong=wrong: wrong.append(message.text))
            page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
            page.on(
                "request",
                lambda sent, wrong=wrong: None if sent.url[:4] in ("file", "data") else wrong.append(sent.url),
            )
            page.goto(page_file.as_uri())
            _fits(page, width)
            _sorts(page)
            _toggles(page)
            _tells(page)
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 29)"}[scheme]
            assert wrong == []
            assert set(asked) <= {"file:", "data:"}
            page.close()


def test_without_its_script_the_page_has_the_same_words(browser: Any, page_file: Path) -> None:
    words = []
    for script in (True, False):
        context = browser.new_context(java_script_enabled=script)
        page = context.new_page()
        page.goto(page_file.as_uri())
        words.append(page.inner_text("body").split())
        context.close()
    assert words[0] == words[1]


def _fits(page: Any, width: int) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = "[...document.querySelectorAll('.scroll, figure')]"
    assert page.evaluate(f"{boxes}.filter((one) => one.scrollWidth > one.clientWidth + 1).length") == 0, (
        "a table or figure is cut"
    )


def _sorts(page: Any) -> None:
    head = page.locator("table th[scope=col]", has_text="s/epoch")
    column = "[...document.querySelectorAll('table')].find((t) => t.tHead.textContent.includes('s/epoch')).tBodies[0]"
    values = f"[...{column}.rows].map((row) => parseFloat(row.cells[1].textContent))"
    for direction in (1, -1):
        head.locator("button").click()
        found = page.evaluate(values)
        assert found == sorted(found, reverse=direction < 0)
        assert head.get_attribute("aria-sort") == ("ascending" if direction > 0 else "descending")


def _toggles(page: Any) -> None:
    shown = "getComputedStyle(document.getElementById('adversarial--s1')).display"
    switch = page.locator("[id='adversarial--t1']")
    assert page.evaluate(shown) != "none"
    switch.click()
    assert (page.evaluate(shown), switch.get_attribute("aria-checked")) == ("none", "false")
    switch.press("Enter")
    assert (page.evaluate(shown), switch.get_attribute("aria-checked")) != ("none", "false")


def _tells(page: Any) -> None:
    page.locator("[id='adversarial--s0'] use").nth(2).hover(force=True)
    tip = page.locator(".tip")
    assert tip.is_visible()
    assert ": 0." in tip.inner_text()
    assert "→" in tip.inner_text()
