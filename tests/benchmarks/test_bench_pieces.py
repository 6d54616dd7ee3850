"""The benchmark of one rank's pieces, on CPU: what it launches, and what it replays with a stand-in for the capture."""

import json
from pathlib import Path

import pytest
from stand_in_graphs import Tape

from asyncdiff_fast.fused import capture

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def pieces(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import pieces

    return pieces


def _rows(pieces, capsys):
    assert pieces.main(["--device", "cpu", "--model", "tiny", "--rounds", "2", "--kernels", "torch"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_rows_of_both_ways(pieces, capsys, monkeypatch):
    for row in _rows(pieces, capsys):
        assert row["graphs"] == {"captured": 0, "replayed": 0, "refused": ["an argument is on cpu"]}
    monkeypatch.setattr(capture, "CudaGraphs", Tape)
    stages, patches = _rows(pieces, capsys)
    for row, launches in ((stages, 1), (patches, 2)):
        # Beside those that warm up.
        assert row["graphs"] == {"captured": 1, "replayed": pieces.BEFORE - launches + 2, "refused": []}
        assert row["posts"] > 0 and row["waits"] > 0 and row["host_replayed"]["count"] == 2
    assert stages["way"] == "stages" and patches["way"] == "patches"
