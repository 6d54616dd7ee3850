"""A plan: which rank computes which units, what travels, and the table that shows it."""

from dataclasses import dataclass

from ..calls.schedule import stage_of
from ..calls.signature import device_of
from ..fused.packed import packs
from ..modules import containers
from ..tracing import times, trace
from ..tracing.recording import TensorRef
from . import cutset, graph, units
from .division import Division, describe, divide, from_names

# A later call of the same step keeps to the first one's division if no more than this share of it falls outside.
KEPT_GLUE = 0.05
# On the CPU what is done to activations waits for memory, in softmax, norms and the like: a byte of them that an
# operation reads or writes takes as long as so many FLOPs. Fitted to the processor time of the units of a UNet as wide
# as SD1.5's; with the bytes of weights, which are packed, the same fit divided worse than without any.
FLOPS_PER_BYTE = 16
# What travels beside the denoiser's result where predictions are checked: their worst error.
WORST_ERROR = TensorRef(-1, (1,), "float32", 4, ("strided", (1,)))


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first asynchronous call, for one signature of inputs.

    `outputs` are the tensors of the denoiser's result, and the worst error of predictions where they are checked;
    `weight_bytes` the parameters of each stage's units, its last entry those of the glue, which every rank needs.
    """

    config: object
    graph: graph.Graph
    division: Division
    transfers: tuple[cutset.Transfer, ...]
    outputs: tuple[TensorRef, ...]
    weight_bytes: tuple[int, ...]

    def program(self, rank):
        """The `RankProgram` of a rank."""
        return cutset.rank_program(self.graph, self.division, self.config, self.transfers, rank)

    def sent_bytes(self):
        """{(source, target, name): bytes} of one asynchronous call."""
        return cutset.bytes_per_call(self.graph, self.transfers, [ref.nbytes for ref in self.outputs])

    def buffer_bytes(self, rank):
        """Bytes of a rank's long-lived buffers: two of what it sends, and of what it receives, one more each to predict
        it and for graphs to read it.
        """
        total, values = 0, self.graph.values
        for transfer in self.transfers:
            refs = self.outputs if transfer.unit < 0 else {v: values[v].ref for v in transfer.values}
            read = transfer.unit >= 0
            more = (read and self.config.predict != "none") + (read and self.config.graphs is True)
            mine = {v for target, found in transfer.targets if target == rank for v in found}
            total += sum(2 * refs[v].nbytes for v in transfer.values if transfer.source == rank)
            total += sum((2 + more) * refs[v].nbytes for v in mine)
        return total

    @property
    def bytes_per_call(self):
        """Bytes that all ranks together send in one asynchronous call."""
        return sum(self.sent_bytes().values())

    @property
    def cut_bytes(self):
        """The part of `bytes_per_call` that stages read from each other; the rest are predictions."""
        unit_names = {t.name for t in self.transfers if t.unit >= 0}
        return sum(n for (_, _, name), n in self.sent_bytes().items() if name in unit_names)

    def digest(self):
        """What ranks compare: units, owners, transfers and sizes."""
        names = [(u.key, owner) for u, owner in zip(self.graph.units, self.division.owner, strict=True)]
        return repr((names, [(v.unit, v.ref.shape, v.ref.dtype) for v in self.graph.values], self.transfers))

    def __str__(self):
        total = sum(self.division.costs) or 1.0
        head = (
            f"{self.config.num_stages} stages, stride {self.config.stride}, {self.config.stage_ranks} ranks: largest "
            f"stage {self.division.balance:.3f} of the mean, {self.cut_bytes / 1e6:.2f} MB cut and "
            f"{(self.bytes_per_call - self.cut_bytes) / 1e6:.2f} MB predictions per call, stale hops "
            f"{self.division.hops[0]} to {self.division.hops[1]}, glue on every rank {self.graph.glue_cost / total:.1%}"
        )
        rows = [("rank", "stage", "share", "weights MB", "buffers MB", "units")]
        for rank in range(self.config.stage_ranks):
            stage = stage_of(self.config, rank)
            share = f"{self.division.costs[stage] / total:.1%}"
            sizes = (f"{n / 1e6:.1f}" for n in (self.weight_bytes[stage], self.buffer_bytes(rank)))
            rows.append((str(rank), str(stage), share, *sizes, ranges(self.graph, self.division, stage)))
        return "\n".join([head, "", *aligned(rows), "", *sends(self.sent_bytes())])


def ranges(graph, division, stage):
    """Names of a stage's units, runs of consecutive ones as `first … last`."""
    runs, previous = [], None
    for i, (unit, owner) in enumerate(zip(graph.units, division.owner, strict=True)):
        if owner == stage:
            runs[-1:] = (
                [(runs[-1][0], unit.name)] if previous == i - 1 and runs else [*runs[-1:], (unit.name, unit.name)]
            )
            previous = i
    return ", ".join(a if a == b else f"{a} … {b}" for a, b in runs)


