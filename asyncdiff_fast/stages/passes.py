"""One call of the denoiser between two steps: runs its own units, replays the others, posts and waits.

A pipeline that calls twice per step (conditional, unconditional) has two passes, each with slots and values of its own.
"""

import functools

import torch
from torch.utils._pytree import tree_leaves

from ..calls.schedule import Mode
from ..fused.capture import at_once
from ..prediction.call_check import CallCheck
from ..prediction.trend import Trend
from .cutset import NEXT_PREDICTION, PREDICTION
from .replay import Replay, structure_of, with_tensors
from .slots import PassSlots


class Pass:
    """State of one pass on one rank, for one plan. `graphs` captures its asynchronous calls, if it is not None."""

    def __init__(self, plan, config, rank, device, placeholders, graphs=None):
        self.plan, self.config, self.rank = plan, config, rank
        self.program = plan.program(rank)
        self.previous_timestep = self.timesteps = None
        self.trend, self.check = Trend(plan.division.hops[1], config.stride), CallCheck()
        self.intact = True
        self._device, self._units = device, Replay(plan.graph, placeholders)
        self._result_structure = self._next = None
        self._mode, self._keep, self._slots = Mode.EXACT, False, None
        self._outside, self._held = (at_once, False) if graphs is None else (graphs.outside, True)

    def bind(self, exchange, phase):
        """Allocate this rank's buffers and register its slots under a phase of the exchange. Collective."""
        predicts = self.config.predict != "none"
        self._slots = PassSlots(self.plan, self.rank, self._device, predicts, self.check, exchange, phase, self._held)

    @property
    def phase(self):
        """The name under which this pass's slots are known to the exchange."""
        return self._slots.phase

    # One forward, in order: begin, run with run_unit for each unit, end. What a captured call replays of `run` is what
    # the device does, and what `_outside` is given.

    def begin(self, mode, keep):
        """Start a forward; with `keep`, an exact one leaves behind what a stale step will read."""
        self._mode, self._keep = mode, keep
        self.check.begin(mode is Mode.EXACT, keep)
        self._slots.begin(mode is Mode.COMPUTE, keep)

    def run(self, forward, *args, **kwargs):
        """What the denoiser's `forward` returns here: of a stale call, right as far as this rank makes it."""
        self._units.restart()
        result = forward(*args, **kwargs)
        if self._units.missing is not None:
            self._lost(self._units.missing)
        return result

    def run_unit(self, name, forward, args, kwargs):
        """What a unit's hook returns: its result, or a replay of it."""
        if not self._units.knows(name):
            return forward(*args, **kwargs)
        index, odd = self._units.turn(name)
        if odd is not None:
            self._lost(odd)
        if index is None:
            return forward(*args, **kwargs)
        if self._mode is Mode.EXACT:
            result = self._computed(name, forward, args, kwargs)
            self._learn(index, result, args, kwargs)
            return result
        if index in self.program.computes:
            result = self._computed(name, forward, args, kwargs)
            if index in self.program.sends:
                tensors = self._units.tensors(index, result, args, kwargs)
                self._outside(self._slots.send, self.program.sends[index], tensors)
        else:
            number = self.program.receives.get(index)
            stale = self._slots.stale(number)
            arrive = functools.partial(self._outside, self._arrive, number)
            result = self._units.result(index, args, kwargs, stale, arrive)
        for number in self.program.waits.get(index + 1, ()):
            self._outside(self._arrive, number)
        return result

    def _arrive(self, number):
        """What a stale call reads of a transfer is there after this."""
        self._slots.wait_stale(number, self.trend.weight)

    def _computed(self, name, forward, args, kwargs):
        """A unit's result, made here."""
        return forward(*args, **kwargs)

    def end(self, result):
        """The denoiser's result on every rank: this rank's own, or the one received."""
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.check.judge(self.trend)
        if self._mode is Mode.EXACT:
            self._result_structure = structure_of(result)
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
        return with_tensors(self._result_structure, [x.clone() for x in self._next])

    def _lost(self, what):
        self.intact = False
        if self._mode is not Mode.EXACT:
            raise RuntimeError(
                f"the denoiser took another way than in warm-up: {what}; asynchronous steps need the same modules at "
                "every step. Raise warmup_steps past the step where it changes, or unpatch() first"
            )

    def _learn(self, index, result, args, kwargs):
        """After an exact unit: its structure, and the values that a stale step here will read."""
        odd = self._units.learn(index, result)
        if odd is not None:
            self._lost(odd)
        number = self.program.receives.get(index)
        if self._keep and number is not None:
            self._slots.learn(number, self._units.tensors(index, result, args, kwargs))

    def _received(self, name):
        views = self._slots.received(name)
        if self.config.checks:
            worst = views.pop()
            if name == PREDICTION:
                self.check.report.give(worst)
        # Copies: a scheduler may keep a prediction for longer than the buffer keeps it.
        return with_tensors(self._result_structure, [view.clone() for view in views])
