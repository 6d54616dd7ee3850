"""Carries out what `recorder.py` recorded on several ranks, on the double; and says which waits it rests on.

Without torch. A program is one rank's (sizes of memories, events).
"""

import threading

from channels import connect, verdict
from double import Double

TIMEOUT_S = 20.0


class _Player:
    """One rank of a replay."""

    def __init__(self, rank, sizes, on_error):
        self.rank, self.gpu, self.channel, self.on_error = rank, rank.gpu, rank.channel, on_error
        self.memories = [self.gpu.memory(n, f"rank {rank.rank} memory {i}") for i, n in enumerate(sizes)]
        self.numbers, self.phases = {}, {}

    def play(self, events):
        try:
            with self.gpu.rank(self.rank.rank):
                for kind, *rest in events:
                    getattr(self, f"_{kind}")(*rest)
        except Exception as error:
            self.on_error(error)

    def _ranges(self, places):
        return [self.memories[memory].part(begin, nbytes) for memory, begin, nbytes in places]

    def _slot(self, number, name, sends, recvs, depth):
        def listed(side):
            return [(peer, [self.memories[m].address + begin for m, begin, _ in p], p[0][2]) for peer, p in side]

        self.numbers[number] = self.channel.add(name, listed(sends), listed(recvs), depth)

    def _freeze(self, phase, numbers):
        self.phases[phase] = [self.numbers[n] for n in numbers]
        self.rank.meeting.freeze(self.rank, phase, self.phases[phase], patient=True)

    def _release(self, phase):
        self.channel.release(phase)
        del self.phases[phase]

    def _drain(self, phases):
        self.channel.drain([n for p, numbers in self.phases.items() if phases is None or p in phases for n in numbers])

    def _acquire(self, number):
        self.channel.acquire(self.numbers[number], self.rank.compute)

    def _post(self, number):
        self.channel.post(self.numbers[number], self.rank.compute)

    def _wait(self, number, lag):
        self.channel.wait(self.numbers[number], self.rank.compute, lag)

    def _kernel(self, name, reads, writes):
        self.gpu.kernel(self.rank.compute, name, self._ranges(reads), self._ranges(writes))


def replay(path, extension, programs, without=None, delay_us=0, seed=0, puts=False):
    """Replay programs side by side, a thread for each rank.

    Args:
        without: (rank, index) of an event that is left out.
        puts: one-sided.
    Returns: (what is stuck, races, texts of errors, the first one first).
    """
    with Double(path, delay_us, seed) as gpu:
        ranks = connect(gpu, extension, len(programs), timeout_s=TIMEOUT_S, puts=puts)
        threads, errors = [], []

        def stop(error):
            """Nobody need wait for a rank that has failed; what the others then raise follows from it."""
            # Its text alone: a traceback would keep this rank's events beyond the double that numbers them.
            errors.append(str(error))
            for rank in ranks:
                rank.channel.abort("over")
            ranks[0].meeting.end()

        for rank, (sizes, events) in zip(ranks, programs, strict=True):
            left_out = without[1] if without and without[0] == rank.rank else None
            played = [event for i, event in enumerate(events) if i != left_out]
            threads.append(threading.Thread(target=_Player(rank, sizes, stop).play, args=(played,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stuck, races, _ = verdict(gpu, ranks)
        return stuck, races, errors


def unordered(program, without=None):
    """Accesses that would race in one rank's program: [(event, name)], found by counting posts alone.

    The lane works in order, so a stream that has waited for a post has waited for all before it. A kernel may touch
    what a post receives, and write what it sends, only once it has waited for that post or a later one.
    """
    slots, epochs, order, ordered = {}, {}, [], 0
    phases, found = {}, []
    for i, (kind, *rest) in enumerate(program[1]):
        if kind == "slot":
            number, _, sends, recvs, depth = rest
            slots[number], epochs[number] = (sends, recvs, depth), []
        elif kind == "freeze":
            phases[rest[0]] = rest[1]
        elif kind == "post":
            sends, recvs, depth = slots[rest[0]]
            turn = len(epochs[rest[0]]) % depth
            order.append(tuple([places[turn] for _, places in side] for side in (sends, recvs)))
            epochs[rest[0]].append(len(order))
        elif kind == "kernel":
            name, reads, writes = rest
            if any(_touches(post, reads, writes) for post in order[ordered:]):
                found.append((i, name))
        elif i != without:
            ordered = max([ordered, *_awaited(kind, rest, slots, epochs, phases)])
    return found


def _awaited(kind, rest, slots, epochs, phases):
    """Numbers of the posts that an event waits for."""
    if kind in ("drain", "release"):
        wanted = [rest[0]] if kind == "release" else phases if rest[0] is None else rest[0]
        return [post for phase in wanted for number in phases[phase] for post in epochs[number]]
    number, back = rest[0], 1 + rest[1] if kind == "wait" else slots[rest[0]][2]
    return epochs[number][-back:][:1] if len(epochs[number]) >= back else []


def _touches(post, reads, writes):
    sent, received = post
    return any(_overlap(a, b) for a in received for b in (*reads, *writes)) or any(
        _overlap(a, b) for a in sent for b in writes
    )


def _overlap(a, b):
    return a[0] == b[0] and a[1] < b[1] + b[2] and b[1] < a[1] + a[2]
