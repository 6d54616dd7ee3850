"""The hazard table, row by row, on the real channel: right schedules are clean, broken rules of callers are seen."""

import time

import building
import pytest
from channels import connect, kinds, ring, verdict
from double import Double

STEPS = 5


@pytest.fixture(params=[(0, 0), (300, 1), (300, 2)], ids=["at once", "late", "late otherwise"])
def gpu(request):
    with Double(building.build()[0], *request.param) as double:
        yield double


@pytest.fixture(params=[False, True], ids=["send and receive", "puts"])
def puts(request):
    return request.param


@pytest.fixture
def connected(gpu, puts):
    """`connect` for a number of ranks; their channels are closed in the end."""
    made = []

    def start(size, **options):
        made.extend(connect(gpu, building.load()[1], size, puts=puts, **options))
        return made

    yield start
    for r in made:
        r.channel.abort("over")
        r.channel.close()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("early", "depth"), [(True, 2), (True, 3), (False, 1), (False, 2), (False, 3)])
def test_right_schedules(gpu, connected, size, early, depth):
    """Posted before last step's message is read, or after this step's: every wait keeps what it promises."""
    ranks = connected(size)
    slots = ring(ranks, depth=depth)
    for step in range(STEPS):
        for r, slot in zip(ranks, slots, strict=True):
            r.send_once(slot)
            if early and step:
                r.wait(slot, lag=1)
                r.consume(slot, lag=1)
            elif not early:
                r.wait(slot)
                r.consume(slot)
    assert verdict(gpu, ranks) == ([], [], [])


def _one_way(ranks, depth=2):
    """A slot from rank 0 to rank 1, where neither is ordered by what it receives itself."""
    sides = ranks[0].slot("x", sends=[1], depth=depth), ranks[1].slot("x", recvs=[0], depth=depth)
    for r, side in zip(ranks, sides, strict=True):
        r.freeze(side)
    return sides


def test_phases_one_after_another(gpu, connected):
    """What a phase leaves behind, such as credits that nobody waits for any more, is not taken for the next one's."""
    ranks = connected(2)
    for steps in (1, 2, STEPS):
        both = ring(ranks, "both")
        source, target = _one_way(ranks)
        for _ in range(steps):
            ranks[0].send_once(source)
            ranks[1].post(target)
            for r, slot in zip(ranks, both, strict=True):
                r.send_once(slot)
                r.wait(slot)
                r.consume(slot)
            ranks[1].wait(target)
            ranks[1].consume(target)
        assert gpu.drain() == []
        for phase in ("both", "phase"):
            for r in ranks:
                r.channel.release(phase)
    assert verdict(gpu, ranks) == ([], [], [])
    assert gpu.misuses() == []


@pytest.mark.parametrize("broken", [False, True])
def test_send_after_the_producer(gpu, connected, broken):
    """RAW: the post orders the send after the stream it names, so the producer must run there."""
    ranks = connected(2)
    source, target = _one_way(ranks)
    for _ in range(STEPS):
        producer = gpu.stream(0) if broken else None
        ranks[0].acquire(source, producer)
        ranks[0].produce(source, producer)
        ranks[0].post(source)
        ranks[1].post(target)
        ranks[1].wait(target)
        ranks[1].consume(target)
    stuck, races, _ = verdict(gpu, ranks)
    assert stuck == []
    assert ("RAW", "produce", "send") in kinds(races) if broken else races == []


@pytest.mark.parametrize("broken", [False, True])
def test_produce_after_the_send(gpu, connected, broken):
    """WAR: a buffer is written again once its last send is over, which acquire sees to."""
    ranks = connected(2)
    source, target = _one_way(ranks)
    for _ in range(STEPS):
        if not broken:
            ranks[0].acquire(source)
        ranks[0].produce(source)
        ranks[0].post(source)
        ranks[1].post(target)
        ranks[1].wait(target)
        ranks[1].consume(target)
    stuck, races, _ = verdict(gpu, ranks)
    assert stuck == []
    assert kinds(races) == ({("WAR", "send", "produce")} if broken else set())


