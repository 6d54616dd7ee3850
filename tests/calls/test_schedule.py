"""Every small schedule, played through over all ranks: who computes, what travels when, what is overwritten."""

import itertools

import pytest
from graphs import owned_graphs
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdiff_fast.calls import schedule
from asyncdiff_fast.calls.clock import Tick
from asyncdiff_fast.calls.schedule import Mode
from asyncdiff_fast.config import Config
from asyncdiff_fast.stages import cutset
from asyncdiff_fast.stages.buffers import DEPTH
from asyncdiff_fast.stages.division import describe

SMALL = list(itertools.product((2, 3, 4), (1, 2), (1, 2, 3, 4), (1, 2, 5, 8), ("warmup", "odd")))


@pytest.mark.parametrize(("num_stages", "stride", "warmup_steps", "steps", "phase"), SMALL)
def test_modes(num_stages, stride, warmup_steps, steps, phase):
    config = Config(num_stages=num_stages, stride=stride, warmup_steps=warmup_steps, stride_phase=phase)
    modes = [schedule.mode(config, step) for step in range(steps)]
    assert all(m is Mode.EXACT for m in modes[:warmup_steps])
    later = modes[warmup_steps:]
    if stride == 1:
        assert all(m is Mode.COMPUTE for m in later)
    else:
        assert all(a is not b for a, b in itertools.pairwise(later)), "computing and repeating alternate"
        if phase == "odd":
            assert all((m is Mode.COMPUTE) == bool(k % 2) for k, m in enumerate(modes) if k >= warmup_steps)
        elif later:
            assert later[0] is Mode.COMPUTE
    assert schedule.mode(config, steps, has_state=False) is Mode.EXACT


def test_what_is_read_is_of_the_same_ranks_last_step():
    """Without steps side by side that of the step before; with them as many steps old as there are of them at most."""
    for steps, oldest in ((1, 1), (2, 2), (4, 4)):
        config = Config(num_stages=2, parallel_steps=steps)
        ages = [age for age in range(9) if schedule.has_state(config, Tick(False, 10, 0), 10 - age)]
        assert ages == list(range(1, oldest + 1))
        assert not schedule.has_state(config, Tick(False, 10, 0, exact=True), 9)
        assert not schedule.has_state(config, Tick(False, 0, 0), -1)


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("time_shift", [False, True])
@pytest.mark.parametrize("steps", [6, 7, 8])
def test_timesteps(num_stages, time_shift, steps):
    """Source: the published rule. s = 1 with time_shift; stride 1: t[k - s]. Stride 2 at computing steps: stages take
    t[k + 1 - s], the extra rank and every rank at the last step t[k - s]."""
    s = int(time_shift)
    for stride in (1, 2):
        config = Config(num_stages=num_stages, stride=stride, warmup_steps=1, time_shift=time_shift, stride_phase="odd")
        for k in range(1, steps):
            if schedule.mode(config, k) is not Mode.COMPUTE:
                continue
            for rank in range(config.world_size):
                published = k - s if stride == 1 or rank == num_stages or k == steps - 1 else k + 1 - s
                assert k + schedule.timestep_offset(config, rank, k == steps - 1) == published


def test_one_stage_is_always_exact():
    assert all(schedule.mode(Config(num_stages=1), step) is Mode.EXACT for step in range(9))


