"""What one rank of N computes in a call on its patch: one process, without the other ranks.

    python benchmarks/patch_compute.py --model sdxl --pixels 1024 2048 3840 --patches 1 2 4 8 --save
    python benchmarks/patch_compute.py --device cpu --model sd15_width --patches 2

No message travels: this is the compute side of the speed-up, and its limit, N. In place of the other ranks' rows and
keys it has what it sent to them in the calls before: numbers as the model makes them, since zeros cost a GPU less
power. Whole picture and patch take turns; on CPU their processor time is compared, on a GPU the time until the device
is done.
"""

import argparse
import functools
import json
import statistics
import sys
import time

import measure
import real_models
import torch
from single_device import captured

from asyncdiff_fast.calls.schedule import PatchMode
from asyncdiff_fast.calls.signature import CallSignature
from asyncdiff_fast.config import Config
from asyncdiff_fast.environment import parse_options
from asyncdiff_fast.exchange.world import World
from asyncdiff_fast.fused.device_layers import DeviceLayers
from asyncdiff_fast.patches.alone import LonePlanner
from asyncdiff_fast.patches.calls import Patches
from asyncdiff_fast.shared import Shared

# What one row of a large model may take.
LEAST_S = 20
# With their inputs; for the others a GPU is needed.
FOR_CPU = {"sd15_width": real_models.sd15_width, "tiny": real_models.tiny}


class Mirror:
    """Slots that go nowhere; their bytes are counted. While it `reflects`, every peer sends what it is sent."""

    kind = "none"

    def __init__(self):
        self.sent_bytes, self.reflects = 0, True

    def slot(self, name, sends=(), recvs=(), depth=2):
        """(bytes of a post, [(what is sent to a peer, the buffers for what it sends)])."""
        outgoing, pairs = {}, []
        for x in sends:
            outgoing.setdefault(x.peer, []).append(x.buffers[0])
        for x in recvs:
            back = outgoing.get(x.peer) or [y.buffers[0] for y in sends]
            pairs += [(back.pop(0), x.buffers)] if back else []
        return sum(x.buffers[0].nbytes for x in sends), pairs

    def post(self, slot):
        """Count the slot's bytes."""
        self.sent_bytes += slot[0]
        for sent, buffers in slot[1] if self.reflects else ():
            for received in buffers:
                # Uneven patches differ in size: the rows come round again.
                times = -(-received.numel() // sent.numel())
                received.view(-1).copy_(sent.reshape(-1).repeat(times)[: received.numel()])

    def nothing(self, *_):
        """Neither waits nor compares."""

    freeze = wait = acquire = drain = release = nothing


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=(*FOR_CPU, *real_models.MODELS), default="sd15_width")
    parser.add_argument("--pixels", type=int, nargs="+", metavar="SIZE", help="default: the model's own size")
    parser.add_argument("--patches", type=int, nargs="+", default=[2], metavar="N")
    parser.add_argument("--rank", type=int, default=None, help="default: one with a neighbour on each side, if any")
    parser.add_argument("--options", default="", help="options of patch(), such as group_norm=stale")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where a patch's call spends its time")
    parser.add_argument("--save", action="store_true", help="append rows to benchmarks/results/patch_compute.jsonl")
    return parser.parse_args(argv)


@functools.cache
def built(name, device):
    """(denoiser, its inputs or None, the forward of a twin with the same weights that stays unpatched)."""
    denoiser, inputs = FOR_CPU[name]() if name in FOR_CPU else (real_models.build(name, device=device), None)
    denoiser.to(device)
    with torch.device("meta"):
        twin = type(denoiser).from_config(denoiser.config)
    twin.load_state_dict(denoiser.state_dict(), assign=True)
    return denoiser.eval(), inputs, twin.eval()


def load(name, device, pixels):
    """(denoiser, inputs, the forward of its twin)."""
    denoiser, inputs, twin = built(name, device)
    if inputs is None:
        inputs = real_models.inputs(name, denoiser, device, pixels, pixels)
    return denoiser, {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}, twin


