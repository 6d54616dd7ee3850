"""Traces as data: which times are steps, where they go, what is under way; clocks; a GPU's trace written by hand."""

import threading

import pytest
import torch

from asyncdiff_fast.profiling import account, chrome, clocks, events, table, words
from asyncdiff_fast.profiling.events import Range, RankTrace
from asyncdiff_fast.profiling.intervals import common, total, union, without
from asyncdiff_fast.profiling.turns import steady, turns


def test_sets_of_times():
    first, second = union([(5, 7), (0, 2), (1, 3), (9, 9)]), [(2, 6)]
    assert first == [(0, 3), (5, 7)]
    assert common(first, second) == [(2, 3), (5, 6)]
    assert without(first, second) == [(0, 2), (6, 7)] and without(second, first) == [(3, 5)]
    assert total(first) == 5


def test_names_of_ranges_come_back():
    name = words.text(words.POST, 'a|b "c"', phase="call 0, plan 1", to="1:8,2:8")
    assert words.parsed(name) == ("post", "a/b 'c'", {"phase": "call 0, plan 1", "to": "1:8,2:8"})
    assert words.parsed("aten::mm") is None and '"' not in name


def _generation(at, lengths, marks=()):
    """Ranges of one generation: of each step a call and a sampler's step, with 2 µs between steps."""
    found = []
    for number, length in enumerate(lengths):
        found += [Range(words.CALL, "", at, at + length - 2), Range(words.SAMPLER, "", at + length - 1, at + length)]
        found += [Range(kind, "", at + 1, at + 1, facts) for step, kind, facts in marks if step == number]
        at += length + 2
    return found


def test_steps_follow_each_other_and_generations_do_not():
    ranges = [*_generation(0, [10, 10]), *_generation(1000, [10], [(0, words.STALE, {})])]
    found = turns(RankTrace(0, tuple(ranges), ()))
    assert [(t.begin, t.end, t.stale) for t in found] == [(0, 10, False), (10, 22, False), (1000, 1010, True)]
    assert steady(found) == found[2:] and steady(found[:2]) == found[1:2]


def test_a_block_is_one_turn():
    ranges = _generation(0, [10] * 4, [(1, words.BLOCK, {"n": "2"})])
    assert [t.steps for t in turns(RankTrace(0, tuple(ranges), ()))] == [1, 2, 1]


def test_without_a_sampler_calls_are_steps():
    ranges = [r for r in _generation(0, [10, 10]) if r.kind == words.CALL]
    assert len(turns(RankTrace(0, tuple(ranges), ()))) == 2
    assert account.account([RankTrace(0, (), ())]) is None
    assert "patch(pipe)" in table.text(None)


def _exchange(rank, kind, begin, end, **facts):
    facts = {"phase": "p", "epoch": "3"} | facts
    return RankTrace(rank, (Range(kind, "slot", begin, end, facts),), ())


def test_bytes_are_under_way_until_they_are_awaited():
    sent = _exchange(0, words.POST, 10, 11, to="1:8,2:8,1:4")
    awaited = _exchange(1, words.WAIT, 15, 20, peers="0,2")
    late = RankTrace(
        0, (*sent.ranges, Range(words.POST, "slot", 50, 51, {"phase": "p", "epoch": "4", "to": "2:8"})), ()
    )
    found = account.messages([late, awaited])
    assert [(m.target, m.nbytes, m.begin, m.end, m.awaited) for m in found] == [
        (1, 12, 10, 20, True),
        (2, 8, 10, 50, False),
    ]


