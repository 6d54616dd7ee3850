"""Ranks that are threads of one process, behind the interfaces of `World` and of an exchange: many at once."""

import contextlib
import threading

from asyncdiff_fast.exchange.world import World

PATIENCE_S = 120


class Hub:
    """What the threads share: a place where all meet, and what each brings."""

    def __init__(self, size):
        self.size = size
        self._barrier = threading.Barrier(size, timeout=PATIENCE_S)
        self._brought = [None] * size

    def gather(self, rank, value):
        """What every thread brings, in order."""
        self._brought[rank] = value
        self._barrier.wait()
        everyone = list(self._brought)
        self._barrier.wait()
        return everyone

    def fail(self):
        """Nobody need wait any more."""
        self._barrier.abort()


class VirtualWorld:
    """As `World`, of threads."""

    timeout_s = PATIENCE_S

    def __init__(self, hub, rank):
        self.hub, self.rank, self.size, self.ranks = hub, rank, hub.size, tuple(range(hub.size))
        self.name, self.calls = rank, 0

    def gather(self, value, what):
        everyone = self.hub.gather(self.rank, (what, value))
        assert {w for w, _ in everyone} == {what}, f"ranks are at different places: {everyone}"
        return [v for _, v in everyone]

    def broadcast(self, value, what):
        return self.gather(value, what)[0]

    begin = gather

    def may_begin(self):
        return True

    def passing(self):
        """Threads have one generator of torch's own: there is nothing to tell."""
        return _Silent()

    def leave(self, why=None):
        """Whoever fails breaks the hub's barrier."""

    def explained(self, error):
        return error

    def along(self, ranks):
        """These threads, or one of them alone."""
        return self if len(ranks) == self.size else World(ranks, self.timeout_s)


class _Silent:
    def tell(self, number, value):
        pass

    def look(self):
        return None

    def forget(self):
        pass


class VirtualSlot:
    def __init__(self, sends, recvs):
        self.sends, self.recvs, self.phase = sends, recvs, ""


class VirtualExchange:
    """As an engine whose slots have depth 1 and are posted and awaited by all ranks in turn."""

    kind = "threads"

    def __init__(self, world):
        self.world, self._made, self._arrived, self.sent_bytes, self.posts = world, [], {}, 0, 0

    def slot(self, name, sends, recvs, depth):
        assert depth == 1
        self._made.append(VirtualSlot(sends, recvs))
        return self._made[-1]

    def freeze(self, phase):
        for slot in self._made:
            slot.phase = phase
        self._made = []

    def acquire(self, slot):
        pass

    def post(self, slot):
        mine = {send.peer: send.buffers[0].clone() for send in slot.sends}
        everyone = self.world.hub.gather(self.world.rank, mine)
        self._arrived[slot] = [(recv, everyone[recv.peer][self.world.rank]) for recv in slot.recvs]
        self.sent_bytes += sum(x.nbytes for x in mine.values())
        self.posts += 1

    def wait(self, slot):
        for recv, value in self._arrived.pop(slot):
            recv.buffers[0].copy_(value)

    def step(self):
        return contextlib.nullcontext()

    def stats(self):
        return {"sent_bytes": self.sent_bytes, "posts": self.posts, "wait_s": 0.0, "wait_s_by_slot": {}}

    def abort(self, reason):
        self.world.hub.fail()

    def release(self, phase):
        pass

    def close(self):
        pass


def run(size, target):
    """[target(VirtualWorld) of each rank], each in a thread of its own. Raises what one of them raised."""
    hub, results, errors = Hub(size), [None] * size, []

    def one(rank):
        try:
            results[rank] = target(VirtualWorld(hub, rank))
        except BaseException as error:
            errors.append(error)
            hub.fail()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    first = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)] or errors
    if first:
        raise first[0]
    return results
