"""This GPU, for choosing between implementations of an op: whether there is one, which, and how long a call takes."""

import functools
import hashlib
import logging
import platform
import statistics
from importlib import metadata, util
from pathlib import Path

import torch

from .. import kernels
from .capture import CudaGraphs

log = logging.getLogger(__name__)
WARMUP, ROUNDS, CALLS = 3, 5, 10
KERNELS = Path(kernels.__file__).parent


def available():
    """True if Triton kernels can be compiled and run here."""
    return torch.cuda.is_available() and util.find_spec("triton") is not None


def environment():
    """Dict, fit for JSON: what times depend on beside the op: device, libraries, launching Python, kernels' sources."""
    versions = {}
    for package in ("torch", "triton", "asyncdiff_fast"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "kernels": _sources(KERNELS),
        **versions,
    }


@functools.cache
def _sources(folder):
    """A digest of the sources in a folder: in a checkout they change more often than the version."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def capturing():
    """True while a CUDA graph is captured: nothing can be measured then."""
    return torch.cuda.is_current_stream_capturing()


def times_us(run, device_idx):
    """(launched, replayed): microseconds of one call of `run` on a device, a median each; None if it cannot run.

    Launched one by one from Python, a small kernel takes as long as its launch; replayed from a CUDA graph, its own
    time. Calls repeat with the same arguments, so what fits stays in the L2 cache, as between the layers of a model.
    """

    def calls():
        # No result is kept: the next one takes its place.
        for _ in range(CALLS):
            run()

    with torch.cuda.device(device_idx):
        try:
            for _ in range(WARMUP):
                run()
            launched = _median_us(calls)
            _captures().tidy()
            replay, _ = _captures().capture(calls)
            return launched, _median_us(replay)
        # Whatever a kernel or its compiler fails with, Triton's own errors among it, another one is there.
        except Exception as error:
            log.info("not usable: %s", str(error).splitlines()[0] if str(error) else type(error).__name__)
            return None


@functools.cache
def _captures():
    """What captures all that is timed: on one stream, for which libraries have workspaces."""
    return CudaGraphs()


def _median_us(calls):
    """Median over rounds of the time of one of the calls that `calls` makes, by events on the current stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    rounds = []
    for _ in range(ROUNDS):
        begin.record()
        calls()
        end.record()
        end.synchronize()
        rounds.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(rounds)
