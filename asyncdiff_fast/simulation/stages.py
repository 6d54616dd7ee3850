"""A call in stages, as events: the plan's programs with seconds in place of modules."""

from ..calls import schedule
from ..calls.schedule import Mode
from ..stages.cutset import NEXT_PREDICTION, PREDICTION
from .events import Compute, Post, Wait
from .sites import Sites


class Program:
    """What a rank does in one forward: its units' seconds, what it posts after them and awaits before them.

    Args:
        graph, program: of the forward; `shares` of its units and the share `outside` them, by which `seconds` are cut.
        targets: {transfer: ((rank, bytes), ...)}, sources: {transfer: rank}.
        within: gives the events of a unit (its name; None: between units) from its seconds, instead of computing alone.
    """

    def __init__(self, graph, program, shares, outside, seconds, targets, sources, within=None):
        self.graph, self.program, self._targets, self._sources = graph, program, targets, sources
        self._unit_s = [shares[unit.key] * seconds for unit in graph.units]
        self._between_s = outside * seconds / max(len(graph.units), 1)
        self._within = within or (lambda name, seconds, key: (Compute(seconds),))

    def whole(self, key):
        """Events of a forward in which everything is computed here."""
        for unit, seconds in zip(self.graph.units, self._unit_s, strict=True):
            yield from self._within(None, self._between_s, key)
            yield from self._within(unit.name, seconds, key)

    def own(self, key, awaited):
        """Events of this rank's part; what it awaits has the key `awaited`, None if it was never sent."""
        for i, (unit, seconds) in enumerate(zip(self.graph.units, self._unit_s, strict=True)):
            yield from self._within(None, self._between_s, key)
            if i in self.program.computes:
                yield from self._within(unit.name, seconds, key)
                if i in self.program.sends:
                    yield self.post(key, self.program.sends[i])
            elif awaited is not None and self._argument_only(i):
                yield self.wait(awaited, self.program.receives[i])
            for number in self.program.waits.get(i + 1, ()) if awaited is not None else ():
                yield self.wait(awaited, number)

    def post(self, key, number):
        """The event that posts a transfer."""
        return Post((*key, number), self._targets[number])

    def wait(self, key, number):
        """The event that awaits a transfer."""
        return Wait((*key, number), self._sources[number])

    def _argument_only(self, i):
        """True if all that is received of a unit is written into its arguments: awaited where it is replayed."""
        number = self.program.receives.get(i)
        return number is not None and all(number not in found for found in self.program.waits.values())


def routes(transfers, sizes, ranks):
    """({transfer: ((rank, bytes), ...)}, {transfer: rank}), ranks being those of the stages.

    Args:
        sizes: bytes of a value of a transfer, `sizes(transfer, value)`.
    """
    targets = {
        n: tuple((ranks[target], sum(sizes(t, v) for v in values)) for target, values in t.targets)
        for n, t in enumerate(transfers)
    }
    return targets, {n: ranks[t.source] for n, t in enumerate(transfers)}


class StageCalls:
    """The calls of one rank of the stages of a `Plan`.

    Args:
        ranks: of the stages; `stage_rank` counts among them.
        seconds: of a whole call.
        within: see `Program`.
    """

    def __init__(self, plan, shares, ranks, stage_rank, seconds, within=None):
        self._plan, self._config, self._rank = plan, plan.config, stage_rank
        values, outputs = plan.graph.values, plan.outputs

        def size(transfer, v):
            return (outputs[v] if transfer.unit < 0 else values[v].ref).nbytes

        program = plan.program(stage_rank)
        self._program = Program(
            plan.graph, program, *shares, seconds, *routes(plan.transfers, size, ranks), within=within
        )
        self._numbers = {t.name: n for n, t in enumerate(plan.transfers) if t.unit < 0}
        self._computed = None

    def call(self, step, exact=False):
        """Events of one call."""
        mode, config = schedule.mode(self._config, step, not exact), self._config
        if mode is Mode.EXACT:
            yield from self._program.whole(("stages", step))
        elif mode is Mode.REPEAT:
            if self._rank != config.num_stages - 1:
                yield self._program.wait(("stages", self._computed), self._numbers[NEXT_PREDICTION])
        else:
            yield from self._compute(("stages", step), config)
            self._computed = step

    def _compute(self, key, config):
        yield from self._program.own(key, None if self._computed is None else ("stages", self._computed))
        if config.stride == 2 and self._rank == config.num_stages - 1:
            yield self._program.post(key, self._numbers[NEXT_PREDICTION])
        if self._rank == config.stage_ranks - 1:
            yield self._program.post(key, self._numbers[PREDICTION])
        else:
            yield self._program.wait(key, self._numbers[PREDICTION])


class StagedPatchCalls:
    """The calls of one rank of the stages of a patch.

    Args:
        table: `SiteTable` of the patches.
        patch_ranks, stage_ranks: who shares this call along each axis, and this one's places among them.
    """

    def __init__(self, table, plan, shares, patch_ranks, patch, stage_ranks, stage_rank, seconds):
        names = [unit.name for unit in plan.graph.units]
        self._inside, sites = {name: [] for name in (*names, None)}, table.plan.sites
        for i, site in enumerate(sites):
            holds = (n for n in names if site.name == n or site.name.startswith(f"{n}."))
            self._inside[next(holds, None)].append(i)
        mine = {names[i] for i in plan.program(stage_rank).computes}
        met = tuple(i for name, found in self._inside.items() if name in mine or name is None for i in found)
        self._sites = Sites(table, plan.config, patch_ranks, patch, tuple(sorted(met)))
        self._stages = StageCalls(plan, shares, stage_ranks, stage_rank, seconds, self._within)

    def call(self, step, exact=False):
        """Events of one call."""
        self._left, self._called = list(self._inside[None]), set()
        self._sites.exact = exact
        yield from self._stages.call(step, exact)
        yield from self._sites.result(step)

    def _within(self, name, seconds, key):
        # Sites between units come at the beginning of a call, a module's with its first call.
        sites, self._left = (self._left, []) if name is None else (self._inside[name], self._left)
        if name in self._called:
            sites = []
        if name is not None:
            self._called.add(name)
        yield from self._sites.run(key[1], seconds, sites)
