"""Nothing grows: not by generations, not by patching and unpatching in turns."""

import gc
import os
import time

import pytest
import ranks
import torch.distributed as dist
from bare import Bare, loop
from sequences import quick

import asyncdiff_fast
from asyncdiff_fast.environment import EXCHANGE_VARIABLE

KINDS = {
    "stages": (2, dict(num_stages=2)),
    "patches": (2, dict(num_patches=2)),
    "both": (4, dict(num_stages=2, num_patches=2)),
}
# What may come late, once: a thread pool, say.
ONCE = 3
# What goes late, as the connections of the last turn where cores are busy, may take so long.
LATE_S = 10


def _used():
    """Descriptors, threads, mapped inboxes and process groups of this process."""
    with open("/proc/self/maps") as maps:
        inboxes = sum("asyncdiff_fast" in line and "memfd" in line for line in maps)
    groups = len(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else 0
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), inboxes, groups


def _resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _turns(rank, options, exchange, turns, generations, collects):
    """What is used after the third turn and after the last one; unless it `collects`, without a garbage collection."""
    os.environ[EXCHANGE_VARIABLE] = exchange
    model, seen = Bare(), []
    if not collects:
        gc.collect()
        gc.disable()
    for turn in range(turns):
        asyncdiff_fast.patch(model, warmup_steps=2, timeout_s=30, **options)
        for _ in range(generations):
            loop(model, size=16)
        asyncdiff_fast.unpatch(model)
        if turn in (2, turns - 1):
            seen.append((_used_at_rest(seen[0][0] if seen else None), _resident_bytes()))
    return seen


def _steady(before, after):
    return all(b - a <= ONCE for a, b in zip(before, after, strict=True))


def _used_at_rest(before):
    """`_used`, once it is no more than `before`, or the time is over."""
    end = time.monotonic() + LATE_S
    while before is not None and not _steady(before, _used()) and time.monotonic() < end:
        time.sleep(0.05)
    return _used()


def _assert_steady(by_rank, most_bytes):
    for (before, bytes_before), (after, bytes_after) in by_rank:
        assert _steady(before, after), f"{before} became {after}"
        assert bytes_after - bytes_before < most_bytes, f"{(bytes_after - bytes_before) / 1e6:.1f} MB more"


@pytest.mark.parametrize("exchange", ["", "torch"])
@pytest.mark.parametrize("kind", ["patches"])
def test_turns_of_patch_and_unpatch_leave_nothing(kind, exchange):
    size, options = KINDS[kind]
    _assert_steady(ranks.run(size, _turns, options, exchange, 15, 1, False), 32 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind, exchange", quick([(k, e) for k in KINDS for e in ("", "torch")], ("both", "")))
def test_a_hundred_turns_leave_nothing(kind, exchange):
    size, options = KINDS[kind]
    _assert_steady(ranks.run(size, _turns, options, exchange, 100, 2, True), 32 << 20)


def _generations(rank, options, number):
    model, seen = Bare(), []
    asyncdiff_fast.patch(model, warmup_steps=2, timeout_s=30, **options)
    for i in range(number):
        loop(model, size=16)
        if i in (20, number - 1):
            seen.append((_used(), _resident_bytes()))
    asyncdiff_fast.unpatch(model)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", quick([(k,) for k in KINDS], ("both",)))
def test_two_hundred_generations_leave_nothing(kind):
    size, options = KINDS[kind]
    _assert_steady(ranks.run(size, _generations, options, 200), 4 << 20)
