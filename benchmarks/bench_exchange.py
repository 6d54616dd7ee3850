"""What an exchange costs between two processes.

    python benchmarks/bench_exchange.py --json

Shared memory: two processes that both send and receive, against gloo in the same processes, rounds in turn. CPU time
is that of all threads of both processes. `--only gpu`: host times with the real driver and NCCL, by exchange_on_gpu.py.
"""

import argparse
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

from asyncdiff_fast.commands.launch import launch

SIZES = tuple(1 << n for n in range(12, 25, 2))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("shm", "gpu"), default="shm")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--save", action="store_true", help="append the rows to benchmarks/results/exchange.jsonl")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds = 3
    return options


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
    # Of other work, before this began.
    rows = [row | {"load_average": round(load, 1)} for row in in_two_processes(argv)]
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
