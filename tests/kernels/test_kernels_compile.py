"""Every kernel compiles for every target without spills, within shared memory, with wide accesses; none uses what is
banned."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from sequences import quick

ROOT = pathlib.Path(__file__).parents[2]
SHARED_BYTES = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
# A few for each of five per-channel vectors; a tile without wide loads takes more.
NARROW_LOADS = 24
IN_FLIGHT = 4
BANNED = ("tl.atomic_", "make_block_ptr", "warp_specialize", "triton.autotune", "triton.heuristics")


# Beside the version in the environment, the oldest that machines with a GPU come with.
OLDER_TRITON = "3.6.0"


def _compile(target, path=None):
    """What a process of its own prints, since the driver is replaced there; `path`: where it finds Triton first."""
    environment = {"TRITON_CACHE_DIR": str(ROOT / "build" / "triton"), **os.environ}
    if path is not None:
        environment |= {"TRITON_CACHE_DIR": str(path / "cache"), "PYTHONPATH": str(path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, ROOT / "tests" / "support" / "compile_kernels.py", target]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def faults(row, target):
    """What is wrong with one compiled kernel, in words."""
    if row["stack"] or row["spills"]:
        yield f"{row['stack']} bytes of stack and {row['spills']} spills at {row['registers']} registers"
    if row["shared"] > SHARED_BYTES[target]:
        yield f"{row['shared']} bytes of shared memory, more than {SHARED_BYTES[target]}"
    # AMD's matrix cores leave four values of a row to a lane: 8 bytes in half precision.
    by_eight = target == "gfx942" and row["kernel"] == "_attention_kernel"
    stores = row["wide_stores"] or row["kernel"] == "_partials_kernel" or by_eight
    narrow = row["narrow_stores"] or row["narrow_loads"] > NARROW_LOADS
    if row["wide"] and (narrow or not row["wide_loads"] or not stores):
        yield "accesses not wide: " + ", ".join(f"{row[key]} {key}" for key in row if "loads" in key or "stores" in key)
    if row["many"] and row["in_flight"] is not None and row["in_flight"] < IN_FLIGHT:
        yield f"{row['in_flight']} loads in flight, fewer than {IN_FLIGHT}"
    if row["must_use_tensor_core"] and not row["tensor_core"]:
        yield "no tensor-core instruction"
    if row["beside"] and not row["products_beside"]:
        yield "every product is waited for before the exponentials"
    if row["misread"]:
        yield f"products that read by no descriptor, at {', '.join(map(hex, row['misread']))}"


def _check(result, target):
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows
    found = [f"{row['variant']}, {row['kernel']}: {fault}" for row in rows for fault in faults(row, target)]
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", quick([(target,) for target in SHARED_BYTES], ("sm_90",)))
def test_compiles(target):
    _check(_compile(target), target)


def _older_triton():
    """The folder of an older Triton. Skips the test where it cannot be had."""
    folder = ROOT / "build" / f"triton-{OLDER_TRITON}"
    if not (folder / "triton").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
        done = subprocess.run([*command, f"triton=={OLDER_TRITON}"], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            pytest.skip(f"Triton {OLDER_TRITON} cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    return folder


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_compiles_with_an_older_triton():
    folder = _older_triton()
    command = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    found = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True)
    assert found.stdout.strip() == OLDER_TRITON, found.stderr
    _check(_compile("sm_90", folder), "sm_90")


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_nothing_banned(path):
    text = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
    assert not [word for word in BANNED if word in text]


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_every_masked_load_says_what_else(path):
    """A masked load without `other` leaves garbage that the interpreter does not show."""
    for call in re.findall(r"tl\.load\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)", path.read_text()):
        assert "mask=" not in call or "other=" in call, call
