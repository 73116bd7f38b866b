import re

import pytest

from benchmarks import differences
from scripts import hub_walkthrough
from tests.support import ROOT
from tests.support.stand_in_hub import TOKENS


def test_the_comparison_has_every_row_of_the_table_of_differences():
    rows = differences.ROWS
    page = (ROOT / "docs" / "comparison.md").read_text()
    assert len(rows) >= 8
    assert not [what for what in rows if f"| {what} | " not in page]


def walkthrough() -> dict:
    return vars(hub_walkthrough)


def test_the_page_about_the_hub_is_the_walkthroughs():
    page, start = (ROOT / "docs" / "hub.md").read_text(), 0
    for part in re.split(r"(?<!\{)\{\w+\}", walkthrough()["TEXT"]):
        text = part.format()
        start = page.find(text, start)
        assert start >= 0, f"run python -m scripts.hub_walkthrough again: docs/hub.md lacks\n{text}"
        start += len(text)
    assert not [word for word in (*TOKENS, str(ROOT), "/tmp/", "Traceback") if word in page]


def without_versions(page: str) -> str:
    """Without what other machines and versions change: versions, commits of cards that state them, and rounding."""
    page = re.sub(r"Written with [^;]+;", "Written with VERSIONS;", page)
    page = re.sub(r"README\.md, [\d,]+ bytes", "README.md, SIZE bytes", page)
    page = re.sub(r"\b\de-1[456]\b", "ROUNDING", page)
    return re.sub(r"(?<=[@/])[0-9a-f]{40}\b", "COMMIT", page)


@pytest.mark.slow
def test_the_walkthrough_prints_what_the_page_has():
    assert without_versions(walkthrough()["page"]()) == without_versions((ROOT / "docs" / "hub.md").read_text())
