"""The tables of the README and of docs/ are what the committed results say."""

import importlib
import pathlib

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def report(monkeypatch):
    """`benchmarks/report.py`, which finds its neighbours on `sys.path`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("report")


def test_pages_have_the_results(report):
    for page in report.pages():
        text = page.read_text()
        assert report.filled(text) == text, f"run `python benchmarks/report.py` and commit {page.name}"


def test_every_table_stands_in_one_page(report):
    found = [mark[1] for page in report.pages() for mark in report.MARK.finditer(page.read_text())]
    assert sorted(found) == sorted(report.MAKERS.keys() | report.NOT_OURS)


def test_a_mark_is_filled_once_it_is_closed(report, monkeypatch):
    monkeypatch.setitem(report.MAKERS, "plans", lambda: "| new |")
    text = "before\n<!-- plans -->\n| old |\n<!-- /plans -->\nafter"
    assert report.filled(text) == text.replace("old", "new")
    with pytest.raises(KeyError):
        report.filled("<!-- nobody -->\n<!-- /nobody -->")


def test_an_aim_without_rows_is_not_measured(report):
    row = report.aims.cells([report.aims.Aim("a", "x=1", "nothing")])[1][0]
    assert row == ["a", "`x=1`", *["not measured"] * 5, "nothing"]


def test_exact_sampling_at_equal_time(report):
    def row(calls, reference="exact@50"):
        return {"latency_calls": calls, "reference": reference}

    tables = report.quality_predict_tables
    rows = {"exact@50": row(50), "exact@20": row(20), "exact@25": row(25), "exact@25/euler": row(25, "exact@25/euler")}
    assert tables.exact_as_long(rows, row(20.5)) == "exact@25"
    assert tables.exact_as_long(rows, row(20)) == "exact@20"
    assert tables.exact_as_long(rows, row(51)) is None
    assert tables.exact_as_long(rows, {}) is None


def test_short_quality_table_has_a_column_for_each_warmup(report):
    names = ("exact@50", "exact@25", "num_stages=2,warmup_steps=1@50", "num_stages=2,warmup_steps=3@50")
    rows = {name: {"psnr_db": {"mean": 30.0 + idx, "worst": 20.0}} for idx, name in enumerate(names)}
    text = report.quality_tables({"title": "Drawn.", "rows": rows})
    assert "| warm-up steps | 1 | 3 |" in text
    assert "| `num_stages=2`, 50 steps | 32.0 (20.0) | 33.0 (20.0) |" in text
    assert "| exact, steps | 50 | 25 |" in text
