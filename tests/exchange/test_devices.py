"""An engine belongs to one device, whichever is current: how it is opened there, and which stream its posts follow."""

import contextlib
from types import SimpleNamespace

import building
import channels
import pytest
import torch
from double import Double

from asyncdiff_fast.exchange import connecting, engine
from asyncdiff_fast.exchange.world import World

DEVICE = torch.device("cuda", 3)


@pytest.fixture
def opened(monkeypatch):
    """(the double, an engine of one rank on the fourth device), which is not the current one."""
    path, extension = building.load()
    with Double(path) as gpu:

        @contextlib.contextmanager
        def current(device):
            with gpu.rank(device.index):
                yield

        library = dict(Libraries=lambda **_: extension.Libraries(gpu.path, gpu.path), unique_id=extension.unique_id)
        library |= dict(NcclTransport=extension.NcclTransport, Channel=extension.Channel)
        monkeypatch.setattr(engine, "_C", SimpleNamespace(**library))
        monkeypatch.setattr(connecting, "_current", current)
        world = World([0], 10)
        world.new_store = lambda name: torch.distributed.HashStore()
        with gpu.rank(0):
            made = connecting.open_engine(world, "nccl", DEVICE)
            yield gpu, made
            made.close()


def test_the_communicator_is_made_on_the_device_and_takes_few_processors(opened):
    gpu, made = opened
    assert made.device == DEVICE
    assert gpu.library.fake_max_ctas(DEVICE.index) == connecting.MAX_CTAS == 4
    assert gpu.library.fake_max_ctas(0) == 0


def test_posts_follow_the_stream_of_the_device(opened, monkeypatch):
    gpu, made = opened
    streams = {DEVICE.index: gpu.stream(DEVICE.index)}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams.get, raising=False)
    slot = made.slot("nothing")
    made.freeze("phase")
    for call in (made.acquire, made.post, made.wait):
        call(slot)
    assert made.history()[0][1] == "nothing"


def test_tensors_of_another_device_are_refused(opened):
    _, made = opened
    assert made._has(torch.device("cuda", 3)) and not made._has(torch.device("cuda", 0))
    assert not made._has(torch.device("cpu"))


def test_handle_0_is_the_default_stream_of_the_engine_s_device():
    """Of torch the handle of the default stream is 0, which to the driver is that of whichever context is current."""
    path, extension = building.load()
    with Double(path, 200, 1) as gpu:
        ranks = channels.connect(gpu, extension, 2)
        slots = channels.ring(ranks)
        for r, slot in zip(ranks, slots, strict=True):
            with gpu.rank(1 - r.rank):
                r.channel.acquire(slot.number, 0)
            with gpu.rank(r.rank):
                gpu.kernel(0, "produce", writes=[slot.send[0].filled(channels.value(r.rank, slot.name, 0))])
            with gpu.rank(1 - r.rank):
                r.channel.post(slot.number, 0)
        for r, slot in zip(ranks, slots, strict=True):
            with gpu.rank(1 - r.rank):
                r.channel.wait(slot.number, 0)
            awaited = channels.value(1 - r.rank, slot.name, 0)
            with gpu.rank(r.rank):
                gpu.kernel(0, "consume", reads=[slot.recv[1 - r.rank][0].filled(awaited)])
        assert channels.verdict(gpu, ranks) == ([], [], [])
