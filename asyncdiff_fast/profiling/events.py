"""One rank's trace: what is kept of what torch's profiler writes, and that as ranges, operators and kernels."""

from dataclasses import dataclass, field

from . import words

# Of what torch's profiler writes: operators, ranges, what the device runs and who launched it.
_KEPT = {
    "cpu_op", "user_annotation", "gpu_user_annotation", "kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime",
    "cuda_driver", "ac2g",
}  # fmt: skip
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


@dataclass(frozen=True)
class Range:
    """Something that has a name of ours; times in µs of the clock that all ranks share."""

    kind: str
    what: str
    begin: float
    end: float
    facts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Kernel:
    """Something that a device runs; `launched` is when the host asked for it."""

    begin: float
    end: float
    is_exchange: bool
    launched: float


@dataclass(frozen=True)
class RankTrace:
    """What one rank did: `ranges` of the thread that calls denoisers, its `operators` (begin, end), and `kernels`."""

    rank: int
    ranges: tuple
    operators: tuple
    kernels: tuple = ()


def slim(trace):
    """What is kept of the JSON of torch's profiler: times in ns since 1970, and whether it is on the host.

    Returns: [event], as in the trace, with `ts` and `dur` in ns, and ranges of ours by their own names.
    """
    base, found = trace.get("baseTimeNanoseconds", 0), []
    for event in trace["traceEvents"]:
        if event.get("cat") not in _KEPT:
            continue
        event = {"args": {}} | event | {"ts": base + round(event["ts"] * 1000), "on_host": _on_host(event)}
        if "dur" in event:
            event["dur"] = round(event["dur"] * 1000)
        ours = words.parsed(event["name"])
        if ours is not None:
            kind, what, facts = ours
            event |= {"name": f"{kind} {what}".strip(), "args": {"kind": kind, "what": what, **facts}}
        found.append(event)
    return found


def _on_host(event):
    """Of an arrow, its beginning is."""
    return event["ph"] == "s" if event["cat"] == "ac2g" else event["cat"] not in {*_ON_DEVICE, "gpu_user_annotation"}


def read(rank, events, begin_ns):
    """The `RankTrace` of `slim` events, counted from a time."""

    def us(event):
        begin = (event["ts"] - begin_ns) / 1000
        return begin, begin + event.get("dur", 0) / 1000

    host = [e for e in events if e["on_host"] and e["cat"] in ("user_annotation", "cpu_op")]
    threads = {e["tid"] for e in host if e["args"].get("kind") == words.CALL}
    ours = [e for e in host if "kind" in e["args"] and e["tid"] in threads]
    made = [Range(a["kind"], a["what"], *us(e), _facts(a)) for e in ours for a in [e["args"]]]
    operators = [us(e) for e in host if e["cat"] == "cpu_op" and e["tid"] in threads]
    launches = {e["args"]["correlation"]: us(e)[0] for e in events if "correlation" in e["args"] and e["on_host"]}
    kernels = [
        Kernel(*us(e), "nccl" in e["name"].lower(), launches.get(e["args"].get("correlation"), us(e)[0]))
        for e in events
        if e["cat"] in _ON_DEVICE
    ]
    return RankTrace(
        rank,
        tuple(sorted(made, key=lambda r: (r.begin, -r.end))),
        tuple(operators),
        tuple(sorted(kernels, key=lambda k: k.begin)),
    )


def _facts(args):
    return {name: value for name, value in args.items() if name not in ("kind", "what")}
