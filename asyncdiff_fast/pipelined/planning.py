"""Plans a call whose patches pass through the stages: one traced forward on the whole picture, one on each patch."""

import contextlib
from dataclasses import replace

from ..calls.schedule import PatchMode
from ..calls.signature import inputs_key
from ..patches.alone import LonePlanner
from ..patches.site import Ring
from ..stages import cutset, graph
from ..stages.division import backward_reads, describe
from ..stages.plan import as_rank_0, decide, weight_bytes
from ..tracing import trace
from . import batches, order
from .kept import KINDS
from .picture import MicroPatch
from .plan import MicroPlan, PipelinePlan, Route
from .spared import spared


class MicroPlanner(LonePlanner):
    """Makes the plans of one denoiser. `world`: the stages, None where one process plans alone; `hooks`: its `Hooks`.

    `learn(graph, run)`: runs a micro-step for the first time, such that the structures of its units' results are
    learnt; it returns them beside what `run()` returns. None where they are not needed.
    """

    _make, _keyed = MicroPatch, False
    # The way out is said by what makes these plans.
    way_out = way_out_of_mixing = ""

    def __init__(self, shared, world, hooks, learn=None):
        patches = dict(num_patches=shared.config.pipeline_count, pipeline_patches=None, run_ahead=False)
        stages = dict(num_stages=1, stages=None, shard_weights=False, balance="flops")
        inner = replace(shared.config, **patches, **stages, predict="none")
        # Micro-steps differ from rank to rank, so no kernels are chosen in them.
        super().__init__(replace(shared, config=inner, choice=None), hooks)
        self.world, self._options, self._learn = world, shared.config, learn

    def plan(self, forward, args, kwargs, attach=None, owners=None, hold=None):
        """(`PipelinePlan`, its patches, {route: structures of each micro-step}). Collective, if there is a world.

        Args:
            attach: called with the names of the units, once the hooks of patches are on their modules.
            owners: {(unit, call): stage} of a division to keep to.
            hold: called with the units and their division before anything but shapes is looked at.
        Raises: ValueError if the denoiser cannot be shared out so, on every rank.
        """
        recording = trace.record(self.denoiser, forward, args, kwargs)
        whole, division = self._divided(recording, forward, args, kwargs, owners)
        self._check_order(whole, division)
        if hold is not None:
            hold(whole, division)
        patches, sites = (), None
        if self._options.pipeline_count > 1:
            sites, patches = self._on_rows(forward, args, kwargs)
        if attach is not None:
            attach(dict.fromkeys(unit.name for unit in whole.units))
        passing, exact, structures = None, None, {}
        if patches:
            for patch in patches:
                patch.begin(PatchMode.LOCAL)
            cuts = [(patch, *patch.cut(self._signature, args, kwargs)) for patch in patches]
            passing, structures["passing"] = self._route(whole, division, recording, forward, cuts)
        if self._options.shard_weights or not patches:
            exact, structures["exact"] = self._by_batch(whole, division, recording, forward, args, kwargs)
        weights = weight_bytes(self.denoiser, whole, division)
        plan = PipelinePlan(self._options, whole, division, sites, passing, exact, weights)
        if self.world is not None and len(set(self.world.gather(plan.digest(), "the plan of micro-steps"))) > 1:
            raise ValueError(
                "ranks traced different models: the denoisers or their inputs differ in structure; make them equal"
            )
        return plan, patches, structures

    def _on_rows(self, forward, args, kwargs):
        """(`PatchPlan`, its patches). Raises: ValueError if the denoiser does not run on patches."""
        try:
            sites, patches, *_ = self.planned(forward, args, kwargs)
            _check_sites(sites.sites)
        except Exception as error:
            raise ValueError(
                f"{type(self.denoiser).__name__} does not run with pipeline_patches={self._options.pipeline_patches}: "
                f"{error}; pass pipeline_patches=1, which keeps the picture whole"
            ) from error
        if self._options.run_ahead:
            _check_ahead(sites.sites)
        return sites, patches

    def _divided(self, recording, forward, args, kwargs, owners):
        """(graph, division) of the whole picture's forward."""
        if owners is None:
            whole, division = decide(self.denoiser, forward, args, kwargs, self._options, recording)
        else:
            by_name = {name: stage for (name, _), stage in owners.items()}
            whole = graph.build_graph(recording, graph.named_nodes(recording, by_name)[0])
            kept = tuple(owners.get(unit.key, by_name[unit.name]) for unit in whole.units)
            if set(kept) != set(range(self._options.num_stages)):
                raise ValueError(
                    f"{type(self.denoiser).__name__} no longer calls all stages between which its weights are divided; "
                    "unpatch() and patch() anew"
                )
            division = describe(whole, kept, self._options.num_stages)
        if self.world is not None and self.world.size > 1:
            return as_rank_0(self.world, recording, whole, division)
        return whole, division

    def _by_batch(self, whole, division, recording, forward, args, kwargs):
        """The route of an exact call: part of the batch after part, if the denoiser works on parts of it."""
        batch = batches.size_of(self._signature.latent(args, kwargs))
        count = batches.parts_of(batch)
        if count > 1:
            parts = [(None, *batches.cut(i, count, batch, args, kwargs)) for i in range(count)]
            with contextlib.suppress(_Differs):
                return self._route(whole, division, recording, forward, parts)
        return self._route(whole, division, recording, forward, [(None, args, kwargs)])

    def _route(self, whole, division, recording, forward, cuts):
        """(`Route`, structures of each micro-step) of calls cut so: (patch, args, kwargs) of each."""
        micro, structures, rowless, spare, joints = [], [], frozenset(), frozenset(), ()
        text, known = self._options.pipeline_text, {}
        for p, (patch, args, kwargs) in enumerate(cuts):
            key = inputs_key(args, kwargs)
            if key not in known:
                known[key] = self._first_time(patch, whole, forward, args, kwargs)
                self._check_same(p, whole, known[key][0])
            # Those of as many rows differ in nothing that a plan is made of.
            traced, part, found = known[key]
            results = _tensors(part)
            if patch is not None and p == 0:
                rowless = order.without_rows(whole, traced)
                spare = spared(recording, part, traced, rowless, text)
            if len(cuts) > 1:
                joints = tuple(_joint(a, b) for a, b in zip(_tensors(recording), results, strict=True))
            transfers = cutset.transfers(traced, division, self._options, len(results))
            if p > 0:
                transfers = order.later_transfers(transfers, rowless, text)
            micro.append(MicroPlan(traced, transfers, results))
            structures.append(found)
        return Route(self._options, division, tuple(micro), rowless, joints, spare), structures

    def _regions(self, recorder):
        # Stages end and begin within a call.
        return []

    def _split(self, size, factor):
        return order.rows_of(self._options.pipeline_patches, size, factor)

    def _first_time(self, patch, whole, forward, args, kwargs):
        """(graph, recording, structures) of one micro-step."""
        keys = {unit.key for unit in whole.units}

        def run():
            self.hooks.active = patch
            try:
                return trace.record(self.denoiser, self.hooks.counted(forward), args, kwargs)
            finally:
                self.hooks.active = None

        recording, found = (run(), {}) if self._learn is None else self._learn(whole, run)
        return graph.build_graph(recording, graph.keyed_nodes(recording, keys)), recording, found

    def _check_order(self, whole, division):
        backward = backward_reads(whole, division)
        if backward:
            unit, other = backward[0]
            raise ValueError(
                f"a patch passes through the stages once, in order: got {unit.name} in an earlier stage than "
                f"{other.name}, whose result it reads; list stages in order of execution, or leave stages out"
            )

    def _check_same(self, p, whole, traced):
        mine, theirs = ([(u.key, u.leaves) for u in g.units] for g in (traced, whole))
        if mine != theirs or len(traced.values) != len(whole.values) or traced.leaks:
            raise _Differs(
                f"{type(self.denoiser).__name__} takes another way in micro-step {p} than on the whole picture: pass "
                "pipeline_patches=1, or stages alone"
            )


