"""Plans a call whose patches pass through the stages: one traced forward on the whole picture, one on each patch."""

from dataclasses import replace

from ..calls.schedule import PatchMode
from ..patches.cutting import Cutter
from ..patches.planning import Planner, beforehand
from ..stages import cutset, graph
from ..stages.division import backward_reads
from ..stages.plan import as_rank_0, decide, weight_bytes
from ..tracing import trace
from . import order
from .picture import MicroPatch
from .plan import MicroPlan, PipelinePlan


class MicroPlanner(Planner):
    """Makes the plans of one denoiser. `world`: the stages, None where one process plans alone; `hooks`: its `Hooks`.

    `learn(graph, run)`: runs a micro-step for the first time, such that the structures of its units' results are
    learnt; it returns them beside what `run()` returns. None where they are not needed.
    """

    def __init__(self, shared, world, hooks, learn=None):
        sides = dict(num_stages=1, stages=None, pipeline_patches=None, num_patches=shared.config.pipeline_count)
        inner = replace(shared.config, **sides, predict="none")
        # Micro-steps differ from rank to rank, so no kernels are chosen in them.
        super().__init__(replace(shared, config=inner, choice=None), world, hooks)
        self._options, self._learn = shared.config, learn

    def plan(self, forward, args, kwargs, attach=None):
        """(`PipelinePlan`, its `MicroPatch`es, structures of each micro-step). Collective, if there is a world.

        Args:
            attach: called with the plan's units, once the hooks of patches are on their modules.
        Raises: ValueError if the denoiser cannot be shared out so, on every rank.
        """
        recording = trace.record(self.denoiser, forward, args, kwargs)
        whole, division = decide(self.denoiser, forward, args, kwargs, self._options, recording)
        if self.world is not None and self.world.size > 1:
            whole, division = as_rank_0(self.world, recording, whole, division)
        self._check_order(whole, division)
        outputs = _tensors(recording)
        patches, sites = [None], None
        if self._options.pipeline_count > 1:
            sites, patches, *_ = self._planned(forward, args, kwargs)
        if attach is not None:
            attach(whole.units)
        micro, structures, rowless, joints = [], [], frozenset(), ()
        for p, patch in enumerate(patches):
            traced, results, found = self._first_time(patch, whole, forward, args, kwargs)
            self._check_same(p, whole, traced)
            if patch is not None:
                rowless = order.without_rows(whole, traced)
                joints = tuple(_rows_dim(a, b) for a, b in zip(outputs, results, strict=True))
            transfers = cutset.transfers(traced, division, self._options, len(results))
            if p > 0:
                transfers = order.later_transfers(transfers, rowless, self._options.pipeline_text)
            micro.append(MicroPlan(traced, transfers, results))
            structures.append(found)
        weights = weight_bytes(self.denoiser, whole, division)
        plan = PipelinePlan(self._options, whole, division, sites, tuple(micro), rowless, weights, joints)
        if self.world is not None and len(set(self.world.gather(plan.digest(), "the plan of micro-steps"))) > 1:
            raise ValueError(
                "ranks traced different models: the denoisers or their inputs differ in structure; make them equal"
            )
        return plan, patches, structures

    def _patch(self, recorder, args, kwargs, axis, number):
        latent = self._signature.latent(args, kwargs)

        def split(size, factor):
            return order.rows_of(self._options.pipeline_patches, size, factor)

        cutter = Cutter.of(recorder, latent, self._signature.latent_name, self.config, number, axis, split)
        patch = MicroPatch(self._shared, cutter, number, latent.device)
        patch.prepare(*beforehand(recorder, cutter, False))
        self.hooks.attach(recorder, patch)
        return patch

    def _first_time(self, patch, whole, forward, args, kwargs):
        """(graph, tensors of the result, structures) of one micro-step, traced."""
        if patch is not None:
            args, kwargs = patch.begin(self._signature, PatchMode.LOCAL, args, kwargs)
        keys = {unit.key for unit in whole.units}

        def run():
            self.hooks.active = patch
            try:
                return trace.record(self.denoiser, self.hooks.counted(forward), args, kwargs)
            finally:
                self.hooks.active = None

        recording, found = (run(), {}) if self._learn is None else self._learn(whole, run)
        return graph.build_graph(recording, graph.keyed_nodes(recording, keys)), _tensors(recording), found

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
            raise ValueError(
                f"{type(self.denoiser).__name__} takes another way in micro-step {p} than on the whole picture: pass "
                "pipeline_patches=1, or stages alone"
            )


def _tensors(recording):
    return tuple(ref for ref in recording.output if ref is not None)


def _rows_dim(whole, part):
    """The dimension of rows of a tensor of the denoiser's result."""
    dims = [d for d, (a, b) in enumerate(zip(whole.shape, part.shape, strict=True)) if a != b]
    if len(dims) != 1:
        raise ValueError(
            f"the denoiser returns {whole.shape} for the whole picture and {part.shape} for a patch: patches need one "
            "dimension of rows in it"
        )
    return dims[0]
