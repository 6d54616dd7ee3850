"""The part of bench_exchange.py that needs a GPU: two ranks on one, told apart as if each had a host of its own.

What such ranks send goes through sockets, and the two take turns on the GPU: the host's time is what counts, and what
an exchange beside it does to a computation is an upper bound. Never a figure of two GPUs.
"""

import os
import statistics
import time

import both_ways
import torch

# Fewer than the engine lets a host run ahead of its device: none of them waits for the device.
BURST = 4
BURSTS = 50
SMALL = 64
SIZES = (1 << 20, 16 << 20)
MATRIX, PRODUCTS = 4096, 20


def rank_rows(options):
    """Rows of both ways; on rank 0, else None."""
    # Both ranks on the first GPU, which NCCL allows to hosts of different names only.
    os.environ |= {"NCCL_HOSTID": f"rank{os.environ['RANK']}", "NCCL_SOCKET_IFNAME": "lo", "LOCAL_RANK": "0"}
    with both_ways.opened("cuda") as (world, ways):
        row = {"part": "gpu", "bytes": SMALL, "calls": BURST * BURSTS * options.rounds}
        for way, exchange in ways.items():
            row |= {f"{way}_{name}": us for name, us in host_us(options, world, exchange).items()}
        rows = [row] + [overlap_row(options, world, ways, size) for size in SIZES]
    return rows if world.rank == 0 else None


def slot_of(world, exchange, size):
    """A slot that goes both ways, after its first exchange, which connects."""
    slot = both_ways.slot_of(world, exchange, size, "cuda")
    exchange.post(slot)
    exchange.wait(slot)
    exchange.drain()
    return slot


def host_us(options, world, exchange):
    """Median host time of a post, and of acquire, post and wait, over bursts that find the device idle."""
    slot = slot_of(world, exchange, SMALL)

    def cycle():
        exchange.acquire(slot)
        exchange.post(slot)
        exchange.wait(slot)

    found = {}
    for name, action in (("post_us", lambda: exchange.post(slot)), ("cycle_us", cycle)):
        times = []
        for _ in range(BURSTS * options.rounds):
            exchange.drain()
            world.gather(None, "a burst")
            began = time.perf_counter()
            for _ in range(BURST):
                action()
            times.append((time.perf_counter() - began) / BURST)
        found[name] = 1e6 * statistics.median(times)
    return found


def overlap_row(options, world, ways, size):
    """Time of a loop of products alone and beside one exchange, and of that exchange alone, in turns."""
    left, right = (torch.randn(MATRIX, MATRIX, dtype=torch.float16, device="cuda") for _ in range(2))
    out = torch.empty_like(left)

    def products():
        for _ in range(PRODUCTS):
            torch.mm(left, right, out=out)

    slots = {way: slot_of(world, exchange, size) for way, exchange in ways.items()}
    found = {"alone_ms": []} | {f"{way}_{name}_ms": [] for way in ways for name in ("exchange", "beside")}
    for _ in range(options.rounds + 1):
        found["alone_ms"].append(timed_ms(world, products))
        for way, exchange in ways.items():
            found[f"{way}_exchange_ms"].append(timed_ms(world, lambda: None, exchange, slots[way]))
            found[f"{way}_beside_ms"].append(timed_ms(world, products, exchange, slots[way]))
    # The first round warms up.
    row = {"part": "gpu", "bytes": size, "rounds": options.rounds}
    row |= {name: statistics.median(times[1:]) for name, times in found.items()}
    for way in ways:
        pairs = zip(found[f"{way}_beside_ms"][1:], found["alone_ms"][1:], strict=True)
        row[f"{way}_slowdown"] = statistics.median(beside / alone for beside, alone in pairs)
    return row


def timed_ms(world, compute, exchange=None, slot=None):
    """Milliseconds of the current stream from before the post, if any, until it has computed and received."""
    torch.cuda.synchronize()
    world.gather(None, "a round")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    if exchange is not None:
        exchange.acquire(slot)
        exchange.post(slot)
    compute()
    if exchange is not None:
        exchange.wait(slot)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
