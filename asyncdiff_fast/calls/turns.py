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
        may_begin: asked where a generation is taken for ended since all is quiet: False if one must wait all the same.
    """

    def __init__(self, patience_s, may_begin=lambda: True):
        self._patience_s, self._may_begin = patience_s, may_begin
        self._changed = threading.Condition()
        self._owner, self._ended, self._inside = None, True, False
        self._last, self._pause = 0.0, 0.0
        # Threads whose generation was taken for ended.
        self._clocks, self._lost, self._num_waiting = {}, set(), 0
        # What the thread begins with that the owner lets go first, see `hand_over`.
        self._wanted = None

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

    def tick(self, timestep, key, inputs=lambda: None):
        """Wait for this thread's turn, and place its call, see `Clock.tick`. `leave` follows.

        Args:
            inputs: gives what tells this call from those of other threads; asked while one hands its turn over.
        Raises: RuntimeError if another thread's generation goes on for too long, or began in the middle of this one's.
        """
        me = threading.current_thread()
        with self._changed:
            self._wait(inputs)
            self._clocks = {thread: clock for thread, clock in self._clocks.items() if thread.is_alive()}
            clock = self._clocks.setdefault(me, Clock())
            if self._owner is not me and me not in self._lost:
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
            self._pause = 0.0 if tick.begins else max(self._pause, time.monotonic() - self._last)
            self._take()
        return tick

    def hand_over(self, inputs, wanted, seconds, shared_s):
        """Let a thread begin first whose inputs are `wanted`, then wait for the turn again with one's own, `inputs`.

        Args:
            seconds, shared_s: how long such a thread is waited for, and how long if more than this one is seen.
        Returns: False if none came: the turn has stayed with this thread.
        Raises: RuntimeError as `tick`; the turn is another thread's then.
        """
        me, began = threading.current_thread(), time.monotonic()
        with self._changed:
            self._wanted = wanted
            self._changed.notify_all()
            try:
                while self._owner is me:
                    if time.monotonic() - began > (shared_s if self.is_shared else seconds):
                        return False
                    self._changed.wait(_PERIOD_S)
            finally:
                if self._owner is me:
                    self._wanted = None
            # Another may want this thread before the turn comes by itself.
            self._wait(lambda: inputs)
            self._pause = 0.0
            self._take()
        return True

    def leave(self):
        """The call that `tick` has placed is over."""
        with self._changed:
            if self._owner is threading.current_thread():
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

    def _wait(self, inputs):
        me, began, mine = threading.current_thread(), time.monotonic(), None
        self._num_waiting += 1
        try:
            while not self._is_free(me):
                if self._wanted is not None:
                    mine = inputs() if mine is None else mine
                    if mine == self._wanted:
                        return
                if time.monotonic() - began > self._patience_s:
                    raise RuntimeError(
                        f"thread {me.name} waited {self._patience_s:g} s for thread {self._owner.name} to end its "
                        "generation with the same patched denoiser: one thread at a time can use it"
                    )
                self._changed.wait(_PERIOD_S)
        finally:
            self._num_waiting -= 1

    def _take(self):
        me, owner = threading.current_thread(), self._owner
        # Who has handed its turn over has not begun.
        if owner not in (None, me) and owner.is_alive() and not self._ended and self._wanted is None:
            self._lost.add(owner)
        self._owner, self._ended, self._inside, self._wanted = me, False, True, None

    def _is_free(self, me):
        if self._owner is me or self._owner is None or not self._owner.is_alive():
            return True
        if self._inside:
            return False
        quiet = time.monotonic() - self._last > QUIET_S + QUIET_PAUSES * self._pause
        return self._ended or (quiet and self._may_begin())
