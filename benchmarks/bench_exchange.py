"""What an exchange costs the host: a post on GPUs that take no time, and an exchange through shared memory.

    python benchmarks/bench_exchange.py --json

Host: `_C` over the tests' double of CUDA and NCCL, told to return at once, so that our own time is left; against
torch.distributed's batch_isend_irecv over its fake process group and the same driver and NCCL calls by ctypes.
Shared memory: two processes that both send and receive, against gloo in the same processes, rounds in turn. CPU time
is that of all threads of both processes. `--only gpu`: the same host times with the real driver and NCCL, see
exchange_on_gpu.py.
"""

import argparse
import ctypes
import json
import os
import pathlib
import statistics
import sys
import time

import both_ways
import exchange_on_gpu
import measure
import torch
import torch.distributed as dist

from asyncdiff_fast import _C
from asyncdiff_fast.commands.launch import launch

OPERATIONS = (2, 6, 14)  # with 1, 3 and 7 peers
SIZES = tuple(1 << n for n in range(12, 25, 2))
# In each round: so short and so many that some of them meet nothing else on their core.
BURSTS = 30
# The context that the double takes for rank 0's.
CONTEXT = 0x50000001


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("host", "shm", "gpu"), help="default: host and shm")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=200, help="posts in each burst of the host's part")
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--save", action="store_true", help="append the rows to benchmarks/results/exchange.jsonl")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds = 3
    return options


def best_us(rounds, calls, action):
    """Least microseconds of one call of `action`, over bursts of `calls`."""
    times = []
    for _ in range(rounds * BURSTS):
        began = time.perf_counter()
        for _ in range(calls):
            action()
        times.append((time.perf_counter() - began) / calls)
    return 1e6 * min(times)


# The host's part.


