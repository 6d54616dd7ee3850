"""Whether `asyncdiff-fast tune` finds what a full grid finds.

    python benchmarks/tuned.py --save

Tunes the small trained pipeline twice, as users do and with every set on every prompt (`--all`), and compares the
seconds that the grid measured for the recommended options with those of the best that it found.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

from asyncdiff_fast.commands.tune import choosing
from asyncdiff_fast.commands.tune.record import as_trial

# The grid may take as long as it needs.
GRID_MINUTES = 600


def tuned(out, *more):
    """(what `tune.json` says, minutes)."""
    command = [sys.executable, "-m", "asyncdiff_fast.commands.cli", "tune", "--out", str(out), *more]
    began = time.time()
    subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads((out / "tune.json").read_text()), (time.time() - began) / 60


def compared(quick, grid, aim):
    """Row: what was recommended, what the grid's best is, and how much longer the former takes by the grid."""
    trials = {t["name"]: as_trial(t) for t in grid["trials"]}
    prompts = len(grid["key"]["prompts"])
    allowed = [t for t in trials.values() if t.is_complete(prompts) and aim.allows(t)]
    best, mine = min(allowed, key=lambda t: t.picture_s), trials[quick["chosen"]["name"]]
    return {
        "processes": grid["key"]["processes"], "steps": grid["key"]["steps"], "prompts": prompts,
        "recommended": mine.name, "recommended_s": mine.picture_s, "best": best.name, "best_s": best.picture_s,
        "drawn": sum(bool(t["seconds"]) for t in quick["trials"]), "sets": len(trials),
    }  # fmt: skip


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, help="keep the results here, and go on from them")
    parser.add_argument("--save", action="store_true", help="append the row to benchmarks/results/tuned.jsonl")
    options = parser.parse_args(argv)
    how = ("--nproc", str(options.nproc), "--steps", str(options.steps))
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder)
        quick, minutes = tuned(out / "quick", *how)
        grid, grid_minutes = tuned(out / "grid", "--all", "--minutes", str(GRID_MINUTES), *how)
    row = compared(quick, grid, choosing.Aim()) | {"minutes": minutes, "grid_minutes": grid_minutes}
    print(json.dumps(row, indent=1))
    if options.save:
        measure.write_row("tuned", row)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
