"""The benchmark of one device, as far as it goes without a GPU."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def single_device(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import single_device

    return single_device


def test_tiny_rows(single_device, capsys):
    assert single_device.main(["--device", "cpu", "--tiny", "--kernels", "torch"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    formats = ("contiguous_format", "channels_last")
    modes = ("eager", "graphs=True")
    assert [(row["memory_format"], row["mode"]) for row in rows] == [(f, mode) for f in formats for mode in modes]
    for row in rows:
        assert row["relative_difference"] == 0, "kernels=torch must leave the model alone"
        assert row["latents"] == [2, 4, 16, 16]
        assert row["unpatched"]["count"] == row["patched"]["count"] == 2
        assert row["unpatched"]["p20_s"] <= row["unpatched"]["median_s"] <= row["unpatched"]["p80_s"]


def test_rows_without_one_thing(single_device, capsys):
    argv = ["--device", "cpu", "--tiny", "--formats", "contiguous_format", "--without", "text", "geglu"]
    assert single_device.main(argv) == 0
    told = capsys.readouterr()
    rows = [json.loads(line) for line in told.out.splitlines()]
    assert [row.get("without") for row in rows] == [None, None, "text", "geglu"]
    assert "graphs=True without geglu kernels=auto" in told.err


def test_a_case_that_fails_costs_no_other(single_device, monkeypatch, capsys):
    patch = single_device.asyncdiff_fast.patch

    def fails_once(denoiser, **options):
        monkeypatch.setattr(single_device.asyncdiff_fast, "patch", patch)
        raise RuntimeError("it rains")

    monkeypatch.setattr(single_device.asyncdiff_fast, "patch", fails_once)
    assert single_device.main(["--device", "cpu", "--tiny", "--kernels", "torch"]) == 1
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 2 and told.err.startswith("FAILED") and "it rains" in told.err
    assert "ROW tiny channels_last default no eager kernels=torch" in told.err
