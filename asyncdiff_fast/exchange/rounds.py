"""Rounds of agreement through a key-value store: in each, every rank says something and hears all the others.

Rounds belong to an epoch. `begin` opens a new one, by a number that all ranks share whatever went wrong before: who is
behind takes the highest that another has announced, and who gives up takes back what it said. While a rank waits it
looks at what is known of the others, so that it learns at once of one that has died, has left, or is somewhere else.
The store has no authentication: see `wire` for what is read from it.
"""

import time

from . import wire
from .errors import ExchangeError
from .presence import Ahead, Missing, Presence
from .waiting import within

# How often a rank that waits looks around.
LOOK_S = 0.1
# Between two questions to the store: it is asked often at first, since most answers are there soon.
FIRST_PAUSE_S, LAST_PAUSE_S = 1e-4, 4e-3
# How long the keeper of the store waits for others to have read an answer.
READ_PATIENCE_S = 5.0


class Rounds:
    """What one process keeps of its rounds with some others.

    Args:
        store: of torch.distributed, for these ranks alone.
        me, ranks: torch.distributed's numbers.
        keeps_store: whether the store ends with this process.
    """

    def __init__(self, store, me, ranks, keeps_store=False):
        self.store, self.me, self.ranks, self._keeps_store = store, me, tuple(ranks), keeps_store
        self.epoch, self._read_by_all = 0, []
        self.presence = Presence(store, me, [rank for rank in self.ranks if rank != me], keeps_store)

    def begin(self, value, what, timeout_s):
        """(number of the new epoch, [every rank's value]). Collective. Raises: ExchangeError; `Missing`."""

        def ask(stop):
            self.presence.introduce()
            epoch = self.epoch + 1
            while True:
                self.presence.begun(epoch)
                self.epoch, key = epoch, f"{epoch}/begin"
                self._say(key, what, value)
                try:
                    found = self._hear(key, self.ranks, ends, stop)
                    self._confirm(key, self.ranks, ends)
                    return epoch, found
                except Ahead as ahead:
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
        """What this rank has said under a key, all have read: it is deleted in the next round."""
        self._read_by_all.append(key)

    # Inside a thread.

    def _say(self, key, what, value):
        while self._read_by_all:
            old = self._read_by_all.pop()
            for name in (old, f"read/{old}"):
                self.store.delete_key(f"{name}/{self.me}")
        place = f"{key}/{self.me}"
        self.store.set(place, wire.dumps((what, value), place))

    def _hear(self, key, ranks, ends, stop):
        """{other rank: what it said}."""
        found = {}
        for peer in (r for r in ranks if r != self.me):
            place = f"{key}/{peer}"
            while peer not in found:
                if self._there(place, ends):
                    found[peer] = self.store.get(place)
                elif stop.is_set():
                    raise TimeoutError
                else:
                    self._miss([r for r in ranks if r != self.me and r not in found], key, ends)
        return found

    def _miss(self, missing, key, ends):
        """Some ranks have not answered yet. Raises if one will not."""
        epoch = int(key.partition("/")[0])
        try:
            for peer in missing:
                self.presence.agrees(peer, epoch, self.epoch)
            self.presence.beside(missing)
        except ExchangeError:
            # They may have answered first, and gone on since.
            if not self.store.check([f"{key}/{peer}" for peer in missing]):
                raise
        if time.monotonic() > ends:
            missing = [peer for peer in missing if not self.store.check([f"{key}/{peer}"])]
            if missing:
                raise Missing(missing, alive=self.presence.live(missing))

    def _there(self, place, ends):
        # Not by `wait`: a TCPStore says on stderr that it has waited, and lets nobody else ask meanwhile.
        until, pause = min(time.monotonic() + LOOK_S, max(ends, time.monotonic() + 0.01)), FIRST_PAUSE_S
        while not self.store.check([place]):
            if time.monotonic() > until:
                return False
            time.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_S)
        return True

    def _confirm(self, key, ranks, ends):
        """The process that keeps the store may end after this round, and the store with it: others must have read."""
        self.store.set(f"read/{key}/{self.me}", b"")
        if self._keeps_store:
            patience = min(time.monotonic() + READ_PATIENCE_S, ends)
            for peer in (r for r in ranks if r != self.me):
                while not self._there(f"read/{key}/{peer}", patience) and time.monotonic() < patience:
                    if self.presence.ended(peer):
                        break

    # Outside.

    def _within(self, timeout_s, ask):
        try:
            return within(timeout_s + 1, ask)
        except Ahead as error:
            raise ExchangeError(str(error)) from None
        except ExchangeError:
            raise
        except (RuntimeError, TimeoutError) as error:
            # The store is lost, or its host stopped. Without a launcher's, rank 0 keeps it.
            raise Missing([0]) from error

    def _values(self, found, key, what, value, ranks=None):
        """What all ranks said, in order. Raises: ExchangeError if some said it of something else."""
        answers = {self.me: value}
        for rank, message in found.items():
            try:
                theirs, answers[rank] = wire.loads(message, f"{key}/{rank}")
            except (wire.Malformed, TypeError, ValueError) as error:
                raise ExchangeError(f"rank {rank} cannot be understood: {error}") from None
            if theirs != what:
                raise ExchangeError(
                    f"ranks are at different places: rank {self.me} agrees on {what}, rank {rank} on {theirs!s:.200}"
                )
        return [answers[rank] for rank in (self.ranks if ranks is None else ranks)]
