"""What follows from positions alone, or from inputs that stay whole, as one patch has it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Positions:
    """`constants`: {(module, call): its result}. `joins`: {((module, call), place): [(number of an argument, what it
    is)]} of functions that join an activation with such a tensor.
    """

    constants: dict
    joins: dict

    @classmethod
    def of(cls, recorder, cutter):
        """Those of a forward on the whole picture, cut by a `Cutter`."""
        constants = {}
        for key, result in recorder.constants.items():
            cut = cutter.positions(result, {i for *place, i in recorder.beside if tuple(place) == key})
            if cut is not None:
                constants[key] = cut
        joins, known = {}, []
        for key, found in recorder.joins.items():
            for join in found:
                cut = cutter.joined(join)
                if cut is not None:
                    joins.setdefault((key, join.place), []).append((join.argument, _once(cut, known)))
        return cls(constants, joins)

    @property
    def constant_modules(self):
        """Names of the modules whose results are known."""
        return {name for name, _ in self.constants}

    @property
    def joining_modules(self):
        """Names of the modules that join an activation with such a tensor."""
        return {key[0] for key, _ in self.joins}

    def joined(self, place, args):
        """The arguments of a function that joins, at its place."""
        for i, x in self.joins.get(place, ()):
            args = (*args[:i], x, *args[i + 1 :])
        return args


def _once(x, known):
    """`x`, or a tensor met before that is equal: many layers make the same of a mask."""
    same = (y for y in known if not x.is_meta and (x.shape, x.dtype) == (y.shape, y.dtype) and torch.equal(x, y))
    found = next(same, None)
    if found is None:
        # What it was cut from need not stay.
        known.append(x.clone())
    return known[-1] if found is None else found
