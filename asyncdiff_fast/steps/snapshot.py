"""A scheduler as it was, and the random numbers that a step draws: what a replay begins from."""

import collections

import torch
from torch.utils._pytree import tree_leaves

_CONTAINERS = (list, tuple, set, collections.deque)


class Snapshot:
    """All that a scheduler keeps, copied: numbers, lists, tensors. Objects of other kinds are kept by reference.

    Args:
        part: gives what is kept of a tensor, all of it by default.
    """

    def __init__(self, scheduler, part=lambda x: x):
        known = {}
        self._kept = {name: _copied(x, known, part) for name, x in vars(scheduler).items()}

    def restore(self, scheduler):
        """The scheduler, or another one of its class, is as it was. To be used once."""
        vars(scheduler).clear()
        vars(scheduler).update(self._kept)


def _copied(x, known, part):
    """A copy in which what was one tensor is one tensor."""
    if isinstance(x, torch.Tensor):
        if id(x) not in known:
            # The original is kept too, so that nothing else gets its number.
            known[id(x)] = x, part(x).clone()
        return known[id(x)][1]
    if type(x) is dict:
        return {key: _copied(item, known, part) for key, item in x.items()}
    if type(x) is collections.deque:
        return collections.deque((_copied(item, known, part) for item in x), x.maxlen)
    if type(x) in _CONTAINERS:
        return type(x)(_copied(item, known, part) for item in x)
    return x.copy() if type(x).__module__ == "numpy" and hasattr(x, "copy") else x


class Draws:
    """The states of all generators that a step may draw from, as they are now: those it is given, and torch's own.

    Args:
        given: the step's arguments.
        device: of its sample.
    """

    def __init__(self, given, device):
        self._generators = {id(g): g for g in tree_leaves(given) if isinstance(g, torch.Generator)}
        self._generators[id(torch.default_generator)] = torch.default_generator
        if device.type == "cuda":
            own = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
            self._generators[id(own)] = own
        self._states = {name: g.get_state() for name, g in self._generators.items()}

    def used(self):
        """Names of the generators from which something was drawn since."""
        return {name for name, g in self._generators.items() if not torch.equal(g.get_state(), self._states[name])}

    def restore(self, used):
        """What is drawn next from those `used` is what was drawn after the states were taken; others are let alone."""
        for name in used & self._generators.keys():
            self._generators[name].set_state(self._states[name])
