"""The call after the one that is under way, of which a rank makes what it has time for."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from ..calls import watch
from .ahead import Ahead, Foretold
from .passage import Pipeline

log = logging.getLogger(__name__)


class Begun(NamedTuple):
    """A call of which this rank has `done` micro-steps before it has come."""

    current: Pipeline
    place: tuple
    forward: Callable
    foretold: Foretold
    done: int


class NextCall:
    """What has been begun of the next call, by the rank of a stage: as many micro-steps as there are stages after it.

    Args:
        calls: the `PipelineCalls` whose stages run ahead.
    """

    def __init__(self, calls, signature):
        self._calls, self._ahead = calls, Ahead(signature)
        self.begun, self.counts = None, {"begun_calls": 0, "dropped_calls": 0}
        watch.observe(self._ahead)

    def begin_generation(self):
        """Another sampler, perhaps."""
        self._ahead.begin()

    def forget(self):
        """Look at samplers no more."""
        watch.unobserve(self._ahead)

    def begin(self, current, place, forward, args, kwargs):
        """Do what this rank has time for until the last micro-steps of this call are over. Collective.

        Args:
            current: the `Pipeline` of this call, and of the next.
            place: of this call among those of a step.
        """
        if not self._ahead.is_believed:
            return
        foretold = self._ahead.foretell(args, kwargs, *self._first_rows(current))
        if foretold is None:
            return
        passage, mine = current.passing, len(foretold.rows) - self._calls.world.rank
        if mine:
            passage.begin()
        self.begun = Begun(current, place, forward, foretold, mine)
        self.counts["begun_calls"] += 1
        for p, step in enumerate(passage.steps[: len(foretold.rows)]):
            foretold.tell(step.prediction()[0])
            if p < mine:
                self._calls.micro_step(p, step, self._run)

    def resumed(self, tick, place, args, kwargs):
        """How many micro-steps of the call that has come are done. Collective: another than was begun is dropped."""
        agrees = self._ahead.came(tick, args, kwargs)
        if self.begun is not None and not (agrees and place == self.begun.place):
            self.drop()
        begun, self.begun = self.begun, None
        return 0 if begun is None else begun.done

    @torch.no_grad()
    def drop(self):
        """End what has been begun, since others wait for what this rank sends of it. Collective."""
        current = self.begun.current
        with self._calls.exchange.step():
            self._calls.through(current.passing, self._run, self.begun.done)
        self.counts["dropped_calls"] += 1
        # An exact call renews all that is kept.
        current.trend.end()
        self.begun = None
        log.info("a call that was begun is dropped: %s", self._ahead.why or "it has not come")

    def returned(self, current, result, args, kwargs):
        """A call is over: the next is foretold in any case, to see whether it can be."""
        self._ahead.returned(result)
        if self.begun is not None or current.passing is None:
            return
        dim, rows = self._first_rows(current)
        foretold = self._ahead.foretell(args, kwargs, dim, rows)
        whole = next(x for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        for start, stop in rows if foretold is not None else ():
            foretold.tell(whole.narrow(dim, start, stop - start))

    def _run(self, p):
        return self._calls.on_patch(self.begun.current.patches[p], self.begun.forward, *self.begun.foretold.call)

    def _first_rows(self, current):
        """(dimension, rows) of the patches that the first stage can be ahead by."""
        return current.plan.passing.joints[0], current.plan.patches.rows.owned[: self._calls.world.size - 1]
