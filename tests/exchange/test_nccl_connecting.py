"""Connecting by NCCL, on the double: libraries, versions, time limits, and how a channel ends."""

import gc
import signal
import threading
import time

import building
import pytest
from channels import connect, ring, verdict
from double import Double


@pytest.fixture
def gpu():
    with Double(building.build()[0], 200, 1) as double:
        yield double


def _transports(gpu, extension, size, ranks, **options):
    """Transports of some ranks of a communicator."""
    libraries = extension.Libraries(gpu.path, gpu.path)
    unique_id, made = extension.unique_id(libraries), []
    for rank in ranks:
        with gpu.rank(rank):
            made.append(extension.NcclTransport(libraries, unique_id, rank, size, **options))
    return made


def test_all_ranks_must_come(gpu):
    _, extension = building.load()
    transports = _transports(gpu, extension, 2, [0], timeout_s=0.2)
    with pytest.raises(extension.ExchangeError, match=r"rank 0 waited 0.2 s for all ranks"):
        while not transports[0].ready():
            pass


def test_old_libraries_and_missing_contexts_are_refused(gpu):
    _, extension = building.load()
    gpu.library.fake_version(21805)
    with pytest.raises(extension.ExchangeError, match=r"2\.19"):
        extension.Libraries(gpu.path, gpu.path)
    gpu.library.fake_version(21903)
    libraries = extension.Libraries(gpu.path, gpu.path)
    assert libraries.nccl_version == 21903
    assert "2.29.2 or later is needed for one-sided puts: got version 21903" in libraries.puts_missing
    with pytest.raises(extension.ExchangeError, match="one-sided puts: got version 21903"):
        extension.NcclTransport(libraries, extension.unique_id(libraries), 0, 2, puts=True)
    with pytest.raises(extension.ExchangeError, match="no CUDA device is current"):
        extension.NcclTransport(libraries, extension.unique_id(libraries), 0, 2)


def test_a_post_waits_for_no_thread_of_nccl(gpu):
    """Of a communicator that does not block, NCCL would launch each group in its own time."""
    _, extension = building.load()
    gpu.library.fake_enquiries(1_000_000)
    ranks = connect(gpu, extension, 2, timeout_s=0.5)
    slots = ring(ranks)
    for r, slot in zip(ranks, slots, strict=True):
        r.send_once(slot)
    assert verdict(gpu, ranks) == ([], [], [])


def test_a_peer_that_never_connects_is_given_up(gpu):
    """The first post says so after `timeout_s`, and the end does not wait for it."""
    _, extension = building.load()
    ranks = connect(gpu, extension, 2, timeout_s=0.3)
    slot = ranks[0].slot("alone", [1], [1])
    ranks[0].channel.freeze("alone", [slot.number])
    with pytest.raises(extension.ExchangeError, match=r"rank 0, slot 'alone' .*: found no connection in 0.3 s"):
        ranks[0].send_once(slot)
    began = time.monotonic()
    for r in ranks:
        r.channel.abort("over")
        r.channel.close()
    assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("puts", [False, True])
def test_a_first_post_hears_signals(gpu, puts):
    """Ctrl-C ends it while it waits for the others, who never come."""
    _, extension = building.load()
    ranks = connect(gpu, extension, 2, timeout_s=20, puts=puts)
    slot, other = ranks[0].slot("alone", [1], [1]), ranks[1].slot("alone", [0], [0])
    windows = [r.channel.window([s.number]) for r, s in zip(ranks, (slot, other), strict=True)]
    ranks[0].channel.freeze("alone", [slot.number], windows)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            ranks[0].send_once(slot)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 2
    # Nothing was posted.
    assert ranks[0].channel.broken() is None and ranks[0].channel.history() == []
    for r in ranks:
        r.channel.abort("over")
        r.channel.close()


def test_another_device_may_be_current(gpu):
    """Events are made in the current context; the caller's is left as it was."""
    _, extension = building.load()
    ranks = connect(gpu, extension, 2)
    with gpu.rank(1):
        listed = [[(1, [m.address for m in (gpu.memory(8, f"{side} {i}") for i in range(2))], 8)] for side in "xy"]
        number = ranks[0].channel.add("elsewhere", *listed, 2)
        ranks[0].channel.freeze("elsewhere", [number])
    theirs = ranks[1].slot("elsewhere", [0], [0], 8)
    ranks[1].channel.freeze("elsewhere", [theirs.number])
    with gpu.rank(1):
        ranks[0].channel.post(number, ranks[0].compute)
        ranks[0].channel.history()
        # The next event is one of rank 1.
        gpu.record(gpu.made("cuEventCreate", 2), ranks[1].compute)
    ranks[1].send_once(theirs)
    assert verdict(gpu, ranks)[:2] == ([], [])


def test_the_watchdog_leaves_captures_alone(gpu):
    """torch captures graphs in the mode in which any thread's enquiry breaks a capture off."""
    _, extension = building.load()
    ranks = connect(gpu, extension, 2)
    slots = ring(ranks)
    ranks[0].send_once(slots[0])
    gpu.library.fake_capture(1)
    time.sleep(0.7)
    assert ranks[0].channel.broken() is None and gpu.misuses() == []
    # Whoever asks in a thread that is not relaxed learns nothing, and nothing fails.
    ranks[0].channel.history()
    assert ranks[0].channel.broken() is None
    gpu.library.fake_capture(0)
    ranks[1].send_once(slots[1])
    assert verdict(gpu, ranks) == ([], [], [])


@pytest.mark.parametrize("puts", [False, True])
def test_a_closed_channel_leaves_nothing_under_way(gpu, puts):
    _, extension = building.load()
    ranks = connect(gpu, extension, 3, puts=puts)
    slots = ring(ranks)
    for r, slot in zip(ranks, slots, strict=True):
        r.send_once(slot)
    assert gpu.drain() == []
    for r in ranks:
        r.channel.close()
    assert gpu.misuses() == []
    with pytest.raises(extension.ExchangeError, match="closed"):
        ranks[0].post(slots[0])


def test_a_channel_left_half_way_is_aborted(gpu):
    """The library would wait for ever for the other half of what is under way."""
    _, extension = building.load()
    ranks = connect(gpu, extension, 2)
    slots = ring(ranks)
    # To connect takes both.
    for r, slot in zip(ranks, slots, strict=True):
        r.send_once(slot)
    assert gpu.drain() == []
    ranks[0].send_once(slots[0])
    ranks[0].channel.leave("a step raised")
    ranks[0].channel.close()
    assert gpu.drain() == [] and gpu.misuses() == []
    ranks[1].channel.close()


def test_slots_are_added_while_another_thread_counts(gpu):
    """A sanitizer would see both at the list of slots."""
    _, extension = building.load()
    ranks, over = connect(gpu, extension, 2), threading.Event()

    def count():
        while not over.is_set():
            ranks[0].channel.stats()

    counting = threading.Thread(target=count)
    counting.start()
    slots = [ranks[0].slot(f"slot {i}", nbytes=8) for i in range(200)]
    over.set()
    counting.join()
    assert [slot.number for slot in slots] == list(range(200))
    for r in ranks:
        r.channel.close()


def test_a_dropped_channel_survives_a_library_that_fails():
    path, extension = building.load()
    gpu = Double(path)
    ranks = connect(gpu, extension, 2)
    gpu.library.fake_reset()
    del ranks
    gc.collect()
