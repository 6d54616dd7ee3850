"""What four ranks hold of a denoiser that one process with as much memory cannot load: the benchmark, but smaller."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
# What code, slots and activations take that are used for the first time.
REST_BYTES = 120 << 20


@pytest.mark.slow
def test_four_ranks_run_what_one_cannot_load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    memory = importlib.import_module("memory")
    command = [sys.executable, BENCHMARKS / "memory.py", "--layers", "12", "--ranks", "4", "--json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    free, alone, limited = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    # Python's own or torch's, which says what it "can't allocate".
    assert (
        any(word in alone["ranks"][0]["refused"] for word in ("allocate", "MemoryError"))
        and alone["limit"] == limited["limit"] < alone["weights"]
    )
    for row in (free, limited):
        assert row["nproc"] == len(row["ranks"]) == 4
        first = row["ranks"][0]
        for rank in row["ranks"]:
            assert rank["held"] <= row["weights"] / 4 + first["unit"] + first["glue"]
            assert rank["peak"] <= rank["held"] + first["unit"] + REST_BYTES
    header, body = memory.cells([free, alone, limited])
    assert len(body) == 3 and "cannot load" in body[1] and all(len(line) == len(header) for line in body)
