"""Threads that call one denoiser take turns: a generation is of one thread, and the next thread waits for its end."""

import threading
import time

from .clock import Clock

# Without a pipeline nothing tells of a generation's end: so long, and this many times the longest pause between two of
# its calls, nothing must have come.
QUIET_S = 1.0
QUIET_PAUSES = 10
_PERIOD_S = 0.02


class Turns:
    """Whose generation is under way, with a `Clock` for each thread.

    Args:
        patience_s: how long a thread waits for its turn.
    """

    def __init__(self, patience_s):
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._owner, self._ended, self._inside = None, True, False
        self._last, self._pause = 0.0, 0.0
        # Threads whose generation was taken for ended.
        self._clocks, self._lost, self._num_waiting = {}, set(), 0

    @property
    def is_inside(self):
        """True within a call of this thread: the denoiser may call itself."""
        return self._inside and self._owner is threading.current_thread()

    @property
    def is_taken(self):
        """True if `tick` would wait."""
        return not self._is_free(threading.current_thread())

    @property
    def is_shared(self):
        """True if more than one living thread calls the denoiser."""
        return self._num_waiting > 0 or sum(thread.is_alive() for thread in list(self._clocks)) > 1

    def tick(self, timestep, key):
        """Wait for this thread's turn, and place its call, see `Clock.tick`. `leave` follows.

        Raises: RuntimeError if another thread's generation goes on for too long, or began in the middle of this one's.
        """
        me, began = threading.current_thread(), time.monotonic()
        with self._changed:
            while not self._is_free(me):
                if time.monotonic() - began > self._patience_s:
                    raise RuntimeError(
                        f"thread {me.name} waited {self._patience_s:g} s for thread {self._owner.name} to end its "
                        "generation with the same patched denoiser: one thread at a time can use it"
                    )
                self._num_waiting += 1
                try:
                    self._changed.wait(_PERIOD_S)
                finally:
                    self._num_waiting -= 1
            new = self._owner is not me
            if new and not self._ended and self._owner is not None and self._owner.is_alive():
                self._lost.add(self._owner)
            self._clocks = {thread: clock for thread, clock in self._clocks.items() if thread.is_alive()}
            clock = self._clocks.setdefault(me, Clock())
            if new and me not in self._lost:
                clock.end()
            tick = clock.tick(timestep, key)
            lost = me in self._lost
            self._lost.discard(me)
            if lost and not tick.begins:
                clock.end()
                raise RuntimeError(
                    f"thread {self._owner.name} began a generation with the same patched denoiser in the middle of "
                    f"that of thread {me.name}: one thread at a time can use it"
                )
            now = time.monotonic()
            self._pause = 0.0 if new or tick.begins else max(self._pause, now - self._last)
            self._owner, self._ended, self._inside = me, False, True
        return tick

    def leave(self):
        """The call that `tick` has placed is over."""
        with self._changed:
            self._inside, self._last = False, time.monotonic()

    def end(self):
        """This thread's generation is over; its next call begins anew."""
        me = threading.current_thread()
        with self._changed:
            if me in self._clocks:
                self._clocks[me].end()
            if self._owner is me:
                self._ended = True
                self._changed.notify_all()

    def _is_free(self, me):
        if self._owner is me or self._owner is None or not self._owner.is_alive():
            return True
        if self._inside:
            return False
        return self._ended or time.monotonic() - self._last > QUIET_S + QUIET_PAUSES * self._pause
