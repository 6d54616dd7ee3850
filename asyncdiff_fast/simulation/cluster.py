"""Devices and the links between them. Pure."""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Link:
    """A port through which bytes go one way at a time.

    `steals`: seconds of computing that each side loses for a second of transfer: 1 where processors copy, as on CPUs;
    0 where copy engines do. `host_s`: seconds of either side's own for each message.
    """

    latency_s: float
    gbs: float
    steals: float = 0.0
    host_s: float = 0.0

    def transfer_s(self, nbytes):
        """Seconds that a message keeps a port busy."""
        return nbytes / (self.gbs * 1e9)


# One direction of one device, or of one host, as makers state it: what arrives is less.
LINKS = {
    "nvlink3": Link(5e-6, 300),
    "nvlink4": Link(5e-6, 450),
    "nvbridge": Link(8e-6, 56),
    "pcie3": Link(1e-5, 16),
    "pcie4": Link(1e-5, 32),
    "pcie5": Link(1e-5, 64),
    "ib200": Link(1e-5, 25),
    "ib400": Link(1e-5, 50),
    "eth10": Link(5e-5, 1.25),
    "eth25": Link(5e-5, 3.125),
    "eth100": Link(3e-5, 12.5),
}


@dataclass(frozen=True)
class Cluster:
    """`nodes` hosts with `gpus` devices each; ranks are numbered host by host.

    `inside` is each device's link to those of its host; `between` each host's to the others, `nics` of them.
    """

    nodes: int = 1
    gpus: int = 1
    inside: Link = LINKS["nvlink4"]
    between: Link = LINKS["ib400"]
    nics: int = 1

    @property
    def size(self):
        """Devices in all."""
        return self.nodes * self.gpus

    def link(self, source, target):
        """The `Link` of a message, all network cards of a host taken together."""
        if source // self.gpus == target // self.gpus:
            return self.inside
        return replace(self.between, gbs=self.between.gbs * self.nics)

    def ports(self, source, target):
        """What a message keeps busy: a port that sends and one that receives."""
        a, b = source // self.gpus, target // self.gpus
        return (("out", source), ("in", target)) if a == b else (("host out", a), ("host in", b))


@dataclass(frozen=True)
class Request:
    """What `--simulate` asks for: a cluster, and how long a call takes on one device of it.

    `call_s` as measured, or `tflops` that a device reaches; both None: to be measured here.
    """

    cluster: Cluster
    call_s: float | None = None
    tflops: float | None = None


_NUMBERS = {"nodes": int, "gpus": int, "nics": int, "call_ms": float, "tflops": float}


def parse(text):
    """`nodes=4,gpus=8,link=ib400` as a `Request`.

    Items: nodes, gpus, nics (of a host), link (between hosts), inside (a host), call_ms, tflops.
    Raises: ValueError that names the item and what is allowed.
    """
    found = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        if name in _NUMBERS:
            try:
                found[name] = _NUMBERS[name](value)
            except ValueError:
                found[name] = 0
            if not 0 < found[name] < math.inf:
                kind = "an integer of at least 1" if _NUMBERS[name] is int else "a positive number"
                raise ValueError(f"{name} must be {kind}: got {item!r}")
        elif name in ("link", "inside"):
            if value not in LINKS:
                raise ValueError(f"{name} must be one of {', '.join(LINKS)}: got {item!r}")
            found[name] = LINKS[value]
        else:
            raise ValueError(f"what is simulated is told by {', '.join(_NUMBERS)}, link and inside: got {item!r}")
    if {"call_ms", "tflops"} <= set(found):
        raise ValueError(
            f"call_ms and tflops both say how fast a device is: got call_ms={found['call_ms']:g} and "
            f"tflops={found['tflops']:g}; leave one out"
        )
    call_ms, tflops = found.pop("call_ms", None), found.pop("tflops", None)
    if "link" in found:
        found["between"] = found.pop("link")
    return Request(Cluster(**found), call_ms and call_ms / 1e3, tflops)
