"""What a plan takes on a cluster: time of a step, waits, bytes and memory of every rank."""

from dataclasses import dataclass

from ..patches.plan import MeshPlan, PatchPlan
from ..pipelined.plan import PipelinePlan
from ..stages.plan import aligned
from ..steps.plan import StepPlan
from . import steps
from .events import Mark, run
from .pipelined import PipelineCalls
from .sites import PatchCalls, SiteTable
from .stages import StageCalls, StagedPatchCalls

# So many steady steps are carried out; the rest of a picture is as these.
STEADY = 4
# Rows of a table at most: ranks that differ in a host only say the same.
SHOWN = 16


@dataclass(frozen=True)
class Simulated:
    """`exact_s`, `step_s`: of a step in warm-up and after it. Of each rank: seconds waited and bytes sent in a step
    after it, and bytes of buffers.
    """

    config: object
    cluster: object
    num_steps: int
    call_s: float
    exact_s: float
    step_s: float
    picture_s: float
    wait_s: tuple[float, ...]
    sent_bytes: tuple[float, ...]
    buffer_bytes: tuple[int, ...]
    alone_s: float

    @property
    def speed_up(self):
        """Of a picture, over one device."""
        return self.alone_s / self.picture_s

    def __str__(self):
        c, mesh = self.cluster, self.config.mesh
        sizes = " × ".join(f"{n} {name}" for name, n in vars(mesh).items() if n > 1) or "one rank"
        head = [
            f"simulated: {mesh.size} ranks ({sizes}) on {c.nodes} hosts of {c.gpus} devices, "
            f"{c.inside.gbs:g} GB/s inside, {c.between.gbs * c.nics:g} GB/s between hosts",
            f"a call on one device {self.call_s * 1e3:.1f} ms; a step in warm-up {self.exact_s * 1e3:.1f} ms, after it "
            f"{self.step_s * 1e3:.1f} ms; a picture of {self.num_steps} steps {self.picture_s:.2f} s, "
            f"{self.speed_up:.2f}x of one device",
        ]
        rows = [("rank", "waits of a step", "MB a step", "buffers MB")]
        for rank in range(min(mesh.size, SHOWN)):
            share = self.wait_s[rank] / self.step_s if self.step_s else 0.0
            sizes = (f"{self.sent_bytes[rank] / 1e6:.2f}", f"{self.buffer_bytes[rank] / 1e6:.1f}")
            rows.append((str(rank), f"{share:.1%}", *sizes))
        if mesh.size > SHOWN:
            share = max(self.wait_s) / self.step_s if self.step_s else 0.0
            most = (f"{max(x) / 1e6:.2f}" for x in (self.sent_bytes, self.buffer_bytes))
            rows.append((f"most of {mesh.size}", f"{share:.1%}", *most))
        return "\n".join([*head, "", *aligned(rows)])


def simulate(plan, times, cluster, num_steps=50, error=0.0):
    """What pictures take by a plan.

    Args:
        plan: what `asyncdiff_fast.plan` gives.
        times: `Times` of one device.
        cluster: `Cluster` with at least as many devices as the plan has ranks.
        error: relative error of a latent that is predicted one step ahead, where steps run side by side.
    Returns: `Simulated`.
    Raises: ValueError if the cluster is too small.
    """
    config = plan.patches.config if isinstance(plan, MeshPlan) else plan.config
    size = config.world_size
    if size > cluster.size:
        raise ValueError(
            f"a cluster needs a device for each rank: got {cluster.nodes} × {cluster.gpus} = {cluster.size} devices, "
            f"the options take {size} ranks; name more nodes or gpus, or share between fewer"
        )
    error = steps.lasting(error)
    warmup = min(config.least_warmup, num_steps)
    # Enough for every way to repeat itself: whole blocks, both kinds of call of stride 2.
    steady = min(num_steps - warmup, STEADY * config.parallel_steps)
    # Where stages run ahead the first call fills them for all.
    steady = num_steps - warmup if config.run_ahead else steady
    # Exact steps are alike, but for the first ones of steps side by side.
    first = max(0, warmup - 1) if config.parallel_steps == 1 else 0
    builder, numbers = _Builder(plan, config, times), range(first, warmup + steady)
    line = run([_ended(builder.generation(rank, numbers, error)) for rank in range(size)], cluster)
    # Where every step is exact, all are counted.
    begins = min((s for s in line.marks if s != "end" and s >= warmup), default=first)
    count, end = numbers.stop - begins, line.at("end")
    step_s = (end - line.at(begins)) / count
    exact_s = line.at(begins) / (begins - first) if begins > first else step_s
    total = times.fixed_s + first * exact_s + end + (num_steps - numbers.stop) * step_s
    pairs = [(line.marks[begins][rank], line.marks["end"][rank]) for rank in range(size)]
    waits, sent = (tuple((b[i] - a[i]) / count for a, b in pairs) for i in (1, 2))
    return Simulated(
        config, cluster, num_steps, times.call_s, exact_s, step_s, total, waits, sent,
        tuple(builder.buffer_bytes(rank) for rank in range(size)),
        num_steps * (times.call_s + times.sampler_s) + times.fixed_s,
    )  # fmt: skip


