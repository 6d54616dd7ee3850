"""Where the time of a step goes, on every rank: computing, waiting for others, the host's own work; and for whom."""

import bisect
import statistics
from dataclasses import dataclass

from . import words
from .intervals import common, total, union, without
from .turns import steady, turns


@dataclass(frozen=True)
class Message:
    """What one post sends to one rank: under way from the post until the wait for it is over, or for want of one until
    the slot is posted again. Times in µs.
    """

    source: int
    target: int
    slot: str
    nbytes: int
    begin: float
    end: float
    awaited: bool


@dataclass(frozen=True)
class Use:
    """Sets of times of one rank: what it computes, where it waits (exposed: nothing is computed meanwhile), `host`
    the rest; and `waits`: [(begin, end, slot, peers)].
    """

    compute: list
    wait: list
    waits: list


def messages(traces):
    """[Message] of all ranks, by time."""
    posts, waits = {}, {}
    for trace in traces:
        for r in trace.ranges:
            place = r.what, r.facts.get("phase"), r.facts.get("epoch")
            if r.kind == words.POST and r.facts["to"]:
                for target, nbytes in _sizes(r.facts["to"]):
                    posts.setdefault((trace.rank, target, *place), []).append((r.begin, nbytes))
            elif r.kind == words.WAIT and r.facts.get("peers") and "epoch" in r.facts:
                for source in map(int, r.facts["peers"].split(",")):
                    waits.setdefault((source, trace.rank, *place), []).append(r.end)
    found = []
    begins = {}
    for (source, target, slot, phase, _), sent in posts.items():
        begins.setdefault((source, target, slot, phase), []).extend(begin for begin, _ in sent)
    for (source, target, slot, phase, epoch), sent in posts.items():
        ends = sorted(waits.get((source, target, slot, phase, epoch), ()))
        again = sorted(begins[source, target, slot, phase])
        for begin, nbytes in sent:
            end = next((e for e in ends if e >= begin), None)
            later = next((b for b in again if b > begin), None)
            stop = end if end is not None else later
            if stop is not None:
                found.append(Message(source, target, slot, nbytes, begin, stop, end is not None))
    return sorted(found, key=lambda m: m.begin)


def _sizes(to):
    """[(rank, bytes)] of one post, one for each rank."""
    sums = {}
    for part in to.split(","):
        rank, nbytes = map(int, part.split(":"))
        sums[rank] = sums.get(rank, 0) + nbytes
    return sums.items()


def levels(messages, rank):
    """[(time, bytes that a rank has under way from then on)]."""
    changes = [(m.begin, m.nbytes) for m in messages if m.source == rank]
    changes += [(m.end, -m.nbytes) for m in messages if m.source == rank]
    found, now = [], 0
    for time, change in sorted(changes):
        now += change
        found.append((time, now))
    return found


def use(trace):
    """The `Use` of a rank: of its device if that is seen, else of the thread that calls the denoiser."""
    return _device_use(trace) if trace.kernels else _host_use(trace)


def _host_use(trace):
    held = [r for r in trace.ranges if r.kind in (words.WAIT, words.AGREE)]
    outer, waits = [], []
    for r in held:
        # A wait within another one is a part of it.
        if not outer or r.begin >= outer[-1].end:
            outer.append(r)
            waits.append((r.begin, r.end, r.what, r.facts.get("peers", "")))
    wait = union([w[:2] for w in waits])
    return Use(without(union(trace.operators), wait), wait, waits)


def _device_use(trace):
    compute = union([(k.begin, k.end) for k in trace.kernels if not k.is_exchange])
    wait = without(union([(k.begin, k.end) for k in trace.kernels if k.is_exchange]), compute)
    after = sorted((k.begin, k.launched) for k in trace.kernels if not k.is_exchange)
    ordered = [r for r in trace.ranges if r.kind == words.WAIT]
    begins, waits = [r.begin for r in ordered], []
    for begin, end in wait:
        # Whoever ordered the stream after the slot last, before what runs next was launched, has let it wait.
        i = bisect.bisect_left(after, (end - 1e-3,))
        j = bisect.bisect_right(begins, after[i][1]) - 1 if i < len(after) else -1
        cause = ordered[j] if j >= 0 else None
        waits.append((begin, end, cause.what if cause else "", cause.facts.get("peers", "") if cause else ""))
    return Use(compute, wait, waits)


def account(traces, largest=10):
    """Dict, fit for JSON: of each rank the ms of a step, the largest waits of all, imbalance; None without a step."""
    ranks, waits = [], {}
    for trace in traces:
        found = turns(trace)
        if not found:
            return None
        chosen, used = steady(found), use(trace)
        steps = sum(t.steps for t in chosen)
        window = union([(t.begin, t.end) for t in chosen])
        whole, compute, wait = total(window), total(common(used.compute, window)), total(common(used.wait, window))
        post = total(common(union([(r.begin, r.end) for r in trace.ranges if r.kind == words.POST]), window))
        ranks.append(
            {
                "rank": trace.rank,
                "steps": steps,
                "step_ms": whole / steps / 1e3,
                "compute_ms": compute / steps / 1e3,
                "wait_ms": wait / steps / 1e3,
                "host_ms": (whole - compute - wait) / steps / 1e3,
                "post_ms": post / steps / 1e3,
                "wait_share": wait / whole,
                "host_share": (whole - compute - wait) / whole,
            }
        )
        for begin, end, slot, peers in used.waits:
            inside = total(common([(begin, end)], window))
            if inside > 0:
                waits.setdefault((trace.rank, slot, peers), []).append(inside / steps / 1e3)
    rows = [
        {"rank": rank, "slot": slot, "peers": peers, "waits": len(each), "wait_ms": sum(each)}
        for (rank, slot, peers), each in waits.items()
    ]
    computed = [r["compute_ms"] for r in ranks]
    mean = statistics.mean(computed)
    return {
        "measured": "the device" if any(t.kernels for t in traces) else "the host",
        "steps": "with stale or predicted inputs" if any(t.stale for t in turns(traces[0])) else "exact",
        "ranks": ranks,
        "imbalance": max(computed) / mean - 1 if mean else 0.0,
        "largest_waits": sorted(rows, key=lambda row: -row["wait_ms"])[:largest],
    }
