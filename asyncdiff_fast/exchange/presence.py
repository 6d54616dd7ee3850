"""What a rank lets the others know of itself beside what they agree on, and what it knows of them: in a store, for
whoever waits. Where its process is, which epoch it has begun, and whether it has left that again.
"""

import threading
import time

from . import wire
from .errors import ExchangeError
from .processes import Siblings, has_ended, has_launcher, identity
from .waiting import Asked

# How long the keeper of the store waits for others to have read why it left.
HEARD_PATIENCE_S = 5.0
HEARD_PAUSE_S = 0.02


class Missing(ExchangeError):
    """Ranks that did not answer in time, or whose process has ended: `.ranks`, `.died`, `.fate`.

    Args:
        alive: whether their processes are known to live.
    """

    def __init__(self, ranks, died=False, alive=False):
        super().__init__(f"rank {', '.join(map(str, ranks))}")
        self.ranks, self.died, self._alive = list(ranks), died, alive

    @property
    def fate(self):
        """What has become of them, and what to do."""
        if self.died:
            return "its process has ended; see its log, and start all ranks again"
        if self._alive:
            return (
                "its process lives: it is slow, as where a first call compiles for minutes, hangs, or does not run the "
                "same script; see its log, or raise timeout_s"
            )
        return "it died, hangs, or does not run the same script; see its log, or raise timeout_s"


class Ahead(ExchangeError):
    """Another rank has begun a later epoch, `.epoch`."""

    def __init__(self, rank, epoch):
        super().__init__(f"rank {rank} has begun anew: a generation, or a patch, that this rank is not in")
        self.epoch = epoch


