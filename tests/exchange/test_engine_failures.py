"""Ranks that die, hang, disagree or give up: all others are told in a second or the timeout, and nothing is left."""

import os
import pathlib
import signal
import time

import pytest
import shm_ranks

TIMEOUT_S = 2.0
WITHOUT_PIDFD = {"pidfd": False}


def _ring(rank, name="ring", nbytes=64, depth=2):
    """A slot that sends to the next rank and receives from the one before."""
    after, before = (rank.rank + 1) % rank.size, (rank.rank - 1) % rank.size
    number, out, into = rank.slot(name, [after], [before], nbytes, depth)
    rank.channel.freeze(f"phase of {name}", [number])
    return number, out[after], into[before]


def _busy(action):
    """Call `action` until it raises."""
    while True:
        action()
        time.sleep(0.01)


def _lose(rank, place, nbytes):
    """Rank 1 is killed; what the others see, and how long after."""
    number, _, _ = _ring(rank, nbytes=nbytes)
    rank.channel.post(number)
    rank.channel.wait(number)
    rank.meet()
    if rank.rank == 1:
        if place == "posted":
            rank.channel.post(number)
        os.kill(os.getpid(), signal.SIGKILL)
    if place == "idle":
        return rank.error(_busy, rank.channel.check)
    return rank.error(lambda: _busy(lambda: (rank.channel.post(number), rank.channel.wait(number))))


@pytest.mark.parametrize("place, nbytes", [("idle", 64), ("waiting", 64), ("waiting", 1 << 20), ("posted", 1 << 20)])
@pytest.mark.parametrize("options", [{}, WITHOUT_PIDFD])
def test_a_killed_rank_is_named_within_a_second(place, nbytes, options):
    started = shm_ranks.Started(3, _lose, place, nbytes, **options)
    results = started.results()
    assert results[1] is None
    for text, seconds in (results[0], results[2]):
        assert "rank 1" in text and f"process {started.processes[1].pid} died" in text, text
        assert seconds < 1.0, text
    assert not _left_behind()


def _left_behind():
    return [name for name in os.listdir("/dev/shm") if "asyncdiff" in name]


def _drop(rank, count):
    """Rank 1 is killed; rank 0 makes channels after that and drops them while their watchdogs find out."""
    transports = [rank.C.ShmTransport(rank.rank, rank.size, 4712 + i) for i in range(count)]
    everyone = rank.meet([transport.address() for transport in transports])
    for i, transport in enumerate(transports):
        transport.connect([addresses[i] for addresses in everyone])
    pids = rank.meet(os.getpid())
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    rank.error(_busy, rank.channel.check)
    for i, transport in enumerate(transports):
        channel = rank.C.Channel(transport, pids=[0, pids[1]])
        time.sleep(i % 10 * 2e-5)
        del channel
    return count


def test_channels_are_dropped_while_a_lost_rank_is_noticed():
    assert shm_ranks.run(2, _drop, 100) == [100, None]


def _hang(rank):
    """Rank 1 stops before its second post; the others say so, and so does rank 1 once it goes on."""
    number, _, _ = _ring(rank)
    rank.channel.post(number)
    rank.channel.wait(number)
    pids = rank.meet(os.getpid())
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        return rank.error(_busy, rank.channel.check)
    time.sleep(0.2)
    rank.channel.post(number)
    found = rank.error(lambda: _busy(lambda: (rank.channel.wait(number), rank.channel.post(number))))
    time.sleep(0.5)
    os.kill(pids[1], signal.SIGCONT)
    return found


def test_a_stopped_rank_is_named_after_the_timeout():
    (first, first_s), (second, _), (third, third_s) = shm_ranks.run(3, _hang, timeout_s=TIMEOUT_S)
    # Rank 2 waits for it; rank 0 waits for rank 2 as long, and is told in the end by one or the other.
    assert "rank 2 waited for rank 1 in slot 'ring' (exchange 1) and failed: nothing came for 2 s" in third
    assert "raise timeout_s (now 2)" in third
    assert "rank 1" in first or "rank 2" in first
    assert TIMEOUT_S - 0.1 < third_s < TIMEOUT_S + 1.5 and first_s < TIMEOUT_S + 1.5
    assert "stopped the exchange" in second


def _mismatch(rank, sizes):
    """One rank lists another size; what both say, and whether a byte was written."""
    number, out, into = _ring(rank, nbytes=sizes[rank.rank])
    out.fill(0, 1)
    rank.channel.post(number)
    found = rank.error(lambda: _busy(lambda: rank.channel.wait(number)))
    return *found, into.holds(0, 0)


@pytest.mark.parametrize("sizes", [(64, 128), (64, 1 << 20), (1 << 20, 1 << 21)])
def test_sizes_that_differ_are_refused_on_both_sides(sizes):
    for text, seconds, untouched in shm_ranks.run(2, _mismatch, sizes):
        assert all(f"{n} bytes" in text for n in sizes) and "slot 'ring' (exchange 0)" in text, text
        assert seconds < 1 and untouched


def _reordered(rank):
    """Two slots of one size, posted in another order by one rank, which freeze would have refused."""
    peer = [1 - rank.rank]
    names = ("a", "b") if rank.rank == 0 else ("b", "a")
    numbers = [rank.slot(name, peer, peer)[0] for name in names]
    rank.channel.freeze("phase", numbers)
    for number in numbers:
        error = rank.error(rank.channel.post, number)
        if error[0]:
            return error
    return rank.error(rank.channel.wait, numbers[0])


def test_another_order_is_refused_on_both_sides():
    for text, seconds in shm_ranks.run(2, _reordered):
        assert "slot 'a'" in text and "slot 'b'" in text and seconds < 1, text


