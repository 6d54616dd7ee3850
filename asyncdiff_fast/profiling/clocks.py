"""How far the clocks of ranks are apart: messages there and back, of which the quickest says most.

Source: F. Cristian, Probabilistic clock synchronization, Distributed Computing 3 (1989).
"""

import time
from datetime import timedelta

from ..exchange.processes import host

_ROUNDS = 16


def offset_ns(world, store):
    """What to add to this rank's `time.time_ns()` to have rank 0's; ranks of one host share a clock. Collective.

    Args:
        store: a key-value store of the same ranks, empty.
    """
    hosts = world.gather(list(host()), "clocks")
    elsewhere = [rank for rank in range(world.size) if hosts[rank] != hosts[0]]
    if world.rank == 0:
        for rank in elsewhere:
            answer(store, rank, world.timeout_s)
        return 0
    return ask(store, world.rank, world.timeout_s) if world.rank in elsewhere else 0


def ask(store, rank, timeout_s, now=time.time_ns):
    """The offset of this rank's clock, while rank 0 calls `answer`; off by at most half of the quickest round."""
    best = None
    for number in range(_ROUNDS):
        key, sent = f"clock/{rank}/{number}", now()
        store.set(f"{key}/ask", b"")
        theirs = int(_get(store, f"{key}/answer", timeout_s))
        back = now()
        if best is None or back - sent < best[0]:
            best = back - sent, theirs - (sent + back) // 2
    return best[1]


def answer(store, rank, timeout_s, now=time.time_ns):
    """Tell a rank the time, whenever it asks."""
    for number in range(_ROUNDS):
        key = f"clock/{rank}/{number}"
        _get(store, f"{key}/ask", timeout_s)
        store.set(f"{key}/answer", str(now()))


def _get(store, key, timeout_s):
    store.wait([key], timedelta(seconds=timeout_s))
    return store.get(key)
