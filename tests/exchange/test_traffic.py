"""What really travels and is computed, counted at the transport and the dispatcher."""

import contextlib
import functools
import os

import pytest
import ranks
import tiny_pipelines
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import asyncdiff_fast
from asyncdiff_fast.environment import EXCHANGE_VARIABLE
from asyncdiff_fast.exchange.engine import Engine
from asyncdiff_fast.exchange.world import start_process_group, stop_process_group
from asyncdiff_fast.stages import plan as plan_of_stages
from asyncdiff_fast.stages import slots

WORLD_SIZE = 3
KINDS = ("engine", "torch")
CASES = {"sdxl": {"num_stages": 3}, "sd15": {"num_stages": 2, "stride": 2}, "flux": {"num_stages": 3}}
WARMUP_STEPS, STEPS = 2, 6
_COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "barrier")
_COLLECTIVES += ("broadcast", "broadcast_object_list", "gather", "reduce", "reduce_scatter", "scatter", "send", "recv")


@contextlib.contextmanager
def watched_transport(log):
    """Append (what, peer, bytes, address, tag) of every message handed to torch.distributed or the engine."""
    originals = {name: getattr(dist, name) for name in ("isend", "irecv", *_COLLECTIVES)}

    def watched(name, original):
        @functools.wraps(original)
        def call(*args, **kwargs):
            if name in ("isend", "irecv"):
                tensor, peer = args[:2]
                log.append((name, peer, tensor.numel() * tensor.element_size(), tensor.data_ptr(), kwargs["tag"]))
            else:
                log.append((name, None, 0, 0, 0))
            return original(*args, **kwargs)

        return call

    def post(engine, slot):
        for what, moves in (("isend", slot.sends), ("irecv", slot.recvs)):
            for x in moves:
                buffer = x.buffers[slot.epoch % slot.depth]
                log.append((what, x.peer, buffer.nbytes, buffer.data_ptr(), slot.tag))
        original_post(engine, slot)

    original_post, Engine.post = Engine.post, post
    for name, original in originals.items():
        setattr(dist, name, watched(name, original))
    try:
        yield
    finally:
        Engine.post = original_post
        for name, original in originals.items():
            setattr(dist, name, original)


def _sdpa_flops(q, k, v, *_, out_shape=None, **__):
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def counted_flops():
    """A counter that knows the attention kernel of the CPU as well."""
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops}
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _expected(plan, rank):
    """Messages of one asynchronous call of a rank: {("isend" or "irecv", peer, bytes): count}."""
    counts = {}
    for transfer in plan.transfers:
        values = plan.graph.values
        sizes = [ref.nbytes for ref in plan.outputs] if transfer.unit < 0 else [v.nbytes for v in values]
        for target, wanted in transfer.targets:
            for v in wanted:
                if transfer.source == rank:
                    key = ("isend", target, sizes[v])
                elif target == rank:
                    key = ("irecv", transfer.source, sizes[v])
                else:
                    continue
                counts[key] = counts.get(key, 0) + 1
    return counts


