"""What one rank shares with others along each axis of the mesh: steps, halves, patches, stages; their exchanges."""

import contextlib

from .exchange.choice import open_exchange
from .exchange.engine import described
from .exchange.errors import ExchangeError
from .halves.calls import Halves
from .modules import own
from .patches.calls import Patches
from .patches.plan import MeshPlan
from .pipelined.calls import PipelineCalls
from .pipelined.shards import Shards
from .stages.calls import StageCalls


class Parts:
    """`steps`, `halves`, `patches` and `stages` of one denoiser, None where the mesh has a single rank along that axis;
    `pipeline` in place of stages where patches pass through them.

    Iterates over those that are there. Collective to make.

    Args:
        shared: `Shared`, what they have in common.
        world: all ranks of the mesh.
        device: where the tensors lie that travel.
        steps: `StepCalls` of all denoisers of the pipeline; the first of them opens and closes its exchange.
    """

    def __init__(self, shared, world, device, steps=None):
        self._shared, self._world = shared, world
        self._worlds = {axis: world.along(self.along(axis)) for axis in ("half", "patch", "stage")}
        # They outlive exchanges: what was let go does not come back with a new one.
        self.shards = Shards(own(shared.denoiser), self._worlds["stage"]) if shared.config.shard_weights else None
        self.device, self.steps, self._has_opened_steps = device, steps, False
        self.halves = self.patches = self.stages = self.pipeline = None
        try:
            self._open()
        except BaseException as error:
            with contextlib.suppress(ExchangeError):
                self.close(described(error))
            raise

    def __iter__(self):
        steps = self.steps if self._has_opened_steps else None
        return (part for part in (self.halves, self.patches, self.stages, self.pipeline, steps) if part)

    def along(self, axis):
        """torch.distributed ranks that differ from this one in one axis of the mesh."""
        return [self._world.ranks[r] for r in self._shared.config.mesh.along(axis, self._world.rank)]

    @property
    def is_sharded(self):
        """True if this rank holds a part of the weights only."""
        return self.shards is not None and not self.shards.complete

    @property
    def plan(self):
        """The latest plan, None before the first call: of steps, stages or patches, or both in a `MeshPlan`."""
        patches, stages, pipeline = (x and x.plan for x in (self.patches, self.stages, self.pipeline))
        each = MeshPlan(patches, stages) if patches and stages else patches or stages or pipeline
        return each if self.steps is None else self.steps.plan(each)

    @property
    def exchange_kind(self):
        """How slots travel: "nccl", "shm" or "torch.distributed"; None on one device."""
        return next((part.exchange.kind for part in self), None)

    def drop_begun(self):
        """A call of which a part is done will not come. Collective if there is one."""
        if self.pipeline is not None:
            self.pipeline.drop_begun()

    def stats(self):
        """Dict: the sums of what the exchanges count, and the latest errors of predictions."""
        prediction = {}
        for part in filter(None, (self.patches, self.stages, self.pipeline)):
            prediction |= part.errors()
        found = [part.exchange.stats() for part in self]
        waits = {name: wait for s in found for name, wait in s["wait_s_by_slot"].items()}
        names = [name for name, number in found[0].items() if not isinstance(number, dict)] if found else []
        sums = {n: sum(s[n] for s in found) for n in names}
        steps = {} if self.steps is None else {"steps": self.steps.stats()}
        if self.pipeline is not None:
            steps |= self.pipeline.counts()
        return {"prediction": prediction} | steps | sums | ({"wait_s_by_slot": waits} if found else {})

    def restart(self, why=None):
        """Begin again with new exchanges; after an exception inside a call (`why`), messages are left half-way."""
        self.close(why)
        self._open()

    def close(self, why=None):
        """Drop all plans and buffers, and close the exchanges; with `why` they are stopped on all ranks."""
        failures = []
        try:
            if not why:
                self.drop_begun()
        except ExchangeError as error:
            failures.append(error)
            why = described(error)
        parts, self.halves, self.patches, self.stages, self.pipeline = list(self), None, None, None, None
        # Patches know of the choice as well: buffers of theirs must not wait for a garbage collection.
        self._has_opened_steps, self._shared.choice.patches = False, None
        exchanges = [part.exchange for part in parts]
        # The last one's hooks lie on top.
        for part, exchange in reversed(list(zip(parts, exchanges, strict=True))):
            if why:
                exchange.abort(why)
            part.forget(released=True)
        for exchange in exchanges:
            try:
                exchange.close()
            except ExchangeError as error:
                failures.append(error)
                # Nobody need be waited for twice.
                for other in exchanges:
                    other.abort(str(error))
        if failures:
            raise failures[0]

    def _open(self):
        halves, rows, stages = self._worlds.values()
        if self.steps is not None and self.steps.exchange is None:
            self.steps.open(open_exchange(self.steps.world, self.device))
            self._has_opened_steps = True
        self.halves = self._made(Halves, halves)
        self.patches = self._shared.choice.patches = self._made(Patches, rows)
        if self._shared.config.pipelined:
            self.pipeline = self._made(PipelineCalls, stages, self.shards)
        else:
            self.stages = self._made(StageCalls, stages)

    def _made(self, kind, world, *more):
        return kind(self._shared, world, open_exchange(world, self.device), *more) if world.size > 1 else None
