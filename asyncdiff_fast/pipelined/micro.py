"""One micro-step on one rank: its own units run, the others' results are received or left out."""

import functools

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..stages.cutset import PREDICTION
from ..stages.replay import Replay


class MicroStep:
    """Micro-step `p` of a `Route`.

    Args:
        structures: of its units' results.
        first: the `First` of all: the text that later micro-steps read, by value, and results of modules that run in
            the first alone.
        outside: as `Capture.outside`.
    """

    def __init__(self, route, p, rank, placeholders, structures, slots, first, outside):
        self.route, self.p, self.rank = route, p, rank
        self.program, self._slots, self._first, self._outside = route.program(p, rank), slots, first, outside
        self._units = Replay(route.micro[p].graph, placeholders)
        self._units.structures = structures
        self._text = route.config.pipeline_text

    def call(self, forward, *args, **kwargs):
        """What the denoiser's `forward` returns here: right as far as this rank makes it."""
        self._units.restart()
        result = forward(*args, **kwargs)
        if self._units.missing is not None:
            self._lost(self._units.missing)
        return result

    def run(self, name, forward, args, kwargs):
        """What a module's hook returns."""
        if not self._units.knows(name):
            return self._spared(name, forward, args, kwargs)
        index, odd = self._units.turn(name)
        if odd is not None:
            self._lost(odd)
        if index in self.program.computes:
            result = self._spared(name, forward, args, kwargs)
            if self._text == "unit":
                result = self._with_first(index, result, args, kwargs)
            if index in self.program.sends:
                tensors = self._units.tensors(index, result, args, kwargs)
                self._outside(self._slots.send, self.p, self.program.sends[index], tensors)
        else:
            number = self.program.receives.get(index)
            known = {v: self._slots.view(self.p, number, v) for v in self._received(number)}
            if self.p and self._text != "patch":
                mine = (v for v in self.route.rowless if self._makes(index, v) and v in self._first)
                known |= {v: self._first.copy(v) for v in mine}
            arrive = functools.partial(self._outside, self._arrive, number)
            result = self._units.result(index, args, kwargs, known, arrive)
        for number in self.program.waits.get(index + 1, ()):
            self._outside(self._arrive, number)
        return result

    def _spared(self, name, forward, args, kwargs):
        """A module's result, of the first micro-step if it runs in that alone."""
        if name not in self.route.spared:
            return forward(*args, **kwargs)
        if self.p == 0:
            result = forward(*args, **kwargs)
            self._first.keep(name, result)
            return result
        return self._first.copy(name)

    def end(self, result):
        """Its forward has given this; the last stage's is the prediction, which all ranks get."""
        if self.rank == self.route.division.num_stages - 1:
            tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            self._slots.send(self.p, self._prediction, tensors)
        return result

    def prediction(self):
        """The tensors of the result, once all micro-steps are over."""
        transfer = self.route.micro[self.p].transfers[self._prediction]
        if self.rank != transfer.source:
            self._slots.wait(self.p, self._prediction)
        return [self._slots.view(self.p, self._prediction, v) for v in transfer.values]

    @property
    def _prediction(self):
        transfers = self.route.micro[self.p].transfers
        return next(n for n, t in enumerate(transfers) if t.unit < 0 and t.name == PREDICTION)

    def _makes(self, index, v):
        return self.route.micro[self.p].graph.values[v].unit == index

    def _received(self, number):
        return () if number is None else self._slots.received(self.p, number)

    def _arrive(self, number):
        if number is None:
            return
        self._slots.wait(self.p, number)
        if self.p == 0 and self._text != "patch":
            for v in self._received(number):
                if v in self.route.rowless:
                    self._first.keep(v, self._slots.view(0, number, v))

    def _with_first(self, index, result, args, kwargs):
        """A unit's result, its text that of the first micro-step."""
        made = self._units.tensors(index, result, args, kwargs)
        text = {v: x for v, x in made.items() if v in self.route.rowless}
        if self.p == 0:
            for v, x in text.items():
                self._first.keep(v, x)
        if self.p == 0 or not text:
            return result
        leaves, spec = tree_flatten(result)
        for i, leaf in enumerate(self.route.micro[self.p].graph.units[index].leaves):
            if leaf is not None and leaf[0] == "value" and leaf[1] in text:
                leaves[i] = self._first.copy(leaf[1])
        return tree_unflatten(leaves, spec)

    def _lost(self, what):
        raise RuntimeError(
            f"the denoiser took another way in micro-step {self.p} than when it was planned: {what}; patches need the "
            "same modules at every step. Raise warmup_steps past the step where it changes, or unpatch() first"
        )
