"""The pure parts: rows, the order of messages, options that are refused."""

import itertools

import pytest
import torch
from bare import Bare

import asyncdiff_fast
from asyncdiff_fast.pipelined.order import in_order, later_transfers, rows_of
from asyncdiff_fast.stages.cutset import PREDICTION, Transfer


def transfers(num_stages, skip):
    """Those of one micro-step: each stage to the next one, perhaps the first to the last, the prediction to all."""
    last = num_stages - 1
    found = [Transfer(f"cut {s}", s, s, ((s + 1, (s,)),)) for s in range(last)]
    if skip and num_stages > 2:
        found.insert(1, Transfer("skip", 10, 0, ((last, (10,)),)))
    return (*found, Transfer(PREDICTION, -1, last, tuple((r, (0,)) for r in range(last))))


def play(num_stages, count, skip):
    """Micro-steps until all ranks have all results.

    A message travels once it is the first that is left in its source's queue and in its target's; a rank begins a
    micro-step when all that it reads has come, and queues what it sends at the end of it.
    """
    steps = [transfers(num_stages, skip)] * count
    order, ranks = in_order(steps), range(num_stages)
    mine = {r: [x for x in order if r == _of(steps, x).source or r in dict(_of(steps, x).targets)] for r in ranks}
    queued, arrived, done, time = {r: 0 for r in ranks}, set(), {r: 0 for r in ranks}, 0
    sent = {r: list(mine[r]) for r in ranks}
    while any(sent.values()):
        time += 1
        assert time <= 4 * (count + num_stages), "ranks wait for each other"
        working = []
        for r in ranks:
            reads = {(done[r], n) for n, t in enumerate(steps[0]) if t.unit >= 0 and r in dict(t.targets)}
            if done[r] < count and reads <= arrived:
                working.append(r)
        for r in working:
            done[r] += 1
        for r in ranks:
            while queued[r] < len(mine[r]):
                x = mine[r][queued[r]]
                if _of(steps, x).source == r and done[r] <= x[0]:
                    break
                queued[r] += 1
        moved = True
        while moved:
            moved = False
            for x in order:
                ends = [_of(steps, x).source, *dict(_of(steps, x).targets)]
                ready = all(sent[r] and sent[r][0] == x and len(mine[r]) - len(sent[r]) < queued[r] for r in ends)
                if ready:
                    moved = True
                    arrived.add(x)
                    for r in ends:
                        sent[r].pop(0)
    return time


def _of(steps, place):
    return steps[place[0]][place[1]]


@pytest.mark.parametrize("skip", [False, True])
def test_no_rank_waits_for_another_longer_than_it_must(skip):
    for num_stages, count in itertools.product(range(2, 6), range(1, 7)):
        assert play(num_stages, count, skip) == num_stages + count - 1


def test_every_message_is_there_once():
    for num_stages, count in itertools.product(range(2, 5), range(1, 5)):
        steps = [transfers(num_stages, True)] * count
        assert sorted(in_order(steps)) == [(p, n) for p in range(count) for n in range(len(steps[0]))]


def test_text_travels_with_the_first_patch_only():
    given = (Transfer("block", 0, 0, ((1, (0, 1)), (2, (1,)))), Transfer(PREDICTION, -1, 2, ((0, (0,)), (1, (0,)))))
    kept = later_transfers(given, frozenset({1}), "stage")
    assert kept == (Transfer("block", 0, 0, ((1, (0,)),)), given[1])
    assert later_transfers(given, frozenset({0, 1}), "unit") == given[1:]
    assert later_transfers(given, frozenset({1}), "patch") == given


