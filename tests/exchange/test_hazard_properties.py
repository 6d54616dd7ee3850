"""Random legal schedules on the double: no race, no deadlock, and every read finds its own epoch."""

import random
from dataclasses import dataclass

import building
from channels import connect, verdict
from double import Double
from hypothesis import given, settings
from hypothesis import strategies as st

STEPS = 5


@dataclass(frozen=True)
class SlotPlan:
    """A slot of all ranks: `routes` are (source, target) pairs; a source sends the same to all its targets."""

    name: str
    depth: int
    routes: tuple[tuple[int, int], ...]
    nbytes: int

    def sends(self, rank):
        return [target for source, target in self.routes if source == rank]

    def recvs(self, rank):
        return [source for source, target in self.routes if target == rank]


@dataclass(frozen=True)
class Plan:
    """A schedule: slots in their frozen order; the seed decides the rest."""

    size: int
    slots: tuple[SlotPlan, ...]
    enquiries: int
    puts: bool
    seed: int


@st.composite
def plans(draw):
    size = draw(st.integers(2, 4))
    pairs = [(a, b) for a in range(size) for b in range(size) if a != b]
    slots = tuple(
        SlotPlan(
            name=f"slot{i}",
            depth=draw(st.integers(1, 3)),
            routes=tuple(sorted(draw(st.sets(st.sampled_from(pairs), min_size=1)))),
            nbytes=draw(st.sampled_from([1, 16, 64])),
        )
        for i in range(draw(st.integers(1, 4)))
    )
    return Plan(size, slots, draw(st.sampled_from([0, 0, 2])), draw(st.booleans()), draw(st.integers(0, 10**6)))


def _steps(rank, slots, chance):
    """What one rank does, a piece at a time; between the pieces other ranks may go on.

    Reads of any epoch that is still in its buffer are put anywhere; with one buffer, one comes before the next post.
    """
    for step in range(STEPS):
        for plan, slot in slots:
            for _, other in chance.sample(slots, chance.randint(0, len(slots))):
                if other.recv:
                    yield from _read(rank, other, chance.randrange(other.depth))
            if step and plan.depth == 1 and slot.recv:
                yield from _read(rank, slot, 0)
            if slot.send:
                rank.acquire(slot)
                yield
                rank.produce(slot)
                yield
            rank.post(slot)
            yield


def _read(rank, slot, lag):
    rank.wait(slot, lag)
    yield
    rank.consume(slot, lag)
    yield


def _interleave(programs, chance):
    """Run generators to their ends, by turns that chance decides."""
    while programs:
        program = chance.choice(programs)
        for _ in range(chance.randint(1, 8)):
            if next(program, program) is program:
                programs.remove(program)
                break


def _finish(ranks, sides):
    """Host and devices read the last epoch, each in its own way."""
    for rank, slots in zip(ranks, sides, strict=True):
        for plan, slot in slots:
            if slot.recv and plan.depth > 1:
                rank.channel.drain([slot.number])
                rank.gpu.host(rank.rank, "look", reads=rank.expected(slot))
            elif slot.recv:
                rank.wait(slot)
                rank.consume(slot)


def _run(plan, delay_us, edge=-1):
    """(stuck, races, wrong reads, misuses) of a plan, with an edge left out."""
    path, extension = building.load()
    chance = random.Random(plan.seed)
    with Double(path, delay_us, plan.seed, plan.enquiries) as gpu:
        ranks = connect(gpu, extension, plan.size, puts=plan.puts)
        extension.drop_edge(edge)
        try:
            sides = [[] for _ in ranks]
            for rank, side in zip(ranks, sides, strict=True):
                for slot in plan.slots:
                    sends, recvs = slot.sends(rank.rank), slot.recvs(rank.rank)
                    if sends or recvs:
                        side.append((slot, rank.slot(slot.name, sends, recvs, slot.nbytes, slot.depth)))
                rank.freeze(*(slot for _, slot in side))
            _interleave([_steps(*pair, chance) for pair in zip(ranks, sides, strict=True)], chance)
            _finish(ranks, sides)
            return *verdict(gpu, ranks), gpu.misuses()
        finally:
            extension.drop_edge(-1)
            for rank in ranks:
                rank.channel.abort("over")
                rank.channel.close()


@settings(max_examples=building.repeats(300, 40), deadline=None)
@given(plan=plans(), delay_us=st.sampled_from([0, 0, 200]))
def test_legal_schedules_are_clean(plan, delay_us):
    assert _run(plan, delay_us) == ([], [], [], [])


@settings(max_examples=building.repeats(100, 20), deadline=None)
@given(plan=plans(), edge=st.deferred(lambda: st.integers(0, len(building.load()[1].edges()) - 1)))
def test_the_report_does_not_depend_on_the_timing(plan, edge):
    (stuck, races, *_), (stuck_late, races_late, *_) = _run(plan, 0, edge), _run(plan, 200, edge)
    assert stuck == stuck_late == []
    assert races == races_late
