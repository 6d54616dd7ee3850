"""Slots over `_C`, the exchange engine in C++: what `exchange.py` opens where it can."""

import atexit
import contextlib
import logging
import sys
import weakref

import torch

from .errors import ExchangeError
from .slots import Slot, compare

try:
    from .. import _C
except ImportError as error:
    _C, _why = None, f"asyncdiff_fast._C is not built ({error}); install a C++ compiler and asyncdiff_fast again"
else:
    _C.use_error(ExchangeError)

log = logging.getLogger(__name__)
_engines = weakref.WeakSet()


def missing():
    """Why there is no engine in this installation; an empty string where there is one."""
    return _why if _C is None else ""


class Engine:
    """The slots of one rank over a channel of `_C`.

    `kind` is "nccl" (CUDA tensors by send and receive), "nccl-puts" (by one-sided puts) or "shm" (CPU tensors);
    `device` is where the tensors lie, whichever device is current.
    """

    _open = False

    def __init__(self, world, kind, device, channel, watch=None):
        self.world, self.kind, self.device = world, kind, device
        self._channel, self._watch = channel, watch
        self._unfrozen, self._phases = [], {}
        self._reported, self._open = False, True
        _engines.add(self)

    def slot(self, name, sends=(), recvs=(), depth=2):
        """Register a slot; it can be posted after `freeze`. Returns `Slot`."""
        slot = Slot(name, tuple(sends), tuple(recvs), depth, -1)
        sizes = {b.nbytes for x in (*sends, *recvs) for b in x.buffers}
        wrong = [b.device for x in (*sends, *recvs) for b in x.buffers if not self._has(b.device)]
        if wrong:
            raise ValueError(f"slot {name!r} is on {wrong[0]}; this exchange moves tensors on {self.device}")
        if any(len({b.nbytes for b in x.buffers}) > 1 for x in (*sends, *recvs)):
            raise ValueError(f"slot {name!r} needs buffers of one size for each peer: got {sorted(sizes)} bytes")
        slot.tag = self._channel.add(name, _listed(sends), _listed(recvs), depth)
        self._unfrozen.append(slot)
        return slot

    def freeze(self, phase, order=None):
        """Fix the order of the slots made since the last freeze and compare it with every peer. Collective.

        Args:
            phase: name of this set of slots; each phase has its own order.
            order: number of each slot in an order that all ranks share; it must grow.
        Raises: ExchangeError if two ranks list different slots, orders or sizes for each other.
        """
        slots, self._unfrozen = self._unfrozen, []
        if order is not None and sorted(set(order)) != list(order):
            raise ValueError(f"the numbers of slots must grow: got {list(order)} in {phase}")
        tags = [slot.tag for slot in slots]
        windows = compare(self.world, slots, self._channel.window(tags), phase)
        for place, slot in enumerate(slots):
            slot.phase, slot.place = phase, place
        with self._reporting():
            self._channel.freeze(phase, tags, windows)
        self._phases[phase] = slots

    def acquire(self, slot):
        """Before writing the next send buffer: its last use must be over."""
        try:
            self._channel.acquire(slot.tag, self._stream())
        except ExchangeError:
            self.report_posts()
            raise

    def post(self, slot):
        """Begin the slot's sends and receives: what was written on the current stream until now is what travels."""
        try:
            self._channel.post(slot.tag, self._stream())
        except ExchangeError:
            self.report_posts()
            raise
        slot.epoch += 1

    def wait(self, slot, lag=0):
        """Make the current stream (the host, for CPU tensors) wait for the epoch `lag` posts before the latest."""
        try:
            self._channel.wait(slot.tag, self._stream(), lag)
        except ExchangeError:
            self.report_posts()
            raise

    def drain(self, phases=None):
        """Let the host wait for everything that is under way; both sides must have posted it."""
        with self._reporting():
            self._channel.drain(
                [s.tag for p, slots in self._phases.items() if not phases or p in phases for s in slots]
            )

    def release(self, phase):
        """Forget the slots of a phase, after `drain`."""
        with self._reporting():
            self._channel.release(phase)
        self._phases.pop(phase)

    def check(self):
        """Raises: ExchangeError if the exchange has failed before."""
        with self._reporting():
            self._channel.check()

    def abort(self, reason):
        """Make every later call raise, on all ranks."""
        if self._open:
            self._channel.abort(encodable(reason))

    @contextlib.contextmanager
    def step(self):
        """Around one call: if it raises, this rank posts no more, and peers that wait for it raise ExchangeError."""
        try:
            yield
        except BaseException as error:
            self._leave(described(error))
            raise

    def _leave(self, reason):
        if not self._open:
            return
        self._channel.leave(encodable(reason))
        if self._watch is not None:
            self._watch.leave()

    def stats(self):
        """Dict: sent_bytes, posts, post_s, wait_s (host time), wait_s_by_slot, waits_elided; since `clear_stats`."""
        found = self._channel.stats()
        return {
            "sent_bytes": found["sent_bytes"],
            "posts": found["posts"],
            "post_s": found["post_us"] / 1e6,
            "wait_s": found["wait_us"] / 1e6,
            "wait_s_by_slot": {name: us / 1e6 for name, us in found["wait_us_by_slot"].items()},
            "waits_elided": found["waits_elided"],
        }

    def clear_stats(self):
        """Begin to count anew."""
        self._channel.clear_stats()

    def history(self):
        """The last 256 posts: (phase, slot, epoch, age in seconds, "queued", "running" or "done")."""
        return self._channel.history()

    def close(self, patience_s=None):
        """Wait for what is under way, if the exchange is whole, and drop buffers. Raises a failure nobody has seen."""
        if not self._open:
            return
        _engines.discard(self)
        self._open = False
        try:
            with self._reporting():
                self._channel.close(self.world.timeout_s if patience_s is None else patience_s)
        finally:
            if self._watch is not None:
                self._watch.end()
            # What still knows this exchange must not keep its memory and threads.
            self._channel, self._unfrozen, self._phases = _Closed(), [], {}

    def __del__(self):
        # The channel knows addresses only: whatever still copies must end before the buffers go.
        if self._open:
            with contextlib.suppress(RuntimeError):
                self._channel.leave("it was dropped without being closed")
                self.close(0)

    def _has(self, device):
        """Whether tensors on a device are this exchange's."""
        return device.type == self.device.type and self.device.index in (None, device.index)

    def _stream(self):
        # Its handle alone: to make torch's object of a stream takes longer than the rest of what is Python's in a post.
        return 0 if self.kind == "shm" else torch._C._cuda_getCurrentRawStream(self.device.index)

    @contextlib.contextmanager
    def _reporting(self):
        """Around calls of the channel that come seldom; posts and waits, of which a call has many, do without."""
        try:
            yield
        except ExchangeError:
            self.report_posts()
            raise

    def report_posts(self):
        """Log, once, what was posted last before a failure."""
        if self._reported or not self._open or not self._channel.broken():
            return
        self._reported = True
        rows = self._channel.history()
        shown = [row for i, row in enumerate(rows) if row[4] != "done" or i >= len(rows) - 8]
        lines = [
            f"  {age:8.3f} s ago  {slot} (exchange {epoch}, {phase}): {state}"
            for phase, slot, epoch, age, state in shown
        ]
        log.error("rank %s, last posts:\n%s", self.world.name, "\n".join(lines) or "  none")


class _Closed:
    """In place of a channel that was closed."""

    def __getattr__(self, name):
        raise ExchangeError("the exchange is closed")

    def broken(self):
        """As a channel's."""
        return "the exchange is closed"


def encodable(text):
    """A text that can be written in UTF-8, whatever is in it."""
    return text.encode("utf-8", "backslashreplace").decode()


def described(error):
    """What other ranks are told of an exception."""
    return encodable(f"{type(error).__name__}: {error}")


def _listed(moves):
    return [(x.peer, [b.data_ptr() for b in x.buffers], x.buffers[0].nbytes) for x in moves]


@atexit.register
def _close_all():
    """Threads and communicators must be gone before torch is taken down."""
    # After an exception nobody gets what is left; otherwise a slow peer may still need it.
    failed = getattr(sys, "last_value", None) is not None
    for engine in list(_engines):
        with contextlib.suppress(ExchangeError):
            engine.close(0 if failed else None)
