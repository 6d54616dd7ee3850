"""Builds of `_C` for tests: its edges can be dropped, and the double of CUDA and NCCL lies beside it."""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Which sanitizers tests run with: set by test_sanitizers.py for the tests that it runs.
SANITIZE_VARIABLE = "ADF_TEST_SANITIZE"
SOURCES = ("CMakeLists.txt", "csrc/*", "tests/fake_gpu/*")


def _digest(options):
    found = hashlib.sha256(repr((sys.executable, options)).encode())
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def _tool(name):
    """A program of this environment, else of the system."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


def _run(*command):
    # A sanitizer that is loaded before this process is not meant for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


@functools.cache
def build(sanitize=None):
    """(double, extension): paths of libfake_gpu.so and of `_C` with droppable edges.

    Args:
        sanitize: what -fsanitize takes, "thread" say; default: as SANITIZE_VARIABLE says.
    """
    sanitize = os.environ.get(SANITIZE_VARIABLE, "") if sanitize is None else sanitize
    folder = ROOT / "build" / "-".join(["tests", *filter(None, sanitize.split(","))])
    folder.mkdir(parents=True, exist_ok=True)
    import pybind11

    options = [
        "-DCMAKE_BUILD_TYPE=Debug",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DADF_MUTANTS=ON",
        "-DADF_FAKE_GPU=ON",
        f"-DADF_SANITIZE={sanitize}",
    ]
    if _tool("ninja"):
        options += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"]
    stamp, digest = folder / "digest", _digest(options)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != digest:
            _run(_tool("cmake"), "-S", str(ROOT), "-B", str(folder), *options)
            _run(_tool("cmake"), "--build", str(folder), "--parallel", str(os.cpu_count()))
            stamp.write_text(digest)
    (double,) = folder.rglob("libfake_gpu.so")
    (extension,) = folder.rglob(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
    return double, extension


def repeats(count, sanitized):
    """How often to repeat a case: `count` times, or `sanitized` times under a sanitizer, which slows all down."""
    return sanitized if os.environ.get(SANITIZE_VARIABLE) else count


@functools.cache
def load(sanitize=None):
    """(path of the double, the module `_C` with droppable edges); see `build`."""
    double, extension = build(sanitize)
    spec = importlib.util.spec_from_file_location("_C", extension)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return double, module
