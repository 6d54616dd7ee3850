"""Rows of exchange.jsonl as tables."""

import measure


def exchange(table):
    """Shared memory against gloo, and what a post costs a host with a GPU: the latest row of each case; `table` makes
    Markdown of a header and rows.
    """
    if not (measure.RESULTS / "exchange.jsonl").exists():
        return "Not measured yet: `python benchmarks/bench_exchange.py --save`."
    latest = {}
    for row in measure.read_rows("exchange"):
        latest[row["part"], row["bytes"]] = row
    shm = [row for row in latest.values() if row["part"] == "shm"]
    gpu = [row for row in latest.values() if row["part"] == "gpu" and "engine_post_us" in row]
    text = []
    if shm:
        facts = ", ".join(str(shm[-1][name]) for name in ("device", "torch", "date"))
        load = max(row["load_average"] for row in shm)
        text.append(f"On {facts}, with a load average of up to {load:g} from other work.")
        header = ["two processes, both ways", "µs", "gloo, µs", "ratio (paired median)", "CPU µs", "gloo, CPU µs"]
        body = []
        for row in sorted(shm, key=lambda row: row["bytes"]):
            figures = [f"{row[name]:.0f}" for name in ("shm_us", "gloo_us", "shm_cpu_us", "gloo_cpu_us")]
            body.append([_bytes(row["bytes"]), *figures[:2], f"{row['latency_ratio']:.2f}", *figures[2:]])
        text.append(table(header, body))
    if not gpu:
        text.append("What a post costs a host with a GPU is not measured: that counts with a real NCCL only.")
        return "\n\n".join(text)
    header = ["host time with NCCL, µs", "engine", "torch.distributed", "machine"]
    names = {"a post": "post_us", "acquire, post, wait": "cycle_us"}
    body = [
        [what, *(f"{row[f'{way}_{name}']:.1f}" for way in ("engine", "torch")), f"{row['device']}, NCCL {row['nccl']}"]
        for row in gpu
        for what, name in names.items()
    ]
    text.append(
        "Two processes that take turns on one GPU and send through sockets: an upper bound, and no goal of 5 µs."
    )
    return "\n\n".join([*text, table(header, body)])


def _bytes(n):
    return f"{n >> 20} MiB" if n >= 1 << 20 else f"{n >> 10} KiB"
