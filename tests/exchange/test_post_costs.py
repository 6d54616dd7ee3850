"""What a post costs the host, in calls: of the driver, of NCCL and of Python. Times need a GPU and a real NCCL."""

import sys
from collections import Counter

import building
import channels
import pytest
import torch
from double import Double

from asyncdiff_fast.exchange.engine import Engine
from asyncdiff_fast.exchange.world import World

# More than the epochs of a slot that may be under way: from then on marks are taken over.
BEFORE, POSTS = 12, 5


@pytest.fixture
def pair():
    path, extension = building.load()
    with Double(path) as gpu:
        ranks = channels.connect(gpu, extension, 2)
        yield gpu, ranks, channels.ring(ranks)


def _all_post(gpu, ranks, slots):
    for r, slot in zip(ranks, slots, strict=True):
        with gpu.rank(r.rank):
            r.post(slot)
    assert gpu.drain() == []


def test_calls_of_the_driver_and_of_nccl(pair):
    gpu, ranks, slots = pair
    for _ in range(BEFORE):
        _all_post(gpu, ranks, slots)
    gpu.calls()
    with gpu.rank(0):
        gpu.calls()
        ranks[0].post(slots[0])
        posted = gpu.calls()
        ranks[0].wait(slots[0])
        waited = gpu.calls()
        # The same stream has waited for all that this could wait for.
        ranks[0].acquire(slots[0])
        acquired = gpu.calls()
    with gpu.rank(1):
        ranks[1].post(slots[1])
    # Of events none is made; the one enquiry is whether the mark that is taken over is free.
    events = {"cuCtxGetCurrent": 1, "cuEventQuery": 1, "cuEventRecord": 2, "cuStreamWaitEvent": 1}
    assert posted == events | {"ncclGroupStart": 1, "ncclSend": 1, "ncclRecv": 1, "ncclGroupEnd": 1}
    assert waited == {"cuCtxGetCurrent": 1, "cuStreamWaitEvent": 1} and acquired == {}
    assert channels.verdict(gpu, ranks) == ([], [], [])


class _Channel:
    """Takes everything."""

    def acquire(self, slot, stream):
        pass

    post = acquire

    def wait(self, slot, stream, lag):
        pass

    def add(self, name, sends, recvs, depth):
        return 0

    def broken(self):
        return None

    def leave(self, reason):
        pass

    def close(self, patience_s):
        pass


def test_calls_of_python(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    engine = Engine(World([0], 10), "nccl", torch.device("cuda", 3), _Channel())
    slot, counts = engine.slot("nothing"), Counter()

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename != __file__:
            counts[frame.f_code.co_name] += 1

    for what in (engine.acquire, engine.post, engine.wait):
        counts.clear()
        sys.setprofile(note)
        try:
            for _ in range(POSTS):
                what(slot)
        finally:
            sys.setprofile(None)
        assert counts == {what.__name__: POSTS, "_stream": POSTS}
    engine.close(0)
