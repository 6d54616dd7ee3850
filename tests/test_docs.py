"""The README and the pages of docs/: short where they must be, links that lead somewhere, every option named."""

import dataclasses
import re
from pathlib import Path

import pytest

import asyncdiff_fast

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Outside of code, which may hold brackets too.
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page):
    """The relative links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(CODE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if link.startswith(("https:", "http:", "mailto:")):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not broken(page)


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading: here\n[a](#a-heading-here) [b](#elsewhere) [c](page.md#a-heading-here) [d](gone.md)\n"
    )
    assert broken(page) == ["#elsewhere", "gone.md"]


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    assert not [page.name for page in PAGES if page.name != "README.md" and f"{page.name})" not in text]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_every_option_is_named():
    text = (ROOT / "docs" / "options.md").read_text()
    names = [field.name for field in dataclasses.fields(asyncdiff_fast.Config)]
    assert not [name for name in names if f"| `{name}` |" not in text]
