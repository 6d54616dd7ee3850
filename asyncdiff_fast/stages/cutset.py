"""What travels between ranks in one asynchronous call, in which order, and who waits for what where. Pure."""

from dataclasses import dataclass

from ..calls.schedule import is_extra, stage_of

PREDICTION, NEXT_PREDICTION = "prediction", "next prediction"


@dataclass(frozen=True)
class Transfer:
    """Values of one unit, made on rank `source`, and the values each target rank reads.

    `unit` is -1 for the prediction, whose tensors are numbered by their place in the denoiser's result.
    """

    name: str
    unit: int
    source: int
    targets: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def values(self):
        """All values that leave the source."""
        return tuple(sorted({v for _, values in self.targets for v in values}))


@dataclass(frozen=True)
class RankProgram:
    """One rank's part of an asynchronous call.

    `computes`: its units. `sends`: unit to transfer, posted when the unit has run. `receives`: unit to transfer for
    units replayed from another rank. `waits`: position to transfers that must have arrived before that unit begins.
    """

    rank: int
    computes: frozenset[int]
    sends: dict[int, int]
    receives: dict[int, int]
    waits: dict[int, tuple[int, ...]]


def needs(graph, division, config, rank):
    """Values of other stages that a rank reads, each with the position of its first touch there."""
    stage, found = stage_of(config, rank), {}
    readers = [unit.reads for unit, owner in zip(graph.units, division.owner, strict=True) if owner == stage]
    if stage == division.num_stages - 1:
        readers.append(graph.output_reads)
    for reads in readers:
        for v, touch in reads.items():
            if division.owner[graph.values[v].unit] != stage:
                found[v] = min(touch, found.get(v, touch))
    return found


def transfers(graph, division, config, num_predictions=1):
    """All transfers of one asynchronous call in the order in which every rank posts them.

    The order is that of production, by the cost each stage has done until then, since stages run side by side; so no
    early tensor queues behind a late one.

    Args:
        num_predictions: tensors in the denoiser's result.
    """
    wanted = {rank: needs(graph, division, config, rank) for rank in range(config.stage_ranks)}
    done, listed = [0.0] * division.num_stages, []
    for i, unit in enumerate(graph.units):
        owner = division.owner[i]
        done[owner] += unit.cost
        targets = []
        for rank, values in wanted.items():
            mine = tuple(sorted(v for v in values if graph.values[v].unit == i))
            if mine:
                targets.append((rank, mine))
        if targets:
            name = unit.name if unit.call == 0 else f"{unit.name}#{unit.call}"
            listed.append((done[owner], i, Transfer(name, i, owner, tuple(targets))))
    ordered = [transfer for _, _, transfer in sorted(listed, key=lambda item: item[:2])]
    sources = [(PREDICTION, config.stage_ranks - 1)]
    if config.stride == 2:
        sources.append((NEXT_PREDICTION, config.num_stages - 1))
    for name, source in sources:
        targets = [(r, tuple(range(num_predictions))) for r in range(config.stage_ranks) if r != source]
        ordered.append(Transfer(name, -1, source, tuple(targets)))
    return tuple(ordered)


def rank_program(graph, division, config, ordered, rank):
    """The `RankProgram` of a rank; numbers of transfers are their places in `ordered`."""
    stage, positions = stage_of(config, rank), needs(graph, division, config, rank)
    computes = frozenset(i for i, owner in enumerate(division.owner) if owner == stage)
    sends, receives, waits = {}, {}, {}
    for number, transfer in enumerate(ordered):
        if transfer.unit < 0:
            continue
        if transfer.source == rank and not is_extra(config, rank):
            sends[transfer.unit] = number
        for target, values in transfer.targets:
            if target == rank:
                receives[transfer.unit] = number
                # What is written into an argument is awaited where the unit is replayed, before any touch.
                touches = [positions[v] for v in values if graph.values[v].argument is None]
                if touches:
                    waits.setdefault(min(touches), []).append(number)
    return RankProgram(rank, computes, sends, receives, {q: tuple(numbers) for q, numbers in waits.items()})


def bytes_per_call(graph, ordered, prediction_bytes):
    """{(source, target, name): bytes} of one asynchronous call; `prediction_bytes` lists the result's tensors."""
    sizes = {}
    for transfer in ordered:
        for target, values in transfer.targets:
            of = prediction_bytes if transfer.unit < 0 else {v: graph.values[v].nbytes for v in values}
            sizes[transfer.source, target, transfer.name] = sum(of[v] for v in values)
    return sizes
