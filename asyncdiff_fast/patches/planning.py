"""Plans the patches of one denoiser, from a forward on the whole picture and one on each patch."""

import contextlib

import torch
from torch.utils._pytree import tree_leaves

from ..calls import schedule
from ..calls.schedule import PatchMode
from ..tracing import side_effects
from . import site_rows, sites
from .cutting import Cutter
from .patch import Patch
from .plan import PatchPlan

# How far the patches' synchronous result may be from the whole picture's, of its largest element.
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Planner:
    """Makes the patches of one denoiser. `world` is None where one process plans alone; `hooks`: its `Hooks`."""

    def __init__(self, shared, world, hooks):
        self._shared, self.world, self.hooks = shared, world, hooks
        self.denoiser, self.config = shared.denoiser, shared.config
        self._signature, self._choice = shared.signature, shared.choice

    def first(self, forward, args, kwargs, axis, exchange, phase):
        """The patch of this rank for these inputs, bound to its slots, checked against the whole picture. Collective.

        Raises: ValueError if the denoiser cannot be shared out as patches, on every rank.
        """
        whole, recorder = self._look(forward, args, kwargs)
        run = self._quiet(forward)
        patch = self._patch(recorder, args, kwargs, axis, self.world.rank)
        self._probe(patch, run, args, kwargs, whole)
        if not self.config.naive:
            everyone = self.world.gather((patch.found, patch.sees_latent), "the rows of every site")
            plan = self._plan(patch.cutter, recorder, everyone, whole)
            if len(set(self.world.gather(plan.digest(), "the plan of the patches"))) > 1:
                raise ValueError("ranks planned different patches: the denoisers or their inputs differ")
            patch.bind(plan, exchange, phase, _samples(plan, recorder))
        patch.bind_result(exchange, phase)
        if not self.config.naive:
            with self.learning(True):
                joined = self._on_patch(patch, PatchMode.SYNC, run, args, kwargs, exact=True)
            self._verify(joined, whole)
        return patch

    def learning(self, first):
        """Kernels are chosen at the `first` call of a kind, if all ranks are patches and so make the same calls."""
        able = first and self._choice is not None and self.config.world_size == self.world.size
        return self._choice.learning() if able else contextlib.nullcontext()

    def plan_alone(self, forward, args, kwargs):
        """The plan, made by one process that looks at every patch in turn. Returns `PatchPlan`."""
        return self._planned(forward, args, kwargs)[0]

    def emulate(self, number, forward, args, kwargs, exchange):
        """One patch's calls in a process that knows no other patch, to measure what a rank computes.

        Returns: (`PatchPlan`, a function of a `PatchMode` that carries out the patch's call with these arguments). The
            exchange sees all its posts and waits; received is what it writes.
        """
        plan, patches, samples, whole, run = self._planned(forward, args, kwargs)
        patch = patches[number]
        patch.learn_result(whole, self._on_patch(patch, PatchMode.LOCAL, run, args, kwargs))
        patch.bind(plan, exchange, "emulated", samples)
        patch.bind_result(exchange, "emulated")
        return plan, lambda mode: self._on_patch(patch, mode, run, args, kwargs)

    def _planned(self, forward, args, kwargs):
        """(plan, a patch of every patch, samples of its sites, the whole result, a quiet forward)."""
        whole, recorder = self._look(forward, args, kwargs)
        run, patches = self._quiet(forward), []
        for number in range(self.config.num_patches):
            patches.append(self._patch(recorder, args, kwargs, schedule.patch_axis(self.config, 0), number))
            self._on_patch(patches[-1], PatchMode.LOCAL, run, args, kwargs)
        everyone = [(patch.found, patch.sees_latent) for patch in patches]
        plan = self._plan(patches[0].cutter, recorder, everyone, whole)
        return plan, patches, _samples(plan, recorder), whole, run

    def on_first_patch(self, forward, args, kwargs, make_plan):
        """What `make_plan(denoiser, forward, args, kwargs, config)` makes of the first patch's call."""
        _, recorder = self._look(forward, args, kwargs)
        self.hooks.active = self._patch(recorder, args, kwargs, schedule.patch_axis(self.config, 0), 0)
        cut_args, cut_kwargs = self.hooks.active.begin(self._signature, PatchMode.LOCAL, args, kwargs)
        try:
            return make_plan(self.denoiser, self.hooks.counted(forward), cut_args, cut_kwargs, self.config)
        finally:
            self.hooks.active = None

    def _on_patch(self, patch, mode, run, args, kwargs, exact=False):
        return self.hooks.on_patch(patch, self._signature, mode, run, args, kwargs, exact)

    def _quiet(self, forward):
        """Calls of the denoiser that leave no trace in it."""

        def run(args, kwargs):
            with side_effects.restored(self.denoiser), torch.no_grad():
                return self.hooks.counted(forward)(*args, **kwargs)

        return run

    def _look(self, forward, args, kwargs):
        """(result, `Recorder`) of a forward on the whole picture."""
        latent = self._signature.latent(args, kwargs)
        if not isinstance(latent, torch.Tensor) or latent.dim() not in (3, 4, 5):
            kind = tuple(latent.shape) if isinstance(latent, torch.Tensor) else type(latent).__name__
            raise ValueError(f"num_patches needs a latent of 3, 4 or 5 dimensions as the denoiser's input: got {kind}")
        paused = contextlib.nullcontext() if self._choice is None else self._choice.paused()
        with side_effects.restored(self.denoiser), paused:
            whole, recorder = sites.record(self.denoiser, forward, latent, args, kwargs)
        if recorder.steered_by:
            raise ValueError(
                f"{', '.join(dict.fromkeys(recorder.steered_by))} reads numbers from activations into Python, which "
                "differ from patch to patch: use num_stages instead"
            )
        return whole, recorder

    def _patch(self, recorder, args, kwargs, axis, number):
        """A patch without a plan, ready for a first look."""
        latent = self._signature.latent(args, kwargs)
        cutter = Cutter.of(recorder, latent, self._signature.latent_name, self.config, number, axis)
        patch = Patch(self._shared, cutter, number, latent.device)
        patch.prepare(*beforehand(recorder, cutter, self.config.naive))
        self.hooks.attach(recorder, patch)
        return patch

    def _plan(self, cutter, recorder, everyone, whole):
        """The plan from what every patch has found; without sites for naive patches, which exchange results only."""
        found = ()
        if not self.config.naive:
            seen, sees_latent = zip(*everyone, strict=True)
            frames = cutter.grid.outer if cutter.grid is not None else 1
            found = site_rows.make_sites(recorder, cutter.levels, cutter.rows.size, seen, all(sees_latent), frames)
        nbytes = sum(x.nbytes for x in tree_leaves(whole) if isinstance(x, torch.Tensor))
        return PatchPlan(self.config, cutter.rows, cutter.levels, found, nbytes, recorder.kept_bytes)

    def _probe(self, patch, run, args, kwargs, whole):
        """Run the denoiser on this patch alone: the numbers mean nothing yet, but all shapes are seen."""
        problem = None
        try:
            patch.learn_result(whole, self._on_patch(patch, PatchMode.LOCAL, run, args, kwargs))
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        problems = self.world.gather(problem, "a first look at the patches")
        for number, text in enumerate(problems):
            if text is not None:
                raise ValueError(
                    f"{type(self.denoiser).__name__} does not run on patch {number} of {self.world.size}, "
                    f"{patch.cutter.describe(number)}: {text}"
                )

    def _verify(self, joined, whole):
        """The patches together must give what the whole picture gives."""
        error = 0.0
        for a, b in zip(tree_leaves(joined), tree_leaves(whole), strict=True):
            if isinstance(b, torch.Tensor):
                limit = CLOSE.get(b.dtype, 1e-1) * max(float(b.abs().max()), 1e-12)
                error = max(error, float((a - b).abs().max()) / limit)
        worst = max(self.world.gather(error, "the first result of the patches"))
        if not worst <= 1:
            raise ValueError(
                f"{type(self.denoiser).__name__} cannot be shared out as patches: together they differ from the whole "
                f"picture by {worst:.3g} times what rounding explains, so something in it mixes rows in a way that is "
                "neither a convolution, a GroupNorm nor scaled_dot_product_attention; use num_stages instead, or set "
                "its attention to a processor that calls scaled_dot_product_attention"
            )


def _samples(plan, recorder):
    """{number of a site: some of what it met in the forward on the whole picture}."""
    return {i: recorder.sites[s.name, s.call][s.place].sample for i, s in enumerate(plan.sites)}


def beforehand(recorder, cutter, naive):
    """(sites, {key: result}, {(key, place): [(argument, tensor)]}) that follow from the whole picture alone."""
    probes = () if naive else site_rows.resampling_sites(recorder, cutter.levels)
    constants = {}
    for key, result in recorder.constants.items():
        cut = cutter.positions(result, {i for *place, i in recorder.beside if tuple(place) == key})
        if cut is not None:
            constants[key] = cut
    joins = {}
    for key, found in recorder.joins.items():
        for place, argument, x, shape in found:
            cut = cutter.join_position(x, shape)
            if cut is not None:
                joins.setdefault((key, place), []).append((argument, cut))
    return probes, constants, joins
