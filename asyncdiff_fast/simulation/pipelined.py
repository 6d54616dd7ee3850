"""Patches that pass through stages, as events."""

from ..calls import schedule
from ..calls.schedule import Mode
from ..stages.cutset import PREDICTION
from .events import Compute
from .stages import Program, routes


class PipelineCalls:
    """The calls of one rank of a `PipelinePlan`.

    Args:
        ranks: of the stages; `stage` counts among them.
        seconds: of a whole call; `micro_s`: of each micro-step after the exact calls, or None.
    """

    def __init__(self, plan, shares, ranks, stage, seconds, micro_s=None):
        self._plan, self._stage, self._seconds = plan, stage, seconds
        self._is_last = stage == plan.division.num_stages - 1
        # Micro-steps of the next call that come before the end of this one; how many of this step's are done.
        self._ahead, self._done = (plan.division.num_stages - 1 - stage) * plan.config.run_ahead, {}
        self._passing = self._exact = None
        if plan.passing is not None:
            rows = plan.patches.rows
            micro_s = micro_s or [seconds * (stop - start) / rows.size for start, stop in rows.held]
            self._passing = self._programs(plan.passing, shares, ranks, micro_s)
        if plan.exact is not None:
            count = len(plan.exact.micro)
            self._exact = self._programs(plan.exact, shares, ranks, [seconds / count] * count)

    def call(self, step, exact=False):
        """Events of one call."""
        compute = schedule.mode(self._plan.config, step, not exact) is Mode.COMPUTE
        programs = self._passing if compute and self._passing is not None else self._exact
        if programs is None:
            yield Compute(self._seconds)
            return
        done = self._done.pop(step, 0)
        for p, (program, prediction) in enumerate(programs[done:], done):
            key = "micro-step", step, p
            yield from program.own(key, key)
            if self._is_last:
                yield program.post(key, prediction)
        ahead = self._ahead if programs is self._passing else 0
        for p, (program, prediction) in enumerate(programs if not self._is_last else ()):
            yield program.wait(("micro-step", step, p), prediction)
            if p < ahead:
                key = "micro-step", step + 1, p
                yield from program.own(key, key)
                self._done[step + 1] = p + 1

    def _programs(self, route, shares, ranks, seconds):
        """[(`Program`, number of the prediction's transfer)] of the micro-steps."""
        found = []
        for p, (micro, of_step) in enumerate(zip(route.micro, seconds, strict=True)):

            def size(transfer, v, micro=micro):
                return micro.ref(transfer, v).nbytes

            program, ends = route.program(p, self._stage), routes(micro.transfers, size, ranks)
            prediction = next(n for n, t in enumerate(micro.transfers) if t.unit < 0 and t.name == PREDICTION)
            found.append((Program(micro.graph, program, *shares, of_step, *ends), prediction))
        return found
