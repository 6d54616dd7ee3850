"""Which times of a rank's trace are a step, or a block of steps that run side by side."""

import statistics
from dataclasses import dataclass

from . import words

# A pause longer than this share of a step separates generations.
_PAUSE = 0.5


@dataclass(frozen=True)
class Turn:
    """A step, or a block of `steps`; times in µs. `stale`: not all of it is exact."""

    begin: float
    end: float
    steps: int
    stale: bool


def turns(trace):
    """[Turn] of a `RankTrace`: a step ends with the sampler's, or with the call where no sampler is seen."""
    of = {kind: [r for r in trace.ranges if r.kind == kind] for kind in (words.CALL, words.SAMPLER)}
    marks = [r for r in trace.ranges if r.kind in words.MARKS]
    ends = [r.end for r in of[words.SAMPLER] or of[words.CALL]]
    steps = _steps([r.begin for r in of[words.CALL]], ends)
    found, i = [], 0
    while i < len(steps):
        begin, end = steps[i]
        inside = [m for m in marks if begin <= m.begin < end]
        count = next((int(m.facts["n"]) for m in inside if m.kind == words.BLOCK), 1)
        last = min(i + count, len(steps)) - 1
        found.append(Turn(begin, steps[last][1], last - i + 1, bool(inside)))
        i = last + 1
    return found


def _steps(begins, ends):
    """[(begin, end)]: what lies between two steps belongs to the later one, unless it is a pause."""
    found, previous = [], None
    first = []
    for end in ends:
        mine = [b for b in begins if (previous is None or b >= previous) and b < end]
        first.append(min(mine) if mine else None)
        previous = end
    lengths = [end - b for b, end in zip(first, ends, strict=True) if b is not None]
    pause = _PAUSE * statistics.median(lengths) if lengths else 0.0
    previous = None
    for begin, end in zip(first, ends, strict=True):
        if begin is not None:
            follows = previous is not None and begin - previous <= pause
            found.append((previous if follows else begin, end))
        previous = end
    return found


def steady(found):
    """Those of the turns of one rank that say how fast a step is: the stale ones; of exact ones, all but the first."""
    stale = [t for t in found if t.stale]
    return stale or found[1:] or found
