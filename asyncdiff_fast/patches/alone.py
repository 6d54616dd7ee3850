"""The plan of all patches, made and checked by one process that knows no other rank."""

import torch

from ..calls import schedule
from ..calls.schedule import PatchMode
from .lockstep import Lockstep
from .planning import Planner
from .way import Lost


class LonePlanner(Planner):
    """Plans the patches of one denoiser without their ranks."""

    def __init__(self, shared, hooks):
        super().__init__(shared, None, hooks)

    def plan_alone(self, forward, args, kwargs):
        """The plan, made by one process that looks at every patch in turn, and sees that together they are right.

        Returns: `PatchPlan`. Raises: ValueError if the denoiser cannot be shared out as patches.
        """
        able = not self.config.naive and not self._signature.latent(args, kwargs).is_meta

        def check(plan, patches, samples, whole, run):
            if able:
                self._check_alone(plan, patches, samples, run, whole, args, kwargs)

        return self.planned(forward, args, kwargs, check)[0]

    def _check_alone(self, plan, patches, samples, run, whole, args, kwargs):
        turns = Lockstep(len(patches), lambda number: setattr(self.hooks, "active", patches[number]))
        for patch, exchange in zip(patches, turns.exchanges, strict=True):
            self.hooks.attach_all(plan.modules)
            patch.bind(plan, exchange, "alone", samples)
            patch.bind_result(exchange, "alone")

        def joined(args, kwargs):
            def call(number):
                return self._on_patch(patches[number], PatchMode.SYNC, run, args, kwargs, exact=True)

            try:
                return turns.run(call)[0]
            finally:
                self.hooks.active = None

        try:
            self._compare(patches[0], joined, run, whole, args, kwargs)
        except Lost:
            self._compare(patches[0], joined, run, whole, args, kwargs, late=False)

    def emulate(self, number, forward, args, kwargs, exchange):
        """One patch's calls in a process that knows no other patch, to measure what a rank computes.

        Returns: (`PatchPlan`, a function of a `PatchMode`, and of `through` as `Hooks.on_patch` takes it, that carries
            out the patch's call with these arguments). The exchange sees all its posts and waits; received is what it
            writes.
        """
        plan, patches, samples, whole, run = self.planned(forward, args, kwargs)
        patch = patches[number]
        patch.learn_result(whole, self._on_patch(patch, PatchMode.LOCAL, run, args, kwargs))
        patch.bind(plan, exchange, "emulated", samples)
        patch.bind_result(exchange, "emulated")
        # Not quiet: to look into every module around each call is no part of what a rank computes.
        counted, given = self.hooks.counted(forward), self._with_own_latent(args, kwargs)

        def run(args, kwargs):
            return counted(*args, **kwargs)

        def call(mode, through=None):
            with torch.no_grad():
                return self.hooks.on_patch(patch, self._signature, mode, run, *given, through=through)

        return plan, call

    def planned(self, forward, args, kwargs, check=lambda *found: None):
        """(plan, a patch of every patch, samples of its sites, the whole result, a quiet forward).

        Args:
            check: called with these, may raise a ValueError, upon which they are planned another way.
        """
        whole, recorder = self._look(forward, args, kwargs)
        run, axis, problem = self._quiet(forward), schedule.patch_axis(self.config, 0), None
        for seen, cutter in self._tries(recorder, args, kwargs, axis):
            try:
                cutters = map(cutter.of_patch, range(self.config.num_patches))
                patches = [self._patch(seen, cutter, args, kwargs) for cutter in cutters]
                for text in (self._first_look(patch, run, args, kwargs, whole) for patch in patches):
                    if text is not None:
                        raise ValueError(text)
                everyone = [self._seen(seen, patch) for patch in patches]
                named = self._signature.named(args, kwargs)
                plan = self._plan(patches[0].cutter, seen, everyone, whole, named)
                found = plan, patches, seen.samples(plan), whole, run
                check(*found)
                return found
            except ValueError as error:
                problem = problem or error
        raise problem

    def on_first_patch(self, forward, args, kwargs, make_plan):
        """What `make_plan(denoiser, forward, args, kwargs, config)` makes of the first patch's call."""
        _, recorder = self._look(forward, args, kwargs)
        seen, cutter = self._tries(recorder, args, kwargs, schedule.patch_axis(self.config, 0))[0]
        self.hooks.active = self._patch(seen, cutter, args, kwargs)
        self.hooks.active.begin(PatchMode.LOCAL)
        cut_args, cut_kwargs = self.hooks.active.cut(self._signature, args, kwargs)
        try:
            with self.hooks.active.following(self._signature.latent(cut_args, cut_kwargs)):
                return make_plan(self.denoiser, self.hooks.counted(forward), cut_args, cut_kwargs, self.config)
        finally:
            self.hooks.active = None
