"""Calls that may never end, each in a thread of its own, so that its caller can give up, or be interrupted."""

import os
import queue
import threading
import time
from multiprocessing import util

# A thread that is still inside such a call while the interpreter goes down would take the process with it.
EXIT_S = 1.0
_running = set()
# The process whose end waits for them: a forked one does not by itself.
_waits_for_them = None


def within(seconds, ask):
    """What `ask(stop)` returns or raises, or TimeoutError; `stop` is an event that is set once nobody waits."""
    return Asked(ask).result(seconds)


def _thread(run, name="asyncdiff_fast store"):
    threading.Thread(target=run, daemon=True, name=name).start()


class Asked:
    """One such call. `start(run)` lets a thread run it."""

    def __init__(self, ask, start=_thread):
        _wait_at_the_end()
        self._results, self._over, self.stop = queue.SimpleQueue(), threading.Event(), threading.Event()
        _running.add(self)
        start(lambda: self._run(ask))

    def _run(self, ask):
        try:
            found = ask(self.stop), None
        except Exception as error:
            found = None, error
        _running.discard(self)
        self._over.set()
        self._results.put(found)

    @property
    def is_done(self):
        """True if it has returned or raised."""
        return self._over.is_set()

    def result(self, seconds):
        """What it returned or raises. Raises: TimeoutError."""
        try:
            result, error = self._results.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"no answer in {seconds:g} s") from None
        finally:
            self.stop.set()
        if error is not None:
            raise error
        return result

    def join(self, seconds):
        """Wait for its end."""
        self.stop.set()
        self._over.wait(seconds)


class Helper:
    """A thread for many such calls, one after the other; another takes its place if one of them does not end."""

    def __init__(self):
        self._runs, self._last = None, None

    def ask(self, ask):
        """`Asked`."""
        if self._last is not None and not self._last.is_done:
            self.close()
        if self._runs is None:
            self._runs = queue.SimpleQueue()
            runs = self._runs
            _thread(lambda: [run() for run in iter(runs.get, None)], "asyncdiff_fast waits")
        self._last = Asked(ask, self._runs.put)
        return self._last

    def close(self):
        """End the thread after the call under way."""
        if self._runs is not None:
            self._runs.put(None)
        self._runs = self._last = None


def _wait_at_the_end():
    """Not by `atexit`: a process of multiprocessing ends without it."""
    global _waits_for_them
    if _waits_for_them != os.getpid():
        _waits_for_them = os.getpid()
        util.Finalize(None, _end, exitpriority=0)


def _end():
    deadline = time.monotonic() + EXIT_S
    for asked in list(_running):
        asked.join(max(0.0, deadline - time.monotonic()))
