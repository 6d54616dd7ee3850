"""What the benchmarks of single ops have in common: options, and rows of every way to compute each case."""

import argparse
import pathlib
import sys

import gpu_timing
import measure
import torch
from tqdm import tqdm


def parse(argv, description, name, quick_s):
    """Options of the benchmark whose rows are `results/NAME.jsonl` and which takes `quick_s` seconds if quick."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes, torch's ops only")
    parser.add_argument("--quick", action="store_true", help=f"fewer shapes, and no new row after {quick_s} s")
    parser.add_argument("--out", type=pathlib.Path, default=measure.RESULTS / f"{name}.jsonl")
    parser.add_argument("--compile", action="store_true", help="rows of torch.compile too: 3 to 20 s for each case")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "This benchmark needs a GPU and finds none; --device cpu --quick only tries the script, on tiny shapes."
        )
    options.budget_s = quick_s if options.quick else float("inf")
    return options


def add_rows(options, cases):
    """Time every op of every case; a run that is broken off continues where it was.

    A case that fails or is wrong gets one row that says so, and the others go on.

    Args:
        cases: [(key dict, function)]; the function makes the tensors, checks the kernels' results, and returns
            {op: (run, bytes moved or None, FLOPs or None)}, as `gpu_timing.Rows.add` takes them.
    Raises: SystemExit, with the number of cases that failed, after all the others.
    """
    rows, left, failed = gpu_timing.Rows(options.out, options.device, options.budget_s), 0, 0
    for key, make in tqdm(cases):
        if rows.time_is_up:
            left += 1
            continue
        try:
            for name, (run, moved_bytes, flops) in make().items():
                row = {"op": name, **key}
                if name.endswith("torch.compile") and not options.compile:
                    continue
                if rows.wants(row) and not rows.time_is_up and runs(run):
                    rows.add(row, run, moved_bytes, flops)
        except Exception as error:
            failed += 1
            rows.fail(key, error)
            tqdm.write(f"FAILED {key}: {type(error).__name__}: {error}")
    if left:
        print(f"Time is up with {left} of {len(cases)} cases not begun; run it again to go on.")
    if failed:
        sys.exit(f"{failed} of {len(cases)} cases failed; the rows say why.")


def runs(run):
    """False for a backend that refuses this device or these shapes."""
    try:
        run()
    except RuntimeError as error:
        tqdm.write(f"left out: {str(error).splitlines()[0]}")
        return False
    return True
