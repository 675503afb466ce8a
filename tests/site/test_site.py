"""The site that `make docs` has built: whole, without a network, with every public name and the notebooks' results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ibp_triton as ibp

ROOT = Path(__file__).parents[2]
SITE = ROOT / "site"
PAGES = sorted(SITE.rglob("*.html"))


def test_every_page_of_the_menu_is_there() -> None:
    named = re.findall(r": ([\w/]+)\.(?:md|py)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) > 15
    assert [name for name in named if not (SITE / f"{name}.html").is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(SITE)))
def test_a_page_loads_nothing_from_elsewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//[^>]*>", text) == []
    assert (
        re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preload|preconnect|icon)[^>]*href=\"?(?:https?:)?//[^>]*>", text)
        == []
    )
    for name in re.findall(r"<(?:script|link)[^>]*\s(?:src|href)=\"?([^\"> ]+)", text):
        if "://" not in name and not name.startswith(("/", "data:")):  # the page 404 names the root
            assert (page.parent / name.partition("?")[0].partition("#")[0]).exists(), name


def test_every_public_name_has_its_place_in_the_reference() -> None:
    text = (SITE / "reference.html").read_text(encoding="utf-8")
    assert [name for name in ibp.__all__ if f'id="ibp_triton.{name}"' not in text] == []
    assert 'id="ibp_triton.Network.summary"' in text
    assert "what a sample's penalty counts beside its loss" in " ".join(text.replace("&#39;", "'").split())


@pytest.mark.parametrize(("name", "pictures"), [("pictures", 6), ("resnet", 2)])
def test_the_notebooks_were_executed(name: str, pictures: int) -> None:
    text = (SITE / "notebooks" / f"{name}.html").read_text(encoding="utf-8")
    assert text.count("data:image/png;base64") >= pictures
    assert "Traceback" not in text
    assert "| loss_ibp | fgsm | " in text
