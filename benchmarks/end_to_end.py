"""One generation, patched and unpatched, in one run: time per call, exposed wait, bytes, memory.

    python benchmarks/end_to_end.py --device cpu --nproc 2 --json

Starts its own ranks, one thread each on CPU. Rounds alternate: rank 0 alone with the unpatched denoiser while the
others sleep, then all ranks together; each time is taken from barrier to barrier, so it is the slowest rank's.
On CPU the allocator keeps what it once got: handing it back and touching it anew, as it does in some rounds and not in
others, costs up to a quarter of a call.
"""

import argparse
import json
import os
import statistics
import sys
import time

import measure
import real_models
import torch
import torch.distributed as dist
from rounds import PATIENCE_S, SPENT, Alone, Loop, Patched, compared, one_round, paired_round, timed, twin_of

from asyncdiff_fast.commands.launch import launch
from asyncdiff_fast.environment import parse_options
from asyncdiff_fast.exchange.world import World

FOR_CPU = ("sd15_width", "sd3_width", "tiny")
# glibc's.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--model", choices=(*FOR_CPU, *real_models.MODELS), default="sd15_width")
    parser.add_argument("--options", default="balance=time", help="options of patch(), such as num_patches=2")
    parser.add_argument("--beside", help="options of a second patched denoiser, timed in turn with the first")
    parser.add_argument("--warmup-steps", type=int, default=1)
    parser.add_argument("--calls", type=int, default=8, help="steady calls in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50, help="length of the whole generation that is reported")
    parser.add_argument(
        "--exchange", choices=("engine", "torch", "both"), help="both: in turn; default: what patch() chooses"
    )
    parser.add_argument("--json", action="store_true", help="print each row as a JSON object")
    parser.add_argument("--save", action="store_true", help="append the row to benchmarks/results/end_to_end.jsonl")
    parser.add_argument("--profile", metavar="FOLDER", help="write a trace of each rank's steady calls")
    return parser.parse_args(argv)


def load(name, device):
    """(denoiser, its inputs)."""
    if name in FOR_CPU:
        denoiser, inputs = getattr(real_models, name)()
    else:
        denoiser = real_models.build(name, device=device)
        inputs = real_models.inputs(name, denoiser, device=device)
    return denoiser.eval().requires_grad_(False), inputs


def patch_options(text, options):
    """The options of one patched denoiser."""
    config = {"warmup_steps": options.warmup_steps, **parse_options(text)}
    if config.get("parallel_steps", 1) > 1:
        # Two exact steps come first, and blocks are as long as can be: the weights are random.
        return {"tolerance": 1e8} | config | {"warmup_steps": 2}
    if not {"num_patches", "cfg_parallel"} & set(config):
        config.setdefault("num_stages", options.nproc + 1 - config.get("stride", 1))
    return config


def same_stages(patched, options):
    """Options that divide another denoiser as this one is, if into as many stages: what is compared is all the rest."""
    if options.get("num_stages", 1) == 1 or options["num_stages"] != patched.config.get("num_stages"):
        return options
    plan, stages = patched.runtime.plan, [[] for _ in range(options["num_stages"])]
    graph = plan.whole if hasattr(plan, "whole") else plan.graph
    for unit, stage in zip(graph.units, plan.division.owner, strict=True):
        stages[stage].append(unit.name)
    return {**options, "stages": stages}


def measure_rank(options):
    """What one rank measures; all ranks run it together. Returns a row of each patched denoiser; None but on rank 0."""
    torch.set_grad_enabled(False)
    if options.device == "cpu":
        SPENT.watch()
        torch.set_num_threads(1)
    denoiser, inputs = load(options.model, options.device)
    both = options.exchange == "both"
    config = patch_options(options.options, options)
    first, second = Patched(twin_of(denoiser), inputs, config, "engine" if both else options.exchange), None
    if both:
        second = Patched(twin_of(denoiser), inputs, same_stages(first, config), "torch")
    elif options.beside:
        second = Patched(twin_of(denoiser), inputs, same_stages(first, patch_options(options.beside, options)))
    one_device = Alone(twin_of(denoiser), inputs) if config.get("parallel_steps", 1) > 1 else None
    alone, cpu_alone, pairs = [], [], []
    for number in range(options.rounds):
        plain = Loop(denoiser, inputs, options.calls + 1)
        if number == 0:
            timed(plain, 1, dist.get_rank() == 0)
        began = time.process_time()
        alone.append(timed(plain, options.calls, dist.get_rank() == 0)[0] / options.calls)
        cpu_alone.append((time.process_time() - began) / options.calls)
        if one_device:
            one_device.round(options.calls)
        folder = options.profile if number + 1 == options.rounds else None
        if second:
            paired_round((first, second), options.calls, folder, pairs)
        else:
            one_round(first, options.calls, folder)
    measured = [patched for patched in (first, second) if patched]
    rows = [report(options, patched, alone, cpu_alone) for patched in measured]
    for row, patched in zip(rows, measured, strict=True):
        if row and "pipeline_patches" in patched.config:
            row |= micro_steps(patched.config, patched.runtime.plan, row)
    if one_device and rows[0]:
        rows[0] |= against_one_device(rows[0], first, one_device)
    if second:
        found = compared(pairs)
        if found:
            rows[0]["beside"] = {"options": rows[1]["options"], "exchange": rows[1]["exchange"], **found}
    return rows


def against_one_device(row, patched, one_device):
    """How long all ranks take in units of one device that is patched too, and what blocks take beside evaluations."""
    call, steps = statistics.median(one_device.rounds), patched.runtime.stats()["steps"]
    return {
        "call_s_patched_alone": call,
        "speedups_over_patched": [a / b for a, b in zip(one_device.rounds, patched.together, strict=True)],
        "whole_speedup_over_patched": row["whole_steps"] * call / row["whole_s"],
        "replay_share": steps["replay_s"] / (row["call_s"] * sum(n * k for n, k in steps["block_lengths"].items())),
    }


def micro_steps(config, plan, row):
    """What a call of patches through stages is to reach, beside what it did.

    Raises: AssertionError if other bytes were sent than planned.
    """
    ideal = config["num_stages"] * len(plan.route.micro) / plan.micro_steps_per_call()
    planned = plan.bytes_per_call
    assert row["bytes_per_call"] == planned, (
        f"{planned} bytes are planned for a call, {row['bytes_per_call']} were sent"
    )
    return {"ideal_speedup": ideal, "goal_speedup": 0.9 * ideal, "share_of_ideal": row["speedup"] / ideal}


def balance(plan):
    """The largest stage over the mean of all; None without stages."""
    plans = plan if isinstance(plan, tuple) else (plan,)
    return next((p.division.balance for p in plans if hasattr(p, "division")), None)


def report(options, patched, alone, cpu_alone):
    """Gather what the ranks measured into one row."""
    runtime, config, together, warm = patched.runtime, patched.config, patched.together, patched.warm
    mine = {
        "wait_s": statistics.median(patched.waits),
        "predict_s": statistics.median(patched.predicting),
        "rss": measure.peak_rss_mb(),
        "cpu": (cpu_alone[-1], patched.cpu[-1]),
        "sent_bytes": runtime.stats().get("sent_bytes", 0),
    }
    ranks = World(range(dist.get_world_size()), PATIENCE_S).gather(mine, "what was measured")
    if dist.get_rank():
        return None
    call, call_alone = statistics.median(together), statistics.median(alone)
    sent = [r["sent_bytes"] / options.calls for r in ranks]
    asynchronous = options.steps - config["warmup_steps"]
    whole = statistics.median(warm) + asynchronous * call
    return {
        "model": options.model,
        "nproc": dist.get_world_size(),
        "threads": torch.get_num_threads(),
        "options": {name: x for name, x in config.items() if name != "stages"},
        "transport": dist.get_backend(),
        "exchange": runtime.exchange_kind,
        "speedup": statistics.median(a / b for a, b in zip(alone, together, strict=True)),
        "speedups": [a / b for a, b in zip(alone, together, strict=True)],
        "call_s": call,
        "call_s_alone": call_alone,
        "cpu_s_alone": ranks[0]["cpu"][0],
        "cpu_s": [r["cpu"][1] for r in ranks],
        "exposed_wait_share": max(r["wait_s"] for r in ranks) / call,
        "exposed_wait_shares": [r["wait_s"] / call for r in ranks],
        "prediction_share": max(r["predict_s"] for r in ranks) / call,
        "bytes_per_call": sum(sent),
        "sent_bytes_per_call": sent,
        "peak_rss_mb": [r["rss"] for r in ranks],
        "balance": balance(runtime.plan),
        "whole_steps": options.steps,
        "whole_s": whole,
        "whole_s_alone": options.steps * call_alone,
        "whole_speedup": options.steps * call_alone / whole,
        "first_warmup_s": patched.first_warmup_s,
    }


def main(argv):
    options = parse(argv)
    if "RANK" not in os.environ:
        return launch(options.nproc, ["--", __file__, *argv], **KEEP_MEMORY)
    dist.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo")
    for row in filter(None, measure_rank(options)):
        if options.save:
            measure.write_row("end_to_end", row)
        print(json.dumps(row) if options.json else "\n".join(f"{k:>20}  {v}" for k, v in row.items()), flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
