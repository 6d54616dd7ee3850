"""Plans the patches of one denoiser, from a forward on the whole picture and one on each patch."""

import contextlib
import functools

import torch
from torch.utils._pytree import tree_leaves

from ..calls import schedule
from ..calls.schedule import PatchMode
from ..calls.signature import copied
from ..tracing import side_effects
from . import inputs, regions, site_rows, tokens, tries
from .check import OTHERWISE, WAY_OUT, ResultCheck
from .cutting import Cutter
from .mixing import mixed
from .patch import Patch
from .plan import PatchPlan
from .positions import Positions
from .recorder import record
from .way import Lost
from .within import Within


class Planner:
    """Makes the patches of one denoiser. `world` is None where one process plans alone; `hooks`: its `Hooks`."""

    # `_split(rows of the latent, of them in one of the coarsest resolution)`: the patches' `Rows`; None: even ones.
    # `_keyed`: whether calls are told from each other by the values that a patch `reads`.
    _make, _split, _keyed = Patch, None, True
    # What to do with what cannot be shared, and where rows are mixed: the end of an error's text.
    way_out, way_out_of_mixing = f"; {OTHERWISE}", f"; {WAY_OUT}"

    def __init__(self, shared, world, hooks):
        self._shared, self.world, self.hooks = shared, world, hooks
        self.denoiser, self.config = shared.denoiser, shared.config
        self._signature, self._choice = shared.signature, shared.choice

    def first(self, forward, args, kwargs, axis, exchange, phase):
        """The patch of this rank for these inputs, bound to its slots, checked against the whole picture. Collective.

        Raises: ValueError if the denoiser cannot be shared out as patches, on every rank.
        """
        whole, recorder = self._look(forward, args, kwargs)
        run, problem = self._quiet(forward), None
        for number, (seen, cutter) in enumerate(self._tries(recorder, args, kwargs, axis)):
            patch = None
            try:
                patch = self._patch(seen, cutter.of_patch(self.world.rank), args, kwargs)
                self._probe(patch, run, args, kwargs, whole)
                self._bind(patch, seen, args, kwargs, run, whole, exchange, f"{phase}.{number}")
                return patch
            except ValueError as error:
                problem = problem or error
                if patch is not None:
                    patch.release()
        raise problem

    def _tries(self, recorder, args, kwargs, axis):
        """See `tries.of`."""
        latent, named = self._signature.latent(args, kwargs), self._signature.named(args, kwargs)
        cutter = Cutter.of(recorder, latent, self._signature.latent_name, self.config, axis, self._split)
        return tries.of(recorder, cutter, named, self._regions(recorder), self._keyed)

    def _regions(self, recorder):
        """The regions in which alone patches may work, if what is beneath knows of them."""
        able = not (self.config.naive or self.config.num_stages > 1 or self.config.cut)
        return regions.find(recorder) if able else []

    def _bind(self, patch, recorder, args, kwargs, run, whole, exchange, phase):
        """Plan with all patches, register the slots and compare with the whole picture. Collective."""
        if self.config.naive:
            patch.bind_result(exchange, phase)
            return
        everyone = self.world.gather(self._seen(recorder, patch), "the rows of every site")
        plan = self._plan(patch.cutter, recorder, everyone, whole, self._signature.named(args, kwargs))
        self.hooks.attach_all(plan.modules)
        if len(set(self.world.gather(plan.digest(), "the plan of the patches"))) > 1:
            raise ValueError("ranks planned different patches: the denoisers or their inputs differ")

        def joined(args, kwargs):
            return self._on_patch(patch, PatchMode.SYNC, run, args, kwargs, exact=True)

        def bind(phase):
            patch.bind(plan, exchange, phase, recorder.samples(plan))
            patch.bind_result(exchange, phase)

        bind(phase)
        with self.learning(True):
            try:
                self._compare(patch, joined, run, whole, args, kwargs)
            except Lost:
                # Late in time it goes another way; that call has left some of its slots unposted.
                patch.release()
                bind(f"{phase} again")
                self._compare(patch, joined, run, whole, args, kwargs, late=False)

    def _compare(self, patch, joined, run, whole, args, kwargs, late=True):
        """See that `joined(args, kwargs)`, of all patches together, is what the whole picture gives."""
        check = patch.result_check = ResultCheck(self.denoiser, self._signature, self.world)
        check.compare(joined, run, whole, args, kwargs, patch.cutter.dim if late else None)

    def expect(self, patch, forward, args, kwargs):
        """See `ResultCheck.expect`; before a call that leaves traces in the denoiser.

        Raises: ValueError if the denoiser does not run on the whole picture after it has run on a patch.
        """
        with patch.result_check.refusing("it keeps something of the patch of its last call"):
            return patch.result_check.expect(self._quiet(forward), args, kwargs)

    def _with_own_latent(self, args, kwargs):
        """(args, kwargs) with a latent that a forward may write into."""
        return self._signature.with_latent(args, kwargs, self._signature.latent(args, kwargs).clone())

    def learning(self, first):
        """Kernels are chosen at the `first` call of a kind, if all ranks are patches and so make the same calls."""
        able = first and self._choice is not None and self.config.world_size == self.world.size
        return self._choice.learning() if able else contextlib.nullcontext()

    def _on_patch(self, patch, mode, run, args, kwargs, exact=False):
        args, kwargs = self._with_own_latent(args, kwargs)
        return self.hooks.on_patch(patch, self._signature, mode, run, args, kwargs, exact)

    def _quiet(self, forward):
        """Calls of the denoiser that leave no trace in it."""

        def run(args, kwargs):
            args, kwargs = copied(args, kwargs)
            if self.hooks.active is None:
                args, kwargs = self._with_own_latent(args, kwargs)
            with side_effects.restored(self.denoiser), torch.no_grad():
                return self.hooks.counted(forward)(*args, **kwargs)

        return run

    def _look(self, forward, args, kwargs):
        """(result, `Recorder`) of a forward on the whole picture."""
        latent = self._signature.latent(args, kwargs)
        if not isinstance(latent, torch.Tensor) or latent.dim() not in (3, 4, 5):
            kind = tuple(latent.shape) if isinstance(latent, torch.Tensor) else type(latent).__name__
            raise ValueError(
                f"num_patches needs a latent of 3, 4 or 5 dimensions as the denoiser's input: got {kind}; use "
                "num_stages or parallel_steps instead"
            )
        paused = contextlib.nullcontext() if self._choice is None else self._choice.paused()
        with side_effects.restored(self.denoiser), paused:
            whole, recorder = self._recorded(forward, args, kwargs)
        if recorder.steered_by:
            raise ValueError(
                f"{', '.join(dict.fromkeys(recorder.steered_by))} reads numbers from activations into Python, which "
                "differ from patch to patch: use num_stages instead"
            )
        if schedule.patch_axis(self.config, 0) == -2:
            dim = 1 if latent.dim() == 3 else latent.dim() - 2
            with torch.no_grad():
                run = self._quiet(forward)
                with_latent = functools.partial(self._signature.with_latent, args, kwargs)
                recorder.tokens = tokens.find(run, recorder, latent, with_latent, dim, self.denoiser)
        return whole, recorder

    def _recorded(self, forward, args, kwargs):
        given = self._with_own_latent(args, kwargs)
        try:
            return record(self.denoiser, forward, self._signature, *given)
        except Exception as error:
            # What the denoiser itself cannot do is its own error.
            with torch.no_grad():
                forward(*args, **kwargs)
            raise ValueError(
                f"{type(self.denoiser).__name__} runs, but not while it is looked at for patches: "
                f"{type(error).__name__}: {error}{self.way_out}"
            ) from error

    def _patch(self, recorder, cutter, args, kwargs):
        """A patch without a plan, ready for a first look."""
        inputs.check_masks(cutter, self._signature.named(args, kwargs))
        patch = self._make(self._shared, cutter, cutter.patch, self._signature.latent(args, kwargs).device)
        patch.reads = tuple(recorder.reads)
        if recorder.region is not None:
            patch.within = Within(recorder.region, patch)
        with self._refusing():
            sites = () if self.config.naive else site_rows.resampling_sites(recorder, cutter.levels)
            patch.prepare(sites, Positions.of(recorder, cutter))
        self.hooks.attach(recorder, patch)
        return patch

    def _plan(self, cutter, recorder, everyone, whole, named):
        """The plan from what every patch has found; without sites for naive patches, which exchange results only."""
        found = ()
        if not self.config.naive:
            problem = next((text for *_, text in everyone if text), None)
            if problem is not None:
                raise ValueError(problem)
            found = self._sites(cutter, recorder, everyone)
        nbytes = sum(x.nbytes for x in tree_leaves(whole) if isinstance(x, torch.Tensor))
        told, summing = inputs.told(cutter, named, recorder.joined), recorder.summing
        if recorder.region is not None:
            told = (str(recorder.region),)
        return PatchPlan(self.config, cutter.rows, cutter.levels, found, nbytes, recorder.kept_bytes, told, summing)

    def _sites(self, cutter, recorder, everyone):
        seen, sees_latent, sums, _ = zip(*everyone, strict=True)
        with self._refusing():
            found = site_rows.make_sites(recorder, cutter, seen, all(sees_latent))
            return site_rows.with_sums(found, recorder, sums)

    @contextlib.contextmanager
    def _refusing(self):
        """What is wrong with some rows is told with the denoiser's class and the way out."""
        try:
            yield
        except ValueError as error:
            raise ValueError(self._refusal(error, self.way_out)) from error

    def _refusal(self, problem, way_out):
        return f"{type(self.denoiser).__name__} cannot be shared out as patches: {problem}{way_out}"

    def _seen(self, recorder, patch):
        """(sites, whether the latent is read where it lies, {place: shapes that are summed}, a problem) of a patch."""
        found = () if self.config.naive else mixed(recorder.calls, patch.look.following.calls)
        others, problem = [str(call) for call in found if not call.sums], None
        if others:
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            problem = self._refusal(f"{others[0]}{more}", self.way_out_of_mixing)
        return (
            patch.look.found,
            patch.look.sees_latent and patch.within is None,
            {call.whole.site: call.part.given for call in found if call.sums},
            problem,
        )

    def _probe(self, patch, run, args, kwargs, whole):
        """Run the denoiser on this patch alone: the numbers mean nothing yet, but all shapes are seen."""
        problems = self.world.gather(self._first_look(patch, run, args, kwargs, whole), "a first look at the patches")
        problem = next((text for text in problems if text is not None), None)
        if problem is not None:
            raise ValueError(problem)

    def _first_look(self, patch, run, args, kwargs, whole):
        """None, or what is wrong with a denoiser's run on a patch alone."""
        try:
            patch.learn_result(whole, self._on_patch(patch, PatchMode.LOCAL, run, args, kwargs))
        except Exception as error:
            left = inputs.left_whole(patch.cutter, self._signature.named(args, kwargs))
            return (
                f"{type(self.denoiser).__name__} does not run on patch {patch.number} of {self.config.num_patches}, "
                f"{patch.cutter.describe(patch.number)}: {type(error).__name__}: {error}{left}{self.way_out}"
            )
        return None
