"""Ranks that compute, post and wait, each on a clock of its own. Pure.

Ranks act in the order of their clocks, so that messages go through a port in the order in which they are posted. A
message leaves when both ports are free, keeps them busy while its bytes go, and arrives a latency later.
"""

import heapq
from collections import defaultdict
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Compute:
    """So many seconds of work."""

    seconds: float


@dataclass(frozen=True)
class Post:
    """Messages under one key: ((rank, bytes), ...)."""

    key: tuple
    targets: tuple


@dataclass(frozen=True)
class Wait:
    """Goes on when the message of a key has come from a rank."""

    key: tuple
    source: int


@dataclass(frozen=True)
class Mark:
    """Notes when a rank gets here."""

    name: object


@dataclass
class Timeline:
    """What became of each rank: seconds waited and bytes sent; {name: {rank: (time, waited, sent)}} of marks."""

    waits: list
    sent: list
    marks: dict = field(default_factory=dict)

    def at(self, name):
        """When the last rank came to a mark."""
        return max(time for time, _, _ in self.marks[name].values())


class Deadlock(RuntimeError):
    """Ranks wait for messages that nobody posts."""


def run(programs, cluster):
    """Carry out the programs of all ranks: iterables of `Compute`, `Post`, `Wait` and `Mark`.

    Returns: `Timeline`. Raises: `Deadlock` that names the first rank which waits for ever, and for what.
    """
    steps = [iter(program) for program in programs]
    n = len(steps)
    line = Timeline([0.0] * n, [0] * n)
    free, arrived, parked, debt = defaultdict(float), {}, {}, [0.0] * n
    ready = [(0.0, rank) for rank in range(n)]
    while ready:
        now, rank = heapq.heappop(ready)
        for op in steps[rank]:
            if type(op) is Compute:
                now += op.seconds + debt[rank]
                debt[rank] = 0.0
            elif type(op) is Post:
                for target, nbytes in op.targets:
                    place = (op.key, rank, target)
                    arrived[place] = _sent(cluster, free, debt, now, rank, target, nbytes)
                    line.sent[rank] += nbytes
                    if place in parked:
                        since = parked.pop(place)
                        comes = max(since, arrived.pop(place))
                        _waited(line, debt, target, comes - since)
                        heapq.heappush(ready, (comes, target))
            elif type(op) is Wait:
                place = (op.key, op.source, rank)
                comes = arrived.pop(place, None)
                if comes is None:
                    parked[place] = now
                    break
                _waited(line, debt, rank, max(0.0, comes - now))
                now = max(now, comes)
            else:
                line.marks.setdefault(op.name, {})[rank] = now, line.waits[rank], line.sent[rank]
                continue
            # Others may be behind: they act first.
            if ready and ready[0][0] < now:
                heapq.heappush(ready, (now, rank))
                break
    if parked:
        (key, source, rank), _ = next(iter(parked.items()))
        raise Deadlock(f"rank {rank} waits for {key} of rank {source}, which it does not post")
    return line


def _waited(line, debt, rank, seconds):
    """A rank has waited: what messages took of its own is over by then, or the less."""
    line.waits[rank] += seconds
    debt[rank] = max(0.0, debt[rank] - seconds)


def _sent(cluster, free, debt, now, source, target, nbytes):
    """When a message arrives."""
    link, (out, into) = cluster.link(source, target), cluster.ports(source, target)
    seconds = link.transfer_s(nbytes)
    leaves = max(now, free[out], free[into])
    free[out] = free[into] = leaves + seconds
    lost = link.steals * seconds + link.host_s
    debt[source] += lost
    debt[target] += lost
    return leaves + seconds + link.latency_s
