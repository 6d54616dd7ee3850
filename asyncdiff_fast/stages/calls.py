"""The stages of one denoiser, seen from one rank: plans them at the first call, then carries out each call."""

import functools
import logging

from ..calls import schedule
from ..calls.schedule import Mode
from ..calls.signature import device_of
from ..calls.timesteps import Timesteps
from ..calls.watch import last_scheduler
from ..hooks import Attachment
from ..modules import other_hooks
from ..prediction.self_check import Pace, summaries
from .buffers import Placeholders
from .passes import Pass
from .plan import make_plan

log = logging.getLogger(__name__)
# Plans kept for inputs seen before, per denoiser.
KEPT_PASSES = 8


class StageCalls:
    """`plan` is the latest plan (None before the first call)."""

    def __init__(self, shared, world, exchange):
        self.denoiser, self.config, self.world, self.exchange = shared.denoiser, shared.config, world, exchange
        self.plan = self._active = None
        self._signature, self._scheduler = shared.signature, shared.scheduler
        self._graphs = shared.graphs
        self._passes, self._units, self._placeholders, self._phases = {}, {}, {}, 0
        # Modules that hold units.
        self._around = {}
        self._pace = Pace(shared.config, world)

    def begin_generation(self):
        """What an earlier generation left behind is not read again."""
        for current in self._passes.values():
            current.trend.end()
        self._pace.begin_generation()

    def call(self, tick, key, planning, forward, args, kwargs):
        """(the denoiser's result, how it was computed: a `Mode`). Collective over the stages.

        Args:
            tick: the call's place in time.
            key: changes with the inputs' shapes.
            planning: a context for what refuses a denoiser: its value is the forward to plan with.
            forward: the denoiser's own.
        """
        current = self._pass_for(tick, key, planning, args, kwargs)
        with self.exchange.step():
            result, mode = self._carry_out(current, tick, planning, forward, args, kwargs)
        if not current.intact:
            log.info("%s is traced again: its modules or hooks have changed", type(self.denoiser).__name__)
            self.forget()
        return result, mode

    def errors(self):
        """{received tensor: its prediction's relative error, and that of reuse}, of the latest calls."""
        return summaries((place[0], current.check.errors) for place, current in self._passes.items())

    def forget(self, released=False):
        """Drop all plans, buffers and hooks; the slots too, unless they are `released`."""
        for current in self._passes.values():
            self._release(current, released)
        self._passes.clear()
        for attachment in self._units.values():
            attachment.remove()
        self._units.clear()
        self._around.clear()
        self.plan = None

    def _carry_out(self, current, tick, planning, forward, args, kwargs):
        timestep = self._signature.timestep(args, kwargs)
        if tick.call == 0:
            self._pace.before(tick.step, current.check.errors)
        config = self._pace.config
        mode = schedule.mode(config, tick.step, schedule.has_state(config, tick, current.trend.last_step))
        if mode is Mode.COMPUTE and self._pace.resyncs(current.check.report):
            mode = Mode.EXACT
        offset = self._follow_timesteps(current, mode, tick, planning, timestep)
        if current.trend.follow(tick.step, timestep, self._scheduler):
            current.check.begin_generation()
        if mode is Mode.REPEAT:
            result = current.repeat()
        else:
            if mode is Mode.COMPUTE:
                args, kwargs = self._retimed(current, offset, timestep, args, kwargs)
            # The last exact calls of a warm-up leave behind what the next ones may read.
            keep = self._pace.warming or tick.step >= config.warmup_steps - (1 if config.predict == "none" else 3)
            current.trend.weigh(tick.step + offset)
            current.begin(mode, keep)
            self._active = current
            try:
                result = current.end(self._made(current, mode, forward, args, kwargs))
            finally:
                self._active = None
            if keep:
                current.trend.made(tick.step + (self._offset(current, 0) if mode is Mode.COMPUTE else 0))
        current.previous_timestep = timestep
        return result, mode

    def _made(self, current, mode, forward, args, kwargs):
        """What the denoiser returns on this rank; asynchronous calls are replayed, by pieces between their posts."""
        run = functools.partial(current.run, forward)
        if self._graphs is None or mode is not Mode.COMPUTE:
            return run(*args, **kwargs)
        return self._graphs.call(run, args, kwargs, of=current)

    def _follow_timesteps(self, current, mode, tick, planning, timestep):
        """Keep the place in the scheduler's list up to date; returns the offset this rank computes with."""
        if self.config.stride == 1:
            return self._offset(current, self.world.rank)
        if mode is Mode.EXACT:
            with planning():
                if tick.step == 0 or current.timesteps is None:
                    current.timesteps = Timesteps(self._scheduler or last_scheduler())
                current.timesteps.see(timestep)
        else:
            current.timesteps.skip()
        return self._offset(current, self.world.rank)

    def _offset(self, current, rank):
        is_last = self.config.stride == 2 and current.timesteps.is_last
        return schedule.timestep_offset(self.config, rank, is_last)

    def _retimed(self, current, offset, timestep, args, kwargs):
        if offset == 0:
            return args, kwargs
        other = current.previous_timestep if offset < 0 else current.timesteps.following(timestep)
        return self._signature.with_timestep(args, kwargs, other)

    def _run_unit(self, name, forward, args, kwargs):
        if self._active is None:
            return forward(*args, **kwargs)
        return self._active.run_unit(name, forward, args, kwargs)

    # Plans.

    def _pass_for(self, tick, key, planning, args, kwargs):
        # Hooks of others upon ours, as guiders put on for single calls, may leave units uncalled.
        covered = [name for name, hook in self._units.items() if hook.is_covered]
        covered += [name for name, module in self._around.items() if other_hooks(module)]
        place = (tick.call, key, tuple(covered))
        if place not in self._passes:
            known = None
            if self.plan is not None and tick.call:
                known = {u.key: s for u, s in zip(self.plan.graph.units, self.plan.division.owner, strict=True)}
            with planning() as forward:
                plan = make_plan(self.denoiser, forward, args, kwargs, self.config, self.world, known)
            self._attach(plan)
            device = device_of(args, kwargs)
            placeholders = self._placeholders.setdefault(device, Placeholders(device))
            current = Pass(plan, self.config, self.world.rank, device, placeholders, self._graphs)
            current.bind(self.exchange, f"call {tick.call}, plan {self._phases}")
            self._phases += 1
            self._passes[place] = current
            if tick.call == 0 or self.plan is None:
                self.plan = plan
            self._evict(tick)
        return self._passes[place]

    def _evict(self, tick):
        for place in list(self._passes)[:-KEPT_PASSES]:
            if tick.step == 0 and self._passes[place].trend.last_step < 0:
                self._release(self._passes.pop(place))

    def _release(self, current, released=False):
        """Forget the graphs of a pass, and its slots unless they are `released`."""
        if self._graphs is not None:
            self._graphs.forget(current)
        if not released:
            self.exchange.release(current.phase)

    def _attach(self, plan):
        modules = dict(self.denoiser.named_modules())
        for name in dict.fromkeys(unit.name for unit in plan.graph.units):
            parts = name.split(".")
            self._around.update(
                (outer, modules[outer]) for outer in (".".join(parts[:i]) for i in range(1, len(parts)))
            )
            if name not in self._units:

                def handler(forward, args, kwargs, name=name):
                    return self._run_unit(name, forward, args, kwargs)

                self._units[name] = Attachment(modules[name], handler)
