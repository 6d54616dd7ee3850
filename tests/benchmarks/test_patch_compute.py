"""The benchmark of what one of several ranks computes, on CPU; its kernels in `tests/interpreter`."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def patch_compute(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import patch_compute

    return patch_compute


def test_rows_of_a_tiny_denoiser(patch_compute, capsys):
    options = ["--device", "cpu", "--model", "tiny", "--patches", "1", "2", "--rounds", "2"]
    assert patch_compute.main(options) == 0
    whole, half = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert whole["speedup"] == 1 and half["patches"] == 2 and half["sent_bytes"] > 0
    assert not half["kernels"]["active"], "there is no GPU to choose kernels for"
