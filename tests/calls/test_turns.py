"""Threads take turns with one denoiser, a generation each; none gets in the way of another's without an error."""

import threading
import time

import pytest

from asyncdiff_fast.calls import turns
from asyncdiff_fast.calls.turns import Turns

DOWN = (900.0, 600.0, 300.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(turns, "QUIET_S", 0.2)


def _in_thread(work):
    """A thread that is doing `work`, and the list of what it returned or raised."""
    found = []

    def run():
        try:
            found.append(work())
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def _generation(took, times=DOWN, pause_s=0.0, ends=True, inputs=lambda: None):
    """Ticks of one generation."""
    ticks = []
    for t in times:
        ticks.append(took.tick(t, "key", inputs))
        took.leave()
        time.sleep(pause_s)
    if ends:
        took.end()
    return ticks


def test_a_thread_waits_for_the_end_of_anothers_generation():
    took = Turns(5.0)
    first, found = _in_thread(lambda: _generation(took, pause_s=0.05))
    time.sleep(0.02)
    ticks = _generation(took)
    first.join()
    for places in (ticks, found[0]):
        assert [(tick.begins, tick.step) for tick in places] == [(True, 0), (False, 1), (False, 2)]


def test_where_nothing_tells_of_the_end_a_thread_waits_until_all_is_quiet():
    took, done = Turns(5.0), threading.Event()
    first, _ = _in_thread(lambda: _generation(took, ends=False) and done.wait(10))
    time.sleep(0.1)
    began = time.monotonic()
    assert _generation(took)[0].begins and 0.05 < time.monotonic() - began < 2
    done.set()
    first.join()


def _pausing(took, go):
    """(thread that is in the middle of its generation and goes on after `go`, what it returns), as `_in_thread`."""

    def slow():
        _generation(took, DOWN[:2], ends=False)
        go.wait(10)
        return _generation(took, DOWN[2:])

    started = _in_thread(slow)
    time.sleep(0.3)
    return started


def test_a_thread_that_has_ended_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(turns, "QUIET_S", 60.0)
    took = Turns(60.0)
    first, _ = _in_thread(lambda: _generation(took, ends=False))
    first.join()
    began = time.monotonic()
    assert _generation(took)[0].begins and time.monotonic() - began < 1


def test_a_thread_that_was_taken_for_ended_hears_of_it():
    took, go = Turns(5.0), threading.Event()
    first, found = _pausing(took, go)
    assert _generation(took)[0].begins
    go.set()
    first.join()
    assert "in the middle of that of thread" in str(found[0])


def test_it_begins_anew_when_it_comes_again():
    took, go = Turns(5.0), threading.Event()

    def twice():
        _generation(took, ends=False)
        go.wait(10)
        return _generation(took)

    first, found = _in_thread(twice)
    time.sleep(0.3)
    _generation(took)
    go.set()
    first.join()
    assert found[0][0].begins


def test_nobody_waits_for_ever():
    took, done = Turns(0.3), threading.Event()

    def stuck():
        took.tick(900.0, "key")
        done.wait(10)
        took.leave()

    first, _ = _in_thread(stuck)
    time.sleep(0.05)
    with pytest.raises(RuntimeError, match="one thread at a time"):
        took.tick(900.0, "key")
    done.set()
    first.join()


def test_threads_hand_their_turn_over_to_one_with_other_inputs_and_have_it_again():
    took, order = Turns(5.0), []

    def work(name, wanted=None):
        assert took.tick(900.0, "key", lambda: name).begins
        while wanted is not None and not took.hand_over(name, wanted, 5.0, 5.0):
            pass
        order.append(name)
        took.leave()
        assert _generation(took, DOWN[1:])[0].step == 1
        order.append(name)

    first, found = _in_thread(lambda: work("first", wanted="second"))
    time.sleep(0.05)
    # It wants the one that waits for its turn since it has handed it over.
    second, _ = _in_thread(lambda: work("second", wanted="first"))
    for thread in (first, second):
        thread.join()
    assert found == [None] and order == ["first"] * 2 + ["second"] * 2


def test_a_turn_that_nobody_wants_stays():
    took = Turns(5.0)
    assert took.tick(900.0, "key").begins
    first, found = _in_thread(lambda: _generation(took, inputs=lambda: "another"))
    assert not took.hand_over("mine", "inputs", 60.0, 0.1)
    took.leave()
    assert [tick.step for tick in _generation(took, DOWN[1:])] == [1, 2]
    first.join()
    assert found[0][0].begins


def test_a_thread_that_is_refused_takes_nothing_from_the_one_whose_turn_it_is():
    took, go = Turns(5.0), threading.Event()
    first, found = _pausing(took, go)
    _generation(took, DOWN[:2], ends=False)
    time.sleep(0.3)
    go.set()
    first.join()
    assert "in the middle" in str(found[0]) and _generation(took, DOWN[2:])[0].step == 2


def test_quiet_is_no_end_where_another_decides():
    took, may = Turns(5.0, may_begin=lambda: time.monotonic() > ends), threading.Event()
    ends = time.monotonic() + 0.8
    first, _ = _in_thread(lambda: _generation(took, ends=False) and may.wait(10))
    time.sleep(0.1)
    assert _generation(took)[0].begins and time.monotonic() >= ends
    may.set()
    first.join()
