"""Shared memory between ranks: every size and way gives the right bytes without growth; bad use is refused."""

import os
import pathlib
import random
import time

import building
import pytest
import shm_ranks

# Empty, odd, the largest that is copied twice and the next, more than a ring holds.
SIZES = (0, 1, 4095, 65536, 65537, 1 << 20, (3 << 20) + 5)
WAYS = {
    "default": {},
    "ring": {"direct": False},
    "small ring": {"direct": False, "ring_bytes": 1 << 17},
    "no futex": {"futex": False, "direct": False},
}


def _value(rank, name, epoch):
    return hash((rank, len(name), epoch)) + epoch


def _all_to_all(rank, epochs):
    """Wrong epochs of slots of every size, between every two ranks, with all lags."""
    others = [r for r in range(rank.size) if r != rank.rank]
    slots = {f"{n} bytes": rank.slot(f"{n} bytes", others, others, n, depth=1 + i % 3) for i, n in enumerate(SIZES)}
    channel, wrong = rank.channel, []
    channel.freeze("phase", [number for number, _, _ in slots.values()])
    for epoch in range(epochs):
        for name, (number, out, into) in slots.items():
            depth = next(iter(into.values())).depth
            channel.acquire(number)
            for buffers in out.values():
                buffers.fill(epoch, _value(rank.rank, name, epoch))
            channel.post(number)
            for lag in reversed(range(min(depth, epoch + 1))):
                channel.wait(number, 0, lag)
                for peer, buffers in into.items():
                    if not buffers.holds(epoch - lag, _value(peer, name, epoch - lag)):
                        wrong.append((name, epoch, lag, peer))
    sent, posts = channel.stats()["sent_bytes"], channel.stats()["posts"]
    channel.close(10.0)
    return wrong, sent, posts


@pytest.mark.parametrize("size, way", [(2, "default"), (3, "default"), (2, "ring"), (2, "small ring"), (2, "no futex")])
def test_everything_arrives(size, way):
    epochs = 6
    for wrong, sent, posts in shm_ranks.run(size, _all_to_all, epochs, **WAYS[way]):
        assert not wrong
        assert sent == epochs * (size - 1) * sum(SIZES) and posts == epochs * len(SIZES)


def _late_reads(rank, seed):
    """Wrong epochs where every rank posts ahead in one random order and waits in another."""
    rng, others = random.Random(seed), [r for r in range(rank.size) if r != rank.rank]
    sizes = [rng.choice(SIZES) for _ in range(8)]
    slots = [rank.slot(f"slot {i}", others, others, n) for i, n in enumerate(sizes)]
    channel, wrong = rank.channel, []
    channel.freeze("phase", [number for number, _, _ in slots])
    mine = random.Random(seed * 10 + rank.rank)
    for epoch in range(12):
        for i, (number, out, _) in enumerate(slots):
            channel.acquire(number)
            for buffers in out.values():
                buffers.fill(epoch, i + epoch + rank.rank)
            channel.post(number)
        if mine.random() < 0.3:
            time.sleep(mine.random() / 100)
        for i in mine.sample(range(8), 8):
            lag = mine.choice((0, 1)) if epoch else 0
            channel.wait(slots[i][0], 0, lag)
            wrong += [(i, epoch) for p, b in slots[i][2].items() if not b.holds(epoch - lag, i + epoch - lag + p)]
    channel.close(10.0)
    return wrong


@pytest.mark.parametrize("size, seed", [(2, 0), (3, 1), (4, 2)])
def test_posts_ahead_and_late_reads(size, seed):
    assert shm_ranks.run(size, _late_reads, seed) == [[]] * size


