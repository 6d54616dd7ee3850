"""The recorder itself; and a layer of a patch-parallel model as one would be written: one buffer, posted after use."""

import building
import pytest
import torch
from recorder import Recorder
from replay import replay, unordered

from asyncdiff_fast.exchange.choice import Recv, Send, Slot

ROWS, CHANNELS, STEPS = 4, 8, 4


class Silent:
    """An exchange that carries nothing: the record is all that is wanted of it."""

    def slot(self, name, sends=(), recvs=(), depth=2):
        return Slot(name, tuple(sends), tuple(recvs), depth, -1)

    def freeze(self, phase, order=None):
        pass

    def acquire(self, slot):
        pass

    def post(self, slot):
        pass

    def wait(self, slot, lag=0):
        pass

    def drain(self, phases=None):
        pass

    def release(self, phase):
        self.drain({phase})


def _attention_layer(rank, size, early):
    """One rank's program of a layer with a ring: its own rows written in place, the others' received in place."""
    recorder, exchange = Recorder(), Silent()
    recorder.attach(exchange)
    ring = torch.zeros(size, ROWS, CHANNELS)
    others = [peer for peer in range(size) if peer != rank]
    sends, recvs = [Send(p, (ring[rank],)) for p in others], [Recv(p, (ring[p],)) for p in others]
    slot = exchange.slot("ring", sends, recvs, depth=1)
    exchange.freeze("layer")
    with recorder:
        for step in range(STEPS):
            exchange.acquire(slot)
            ring[rank].copy_(torch.full((ROWS, CHANNELS), float(step)))
            exchange.wait(slot)
            if early:
                exchange.post(slot)
            torch.softmax(ring.view(-1, CHANNELS) @ ring.view(-1, CHANNELS).T, -1)
            if not early:
                exchange.post(slot)
    return recorder.record()


@pytest.mark.parametrize("early", [False, True])
def test_a_ring_is_posted_after_its_reader(early):
    programs = [_attention_layer(rank, 3, early) for rank in range(3)]
    stuck, races, errors = replay(*building.load(), programs)
    assert stuck == [] and errors == []
    assert bool(races) == any(unordered(program) for program in programs) == early
    for race in races:
        assert {"recv", "aten.mm.default"} <= {race.first.split()[2], race.second.split()[2]}, race


def test_a_wait_left_out_is_refused_or_races():
    """With one buffer the channel notices by itself: it was not waited for before it was posted again."""
    programs = [_attention_layer(rank, 2, early=False) for rank in range(2)]
    waits = [i for i, (kind, *_) in enumerate(programs[1][1]) if kind == "wait"]
    refused = []
    for i in waits[1:]:
        _, races, errors = replay(*building.load(), programs, without=(1, i))
        assert races or errors
        refused += errors
    assert any("depth 1" in error for error in refused)


def test_kernels_are_recorded_by_the_bytes_they_touch():
    recorder, exchange = Recorder(), Silent()
    recorder.attach(exchange)
    x = torch.zeros(4, 6)
    exchange.slot("x", [Send(1, (x[0], x[1]))])
    elsewhere = torch.zeros(4, 6)
    with recorder:
        x[:, 2:4].add_(1)
        x.t()[5].sum()
        torch.add(elsewhere, 1, out=elsewhere)
        elsewhere.copy_(x.expand(4, 6))
        x.view(24).narrow(0, 3, 2).zero_()
    kernels = [event[1:] for event in recorder.events if event[0] == "kernel"]
    assert kernels == [
        ("aten.add_.Tensor", [], [(0, row * 24 + 8, 8) for row in range(4)]),
        ("aten.sum.default", [(0, row * 24 + 20, 4) for row in range(4)], []),
        ("aten.copy_.default", [(0, 0, 96)], []),
        ("aten.zero_.default", [], [(0, 12, 8)]),
    ]


def test_a_call_made_of_others_is_recorded_once():
    recorder, exchange = Recorder(), Silent()
    recorder.attach(exchange)
    slot = exchange.slot("x", [Send(1, (torch.zeros(2), torch.zeros(2)))])
    exchange.freeze("phase")
    exchange.acquire(slot)
    exchange.release("phase")
    assert [event[0] for event in recorder.events] == ["slot", "freeze", "acquire", "release"]
    assert recorder.record()[0] == [8, 8]
