"""The README's tables are what the committed results say."""

import importlib
import pathlib
import re

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def report(monkeypatch):
    """`benchmarks/report.py`, which finds its neighbours on `sys.path`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("report")


def test_readme_has_the_results(report):
    assert report.readme() == report.README.read_text(), "run `python benchmarks/report.py` and commit the README"


def test_short_quality_table_has_a_column_for_each_warmup(report):
    names = ("exact@50", "exact@25", "num_stages=2,warmup_steps=1@50", "num_stages=2,warmup_steps=3@50")
    rows = {name: {"psnr_db": {"mean": 30.0 + idx, "worst": 20.0}} for idx, name in enumerate(names)}
    text = report.quality_tables({"title": "Drawn.", "rows": rows})
    assert "| warm-up steps | 1 | 3 |" in text
    assert "| `num_stages=2`, 50 steps | 32.0 (20.0) | 33.0 (20.0) |" in text
    assert "| exact, steps | 50 | 25 |" in text


def test_files_of_the_readme_are_there(report):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", report.README.read_text())
    missing = [link for link in links if not (report.README.parent / link).exists()]
    assert links and not missing
