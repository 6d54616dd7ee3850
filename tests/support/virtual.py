"""Ranks that are threads of one process, behind the interfaces of `World` and of an exchange: many at once."""

import contextlib
import threading

from asyncdiff_fast.exchange.world import World

PATIENCE_S = 120


class Hub:
    """What some threads share: a place where all meet, what each brings, and messages from one to another."""

    def __init__(self, size):
        self.size = size
        self._barrier = threading.Barrier(size, timeout=PATIENCE_S)
        self._brought, self._within = [None] * size, {}
        self._mail, self._arrived, self._failed = {}, threading.Condition(), False

    def along(self, ranks):
        """What some of these threads share."""
        with self._arrived:
            return self._within.setdefault(ranks, Hub(len(ranks)))

    def gather(self, rank, value):
        """What every thread brings, in order."""
        self._brought[rank] = value
        self._barrier.wait()
        everyone = list(self._brought)
        self._barrier.wait()
        return everyone

    def send(self, key, message):
        """Leave a message under a key of its own."""
        with self._arrived:
            self._mail[key] = message
            self._arrived.notify_all()

    def receive(self, key):
        """The message of a key, waited for."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: self._failed or key in self._mail, PATIENCE_S) or self._failed:
                raise threading.BrokenBarrierError
            return self._mail.pop(key)

    def fail(self):
        """Nobody need wait any more."""
        with self._arrived:
            self._failed = True
            self._arrived.notify_all()
        self._barrier.abort()
        for hub in self._within.values():
            hub.fail()


class VirtualWorld:
    """As `World`, of threads."""

    timeout_s = PATIENCE_S

    def __init__(self, hub, rank, ranks=None):
        self.hub, self.rank, self.size = hub, rank, hub.size
        self.ranks, self.calls = ranks or tuple(range(hub.size)), 0
        self.name = self.ranks[rank]

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
        """These threads, some of them, or one alone."""
        ranks = tuple(ranks)
        if len(ranks) in (1, self.size):
            return self if len(ranks) == self.size else World(ranks, self.timeout_s)
        return VirtualWorld(self.hub.along(ranks), ranks.index(self.name), ranks)


class _Silent:
    def tell(self, number, value):
        pass

    def look(self):
        return None

    def forget(self):
        pass


class VirtualSlot:
    def __init__(self, sends, recvs, depth):
        self.sends, self.recvs, self.depth = sends, recvs, depth
        self.phase, self.number, self.epoch = "", 0, 0
        # Epochs that were posted and are not over.
        self.pending = []


class VirtualExchange:
    """As an engine: what is posted arrives where it is awaited."""

    kind = "threads"

    def __init__(self, world):
        self.world, self._made, self._slots, self.sent_bytes, self.posts = world, [], [], 0, 0

    def slot(self, name, sends=(), recvs=(), depth=2):
        self._made.append(VirtualSlot(sends, recvs, depth))
        return self._made[-1]

    def freeze(self, phase, order=None):
        made, self._made = self._made, []
        for slot, number in zip(made, range(len(made)) if order is None else order, strict=True):
            slot.phase, slot.number = phase, number
        self._slots += made

    def acquire(self, slot):
        pass

    def post(self, slot):
        parity, mine = slot.epoch % slot.depth, {}
        for send in slot.sends:
            mine.setdefault(send.peer, []).append(send.buffers[parity].clone())
        for peer, message in mine.items():
            self.world.hub.send((slot.phase, slot.number, slot.epoch, self.world.rank, peer), message)
            self.sent_bytes += sum(x.nbytes for x in message)
        slot.pending.append(slot.epoch)
        slot.epoch += 1
        self.posts += 1

    def wait(self, slot, lag=0):
        assert 0 <= lag < slot.depth
        while slot.pending and slot.pending[0] < slot.epoch - lag:
            epoch = slot.pending.pop(0)
            key = slot.phase, slot.number, epoch
            found = {p: self.world.hub.receive((*key, p, self.world.rank)) for p in {r.peer for r in slot.recvs}}
            for recv in slot.recvs:
                recv.buffers[epoch % slot.depth].copy_(found[recv.peer].pop(0))

    def drain(self, phases=None):
        for slot in self._slots:
            if phases is None or slot.phase in phases:
                self.wait(slot)

    def step(self):
        return contextlib.nullcontext()

    def stats(self):
        return {"sent_bytes": self.sent_bytes, "posts": self.posts, "wait_s": 0.0, "wait_s_by_slot": {}}

    def abort(self, reason):
        self.world.hub.fail()

    def release(self, phase):
        self._slots = [slot for slot in self._slots if slot.phase != phase]

    def clear_stats(self):
        self.sent_bytes = self.posts = 0

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
