"""One call of the denoiser between two steps: runs its own units, replays the others, posts and waits.

A pipeline that calls twice per step (conditional, unconditional) has two passes, each with slots and values of its own.
"""

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..calls.schedule import Mode
from ..prediction.call_check import CallCheck
from ..prediction.trend import Trend
from .cutset import NEXT_PREDICTION, PREDICTION
from .slots import PassSlots

_TENSOR = object()


def _structure(tree):
    """(leaves, spec) of a tree, with a mark in place of each tensor."""
    leaves, spec = tree_flatten(tree)
    return [_TENSOR if isinstance(x, torch.Tensor) else x for x in leaves], spec


class Pass:
    """State of one pass on one rank, for one plan."""

    def __init__(self, plan, config, rank, device, placeholders):
        self.plan, self.config, self.rank = plan, config, rank
        self.program = plan.program(rank)
        self.last_step = -1
        self.previous_timestep = self.timesteps = None
        self.trend, self.check = Trend(plan.division.hops[1], config.stride), CallCheck()
        self.intact = True
        self._device, self._placeholders = device, placeholders
        self._index = {unit.key: i for i, unit in enumerate(plan.graph.units)}
        self._names = {unit.name for unit in plan.graph.units}
        # What a later unit changes in place may be known by other names too, so its result is put where it lies.
        self._rewritten = {plan.graph.values[v].ref.storage for unit in plan.graph.units for v in unit.writes}
        self._structures, self._ordinals, self._seen = {}, {}, 0
        self._result_structure = self._next = None
        self._mode, self._keep, self._slots = Mode.EXACT, False, None

    def bind(self, exchange, phase):
        """Allocate this rank's buffers and register its slots under a phase of the exchange. Collective."""
        predicts = self.config.predict != "none"
        self._slots = PassSlots(self.plan, self.rank, self._device, predicts, self.check, exchange, phase)

    @property
    def phase(self):
        """The name under which this pass's slots are known to the exchange."""
        return self._slots.phase

    def begin_generation(self, instants):
        """Nothing that an earlier generation left is predicted from or compared with."""
        self.trend.begin(instants)
        self.check.begin_generation()

    # One forward, in order: begin, run_unit for each unit, end.

    def begin(self, mode, keep):
        """Start a forward; with `keep`, an exact one leaves behind what a stale step will read."""
        self._mode, self._keep = mode, keep
        self.check.begin(mode is Mode.EXACT, keep)
        self._ordinals, self._seen = {}, 0
        self._slots.begin(mode is Mode.COMPUTE, keep)

    def run_unit(self, name, forward, args, kwargs):
        """What a unit's hook returns: its result, or a replay of it."""
        if name not in self._names:
            # A unit of another plan: here it is part of a larger one, or holds smaller ones.
            return forward(*args, **kwargs)
        ordinal = self._ordinals.get(name, 0)
        self._ordinals[name] = ordinal + 1
        index = self._index.get((name, ordinal))
        if index is None:
            self._lost(f"{name} was called once more than in the traced forward")
            return forward(*args, **kwargs)
        if index != self._seen:
            self._lost(f"{name} was called in another order than in the traced forward")
        self._seen += 1
        if self._mode is Mode.EXACT:
            result = forward(*args, **kwargs)
            self._learn(index, result, args, kwargs)
            return result
        if index in self.program.computes:
            result = forward(*args, **kwargs)
            if index in self.program.sends:
                self._slots.send(self.program.sends[index], self._tensors(index, result, args, kwargs))
        else:
            result = self._replay(index, args, kwargs)
        for number in self.program.waits.get(index + 1, ()):
            self._slots.wait_stale(number, self.trend.weight)
        return result

    def end(self, result):
        """The denoiser's result on every rank: this rank's own, or the one received."""
        if self._seen != len(self._index):
            self._lost(f"{len(self._index) - self._seen} units of the traced forward were not called")
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.check.judge(self.trend)
        if self._mode is Mode.EXACT:
            self._result_structure = _structure(result)
            if self._keep and self.config.stride == 2:
                self._next = [x.clone() for x in tensors]
            return result
        self._next, results = None, tensors
        if self.config.checks:
            tensors = [*results, self.check.errors.worst]
        if self.config.stride == 2 and self.rank == self.config.num_stages - 1:
            self._slots.send(NEXT_PREDICTION, tensors)
            self._next = results
        if self.rank == self.config.stage_ranks - 1:
            self._slots.send(PREDICTION, tensors)
        self._slots.end()
        if self.rank != self.config.stage_ranks - 1:
            result = self._received(PREDICTION)
        elif self.config.checks:
            self.check.report.give(self.check.errors.worst)
        return result

    def repeat(self):
        """The prediction that was computed for this step at the step before."""
        if self._next is None:
            return self._received(NEXT_PREDICTION)
        return self._result([x.clone() for x in self._next])

    def _lost(self, what):
        self.intact = False
        if self._mode is not Mode.EXACT:
            raise RuntimeError(
                f"the denoiser took another way than in warm-up: {what}; asynchronous steps need the same modules at "
                "every step. Raise warmup_steps past the step where it changes, or unpatch() first"
            )

    def _tensors(self, index, result, args, kwargs):
        """{value: tensor} of everything a unit made."""
        unit, values = self.plan.graph.units[index], self.plan.graph.values
        found = {}
        for leaf, x in zip(unit.leaves, tree_leaves(result), strict=True):
            if leaf is not None and leaf[0] == "value":
                found[leaf[1]] = x
        if unit.writes:
            arguments = tree_leaves((args, kwargs))
            found.update((v, arguments[values[v].argument]) for v in unit.writes)
        return found

    def _learn(self, index, result, args, kwargs):
        """After an exact unit: its structure, and the values that a stale step here will read."""
        found = _structure(result)
        if self._structures.setdefault(index, found) != found:
            self._lost(f"{self.plan.graph.units[index].name} returned another structure or other numbers than before")
        number = self.program.receives.get(index)
        if self._keep and number is not None:
            self._slots.learn(number, self._tensors(index, result, args, kwargs))

    def _replay(self, index, args, kwargs):
        """A unit's result from the step before where this rank reads it, placeholders elsewhere."""
        unit, values = self.plan.graph.units[index], self.plan.graph.values
        number = self.program.receives.get(index)
        stale = self._slots.stale(number)
        arguments = (
            tree_leaves((args, kwargs)) if unit.writes or any(x and x[0] == "argument" for x in unit.leaves) else ()
        )
        if unit.writes and stale:
            self._slots.wait_stale(number, self.trend.weight)
        for v in unit.writes:
            target = arguments[values[v].argument]
            if v not in stale:
                stale[v] = target
            elif not self._placeholders.holds(target):
                stale[v] = target.copy_(stale[v])
        statics, spec = self._structures[index]
        leaves = []
        for leaf, static in zip(unit.leaves, statics, strict=True):
            kind, place = leaf or ("static", 0)
            if kind == "value":
                leaves.append(stale[place] if place in stale else self._placeholder(values[place].ref))
            else:
                leaves.append(arguments[place] if kind == "argument" else static)
        return tree_unflatten(leaves, spec)

    def _placeholder(self, ref):
        return self._placeholders.get(ref, alone=ref.storage in self._rewritten)

    def _received(self, name):
        views = self._slots.received(name)
        if self.config.checks:
            worst = views.pop()
            if name == PREDICTION:
                self.check.report.give(worst)
        # Copies: a scheduler may keep a prediction for longer than the buffer keeps it.
        return self._result([view.clone() for view in views])

    def _result(self, tensors):
        leaves, spec = self._result_structure
        tensors = iter(tensors)
        return tree_unflatten([next(tensors) if x is _TENSOR else x for x in leaves], spec)
