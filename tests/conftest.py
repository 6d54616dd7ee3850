"""How `pytest -n 3` shares out the tests: one worker has all that start ranks, one has those that mostly wait, and the
third begins with the rest.
"""

import functools
import os
import pathlib
import re

import pytest

# A file that starts ranks says so in its text.
STARTS_RANKS = re.compile(r'^import (?:ranks|workers|shm_ranks|pipelines_to_load|uvicorn)$|"--nproc"', re.M)
# These start none, and compare times.
MEASURES = {"test_bench_exchange.py", "test_connecting.py"}
# These wait for limits of time, more than half of theirs.
WAITS = {"test_lost_peers.py", "test_random_faults.py", "test_two_hosts.py"}

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two cores. Set before torch is imported, and for all that the tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@functools.cache
def _wants_a_core_a_rank(path):
    return path.name in MEASURES or bool(STARTS_RANKS.search(path.read_text()))


# Optional: without pytest-xdist there is no such hook.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Beside a test with ranks runs one of a single process with one thread, and one that waits, never another one with
    ranks that compute.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = config.rootpath / pathlib.Path(nodeid.partition("::")[0])
            if path.name in WAITS:
                return "waits"
            return "ranks" if _wants_a_core_a_rank(path) else nodeid

    return Scheduling(config, log)