def null_gpu():
    """(path of the double, its functions), set to return at once."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests" / "support"))
    import building

    path = str(building.build()[0])
    double = ctypes.CDLL(path)
    double.cuCtxSetCurrent(ctypes.c_void_p(CONTEXT))
    double.fake_null(1)
    return path, double


def host_rows(options):
    """One row for each number of p2p operations in a slot."""
    path, double = null_gpu()
    libraries = _C.Libraries(path, path)
    dist.init_process_group("fake", rank=0, world_size=8, store=_fake_store())
    rows = []
    for operations in OPERATIONS:
        peers = operations // 2
        row = {"part": "host", "operations": operations}
        row |= engine_us(options, libraries, peers)
        row |= c10d_us(options, peers)
        row["ctypes_us"] = ctypes_us(options, double, peers)
        row["speedup"] = row["c10d_us"] / row["cycle_us"]
        row["speedup_prebuilt"] = row["c10d_prebuilt_us"] / row["cycle_us"]
        rows.append(row)
    dist.destroy_process_group()
    return rows


def _fake_store():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def engine_us(options, libraries, peers):
    """Post, and acquire + post + wait."""
    transport = _C.NcclTransport(libraries, _C.unique_id(libraries), 0, peers + 1)
    while not transport.ready():
        pass
    channel = _C.Channel(transport)
    memory = [(ctypes.c_char * 64)() for _ in range(4 * peers)]
    addresses = [ctypes.addressof(block) for block in memory]

    def slot(name):
        sides = [[(p + 1, addresses[4 * p + s : 4 * p + s + 2], 64) for p in range(peers)] for s in (0, 2)]
        return channel.add(name, *sides, 2)

    one = slot("one")
    channel.freeze("one", [one])
    stream = 7

    def cycle():
        channel.acquire(one, stream)
        channel.post(one, stream)
        channel.wait(one, stream)

    found = {
        "post_us": best_us(options.rounds, options.calls, lambda: channel.post(one, stream)),
        "cycle_us": best_us(options.rounds, options.calls, cycle),
    }
    channel.close()
    return found


def c10d_us(options, peers):
    """batch_isend_irecv and the wait for it, with the list of operations made each time or once."""
    tensors = [torch.zeros(64, dtype=torch.int8) for _ in range(2 * peers)]

    def operations():
        sends = [dist.P2POp(dist.isend, tensors[p], p + 1) for p in range(peers)]
        return sends + [dist.P2POp(dist.irecv, tensors[peers + p], p + 1) for p in range(peers)]

    def cycle(made):
        for work in dist.batch_isend_irecv(made):
            work.wait()

    made = operations()
    calls = max(1, options.calls // 20)
    return {
        "c10d_us": best_us(options.rounds, calls, lambda: cycle(operations())),
        "c10d_prebuilt_us": best_us(options.rounds, calls, lambda: cycle(made)),
    }


def ctypes_us(options, double, peers):
    """The driver and NCCL calls of acquire, post and wait, one by one from Python."""
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, kinds in {
        "cuEventRecord": (pointer, pointer),
        "cuStreamWaitEvent": (pointer, pointer, ctypes.c_uint),
        "ncclSend": (pointer, size, ctypes.c_int, ctypes.c_int, pointer, pointer),
        "ncclRecv": (pointer, size, ctypes.c_int, ctypes.c_int, pointer, pointer),
    }.items():
        getattr(double, name).argtypes = kinds
    memory = (ctypes.c_char * 64)()
    buffer, event, compute, lane, comm = ctypes.addressof(memory), 1, 7, 8, 9

    def cycle():
        double.cuStreamWaitEvent(compute, event, 0)
        double.cuEventRecord(event, compute)
        double.cuStreamWaitEvent(lane, event, 0)
        double.ncclGroupStart()
        for p in range(peers):
            double.ncclSend(buffer, 64, 0, p + 1, comm, lane)
            double.ncclRecv(buffer, 64, 0, p + 1, comm, lane)
        double.ncclGroupEnd()
        double.cuEventRecord(event, lane)
        double.cuStreamWaitEvent(compute, event, 0)

    return best_us(options.rounds, max(1, options.calls // 10), cycle)


# Shared memory against gloo.


def shm_rank(options):
    """Rows of both ways for every size; on rank 0, else None."""
    torch.set_num_threads(1)
    with both_ways.opened("cpu") as (world, ways):
        rows = [shm_row(options, world, ways, size) for size in SIZES]
    return rows if world.rank == 0 else None


def shm_row(options, world, ways, size):
    slots = {way: both_ways.slot_of(world, exchange, size, "cpu") for way, exchange in ways.items()}
    calls = max(20, min(500, (64 << 20) // size))
    found = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, exchange in ways.items():
            found[way].append(exchanges(world, exchange, slots[way], calls))
    everyone = world.gather(found, "figures")
    row = {"part": "shm", "bytes": size, "calls": calls, "threads": torch.get_num_threads()}
    for way, name in (("engine", "shm"), ("torch", "gloo")):
        row[f"{name}_us"] = statistics.median(r["us"] for r in found[way])
        row[f"{name}_post_us"] = statistics.median(r["post_us"] for r in found[way])
        row[f"{name}_cpu_us"] = statistics.median(
            sum(rank[way][i]["cpu_us"] for rank in everyone) for i in range(options.rounds)
        )
    pairs = list(zip(found["engine"], found["torch"], strict=True))
    row["latency_ratio"] = statistics.median(ours["us"] / theirs["us"] for ours, theirs in pairs)
    row["cpu_ratio"] = row["shm_cpu_us"] / row["gloo_cpu_us"]
    return row


def exchanges(world, exchange, slot, calls):
    """Median latency and post, and CPU time, of one exchange both ways, in microseconds."""
    for _ in range(3):
        exchange.post(slot)
        exchange.wait(slot)
    world.gather(None, "a round")
    latencies, posts, cpu = [], [], time.process_time()
    for _ in range(calls):
        began = time.perf_counter()
        exchange.acquire(slot)
        exchange.post(slot)
        posted = time.perf_counter()
        exchange.wait(slot)
        latencies.append(time.perf_counter() - began)
        posts.append(posted - began)
    cpu = time.process_time() - cpu
    world.gather(None, "the end of a round")
    return {
        "us": 1e6 * statistics.median(latencies),
        "post_us": 1e6 * statistics.median(posts),
        "cpu_us": 1e6 * cpu / calls,
    }


def main(argv):
    options = parse(argv)
    if "RANK" in os.environ:
        rows = (exchange_on_gpu.rank_rows if options.only == "gpu" else shm_rank)(options)
        if rows is not None:
            pathlib.Path(os.environ["BENCH_ROWS"]).write_text(json.dumps(rows))
        return 0
    if options.only == "gpu" and not torch.cuda.is_available():
        print("no CUDA device: the GPU's part of the exchange is not measured", file=sys.stderr)
        return 0
    load = os.getloadavg()[0]
    rows = host_rows(options) if options.only in (None, "host") else []
    if options.only != "host":
        rows += in_two_processes(argv)
    # Of other work, before this began.
    rows = [row | {"load_average": round(load, 1)} for row in rows]
    if options.save:
        for row in rows:
            measure.write_row("exchange", row)
    found = {"rows": rows, **measure.facts()}
    print(json.dumps(found) if options.json else "\n".join(json.dumps(row) for row in rows), flush=True)
    return 0


def in_two_processes(argv):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.json"
        os.environ["BENCH_ROWS"] = str(path)
        if launch(2, ["--", __file__, *argv]):
            raise SystemExit("the processes that measure failed")
        return json.loads(path.read_text())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
