"""The README and the pages of docs/: short where they must be; links, files and commands that exist; all options."""

import collections
import dataclasses
import fnmatch
import re
import shlex
from pathlib import Path

import pytest

import asyncdiff_fast
from asyncdiff_fast.commands.arguments import parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Outside of code, which may hold brackets too.
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w./*-]+(?:\.(?:py|md|sh|cpp|hpp|txt|toml|jsonl)|/)")
# What users write, and what must not be there; what commands write lies in a folder of theirs.
NAMED_ONLY = {"script.py", "bench_NAME.py", "conftest.py", "tests/__init__.py", "profile.txt"}


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


def missing(page):
    """Files and folders of this repository that a page names, and that are not there."""
    text = page.read_text()
    words = {word for span in SPAN.findall(text) for word in span.split()}
    words |= set(re.findall(r"python ((?:benchmarks|examples)/\w+\.py)", text))
    named = {word for word in words if FILE.fullmatch(word) and not word.startswith(("out/", "_"))}
    return sorted(n for n in named if Path(n).name not in NAMED_ONLY and n not in NAMED_ONLY and not _is_there(n))


def _is_there(name):
    """A path from the root or within a folder of the package, as pages shorten it."""
    places = (
        ROOT,
        *(ROOT / part for part in ("asyncdiff_fast", "kernels", "csrc", "benchmarks", "docs", "tests/support")),
    )
    found = any(next(place.glob(name.rstrip("/")), None) for place in places)
    return found or bool("/" not in name and next((ROOT / "asyncdiff_fast").rglob(name), None))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    assert not missing(page)


def test_a_file_that_does_not_exist_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("`patching.py` `gone.py` `steps/` `wing/` `out/tune.md`; `python benchmarks/gone.py --save`\n")
    assert missing(page) == ["benchmarks/gone.py", "gone.py", "wing/"]


def test_the_map_names_every_file_and_wing():
    """CONTRIBUTING.md: the files and wings of the package, of csrc/ and of kernels/."""
    spans = set(SPAN.findall((ROOT / "CONTRIBUTING.md").read_text()))
    package = ROOT / "asyncdiff_fast"
    wings = [f"{place.parent.name}/" for place in package.glob("*/__init__.py")]
    files = [place for folder in (package, ROOT / "kernels") for place in folder.glob("*.py")]
    names = [*wings, *(place.name for place in (*files, *(ROOT / "csrc").iterdir()) if place.name != "__init__.py")]
    # "_merge.py" after "group_norm_stats.py".
    known = [f"*{span}" if span.startswith("_") else span for span in spans]
    assert not [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in known)]


def commands(page):
    """The command lines of asyncdiff-fast in a page's blocks of code."""
    blocks = re.findall(r"```.*?\n(.*?)```", page.read_text(), re.DOTALL)
    return re.findall(r"^(?:\$ )?asyncdiff-fast (.+)$", "\n".join(blocks), re.MULTILINE)


def test_commands_are_understood():
    whole, lines = parser(collections.defaultdict(str)), [line for page in PAGES for line in commands(page)]
    assert len(lines) > 8
    for line in lines:
        whole.parse_args(shlex.split(line, comments=True))