class Presence:
    """This rank among others in a store of torch.distributed. What asks the store may wait for it, but for `look`.

    Args:
        others: their numbers.
        keeps_store: whether the store ends with this process.
    """

    def __init__(self, store, me, others=(), keeps_store=False):
        self._store, self._me, self._others, self._keeps_store = store, me, tuple(others), keeps_store
        self._processes, self._siblings, self._told = {}, None, False
        # Of which epoch this rank asks, and its question.
        self._asked = None
        # Set once others can read that this rank has left its last epoch.
        self._left_last = None

    def introduce(self):
        """Tell where this process is."""
        if not self._told:
            place = f"process/{self._me}"
            self._store.set(place, wire.dumps(identity(), place))
            self._siblings, self._told = Siblings(), True

    def begun(self, epoch):
        """Tell which epoch this rank begins, after why it has left the last one: who waits there asks for both."""
        if self._left_last is not None:
            self._left_last.wait()
        self._store.set(f"at/{self._me}", str(epoch))

    def at(self, rank):
        """The latest epoch that a rank has begun, 0 before any."""
        return self._number(f"at/{rank}")

    def leave(self, epoch, why):
        """Tell, without waiting but at the end of the process: this rank makes no more calls in an epoch.

        Args:
            why: text of a failure, or the number of calls made, or both in a list: a failure after these calls.
        """
        place = f"left/{epoch}/{self._me}"
        message = wire.dumps(why, place)
        written = self._left_last = threading.Event()

        def tell(stop):
            try:
                self._store.set(place, message)
                self._store.delete_key(f"left/{epoch - 8}/{self._me}")
            finally:
                written.set()
            if self._keeps_store and isinstance(why, str):
                self._until_heard(epoch)

        Asked(tell)

    def _until_heard(self, epoch):
        """Wait until all others know of this rank's failure, or need not."""
        ends, others = time.monotonic() + HEARD_PATIENCE_S, set(self._others)
        while others and time.monotonic() < ends:
            others -= {r for r in others if self._has_heard(r, epoch)}
            time.sleep(HEARD_PAUSE_S)

    def _has_heard(self, rank, epoch):
        return self._store.check([f"left/{epoch}/{rank}"]) or self.at(rank) > epoch or self.ended(rank)

    def look(self, epoch, calls, ranks):
        """Raises ExchangeError if one of `ranks` is known to have died, left or ended. Never waits.

        Args:
            calls: number of this rank's calls of the epoch, with the one under way: an error if another made fewer.
        """
        asked_of, asked = self._asked or (epoch, None)
        if asked is not None and not asked.is_done:
            return
        self._asked = epoch, Asked(lambda stop: self._look(epoch, calls, ranks))
        # An answer about an epoch that is over says nothing of this one.
        if asked is None or asked_of != epoch:
            return
        try:
            asked.result(1)
        except Missing as missing:
            raise ExchangeError(
                f"rank {self._me} waited for {missing} and failed: its process has ended; see that rank's log and "
                "start all ranks again"
            ) from None
        except ExchangeError:
            raise
        except (TimeoutError, RuntimeError):
            # The store cannot be asked: whoever waits goes on until its own limit.
            pass

    def reasons(self, epoch, ranks, seconds):
        """Texts of what `ranks` say that they have failed by, as far as they do within some seconds."""

        def ask(stop):
            places = {rank: f"left/{epoch}/{rank}" for rank in ranks if rank != self._me}
            while not stop.is_set():
                told = [rank for rank, place in places.items() if self._store.check([place])]
                if len(told) >= max(len(places) - 1, 1) or time.monotonic() > ends:
                    texts = {rank: self._read(rank, places[rank]) for rank in told}
                    texts = {rank: text[1] if isinstance(text, list) else text for rank, text in texts.items()}
                    return [f"rank {rank}: {text!s:.1000}" for rank, text in texts.items() if isinstance(text, str)]
                stop.wait(0.02)

        ends = time.monotonic() + seconds
        try:
            return Asked(ask).result(seconds + 1)
        except (RuntimeError, TimeoutError):
            return []

    def _look(self, epoch, calls, ranks):
        for rank in ranks:
            if rank != self._me:
                self._in_call(rank, epoch, calls)

    def _in_call(self, rank, epoch, calls):
        # Before what it says: whoever has ended may have said why just before.
        ended = self.ended(rank)
        # Whoever has sent all that a call needs may have begun another epoch since.
        left, why = self._left(rank, epoch)
        if left is not None and left < calls and why is not None:
            raise ExchangeError(
                f"rank {rank} has left this generation after {left} calls of the denoiser: {why!s:.2000}"
            )
        if left is not None and left < calls:
            raise ExchangeError(
                f"rank {rank} has ended this generation after {left} calls of the denoiser, and this rank makes call "
                f"{calls}: ranks must stop at the same step",
                ended=True,
            )
        if ended:
            raise Missing([rank], died=True)

    def agrees(self, rank, epoch, begun):
        """Raises ExchangeError if a rank that is silent in an epoch will stay so; `begun` is the latest epoch here."""
        # Before what it says: it may have said why just before.
        ended, at = self.ended(rank), self.at(rank)
        self._left(rank, epoch)
        if ended:
            raise Missing([rank], died=True)
        if at > begun:
            raise Ahead(rank, at)

    def beside(self, missing):
        """Raises: Missing if processes started beside this one have ended before they told who they are."""
        unknown = [r for r in missing if r not in self._processes and not self._store.check([f"process/{r}"])]
        if not unknown or has_launcher():
            return
        come = {process[2] for process in self._processes.values()}
        if self._siblings.too_few(come, len(unknown)):
            raise Missing(unknown, died=True)

    def ended(self, rank):
        """True if the process of a rank has ended, on this host."""
        if rank not in self._processes and self._store.check([f"process/{rank}"]):
            found = self._read(rank, f"process/{rank}")
            if not isinstance(found, list) or [type(x) for x in found] != [str, str, int, int]:
                raise ExchangeError(f"rank {rank} cannot be understood: it tells {found!r:.80} of its process")
            self._processes[rank] = found
        return rank in self._processes and has_ended(self._processes[rank])

    def live(self, ranks):
        """True if the processes of all these ranks are known, and none has ended."""
        return all(not self.ended(rank) and rank in self._processes for rank in ranks)

    def _left(self, rank, epoch):
        """(how many calls a rank made in an epoch that it has ended, else None; why, if it failed after them).

        Raises: ExchangeError if it failed.
        """
        place = f"left/{epoch}/{rank}"
        left = self._read(rank, place) if self._store.check([place]) else None
        calls, why = left if isinstance(left, list) and len(left) == 2 else (left, None)
        if calls is not None and type(calls) is not int:
            raise ExchangeError(f"rank {rank} has left: {left!s:.2000}")
        return calls, why

    def _read(self, rank, place):
        try:
            return wire.loads(self._store.get(place), place)
        except wire.Malformed as error:
            raise ExchangeError(f"rank {rank} cannot be understood: {error}") from None

    def _number(self, key):
        try:
            return int(self._store.get(key)) if self._store.check([key]) else 0
        except ValueError:
            return 0


def later(ask):
    """Ask the store, and let nobody wait for it but the end of the process. If the store is lost, so is the run."""
    Asked(lambda stop: ask())
