"""How long an implementation of an op takes on this GPU, for choosing between implementations."""

import logging
import statistics

import torch

log = logging.getLogger(__name__)
WARMUP, ROUNDS, CALLS = 3, 5, 10


def times_us(run):
    """(launched, replayed): microseconds of one call of `run`, a median each; None if it cannot run.

    Launched one by one from Python, a small kernel takes as long as its launch; replayed from a CUDA graph, its own
    time. Calls repeat with the same arguments, so what fits stays in the L2 cache, as between the layers of a model.
    """
    try:
        for _ in range(WARMUP):
            run()
        launched = _median_us(lambda: [run() for _ in range(CALLS)])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                run()
        return launched, _median_us(graph.replay)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        log.info("not usable: %s", str(error).splitlines()[0] if str(error) else type(error).__name__)
        return None


def _median_us(calls):
    """Median over rounds of the time of one of the calls that `calls` makes, by events on the current stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(ROUNDS):
        begin.record()
        calls()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(seconds)
