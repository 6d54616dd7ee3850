"""Channels of several ranks on the double, driven by one thread; without torch."""

import threading
import time
from collections import Counter
from dataclasses import dataclass

from double import Memory

# Longer than any rank takes to come.
PATIENCE_S = 60


@dataclass(frozen=True)
class Slot:
    """One rank's side of a slot: its number in the channel, and `depth` buffers for each peer it hears or tells."""

    number: int
    name: str
    depth: int
    send: tuple[Memory, ...]
    recv: dict[int, tuple[Memory, ...]]


class Meeting:
    """Where ranks freeze a phase together: each then knows the windows of all, as through the store of a `World`.

    It holds no `Rank`: ranks hold it, and in a ring of references a channel would outlive the double that numbers its
    events, to destroy those of the next one.
    """

    def __init__(self, size):
        self._size, self._phases, self._changed, self._over = size, {}, threading.Condition(), False

    def freeze(self, rank, phase, numbers, patient=False):
        """Freeze on every rank once the last has come. `patient`: wait for that, in a thread of this rank's own."""
        with self._changed:
            # The same name again is another phase, once the first is over.
            come = self._phases.setdefault(phase, {})
            come[rank.rank] = rank.channel, rank.gpu.rank, numbers
            if len(come) == self._size:
                self._phases.pop(phase)
                self._freeze(phase, [come[r] for r in range(self._size)])
                self._changed.notify_all()
            elif patient:
                self._changed.wait_for(lambda: self._over or self._phases.get(phase) is not come, PATIENCE_S)
                if self._phases.get(phase) is come:
                    raise TimeoutError(f"ranks {sorted(come)} alone have frozen {phase}")

    def end(self):
        """Nobody need wait any longer for a rank that will not come."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _freeze(self, phase, everyone):
        windows = [channel.window(numbers) for channel, _, numbers in everyone]
        for rank, (channel, on, numbers) in enumerate(everyone):
            with on(rank):
                channel.freeze(phase, numbers, windows)


class Rank:
    """One rank: `channel`, `compute` (a stream), and what a patched model does with them.

    What travels is one number in every byte: see `value`. Reads expect the number of their epoch, so a wrong order
    shows in the data as well.
    """

    def __init__(self, gpu, rank, channel, meeting):
        self.gpu, self.rank, self.channel, self.meeting = gpu, rank, channel, meeting
        self.compute = gpu.stream(rank)
        # {number of a slot: how often it was posted}
        self._epochs = Counter()

    def slot(self, name, sends=(), recvs=(), nbytes=64, depth=2):
        """Add a slot that sends the same to some peers and receives from others."""

        def buffers(what):
            return tuple(self.gpu.memory(nbytes, f"device {self.rank} {name} {what}[{p}]") for p in range(depth))

        send, recv = buffers("send") if sends else (), {peer: buffers(f"recv {peer}") for peer in recvs}
        listed = [(peer, [m.address for m in send], nbytes) for peer in sends]
        awaited = [(peer, [m.address for m in memories], nbytes) for peer, memories in recv.items()]
        with self.gpu.rank(self.rank):
            number = self.channel.add(name, listed, awaited, depth)
        return Slot(number, name, depth, send, recv)

    def freeze(self, *slots, phase="phase"):
        """Takes effect when every rank has come to it."""
        self.meeting.freeze(self, phase, [slot.number for slot in slots])

    def acquire(self, slot, stream=None):
        self.channel.acquire(slot.number, stream or self.compute)

    def produce(self, slot, stream=None):
        """Write what the next post sends."""
        epoch = self._epochs[slot.number]
        writes = [slot.send[epoch % slot.depth].filled(value(self.rank, slot.name, epoch))] if slot.send else []
        self.gpu.kernel(stream or self.compute, f"produce {slot.name}", writes=writes)

    def post(self, slot, stream=None):
        self.channel.post(slot.number, stream or self.compute)
        self._epochs[slot.number] += 1

    def wait(self, slot, lag=0, stream=None):
        self.channel.wait(slot.number, stream or self.compute, lag)

    def expected(self, slot, lag=0):
        """Ranges of what the epoch `lag` posts ago received; none before the first."""
        epoch = self._epochs[slot.number] - 1 - lag
        if epoch < 0:
            return []
        return [m[epoch % slot.depth].filled(value(peer, slot.name, epoch)) for peer, m in slot.recv.items()]

    def consume(self, slot, lag=0, stream=None):
        """Read what the epoch `lag` posts ago received."""
        self.gpu.kernel(stream or self.compute, f"consume {slot.name}", reads=self.expected(slot, lag))

    def send_once(self, slot):
        """acquire, produce, post."""
        self.acquire(slot)
        self.produce(slot)
        self.post(slot)

    def join(self, waiting, awaited):
        """One stream of this rank waits for another."""
        self.gpu.join(waiting, awaited, self.rank)


def value(rank, name, epoch):
    """The number that a rank sends in one epoch of a slot; neighbours in any of the three differ."""
    return (1 + 7 * epoch + 61 * rank + 17 * sum(name.encode())) % 251


def connect(gpu, extension, size, timeout_s=30.0, puts=False):
    """`size` ranks with a channel each, connected by the double of NCCL."""
    libraries = extension.Libraries(gpu.path, gpu.path)
    unique_id, transports = extension.unique_id(libraries), []
    for rank in range(size):
        with gpu.rank(rank):
            transports.append(extension.NcclTransport(libraries, unique_id, rank, size, timeout_s, puts=puts))
    while not all([transport.ready() for transport in transports]):
        time.sleep(1e-4)
    ranks, meeting = [], Meeting(size)
    for rank, transport in enumerate(transports):
        with gpu.rank(rank):
            ranks.append(Rank(gpu, rank, extension.Channel(transport, timeout_s=timeout_s), meeting))
    return ranks


def ring(ranks, name="ring", depth=2, nbytes=64):
    """A slot of every rank that sends to the next and receives from the one before; frozen as a phase of its own."""
    slots = []
    for r in ranks:
        slot = r.slot(name, [(r.rank + 1) % len(ranks)], [(r.rank - 1) % len(ranks)], nbytes, depth)
        r.freeze(slot, phase=name)
        slots.append(slot)
    return slots


def kinds(races):
    """{(kind, earlier access, later access)}, by the first words of what they do.

    One-sided, what sends or receives is a copy from or into the slot's memory.
    """

    def word(access, memory):
        found = access.split()[2]
        side = "send" if " send[" in memory else "recv" if " recv " in memory else found
        return side if found == "copy" else found

    return {(race.kind, word(race.first, race.memory), word(race.second, race.memory)) for race in races}


def verdict(gpu, ranks):
    """Run dry and close. Returns (what is stuck, races, wrong reads); a stuck channel is aborted."""
    stuck = gpu.drain()
    for r in ranks:
        if stuck or r.channel.broken():
            r.channel.abort("over")
    gpu.drain()
    for r in ranks:
        r.channel.close()
    return stuck, gpu.races(), gpu.wrong_reads()
