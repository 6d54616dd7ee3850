"""Two hosts on one machine: a network namespace and numbers of processes of its own for each, a cable between them.

Run as a script it is one rank: patches, draws, and prints what it found as one line of JSON.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid

ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 29533


def why_not():
    """Why there can be no such hosts here, None if there can."""
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount-proc", "ip", "link", "add", "x", "type", "veth", "peer", "y"],
        capture_output=True,
        text=True,
    )
    named = f"adf-{uuid.uuid4().hex[:6]}"
    if tried.returncode == 0:
        tried = subprocess.run(["ip", "netns", "add", named], capture_output=True, text=True)
        subprocess.run(["ip", "netns", "del", named], capture_output=True)
    return None if tried.returncode == 0 else f"no network namespaces: {tried.stderr.strip() or tried.returncode}"


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)


class Hosts:
    """`start` and `cut` them; `delay_ms` is that of the cable, in each direction."""

    def __init__(self):
        self._names = [f"adf-{uuid.uuid4().hex[:6]}" for _ in ADDRESSES]

    def __enter__(self):
        _ip("link", "add", self._names[0], "type", "veth", "peer", "name", self._names[1])
        for name, address in zip(self._names, ADDRESSES, strict=True):
            _ip("netns", "add", name)
            _ip("link", "set", name, "netns", name)
            _ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_):
        for name in self._names:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)

    def start(self, host, command, **environment):
        """A process on a host."""
        inside = [
            "ip",
            "netns",
            "exec",
            self._names[host],
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        own = {"GLOO_SOCKET_IFNAME": self._names[host], "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*inside, *command], env=os.environ | own | environment, stdout=subprocess.PIPE, text=True
        )

    def cut(self):
        """Pull the cable."""
        _ip("-n", self._names[1], "link", "set", self._names[1], "down")

    def delay(self, milliseconds):
        """True if the cable takes that long from now on; the system may not be able to."""
        command = ["tc", "-n", self._names[1], "qdisc", "add", "dev", self._names[1], "root", "netem", "delay"]
        return subprocess.run([*command, f"{milliseconds}ms"], capture_output=True).returncode == 0


def found(process, timeout_s):
    """What the ranks of a process printed: [dict]."""
    try:
        out, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def _main(options, generations, flag):
    import torch
    import torch.distributed as dist
    from bare import Bare, noise

    import asyncdiff_fast

    torch.set_num_threads(1)
    model = Bare()

    @torch.no_grad()
    def draw(pause_s=0.0):
        x = torch.cat((noise(0, 16), noise(1, 16)))
        for t in torch.linspace(900, 50, 8):
            x = x - 0.05 * model(x, t)
            time.sleep(pause_s)
        return x.double().sum().item()

    runtime = asyncdiff_fast.patch(model, **options)
    result = {"rank": dist.get_rank(), "kinds": sorted({part.exchange.kind for part in runtime._parts}), "sums": []}
    try:
        for _ in range(generations):
            result["sums"].append(draw())
        if flag:
            open(f"{flag}-{result['rank']}", "w").close()
            began = time.monotonic()
            while True:
                began = time.monotonic()
                draw(0.05)
    except asyncdiff_fast.ExchangeError as error:
        result |= {"error": str(error), "seconds": time.monotonic() - began}
    print(json.dumps(result), flush=True)
    if flag:
        os._exit(0)
    asyncdiff_fast.unpatch(model)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
