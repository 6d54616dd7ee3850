"""All ranks' traces as one, in the format of chrome://tracing, which Perfetto reads."""

from . import words
from .account import levels

# Numbers of processes: this many for each rank, its devices after its host.
_PIDS = 100


def chrome(everyone, begin_ns, messages, blocks):
    """The trace as a dict, fit for JSON; times in µs.

    Args:
        everyone: [`slim` events] of each rank, on one clock.
        begin_ns: where time begins.
        messages: [`Message`]: arrows from a post to the wait for it, and a counter of bytes under way for each rank.
        blocks: {rank: [(begin, end, name)]} of steps side by side, a lane of their own.
    """
    made = []
    for rank, events in enumerate(everyone):
        pids = {"host": _PIDS * rank}
        for event in events:
            device = "host" if event["on_host"] else f"device {event['pid']}"
            made.append(_moved(event, rank, pids.setdefault(device, _PIDS * rank + len(pids)), begin_ns))
        for device, pid in pids.items():
            for name, args in (("name", {"name": f"rank {rank}, {device}"}), ("sort_index", {"sort_index": pid})):
                made.append({"ph": "M", "pid": pid, "tid": 0, "name": f"process_{name}", "args": args})
        for begin, end, name in blocks.get(rank, ()):
            place = {"pid": pids["host"], "tid": 0, "ts": begin, "dur": end - begin}
            made.append({"ph": "X", "cat": "block", "name": name, **place})
        counter = {"ph": "C", "pid": pids["host"], "name": "bytes under way"}
        made += [counter | {"ts": time, "args": {"bytes": nbytes}} for time, nbytes in levels(messages, rank)]
    return {"displayTimeUnit": "ms", "traceEvents": made + _arrows(messages, everyone)}


def _moved(event, rank, pid, begin_ns):
    """An event of one rank, among those of all."""
    moved = {name: value for name, value in event.items() if name != "on_host"}
    moved |= {"pid": pid, "ts": (event["ts"] - begin_ns) / 1000}
    if "dur" in event:
        moved["dur"] = event["dur"] / 1000
    if "id" in event:
        moved["id"] = f"{rank}.{event['id']}"
    return moved


def _arrows(messages, everyone):
    threads = {}
    for rank, events in enumerate(everyone):
        calls = [e["tid"] for e in events if e["args"].get("kind") == words.CALL and e["on_host"]]
        threads[rank] = calls[0] if calls else 0
    found = []
    for number, m in enumerate(messages):
        if m.awaited:
            for phase, rank, time in (("s", m.source, m.begin), ("f", m.target, m.end)):
                found.append(
                    {"ph": phase, "bp": "e", "cat": "message", "name": m.slot, "id": f"m{number}", "ts": time,
                     "pid": _PIDS * rank, "tid": threads[rank]}
                )  # fmt: skip
    return found
