"""The rules of the exchange, alike over the engine and torch.distributed: orders, epochs, refusals, silent peers."""

import functools
import os
import time
import tracemalloc

import pytest
import ranks
import torch

from asyncdiff_fast.environment import EXCHANGE_VARIABLE
from asyncdiff_fast.exchange.choice import Recv, Send, open_exchange
from asyncdiff_fast.exchange.world import World, start_process_group, stop_process_group

WORLD_SIZE = 3
KINDS = ("engine", "torch")


def _ring(world, **changes):
    """(exchange, slot): each rank sends its number and the epoch to the next one."""
    options = {"name": "ring", "depth": 2, "numel": 2} | changes
    exchange = open_exchange(world, "cpu")
    sends, recvs = ([torch.zeros(options["numel"]) for _ in range(options["depth"])] for _ in range(2))
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    slot = exchange.slot(options["name"], [Send(after, tuple(sends))], [Recv(before, tuple(recvs))], options["depth"])
    return exchange, slot


def _raised(action):
    """Type and message of what an action raises."""
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def _epochs(world, depth):
    """What each wait finds in the buffers, for every lag that the depth allows."""
    exchange, slot = _ring(world, depth=depth)
    exchange.freeze("epochs")
    found = []
    for epoch in range(7):
        exchange.acquire(slot)
        slot.sends[0].buffers[epoch % depth].copy_(torch.tensor([float(world.rank), float(epoch)]))
        exchange.post(slot)
        for lag in reversed(range(min(depth, epoch + 1))):
            exchange.wait(slot, lag)
            found.append((epoch, lag, slot.recvs[0].buffers[(epoch - lag) % depth].tolist()))
    refused = _raised(lambda: exchange.wait(slot, depth)), _raised(lambda: exchange.wait(slot, -1))
    exchange.close()
    return found, refused, _raised(lambda: exchange.post(slot))


def _many(world, rounds=520):
    """Growth of Python memory over 20 posts a round, in bytes, and what is left of them."""
    exchange = open_exchange(world, "cpu")
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    slots = []
    for i in range(20):
        sends, recvs = (tuple(torch.zeros(2) for _ in range(2)) for _ in range(2))
        slots.append(exchange.slot(f"slot {i}", [Send(after, sends)], [Recv(before, recvs)]))
    exchange.freeze("many")

    def allocated(times):
        tracemalloc.start()
        for _ in range(times):
            for slot in slots:
                exchange.post(slot)
            for slot in slots:
                exchange.wait(slot)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size

    early, _, late = allocated(10), allocated(rounds - 20), allocated(10)
    pending = sum(len(works) for slot in slots for works in slot.pending)
    posts = exchange.stats()["posts"]
    exchange.close()
    return early, late, pending, posts


def _disagreements(world):
    """What freeze says where ranks 0 and 1 list different slots for each other."""
    odd = world.rank == 1
    found = {}
    for case, changes in {
        "name": {"name": "other" if odd else "ring"},
        "size": {"numel": 3 if odd else 2},
        "same": {},
    }.items():
        exchange, _ = _ring(world, **changes)
        found[case] = _raised(lambda: exchange.freeze("phase"))  # noqa: B023
        exchange.abort("over")
        exchange.close()
    for case in ("order", "missing", "both ways"):
        exchange = open_exchange(world, "cpu")
        pair = tuple(torch.zeros(2) for _ in range(2))
        if world.rank < 2:
            side = Send if world.rank == 0 else Recv
            names = ["a", "b"] if not odd else {"order": ["b", "a"], "missing": ["a"], "both ways": ["a", "b"]}[case]
            for name in names:
                moves = [[cls(1 - world.rank, pair)] * (cls is side or case == "both ways") for cls in (Send, Recv)]
                exchange.slot(name, *moves)
        found[case] = _raised(lambda: exchange.freeze("phase"))  # noqa: B023
        exchange.abort("over")
        exchange.close()
    return found


