"""Rounds of agreement find together again after one rank was late, gone, or somewhere else. Ranks are threads here."""

import pickle
import subprocess
import sys
import threading
import time

import pytest
import ranks
import torch.distributed as dist

import asyncdiff_fast
from asyncdiff_fast.exchange import processes, wire
from asyncdiff_fast.exchange.errors import ExchangeError
from asyncdiff_fast.exchange.presence import Missing
from asyncdiff_fast.exchange.rounds import Rounds
from asyncdiff_fast.exchange.world import World

RANKS = (0, 1)


def _pair():
    store = dist.HashStore()
    return [Rounds(store, rank, RANKS) for rank in RANKS], store


def _together(*attempts):
    """What each attempt returned or raised, all of them at once."""
    found = [None] * len(attempts)

    def run(i):
        try:
            found[i] = attempts[i]()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(attempts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_ranks_hear_each_other():
    (a, b), _ = _pair()
    assert _together(lambda: a.begin("x", "it", 5), lambda: b.begin("y", "it", 5)) == [(1, ["x", "y"])] * 2
    for key in ("1/0", "1/1"):
        found = _together(*(lambda r=r, key=key: r.gather(key, r.me, "more", RANKS, 5) for r in (a, b)))
        assert found == [[0, 1], [0, 1]]


@pytest.mark.parametrize("lonely", [1, 3])
def test_a_rank_that_was_alone_meets_the_other_at_the_next_beginning(lonely):
    (a, b), store = _pair()
    _together(lambda: a.begin(0, "it", 5), lambda: b.begin(0, "it", 5))
    for _ in range(lonely):
        with pytest.raises(Missing) as missing:
            a.begin("alone", "it", 0.3)
        assert missing.value.ranks == [1]
    # What it said is taken back: the other does not take it for an answer.
    assert not store.check([f"{a.epoch}/begin/0"])
    found = _together(lambda: b.begin("late", "it", 5), lambda: time.sleep(0.4) or a.begin("again", "it", 5))
    assert found[0] == found[1] == (2 + lonely, ["again", "late"])


def test_a_rank_that_waits_hears_that_the_other_has_begun_anew():
    (a, b), _ = _pair()
    _together(lambda: a.begin(0, "it", 5), lambda: b.begin(0, "it", 5))
    began = time.monotonic()
    lost, found = _together(lambda: a.gather("1/0", 0, "more", RANKS, 15), lambda: b.begin("b", "it", 1.5))
    assert isinstance(lost, ExchangeError) and "rank 1 has begun anew" in str(lost)
    assert isinstance(found, Missing) and time.monotonic() - began < 5
    assert _together(lambda: a.begin("a", "it", 5), lambda: b.begin("b", "it", 5)) == [(3, ["a", "b"])] * 2


def test_a_rank_that_waits_hears_why_the_other_has_left():
    (a, b), _ = _pair()
    _together(lambda: a.begin(0, "it", 5), lambda: b.begin(0, "it", 5))
    b.presence.leave(1, "OSError: größe")
    with pytest.raises(ExchangeError, match="rank 1 has left: OSError: größe"):
        a.gather("1/0", 0, "more", RANKS, 15)


def test_who_waits_in_a_call_lets_others_be_ahead():
    (a, b), _ = _pair()
    _together(lambda: a.begin(0, "it", 5), lambda: b.begin(0, "it", 5))
    with pytest.raises(Missing):
        b.begin(0, "it", 0.3)
    for _ in range(10):
        a.presence.look(1, 8, RANKS)
        time.sleep(0.02)


def _looked(rounds, calls):
    ends = time.monotonic() + 5
    while time.monotonic() < ends:
        rounds.presence.look(1, calls, RANKS)
        time.sleep(0.02)


def test_who_makes_one_call_more_hears_that_the_other_has_ended():
    (a, b), _ = _pair()
    _together(lambda: a.begin(0, "it", 5), lambda: b.begin(0, "it", 5))
    b.presence.leave(1, 8)
    for _ in range(10):
        # Its eighth call was made by both.
        a.presence.look(1, 8, RANKS)
        time.sleep(0.02)
    with pytest.raises(ExchangeError, match="rank 1 has ended this generation after 8 calls") as error:
        _looked(a, 9)
    assert error.value.ended


def test_what_was_asked_of_one_generation_says_nothing_of_the_next():
    (a, b), store = _pair()
    _together(lambda: a.begin(0, "it", 5), lambda: b.begin(0, "it", 5))
    b.presence.leave(1, 8)
    store.wait(["left/1/1"])
    # Asked in its ninth call; the answer comes after its last look.
    a.presence.look(1, 9, RANKS)
    _together(lambda: a.begin(0, "it", 5), lambda: b.begin(0, "it", 5))
    for _ in range(5):
        a.presence.look(2, 1, RANKS)
        time.sleep(0.05)


class Slow:
    """A store in which some words take their time."""

    def __init__(self, store, slow):
        self._store, self._slow = store, slow

    def __getattr__(self, name):
        return getattr(self._store, name)

    def set(self, key, value):
        if key.startswith(self._slow):
            time.sleep(0.5)
        self._store.set(key, value)


def test_why_a_rank_has_left_is_heard_before_it_begins_anew():
    (a, b), store = _pair()
    _together(lambda: a.begin(0, "it", 5), lambda: b.begin(0, "it", 5))
    b = Rounds(Slow(store, "left/"), 1, RANKS)
    b.epoch = 1
    b.presence.leave(1, "OSError: on purpose")
    lost, _ = _together(lambda: a.gather("1/0", 0, "more", RANKS, 5), lambda: b.begin("b", "it", 1.5))
    assert "rank 1 has left: OSError: on purpose" in str(lost)


def _fails_and_ends(rank, why):
    """Rank 0 fails and its process ends, which takes the store with it."""
    asyncdiff_fast.exchange.world.start_process_group(20)
    world = World((0, 1), 20)
    world.begin(None, "it")
    if rank == 0:
        world.leave(why)
        return None
    time.sleep(0.3)
    with pytest.raises(ExchangeError) as error:
        world.gather(None, "more")
    world.leave(str(error.value))
    return str(error.value)


def test_the_keeper_of_the_store_says_why_it_left_before_it_ends():
    assert "rank 0 has left: OSError: on purpose" in ranks.run(2, _fails_and_ends, "OSError: on purpose")[1]


@pytest.mark.parametrize("reaped", [True, False])
def test_a_process_that_ends_is_missed_at_once(reaped):
    (a, _), store = _pair()
    child = subprocess.Popen(["sleep", "60"])
    told = [*processes.host(), child.pid, processes._stat(child.pid)[2]]
    store.set("process/1", wire.dumps(told, "process/1"))
    threading.Timer(0.5, lambda: (child.kill(), reaped and child.wait())).start()
    began = time.monotonic()
    with pytest.raises(Missing) as missing:
        a.begin(0, "it", 30)
    assert missing.value.died and missing.value.ranks == [1] and time.monotonic() - began < 2
    child.wait()


def test_another_process_of_the_same_number_is_not_that_rank():
    assert not processes.has_ended(processes.identity())
    *where, started = processes.identity()
    assert processes.has_ended([*where, started + 1])
    assert not processes.has_ended(["another host", "x", 1, 5])


@pytest.mark.parametrize("message", [pickle.dumps(0), b'{"t": [1]}', b"7", b'{"t": ["elsewhere", 1]}'])
def test_what_no_rank_has_said_is_an_error(message):
    (a, _), store = _pair()
    store.set("1/begin/1", message)
    with pytest.raises(ExchangeError, match="rank 1"):
        a.begin(0, "it", 5)


@pytest.mark.parametrize("process", [[], "x", ["a", "b", "c", 1], [1, 2, 3, 4], ["a", "b", True, 1]])
def test_a_process_that_is_no_process_is_an_error(process):
    (a, _), store = _pair()
    store.set("process/1", wire.dumps(process, "process/1"))
    with pytest.raises(ExchangeError, match="rank 1"):
        a.begin(0, "it", 5)


_PARENT = """
import subprocess, sys, time
if sys.argv[1:]:
    from asyncdiff_fast.exchange.processes import Siblings
    time.sleep(0.5)
    siblings = Siblings()
    for _ in range(100):
        if siblings.too_few((), 1):
            sys.exit(7)
        time.sleep(0.05)
    sys.exit(0)
ranks = [subprocess.Popen([sys.executable, sys.argv[0], "rank"]) for _ in range(2)]
time.sleep(float(sys.argv[0].partition("after-")[2].removesuffix(".py")))
ranks[1].kill()
sys.exit(ranks[0].wait(30))
"""


def test_a_rank_that_ends_before_it_has_come_is_missed(tmp_path):
    path = tmp_path / "after-2.py"
    path.write_text(_PARENT)
    assert subprocess.run([sys.executable, path], timeout=60).returncode == 7