def _traffic(name, rank, options):
    """What one rank sent and computed in each call of two generations."""
    pipe = tiny_pipelines.build(name)
    denoiser = tiny_pipelines.denoiser(pipe)
    log, marks, flops, made = [], [], [], [0]
    counters = []

    def before(*_):
        marks.append(len(log))
        counters.append(counted_flops().__enter__())

    def after(*_):
        counters[-1].__exit__(None, None, None)
        flops.append(counters[-1].get_total_flops())

    # What is counted here are FLOPs alone.
    flops_per_byte, plan_of_stages.FLOPS_PER_BYTE = plan_of_stages.FLOPS_PER_BYTE, 0
    buffer_class = slots.Buffer

    def counted_buffer(*args):
        made[0] += 1
        return buffer_class(*args)

    runtime = asyncdiff_fast.patch(pipe, warmup_steps=WARMUP_STEPS, timeout_s=60, **{"predict": "none"} | options)
    handles = [denoiser.register_forward_pre_hook(before), denoiser.register_forward_hook(after)]
    slots.Buffer = counted_buffer
    buffers = []
    try:
        with watched_transport(log):
            for seed in (0, 1):
                tiny_pipelines.generate(pipe, name, seed=seed, steps=STEPS)
                buffers.append(made[0])
    finally:
        slots.Buffer, plan_of_stages.FLOPS_PER_BYTE = buffer_class, flops_per_byte
        for handle in handles:
            handle.remove()
    plan, stats = runtime.plan, runtime.stats()
    asyncdiff_fast.unpatch(pipe)
    calls = [log[a:b] for a, b in zip(marks, [*marks[1:], len(log)], strict=True)]
    counts = []
    for call in calls:
        found = {}
        for message in call:
            found[message[:3]] = found.get(message[:3], 0) + 1
        counts.append(found)
    addresses = {}
    for message in log:
        addresses.setdefault((message[0], message[4], message[1]), []).append(message[3])
    return {
        "calls": counts,
        "expected": _expected(plan, rank),
        "sent_bytes": sum(n for (source, _, _), n in plan.sent_bytes().items() if source == rank),
        "stats": stats,
        "flops": flops,
        "costs": plan.division.costs,
        "glue": plan.graph.glue_cost,
        "buffers": buffers,
        "addresses": addresses,
    }


def _everything(rank):
    found = {}
    start_process_group(30)
    for kind in KINDS:
        os.environ[EXCHANGE_VARIABLE] = kind
        found[kind] = {name: _traffic(name, rank, options) for name, options in CASES.items()}
    stop_process_group()
    return found


@functools.cache
def _results():
    return ranks.run(WORLD_SIZE, _everything, timeout=280)


def everything(kind):
    return [found[kind] for found in _results()]


def _async_calls(options):
    """Indices of the calls of two generations, by what they do."""
    later = range(WARMUP_STEPS, STEPS)
    computing = [k for k in later if options.get("stride", 1) == 1 or (k - WARMUP_STEPS) % 2 == 0]
    return [g * STEPS + k for g in (0, 1) for k in computing]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_exactly_the_plan_travels(name, kind):
    computing = _async_calls(CASES[name])
    for result in (rank[name] for rank in everything(kind)):
        assert len(result["calls"]) == 2 * STEPS
        for k, call in enumerate(result["calls"]):
            assert call == (result["expected"] if k in computing else {}), f"call {k}"
        sent = sum(n * size for (what, _, size), n in result["expected"].items() if what == "isend")
        assert sent == result["sent_bytes"]
        assert result["stats"]["sent_bytes"] == sent * len(computing)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_a_rank_computes_its_stage_and_the_glue(name, kind):
    computing = _async_calls(CASES[name])
    for r, result in enumerate(rank[name] for rank in everything(kind)):
        costs, glue, flops = result["costs"], result["glue"], result["flops"]
        total = sum(costs) + glue
        assert flops[1] == pytest.approx(total, rel=0.01), "an exact call computes everything"
        own = costs[min(r, len(costs) - 1)]
        for k in computing:
            assert 0.98 * own <= flops[k] <= 1.02 * (own + glue), f"call {k}"
        for k in set(range(STEPS)) - set(range(WARMUP_STEPS)) - set(computing):
            assert flops[k] == 0, "a repeated step computes nothing"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_buffers_are_made_once(name, kind):
    for result in (rank[name] for rank in everything(kind)):
        assert result["buffers"][0] == result["buffers"][1]
        for key, addresses in result["addresses"].items():
            tensors = sum(1 for (what, peer, _), n in result["expected"].items() for _ in range(n) if what == key[0])
            assert len(set(addresses)) <= 2 * tensors
        distinct = {a for addresses in result["addresses"].values() for a in addresses}
        assert len(distinct) <= 2 * result["buffers"][0]
