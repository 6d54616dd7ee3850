"""Captures on a real GPU: pieces in one pool, what is done between them, and captures that CUDA breaks off."""

import pytest
import torch

from asyncdiff_fast.fused import timing
from asyncdiff_fast.fused.capture import CudaGraphs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZE = 1 << 20


def _chain(captures, x, weight):
    """Two products, of whose first a copy leaves, and comes back doubled, between three pieces."""
    sent, came = (torch.zeros_like(x) for _ in range(2))

    def call():
        y = x @ weight
        captures.outside(sent.copy_, y)
        z = torch.relu(y)
        captures.outside(lambda: came.copy_(2 * sent))
        return z + came @ weight

    return call


def test_pieces_read_what_pieces_before_them_have_made():
    captures, weight = CudaGraphs(), torch.randn(256, 256, device="cuda") / 16
    inputs = [torch.randn(128, 256, device="cuda") for _ in range(2)]
    # Both in one pool: the second's pieces lie where the first's may have lain.
    calls = [_chain(captures, x, weight) for x in inputs]
    for call in calls:
        call()
    made = [captures.capture(call) for call in calls]
    for turn in (0, 1, 0, 1, 1):
        inputs[turn].normal_()
        replay, result = made[turn]
        replay()
        got, y = result.clone(), inputs[turn] @ weight
        torch.testing.assert_close(got, torch.relu(y) + (2 * y) @ weight)


def test_pieces_draw_new_numbers_in_each_replay():
    captures, x = CudaGraphs(), torch.zeros(1000, device="cuda")

    def call():
        y = torch.rand_like(x)
        captures.outside(lambda: None)
        return y, torch.rand_like(x)

    replay, (first, second) = captures.capture(call)
    found = []
    for _ in range(2):
        replay()
        found += [first.clone(), second.clone()]
    assert all(not torch.equal(found[i], found[j]) for i in range(4) for j in range(i))


def test_kinds_share_their_memory():
    captures, x = CudaGraphs(), torch.zeros(SIZE, device="cuda")

    def call():
        y = x
        for _ in range(8):
            y = y + 1
        return y[:1].clone()

    captures.capture(call)
    kept, before = [captures.capture(call)], torch.cuda.memory_reserved()
    kept += [captures.capture(call) for _ in range(6)]
    assert torch.cuda.memory_reserved() - before <= 4 * SIZE


def _waits():
    torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("pieces_before", [0, 1])
def test_a_broken_capture_leaves_nothing_behind(pieces_before):
    captures, x = CudaGraphs(), torch.ones(SIZE, device="cuda")
    kept = captures.capture(lambda: x + 1)

    def call():
        for _ in range(pieces_before):
            x.clone()
            captures.outside(lambda: None)
        _waits()

    stream = torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            captures.capture(call)
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    assert torch.rand(4, device="cuda").sum() > 0
    kept[0]()
    replay, result = captures.capture(lambda: x + 2)
    replay()
    assert (kept[1] == 2).all() and (result == 3).all()


def test_graphs_are_captured_after_all_were_forgotten():
    captures, x = CudaGraphs(), torch.ones(256, 256, device="cuda")
    for n in range(3):
        # A product keeps a workspace in the pool.
        replay, result = captures.capture(lambda n=n: x @ x + n)
        replay()
        assert (result == 256 + n).all()
        del replay, result


def test_what_cannot_be_captured_is_not_timed():
    assert timing.times_us(_waits, 0) is None
    launched, replayed = timing.times_us(lambda: torch.ones(SIZE, device="cuda"), 0)
    assert min(launched, replayed) > 0 and torch.rand(1, device="cuda").item() >= 0
