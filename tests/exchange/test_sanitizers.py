"""The C++ tests once more, on builds with sanitizers."""

import os
import subprocess
import sys
from pathlib import Path

import building
import pytest

# Files that import neither torch nor the package, so that a sanitizer sees our code alone.
TORCH_FREE = (
    "test_fake_gpu.py",
    "test_fake_nccl.py",
    "test_hazards.py",
    "test_mutants.py",
    "test_hazard_properties.py",
    "test_nccl_connecting.py",
    "test_engine_shm.py",
    "test_engine_failures.py",
)
# What must be loaded before Python, and what a sanitizer is told. Python itself never frees all it allocates.
SANITIZERS = {
    "thread": (["libtsan.so"], {"TSAN_OPTIONS": "halt_on_error=0 exitcode=66"}),
    "address,undefined": (
        ["libasan.so", "libubsan.so", "libstdc++.so"],
        {
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1 halt_on_error=1",
        },
    ),
}


def _library(name):
    """Full path of one of the compiler's libraries."""
    found = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"the compiler has no {name}")
    return str(path.resolve())


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_clean(sanitizer):
    libraries, options = SANITIZERS[sanitizer]
    preload = " ".join(map(_library, libraries))
    building.build(sanitizer)
    tests = [str(Path(__file__).with_name(name)) for name in TORCH_FREE]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", "--timeout", "600", *tests]
    environment = os.environ | options | {"LD_PRELOAD": preload, building.SANITIZE_VARIABLE: sanitizer}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=building.ROOT)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-20_000:]
    assert "Sanitizer" not in output and "runtime error" not in output, output[-20_000:]
    assert " passed" in done.stdout and " failed" not in done.stdout
