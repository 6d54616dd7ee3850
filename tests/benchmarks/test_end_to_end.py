"""`benchmarks/end_to_end.py` on two processes: it runs, and its row has what the README says of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "end_to_end.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    # Of a small network's calls more is spent on predictions.
    "model, most",
    [("tiny", 0.9), pytest.param("sd15_width", 0.1, marks=pytest.mark.exhaustive)],
)
def test_two_denoisers_in_turn(model, most):
    options = ["--device", "cpu", "--nproc", "2", "--model", model, "--calls", "2", "--rounds", "1", "--json"]
    pair = ["--options", "num_stages=2,predict=none", "--beside", "num_stages=2,predict=linear"]
    done = subprocess.run([sys.executable, str(BENCHMARK), *options, *pair], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["exchange"] == "shm" and len(first["speedups"]) == 1 and first["call_s"] > 0
    assert first["prediction_share"] == 0 and 0 < second["prediction_share"] < most
    beside = first["beside"]
    assert beside["options"]["predict"] == "linear" and beside["pairs"] == 2
    low, high = beside["call_ratio_95"]
    assert low <= beside["call_ratio"] <= high