def _on_gpu():
    """What torch's profiler writes on CUDA, of two steps: compute, a stall in NCCL after a wait for a slot, compute."""
    made, correlation = [], 0

    def host(name, begin, dur, cat="user_annotation", **args):
        made.append({"ph": "X", "cat": cat, "name": name, "pid": 7, "tid": 7, "ts": begin, "dur": dur, "args": args})

    def kernel(name, launched, begin, dur):
        nonlocal correlation
        correlation += 1
        host("cudaLaunchKernel", launched, 1, "cuda_runtime", correlation=correlation)
        tid = 20 if "nccl" in name else 7
        made.append(
            {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": tid, "ts": begin, "dur": dur,
             "args": {"correlation": correlation}}
        )  # fmt: skip

    for at in (0, 100):
        host(words.text(words.CALL, "UNet"), at, 30)
        kernel("gemm", at + 2, at + 5, 20)
        kernel("ncclDevKernel_SendRecv", at + 3, at + 10, 55)
        host(words.text(words.WAIT, "mid_block", phase="p", epoch=1, peers="1"), at + 6, 1)
        host(words.text(words.STALE), at + 9, 0)
        kernel("conv", at + 10, at + 70, 25)
        host(words.text(words.SAMPLER, "DDIM"), at + 97, 3)
    made.append({"ph": "s", "cat": "ac2g", "name": "ac2g", "id": 1, "pid": 7, "tid": 7, "ts": 2})
    made.append({"ph": "f", "cat": "ac2g", "name": "ac2g", "id": 1, "pid": 0, "tid": 7, "ts": 5})
    return events.slim({"baseTimeNanoseconds": 10**18, "traceEvents": made})


def test_a_gpu_waits_where_nothing_is_computed_beside_nccl():
    slim = _on_gpu()
    found = account.account([events.read(0, slim, 10**18)])
    rank = found["ranks"][0]
    assert found["measured"] == "the device" and rank["steps"] == 2
    # Of 100 µs: 20 + 25 computed, 25 to 65 in NCCL alone.
    assert rank["compute_ms"] == pytest.approx(0.045) and rank["wait_ms"] == pytest.approx(0.040)
    assert rank["host_ms"] == pytest.approx(0.015)
    assert [(w["slot"], w["peers"], w["waits"]) for w in found["largest_waits"]] == [("mid_block", "1", 2)]
    trace = chrome.chrome([slim], 10**18, [], {})["traceEvents"]
    assert {e["args"]["name"] for e in trace if e["name"] == "process_name"} == {"rank 0, host", "rank 0, device 0"}
    assert [(e["ph"], e["pid"], e["id"]) for e in trace if e.get("cat") == "ac2g"] == [("s", 0, "0.1"), ("f", 1, "0.1")]


def test_clocks_of_two_hosts_are_brought_together():
    store, ahead = torch.distributed.HashStore(), 5_000_000_000

    def slow():
        return clocks.time.time_ns() - ahead

    asked = threading.Thread(target=clocks.answer, args=(store, 1, 20))
    asked.start()
    offset = clocks.ask(store, 1, 20, now=slow)
    asked.join()
    # Off by half of the quickest round.
    assert abs(offset - ahead) < 50_000_000


def _ranks(*shares):
    """The summary of an account: (share waited, share of the host) of each rank."""
    times = {"step_ms": 10.0, "compute_ms": 5.0, "wait_ms": 1.0, "host_ms": 1.0, "steps": 4}
    ranks = [{"rank": r, **times, "wait_share": w, "host_share": h} for r, (w, h) in enumerate(shares)]
    return {"measured": "the host", "steps": "exact", "ranks": ranks, "imbalance": 0.0, "largest_waits": []}


def test_the_table_says_what_to_do():
    """What it says of one rank and of several; calls are captured in no mode that shares them."""
    assert "\nRank 1 waits, others do not" in table.text(_ranks((0, 0), (0.5, 0)))
    assert "\nRanks 0, 2 wait, others do not" in table.text(_ranks((0.5, 0), (0, 0), (0.5, 0)))
    assert "\nAll ranks wait" in table.text(_ranks((0.5, 0), (0.5, 0)))
    slow = table.text(_ranks((0, 0.5), (0, 0)))
    assert "\nThe host is slow" in slow and "neither stages nor patches" in slow
