"""The double of NCCL: rendezvous, errors, windows; and what a communicator's life looks like."""

import ctypes
import threading

import building
import pytest
from double import Double, DoubleError, Range
from double_nccl import IN_PROGRESS, Ranks


@pytest.fixture(params=[(0, 0), (300, 1)], ids=["at once", "late"])
def gpu(request):
    with Double(building.build()[0], *request.param) as double:
        yield double


def _clean(gpu):
    assert gpu.drain() == [] and gpu.races() == [] and gpu.wrong_reads() == [] and gpu.misuses() == []


def test_messages_carry_data_and_order(gpu):
    ranks, compute = Ranks(gpu, 2), gpu.stream(0)
    x, y = gpu.memory(64, "x"), gpu.memory(64, "y")
    gpu.kernel(compute, "produce", writes=[x.filled(3)])
    gpu.join(ranks.streams[0], compute, 0)
    ranks.send(0, 1, x)
    ranks.recv(1, 0, y)
    gpu.kernel(ranks.streams[1], "consume", reads=[y.filled(3)])
    _clean(gpu)
    gpu.kernel(gpu.stream(1), "consume at once", reads=[y.part()])
    assert gpu.drain() == []
    (race,) = gpu.races()
    assert race.kind == "RAW" and "recv 0->1 of 64 bytes" in race.first


def test_the_receiver_gives_the_sender_no_edge(gpu):
    """A send may be over when its bytes lie in the library's own buffers."""
    ranks = Ranks(gpu, 2)
    x, y, z = gpu.memory(8, "x"), gpu.memory(8, "y"), gpu.memory(8, "z")
    gpu.kernel(ranks.streams[1], "read z", reads=[z.part()])
    ranks.recv(1, 0, y)
    ranks.send(0, 1, x)
    gpu.kernel(ranks.streams[0], "write z", writes=[z.part()])
    assert gpu.drain() == []
    assert [race.kind for race in gpu.races()] == ["WAR"]


def test_a_group_runs_side_by_side_and_calls_one_after_the_other(gpu):
    ranks = Ranks(gpu, 2)
    x = [gpu.memory(8, f"x{rank}") for rank in range(2)]
    y = [gpu.memory(8, f"y{rank}") for rank in range(2)]
    for rank in range(2):
        with ranks.group():
            ranks.send(rank, 1 - rank, x[rank])
            ranks.recv(rank, 1 - rank, y[rank])
    _clean(gpu)
    for rank in range(2):
        ranks.send(rank, 1 - rank, x[rank])
        ranks.recv(rank, 1 - rank, y[rank])
    stuck = gpu.drain()
    assert len(stuck) == 2
    assert all("waits for its message to be received" in line and f"rank {r}" in line for r, line in enumerate(stuck))
    ranks.abort(0)
    assert [line.split(" is ")[0] for line in gpu.drain()] == ["rank 1 stream 1"], "each rank aborts for itself"
    ranks.abort(1)
    assert gpu.drain() == []


def test_what_was_aborted_never_arrives(gpu):
    ranks, x, y = Ranks(gpu, 2), gpu.memory(8, "x"), gpu.memory(8, "y")
    ranks.send(0, 1, x)
    assert len(gpu.drain(grace_ms=10)) == 1
    ranks.abort(0)
    assert gpu.drain() == []
    ranks.recv(1, 0, y)
    assert ["rank 1" in line for line in gpu.drain(grace_ms=10)] == [True]


def test_operations_of_one_group_are_not_ordered(gpu):
    ranks, x = Ranks(gpu, 3), gpu.memory(8, "x")
    with ranks.group():
        ranks.recv(0, 1, x)
        ranks.recv(0, 2, x)
    for rank in (1, 2):
        ranks.send(rank, 0, gpu.memory(8, f"from {rank}"))
    assert gpu.drain() == []
    assert [race.kind for race in gpu.races()] == ["WAW"]


def test_one_communicator_runs_one_operation_at_a_time(gpu):
    ranks, x = Ranks(gpu, 2), gpu.memory(8, "x")
    other = gpu.stream(0)
    ranks.recv(0, 1, x)
    ranks.send(0, 1, x, stream=other)
    ranks.send(1, 0, gpu.memory(8, "y"))
    ranks.recv(1, 0, gpu.memory(8, "z"))
    _clean(gpu)


