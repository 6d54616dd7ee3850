"""The patches that pass through one rank's stage: plans them at the first call, then carries out each call.

Calls begin exact, every rank computing all. From then on a call is a micro-step for each patch, and is over when the
last one's prediction has come to every rank.
"""

import contextlib
import functools

import torch

from ..calls import schedule
from ..calls.schedule import Mode, PatchMode
from ..calls.signature import device_of
from ..hooks import Attachment
from ..patches.check import ResultCheck
from ..patches.hooks import Hooks
from ..stages.buffers import Placeholders
from ..tracing import side_effects
from . import batches, heap
from .next_call import NextCall
from .passage import Learning, Pipeline
from .planning import MicroPlanner

# Plans kept for inputs seen before, per denoiser.
KEPT_PIPELINES = 8
WAY_OUT = "pass pipeline_patches=1, or stages alone"


class PipelineCalls:
    """`plan` is the latest plan (None before the first call).

    `shards`: the `Shards` of the denoiser, None where every rank keeps all weights.
    """

    def __init__(self, shared, world, exchange, shards=None):
        self.denoiser, self.config, self.world, self.exchange = shared.denoiser, shared.config, world, exchange
        self.plan, self.hooks, self._shards = None, Hooks(shared.denoiser), shards
        self._scheduler, self._graphs = shared.scheduler, shared.graphs
        self._signature, self._planner = shared.signature, MicroPlanner(shared, world, self.hooks, self._learn)
        self._pipelines, self._hooks, self._placeholders, self._phases = {}, {}, {}, 0
        refusal = f"does not work with pipeline_patches={self.config.pipeline_patches}"
        self._check = ResultCheck(self.denoiser, self._signature, world, refusal, WAY_OUT)
        # What the hooks on modules hand calls to, or None.
        self._active = None
        self._next = NextCall(self, shared.signature) if self.config.run_ahead else None

    def begin_generation(self):
        """What an earlier generation left behind is not read again."""
        if self._next is not None:
            self._next.begin_generation()
        for current in self._pipelines.values():
            current.trend.end()

    def call(self, tick, key, planning, forward, args, kwargs):
        """(the denoiser's result, how it was computed: a `Mode`). Collective over the stages.

        Args:
            tick: the call's place in time.
            key: changes with the inputs' shapes.
            planning: a context for what refuses a denoiser: its value is the forward to plan with.
            forward: the denoiser's own.
        """
        place = (tick.call, key)
        done = 0 if self._next is None else self._next.resumed(tick, place, args, kwargs)
        if place not in self._pipelines:
            reads = self._shards is not None and not self._shards.complete
            with planning() as quiet, heap.mapped() if reads else contextlib.nullcontext():
                current, result = self._first(place, quiet, args, kwargs)
            mode, kept = Mode.EXACT, True
            self._begin(current, tick, args, kwargs)
        else:
            current = self._pipelines[place] = self._pipelines.pop(place)
            has_state = schedule.has_state(self.config, tick, current.trend.last_step)
            mode = schedule.mode(self.config, tick.step, has_state)
            self._begin(current, tick, args, kwargs)
            result, kept = self._again(current, mode, tick.step, forward, args, kwargs, done, place)
        if kept:
            current.trend.made(tick.step)
        if self._next is not None:
            self._next.returned(current, result, args, kwargs)
        return result, mode

    def drop_begun(self):
        """If a call was begun, it will not come. Collective."""
        if self._next is not None and self._next.begun is not None:
            self._next.drop()

    def counts(self):
        """Dict: calls that were begun before the one before was over, and those of them that did not come."""
        return {} if self._next is None else dict(self._next.counts)

    def errors(self):
        """Predictions are not compared with what comes."""
        return {}

    def forget(self, released=False):
        """Drop all plans, buffers and hooks; the slots too, unless they are `released`."""
        for current in self._pipelines.values():
            current.release(released)
        if released and self._next is not None:
            self._next.forget()
        self._pipelines.clear()
        for attachment in self._hooks.values():
            attachment.remove()
        self._hooks.clear()
        self.hooks.remove()
        self.plan = None

    # One call.

    def _begin(self, current, tick, args, kwargs):
        """A call begins, perhaps the first of a generation."""
        current.trend.follow(tick.step, self._signature.timestep(args, kwargs), self._scheduler)
        current.trend.weigh(tick.step)

    def _again(self, current, mode, step, forward, args, kwargs, done, place):
        """(result, whether what was made is kept) of a call that is planned, of which `done` micro-steps are done."""
        # Only what the next call may read is kept, and with predictions what that of the one after is made from.
        passes, predicts = mode is Mode.COMPUTE and current.passing is not None, self.config.predict != "none"
        kept = passes or step >= self.config.least_warmup - 1 - predicts
        for store in current.kept.values() if predicts and kept else ():
            store.carry_on(current.trend.weight) if passes else store.put_aside()
        with self.exchange.step():
            if passes:
                return self._passed_through(current, forward, args, kwargs, done, place), kept
            exact = self._exact if current.exact is None else self._exact_in_parts
            return exact(current, forward, args, kwargs, kept), kept

    def _exact(self, current, forward, args, kwargs, kept=True):
        """The result of all, computed here; what later calls read is `kept`."""
        if current.whole is None or not kept:
            return forward(*args, **kwargs)
        current.whole.part = 0
        return self._at_sites(current.whole, PatchMode.SYNC, forward, args, kwargs)

    def _exact_in_parts(self, current, forward, args, kwargs, kept=True):
        """The same where every rank has its own weights only: part of the batch after part."""
        batch, count = batches.size_of(self._signature.latent(args, kwargs)), len(current.exact.steps)

        def run(part):
            cut = batches.cut(part, count, batch, args, kwargs)
            call = functools.partial(self._active.call, forward)
            if current.whole is None or not kept:
                return call(*cut[0], **cut[1])
            current.whole.part = part
            return self._at_sites(current.whole, PatchMode.SYNC, call, *cut)

        return self.through(current.exact, run)

    def _passed_through(self, current, forward, args, kwargs, done=0, place=None, exact=False):
        """The result of all patches, of which `done` are done; `exact`: see `MicroPatch.begin`."""

        def run(p):
            return self.on_patch(current.patches[p], forward, args, kwargs, exact)

        def then():
            if self._next is not None and not exact:
                self._next.begin(current, place, forward, args, kwargs)

        return self.through(current.passing, run, done, then)

    def on_patch(self, patch, forward, args, kwargs, exact=False):
        """What a micro-step runs; it is replayed, by pieces between its posts, if calls are captured."""
        call, through = functools.partial(self._active.call, forward), None
        if self._graphs is not None and not exact:
            through = functools.partial(self._graphs.call, of=patch)
        return self._at_sites(patch, PatchMode.DISPLACED, call, args, kwargs, exact, through)

    def through(self, passage, run, done=0, then=lambda: None):
        """The result of all micro-steps of a route; `run(p)` is the denoiser's in one of them; `then()` comes next."""
        if not done:
            passage.begin()
        for p, step in enumerate(passage.steps[done:], done):
            result = self.micro_step(p, step, run)
        then()
        return passage.result(result)

    def micro_step(self, p, step, run):
        """Micro-step `p`; `run(p)` is the denoiser's call in it."""
        self._active = step
        try:
            result = run(p)
        finally:
            self._active = None
        return step.end(result)

    def _at_sites(self, picture, mode, forward, args, kwargs, exact=False, through=None):
        def run(args, kwargs):
            return self.hooks.counted(forward)(*args, **kwargs)

        return self.hooks.on_patch(picture, self._signature, mode, run, args, kwargs, exact, through)

    def _run_module(self, name, forward, args, kwargs):
        if self._active is None:
            return forward(*args, **kwargs)
        return self._active.run(name, forward, args, kwargs)

    # Plans.

    def _first(self, place, forward, args, kwargs):
        """(plan on this rank, exact result) of a first call. Collective."""
        shards, complete = self._shards, self._shards is None or self._shards.complete
        keeping = {} if complete else {"owners": shards.owners, "hold": shards.divide}
        plan, patches, structures = self._planner.plan(forward, args, kwargs, self._attach, **keeping)
        device = device_of(args, kwargs)
        placeholders = self._placeholders.setdefault(device, Placeholders(device))
        phase = f"call {place[0]}, micro-steps, plan {self._phases}"
        self._phases += 1
        self._attach(sorted(plan.route.spared))
        made = (self.world, self.exchange, device, placeholders, phase, self._graphs)
        current = Pipeline(plan, patches, structures, *made)
        results, exact = [], self._exact if complete else self._exact_in_parts
        if complete:
            results.append(self._exact(current, forward, args, kwargs))
        with side_effects.restored(self.denoiser), torch.no_grad(), self.exchange.step():
            if current.exact is not None:
                results.append(self._exact_in_parts(current, forward, args, kwargs))
            # The next call must read what an exact one leaves in every generation, to the last bit.
            for store in current.kept.values():
                store.remember()
            passed = [self._passed_through(current, forward, args, kwargs, exact=True)] if current.passing else []
            for store in current.kept.values():
                store.restore()

            def run(args, kwargs):
                return exact(current, forward, args, kwargs, kept=False)

            # Nothing that micro-steps of the same call read is stale.
            expected = self._check.expect(run, args, kwargs, results[0])
        for other in (*results[1:], *passed):
            self._check.judge(other, expected)
        if shards is not None:
            shards.divide(plan.whole, plan.division)
        self._pipelines[place] = current
        if place[0] == 0 or self.plan is None:
            self.plan = plan
        for old in list(self._pipelines)[:-KEPT_PIPELINES]:
            self._pipelines.pop(old).release()
        return current, results[-1]

    def _learn(self, graph, run):
        """(what `run()` returns, {unit: structure of its result} of the forward in it)."""
        learning = self._active = Learning(graph)
        try:
            return run(), learning.units.structures
        finally:
            self._active = None

    def _attach(self, names):
        modules = dict(self.denoiser.named_modules())
        for name in names:
            if name not in self._hooks:
                self._hooks[name] = Attachment(modules[name], functools.partial(self._run_module, name))
