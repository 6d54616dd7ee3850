"""The simulation against the clock: calls of real processes, and what is simulated for them from one device's times.

    python benchmarks/simulated.py --save

Two processes compute (`sd15_width`), each call's time taken from exact calls that both make at once. Four processes on
as many or fewer cores sleep as long as they would compute (`sleeping`). Links are measured first, by slots of the
exchange. With --save the rows and the table are written, and beside them what papers published.
"""

import argparse
import os
import statistics
import sys

import measure
import simulated_published
import torch
import torch.distributed as dist
from end_to_end import KEEP_MEMORY, load
from report import table
from rounds import PATIENCE_S, Loop, Patched, timed, twin_of
from sleeping import sleeping

import asyncdiff_fast
from asyncdiff_fast.commands.launch import as_text, launch
from asyncdiff_fast.commands.tune.link import measured
from asyncdiff_fast.exchange.world import World
from asyncdiff_fast.simulation.cluster import Cluster, Link
from asyncdiff_fast.simulation.simulate import simulate
from asyncdiff_fast.simulation.times import Times

CASES = {
    2: [
        {"num_stages": 2, "balance": "time"},
        {"num_patches": 2},
        {"parallel_steps": 2, "tolerance": 1e8},
    ],
    4: [
        {"num_stages": 4, "balance": "time"},
        {"num_stages": 3, "stride": 2, "balance": "time"},
        {"num_patches": 4},
        {"num_patches": 4, "exchange": "sync"},
        {"parallel_steps": 4, "tolerance": 1e8},
        {"cfg_parallel": True, "num_stages": 2, "balance": "time"},
        {"num_stages": 4, "pipeline_patches": 4, "balance": "time"},
    ],
}
CALLS, ROUNDS = 8, 4


def measure_rank(nproc, name):
    """Rows of all cases for a number of processes and a denoiser; None but on rank 0."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    computes = name != "sleeping"
    denoiser, inputs = load(name, "cpu") if computes else sleeping()
    world = World(range(nproc), PATIENCE_S)
    latency_s, gbs = measured(world, torch.device("cpu"))
    # Those that sleep leave their processor to the copying.
    link, rows = Link(latency_s, gbs, steals=float(computes)), []
    call_s = None
    for options in CASES[nproc]:
        twin = twin_of(denoiser) if computes else sleeping()[0]
        patched = Patched(twin, inputs, {"warmup_steps": 2} | options)
        steady, exact = [], []
        for _ in range(ROUNDS):
            loop = patched.loop(CALLS)
            patched.begin(loop)
            exact.append(patched.warm[-1] / 2)
            steady.append(patched.steady(loop, CALLS)[0])
        if call_s is None:
            # Of these stages' warm-up, in which every rank computes all.
            call_s = min(exact)
        plan = patched.runtime.plan
        patch_s = None
        if computes and "num_patches" in options:
            # Fewer rows take more than their share of a call: all weights are read for them.
            patch_s = [call_s * share_of_rows(denoiser, inputs, options["num_patches"])] * options["num_patches"]
        found = simulate(plan, Times(call_s, patch_s=patch_s), Cluster(1, nproc, link, link), 2 + CALLS)
        measured_s = statistics.median(steady)
        rows.append(
            {
                "denoiser": name, "nproc": nproc, "options": as_text(options),
                "call_s_alone": call_s, "latency_s": latency_s, "gbs": gbs, "call_s": measured_s,
                "call_s_rounds": steady, "load_average": os.getloadavg()[0], "simulated_s": found.step_s,
            }
        )  # fmt: skip
        asyncdiff_fast.unpatch(patched.denoiser)
        timed(Loop(denoiser, inputs, 1), 0, True)
    return rows if dist.get_rank() == 0 else None


def share_of_rows(denoiser, inputs, num_patches):
    """What a call on a patch's rows takes of a whole call, unpatched, on all ranks at once. Collective."""
    name = Loop(denoiser, inputs, 1).latent_name
    rows = inputs[name].shape[-2] // num_patches
    seconds = []
    for latent in (inputs[name], inputs[name][..., :rows, :].contiguous()):
        loop = Loop(denoiser, dict(inputs) | {name: latent}, 4)
        timed(loop, 1, True)
        seconds.append(timed(loop, 3, True)[0])
    return seconds[1] / seconds[0]


def page(rows):
    """The page of results, by the latest row of each case."""
    title = "# The simulation against the clock, and against papers"
    return "\n\n".join([title, *(_against_the_clock(rows) if rows else ()), simulated_published.page()]) + "\n"


def _against_the_clock(rows):
    latest, body = {(r["denoiser"], r["nproc"], r["options"]): r for r in rows}, []
    for r in latest.values():
        off = r["simulated_s"] / r["call_s"] - 1
        cells = (f"{r[name] * 1e3:.1f}" for name in ("call_s_alone", "call_s", "simulated_s"))
        body.append([f"`{r['denoiser']}`", f"{r['nproc']}: `{r['options']}`", *cells, f"{off:+.1%}"])
    header = ["denoiser", "processes: options", "exact call, ms", "measured, ms", "simulated, ms", "off by"]
    last = rows[-1]
    yield (
        f"{last['device']}, torch {last['torch']}, {last['date']}; a call after the exact ones, medians of {ROUNDS} "
        f"rounds of {CALLS}, at a load average of up to {max(r['load_average'] for r in latest.values()):.1f}. "
        "`sleeping` sleeps as long as it would compute, so that four processes keep their pace on two cores; "
        "`sd15_width` computes; for its patches, the share that their rows take of an unpatched call is measured, "
        "elsewhere it is that of rows. A displaced patch and a micro-step run the host's code of a whole call each, "
        "of which only their share is counted. The latency of a link is counted at every site of synchronous patches."
    )
    yield table(header, body)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--denoiser", choices=("sd15_width", "sleeping"), help="default: see above")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page of what there is")
    parser.add_argument("--save", action="store_true", help="keep the rows, and write benchmarks/results/simulated.md")
    options = parser.parse_args(argv)
    if "RANK" not in os.environ:
        for nproc in () if options.page else options.nproc:
            save = ["--save"] if options.save else []
            name = options.denoiser or ("sd15_width" if nproc == 2 else "sleeping")
            how = ["--nproc", str(nproc), "--denoiser", name, *save]
            code = launch(nproc, ["--", __file__, *how], **KEEP_MEMORY)
            if code:
                return code
        if options.save or options.page:
            kept = measure.RESULTS / "simulated.jsonl"
            (measure.RESULTS / "simulated.md").write_text(page(measure.read_rows("simulated") if kept.exists() else []))
        return 0
    dist.init_process_group("gloo")
    for row in measure_rank(dist.get_world_size(), options.denoiser) or ():
        if options.save:
            measure.write_row("simulated", row)
        off = row["simulated_s"] / row["call_s"] - 1
        print(
            f"{row['nproc']} {row['options']}: {row['call_s']:.4f} s, simulated {row['simulated_s']:.4f} ({off:+.1%})"
        )
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
