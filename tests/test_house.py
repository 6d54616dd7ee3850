"""The walls of the package: imports run downwards, and the linter sees it when one does not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import asyncdiff_fast

ROOT = Path(__file__).resolve().parents[1]


def lint(folder):
    """(exit code, output) of import-linter on a checkout."""
    command = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(folder)}
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path):
    for name in ("asyncdiff_fast", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_run_downwards(checkout):
    code, output = lint(checkout)
    assert code == 0, output


@pytest.mark.parametrize(
    "file, line",
    [
        ("asyncdiff_fast/tracing/trace.py", "from ..patches import layout"),
        ("asyncdiff_fast/stages/calls.py", "from ..patches import layout"),
        ("asyncdiff_fast/exchange/slots.py", "from ..patching import patch"),
        ("asyncdiff_fast/stages/division.py", "import diffusers"),
        ("kernels/halo.py", "from asyncdiff_fast.mesh import Mesh"),
    ],
)
def test_an_import_upwards_is_seen(checkout, file, line):
    path = checkout / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    code, output = lint(checkout)
    assert code == 1 and "broken" in output, output


def test_public_names_stay():
    names = [
        "Cancelled", "Config", "ExchangeError", "Workers", "__version__", "device", "load", "patch", "plan",
        "profile", "sample_window", "unpatch",
    ]  # fmt: skip
    assert sorted(asyncdiff_fast.__all__) == names
    assert all(getattr(asyncdiff_fast, name) is not None for name in names)
    fields = {
        "num_stages", "stride", "warmup_steps", "time_shift", "num_patches", "cfg_parallel", "exchange", "group_norm",
        "bessel", "patch_axis", "stages", "stride_phase", "balance", "timeout_s", "kernels", "predict", "tolerance",
        "resync", "pipeline_patches", "pipeline_text", "shard_weights",
    }  # fmt: skip
    assert fields <= set(asyncdiff_fast.Config.__dataclass_fields__)
