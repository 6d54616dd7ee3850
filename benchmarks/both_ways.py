"""The engine and torch.distributed side by side between two ranks, for benchmarks of an exchange."""

import contextlib
import os

import torch
import torch.distributed as dist

from asyncdiff_fast.environment import EXCHANGE_VARIABLE
from asyncdiff_fast.exchange.choice import Recv, Send, open_exchange
from asyncdiff_fast.exchange.world import World, start_process_group, stop_process_group


@contextlib.contextmanager
def opened(device):
    """(world, {"engine" or "torch": exchange}) for tensors of a device, closed in the end. Collective."""
    start_process_group(60)
    world = World(range(dist.get_world_size()), 60)
    ways = {}
    try:
        for way in ("engine", "torch"):
            os.environ[EXCHANGE_VARIABLE] = way
            ways[way] = open_exchange(world, device)
        yield world, ways
    finally:
        for exchange in ways.values():
            exchange.close()
        stop_process_group()


def slot_of(world, exchange, size, device):
    """A frozen slot of `size` bytes each way."""
    sent, received = (
        tuple(torch.full((size,), world.rank, dtype=torch.int8, device=device) for _ in range(2)) for _ in range(2)
    )
    slot = exchange.slot(f"{size}", [Send(1 - world.rank, sent)], [Recv(1 - world.rank, received)])
    exchange.freeze(f"{size} bytes")
    return slot
