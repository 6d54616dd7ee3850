"""What captures on a GPU keeps to the rules of torch's graphs: memory, streams, and captures that are broken off."""

import contextlib

import pytest
import torch_graphs

from asyncdiff_fast.fused import timing
from asyncdiff_fast.fused.capture import CudaGraphs


@pytest.fixture
def gpu(monkeypatch):
    found = torch_graphs.TorchGraphs()
    found.install(monkeypatch)
    return found


def _pieces(captures, gpu, *launches):
    """Captures a call with so many launches in each piece; what is between them is noted among the replays."""

    def call():
        for number, count in enumerate(launches):
            if number:
                captures.outside(gpu.replays.append, f"after {number}")
            gpu.work(count)

    return captures.capture(call)[0]


def test_pieces_are_replayed_with_what_is_between_them(gpu):
    replay = _pieces(CudaGraphs(), gpu, 3, 0, 2, 0)
    assert gpu.replays == []
    replay()
    assert gpu.replays == [3, "after 1", "after 2", 2, "after 3"]


def test_a_call_may_begin_with_nothing(gpu):
    """A pool is not to be without a graph between two pieces."""
    replay = _pieces(CudaGraphs(), gpu, 0, 0, 2)
    replay()
    assert gpu.replays == ["after 1", "after 2", 2] and gpu.uses == 1


def test_pieces_are_captured_while_a_receive_is_under_way(gpu):
    """Ranks that capture at the same call would wait for each other's sends, which come with the replay."""
    gpu.receiving = True
    captures = CudaGraphs()
    _pieces(captures, gpu, 1, 2)()
    assert gpu.replays == [1, "after 1", 2]
    with pytest.raises(TimeoutError):
        captures.tidy()


def test_all_captures_are_on_one_stream(gpu):
    """Memory of one pool is used again on the stream alone on which it was allocated."""
    captures = CudaGraphs()
    kept = [_pieces(captures, gpu, 1, 1) for _ in range(3)]
    assert len(kept) == 3 and len(gpu.streams) == 6 and len(set(gpu.streams)) == 1


def test_graphs_are_captured_after_all_were_forgotten(gpu):
    """What a library keeps of a stream lies in the pool too, which so outlives its graphs, and takes no others."""
    captures = CudaGraphs()
    replay = _pieces(captures, gpu, 1)
    gpu.held.update(gpu._uses)
    del replay
    assert gpu.uses == 0
    _pieces(captures, gpu, 1)()
    assert gpu.replays == [1]


@pytest.mark.parametrize("pieces_before", [0, 1])
def test_a_broken_capture_leaves_nothing_behind(gpu, pieces_before):
    captures = CudaGraphs()

    def call():
        for _ in range(pieces_before):
            gpu.work(1)
            captures.outside(print)
        gpu.wait()

    kept = _pieces(captures, gpu, 1)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        captures.capture(call)
    gpu.draw()
    gpu.empty_cache()
    assert gpu.uses == 1
    kept()
    _pieces(captures, gpu, 2)()
    assert gpu.replays == [1, 2]


def test_a_broken_capture_is_none_whoever_overlooks_it(gpu):
    captures = CudaGraphs()

    def call():
        with contextlib.suppress(RuntimeError):
            gpu.wait()
        for _ in range(2):
            with contextlib.suppress(RuntimeError):
                captures.outside(print)

    with pytest.raises(RuntimeError, match="a piece before this one could not be captured"):
        captures.capture(call)


def test_an_implementation_that_cannot_be_captured_is_none(gpu, monkeypatch):
    monkeypatch.setattr(timing, "_median_us", lambda calls: 1.0)
    monkeypatch.setattr(timing.torch.cuda, "device", gpu.stream)
    timing._captures.cache_clear()

    def run():
        if gpu._graph is not None:
            gpu.wait()

    assert timing.times_us(run, 0) is None
    gpu.draw()
    gpu.empty_cache()
    assert timing.times_us(lambda: gpu._graph and gpu.work(1), 0) == (1.0, 1.0)
    timing._captures.cache_clear()
