"""What travels between the patches of one plan: a slot for each site at synchronous steps, for each group of sites at
displaced ones, where it is posted when its last site has made its part and awaited by its first at the next step.
"""

from .sites import NORM
from .state import messages


class PatchSlots:
    """The slots of one patch. `states` are those of the plan's sites, in order. Collective to make.

    `phase` is the name under which ranks compare them; `outside` as `Capture.outside`.
    """

    def __init__(self, plan, states, exchange, phase, outside):
        self._plan, self._states, self._exchange, self._phase = plan, states, exchange, phase
        self._outside, self._grouped = outside, False
        self._alone, self._groups, self._first_of, self._last_of = {}, [], {}, {}
        self._frozen = []
        for norms in (False, True):
            numbers = []
            for index, (site, state) in enumerate(zip(plan.sites, states, strict=True)):
                sends, recvs = messages(state)
                if site.exchanges and (site.kind == NORM) == norms and (sends or recvs):
                    self._alone[id(state)] = exchange.slot(site.label, sends, recvs, depth=1)
                    numbers.append(index)
            self._freeze("norms" if norms else "sync", numbers)

    def group(self, way):
        """Register what displaced steps post together, of the sites that the first of them has met, and post it.

        With stages a rank meets only those of its own stage, the same on all patches. Collective.
        """
        numbers = []
        for number, group in enumerate(self._plan.groups(way)):
            pairs = [messages(self._states[i], displaced=True) for i in group]
            sends, recvs = [s for p in pairs for s in p[0]], [r for p in pairs for r in p[1]]
            if not sends and not recvs:
                continue
            slot = self._exchange.slot(f"patches {number}", sends, recvs, depth=2)
            self._first_of[group[0]], self._last_of[group[-1]] = (slot, [self._states[i] for i in group]), slot
            self._groups.append(slot)
            numbers.append(number)
        self._freeze("displaced", numbers)
        for slot in self._groups:
            self._exchange.post(slot)
        self._grouped = True

    def swap(self, state):
        """Synchronously: the others' parts of this call arrive. False if a site exchanges nothing."""
        slot = self._alone.get(id(state))
        if slot is not None:
            self._exchange.post(slot)
            self._exchange.wait(slot)
        return slot is not None

    def before(self, index, arrived):
        """A site is about to read what came since the last displaced step; `arrived(state)` of all that came with it.

        Before anything is posted together, the site's alone.
        """
        if not self._grouped:
            arrived(self._states[index])
        elif index in self._first_of:
            self._outside(self._come, *self._first_of[index], arrived)

    def after(self, index):
        """A site has made its own part."""
        if index in self._last_of:
            self._outside(self._exchange.post, self._last_of[index])

    def _come(self, slot, states, arrived):
        self._exchange.wait(slot)
        for state in states:
            arrived(state)

    def settle(self):
        """What displaced steps have under way must not come later than what is sent now."""
        if self._first_of:
            self._exchange.drain({f"{self._phase} displaced"})

    def release(self):
        """Forget the slots."""
        for phase in self._frozen:
            self._exchange.release(phase)

    def _freeze(self, name, numbers):
        self._frozen.append(f"{self._phase} {name}")
        self._exchange.freeze(self._frozen[-1], numbers)
