"""How close steps side by side come whose calls are shared out too, beside more steps side by side on as many devices.

    python benchmarks/quality_meshes.py

Draws by `quality.py` (ranks under torchrun; finished configurations are kept), each picture alone, then writes
quality_meshes.json. Steps side by side alone are those of quality_steps.json.
"""

import measure
import quality
import quality_predict_tables

import asyncdiff_fast
from asyncdiff_fast.config import LATENT_TOLERANCE, STEPS_WARMUP

STEPS = 50
REFERENCE = f"exact@{STEPS}"
BESIDE = [f"parallel_steps={n},tolerance={LATENT_TOLERANCE:g}@{STEPS}" for n in (2, 4)]
WAYS = ("num_stages=2", "num_patches=2", "num_stages=2,pipeline_patches=4")
SOURCES = (
    "PSNR in dB against the exact picture, mean (worst picture), and the calls of the whole denoiser that a picture\n"
    "waits for: those of blocks count by their share of the work, of the largest stage or patch. Steps side by side\n"
    "alone are those of quality_steps.json."
)


def configurations():
    """{name: the exact configuration it is compared with}."""
    shared = f"parallel_steps=2,tolerance={LATENT_TOLERANCE:g},warmup_steps={STEPS_WARMUP}"
    return {f"{shared},{way}@{STEPS}": REFERENCE for way in WAYS}


def share(options, pipe):
    """The share of a call that its busiest rank waits for, by counted work."""
    if "num_patches" in options:
        return 1 / options["num_patches"]
    each = asyncdiff_fast.plan(pipe, inputs={"prompt": "a red circle"}, **options).each
    stage = each.division.balance / options["num_stages"]
    if "pipeline_patches" not in options:
        return stage
    return stage / options["pipeline_patches"] * each.micro_steps_per_call()


def rows(args):
    """{name: figures} of every configuration whose pictures are there."""
    pipe, found = quality.load(args.model), {}
    for name, reference, figures, facts in quality.measured(args, configurations().items()):
        exact, every = (sum(facts[kind]) / len(facts[kind]) for kind in ("exact_calls", "calls"))
        latency = exact + (every - exact) * share(quality.parse_configuration(name)[0], pipe)
        more = {"reference": reference, "latency_calls": latency, "exact_calls": exact, "calls": every}
        found[name] = figures | {"date": facts["date"]} | more
    return found


def beside(result, steps):
    """The lines of a table: steps side by side alone, then those whose calls are shared."""
    lines = [SOURCES, "", "| devices | options | PSNR dB, mean (worst) | calls |", "|---" * 4 + "|"]
    for name, row in ({name: steps["rows"][name] for name in BESIDE} | result["rows"]).items():
        options = [o for o in name.partition("@")[0].split(",") if not o.startswith(("tolerance", "warmup_steps"))]
        psnr = f"{row['psnr_db']['mean']:.1f} ({row['psnr_db']['worst']:.1f})"
        cells = (quality.world_size(name), f"`{', '.join(options)}`", psnr, f"{row['latency_calls']:.1f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main(args):
    args.configurations = [REFERENCE, *configurations()]
    quality.launch_missing(args)
    how = f"{STEPS} steps DDIM, tolerance {LATENT_TOLERANCE:g}, each picture drawn alone"
    result = quality.result(args, how, rows(args))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality_meshes.json").write_text(quality_predict_tables.as_json(result))
    print("\n".join(beside(result, measure.read_result("quality_steps"))))


if __name__ == "__main__":
    main(quality.parse_arguments(seeds=1, batch_size=1, configurations=[REFERENCE]))
