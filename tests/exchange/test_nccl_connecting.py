"""Connecting by NCCL, on the double: libraries, versions, time limits, and how a channel ends."""

import gc

import building
import pytest
from channels import connect, ring
from double import Double


@pytest.fixture(params=[0, 3], ids=["at once", "in progress"])
def gpu(request):
    with Double(building.build()[0], 200, 1, request.param) as double:
        yield double


def _transports(gpu, extension, size, ranks, **options):
    """Transports of some ranks of a communicator."""
    libraries = extension.Libraries(gpu.path, gpu.path)
    unique_id, made = extension.unique_id(libraries), []
    for rank in ranks:
        with gpu.rank(rank):
            made.append(extension.NcclTransport(libraries, unique_id, rank, size, **options))
    return made


def test_all_ranks_must_come(gpu):
    _, extension = building.load()
    transports = _transports(gpu, extension, 2, [0], timeout_s=0.2)
    with pytest.raises(extension.ExchangeError, match=r"rank 0 waited 0.2 s for all ranks"):
        while not transports[0].ready():
            pass


def test_old_libraries_and_missing_contexts_are_refused(gpu):
    _, extension = building.load()
    gpu.library.fake_version(21805)
    with pytest.raises(extension.ExchangeError, match=r"2\.19"):
        extension.Libraries(gpu.path, gpu.path)
    gpu.library.fake_version(21903)
    libraries = extension.Libraries(gpu.path, gpu.path)
    assert libraries.nccl_version == 21903
    assert "2.29.2 or later is needed for one-sided puts: got version 21903" in libraries.puts_missing
    with pytest.raises(extension.ExchangeError, match="one-sided puts: got version 21903"):
        extension.NcclTransport(libraries, extension.unique_id(libraries), 0, 2, puts=True)
    with pytest.raises(extension.ExchangeError, match="no CUDA device is current"):
        extension.NcclTransport(libraries, extension.unique_id(libraries), 0, 2)


def test_a_group_that_is_never_launched_is_given_up():
    """A peer to which no connection comes about: the post says so after `timeout_s`."""
    path, extension = building.load()
    with Double(path, enquiries=1_000_000) as gpu:
        ranks = connect(gpu, extension, 2, timeout_s=0.3)
        slots = ring(ranks)
        with pytest.raises(extension.ExchangeError, match=r"rank 0, slot 'ring' .*no connection in 0.3 s"):
            ranks[0].send_once(slots[0])
        for r in ranks:
            r.channel.abort("over")
            r.channel.close()


@pytest.mark.parametrize("puts", [False, True])
def test_a_closed_channel_leaves_nothing_under_way(gpu, puts):
    _, extension = building.load()
    ranks = connect(gpu, extension, 3, puts=puts)
    slots = ring(ranks)
    for r, slot in zip(ranks, slots, strict=True):
        r.send_once(slot)
    assert gpu.drain() == []
    for r in ranks:
        r.channel.close()
    assert gpu.misuses() == []
    with pytest.raises(extension.ExchangeError, match="closed"):
        ranks[0].post(slots[0])


def test_a_channel_left_half_way_is_aborted(gpu):
    """The library would wait for ever for the other half of what is under way."""
    _, extension = building.load()
    ranks = connect(gpu, extension, 2)
    slots = ring(ranks)
    ranks[0].send_once(slots[0])
    ranks[0].channel.leave("a step raised")
    ranks[0].channel.close()
    assert gpu.drain() == [] and gpu.misuses() == []
    ranks[1].channel.close()


def test_a_dropped_channel_survives_a_library_that_fails():
    path, extension = building.load()
    gpu = Double(path)
    ranks = connect(gpu, extension, 2)
    gpu.library.fake_reset()
    del ranks
    gc.collect()
