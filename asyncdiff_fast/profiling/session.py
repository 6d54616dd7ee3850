"""`profile`: what all ranks do meanwhile, in one trace, a picture and a table."""

import contextlib
import json
import tempfile
import zlib
from datetime import timedelta
from pathlib import Path

import torch

from ..exchange.engine import described
from ..exchange.world import World, start_process_group, stop_process_group
from . import account, clocks, events, picture, ranges, table
from .chrome import chrome
from .turns import turns

TIMEOUT_S = 120.0
# A store's values travel as a whole.
_CHUNK_BYTES = 1 << 20


class Profile:
    """What `profile` found, on rank 0, once it is over: `summary`, a dict fit for JSON, and `text`, a table."""

    summary, text = None, ""


@contextlib.contextmanager
def profile(out="out", timeout_s=TIMEOUT_S):
    """Write what all ranks do within the block into the folder `out`. Collective over torchrun's ranks.

        with asyncdiff_fast.profile("out/"):
            pipe("a red star", num_inference_steps=10)

    `trace.json`, for Perfetto or chrome://tracing, holds all ranks on one clock: operators and kernels as torch's
    profiler sees them, and ranges for calls, units, sites, micro-steps, blocks, posts and waits; `step.png` shows one
    step; `profile.txt` and `profile.json` say where a step's time goes. Nothing of it costs time outside of the block.
    Call the pipeline once before: at its first call it is planned. All ranks enter and leave between two generations.

    Args:
        out: folder, which rank 0 makes; one that only rank 0 sees will do.
        timeout_s: how long ranks wait for each other at the beginning and at the end.
    Yields: `Profile`, filled on rank 0 when the block is over.
    Raises: OSError on every rank if `out` cannot be written, ValueError if a profiler runs already.
    """
    if torch.autograd.profiler._is_profiler_enabled:
        raise ValueError("a profile is being made already, and torch makes one at a time: end that one first")
    found, out = Profile(), Path(out)
    start_process_group(timeout_s)
    try:
        world = _world(timeout_s)
        problem = world.broadcast(unwritable(out) if world.rank == 0 else None, "the folder of profile()")
        if problem:
            raise OSError(f"the folder of profile() must be one that can be written: {problem}; name another")
        with ranges.named(), torch.profiler.profile(activities=_activities()) as recorder:
            try:
                yield found
            except BaseException as error:
                # The others wait for this rank at the end.
                world.leave(described(error))
                raise
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        everyone = _gathered(_world(timeout_s), _slim(recorder))
        if everyone is not None:
            _write(out, everyone, found)
    finally:
        stop_process_group()


def unwritable(out):
    """Why nothing can be written into a folder, which is made if need be; None if it can."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return None
    except OSError as error:
        return f"{out}: {error.strerror}"


def _world(timeout_s):
    """All ranks, as they begin to agree on something."""
    dist = torch.distributed
    several = dist.is_available() and dist.is_initialized()
    return World(range(dist.get_world_size()) if several else (0,), timeout_s)


def _activities():
    kinds = torch.profiler.ProfilerActivity
    return [kinds.CPU, kinds.CUDA] if torch.cuda.is_available() else [kinds.CPU]


def _slim(recorder):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(path))
        return events.slim(json.loads(path.read_text()))


def _gathered(world, mine):
    """[every rank's events, on rank 0's clock] on rank 0, None elsewhere. Collective."""
    if world.size == 1:
        return [mine]
    world.gather(None, "the end of profile()")
    store = world.new_store("profile")
    offset = clocks.offset_ns(world, store)
    if world.rank:
        packed = zlib.compress(json.dumps([e | {"ts": e["ts"] + offset} for e in mine]).encode())
        chunks = [packed[i : i + _CHUNK_BYTES] for i in range(0, len(packed), _CHUNK_BYTES)]
        for number, chunk in enumerate(chunks):
            store.set(f"trace/{world.rank}/{number}", chunk)
        store.set(f"trace/{world.rank}/count", str(len(chunks)))
        everyone = None
    else:
        everyone = [mine, *(_received(store, rank, world.timeout_s) for rank in range(1, world.size))]
    # Whoever keeps the store must not end before it was read.
    world.gather(None, "the traces")
    return everyone


def _received(store, rank, timeout_s):
    store.wait([f"trace/{rank}/count"], timedelta(seconds=timeout_s))
    keys = [f"trace/{rank}/{number}" for number in range(int(store.get(f"trace/{rank}/count")))]
    packed = b"".join(store.get(key) for key in keys)
    for key in keys:
        store.delete_key(key)
    return json.loads(zlib.decompress(packed))


def _write(out, everyone, found):
    begin_ns = min((e["ts"] for mine in everyone for e in mine), default=0)
    traces = [events.read(rank, mine, begin_ns) for rank, mine in enumerate(everyone)]
    sent = account.messages(traces)
    blocks = {
        trace.rank: [(t.begin, t.end, f"block of {t.steps} steps") for t in turns(trace) if t.steps > 1]
        for trace in traces
    }
    (out / "trace.json").write_text(json.dumps(chrome(everyone, begin_ns, sent, blocks)))
    found.summary = account.account(traces)
    found.text = table.text(found.summary)
    (out / "profile.json").write_text(json.dumps(found.summary, indent=1) + "\n")
    (out / "profile.txt").write_text(found.text + "\n")
    if found.summary is not None:
        picture.step(traces, sent).save(out / "step.png")