def aligned(rows):
    """Lines of a table, from rows of cells."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return ["  ".join([cell.ljust(w) for cell, w in zip(row, [*widths, 0], strict=True)]).rstrip() for row in rows]


def sends(sent_bytes):
    """Lines of a table of what travels, from {(source, target, name): bytes}."""
    rows = [(str(s), str(t), f"{n / 1e6:.3f}", name) for (s, t, name), n in sent_bytes.items()]
    return aligned([("from", "to", "MB", "tensors of"), *rows])


def make_plan(denoiser, forward, args, kwargs, config, world=None, stage_of_unit=None):
    """Trace one forward and decide.

    Args:
        denoiser, forward, args, kwargs: as `tracing.record` takes them.
        world: the ranks; rank 0 decides for all, and all compare. None: decide alone.
        stage_of_unit: {unit key: stage} of the plan of another call of the same step, to keep to.
    Returns: `Plan`.
    Raises: ValueError if there are too few units, or `stages` names a module that the forward does not call.
    """
    recording = trace.record(denoiser, forward, args, kwargs)
    traced, division = None, None
    if stage_of_unit is not None:
        traced = graph.build_graph(recording, graph.keyed_nodes(recording, stage_of_unit))
        if traced.units and not traced.leaks and traced.glue_cost <= KEPT_GLUE * sum(u.cost for u in traced.units):
            division = describe(traced, tuple(stage_of_unit[u.key] for u in traced.units), config.num_stages)
    if division is None:
        traced, division = decide(denoiser, forward, args, kwargs, config, recording)
    outputs = tuple(ref for ref in recording.output if ref is not None)
    if config.checks:
        outputs += (WORST_ERROR,)
    if world is not None and world.size > 1:
        traced, division = as_rank_0(world, recording, traced, division)
    transfers = cutset.transfers(traced, division, config, len(outputs))
    plan = Plan(config, traced, division, transfers, outputs, weight_bytes(denoiser, traced, division))
    if world is not None and len(set(world.gather(plan.digest(), "the plan"))) > 1:
        raise ValueError(
            "ranks traced different models: the denoisers or their inputs differ in structure; make them equal"
        )
    return plan


def decide(denoiser, forward, args, kwargs, config, recording):
    """(graph, division) of a recording, by the options or by search.

    Raises: ValueError if the denoiser cannot be divided so.
    """
    nodes = _units(denoiser, recording, config)
    traced = graph.build_graph(recording, nodes)
    if traced.remembers:
        raise ValueError(
            f"{', '.join(traced.remembers)} keeps what follows from activations for the next call, which ranks that do "
            "not compute them cannot know: make it a result, or share steps (parallel_steps) or halves (cfg_parallel) "
            "instead"
        )
    if traced.leaks:
        names = ", ".join(traced.units[i].name for i in sorted(traced.leaks))
        raise ValueError(f"{names} leaves a tensor behind that other modules read; list a module that holds both")
    where = device_of(args, kwargs)
    kind = where and where.type
    if config.balance == "flops" and kind == "cpu":
        traced = traced.with_costs({node.key: float(node.flops + FLOPS_PER_BYTE * node.nbytes) for node in nodes})
    if config.balance == "time" and traced.units:
        keys = [u.key for u in traced.units]
        # The first two pack weights, where that is done.
        repeats = 4 if packs(config.kernels, kind) else 2
        traced = traced.with_costs(times.measure(denoiser, forward, keys, args, kwargs, repeats))
    if config.balance == "memory":
        traced = traced.with_costs(_weights_of_units(denoiser, traced))
    if config.stages is not None:
        return traced, from_names(traced, config.stages)
    return _merged(
        recording,
        traced,
        divide(traced, config.num_stages, config.predict != "none" and not config.pipelined, config.pipelined),
    )


def _units(denoiser, recording, config):
    """The call-tree nodes that are units: those named in `stages`, else chosen."""
    if config.stages is None:
        return units.choose_units(recording, config.num_stages, containers(denoiser))
    nodes, missing = graph.named_nodes(recording, [name for names in config.stages for name in names])
    if missing:
        raise ValueError(f"stages names modules that the denoiser does not call: {', '.join(missing)}; remove them")
    odd = dict.fromkeys(node.name for node in nodes if recording.events[node.stop].opaque)
    if odd:
        raise ValueError(
            f"stages names modules that do more than return tensors: {', '.join(odd)} (they keep something, fill a "
            "list or dict they are given, or return numbers or unknown classes); name modules inside them"
        )
    return nodes


def _merged(recording, traced, division):
    """Graph and division with units merged to whole modules, if that leaves the cut as it is."""
    nodes = units.merge_units(recording, traced, division.owner)
    stage_of_unit = dict(zip([u.key for u in traced.units], division.owner, strict=True))
    cost_of_unit = {u.key: u.cost for u in traced.units}
    inside = {node.key: units.keys_within(node, stage_of_unit) for node in nodes}
    merged = graph.build_graph(recording, nodes)
    merged = merged.with_costs({key: sum(cost_of_unit[k] for k in keys) for key, keys in inside.items()})
    owner = tuple(stage_of_unit[inside[u.key][0]] for u in merged.units)
    result = describe(merged, owner, division.num_stages)
    if merged.leaks or result.cut_bytes > division.cut_bytes:
        return traced, division
    return merged, result


def as_rank_0(world, recording, traced, division):
    """Graph and division by rank 0's units, owners and costs."""
    mine = [(u.key, owner, u.cost) for u, owner in zip(traced.units, division.owner, strict=True)]
    theirs = world.broadcast(mine, "the division into stages")
    nodes = graph.keyed_nodes(recording, {key for key, _, _ in theirs})
    traced = graph.build_graph(recording, nodes).with_costs({key: cost for key, _, cost in theirs})
    owners = {key: owner for key, owner, _ in theirs}
    return traced, describe(traced, tuple(owners[u.key] for u in traced.units), division.num_stages)


def _weights_of_units(denoiser, traced):
    """{unit: bytes of its weights}; of those that several have, the first."""
    modules, seen, found = dict(denoiser.named_modules()), set(), {}
    for unit in traced.units:
        mine = {id(p): p for p in modules[unit.name].parameters() if id(p) not in seen}
        seen.update(mine)
        found[unit.key] = float(sum(p.numel() * p.element_size() for p in mine.values()))
    return found


def weight_bytes(denoiser, traced, division):
    """Bytes of the parameters of each stage's units, and last of those of the glue."""
    modules, seen = dict(denoiser.named_modules()), set()
    totals = [0] * (division.num_stages + 1)
    owners = [(modules[u.name], s) for u, s in zip(traced.units, division.owner, strict=True)]
    for module, stage in [*owners, (denoiser, division.num_stages)]:
        for p in module.parameters():
            if id(p) not in seen:
                seen.add(id(p))
                totals[stage] += p.numel() * p.element_size()
    return tuple(totals)