@pytest.mark.parametrize("broken", [False, True])
def test_read_after_the_receive(gpu, connected, broken):
    """RAW: what is received is read after a wait."""
    ranks = connected(2)
    source, target = _one_way(ranks)
    for _ in range(STEPS):
        ranks[0].send_once(source)
        ranks[1].post(target)
        if not broken:
            ranks[1].wait(target)
        ranks[1].consume(target)
    stuck, races, _ = verdict(gpu, ranks)
    assert stuck == []
    assert kinds(races) == ({("RAW", "recv", "consume")} if broken else set())


@pytest.mark.parametrize("joined", [True, False])
def test_receive_after_the_last_reader(gpu, connected, joined):
    """WAR: a post orders the receive after readers on the stream it names; readers elsewhere have to be joined."""
    ranks = connected(2)
    slots, others = ring(ranks), [gpu.stream(r.rank) for r in ranks]
    for _ in range(STEPS):
        for r, slot, other in zip(ranks, slots, others, strict=True):
            r.send_once(slot)
            r.wait(slot, stream=other)
            r.consume(slot, stream=other)
            if joined:
                r.join(r.compute, other)
    stuck, races, _ = verdict(gpu, ranks)
    assert stuck == []
    found = kinds(races)
    assert found == set() if joined else ("WAR", "consume", "recv") in found


def test_one_buffer_is_posted_after_its_reader(gpu, connected):
    """Posted before read: with one buffer the channel refuses the post, and the wait for what it overwrites."""
    _, extension = building.load()
    ranks = connected(2)
    slots = ring(ranks, depth=1)
    for r, slot in zip(ranks, slots, strict=True):
        r.send_once(slot)
        r.acquire(slot)
        r.produce(slot)
        with pytest.raises(extension.ExchangeError, match="depth 1"):
            r.post(slot)
        with pytest.raises(ValueError, match="lag"):
            r.wait(slot, lag=1)


def test_a_wait_that_is_not_followed_by_its_reader(gpu, connected):
    """What the channel cannot see: waited for in time, read only after the next post has overwritten it."""
    ranks = connected(2)
    slots = ring(ranks, depth=1)
    for step in range(STEPS):
        for r, slot in zip(ranks, slots, strict=True):
            if step:
                r.wait(slot)
            r.acquire(slot)
            r.produce(slot)
            r.post(slot)
            r.consume(slot, lag=0)
    stuck, races, _ = verdict(gpu, ranks)
    assert stuck == []
    assert ("RAW", "recv", "consume") in kinds(races)


def test_another_order_is_refused_here_and_swaps_data_there(gpu, connected):
    """Equal sizes in another order hang nobody: only the comparison of the frozen orders finds them."""
    _, extension = building.load()
    ranks = connected(2)
    sides = [[r.slot(name, [1 - r.rank], [1 - r.rank]) for name in ("a", "b")] for r in ranks]
    orders = [sides[0], sides[1][::-1]]
    for r, order in zip(ranks, orders, strict=True):
        r.freeze(*order)
    for r, order in zip(ranks, orders, strict=True):
        with pytest.raises(extension.ExchangeError, match="frozen order"):
            r.post(order[1])
        for slot in order:
            r.send_once(slot)
    for r, order in zip(ranks, orders, strict=True):
        for slot in order:
            r.wait(slot)
            r.consume(slot)
    stuck, races, wrong = verdict(gpu, ranks)
    assert stuck == [] and races == []
    assert len(wrong) == 8, "two slots on two ranks, looked at twice"


def test_another_size_is_an_error_on_both_ranks(gpu):
    ranks = connect(gpu, building.load()[1], 2)
    sides = ranks[0].slot("x", sends=[1], nbytes=64), ranks[1].slot("x", recvs=[0], nbytes=128)
    for r, side in zip(ranks, sides, strict=True):
        r.freeze(side)
    for r, side in zip(ranks, sides, strict=True):
        r.send_once(side)
    assert gpu.drain() == []
    for r in ranks:
        _eventually(lambda r=r: r.channel.broken())
        assert "met a send of 64 bytes" in r.channel.broken()
        r.channel.abort("over")
        r.channel.close()


