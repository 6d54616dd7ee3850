"""Rounds of agreement through a key-value store: in each, every rank says something and hears all the others.

Rounds belong to an epoch. `begin` opens a new one, by a number that all ranks share whatever went wrong before: who is
behind takes the highest that another has announced, and who gives up takes back what it said. While a rank waits it
looks at what the others announce and at their processes, so that it learns at once of one that has died, has left, or
is somewhere else. The store has no authentication: see `wire` for what is read from it.
"""

import contextlib
import os
import threading
import time
from datetime import timedelta

from . import wire
from .errors import ExchangeError
from .processes import Siblings, has_ended, identity
from .waiting import Asked, within

# How often a rank that waits looks around.
LOOK_S = 0.1
# How long the keeper of the store waits for others to have read an answer.
READ_PATIENCE_S = 5.0


class Missing(ExchangeError):
    """Ranks that did not answer in time, or whose process has ended: `.ranks`, `.died`."""

    def __init__(self, ranks, died=False):
        super().__init__(f"rank {', '.join(map(str, ranks))}")
        self.ranks, self.died = list(ranks), died


class Rounds:
    """What one process keeps of its rounds with some others.

    Args:
        store: of torch.distributed, for these ranks alone.
        me, ranks: torch.distributed's numbers.
        keeps_store: whether the store ends with this process.
    """

    def __init__(self, store, me, ranks, keeps_store=False):
        self.store, self.me, self.ranks, self._keeps_store = store, me, tuple(ranks), keeps_store
        self.epoch = 0
        self._processes, self._siblings, self._asked, self._said = {}, None, None, False

    def begin(self, value, what, timeout_s):
        """(number of the new epoch, [every rank's value]). Collective. Raises: ExchangeError; `Missing`."""

        def ask(stop):
            self._introduce()
            epoch = self.epoch + 1
            while True:
                self.store.set(f"at/{self.me}", str(epoch))
                self.epoch, key = epoch, f"{epoch}/begin"
                self._say(key, what, value)
                try:
                    found = self._hear(key, self.ranks, ends, stop, epoch)
                    self._confirm(key, self.ranks, ends)
                    return epoch, found
                except _Ahead as ahead:
                    epoch = ahead.epoch
                    self.store.delete_key(f"{key}/{self.me}")
                except BaseException:
                    self.store.delete_key(f"{key}/{self.me}")
                    raise

        ends = time.monotonic() + timeout_s
        epoch, found = self._within(timeout_s, ask)
        return epoch, self._values(found, f"{epoch}/begin", what, value)

    def gather(self, key, value, what, ranks, timeout_s):
        """[every value of `ranks`] that they say under a key of this epoch. Collective. Raises as `begin`."""

        def ask(stop):
            self._say(key, what, value)
            found = self._hear(key, ranks, ends, stop)
            self._confirm(key, ranks, ends)
            return found

        ends = time.monotonic() + timeout_s
        return self._values(self._within(timeout_s, ask), key, what, value, ranks)

    def forget(self, key):
        """Delete what this rank has said under a key that all have read."""
        self._later(lambda: [self.store.delete_key(f"{k}/{self.me}") for k in (key, f"read/{key}")])

    def leave(self, epoch, why):
        """Tell the others, without waiting: this rank makes no more calls in an epoch.

        Args:
            why: text of a failure, or the number of calls made.
        """
        place = f"left/{epoch}/{self.me}"
        message = wire.dumps(why, place)
        self._later(lambda: (self.store.set(place, message), self.store.delete_key(f"left/{epoch - 8}/{self.me}")))

    def look(self, epoch, calls, ranks):
        """Raises ExchangeError if another of `ranks` is known to have died, left or ended. Never waits.

        Args:
            calls: number of this rank's calls of the epoch, with the one under way: an error if another made fewer.
        """
        if self._asked is not None and not self._asked.is_done:
            return
        asked, self._asked = self._asked, Asked(lambda stop: self._look(epoch, calls, ranks))
        if asked is not None:
            try:
                asked.result(1)
            except Missing as missing:
                raise ExchangeError(
                    f"rank {self.me} waited for {missing} and failed: its process has ended; see that rank's log and "
                    "start all ranks again"
                ) from None
            except ExchangeError:
                raise
            except (TimeoutError, RuntimeError):
                # The store cannot be asked: whoever waits goes on until its own limit.
                pass

    # Inside a thread.

    def _look(self, epoch, calls, ranks):
        for peer in ranks:
            if peer != self.me:
                self._look_at(peer, epoch, calls)

    def _look_at(self, peer, epoch, calls=None):
        """Raises: ExchangeError with what is known of a rank."""
        left = self._left(peer, epoch)
        if isinstance(left, str):
            raise ExchangeError(f"rank {peer} has left: {left}")
        if calls is not None and left is not None and left < calls:
            raise ExchangeError(
                f"rank {peer} has ended this generation after {left} calls of the denoiser, and this rank makes call "
                f"{calls}: ranks must stop at the same step",
                ended=True,
            )
        if self._ended(peer):
            raise Missing([peer], died=True)
        # Whoever has sent all that a call needs may be ahead of it.
        at = self._number(f"at/{peer}") if calls is None else 0
        if at > self.epoch:
            raise _Ahead(peer, at)

    def _left(self, peer, epoch):
        """How many calls a rank has made in an epoch, or why it has left; None if it has not."""
        place = f"left/{epoch}/{peer}"
        if not self.store.check([place]):
            return None
        try:
            return wire.loads(self.store.get(place), place)
        except wire.Malformed as error:
            raise ExchangeError(f"rank {peer}: {error}") from None

    def _ended(self, peer):
        """True if the process of a rank has ended, on this host."""
        if peer not in self._processes and self.store.check([f"process/{peer}"]):
            try:
                found = wire.loads(self.store.get(f"process/{peer}"), f"process/{peer}")
            except wire.Malformed as error:
                raise ExchangeError(f"rank {peer}: {error}") from None
            if not isinstance(found, list) or [type(x) for x in found] != [str, str, int, int]:
                raise ExchangeError(f"rank {peer} cannot be understood: it tells {found!r:.80} of its process")
            self._processes[peer] = found
        return peer in self._processes and has_ended(self._processes[peer])

    def _number(self, key):
        try:
            return int(self.store.get(key)) if self.store.check([key]) else 0
        except ValueError:
            return 0

    def _introduce(self):
        if not self._said:
            self.store.set(f"process/{self.me}", wire.dumps(identity(), f"process/{self.me}"))
            self._siblings, self._said = Siblings(), True

    def _say(self, key, what, value):
        place = f"{key}/{self.me}"
        self.store.set(place, wire.dumps((what, value), place))

    def _hear(self, key, ranks, ends, stop, epoch=None):
        """{other rank: what it said}. With `epoch` that epoch is being begun."""
        found = {}
        for peer in (r for r in ranks if r != self.me):
            place = f"{key}/{peer}"
            while peer not in found:
                if self._there(place, ends):
                    found[peer] = self.store.get(place)
                elif stop.is_set():
                    raise TimeoutError
                elif not self.store.check([place]):
                    self._miss(peer, place, found, ends, epoch)
        return found

    def _miss(self, peer, place, found, ends, epoch):
        """A rank has not answered yet. Raises if it will not."""
        missing = [r for r in self.ranks if r != self.me and r not in found]
        try:
            self._look_at(peer, self.epoch if epoch is None else epoch)
            for other in missing:
                if self._ended(other) and not self.store.check([place.rpartition("/")[0] + f"/{other}"]):
                    raise Missing([other], died=True)
            self._look_beside(missing)
        except ExchangeError:
            # It may have answered first, and gone on since.
            if not self.store.check([place]):
                raise
        if time.monotonic() > ends:
            raise Missing([r for r in missing if not self.store.check([place.rpartition("/")[0] + f"/{r}"])] or [peer])

    def _look_beside(self, missing):
        """Raises: Missing if processes started beside this one have ended before they said who they are."""
        unknown = [r for r in missing if r not in self._processes and not self.store.check([f"process/{r}"])]
        if not unknown or "TORCHELASTIC_RUN_ID" in os.environ:
            return
        come = {process[2] for process in self._processes.values()}
        if self._siblings.too_few(come, len(unknown)):
            raise Missing(unknown, died=True)

    def _there(self, place, ends):
        wait = min(LOOK_S, max(0.01, ends - time.monotonic()))
        try:
            self.store.wait([place], timedelta(seconds=wait))
            return True
        except RuntimeError:
            # Not there yet; if the store is lost, the next question tells.
            return False

    def _confirm(self, key, ranks, ends):
        """The process that keeps the store may end after this round, and the store with it: others must have read."""
        self.store.set(f"read/{key}/{self.me}", b"")
        if self._keeps_store:
            patience = time.monotonic() + min(READ_PATIENCE_S, ends - time.monotonic())
            for peer in (r for r in ranks if r != self.me):
                while not self._there(f"read/{key}/{peer}", patience) and time.monotonic() < patience:
                    if self._ended(peer):
                        break

    # Outside.

    def _within(self, timeout_s, ask):
        try:
            return within(timeout_s + 1, ask)
        except ExchangeError as error:
            raise _plain(error) from None
        except (RuntimeError, TimeoutError) as error:
            # The store is lost, or its host stopped. Without a launcher's, rank 0 keeps it.
            raise Missing([0]) from error

    def _values(self, found, key, what, value, ranks=None):
        """What all ranks said, in order. Raises: ExchangeError if some said it of something else."""
        answers = {self.me: (what, value)}
        for rank, message in found.items():
            try:
                answers[rank] = theirs, _ = wire.loads(message, f"{key}/{rank}")
            except (wire.Malformed, TypeError, ValueError) as error:
                raise ExchangeError(f"rank {rank} cannot be understood: {error}") from None
            if theirs != what:
                raise ExchangeError(
                    f"ranks are at different places: rank {self.me} agrees on {what}, rank {rank} on {theirs!s:.200}"
                )
        return [answers[rank][1] for rank in (self.ranks if ranks is None else ranks)]

    @staticmethod
    def _later(ask):
        """In a thread that nobody waits for."""

        def run():
            # If the store is lost, so is the run.
            with contextlib.suppress(RuntimeError):
                ask()

        threading.Thread(target=run, daemon=True, name="asyncdiff_fast notice").start()


def _plain(error):
    """Outside of this file, only the public class and those who are missing are known."""
    return ExchangeError(str(error)) if isinstance(error, _Ahead) else error


class _Ahead(ExchangeError):
    """Another rank has begun a later epoch."""

    def __init__(self, rank, epoch):
        super().__init__(f"rank {rank} has begun anew: a generation, or a patch, that this rank is not in")
        self.epoch = epoch
