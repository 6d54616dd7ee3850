"""Two workers of pytest-xdist share two cores: one thread each, and only one test with ranks of its own at a time."""

import os
import types

import pytest

# Modules that start ranks; a test file that starts processes otherwise says so by the same mark.
STARTERS = {"ranks", "workers", "shm_ranks"}

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported, and for all that these tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# First, since xdist reads the groups as another hook of this name.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        found = (vars(item.module).get(name) for name in STARTERS)
        if any(isinstance(module, types.ModuleType) for module in found):
            item.add_marker(pytest.mark.xdist_group("ranks"))