def _rules(world):
    """Refusals on one rank that need no peer, and what abort does."""
    exchange, slot = _ring(world, name="first")
    other = exchange.slot("second", slot.sends, slot.recvs, 2)
    exchange.freeze("rules")
    found = {"order": _raised(lambda: exchange.post(other))}
    found["buffers"] = _raised(lambda: exchange.slot("thin", [Send(0, (torch.zeros(2),))], depth=2))
    strided = torch.zeros(4, 4)[:, 0]
    found["strided"] = _raised(lambda: exchange.slot("strided", [Send(0, (strided, strided))], depth=2))
    exchange.abort("somebody died")
    exchange.abort("later")
    for name, action in {"post": lambda: exchange.post(slot), "wait": lambda: exchange.wait(slot)}.items():
        found[name] = _raised(action)
    found["check"] = _raised(exchange.check)
    exchange.close()
    return found


def _silent_peer(world):
    """Rank 2 never posts; what the ranks that wait for it say, and after how long."""
    world.timeout_s = 1.5
    exchange, slot = _ring(world)
    exchange.freeze("silent")
    if world.rank == 2:
        time.sleep(3)
        return None
    began = time.perf_counter()
    exchange.post(slot)
    error = _raised(lambda: exchange.wait(slot))
    return error, time.perf_counter() - began


def _everything(rank):
    found = {}
    start_process_group(30)
    for kind in KINDS:
        os.environ[EXCHANGE_VARIABLE] = kind
        world = World(range(WORLD_SIZE), 30)
        found[kind] = {"disagreements": _disagreements(world)}
        found[kind]["rules"] = _rules(world)
        found[kind]["epochs"] = {depth: _epochs(world, depth) for depth in (1, 2, 3)}
        found[kind]["many"] = _many(world)
        found[kind]["silent"] = _silent_peer(world)
    stop_process_group()
    return found


@functools.cache
def _results():
    return ranks.run(WORLD_SIZE, _everything, timeout=280)


def everything(kind):
    return [found[kind] for found in _results()]


@pytest.mark.parametrize("kind", KINDS)
def test_freeze_compares_slots(kind):
    ranks = [rank["disagreements"] for rank in everything(kind)]
    for case in ("name", "size", "order", "missing"):
        for found in ranks[:2]:
            kind, message = found[case]
            assert kind == "ExchangeError" and "list different slots for each other" in message, case
    assert all(found["same"] is None and found["both ways"] is None for found in ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_refusals_and_abort(kind):
    for found in (rank["rules"] for rank in everything(kind)):
        assert found["order"] == (
            "ExchangeError",
            "slots are posted in their frozen order: 'first' is next, not 'second'",
        )
        assert found["buffers"][0] == found["strided"][0] == "ValueError"
        for action in ("post", "wait", "check"):
            assert found[action] == ("ExchangeError", "somebody died"), "the first reason stays"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_epochs(depth, kind):
    for rank, results in enumerate(everything(kind)):
        found, refused, closed = results["epochs"][depth]
        before = (rank - 1) % WORLD_SIZE
        assert found == [
            (epoch, lag, [before, epoch - lag]) for epoch in range(7) for lag in reversed(range(min(depth, epoch + 1)))
        ]
        assert all(kind == "ValueError" and "lag must be less than the depth" in text for kind, text in refused)
        assert closed == ("ExchangeError", "the exchange is closed")


@pytest.mark.parametrize("kind", KINDS)
def test_many_posts_do_not_grow(kind):
    for early, late, pending, posts in (rank["many"] for rank in everything(kind)):
        assert posts > 10_000
        assert pending == 0
        assert late <= early + 20_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_silent_peer_is_named(kind):
    (raised, message), seconds = everything(kind)[0]["silent"]
    assert raised == "ExchangeError" and "rank 2" in message and "slot 'ring'" in message
    assert seconds < 10
