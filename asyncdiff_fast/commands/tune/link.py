"""How fast messages between these ranks are."""

import statistics
import time

import torch

from ...exchange.choice import Recv, Send, open_exchange

SMALL, LARGE, ROUNDS = 256, 8 << 20, 12


def measured(world, device):
    """(seconds of a small message, GB/s of a large one), every rank sending to the next. Collective.

    As slots travel between patched ranks; the slowest rank's.
    """
    exchange = open_exchange(world, device)
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    slots = []
    for nbytes in (SMALL, LARGE):
        mine, theirs = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
        slots.append(exchange.slot(f"{nbytes} bytes", (Send(after, (mine,)),), (Recv(before, (theirs,)),), depth=1))
    exchange.freeze("link")
    took = ([], [])
    with exchange.step():
        for _ in range(ROUNDS):
            for slot, seconds in zip(slots, took, strict=True):
                began = _now(device)
                exchange.acquire(slot)
                exchange.post(slot)
                exchange.wait(slot)
                seconds.append(_now(device) - began)
    exchange.close()
    small, large = (statistics.median(seconds[2:]) for seconds in took)
    everyone = world.gather((small, large), "the time of messages")
    small, large = (max(column) for column in zip(*everyone, strict=True))
    return small, LARGE / max(large - small, 1e-9) / 1e9


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
