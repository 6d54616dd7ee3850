"""Calls that may never end, each in a thread of its own, so that its caller can give up, or be interrupted."""

import atexit
import contextlib
import queue
import threading
import time

# A thread that is still inside such a call while the interpreter goes down would take the process with it.
EXIT_S = 1.0
_running = set()


def within(seconds, ask):
    """What `ask(stop)` returns or raises, or TimeoutError; `stop` is an event that is set once nobody waits."""
    return Asked(ask).result(seconds)


class Asked:
    """One such call."""

    def __init__(self, ask):
        self._results, self.stop = queue.SimpleQueue(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ask,), daemon=True, name="asyncdiff_fast store")
        _running.add(self)
        self._thread.start()

    def _run(self, ask):
        try:
            self._results.put((ask(self.stop), None))
        except Exception as error:
            self._results.put((None, error))
        finally:
            _running.discard(self)

    @property
    def is_done(self):
        """True if `result` will not wait."""
        return not self._results.empty()

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
        """Wait for the end of its thread."""
        self.stop.set()
        self._thread.join(seconds)


@atexit.register
def _end():
    deadline = time.monotonic() + EXIT_S
    for asked in list(_running):
        with contextlib.suppress(RuntimeError):
            asked.join(max(0.0, deadline - time.monotonic()))
