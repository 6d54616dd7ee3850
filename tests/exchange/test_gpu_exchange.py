"""Slots over the real NCCL: two processes on one GPU, told apart by NCCL_HOSTID as if each had a host of its own.

One-sided puts need two GPUs of one host.
"""

import os

import pytest
import torch
import workers

from asyncdiff_fast.environment import EXCHANGE_VARIABLE
from asyncdiff_fast.exchange.choice import Recv, Send, open_exchange
from asyncdiff_fast.exchange.world import World, start_process_group, stop_process_group

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EPOCHS = 7
# Below and above what NCCL sends in one piece.
SIZES = (1, 4099, 1 << 22)
DIRECTIONS = ("both", "send", "receive")


def _slot(exchange, rank, name, size, depth, direction):
    """A slot that sends, receives or does both on rank 0, and the opposite on rank 1."""
    buffers = [tuple(torch.full((size,), -1.0, device="cuda") for _ in range(depth)) for _ in range(2)]
    sends = direction == "both" or (direction == "send") == (rank == 0)
    recvs = direction == "both" or (direction == "receive") == (rank == 0)
    return exchange.slot(
        name, [Send(1 - rank, buffers[0])] if sends else [], [Recv(1 - rank, buffers[1])] if recvs else [], depth
    )


def _wrong(exchange, slot, rank):
    """[(epoch, lag)] where a kernel behind the wait did not read what that epoch sent."""
    wrong = []
    for epoch in range(EPOCHS):
        exchange.acquire(slot)
        for send in slot.sends:
            # Long work before the write: without the order of streams the send would be earlier.
            torch.cuda._sleep(1_000_000)
            send.buffers[epoch % slot.depth].fill_(10 * epoch + rank)
        exchange.post(slot)
        for lag in reversed(range(min(slot.depth, epoch + 1))):
            exchange.wait(slot, lag)
            for recv in slot.recvs:
                read = recv.buffers[(epoch - lag) % slot.depth].clone()
                if not bool((read == 10 * (epoch - lag) + 1 - rank).all()):
                    wrong.append((epoch, lag))
    return wrong


def _every_kind(rank, wanted):
    os.environ[EXCHANGE_VARIABLE] = wanted
    if wanted == "engine":
        # One GPU for both: with LOCAL_RANK each would look for its own.
        os.environ |= {"NCCL_HOSTID": f"rank{rank}", "NCCL_SOCKET_IFNAME": "lo", "LOCAL_RANK": "0"}
    start_process_group(60)
    world = World(range(2), 60)
    exchange = open_exchange(world, "cuda")
    wrong = {}
    for depth in (1, 2, 3):
        for size in SIZES:
            for direction in DIRECTIONS:
                name = f"{direction}, {size} numbers, depth {depth}"
                slot = _slot(exchange, rank, name, size, depth, direction)
                exchange.freeze(name)
                wrong[name] = _wrong(exchange, slot, rank)
                exchange.release(name)
    kind = exchange.kind
    exchange.close()
    stop_process_group()
    return kind, {name: found for name, found in wrong.items() if found}


def test_every_kind_of_slot_brings_what_was_sent():
    assert workers.run(2, _every_kind, "engine") == [("nccl", {})] * 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_every_kind_of_slot_brings_what_was_put():
    kinds, wrong = zip(*workers.run(2, _every_kind, "nccl-puts"), strict=True)
    if set(kinds) == {"nccl"}:
        pytest.skip("these devices have no one-sided puts; the log says why")
    assert kinds == ("nccl-puts", "nccl-puts") and wrong == ({}, {})
