"""The run on a GPU machine: its stages, deadline, summary and pack, and a rehearsal of its beginning on the CPU."""

import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def staged(monkeypatch, tmp_path):
    """A function that runs stages, given as {name: (command, limit)}, in a folder of its own."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_stages

    monkeypatch.setattr(gpu_stages, "WORK", tmp_path / "work")
    monkeypatch.setenv("COMMIT", "abc")

    def run(commands, *arguments):
        made = [
            gpu_stages.Stage(name, 1, limit, {name: [sys.executable, "-c", command]}, vital=name == "vital")
            for name, (command, limit) in commands.items()
        ]
        monkeypatch.setattr(gpu_stages, "stages", lambda options: made)
        code = gpu_stages.main(["--out", str(tmp_path / "out"), *arguments])
        return code, (tmp_path / "out" / "summary.txt").read_text()

    return run


def test_what_fails_or_hangs_keeps_nothing_else_from_running(staged, tmp_path):
    began = time.monotonic()
    hangs = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    commands = {
        "raises": ("raise ValueError('it rains')", 9),
        "hangs": (hangs, 1),
        "works": ("print('OK it works')", 9),
    }
    code, summary = staged(commands)
    assert code == 1 and time.monotonic() - began < 15
    assert "ValueError: it rains" in summary and "FAIL hangs: took too long" in summary and "OK it works" in summary
    assert [line.split()[:2] for line in summary.splitlines() if " s of " in line] == [
        ["raises", "FAIL"], ["hangs", "FAIL"], ["works", "ok"],
    ]  # fmt: skip
    with tarfile.open(tmp_path / "out" / "run.tar.gz") as archive:
        assert {"logs/raises.log", "logs/works.log"} <= set(archive.getnames())


def test_what_is_done_is_not_done_again(staged):
    commands = {"works": ("print('OK once')", 9), "raises": ("raise ValueError", 9)}
    staged(commands)
    _, summary = staged(commands)
    assert summary.count("OK once") == 1 and summary.count("FAIL raises") == 2
    _, summary = staged(commands, "works")
    assert summary.count("OK once") == 2, "what is named is run"


def test_what_was_done_of_other_sources_is_done_again(staged, monkeypatch):
    for sources in ("1", "2", "2"):
        monkeypatch.setenv("SOURCES", sources)
        _, summary = staged({"works": ("print('OK once')", 9)})
    assert summary.count("OK once") == 2


def test_what_is_installed_of_other_sources_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_build

    package = tmp_path / "asyncdiff_fast"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(gpu_build.ROOT / "asyncdiff_fast", package, ignore=ignored)
    shutil.copytree(gpu_build.ROOT / "kernels", package / "kernels", ignore=ignored)
    assert gpu_build.is_of_checkout(package)
    (package / "kernels" / "plans.py").write_text("KEPT = 1")
    assert not gpu_build.is_of_checkout(package)


def test_no_stage_is_begun_that_does_not_fit(staged):
    code, summary = staged({"works": ("print('OK once')", 9)}, "--seconds", "8.5")
    assert code == 1 and "left out: 0 s are left, it takes 1" in summary


def test_nothing_follows_where_the_first_look_fails(staged):
    code, summary = staged({"vital": ("raise ImportError", 9), "works": ("print('OK once')", 9)})
    assert code == 1 and "nothing follows" in summary and "OK once" not in summary


def _run_on_gpu(tmp_path, *arguments):
    script = [str(BENCHMARKS / "run_on_gpu.sh"), "--out", str(tmp_path), *arguments]
    return subprocess.run(
        script, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=280
    )


def test_an_unknown_stage_is_refused(tmp_path):
    done = _run_on_gpu(tmp_path, "everything")
    assert done.returncode == 2 and "no stage is called everything; there are build, facts, smoke" in done.stderr


@pytest.mark.slow
def test_a_rehearsal_looks_at_everything_first(tmp_path):
    done = _run_on_gpu(tmp_path, "--rehearse", "facts", "smoke", "exchange")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert [line[0] for line in lines if line[1:2] == ["ok"]] == ["facts", "smoke", "exchange"]
    checks = ["machine", "ceilings", "group_norm", "patch_group_norm", "attention", "geglu", "tiny_unet", "tiny_patch"]
    assert [line[1] for line in lines if line[0] == "OK"] == checks
