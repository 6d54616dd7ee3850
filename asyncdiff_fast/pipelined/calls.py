"""The patches that pass through one rank's stage: plans them at the first call, then carries out each call.

Calls begin exact, every rank computing all. From then on a call is a micro-step for each patch, and is over when the
last one's prediction has come to every rank.
"""

import torch
from torch.utils._pytree import tree_leaves

from ..calls import schedule
from ..calls.schedule import Mode, PatchMode
from ..calls.signature import device_of
from ..modules import Attachment
from ..patches.hooks import Hooks
from ..patches.planning import CLOSE
from ..stages.buffers import Placeholders
from ..stages.replay import Replay, structure_of, with_tensors
from ..tracing import side_effects
from .kept import keep
from .micro import MicroStep
from .picture import WholePicture
from .planning import MicroPlanner
from .slots import MicroSlots

# Plans kept for inputs seen before, per denoiser.
KEPT_PIPELINES = 8


class _Pipeline:
    """One plan on one rank: its micro-steps, and what is kept between them. Collective to make."""

    def __init__(self, plan, patches, structures, world, exchange, device, placeholders, phase):
        self.plan, self.patches, self.last_step = plan, patches, -1
        self.slots = MicroSlots(plan, world.rank, device, exchange, phase)
        first, places = {}, range(len(plan.micro))
        self.steps = [MicroStep(plan, p, world.rank, placeholders, structures[p], self.slots, first) for p in places]
        self.whole = None
        if plan.patches is not None:
            with torch.inference_mode(False):
                kept = {i: keep(site, device) for i, site in plan.sites(world.rank).items()}
            self.whole = WholePicture(plan.patches, kept)
            for patch in patches:
                patch.bind(plan.patches, kept)


