"""Connecting by NCCL, on the double: libraries, versions, time limits, and lanes for some of the ranks."""

import gc

import building
import pytest
from channels import Meeting, Rank, connect, ring, verdict
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


@pytest.mark.parametrize("puts", [False, True])
def test_a_lane_for_some_ranks(gpu, puts):
    """Two halves of four ranks, each with a lane, beside the lane of all."""
    _, extension = building.load()
    transports = _transports(gpu, extension, 4, range(4), puts=puts)
    assert all([t.ready() for t in transports])
    parts = []
    for rank, transport in enumerate(transports):
        with gpu.rank(rank):
            parts.append(transport.split(color=rank % 2, key=rank, rank=rank // 2, size=2))
        assert parts[-1].ready() == (rank == 3)
    assert all([t.ready() for t in (*parts, *transports)])
    assert [(t.rank, t.size) for t in parts] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    groups, meetings = [[], [], []], [Meeting(2), Meeting(2), Meeting(4)]
    for rank, (whole, part) in enumerate(zip(transports, parts, strict=True)):
        with gpu.rank(rank):
            groups[2].append(Rank(gpu, rank, extension.Channel(whole), meetings[2]))
            groups[rank % 2].append(Rank(gpu, part.rank, extension.Channel(part), meetings[rank % 2], device=rank))
    slots = [ring(group) for group in groups]
    for _ in range(3):
        for group, sides in zip(groups, slots, strict=True):
            for r, slot in zip(group, sides, strict=True):
                r.send_once(slot)
            for r, slot in zip(group, sides, strict=True):
                r.wait(slot)
                r.consume(slot)
    assert verdict(gpu, [r for group in groups for r in group]) == ([], [], [])


def test_a_rank_may_stay_out_of_a_split(gpu):
    _, extension = building.load()
    transports, parts = _transports(gpu, extension, 2, range(2)), []
    assert all([t.ready() for t in transports])
    for rank, color in enumerate((0, -1)):
        with gpu.rank(rank):
            parts.append(transports[rank].split(color, 0, 0, 1))
    assert parts[0].ready() and parts[1] is None


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