def test_rows_begin_at_coarse_rows():
    for size, factor in itertools.product(range(1, 40), (1, 2, 8)):
        for count in range(1, -(-size // factor) + 1):
            held = rows_of(count, size, factor).held
            assert held[0][0] == 0 and held[-1][1] == size and len(held) == count
            assert all(start % factor == 0 and start < stop for start, stop in held)
    assert rows_of((6, 6, 4), 16, 2).held == ((0, 6), (6, 12), (12, 16))


@pytest.mark.parametrize(
    "wanted, words",
    [(9, ("got pipeline_patches=9", "at most 8")), ((6, 6), ("[6, 6]", "16 rows")), ((5, 11), ("[5, 11]",))],
)
def test_rows_that_do_not_fit_are_refused(wanted, words):
    with pytest.raises(ValueError, match="pipeline_patches") as error:
        rows_of(wanted, 16, 2)
    assert all(word in str(error.value) for word in words)


REFUSED = [
    (dict(pipeline_patches=2), "need stages to pass through"),
    (dict(pipeline_patches=0, num_stages=2), "an integer of at least 1"),
    (dict(pipeline_patches=True, num_stages=2), "an integer of at least 1"),
    (dict(pipeline_patches="2", num_stages=2), "an integer of at least 1"),
    (dict(pipeline_patches=[4, 0], num_stages=2), "an integer of at least 1"),
    (dict(pipeline_patches=2, num_stages=2, stride=2), "stride=1 only"),
    (dict(pipeline_patches=2, num_stages=2, num_patches=2), "num_patches=1 only"),
    (dict(pipeline_patches=2, num_stages=2, parallel_steps=2, predict="linear"), "predict='none' only"),
    (dict(pipeline_patches=2, num_stages=2, parallel_steps=2, run_ahead=True), "leave parallel_steps out"),
    (dict(pipeline_patches=2, num_stages=2, group_norm="sync"), "'corrected' or 'stale' or 'local' only"),
    (dict(pipeline_patches=2, num_stages=2, exchange="none"), "exchange='displaced' only"),
    (dict(pipeline_patches=2, num_stages=2, time_shift=True), "time_shift=False only"),
    (dict(pipeline_patches=2, num_stages=2, warmup_steps="auto"), "warmup_steps"),
    (dict(pipeline_patches=2, num_stages=2, pipeline_text="first"), "pipeline_text must be"),
    (dict(num_stages=2, shard_weights=True), "pass pipeline_patches as well"),
    (dict(num_stages=2, pipeline_patches=1, balance="memory"), "pass shard_weights=True"),
    (dict(num_stages=3, pipeline_patches=2, run_ahead=True), "pass pipeline_patches=3 or more"),
    (dict(num_stages=2, pipeline_patches=1, run_ahead=True), "pass pipeline_patches=2 or more"),
    (dict(run_ahead=True), "got run_ahead=True, pipeline_patches=None"),
    (dict(num_stages=2, pipeline_patches=2, run_ahead=True, predict="linear"), "leave predict out"),
    (dict(num_stages=2, pipeline_patches=2, run_ahead=True, cfg_parallel=True), "leave cfg_parallel out"),
    (dict(run_ahead=1), "run_ahead must be True or False"),
    (dict(shard_weights=1), "shard_weights must be True or False"),
]


@pytest.mark.parametrize("options, words", REFUSED)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(ValueError) as error:
        asyncdiff_fast.Config.from_options(options)
    assert words in str(error.value)


def test_what_mixes_rows_of_the_latent_cannot_run_ahead():
    inputs = {"x": torch.zeros(2, 4, 16, 16), "t": torch.tensor([500.0, 500.0])}
    with pytest.raises(ValueError, match=r"not known yet: got blocks.0 \(convolution\); pass run_ahead=False"):
        asyncdiff_fast.plan(Bare(), inputs, num_stages=2, pipeline_patches=2, run_ahead=True)


@pytest.mark.parametrize("balance", ["flops", "memory"])
def test_weights_are_divided_evenly_where_that_is_asked_for(balance):
    # Between the first block and the rest no work differs; the first one's weights are half of all.
    model = Uneven()
    options = dict(num_stages=2, pipeline_patches=1, shard_weights=True)
    plan = asyncdiff_fast.plan(model, dict(x=torch.zeros(1, 4, 8, 8), t=1.0), balance=balance, **options)
    largest = max(plan.weight_bytes[:2]) / sum(plan.weight_bytes[:2])
    assert (largest < 0.65) == (balance == "memory"), plan.weight_bytes


class Uneven(torch.nn.Module):
    """A few blocks of equal work, the first with a table of weights that it looks into."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(rows) for rows in (190, 1, 1, 1, 1, 1))

    def forward(self, x, t):
        for block in self.blocks:
            x = block(x)
        return x * t


class Block(torch.nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.table, self.conv = torch.nn.Embedding(rows, 4), torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x) + self.table.weight[:1].view(1, 4, 1, 1)
