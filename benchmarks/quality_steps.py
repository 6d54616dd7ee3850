"""How close steps side by side come, beside stages, patches and exact sampling with as few calls.

    python benchmarks/quality_steps.py [CONFIGURATION …]

Draws all configurations, or those named, by `quality.py` (ranks under torchrun; finished ones are kept), then writes
quality_steps.json, .md and .svg; rows of what is not drawn stay as they were. Each picture is drawn alone, since blocks
are as long as the worst picture of a batch allows, and the run itself counts the calls that it waits for. Each
configuration is compared, picture by picture, with the exact pictures of the same sampler and steps; so is exact
sampling with fewer steps. Stages, patches, and exact sampling beside 50 steps are not drawn again: the tables take them
from quality_predict.json.
"""

import json

import measure
import quality
import quality_predict_tables
import quality_steps_plot
import quality_steps_tables

from asyncdiff_fast.config import LATENT_TOLERANCE

RUNS = ("50", "25", "12", "25/euler", "25/dpm++", "25/unipc")
# {steps: {ranks: tolerance}}: those with which calls come near to those of as many stages or patches.
TOLERANCES = {
    50: {2: 0.006, 4: 0.014, 8: 0.023},
    25: {2: 0.01, 4: 0.02, 8: 0.03},
    12: {2: 0.03, 4: 0.046, 8: 0.046},
}
# {steps: the fewer ones with which exact sampling takes as few calls}
FEWER_STEPS = {50: (), 25: (20, 17, 14, 12, 10, 8, 7, 6), 12: (10, 9, 8, 7, 6, 5, 4)}


def configurations():
    """[(name, the exact configuration it is compared with)]."""
    found = []
    for run in RUNS:
        steps, slash, sampler = run.partition("/")
        tolerances = list(TOLERANCES[int(steps)].items())
        if not sampler:
            tolerances += [(ranks, LATENT_TOLERANCE) for ranks in TOLERANCES[int(steps)]]
        names = [f"parallel_steps={ranks},tolerance={tolerance:g}@{run}" for ranks, tolerance in sorted(tolerances)]
        names += [f"exact@{number}{slash}{sampler}" for number in (steps, *FEWER_STEPS[int(steps)])]
        found += [(name, f"exact@{run}") for name in dict.fromkeys(names)]
    return found


def key(name, reference):
    """Of a row: its configuration, and for exact ones, of which there may be several, what it stands for."""
    return f"{name} as {reference}" if name.startswith("exact") else name


def rows(args):
    """{key: figures}: of configurations whose pictures are there, and what was measured of the others before."""
    wanted = [key(*pair) for pair in configurations()]
    found = dict.fromkeys(wanted) | committed_rows(args.out)
    for name, reference, figures, facts in quality.measured(args, configurations()):
        calls = facts.get("calls") or [quality.parse_configuration(name)[1]]
        mean = sum(calls) / len(calls)
        found[key(name, reference)] = figures | {
            "date": facts["date"],
            "reference": reference,
            "latency_calls": mean,
            "calls": {"mean": mean, "most": max(calls)},
        }
    return {name: found[name] for name in wanted if found[name]}


def committed_rows(folder):
    path = folder / "quality_steps.json"
    return json.loads(path.read_text())["rows"] if path.exists() else {}


def write(args):
    """Tables and plot of what is drawn so far."""
    pictures = "each picture drawn alone" if args.batch_size == 1 else f"batches of {args.batch_size}"
    result = quality.result(args, pictures, rows(args))
    others, pipelined = (measure.read_result(name) for name in ("quality_predict", "quality_pipelined"))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality_steps.json").write_text(quality_predict_tables.as_json(result))
    (args.out / "quality_steps.md").write_text(quality_steps_tables.as_markdown(result, others))
    (args.out / "quality_steps.svg").write_text(quality_steps_plot.as_plot(result, others, pipelined))


def main(args):
    quality.launch_missing(args)
    write(args)


if __name__ == "__main__":
    names = list(dict.fromkeys(name for pair in configurations() for name in reversed(pair)))
    main(quality.parse_arguments(seeds=1, batch_size=1, configurations=names))
