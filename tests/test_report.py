"""The README's tables are what the committed results say."""

import pathlib
import sys

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def test_readme_has_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("measure", "report"):
        sys.modules.pop(name, None)
    import report

    assert report.readme() == report.README.read_text(), "run `python benchmarks/report.py` and commit the README"


def test_files_of_the_readme_are_there():
    import re

    readme = (BENCHMARKS.parent / "README.md").read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", readme)
    missing = [link for link in links if not (BENCHMARKS.parent / link).exists()]
    assert links and not missing
