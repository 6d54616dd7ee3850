"""The patches of one denoiser, seen from one rank: plans them at the first call, then carries out each call."""

import functools
import logging

from ..calls import schedule
from ..calls.schedule import PatchMode
from ..calls.signature import numbers_of
from ..exchange.fingerprint import input_digests
from ..prediction.self_check import Pace, summaries
from .hooks import Hooks
from .inputs import check_masks
from .lists import stacked
from .norm import before_rows
from .planning import Planner
from .way import Lost

log = logging.getLogger(__name__)

# Plans kept for inputs seen before, per denoiser.
KEPT_PATCHES = 8


class Patches:
    """`plan` is the latest plan, `mode` the `PatchMode` of the latest call (None before the first)."""

    def __init__(self, shared, world, exchange):
        self.config, self.exchange = shared.config, exchange
        self.plan, self.mode, self.hooks = None, None, Hooks(shared.denoiser)
        self.planner = Planner(shared, world, self.hooks)
        self._signature, self._scheduler = shared.signature, shared.scheduler
        self._graphs = shared.graphs
        self._patches, self._phases = {}, 0
        self._pace = Pace(shared.config, world)
        # {place without values: names of the inputs whose values belong to it}
        self._reads = {}

    def call(self, tick, key, forward, run, args, kwargs):
        """What the denoiser returns for the whole picture. Collective over the patches.

        Args:
            tick: the call's place in time.
            key: changes with the inputs' shapes.
            forward: the denoiser's own, for the plan.
            run: `run(args, kwargs)` is this call on the patch; the forward in it goes through `hooks.counted`.
        """
        forward, run, args, kwargs = stacked(self._signature, forward, run, args, kwargs)
        place = self._place(tick, key, args, kwargs)
        if place in self._patches:
            # The last used come last.
            self._patches[place] = self._patches.pop(place)
        else:
            place = self._plan(tick, key, forward, args, kwargs)
        if self._patches[place].trend.last_step < 0:
            check_masks(self._patches[place].cutter, self._signature.named(args, kwargs))
        expected, patch = None, self._patches[place]
        if self._looks_again(place, tick):
            expected = self.planner.expect(patch, forward, args, kwargs)
        result, error = self._attempt(place, tick, run, args, kwargs)
        if error is not None:
            # Every rank goes the same way, so all are here.
            log.info("patches are planned anew: %s", error)
            self._release(self._patches.pop(place))
            place, expected = self._plan(tick, key, forward, args, kwargs), None
            result, error = self._attempt(place, tick, run, args, kwargs)
        if error is not None:
            raise error
        # Warm-up may have ended at this very step.
        if expected is not None and patch.mode is PatchMode.SYNC:
            patch.result_check.judge(result, expected)
        return result

    def _looks_again(self, place, tick):
        """True at the last exact step of a plan's first warm-up, or ever more rarely where all are: gates open late."""
        config, patch, step = self._pace.config, self._patches[place], tick.step
        able = patch.result_check is not None and not config.bessel and config.num_stages == 1
        if not able or step == 0 or patch.generations > (patch.trend.last_step >= 0):
            return False
        rarely = config.exchange == "sync" or self._pace.warming
        due = step > 1 and step & (step + 1) == 0 if rarely else step == config.warmup_steps - 1
        return due and self._mode(place, tick) is PatchMode.SYNC

    def _place(self, tick, key, args, kwargs):
        """What tells one plan from another: the call, shapes, and the values that positions follow from."""
        axis = schedule.patch_axis(self.config, tick.step)
        named = self._signature.named(args, kwargs)
        place = (tick.call, key, axis, numbers_of(named, self._signature.timestep_name))
        reads = self._reads.get(place, ())
        return (*place, repr(input_digests({name: named[name] for name in reads}))) if reads else place

    def _plan(self, tick, key, forward, args, kwargs):
        """Plans a call as it is; returns its place."""
        axis, place = schedule.patch_axis(self.config, tick.step), self._place(tick, key, args, kwargs)
        phase = f"patches, plan {self._phases}"
        self._phases += 1
        patch = self.planner.first(forward, args, kwargs, axis, self.exchange, phase)
        self._reads[place[:4]] = patch.reads
        place = self._place(tick, key, args, kwargs)
        self._patches[place] = patch
        for old in list(self._patches)[:-KEPT_PATCHES]:
            self._release(self._patches.pop(old))
        if tick.call == 0 or self.plan is None:
            self.plan = patch.plan
        return place

    def _attempt(self, place, tick, run, args, kwargs):
        """(result, None), or (None, `Lost`) where the denoiser goes another way and can be planned anew."""
        patch = self._patches[place]
        if tick.call == 0:
            self._pace.before(tick.step, patch.check.errors)
        mode = self._mode(place, tick)
        if mode is PatchMode.DISPLACED and self._pace.resyncs(patch.check.report):
            mode = PatchMode.SYNC
        if patch.trend.follow(tick.step, self._signature.timestep(args, kwargs), self._scheduler):
            patch.begin_generation()
        patch.trend.weigh(tick.step)
        late = self._pace.warming or tick.step >= self._pace.config.warmup_steps - 3
        patch.keep = self.config.predicts_patches and late
        first = mode is PatchMode.DISPLACED and patch.displaced_calls < 2
        with self.exchange.step(), self.planner.learning(first):
            try:
                through = self._through(patch, mode)
                result = self.hooks.on_patch(patch, self._signature, mode, run, args, kwargs, through=through)
            except Lost as error:
                # Stages beneath may have sent what nobody will read.
                if self.config.num_stages > 1:
                    raise
                return None, error
        self.mode = mode
        if patch.keep:
            patch.trend.made(tick.step)
        return result, None

    def _through(self, patch, mode):
        """What makes displaced calls, captured in pieces between their posts; None where they are launched."""
        if self._graphs is None or mode is not PatchMode.DISPLACED:
            return None
        if patch.within is not None:
            self._graphs.tell("patches share the blocks alone, and exchange within the denoiser")
            return None
        # The first learns what is posted together, the second which kernels are faster.
        return functools.partial(self._graphs.call, of=patch, launches=2)

    def begin_generation(self):
        """What an earlier generation left behind is not read again."""
        for patch in self._patches.values():
            patch.trend.end()
        self._pace.begin_generation()

    def _mode(self, place, tick):
        """The scheduled mode, but synchronous where the call was not made at the step before: the second of two calls
        may be left out at some steps, and what displaced patches would read is then of long ago.
        """
        mode, last = schedule.patch_mode(self._pace.config, tick.step), self._patches[place].trend.last_step
        missing = {
            PatchMode.DISPLACED: not schedule.has_state(self.config, tick, last),
            PatchMode.FROZEN: last < 0,
        }
        return PatchMode.SYNC if missing.get(mode) else mode

    def norm_before(self, norm, conv, x, **added):
        """See `norm.before_rows`; of modules."""
        names = self.hooks.names.get(norm), self.hooks.names.get(conv)
        return None if self.hooks.active is None else before_rows(self.hooks.active, names, norm, x, **added)

    def errors(self):
        """{site: its prediction's relative error, and that of reuse}, of the latest calls."""
        return summaries((place[0], patch.check.errors) for place, patch in self._patches.items())

    def forget(self, released=False):
        """Drop all plans, buffers and hooks; the slots too, unless they are `released`."""
        for patch in self._patches.values():
            self._release(patch, released)
        self._patches.clear()
        self._reads.clear()
        self.hooks.remove()
        self.plan = None

    def _release(self, patch, released=False):
        """Forget the graphs of a patch, and its slots unless they are `released`."""
        if self._graphs is not None:
            self._graphs.forget(patch)
        if not released:
            patch.release()
