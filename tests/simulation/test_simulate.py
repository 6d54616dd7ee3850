"""Simulated pictures of every way to share: nobody waits for ever, bytes are the plan's, times are those of ideal links
and of slow ones.
"""

import time

import pytest
import torch
from bare import Bare

import asyncdiff_fast
from asyncdiff_fast.simulation.cluster import Cluster, Link
from asyncdiff_fast.simulation.simulate import simulate
from asyncdiff_fast.simulation.times import Times

IDEAL = Link(0.0, 1e9)
CALL_S = 0.1
WAYS = [
    dict(num_stages=2),
    dict(num_stages=3, predict="none", time_shift=True),
    dict(num_stages=2, stride=2),
    dict(num_stages=3, stride=2, stride_phase="odd", warmup_steps=1),
    dict(num_patches=2),
    dict(num_patches=4, group_norm="sync"),
    dict(num_patches=2, exchange="sync"),
    dict(num_patches=2, exchange="none", warmup_steps=0),
    dict(num_patches=2, num_stages=2),
    dict(cfg_parallel=True),
    dict(cfg_parallel=True, num_stages=2, stride=2),
    dict(cfg_parallel=True, num_patches=2),
    dict(parallel_steps=4),
    dict(parallel_steps=2, cfg_parallel=True),
    dict(parallel_steps=2, num_patches=2, exchange="sync"),
    dict(num_stages=2, pipeline_patches=4),
    dict(num_stages=2, pipeline_patches=2, shard_weights=True),
    dict(num_stages=2, pipeline_patches=1, parallel_steps=2),
    dict(num_stages=2, pipeline_patches=4, parallel_steps=2),
    dict(num_stages=2, parallel_steps=2),
    dict(num_patches=2, parallel_steps=2),
]


def _plan(**options):
    x = torch.zeros(2, 4, 16, 16)
    return asyncdiff_fast.plan(Bare(), {"x": x, "t": torch.tensor([500.0, 500.0])}, **options)


def _cluster(size, link=IDEAL):
    return Cluster(1, size, link, link)


def _size(plan):
    return (plan.patches if hasattr(plan, "stages") else plan).config.world_size


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_ranks_send_what_the_plan_says_and_take_their_share(options):
    plan = _plan(**options)
    found = simulate(plan, Times(CALL_S), _cluster(_size(plan)), 50)
    halves = 2 if options.get("cfg_parallel") else 1
    within = plan.each.bytes_per_call if options.get("parallel_steps") and plan.each else None
    # What halves tell each other the plan of one half leaves out.
    result = 2 * 4 * 4 * 16 * 16 * 2 // 2
    expected = halves * plan.bytes_per_call
    if hasattr(plan, "stages"):
        # Every rank of a patch's stages tells those beside it the result, which the plan counts once.
        expected += sum(plan.patches.sent_result_bytes(p) for p in range(2))
    if options.get("cfg_parallel") and "parallel_steps" not in options:
        expected += result * (_size(plan) // 2)
    if within is None and "stride" not in options and "parallel_steps" not in options:
        assert sum(found.sent_bytes) == pytest.approx(expected, rel=0.02)
    stride = options.get("stride", 1)
    stages = options.get("num_stages", 1)
    ideal = CALL_S / (_size(plan) // (stages + stride - 1) * stages * stride)
    assert ideal * 0.99 <= found.step_s <= CALL_S and found.exact_s <= CALL_S * 1.001
    assert found.picture_s <= found.alone_s * 1.001 and len(found.wait_s) == _size(plan)
    assert "x of one device" in str(found)


def test_a_step_of_stages_is_that_of_the_largest():
    plan = _plan(num_stages=2)
    largest, total = max(plan.division.costs), sum(plan.division.costs) + plan.graph.glue_cost
    found = simulate(plan, Times(CALL_S), _cluster(2), 50)
    assert found.step_s == pytest.approx(CALL_S * (largest + plan.graph.glue_cost) / total, rel=0.05)
    assert found.exact_s == pytest.approx(CALL_S)


def test_measured_units_count_for_more_than_counted_work():
    plan = _plan(num_stages=2)
    units = dict.fromkeys((u.key for u in plan.graph.units), 0.0)
    units[plan.graph.units[0].key] = CALL_S
    assert simulate(plan, Times(CALL_S, units), _cluster(2), 50).step_s == pytest.approx(CALL_S)


def test_blocks_are_as_long_as_errors_allow():
    plan = _plan(parallel_steps=4)
    whole, none = (simulate(plan, Times(CALL_S), _cluster(4), 50, error) for error in (0.0, 1.0))
    # A step that all ranks evaluate is exact within.
    shared = simulate(_plan(parallel_steps=2, num_stages=2), Times(CALL_S), _cluster(4), 50, error=1.0)
    assert shared.step_s == pytest.approx(CALL_S)
    assert whole.step_s == pytest.approx(CALL_S / 4) and none.step_s == pytest.approx(CALL_S)
    assert whole.picture_s == pytest.approx(plan.calls(50) * CALL_S)


def test_a_slow_link_is_waited_for():
    plan = _plan(num_patches=2, exchange="sync")
    slow = simulate(plan, Times(CALL_S), _cluster(2, Link(0.01, 1e9)), 50)
    exchanges = sum(site.exchanges for site in plan.sites) + 1
    assert slow.step_s == pytest.approx(CALL_S / 2 + 0.01 * exchanges, rel=0.02)


def test_a_cluster_needs_a_device_for_each_rank():
    with pytest.raises(ValueError, match=r"got 1 × 1 = 1 devices, the options take 2 ranks"):
        simulate(_plan(num_stages=2), Times(CALL_S), _cluster(1))


class ByToken(torch.nn.Module):
    """A denoiser in which no row reads another."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(8))

    def forward(self, x, t):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("num_stages, num_patches", [(2, 2), (2, 8), (4, 8)])
def test_stages_that_run_ahead_are_never_idle(num_stages, num_patches):
    options = dict(num_stages=num_stages, pipeline_patches=num_patches)
    net, inputs = ByToken(), {"x": torch.zeros(2, 16, 8), "t": torch.tensor([500.0, 500.0])}
    plans = [asyncdiff_fast.plan(net, inputs, **options, run_ahead=run_ahead) for run_ahead in (False, True)]
    drained, ahead = (simulate(plan, Times(CALL_S), _cluster(num_stages), 50) for plan in plans)
    assert [plan.micro_steps_per_call() for plan in plans] == [num_patches + num_stages - 1, num_patches]
    # A stage waits, before its next patch, for no more than the first calls of this.
    gain = (num_patches + num_stages - 1) / num_patches
    assert drained.step_s / ahead.step_s == pytest.approx(gain, rel=0.05)


def test_bytes_tell_no_times():
    plan = _plan(num_stages=2, pipeline_patches=2, shard_weights=True, balance="memory")
    with pytest.raises(ValueError, match="tell no times"):
        simulate(plan, Times(CALL_S), _cluster(2))


def test_a_thousand_ranks_take_seconds():
    x = torch.zeros(2, 4, 64, 8)
    inputs = {"x": x, "t": torch.tensor([500.0, 500.0])}
    options = dict(parallel_steps=64, cfg_parallel=True, num_patches=8, exchange="sync")
    plan = asyncdiff_fast.plan(Bare(), inputs, **options)
    assert _size(plan) == 1024
    began = time.process_time()
    found = simulate(plan, Times(CALL_S), Cluster(128, 8), 50)
    assert time.process_time() - began < 20 and found.speed_up > 100
