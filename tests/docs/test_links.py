"""Relative links of all pages lead to a file that is there, and to a heading in it."""

import re
from functools import cache
from pathlib import Path

import pytest

from tests.support import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "tests" / "golden" / "README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", re.MULTILINE)
ADDRESS = re.compile(r"[a-z]+:")


def prose(text: str) -> str:
    """The text without its blocks of code, in which brackets are no links and # is no heading."""
    return re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def broken(page: Path, text: str) -> list[str]:
    links = [first or second for first, second in LINK.findall(prose(text))]
    found = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if ADDRESS.match(link):
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(page: Path):
    assert not broken(page, page.read_text(encoding="utf-8"))


def test_a_broken_link_is_found():
    here = ROOT / "README.md"
    assert broken(here, "[a](nowhere.md) [b](docs/agc.md) [c](docs/agc.md#nothing-like-it)") == [
        "nowhere.md",
        "docs/agc.md#nothing-like-it",
    ]


def test_every_picture_has_a_text_in_its_place():
    assert not [page for page in PAGES if re.search(r"!\[\s*\]\(", page.read_text())]


def test_the_readme_is_read_in_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120, (
        "details belong on a page of docs/"
    )


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if f": {page}\n" not in navigation], "give it a line under nav: in mkdocs.yml"