class Rank:
    """One rank's exchange as `pass_slots.PassSlots` drives it, with sets in place of tensors."""

    def __init__(self, graph, division, config, ordered, rank):
        self.graph, self.config, self.ordered, self.rank = graph, config, ordered, rank
        self.program = cutset.rank_program(graph, division, config, ordered, rank)
        self.needs = cutset.needs(graph, division, config, rank)
        self.order = [
            n for n, t in enumerate(ordered) if t.source == rank or rank in {target for target, _ in t.targets}
        ]
        self.epoch, self.log, self.waited = 0, [], {}
        self.posted = dict.fromkeys(self.order, 0)

    def _receives(self):
        while self.cursor < len(self.order) and self.ordered[self.order[self.cursor]].source != self.rank:
            self._post(self.order[self.cursor])

    def _post(self, number):
        assert self.order[self.cursor] == number, "slots are posted in the frozen order"
        if self.ordered[number].source != self.rank and self.ordered[number].unit >= 0:
            # The receive overwrites the buffer of DEPTH epochs ago: its readers were in earlier calls.
            overwritten = self.posted[number] - DEPTH
            assert overwritten < self.epoch - 1, "a buffer is overwritten in the call that reads it"
        self.log.append(number)
        self.posted[number] += 1
        self.cursor += 1

    def call(self):
        """One asynchronous call."""
        self.cursor, arrived = 0, set()
        self._receives()
        for position in range(len(self.graph.units) + 1):
            for number in self.program.waits.get(position, ()):
                arrived.update(self._wait(number))
            for v, touch in self.needs.items():
                if touch == position:
                    assert v in arrived, "a value is touched before it was awaited"
            if position in self.program.computes and position in self.program.sends:
                self._post(self.program.sends[position])
                self._receives()
        for name, unit_rank in ((cutset.NEXT_PREDICTION, self.config.num_stages - 1), (cutset.PREDICTION, None)):
            source = self.config.world_size - 1 if unit_rank is None else unit_rank
            number = next((n for n in self.order if self.ordered[n].name == name), None)
            if number is not None and self.rank == source:
                self._post(number)
        self._receives()
        self.epoch += 1
        assert self.cursor == len(self.order), "every slot is posted once in every call"

    def _wait(self, number):
        lag = self.posted[number] - self.epoch
        assert 0 <= lag < DEPTH, "a value waited for must still be in its buffer"
        return [v for target, values in self.ordered[number].targets if target == self.rank for v in values]


@settings(max_examples=120, deadline=None)
@given(owned_graphs(max_stages=4), st.sampled_from([1, 2]))
def test_exchange_of_a_call(drawn, stride):
    graph, owner, num_stages = drawn
    config = Config(num_stages=num_stages, stride=stride)
    division = describe(graph, owner, num_stages)
    ordered = cutset.transfers(graph, division, config, 2)
    ranks = [Rank(graph, division, config, ordered, r) for r in range(config.world_size)]
    for _ in range(4):
        for rank in ranks:
            rank.call()
    for a, b in itertools.combinations(ranks, 2):
        shared = [
            n for n in a.order if {a.rank, b.rank} <= {ordered[n].source, *(target for target, _ in ordered[n].targets)}
        ]
        shared = [n for n in shared if ordered[n].source in (a.rank, b.rank)]
        assert [n for n in a.log if n in shared] == [n for n in b.log if n in shared], "both post in the same order"
    computed = [rank.program.computes for rank in ranks[:num_stages]]
    assert sorted(itertools.chain(*computed)) == list(range(len(graph.units))), "each unit is computed once"
    assert all(rank.program.computes == computed[-1] for rank in ranks[num_stages:])


@settings(max_examples=120, deadline=None)
@given(owned_graphs(max_stages=4), st.sampled_from([1, 2]))
def test_everything_read_is_sent_and_nothing_else(drawn, stride):
    graph, owner, num_stages = drawn
    config = Config(num_stages=num_stages, stride=stride)
    division = describe(graph, owner, num_stages)
    ordered = cutset.transfers(graph, division, config, 2)
    sent = {(target, v) for t in ordered if t.unit >= 0 for target, values in t.targets for v in values}
    read = set()
    for rank in range(config.world_size):
        stage = min(rank, num_stages - 1)
        reads = [u.reads for u, o in zip(graph.units, division.owner, strict=True) if o == stage]
        reads += [graph.output_reads] * (stage == num_stages - 1)
        read |= {(rank, v) for r in reads for v in r if division.owner[graph.values[v].unit] != stage}
    assert sent == read
    predictions = {t.name: t for t in ordered if t.unit < 0}
    for name, source in ((cutset.PREDICTION, config.world_size - 1), (cutset.NEXT_PREDICTION, num_stages - 1)):
        if name == cutset.NEXT_PREDICTION and stride == 1:
            assert name not in predictions
            continue
        assert predictions[name].source == source
        assert {source, *(target for target, _ in predictions[name].targets)} == set(range(config.world_size))
    sizes = cutset.bytes_per_call(graph, ordered, [10, 3])
    cut = sum(n for (_, _, name), n in sizes.items() if name.startswith("u"))
    extra = sum(graph.values[v].nbytes for rank, v in read if rank >= num_stages)
    assert cut - extra == division.cut_bytes
