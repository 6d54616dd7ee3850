"""How close patches that pass through stages come, beside the other modes at about equal calls.

    python benchmarks/quality_pipelined.py

Draws by `quality.py` (ranks under torchrun; finished configurations are kept), then writes quality_pipelined.json and
.md, and the plot of all modes, quality_steps.svg. Stages, patches and steps side by side are not drawn again: they are
those of quality_predict.json and quality_steps.json.
"""

import measure
import quality
import quality_predict_tables
import quality_steps_plot
import quality_steps_tables

import asyncdiff_fast

WARMUP, STEPS = 3, 50
STAGES_AND_PATCHES = ((2, 4), (2, 8), (4, 4), (4, 8))
PREDICTS = ("none", "linear")
REFERENCE = f"exact@{STEPS}"
SOURCES = (
    "PSNR in dB against the exact picture, mean (worst picture), and the calls of the whole denoiser that a picture\n"
    "waits for, by counted work: a call takes M + N - 1 micro-steps, each of them a patch in the largest stage. Of\n"
    "the other modes the closest in the mean of those that take at most a quarter more calls."
)


def configurations():
    """{name: the exact configuration it is compared with}."""
    ways = [f"num_stages={n},pipeline_patches={m},warmup_steps={WARMUP}" for n, m in STAGES_AND_PATCHES]
    return {f"{way},predict={p}@{STEPS}": REFERENCE for way in ways for p in PREDICTS}


def latency(name, pipe):
    """Calls of the whole denoiser that one picture waits for, by counted work."""
    options, steps = quality.parse_configuration(name)
    plan = asyncdiff_fast.plan(pipe, inputs={"prompt": "a red circle"}, **options)
    micro_step = plan.division.balance / options["num_stages"] / options["pipeline_patches"]
    return WARMUP + (steps - WARMUP) * plan.micro_steps_per_call() * micro_step


def rows(args):
    """{name: figures} of every configuration whose pictures are there."""
    pipe = quality.load(args.model)
    return {
        name: figures | facts | {"reference": reference, "latency_calls": latency(name, pipe)}
        for name, reference, figures, facts in quality.measured(args, configurations().items())
    }


def beside(result, predicted, steps):
    """The lines of a table: every row beside the closest of each other mode at about equal calls."""
    heads = ["stages × patches, `predict`", "patches through stages", "stages", "patches side by side"]
    heads.append("steps side by side")
    lines = [SOURCES, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    others = predicted["rows"] | steps["rows"]
    for name, row in result["rows"].items():
        cells = [quality_steps_tables.cell(result["rows"], name, options=False)]
        for mode in ("num_stages", "num_patches", "parallel_steps"):
            cells.append(quality_steps_tables.cell(others, quality_steps_tables.closest(others, row, mode)))
        what = f'{quality_steps_plot.label(name)}, "{quality_predict_tables.kind(name)}"'
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def main(args):
    args.configurations = [REFERENCE, *configurations()]
    quality.launch_missing(args)
    how = f"{STEPS} steps DDIM, {WARMUP} warm-up steps, batches of {args.batch_size}"
    result = quality.result(args, how, rows(args))
    predicted, steps = (measure.read_result(name) for name in ("quality_predict", "quality_steps"))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality_pipelined.json").write_text(quality_predict_tables.as_json(result))
    lines = [result["title"], "", *beside(result, predicted, steps), "", "![closeness by calls](quality_steps.svg)"]
    (args.out / "quality_pipelined.md").write_text("\n".join(lines) + "\n")
    (args.out / "quality_steps.svg").write_text(quality_steps_plot.as_plot(steps, predicted, result))


if __name__ == "__main__":
    main(quality.parse_arguments(seeds=1, configurations=[REFERENCE]))
