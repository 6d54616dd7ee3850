"""Pieces of captured calls on the double of CUDA and NCCL: what is between them keeps every edge of a launched call.

A piece is the list of kernels that a call queues; its replay queues them again, on the same memory.
"""

import contextlib
import functools

import building
import channels
import pytest
from double import Double

from asyncdiff_fast.fused.capture import Capture

CALLS = 7


class Queued(Capture):
    """Captures what `kernel` queues."""

    def __init__(self, gpu, stream):
        super().__init__()
        self._gpu, self._stream, self._piece = gpu, stream, None

    def around(self):
        return contextlib.nullcontext()

    def begin(self):
        self._piece = []

    def end(self):
        piece, self._piece = self._piece, None
        return functools.partial(self._replay, piece) if piece else None

    def kernel(self, name, reads=(), writes=()):
        if self._piece is None:
            self._gpu.kernel(self._stream, name, reads, writes)
        else:
            self._piece.append((name, reads, writes))

    def _replay(self, piece):
        for kernel in piece:
            self._gpu.kernel(self._stream, *kernel)


class Stage:
    """One rank: makes something, sends it, reads what came in the call before, and writes where that lay."""

    def __init__(self, gpu, rank, slot, hold):
        self.gpu, self.rank, self.slot, self.hold = gpu, rank, slot, hold
        self.capture, self.epoch = Queued(gpu, rank.compute), 0
        memory = functools.partial(gpu.memory, 64)
        self.made, self.held = memory(f"device {rank.rank} made"), memory(f"device {rank.rank} held")

    def call(self):
        """As a stage's: what is not held is read from the buffer whose turn it is as the call is captured."""
        place = self.held if self.hold else self._buffers()[(self.epoch - 1) % self.slot.depth]
        self.capture.kernel("make", writes=[self.made.part()])
        self.capture.outside(self._send)
        self.capture.kernel("go on", reads=[self.made.part()])
        self.capture.outside(self._arrive)
        self.capture.kernel("read", reads=[place.part()])

    def _buffers(self):
        return self.slot.recv[1 - self.rank.rank]

    def _send(self):
        self.rank.acquire(self.slot)
        self.rank.produce(self.slot)
        self.rank.post(self.slot)
        self.epoch += 1

    def _arrive(self):
        # This call's was posted: what is read came in the one before.
        self.rank.wait(self.slot, 1)
        reads = self.rank.expected(self.slot, 1)
        if self.hold and reads:
            self.gpu.kernel(self.rank.compute, "hold", reads=reads, writes=[self.held.part()])


def _replayed(hold, seed):
    path, extension = building.load()
    with Double(path, 300, seed) as gpu:
        ranks = channels.connect(gpu, extension, 2)
        slots = channels.ring(ranks)
        stages = [Stage(gpu, rank, slot, hold) for rank, slot in zip(ranks, slots, strict=True)]
        for stage in stages:
            with gpu.rank(stage.rank.rank):
                stage.call()
        with contextlib.ExitStack() as stack:
            replays = []
            for stage in stages:
                stack.enter_context(gpu.rank(stage.rank.rank))
                replays.append(stage.capture.capture(stage.call)[0])
        assert all(stage.epoch == 1 for stage in stages), "nothing is posted while a call is captured"
        for _ in range(CALLS):
            for stage, replay in zip(stages, replays, strict=True):
                with gpu.rank(stage.rank.rank):
                    replay()
        return channels.verdict(gpu, ranks)


@pytest.mark.parametrize("seed", [1, 2])
def test_replayed_pieces_are_ordered_as_launched_calls_are(seed):
    assert _replayed(True, seed) == ([], [], [])


def test_a_piece_that_reads_a_buffer_whose_turn_it_was_is_seen():
    """Every other replay reads what the next exchange writes: so what is received is held, or has a graph a turn."""
    stuck, races, _ = _replayed(False, 1)
    assert not stuck and channels.kinds(races)