def test_a_wrong_size_is_an_asynchronous_error(gpu):
    ranks = Ranks(gpu, 2)
    assert ranks.error(0) == ranks.error(1) == 0
    ranks.send(0, 1, gpu.memory(8, "x"))
    ranks.recv(1, 0, gpu.memory(16, "y"))
    assert gpu.drain() == []
    assert ranks.error(0) == ranks.error(1) == 5
    assert gpu.misuses() == ["rank 1: recv 0->1 of 16 bytes met a send of 8 bytes"]


@pytest.mark.parametrize(
    ("early", "depth", "safe"),
    [(True, 1, False), (True, 2, False), (True, 3, True), (False, 1, False), (False, 2, True)],
)
def test_puts_need_more_buffers_than_receives(gpu, early, depth, safe):
    """Nothing tells the sender that the peer has read: with an early post a third buffer keeps them apart."""
    ranks, compute = Ranks(gpu, 2), [gpu.stream(r) for r in range(2)]
    # What is put lies behind the places for what comes.
    windows = [ranks.window(r, 2 * depth * 8, f"window {r}") for r in range(2)]
    done = [[], []]

    def post(r, e):
        source = windows[r][0] + (depth + e % depth) * 8
        gpu.kernel(compute[r], "produce", writes=[Range(source, 8, -1)])
        gpu.join(ranks.streams[r], compute[r], r)
        ranks.put(r, 1 - r, source, 8, windows[r][1], e % depth * 8)
        ranks.wait_signal(r, 1 - r)
        event = gpu.event(r)
        gpu.record(event, ranks.streams[r])
        done[r].append(event)

    def read(r, e):
        gpu.wait(compute[r], done[r][e])
        gpu.kernel(compute[r], "consume", reads=[Range(windows[r][0] + e % depth * 8, 8, -1)])

    for e in range(12):
        for r in range(2):
            post(r, e)
            if not early:
                read(r, e)
            elif e:
                read(r, e - 1)
    assert gpu.drain() == [] and gpu.misuses() == []
    assert bool(gpu.races()) != safe
    assert {race.kind for race in gpu.races()} <= {"RAW", "WAR"}


def test_a_group_in_progress_is_launched_later():
    """A record made before the communicator has answered does not cover the group."""
    with Double(building.build()[0], enquiries=2) as gpu:
        ranks, x, y = Ranks(gpu, 2, patient=False), gpu.memory(8, "x"), gpu.memory(8, "y")
        with ranks.group():
            ranks.send(0, 1, x)
        with pytest.raises(DoubleError):
            ranks.send(0, 1, x)
        assert [ranks.error(0) for _ in range(3)] == [IN_PROGRESS, IN_PROGRESS, 0]
        with ranks.group():
            ranks.recv(1, 0, y)
        compute = gpu.stream(1)
        gpu.join(compute, ranks.streams[1], 1)
        assert [ranks.error(1) for _ in range(3)] == [IN_PROGRESS, IN_PROGRESS, 0]
        gpu.kernel(compute, "read", reads=[y.part()])
        assert gpu.drain() == []
        assert {race.kind for race in gpu.races()} == {"RAW"}


def test_calls_that_the_library_would_punish():
    with Double(building.build()[0]) as gpu:
        ranks, x = Ranks(gpu, 2), gpu.memory(8, "x")
        for peer, stream in ((2, None), (1, gpu.stream(1))):
            with pytest.raises(DoubleError) as error:
                ranks.send(0, peer, x, stream)
            assert error.value.code == 4
        gpu.fail(0, 6)
        assert (ranks.error(0), ranks.error(1)) == (6, 0)
        ranks.send(1, 0, x)
        gpu.call("ncclCommDestroy", ranks.comms[1])
        assert "with operations under way" in gpu.misuses()[0]


def _refused(call, *args):
    with pytest.raises(DoubleError) as error:
        call(*args)
    return error.value.code


def test_a_window_is_there_when_all_ranks_have_come(gpu):
    ranks = Ranks(gpu, 2)
    _, first = ranks.window(0, 4096, "window 0")
    assert ranks.error(0) == IN_PROGRESS and first.value is None
    assert _refused(ranks.send, 0, 1, gpu.memory(8, "x")) == 5
    ranks.window(1, 4096, "window 1")
    assert ranks.error(0) == ranks.error(1) == 0 and first.value