class PipelineCalls:
    """`plan` is the latest plan (None before the first call)."""

    def __init__(self, shared, world, exchange):
        self.denoiser, self.config, self.world, self.exchange = shared.denoiser, shared.config, world, exchange
        self.plan, self.hooks = None, Hooks(shared.denoiser)
        self._signature, self._planner = shared.signature, MicroPlanner(shared, world, self.hooks, self._learn)
        self._pipelines, self._units, self._placeholders, self._phases = {}, {}, {}, 0
        # What the unit hooks hand calls to, or None.
        self._active = None

    def begin_generation(self):
        """What an earlier generation left behind is not read again."""
        for current in self._pipelines.values():
            current.last_step = -1

    def call(self, tick, key, planning, forward, args, kwargs):
        """(the denoiser's result, how it was computed: a `Mode`). Collective over the stages.

        Args:
            tick: the call's place in time.
            key: changes with the inputs' shapes.
            planning: a context for what refuses a denoiser: its value is the forward to plan with.
            forward: the denoiser's own.
        """
        place = (tick.call, key)
        if place not in self._pipelines:
            with planning() as quiet:
                current = self._planned(place, quiet, args, kwargs)
                result = self._exact(current, quiet, args, kwargs)
                self._verify(current, result, quiet, args, kwargs)
            current.last_step = tick.step
            return result, Mode.EXACT
        current = self._pipelines[place] = self._pipelines.pop(place)
        mode = schedule.mode(self.config, tick.step, current.last_step == tick.step - 1)
        current.last_step = tick.step
        with self.exchange.step():
            if mode is Mode.COMPUTE:
                return self._passed_through(current, forward, args, kwargs), mode
            # Only what the next call may read is kept.
            if tick.step < self.config.warmup_steps - 1:
                return forward(*args, **kwargs), mode
            return self._exact(current, forward, args, kwargs), mode

    def errors(self):
        """Nothing is predicted."""
        return {}

    def forget(self, released=False):
        """Drop all plans, buffers and hooks; the slots too, unless they are `released`."""
        for current in () if released else self._pipelines.values():
            current.slots.release()
        self._pipelines.clear()
        for attachment in self._units.values():
            attachment.remove()
        self._units.clear()
        self.hooks.remove()
        self.plan = None

    # One call.

    def _exact(self, current, forward, args, kwargs):
        if current.whole is None:
            return forward(*args, **kwargs)
        return self._at_sites(current.whole, PatchMode.SYNC, forward, args, kwargs)

    def _passed_through(self, current, forward, args, kwargs):
        """The result of all patches."""
        current.slots.begin()
        for step, patch in zip(current.steps, current.patches, strict=True):
            step.begin()
            self._active = step
            try:
                if patch is None:
                    result = forward(*args, **kwargs)
                else:
                    result = self._at_sites(patch, PatchMode.DISPLACED, forward, args, kwargs)
            finally:
                self._active = None
            step.end(result)
        parts = zip(*(step.prediction() for step in current.steps), strict=True)
        if current.plan.patches is None:
            whole = [part.clone() for (part,) in parts]
        else:
            whole = [torch.cat(found, dim) for found, dim in zip(parts, current.plan.joints, strict=True)]
        return with_tensors(structure_of(result), whole)

    def _at_sites(self, picture, mode, forward, args, kwargs):
        def run(args, kwargs):
            return self.hooks.counted(forward)(*args, **kwargs)

        return self.hooks.on_patch(picture, self._signature, mode, run, args, kwargs)

    def _run_unit(self, name, forward, args, kwargs):
        if self._active is None:
            return forward(*args, **kwargs)
        return self._active.run_unit(name, forward, args, kwargs)

    # Plans.

    def _planned(self, place, forward, args, kwargs):
        plan, patches, structures = self._planner.plan(forward, args, kwargs, self._attach)
        device = device_of(args, kwargs)
        placeholders = self._placeholders.setdefault(device, Placeholders(device))
        phase = f"call {place[0]}, micro-steps, plan {self._phases}"
        self._phases += 1
        current = _Pipeline(plan, patches, structures, self.world, self.exchange, device, placeholders, phase)
        self._pipelines[place] = current
        if place[0] == 0 or self.plan is None:
            self.plan = plan
        for old in list(self._pipelines)[:-KEPT_PIPELINES]:
            self._pipelines.pop(old).slots.release()
        return current

    def _verify(self, current, exact, forward, args, kwargs):
        """Micro-steps of the same call must give what the exact one gave: nothing that they read is stale then."""
        with side_effects.restored(self.denoiser), torch.no_grad(), self.exchange.step():
            passed = self._passed_through(current, forward, args, kwargs)
        error = 0.0
        for a, b in zip(tree_leaves(passed), tree_leaves(exact), strict=True):
            if isinstance(b, torch.Tensor):
                limit = CLOSE.get(b.dtype, 1e-1) * max(float(b.abs().max()), 1e-12)
                error = max(error, float((a - b).abs().max()) / limit)
        worst = max(self.world.gather(error, "the first result of micro-steps"))
        if not worst <= 1:
            raise ValueError(
                f"{type(self.denoiser).__name__} does not work with pipeline_patches={self.config.pipeline_patches}: "
                f"together they differ from the whole picture by {worst:.3g} times what rounding explains, so "
                "something in it mixes rows in a way that is neither a convolution, a GroupNorm nor "
                "scaled_dot_product_attention; pass pipeline_patches=1, or stages alone"
            )

    def _learn(self, graph, run):
        """(what `run()` returns, {unit: structure of its result} of the forward in it)."""
        learning = self._active = _Learning(graph)
        try:
            return run(), learning.units.structures
        finally:
            self._active = None

    def _attach(self, units):
        modules = dict(self.denoiser.named_modules())
        for name in dict.fromkeys(unit.name for unit in units):
            if name not in self._units:

                def handler(forward, args, kwargs, name=name):
                    return self._run_unit(name, forward, args, kwargs)

                self._units[name] = Attachment(modules[name], handler)


class _Learning:
    """In place of a micro-step: learns what results of units look like."""

    def __init__(self, graph):
        self.units = Replay(graph, None)

    def run_unit(self, name, forward, args, kwargs):
        result = forward(*args, **kwargs)
        index = self.units.turn(name)[0] if self.units.knows(name) else None
        if index is not None:
            self.units.learn(index, result)
        return result
