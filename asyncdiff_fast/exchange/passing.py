"""What ranks tell each other in passing: nobody waits for an answer, and who has told something else is found later."""

from . import wire
from .presence import later
from .waiting import Asked

# So many values are looked after; what nobody has answered until then is forgotten.
MOST = 16


class Passing:
    """Values of one epoch that are to be the same on some ranks, by number."""

    def __init__(self, store, me, ranks, epoch):
        self._store, self._me, self._others, self._epoch = store, me, [r for r in ranks if r != me], epoch
        self._values, self._open, self._asked = {}, set(), None

    def tell(self, number, value):
        """Tell a value, plain data. The others look when they have something to tell as well, or `look`."""
        self._values[number] = value
        self._open |= {(number, rank) for rank in self._others}

    def look(self):
        """(number, other rank) of a value that it has told otherwise, as far as that is known; None. Never waits."""
        if not self._values or (self._asked is not None and not self._asked.is_done):
            return None
        asked, self._asked = self._asked, Asked(self._ask)
        try:
            return asked.result(1) if asked is not None else None
        except (RuntimeError, TimeoutError):
            # The store is lost: others will say so.
            return None

    def forget(self):
        """The epoch is over: take back what was told. Never waits."""
        places = [f"passing/{self._epoch}/{number}/{self._me}" for number in self._values]
        if places:
            later(lambda: [self._store.delete_key(place) for place in places])

    def _ask(self, stop):
        for number in list(self._values):
            place = f"passing/{self._epoch}/{number}/{self._me}"
            if not self._store.check([place]):
                self._store.set(place, wire.dumps(self._values[number], place))
        for number, rank in sorted(self._open):
            place = f"passing/{self._epoch}/{number}/{rank}"
            if not self._store.check([place]):
                continue
            self._open.discard((number, rank))
            try:
                if wire.loads(self._store.get(place), place) != self._values[number]:
                    return number, rank
            except wire.Malformed:
                return number, rank
        for number in list(self._values)[:-MOST]:
            self._values.pop(number)
            self._open -= {(number, rank) for rank in self._others}
            self._store.delete_key(f"passing/{self._epoch}/{number}/{self._me}")
        return None