def test_parts_of_a_window_are_of_one_size(gpu):
    ranks = Ranks(gpu, 2)
    windows = [ranks.window(r, 4096 * (1 + r), f"window {r}") for r in range(2)]
    assert ranks.error(0) == ranks.error(1) == 4
    assert [handle.value for _, handle in windows] == [None, None]


@pytest.mark.parametrize("flags", [0, 1])
def test_what_is_put_lies_in_a_symmetric_window(gpu, flags):
    ranks, x = Ranks(gpu, 2), gpu.memory(8, "x")
    (address, window), _ = [ranks.window(r, 4096, f"window {r}", flags) for r in range(2)]
    assert _refused(ranks.put, 0, 1, x.address, 8, window, 0) == 4
    for begin, nbytes in ((4092, 8), (-4, 8)):
        assert _refused(ranks.put, 0, 1, address + begin, nbytes, window, 0) == 4
    assert _refused(ranks.put, 0, 1, address, 8, window, 4092) == 4
    if flags:
        ranks.put(0, 1, address, 8, window, 4088)
        _clean(gpu)
    else:
        assert _refused(ranks.put, 0, 1, address, 8, window, 0) == 4


def test_signals_of_one_peer_are_one_counter_in_its_order(gpu):
    """Who waits for the first of two puts in a group has no edge from the second."""
    ranks = Ranks(gpu, 2)
    windows = [ranks.window(r, 4096, f"window {r}") for r in range(2)]
    with ranks.group():
        ranks.put(0, 1, windows[0][0], 8, windows[0][1], 0)
        ranks.put(0, 1, windows[0][0], 8, windows[0][1], 8)
    ranks.wait_signal(1, 0)
    gpu.kernel(ranks.streams[1], "first", reads=[Range(windows[1][0], 8, -1)])
    assert gpu.drain() == [] and gpu.races() == []
    gpu.kernel(ranks.streams[1], "second", reads=[Range(windows[1][0] + 8, 8, -1)])
    assert gpu.drain() == []
    assert [(race.kind, race.memory) for race in gpu.races()] == [("RAW", "window 1+8")]


def test_an_abort_does_not_end_a_wait_for_a_signal(gpu):
    """It waits for the wait, and so only comes back when the peer has signalled after all."""
    ranks = Ranks(gpu, 2)
    windows = [ranks.window(r, 4096, f"window {r}") for r in range(2)]
    ranks.wait_signal(1, 0)
    assert len(gpu.drain(grace_ms=10)) == 1
    aborting = threading.Thread(target=ranks.abort, args=(1,))
    aborting.start()
    aborting.join(0.1)
    assert aborting.is_alive() and len(gpu.drain(grace_ms=10)) == 1
    ranks.put(0, 1, windows[0][0], 8, windows[0][1], 0)
    aborting.join(20)
    assert not aborting.is_alive() and gpu.drain() == []


def test_a_put_into_a_window_that_is_gone_is_told(gpu):
    ranks = Ranks(gpu, 2)
    windows = [ranks.window(r, 4096, f"window {r}") for r in range(2)]
    # The put waits behind this, in its communicator's order.
    ranks.wait_signal(0, 1)
    ranks.put(0, 1, windows[0][0], 8, windows[0][1], 0)
    gpu.call("ncclCommWindowDeregister", ranks.comms[1], windows[1][1])
    ranks.signal(1, 0)
    assert gpu.drain() == []
    assert gpu.misuses() == ["rank 0: put 0->1 met a window that is gone"]


def test_a_communicator_that_does_not_block_never_launches_at_once():
    """Since NCCL 2.23.4: each group is launched by a thread of the library's."""
    with Double(building.build()[0]) as gpu:
        ranks = Ranks(gpu, 2, patient=False)
        ranks.send(0, 1, gpu.memory(8, "x"))
        assert [ranks.error(0), ranks.error(0)] == [IN_PROGRESS, 0]


def test_an_enquiry_breaks_off_the_capture_of_another_thread():
    with Double(building.build()[0]) as gpu:
        event, relaxed = gpu.event(0), ctypes.c_int(2)
        gpu.library.fake_capture(1)
        assert _refused(gpu.call, "cuEventQuery", event) == 900
        assert gpu.misuses() == ["an enquiry has broken off the capture of another thread"]
        gpu.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(relaxed))
        gpu.call("cuEventQuery", event)
        gpu.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(relaxed))
        assert relaxed.value == 2 and len(gpu.misuses()) == 1
