"""What a forward meets at its sites, on one patch that passes through or on the whole picture."""

import contextlib

from ..calls.schedule import PatchMode
from ..patches.patch import Patch
from ..patches.sites import kind_of
from ..patches.way import Way


class MicroPatch(Patch):
    """One patch of those that pass through this rank; what its sites keep is shared with the others."""

    def bind(self, plan, kept):
        """Take the states of the sites that are kept here, `kept`: {place of a site in the plan: what is kept}."""
        self.plan, self._slots = plan, _NoSlots()
        self.look, self.bound = None, True
        self._order, self._states = plan.sites, {}
        for index, store in kept.items():
            site = plan.sites[index]
            self._states[(site.name, site.call), site.place] = (index, store.state(self.number))

    def begin(self, mode, exact=False):
        """See `Patch.begin`; with `exact` all that is kept must be of the same call."""
        self.group_norm = "stale" if exact else self.config.group_norm
        super().begin(mode, exact)

    def end(self, result):
        """This patch's result."""
        if self.way.displaced is None:
            self.way.displaced = tuple(self.way.met)
        return result


class _NoSlots:
    """Of a patch whose neighbours are on the same rank."""

    def settle(self):
        pass

    def before(self, index, arrived):
        pass

    def after(self, index):
        pass


class WholePicture:
    """An exact call, which leaves behind what micro-steps of the next one read. In place of a `Patch` under way.

    `part`: the number of the part of the batch that is computed.
    """

    mode, bound, within = PatchMode.SYNC, True, None

    def __init__(self, plan, kept):
        self.way, self.part = Way(), 0
        self._kept = {((plan.sites[i].name, plan.sites[i].call), plan.sites[i].place): x for i, x in kept.items()}

    def following(self, latent):
        """Nothing is noted."""
        return contextlib.nullcontext()

    def constant(self):
        """Nothing is put in place of a module's result."""
        return None

    def begin(self, mode, exact=False):
        """Nothing is kept of the call as a whole."""

    def cut(self, signature, args, kwargs):
        """The call as it is."""
        return args, kwargs

    def complete(self):
        """Sites are met as they come."""

    def end(self, result):
        """The result as it is."""
        return result

    def meet(self, func, args, kwargs):
        """The result of a watched function call."""
        if kind_of(func, args, kwargs):
            store = self._kept.get(self.way.at_site())
            if store is not None:
                store.fill(args, kwargs, self.part)
        return func(*args, **kwargs)