def _ended(program):
    yield from program
    yield Mark("end")


class _Builder:
    """Programs of all ranks of a plan."""

    def __init__(self, plan, config, times):
        self._config, self._times, self._mesh = config, times, config.mesh
        self._outer = plan if isinstance(plan, StepPlan) else None
        self._plan = plan.each if self._outer else plan
        patches = self._plan.patches if isinstance(self._plan, MeshPlan) else self._plan
        self._table = SiteTable(patches) if isinstance(patches, PatchPlan) else None
        self._stages = self._plan.stages if isinstance(self._plan, MeshPlan) else self._plan
        graph = getattr(self._stages, "whole", None) or getattr(self._stages, "graph", None)
        self._shares = None if graph is None else times.shares(graph, config.balance)
        self._half = self._half_bytes() if config.cfg_parallel else 0

    def generation(self, rank, numbers, error):
        """Events of some steps of a generation on a rank."""
        times, calls = self._times, self._calls(rank)
        if self._config.parallel_steps == 1:
            return steps.one_by_one(calls, numbers, times.sampler_s)
        ranks, nbytes = self._mesh.along("step", rank), self._outer.output_bytes
        return steps.side_by_side(calls, self._config, ranks, rank, nbytes, numbers.stop, times, error)

    def buffer_bytes(self, rank):
        """Bytes of a rank's long-lived buffers."""
        _, _, patch, stage = self._mesh.place(rank)
        total = self._config.parallel_steps * self._outer.output_bytes if self._outer else 0
        if self._table is not None:
            total += self._table.plan.memory_bytes(patch)
        if isinstance(self._stages, PipelinePlan):
            total += self._stages.kept_bytes(stage)
        return total + (self._stages.buffer_bytes(stage) if hasattr(self._stages, "buffer_bytes") else 0)

    def _calls(self, rank):
        """One rank's calls."""
        times, mesh = self._times, self._mesh
        _, _, patch, stage = mesh.place(rank)
        seconds = times.call_s
        if self._config.cfg_parallel:
            seconds = times.call_s / 2 if times.half_s is None else times.half_s
        along = {axis: mesh.along(axis, rank) for axis in ("half", "patch", "stage")}
        calls = self._within(seconds, along, patch, stage)
        return steps.HalfCalls(calls, along["half"], rank, self._half) if self._config.cfg_parallel else calls

    def _within(self, seconds, along, patch, stage):
        plan, stages, table = self._plan, along["stage"], self._table
        if plan is None:
            return steps.WholeCalls(seconds)
        if isinstance(plan, PipelinePlan):
            return PipelineCalls(plan, self._shares, stages, stage, seconds, self._times.micro_s)
        if table is None:
            return StageCalls(plan, self._shares, stages, stage, seconds)
        start, stop = table.plan.rows.held[patch]
        seconds = self._times.patch_s[patch] if self._times.patch_s else seconds * (stop - start) / table.plan.rows.size
        if isinstance(plan, PatchPlan):
            return PatchCalls(table, plan.config, along["patch"], patch, seconds)
        return StagedPatchCalls(table, plan.stages, self._shares, along["patch"], patch, stages, stage, seconds)

    def _half_bytes(self):
        """Bytes of one half's result."""
        if self._outer:
            return self._outer.output_bytes
        if self._table is not None:
            return self._table.plan.result_bytes
        outputs = self._plan.route.micro[0].outputs if isinstance(self._plan, PipelinePlan) else self._plan.outputs
        return sum(ref.nbytes for ref in outputs)
