"""What the exchange costs the host, as its benchmark measures it."""

import json
import pathlib
import subprocess
import sys

BENCHMARK = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "bench_exchange.py"


def test_an_exchange_costs_the_host_far_less_than_torchs():
    """Ratios within one run, less than any machine has shown; the committed rows have the times."""
    command = [sys.executable, str(BENCHMARK), "--json", "--only", "host", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["operations"] for row in rows] == [2, 6, 14]
    for row in rows:
        assert row["speedup"] >= 10 and row["ctypes_us"] > row["cycle_us"] > row["post_us"] > 0, row
