"""Who waits in the engine hears signals and what its caller learns; reasons and ranks are told as they are."""

import os
import signal
import time

import pytest
import shm_ranks

NAMES = (4, 7)
TEXTS = ("é" * 3000, "x" + "é" * 3000, "größe", "")


def _interrupted(rank):
    """What ends rank 0's wait for a message that rank 1 never sends, and after how many seconds."""
    number, _, _ = rank.slot("a", sends=[1 - rank.rank], recvs=[1 - rank.rank])
    rank.channel.freeze("all", [number])
    rank.meet()
    if rank.rank == 1:
        rank.meet()
        return None
    rank.channel.post(number)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    began, name = time.monotonic(), None
    try:
        rank.channel.wait(number)
    except KeyboardInterrupt as error:
        name = type(error).__name__
    seconds = time.monotonic() - began
    rank.channel.leave("it was interrupted")
    rank.meet()
    return name, seconds


def test_a_signal_is_heard_while_a_rank_waits():
    (name, seconds), _ = shm_ranks.run(2, _interrupted)
    assert name == "KeyboardInterrupt" and seconds < 1.5


def _paused(rank):
    """The error that a pause raises in rank 0's wait; where the wait ends before, the pauses are over with it."""
    calls = []

    def pause():
        calls.append(time.monotonic())
        if len(calls) > 3:
            raise OSError("the others have gone")

    transport = rank.C.ShmTransport(rank.rank, rank.size, 4713)
    transport.connect(rank.meet(transport.address()))
    channel = rank.C.Channel(transport, timeout_s=20.0, pause=pause)
    out = shm_ranks.Buffers(64, 2)
    into = shm_ranks.Buffers(64, 2)
    number = channel.add("a", [(1 - rank.rank, out.addresses, 64)], [(1 - rank.rank, into.addresses, 64)], 2)
    channel.freeze("all", [number])
    rank.meet()
    text = None
    if rank.rank == 0:
        channel.post(number)
        with pytest.raises(OSError) as error:
            channel.wait(number)
        text = str(error.value), len(calls)
    rank.meet()
    channel.leave("over")
    channel.close()
    return text


def test_what_a_pause_raises_ends_the_wait():
    assert shm_ranks.run(2, _paused) == [("the others have gone", 4), None]


def _left(rank, text):
    """What rank 0 hears of rank 1's reason."""
    number, _, _ = rank.slot("a", sends=[1 - rank.rank], recvs=[1 - rank.rank])
    rank.channel.freeze("all", [number])
    rank.meet()
    if rank.rank == 1:
        rank.channel.leave(text)
        # What comes later does not write over what others are reading.
        rank.channel.abort("another reason")
        rank.meet()
        return None
    rank.channel.post(number)
    found, _ = rank.error(rank.channel.wait, number)
    rank.meet()
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_reasons_are_whole_characters_and_ranks_have_their_names(text):
    heard, _ = shm_ranks.run(2, _left, text, ranks=NAMES)
    assert f"waits for rank {NAMES[1]}, which has left the exchange: {text[:900]}" in heard
    assert "another" not in heard and "\ufffd" not in heard


def _killed(rank):
    number, _, _ = rank.slot("a", sends=[1 - rank.rank], recvs=[1 - rank.rank])
    rank.channel.freeze("all", [number])
    rank.meet()
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    rank.channel.post(number)
    return rank.error(rank.channel.wait, number)[0]


def test_a_lost_rank_has_its_name():
    heard, _ = shm_ranks.run(2, _killed, ranks=NAMES)
    assert f"rank {NAMES[0]} waited for rank {NAMES[1]} and failed" in heard
