"""Slots that are posted in the order of a plan: sends as their tensors are made, receives as early as that allows."""


class InOrder:
    """`_order` lists the keys of the `_slots` of one rank, as `exchange` has frozen them."""

    def __init__(self, exchange):
        self._exchange, self._slots, self._order, self._cursor = exchange, {}, [], 0

    def _send(self, key, fill):
        """Post a slot whose buffers `fill()` writes, once what was sent from them before has left."""
        slot = self._slots[key]
        self._exchange.acquire(slot)
        fill()
        self._exchange.post(slot)
        self._cursor += 1
        self._post_receives()

    def _post_receives(self):
        """Post the receives that stand before the next send."""
        while self._cursor < len(self._order):
            slot = self._slots[self._order[self._cursor]]
            if slot.sends:
                return
            self._exchange.post(slot)
            self._cursor += 1
