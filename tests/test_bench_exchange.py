"""What the exchange costs the host, as its benchmark measures it, with generous limits."""

import json
import pathlib
import subprocess
import sys

BENCHMARK = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "bench_exchange.py"


def test_a_post_costs_less_than_two_microseconds():
    command = [sys.executable, str(BENCHMARK), "--json", "--only", "host", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["operations"] for row in rows] == [2, 6, 14]
    for row in rows:
        assert row["post_us"] <= 2 and row["cycle_us"] <= 5 and row["speedup"] >= 10, row
        assert row["ctypes_us"] > row["cycle_us"]
