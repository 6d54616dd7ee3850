"""Unit calls of one forward, in order, and what stands in for the result of one that this rank does not compute."""

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

_TENSOR = object()


def structure_of(tree):
    """(leaves, spec) of a tree, with a mark in place of each tensor."""
    leaves, spec = tree_flatten(tree)
    return [_TENSOR if isinstance(x, torch.Tensor) else x for x in leaves], spec


def with_tensors(structure, tensors):
    """The tree of a structure with these tensors."""
    leaves, spec = structure
    tensors = iter(tensors)
    return tree_unflatten([next(tensors) if x is _TENSOR else x for x in leaves], spec)


class Replay:
    """The units of a graph on one rank; `structures` are those of their results, by index."""

    def __init__(self, graph, placeholders):
        self.graph, self.structures = graph, {}
        self._placeholders = placeholders
        self._index = {unit.key: i for i, unit in enumerate(graph.units)}
        self._names = {unit.name for unit in graph.units}
        # What a later unit changes in place may be known by other names too, so its result is put where it lies.
        self._rewritten = {graph.values[v].ref.storage for unit in graph.units for v in unit.writes}
        self.restart()

    def restart(self):
        """A forward begins."""
        self._ordinals, self._seen = {}, 0

    def knows(self, name):
        """False for a unit of another plan: here it is part of a larger one, or holds smaller ones."""
        return name in self._names

    def turn(self, name):
        """(index of the unit that a module's next call is, or None; what is odd about it, or None)."""
        ordinal = self._ordinals.get(name, 0)
        self._ordinals[name] = ordinal + 1
        index = self._index.get((name, ordinal))
        if index is None:
            return None, f"{name} was called once more than in the traced forward"
        odd = None if index == self._seen else f"{name} was called in another order than in the traced forward"
        self._seen += 1
        return index, odd

    @property
    def missing(self):
        """What is odd about a forward that is over, or None."""
        left = len(self._index) - self._seen
        return f"{left} units of the traced forward were not called" if left else None

    def learn(self, index, result):
        """Keep the structure of a unit's result. Returns what is odd about it, or None."""
        found = structure_of(result)
        if self.structures.setdefault(index, found) != found:
            return f"{self.graph.units[index].name} returned another structure or other numbers than before"
        return None

    def tensors(self, index, result, args, kwargs):
        """{value: tensor} of everything a unit made."""
        unit, values = self.graph.units[index], self.graph.values
        found = {}
        for leaf, x in zip(unit.leaves, tree_leaves(result), strict=True):
            if leaf is not None and leaf[0] == "value":
                found[leaf[1]] = x
        if unit.writes:
            arguments = tree_leaves((args, kwargs))
            found.update((v, arguments[values[v].argument]) for v in unit.writes)
        return found

    def result(self, index, args, kwargs, known, arrive):
        """A unit's result without computing it.

        Args:
            known: {value: tensor} of what this rank has of it; placeholders stand for the rest.
            arrive: called before one of them is read here.
        """
        unit, values = self.graph.units[index], self.graph.values
        known = dict(known)
        arguments = (
            tree_leaves((args, kwargs)) if unit.writes or any(x and x[0] == "argument" for x in unit.leaves) else ()
        )
        if unit.writes and known:
            arrive()
        for v in unit.writes:
            target = arguments[values[v].argument]
            if v not in known:
                known[v] = target
            elif not self._placeholders.holds(target):
                known[v] = target.copy_(known[v])
        statics, spec = self.structures[index]
        leaves = []
        for leaf, static in zip(unit.leaves, statics, strict=True):
            kind, place = leaf or ("static", 0)
            if kind == "value":
                leaves.append(known[place] if place in known else self._placeholder(values[place].ref))
            else:
                leaves.append(arguments[place] if kind == "argument" else static)
        return tree_unflatten(leaves, spec)

    def _placeholder(self, ref):
        return self._placeholders.get(ref, alone=ref.storage in self._rewritten)
