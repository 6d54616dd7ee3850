"""What ranks on NCCL tell each other through the store: an abort, a leave; and a store that stops with its host."""

import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import building
import channels
import double
import pytest
import torch.distributed as dist

from asyncdiff_fast import connecting


@pytest.fixture
def ranks():
    gpu = double.Double()
    found = channels.connect(gpu, building.load()[1], 2, timeout_s=5.0)
    yield found
    for rank in found:
        rank.channel.abort("the test is over")
    gpu.close()


def _watch(rank, store):
    world = SimpleNamespace(rank=rank.rank, size=2, new_store=lambda name: dist.PrefixStore(name, store))
    return connecting._StoreWatch(world, rank.channel)
