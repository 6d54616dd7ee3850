"""What ranks on NCCL tell each other through the store: that one stopped, that one leaves; and a store that stops."""

import contextlib
import multiprocessing
import os
import signal
import time
from datetime import timedelta
from types import SimpleNamespace

import building
import pytest
import torch.distributed as dist
from channels import connect, ring
from double import Double

from asyncdiff_fast.exchange import connecting

PATIENCE_S = 5.0


@pytest.fixture
def ranks():
    path, extension = building.load()
    with Double(path) as gpu:
        found = connect(gpu, extension, 2, timeout_s=30.0)
        yield found
        for r in found:
            r.channel.abort("over")
            r.channel.close()


@contextlib.contextmanager
def _watched(ranks, store):
    """A watch for each rank."""

    def world(rank):
        return SimpleNamespace(
            rank=rank,
            name=rank,
            look=lambda: None,
            size=len(ranks),
            new_store=lambda name: dist.PrefixStore(name, store),
        )

    watches = [connecting._StoreWatch(world(r.rank), r.channel) for r in ranks]
    yield watches
    for watch in watches:
        watch.end()


def _eventually(found):
    deadline = time.monotonic() + PATIENCE_S
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_abort_reaches_the_others(ranks):
    with _watched(ranks, dist.HashStore()):
        ranks[1].channel.abort("it rains")
        _eventually(ranks[0].channel.broken)
    assert ranks[0].channel.broken() == "rank 1 stopped the exchange: it rains"


def test_a_rank_that_leaves_is_missed_by_those_who_wait_for_it(ranks):
    slots = ring(ranks)
    with _watched(ranks, dist.HashStore()) as watches:
        watches[1].leave()
        time.sleep(0.5)
        assert ranks[0].channel.broken() is None, "nobody waits for it yet"
        ranks[0].send_once(slots[0])
        _eventually(ranks[0].channel.broken)
    told = ranks[0].channel.broken()
    assert "slot 'ring' (exchange 0) waits for rank 1, which has left the exchange" in told


def _host(pipe):
    store = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    pipe.send(store.port)
    pipe.recv()


def test_a_store_that_stops_holds_nobody_up(ranks):
    here, there = multiprocessing.Pipe()
    host = multiprocessing.get_context("spawn").Process(target=_host, args=(there,), daemon=True)
    host.start()
    limit = timedelta(seconds=PATIENCE_S)
    store = dist.TCPStore("127.0.0.1", here.recv(), 1, False, limit, wait_for_workers=False)
    try:
        with _watched(ranks, store) as watches:
            os.kill(host.pid, signal.SIGSTOP)
            time.sleep(3 * connecting.STORE_PERIOD_S)
            for action in (watches[0].leave, watches[0].end):
                began = time.monotonic()
                action()
                assert time.monotonic() - began < connecting.LEAVING_S + 0.5
    finally:
        host.kill()