def _give_up(rank, way):
    """Rank 2 gives up; what happens on the others, which do not wait for it."""
    number, _, _ = _ring(rank)
    rank.channel.post(number)
    rank.channel.wait(number)
    rank.meet()
    if rank.rank == 2:
        getattr(rank.channel, way)("it rains")
        return rank.error(rank.channel.check)
    pair, _, _ = rank.slot("pair", [1 - rank.rank], [1 - rank.rank])
    rank.channel.freeze("pairs", [pair])
    time.sleep(0.5)
    among_us = rank.error(lambda: (rank.channel.post(pair), rank.channel.wait(pair)))[0]
    if among_us:
        return among_us, 0
    rank.channel.post(number)
    return rank.error(rank.channel.wait, number)


def test_abort_is_heard_by_all():
    (first, _), (second, _), (own, _) = shm_ranks.run(3, _give_up, "abort")
    assert own == "it rains"
    assert first.endswith("rank 2 stopped the exchange: it rains")
    assert second.endswith("rank 2 stopped the exchange: it rains") or "rank 0 stopped the exchange" in second


def test_a_rank_that_leaves_is_missed_by_those_who_wait_for_it():
    (first, seconds), (second, _), (own, _) = shm_ranks.run(3, _give_up, "leave")
    assert own == "rank 2 has left the exchange: it rains"
    assert "slot 'ring' (exchange 1) waits for rank 2, which has left the exchange: it rains" in first
    assert seconds < 1
    # Rank 1 waits for rank 0 alone, which may have given up by then.
    assert second is None or "rank 0 stopped the exchange" in second


def _unseen(rank):
    """A failure that nobody was told of comes out of close, once."""
    _ring(rank)
    rank.meet()
    if rank.rank == 1:
        rank.channel.abort("over")
        return rank.error(rank.channel.close)[0]
    while not rank.channel.broken():
        time.sleep(0.01)
    return rank.error(rank.channel.close)[0], rank.error(rank.channel.close)[0]


def test_close_raises_what_nobody_has_seen():
    (first, again), own = shm_ranks.run(2, _unseen)
    assert "rank 1 stopped the exchange: over" in first
    assert again is None and own is None


def _forked(rank):
    number, _, _ = _ring(rank)
    rank.channel.post(number)
    rank.channel.wait(number)
    rank.meet()
    here, there = os.pipe()
    if os.fork() == 0:
        texts = [rank.error(action)[0] for action in (rank.channel.check, lambda: rank.channel.post(number))]
        # What a step that raises there does: the parent and its peers must not hear of it.
        for end in (rank.channel.leave, rank.channel.abort, rank.channel.report):
            end("the child has failed")
        rank.channel.mark_left(1 - rank.rank)
        rank.channel.close()
        os.write(there, repr(texts).encode())
        os._exit(0)
    os.wait()
    texts = os.read(here, 4096).decode()
    # The parent goes on.
    rank.channel.post(number)
    rank.channel.wait(number)
    rank.channel.close(5.0)
    return texts


def test_a_forked_child_is_refused():
    for texts in shm_ranks.run(2, _forked):
        assert texts.count("the exchange does not survive fork()") == 2


def _fetched_late(rank):
    """Rank 0 announces what lies in its memory and goes; what rank 1 is told that comes to fetch it."""
    number, _, _ = _ring(rank, nbytes=1 << 20)
    if rank.rank == 0:
        rank.channel.post(number)
        rank.channel = None
    rank.meet()
    return rank.rank and rank.error(lambda: (rank.channel.post(number), rank.channel.wait(number)))[0]


def test_the_memory_of_a_rank_that_has_gone_is_not_read():
    text = shm_ranks.run(2, _fetched_late)[1]
    assert "waits for rank 0, which has left the exchange: it was dropped without being closed" in text


def _says(rank, reason):
    """Rank 1 stops for a reason in many bytes; what rank 0 hears."""
    _ring(rank)
    rank.meet()
    if rank.rank == 1:
        return rank.channel.abort(reason)
    return rank.error(_busy, rank.channel.check)[0]


def test_a_reason_is_cut_between_characters():
    text, _ = shm_ranks.run(2, _says, "a" + "é" * 3000)
    assert "rank 1 stopped the exchange: aéé" in text and text.endswith("é")


_open_at_the_end = []


def _abandoned(rank, way):
    """Ends without closing, with an exchange under way."""
    number, _, _ = _ring(rank, nbytes=1 << 20)
    rank.channel.post(number)
    if rank.rank == 0:
        rank.channel.post(number)
    # Nobody can post to a rank that has left.
    rank.meet()
    if way == "dropped":
        rank.channel = None
    else:
        _open_at_the_end.append(rank)
    return os.getpid()


@pytest.mark.parametrize("way", ["dropped", "open"])
def test_a_process_ends_with_its_exchange_open(way):
    started = shm_ranks.Started(2, _abandoned, way)
    started.results()
    assert [process.exitcode for process in started.processes] == [0, 0]
    assert not _left_behind()


def _killed_while_meeting(rank):
    return None


def _shared_names():
    """Names in shared memory but for semaphores of multiprocessing, with which other tests come and go."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def test_nothing_is_left_of_ranks_killed_before_they_met():
    before = _shared_names()
    started = shm_ranks.Started(2, _killed_while_meeting)
    deadline = time.monotonic() + 20
    # Once its memory is there, before all ranks have connected.
    pids = [process.pid for process in started.processes]
    while not any("memfd:asyncdiff_fast" in _maps(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.005)
    for process in started.processes:
        process.kill()
    assert _shared_names() <= before


def _maps(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""
