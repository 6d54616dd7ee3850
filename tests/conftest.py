"""How `pytest -n 3` shares out the tests: two workers have those that start ranks, one those that mostly wait; whoever
is done first takes of the rest.
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
# Of those that start ranks about half, by time: the wings that carry out, and all else, which starts whole pipelines.
WINGS = {"calls", "exchange", "golden", "halves", "patches", "pipelined", "prediction", "stages", "steps", "tracing"}

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two cores. Set before torch is imported, and for all that the tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@functools.cache
def _wants_a_core_a_rank(path):
    return path.name in MEASURES or bool(STARTS_RANKS.search(path.read_text()))


# Optional: without pytest-xdist there is no such hook.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Never more than two tests with ranks that compute run beside each other; their imports and waits overlap so."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = config.rootpath / pathlib.Path(nodeid.partition("::")[0])
            if path.name in WAITS:
                return "waits"
            if not _wants_a_core_a_rank(path):
                return nodeid
            return "ranks" if path.parent.name in WINGS or path.name in MEASURES else "pipelines"

    return Scheduling(config, log)