def _tensors(recording):
    return tuple(ref for ref in recording.output if ref is not None)


def _check_sites(sites):
    """Raises: ValueError if patches share something in a way that has no place here."""
    unknown = [site for site in sites if site.exchanges and type(site) not in KINDS]
    if unknown:
        raise ValueError(
            f"patches that pass through stages share rows of convolutions, statistics of GroupNorms and keys and "
            f"values, not what {unknown[0].label} does ({unknown[0].kind})"
        )


def _check_ahead(sites):
    """Raises: ValueError if a call's first patches may read rows of the latent that nobody knows before it comes."""
    other = [site for site in sites if site.exchanges and type(site) is not Ring]
    if other:
        raise ValueError(
            "run_ahead needs patches that share keys and values only, since the rows around them in the next latent "
            f"are not known yet: got {other[0].label} ({other[0].kind}); pass run_ahead=False"
        )


class _Differs(ValueError):
    """A micro-step is not what the whole picture's call is."""


def _joint(whole, part):
    """The dimension in which a tensor of the denoiser's result is a micro-step's part of the whole."""
    dims = [d for d, (a, b) in enumerate(zip(whole.shape, part.shape, strict=True)) if a != b]
    if len(dims) != 1:
        raise _Differs(
            f"the denoiser returns {whole.shape} for the whole call and {part.shape} for a micro-step: they need one "
            "dimension in which they are put together"
        )
    return dims[0]