def test_another_size_has_no_window(gpu):
    """One-sided nobody could tell afterwards: the windows are compared, to the next 512 bytes, before they are made."""
    _, extension = building.load()
    ranks = connect(gpu, extension, 2, puts=True)
    sides = ranks[0].slot("x", sends=[1], nbytes=64), ranks[1].slot("x", recvs=[0], nbytes=640)
    ranks[0].freeze(sides[0])
    with pytest.raises(extension.ExchangeError, match="sends rank 1 1024 bytes of places, which expects 2048"):
        ranks[1].freeze(sides[1])
    for r in ranks:
        r.channel.abort("over")
        r.channel.close()


@pytest.mark.parametrize("windows", [[], [[64, 0]], [[64], [64]]])
def test_a_slot_is_posted_with_the_windows_of_all(gpu, windows):
    _, extension = building.load()
    ranks = connect(gpu, extension, 2, puts=True)
    slot = ranks[0].slot("x", sends=[1])
    with pytest.raises(extension.ExchangeError, match="need the windows of all 2 ranks"):
        ranks[0].channel.freeze("phase", [slot.number], windows)
    for r in ranks:
        r.channel.abort("over")
        r.channel.close()


def _eventually(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("epochs", [1, 2, 3, 8])
def test_a_peer_that_never_posts_is_named(epochs, puts):
    """However far ahead of its device the host has posted.

    One-sided, the stream stays stuck: it looks at memory that nobody writes any more, and sees no abort.
    """
    path, extension = building.load()
    with Double(path) as gpu:
        ranks = connect(gpu, extension, 2, timeout_s=0.7, puts=puts)
        slots = ring(ranks)
        for _ in range(epochs):
            ranks[0].send_once(slots[0])
            ranks[0].wait(slots[0])
        stuck = gpu.drain(grace_ms=10)
        awaited = "signals of rank 1" if puts else "message"
        assert any("rank 0" in line and awaited in line for line in stuck)
        states = [state for *_, state in ranks[0].channel.history()]
        assert states == ["running", *["queued"] * (epochs - 1)]
        _eventually(ranks[0].channel.broken)
        assert bool(gpu.drain()) == puts, "the abort has released the stream"
        with pytest.raises(extension.ExchangeError, match=r"waited .*for rank 1.* in slot 'ring' \(exchange 0\)"):
            ranks[0].wait(slots[0])
        for r in ranks:
            r.channel.close()


def test_a_host_runs_only_so_far_ahead():
    """The ninth epoch of a slot waits for its first: then nothing that is under way is forgotten."""
    path, extension = building.load()
    with Double(path) as gpu:
        ranks = connect(gpu, extension, 2, timeout_s=0.3)
        slots = ring(ranks)
        for _ in range(8):
            ranks[0].send_once(slots[0])
        with pytest.raises(extension.ExchangeError, match=r"for rank 1.* in slot 'ring' \(exchange 0\)"):
            ranks[0].send_once(slots[0])
        for r in ranks:
            r.channel.abort("over")
            r.channel.close()


def test_more_posts_under_way_than_the_history_tells(gpu, connected):
    """64 slots, 6 epochs: the watchdog finds the one that stands, and what came before it was carried out."""
    ranks = connected(2, timeout_s=0.7)
    sides = [[r.slot(f"slot{i}", [1 - r.rank], [1 - r.rank], nbytes=1) for i in range(64)] for r in ranks]
    for r, slots in zip(ranks, sides, strict=True):
        r.freeze(*slots)
    # Rank 1 first: rank 0 finds its half there, however long its own many posts take.
    for r, steps in ((ranks[1], 1), (ranks[0], 6)):
        for _ in range(steps):
            for slot in sides[r.rank]:
                r.send_once(slot)
            r.wait(slot)
    _eventually(ranks[0].channel.broken)
    assert "in slot 'slot0' (exchange 1)" in ranks[0].channel.broken()
    assert len(ranks[0].channel.history()) == 256


def test_an_error_of_nccl_is_told(gpu, connected):
    _, extension = building.load()
    ranks = connected(2)
    slots = ring(ranks)
    gpu.fail(0, 6)
    _eventually(ranks[0].channel.broken)
    with pytest.raises(extension.ExchangeError, match="remote process exited"):
        ranks[0].post(slots[0])
    assert ranks[1].channel.broken() is None
