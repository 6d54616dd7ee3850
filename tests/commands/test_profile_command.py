"""`asyncdiff-fast profile` on the small pipeline, as a user runs it."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_profile_shows_both_processes(tmp_path):
    command = [sys.executable, "-m", "asyncdiff_fast.commands.cli", "profile"]
    arguments = ["--nproc", "2", "--num-stages", "2", "--steps", "8", "--out", str(tmp_path)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "largest waits" in done.stdout and "step.png" in done.stdout
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert names == {"rank 0, host", "rank 1, host"}
    # Warm-up is exact; the other four steps count.
    assert [r["steps"] for r in json.loads((tmp_path / "profile.json").read_text())["ranks"]] == [4, 4]
    assert (tmp_path / "step.png").stat().st_size > 0
