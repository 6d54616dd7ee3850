"""The benchmark of one device and the script for a GPU machine, as far as they go without one."""

import json
import os
import subprocess
import sys
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
    assert [row["memory_format"] for row in rows] == ["contiguous_format", "channels_last"]
    for row in rows:
        assert row["relative_difference"] == 0, "kernels=torch must leave the model alone"
        assert row["mode"] == "eager" and row["latents"] == [2, 4, 16, 16]
        assert row["unpatched"]["count"] == row["patched"]["count"] == 2
        assert row["unpatched"]["p20_s"] <= row["unpatched"]["median_s"] <= row["unpatched"]["p80_s"]


def _run_on_gpu(*arguments, python=sys.executable):
    script = [str(BENCHMARKS / "run_on_gpu.sh"), *map(str, arguments)]
    return subprocess.run(script, env=os.environ | {"PYTHON": python}, capture_output=True, text=True, timeout=200)


def test_a_failed_part_does_not_end_the_script(tmp_path):
    done = _run_on_gpu("--out", tmp_path, "report", "tests", python="false")
    assert done.returncode == 1
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["report", "FAILED"],
        ["tests_kernels", "FAILED"],
        ["tests_exchange", "FAILED"],
    ]
    assert (tmp_path / "results" / "plans.json").exists() and (tmp_path / "report.log").exists()


def test_an_unknown_part_is_refused(tmp_path):
    done = _run_on_gpu("--out", tmp_path, "everything")
    assert done.returncode == 2 and "PART is one of build, tests" in done.stderr
