"""The plan of a call whose patches pass through the stages: micro-steps, what travels, weights. Pure."""

from dataclasses import dataclass

from ..patches.plan import PatchPlan, hash_of
from ..patches.site import Norm
from ..stages import cutset
from ..stages.division import Division
from ..stages.graph import Graph
from ..stages.plan import aligned, ranges, sends
from ..tracing.recording import TensorRef


@dataclass(frozen=True)
class MicroPlan:
    """One micro-step. `outputs` are the tensors of its result."""

    graph: Graph
    transfers: tuple[cutset.Transfer, ...]
    outputs: tuple[TensorRef, ...]

    def ref(self, transfer, v):
        """What one of a transfer's tensors looks like."""
        return self.outputs[v] if transfer.unit < 0 else self.graph.values[v].ref


@dataclass(frozen=True)
class Route:
    """A call as micro-steps that pass through the stages.

    `rowless`: the values that hold no rows, which micro-steps after the first take from it. `joints`: for each tensor
    of the denoiser's result the dimension in which the micro-steps' are put together; none for one micro-step.
    `spared`: modules that run in the first micro-step only.
    """

    config: object
    division: Division
    micro: tuple[MicroPlan, ...]
    rowless: frozenset[int] = frozenset()
    joints: tuple[int, ...] = ()
    spared: frozenset[str] = frozenset()

    def program(self, p, rank):
        """The `RankProgram` of a rank in a micro-step."""
        micro = self.micro[p]
        return cutset.rank_program(micro.graph, self.division, self.config, micro.transfers, rank)

    def sent_bytes(self):
        """{(source, target, name): bytes} of one call."""
        total = {}
        for micro in self.micro:
            found = cutset.bytes_per_call(micro.graph, micro.transfers, [ref.nbytes for ref in micro.outputs])
            for key, n in found.items():
                total[key] = total.get(key, 0) + n
        return total

    def buffer_bytes(self, rank):
        """Bytes of a rank's buffers of what travels, for all micro-steps."""
        total = 0
        for micro in self.micro:
            for transfer in micro.transfers:
                mine = {v for target, found in transfer.targets if target == rank for v in found}
                mine = transfer.values if transfer.source == rank else mine
                total += sum(micro.ref(transfer, v).nbytes for v in mine)
        return total

    def compared(self):
        """What ranks compare."""
        steps = [([(v.unit, v.ref.shape, v.ref.dtype) for v in m.graph.values], m.transfers) for m in self.micro]
        return steps, sorted(self.rowless), self.joints


@dataclass(frozen=True)
class PipelinePlan:
    """Everything that is decided before the first call of micro-steps, for one signature of inputs.

    `whole`: the units of the whole picture. `patches`: rows and sites, and `passing`: the patches' way through the
    stages; None for one patch. `exact`: the way of the whole picture, by parts of the batch, for one patch and where no
    rank has all weights; else None.
    `weight_bytes`: as `Plan` of stages has them.
    """

    config: object
    whole: Graph
    division: Division
    patches: PatchPlan | None
    passing: Route | None
    exact: Route | None
    weight_bytes: tuple[int, ...]

    @property
    def route(self):
        """Of a call after the exact ones."""
        return self.passing or self.exact

    def sent_bytes(self):
        """{(source, target, name): bytes} of one call after the exact ones."""
        return self.route.sent_bytes()

    @property
    def bytes_per_call(self):
        """Bytes that all ranks together send in one call of micro-steps."""
        return sum(self.sent_bytes().values())

    def buffer_bytes(self, rank):
        """Bytes of a rank's buffers of what travels."""
        return sum(route.buffer_bytes(rank) for route in (self.passing, self.exact) if route is not None)

    def held_bytes(self, stage):
        """Bytes of the weights that a rank holds: its own units' and the glue's, or all."""
        weights = self.weight_bytes
        return weights[stage] + weights[-1] if self.config.shard_weights else sum(weights)

    def owns(self, site, stage):
        """True if a stage runs a site: in one of its units, or in the glue."""
        units = zip(self.whole.units, self.division.owner, strict=True)
        inside = {s for unit, s in units if site.name == unit.name or site.name.startswith(f"{unit.name}.")}
        return not inside or stage in inside

    def kept_bytes(self, stage):
        """Bytes of what a stage keeps of its sites: keys and values, statistics, rows around; and to predict, twice."""
        predicts = self.config.predict != "none"
        return sum(_kept(site) * (1 + (predicts and type(site) is not Norm)) for site in self.sites(stage).values())

    def sites(self, stage):
        """{place in `patches`: site} of those that a stage runs."""
        sites = self.patches.sites if self.patches is not None else ()
        return {i: site for i, site in enumerate(sites) if self.owns(site, stage)}

    def micro_steps_per_call(self):
        """Micro-steps from the first one's entry to the last one's exit; between two exits, where stages run ahead."""
        return len(self.route.micro) + (0 if self.config.run_ahead else self.division.num_stages - 1)

    def digest(self):
        """What ranks compare."""
        names = [(u.key, owner) for u, owner in zip(self.whole.units, self.division.owner, strict=True)]
        routes = [route and route.compared() for route in (self.passing, self.exact)]
        return hash_of((names, routes, self.patches and self.patches.digest()))

    def __str__(self):
        total = sum(self.division.costs) or 1.0
        count, steps = len(self.route.micro), self.micro_steps_per_call()
        what = f"patches of {self.patches.rows.size} rows" if self.patches is not None else "parts of the batch"
        head = (
            f"{count} {what} through {self.division.num_stages} stages: {steps} micro-steps per call, of which "
            f"each rank works in {count}; largest stage {self.division.balance:.3f} of the mean, "
            f"{self.bytes_per_call / 1e6:.2f} MB per call, glue on every rank and in every micro-step "
            f"{self.whole.glue_cost / total:.1%}"
        )
        table = [("rank", "share", "weights MB", "kept MB", "buffers MB", "units")]
        for stage in range(self.division.num_stages):
            sizes = (self.held_bytes(stage), self.kept_bytes(stage), self.buffer_bytes(stage))
            share = f"{self.division.costs[stage] / total:.1%}"
            cells = (f"{n / 1e6:.1f}" for n in sizes)
            table.append((str(stage), share, *cells, ranges(self.whole, self.division, stage)))
        return "\n".join([head, "", *aligned(table), "", *sends(self.sent_bytes())])


def _kept(site):
    """Bytes that a rank keeps of one site."""
    if not site.exchanges:
        return 0
    if hasattr(site, "tokens"):
        tokens = site.tokens.extra + sum(site.tokens.count(p) for p in range(len(site.shapes)))
        return tokens * site.key[0] * site.features * site.item
    if hasattr(site, "message_shape"):
        n, groups, numbers = site.message_shape()
        return len(site.shapes) * n * groups * numbers * site.item
    return sum(site.sent_bytes(p) for p in range(len(site.shapes)))
