"""How much closer predicted stale inputs are than reused ones: every way, every sampler, and exact with fewer steps.

    python benchmarks/quality_predict.py

Draws by `quality.py` (ranks under torchrun; finished configurations are kept), then writes quality_predict.json, .md
and .svg. Each configuration is compared, picture by picture, with the exact pictures of the same sampler and steps;
those of 50 steps DDIM also with exact sampling of fewer steps that takes as long, in calls of the whole denoiser.
"""

import itertools

import quality
import quality_predict_tables as tables

import asyncdiff_fast

WARMUP = 3
STEPS = (50, 25, 12)
FEWER_STEPS = (42, 33, 29, 25, 20, 17, 14, 12)
STAGES = tuple((stages, stride) for stride in (1, 2) for stages in (2, 3, 4))
PATCHES = (2, 4)
PREDICTS = ("none", "linear")
SAMPLERS = ("euler", "dpm++")


def ways():
    """Options of every way to share a call, without `predict`."""
    stages = [f"num_stages={n},stride={stride},warmup_steps={WARMUP}" for n, stride in STAGES]
    return stages + [f"num_patches={n},warmup_steps={WARMUP}" for n in PATCHES]


def configurations():
    """{name: the exact configuration it is compared with}."""
    found = {}
    for steps in STEPS:
        found |= {f"{way},predict={p}@{steps}": f"exact@{steps}" for way in ways() for p in PREDICTS}
    for sampler in SAMPLERS:
        for way in (f"num_stages=4,stride=1,warmup_steps={WARMUP}", f"num_patches=4,warmup_steps={WARMUP}"):
            found |= {f"{way},predict={p}@25/{sampler}": f"exact@25/{sampler}" for p in PREDICTS}
    return found | {f"exact@{steps}": "exact@50" for steps in (50, *FEWER_STEPS)}


def latency(name, plans):
    """Calls of the whole denoiser that one picture waits for, by counted work: those of the busiest rank."""
    options, steps = quality.parse_configuration(name)
    if options is None:
        return float(steps)
    warmup = options["warmup_steps"]
    key = options.get("num_stages", 1), options.get("num_patches", 1), options["predict"]
    return warmup + (steps - warmup) / options.get("stride", 1) * plans[key]


def largest_shares():
    """{(stages, patches, predict): the share of a call's work that the busiest rank has}."""
    pipe = quality.load(quality.SHAPES / "unet")
    found = {(1, n, predict): 1 / n for n in PATCHES for predict in PREDICTS}
    for stages, predict in itertools.product({n for n, _ in STAGES}, PREDICTS):
        plan = asyncdiff_fast.plan(pipe, num_stages=stages, predict=predict, inputs={"prompt": "a red circle"})
        found[stages, 1, predict] = plan.division.balance / stages
    return found


def rows(args, references):
    """{name: figures} of every configuration whose pictures are there."""
    plans = largest_shares()
    return {
        name: figures | facts | {"reference": reference, "latency_calls": latency(name, plans)}
        for name, reference, figures, facts in quality.measured(args, references.items())
    }


def main(args):
    references = configurations()
    args.configurations = list(dict.fromkeys([*references.values(), *references]))
    quality.launch_missing(args)
    how = f"{WARMUP} warm-up steps, batches of {args.batch_size}"
    result = quality.result(args, how, rows(args, references))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality_predict.json").write_text(tables.as_json(result))
    (args.out / "quality_predict.md").write_text(tables.as_markdown(result))
    (args.out / "quality_predict.svg").write_text(tables.as_plot(result))


if __name__ == "__main__":
    main(quality.parse_arguments(configurations=["exact@50"]))