def seconds(call, device):
    """Of one call: processor time of this thread, or time until the GPU is done."""
    clock = time.perf_counter if device == "cuda" else time.thread_time
    began = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def row(options, pixels, patches):
    """The row of one size and number of patches."""
    denoiser, inputs, plain = load(options.model, options.device, pixels)
    config = Config.from_options({"num_patches": patches, **parse_options(options.options)})
    rank = min(1, patches - 1) if options.rank is None else options.rank
    common = {"model": options.model, "pixels": pixels, "patches": patches, "rank": rank, "options": options.options}
    if patches == 1:
        times = [seconds(lambda: plain(**inputs), options.device) for _ in range(options.rounds + 1)][1:]
        return {**common, "whole": measure.summary(times), "patch": measure.summary(times), "speedup": 1.0}
    exchange = Mirror()
    signature = CallSignature(denoiser)
    layers = DeviceLayers(denoiser, config, World([0], 1.0), options.device, signature)
    # As on one of several ranks, which keep nothing for each other's modules.
    layers.choice.alone = False
    shared = Shared(denoiser, config, signature, layers.packed, layers.choice)
    patches_of = Patches(shared, None, exchange)
    layers.choice.patches = patches_of
    layers.begin()
    try:
        forward = layers.launched(denoiser.forward, signature.latent)
        plan, call = LonePlanner(shared, patches_of.hooks).emulate(rank, forward, (), inputs, exchange)
        with layers.learning():
            for mode in (PatchMode.SYNC, PatchMode.DISPLACED, PatchMode.DISPLACED):
                call(mode)
        exchange.sent_bytes, exchange.reflects = 0, False
        calls = [lambda: plain(**inputs), lambda: call(PatchMode.DISPLACED)]
        made = compared(options, calls)
        sent_bytes = exchange.sent_bytes / options.rounds
        if options.device == "cuda":
            # Launched from Python a patch can be slower than its kernels are.
            made["graph"] = compared(options, [captured(call)[0] for call in calls])
        if options.profile:
            show_profile(*reversed(calls), options.device)
        sizes = {"sent_bytes": sent_bytes, "buffer_bytes": plan.memory_bytes(rank)}
        return {**common, "kernels": layers.summary(), **made, **sizes}
    finally:
        patches_of.forget(released=True)
        layers.remove()


def compared(options, calls):
    """Dict: times of the whole picture and of the patch, in turns."""
    rounds = [[seconds(call, options.device) for call in calls] for _ in range(options.rounds)]
    return {
        "whole": measure.summary([a for a, _ in rounds]),
        "patch": measure.summary([b for _, b in rounds]),
        "speedup": statistics.median(a / b for a, b in rounds),
    }


def show_profile(patch, whole, device):
    """Print the ops of one call on a patch and on the whole picture."""
    for call in (patch, whole):
        with torch.profiler.profile() as profile:
            call()
        key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=key, row_limit=18, max_name_column_width=50), file=sys.stderr)


@torch.no_grad()
def main(argv):
    options, failures = parse(argv), measure.Failures()
    if options.device == "cpu":
        torch.set_num_threads(1)
    for pixels in options.pixels or [None]:
        for patches in options.patches:
            if measure.left_s() < LEAST_S:
                print(f"left out: {pixels} pixels, {patches} patches", flush=True)
                continue
            with failures.kept(f"{pixels} pixels, {patches} patches"):
                made = row(options, pixels, patches)
                print(json.dumps(made), flush=True)
                for mode, found in {"eager": made, "graph": made.get("graph")}.items():
                    if found:
                        ms = [f"{1e3 * found[way]['median_s']:.2f}" for way in ("whole", "patch")]
                        told = f"ROW {options.model} {pixels or ''} of {patches} patches {options.options} {mode}: "
                        print(f"{told}{ms[0]} -> {ms[1]} ms, {found['speedup']:.2f}x", file=sys.stderr, flush=True)
                if options.save:
                    measure.write_row("patch_compute", made)
    return min(1, failures.count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