def _facts():
    status = pathlib.Path("/proc/self/status").read_text()
    rss = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
    return rss, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def _many(rank, posts):
    """(kB of memory, descriptors, threads) after a few posts and after many."""
    peer = [1 - rank.rank]
    small, large = rank.slot("small", peer, peer, 4096), rank.slot("large", peer, peer, 1 << 17)
    rank.channel.freeze("phase", [small[0], large[0]])
    found = []
    for count in (200, posts):
        for _ in range(count // 2):
            for number, _, _ in (small, large):
                rank.channel.acquire(number)
                rank.channel.post(number)
                rank.channel.wait(number)
        found.append(_facts())
    rank.channel.close(5.0)
    return found


def test_many_posts_do_not_grow():
    posts = building.repeats(100_000, 4_000)
    for (rss, fds, threads), (rss_after, fds_after, threads_after) in shm_ranks.run(2, _many, posts):
        # The ring touches its pages one after another; a sanitizer keeps a memory of its own.
        assert building.SANITIZE_VARIABLE in os.environ or rss_after <= rss + 2048
        assert (fds_after, threads_after) == (fds, threads)


def _phases(rank):
    """Phases come and go; marks and slots are used again."""
    peer = [1 - rank.rank]
    before = _facts()
    for turn in range(200):
        numbers = [rank.slot(f"{turn}.{i}", peer, peer, 1 << (10 + 4 * i))[0] for i in range(3)]
        rank.channel.freeze(f"phase {turn}", numbers)
        for number in numbers:
            rank.channel.post(number)
        rank.channel.release(f"phase {turn}")
        rank.kept.clear()
    with pytest.raises(ValueError, match="was released"):
        rank.channel.post(numbers[0])
    rank.channel.close(5.0)
    return before, _facts()


def test_phases_are_released():
    for before, after in shm_ranks.run(2, _phases):
        assert building.SANITIZE_VARIABLE in os.environ or after[0] < before[0] + 20_000
        assert after[1] <= before[1] + 1


def _refusals(rank):
    channel, peer = rank.channel, [1 - rank.rank]
    first, second, one = (rank.slot(n, peer, peer, 64, d)[0] for n, d in (("first", 2), ("second", 2), ("one", 1)))
    found = {}

    def refused(name, action, *args):
        try:
            action(*args)
        except (ValueError, rank.C.ExchangeError) as error:
            found[name] = type(error).__name__, str(error)

    refused("unfrozen", channel.post, first)
    # What is refused leaves no slot half frozen.
    refused("no slot", channel.freeze, "phase", [first, 77])
    refused("twice", channel.freeze, "phase", [first, first])
    channel.freeze("phase", [first, second])
    refused("two phases", channel.freeze, "other", [one, first])
    channel.freeze("other", [one])
    refused("frozen twice", channel.freeze, "phase", [one])
    refused("order", channel.post, second)
    for name, lag in (("lag", 2), ("negative", -1)):
        refused(name, channel.wait, first, 0, lag)
    refused("peer", channel.add, "x", [(rank.rank, [0, 0], 4)], [], 2)
    refused("buffers", channel.add, "x", [(peer[0], [0], 4)], [], 2)
    refused("depth", channel.add, "x", [], [], 0)
    channel.wait(first)
    channel.post(one)
    refused("depth 1 read late", channel.post, one)
    channel.wait(one)
    channel.post(one)
    assert not channel.broken()
    channel.close(5.0)
    refused("closed", channel.post, first)
    return found


def test_refusals():
    for found in shm_ranks.run(2, _refusals):
        assert found == {
            "unfrozen": ("ValueError", "slot 'first' is posted after freeze, not before"),
            "no slot": ("ValueError", "no slot has the number 77: it was released, or never made"),
            "twice": ("ValueError", "slot 'first' is twice in phase 'phase'"),
            "two phases": ("ValueError", "slot 'first' belongs to phase 'phase'"),
            "frozen twice": ("ValueError", "phase 'phase' is frozen already"),
            "order": ("ExchangeError", "slots are posted in their frozen order: 'first' is next, not 'second'"),
            "lag": ("ValueError", "lag must be less than the depth: got lag=2, depth=2 for slot 'first'"),
            "negative": ("ValueError", "lag must be less than the depth: got lag=-1, depth=2 for slot 'first'"),
            "peer": found["peer"],
            "buffers": ("ValueError", "slot 'x' needs 2 buffers for each send and receive"),
            "depth": ("ValueError", "depth must be at least 1: got depth=0"),
            "depth 1 read late": (
                "ExchangeError",
                "slot 'one' has depth 1: wait for it and read it before it is posted again, or give it depth 2",
            ),
            "closed": ("ExchangeError", "the exchange is closed"),
        }
        assert found["peer"][0] == "ValueError" and "names peer" in found["peer"][1]


def test_history():
    """A channel remembers its last 256 posts."""
    for rows in shm_ranks.run(2, _history):
        assert len(rows) == 256
        assert [row[:3] for row in rows] == [("phase", f"slot {e % 2}", 44 // 2 + e // 2) for e in range(256)]
        assert {row[4] for row in rows} == {"done"}


def _history(rank):
    peer = [1 - rank.rank]
    numbers = [rank.slot(f"slot {i}", peer, peer)[0] for i in range(2)]
    rank.channel.freeze("phase", numbers)
    for _ in range(150):
        for number in numbers:
            rank.channel.post(number)
            rank.channel.wait(number)
    rows = rank.channel.history()
    rank.channel.close(5.0)
    return rows


def test_another_process_s_memory_is_refused():
    """The numbers of a process and a descriptor may mean something else by the time they are used."""
    C = building.load()[1]
    mine, theirs = C.ShmTransport(0, 2, 1), C.ShmTransport(1, 2, 2)
    with pytest.raises(C.ExchangeError, match="is another's"):
        mine.connect([mine.address(), theirs.address()])
    with pytest.raises(C.ExchangeError, match="opening /proc/"):
        mine.connect([mine.address(), (os.getpid(), 99999)])
