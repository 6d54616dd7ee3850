"""What one rank of several computes in an asynchronous call, launched and replayed in pieces: one process, no others.

    python benchmarks/pieces.py --model sdxl --ways stages patches --save
    python benchmarks/pieces.py --device cpu --model tiny

As on one of the ranks, but nothing travels: posts and waits are counted and do nothing, what would have come is what
the last exact call has left. Both ways take turns on the same buffers. `host`: seconds until the host has launched a
call; `call`: until the device has done it as well, which is what a rank takes where it waits for nobody. On the CPU
calls are launched both times, to try the script.
"""

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import sys
import time

import measure
import torch
from patch_compute import FOR_CPU, load
from real_models import MODELS

from asyncdiff_fast.calls.clock import Tick
from asyncdiff_fast.calls.schedule import PatchMode
from asyncdiff_fast.calls.signature import CallSignature
from asyncdiff_fast.config import Config
from asyncdiff_fast.exchange.slots import Slot
from asyncdiff_fast.exchange.world import World
from asyncdiff_fast.fused.device_layers import DeviceLayers
from asyncdiff_fast.patches.alone import LonePlanner
from asyncdiff_fast.patches.calls import Patches
from asyncdiff_fast.shared import Shared
from asyncdiff_fast.stages.calls import StageCalls

WAYS = {"stages": "num_stages", "patches": "num_patches"}
WARMUP_STEPS = 2
# Launched until every kernel is compiled and chosen, and the pieces are captured.
BEFORE = 5
LEAST_S = 20


class Silence:
    """Slots that go nowhere; posts and waits are counted."""

    kind = "none"

    def __init__(self):
        self.posts = self.waits = 0

    def slot(self, name, sends=(), recvs=(), depth=2):
        """As an exchange's."""
        return Slot(name, tuple(sends), tuple(recvs), depth, -1)

    def post(self, slot):
        """Counts."""
        self.posts += 1
        slot.epoch += 1

    def wait(self, slot, lag=0):
        """Counts."""
        self.waits += 1

    def step(self):
        """As an exchange's."""
        return contextlib.nullcontext()

    def nothing(self, *_):
        """Neither waits nor compares."""

    freeze = acquire = drain = release = nothing


class Pretended:
    """A `World` of ranks that all say what this one says."""

    def __init__(self, rank, size):
        self.rank, self.size, self.ranks = rank, size, tuple(range(size))

    def gather(self, value, what):
        """As a world's."""
        return [value] * self.size

    def broadcast(self, value, what):
        """As a world's."""
        return value


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=(*FOR_CPU, *MODELS), default="tiny")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--kernels", choices=("auto", "triton", "torch"), nargs="+", default=["auto"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--save", action="store_true", help="append rows to benchmarks/results/pieces.jsonl")
    return parser.parse_args(argv)


def stage_call(shared, layers, options, inputs, exchange):
    """(function of whether to replay that carries out a stale call, bytes that this rank keeps for others)."""
    calls = StageCalls(shared, Pretended(options.rank, options.ranks), exchange)
    forward = layers.launched(shared.denoiser.forward, shared.signature.latent)
    steps, planning = itertools.count(), functools.partial(contextlib.nullcontext, shared.denoiser.forward)

    def call(replayed):
        calls._graphs = shared.graphs if replayed else None
        step = next(steps)
        return calls.call(Tick(step == 0, step, 0), "inputs", planning, forward, (), inputs)[0]

    for _ in range(WARMUP_STEPS):
        call(False)
    return call, calls.plan.buffer_bytes(options.rank), lambda: calls.forget(released=True)


def patch_call(shared, layers, options, inputs, exchange):
    """The same of a patch."""
    calls = Patches(shared, None, exchange)
    layers.choice.patches = calls
    forward = layers.launched(shared.denoiser.forward, shared.signature.latent)
    plan, emulated = LonePlanner(shared, calls.hooks).emulate(options.rank, forward, (), inputs, exchange)

    def call(replayed):
        through = functools.partial(shared.graphs.call, of="patch", launches=2) if replayed else None
        return emulated(PatchMode.DISPLACED, through)

    with layers.learning():
        for mode in (PatchMode.SYNC, PatchMode.DISPLACED, PatchMode.DISPLACED):
            emulated(mode)
    return call, plan.memory_bytes(options.rank), lambda: calls.forget(released=True)


def seconds(call, device):
    """(until the host has launched a call, until it is done)."""
    began = time.perf_counter()
    call()
    launched = time.perf_counter() - began
    if device == "cuda":
        torch.cuda.synchronize()
    return launched, time.perf_counter() - began


@torch.no_grad()
def row(options, way, kernels):
    """The row of one way to share calls."""
    denoiser, inputs, _ = load(options.model, options.device, None)
    config = Config.from_options(
        {WAYS[way]: options.ranks, "graphs": True, "kernels": kernels, "warmup_steps": WARMUP_STEPS}
    )
    signature, exchange = CallSignature(denoiser), Silence()
    layers = DeviceLayers(denoiser, config, World([0], 1.0), options.device, signature)
    # As on one of several ranks, which keep nothing for each other's modules.
    layers.choice.alone = False
    shared = Shared(denoiser, config, signature, layers.packed, layers.choice, None, layers.graphs)
    layers.begin()
    made = stage_call if way == "stages" else patch_call
    call, buffer_bytes, forget = made(shared, layers, options, inputs, exchange)
    try:
        launched, replayed = functools.partial(call, False), functools.partial(call, True)
        for _ in range(BEFORE):
            launched()
            replayed()
        exchange.posts = exchange.waits = 0
        pairs = [(seconds(launched, options.device), seconds(replayed, options.device)) for _ in range(options.rounds)]
        found = {"model": options.model, "way": way, "ranks": options.ranks, "rank": options.rank, "mode": kernels}
        found |= {"buffer_bytes": buffer_bytes, "graphs": layers.graphs.summary(), "kernels": layers.choice.summary()}
        found |= {name: getattr(exchange, name) / (2 * options.rounds) for name in ("posts", "waits")}
        for i, name in enumerate(("host", "call")):
            found[f"{name}_launched"] = measure.summary([a[i] for a, _ in pairs])
            found[f"{name}_replayed"] = measure.summary([b[i] for _, b in pairs])
        return found | {"speedup": statistics.median(a[1] / b[1] for a, b in pairs)}
    finally:
        forget()
        layers.remove()


def main(argv):
    options, failures = parse(argv), measure.Failures()
    for way, kernels in itertools.product(options.ways, options.kernels):
        if measure.left_s() < LEAST_S:
            print(f"left out: {way} {kernels}", flush=True)
            continue
        with failures.kept(f"{way} {kernels}"):
            made = row(options, way, kernels)
            print(json.dumps(made), flush=True)
            ms = [
                f"{1e3 * made[f'{n}_{w}']['median_s']:.2f}" for n in ("host", "call") for w in ("launched", "replayed")
            ]
            told = f"ROW pieces of {options.model}, {way}, rank {options.rank} of {options.ranks}, kernels={kernels}: "
            told += f"host {ms[0]} -> {ms[1]} ms, call {ms[2]} -> {ms[3]} ms, {made['speedup']:.2f}x, {made['graphs']}"
            print(told, file=sys.stderr, flush=True)
            if options.save:
                measure.write_row("pieces", made)
    return min(1, failures.count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
