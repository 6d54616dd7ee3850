"""How far each configuration's pictures are from the exact ones of the same seed, on the model of examples/shapes.

    python benchmarks/quality.py --preset stages
    python benchmarks/quality.py --preset patches
    python benchmarks/quality.py exact@50 exact@25 num_stages=2,stride=1,warmup_steps=3@50

A configuration is `exact` or options of `asyncdiff_fast.patch`, then @ and the number of steps, then, if it is not the
model's own, / and a sampler: `exact@25/euler`. All configurations of
one world size run under one launch of torchrun, which this script starts; finished ones are kept until `--fresh`.
The first `exact` configuration is the reference: PSNR and SSIM compare with it picture by picture, and obedience and
Frechet distance are given with their difference from it over the same pictures. Patches with the corrected GroupNorm
are compared, picture by picture, with every other way of as many patches and as much warm-up, or none.
"""

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import measure
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ROOT / "examples" / "shapes"
sys.path.append(str(SHAPES))

import grammar  # noqa: E402
import quality_tables as tables  # noqa: E402
from quality_ruler import Ruler  # noqa: E402
from sampling import GUIDANCE, draw, load  # noqa: E402

import asyncdiff_fast  # noqa: E402
from asyncdiff_fast.environment import parse_options  # noqa: E402

EXACT_STEPS = (50, 33, 25, 20, 17, 13)
STAGES_AND_STRIDES = ((2, 1), (3, 1), (4, 1), (2, 2), (3, 2))
WAYS_OF_PATCHES = (
    ["exchange=sync,warmup_steps=1"]
    + [f"group_norm={how},warmup_steps={w}" for how in ("corrected", "stale", "sync", "local") for w in (1, 4)]
    + [f"exchange=none,warmup_steps={w}" for w in (1, 4)]
    + [f"exchange=none,patch_axis={axis},warmup_steps=0" for axis in ("rows", "columns", "alternating")]
)
PRESETS = {
    "stages": [f"exact@{steps}" for steps in EXACT_STEPS]
    + [
        f"num_stages={stages},stride={stride},warmup_steps={warmup}@50"
        for stages, stride in STAGES_AND_STRIDES
        for warmup in (1, 3, 5, 9)
    ],
    "patches": ["exact@50"] + [f"num_patches={n},{way}@50" for n in (2, 4) for way in WAYS_OF_PATCHES],
}
# Where the results lie, if not in quality.*
FILES = {"patches": "quality_patches"}
SAMPLERS = {
    "euler": diffusers.EulerDiscreteScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}


def parse_configuration(name):
    """`exact@25` -> (None, 25); `num_stages=2@50/euler` -> ({"num_stages": 2}, 50). Raises: ValueError, TypeError."""
    options, at, rest = name.rpartition("@")
    steps, _, sampler = rest.partition("/")
    if not at or not steps.isdigit() or (sampler or "euler") not in SAMPLERS:
        names = " or ".join(SAMPLERS)
        raise ValueError(
            f"a configuration is exact@STEPS or OPTIONS@STEPS, then / and {names} or nothing: got {name!r}"
        )
    # Results are named by what was passed when the published rule was the default.
    given = None if options == "exact" else {"predict": "none"} | parse_options(options)
    return given, int(steps)


def pairs(names):
    """(corrected patches, another way of as many patches and steps and as much warm-up, or none) of a list of names.

    Synchronous patches are left out: they are the reference but for rounding.
    """
    found = []
    for name, other in itertools.product(names, names):
        (ours, steps), (theirs, other_steps) = parse_configuration(name), parse_configuration(other)
        if name == other or steps != other_steps or not ours or not theirs or theirs.get("exchange") == "sync":
            continue
        warmups = (ours.get("warmup_steps"), 0)
        alike = ours.get("num_patches", 1) == theirs.get("num_patches") and theirs.get("warmup_steps") in warmups
        if alike and ours.get("group_norm") == "corrected":
            found.append((name, other))
    return found


def world_size(name):
    options, _ = parse_configuration(name)
    return 1 if options is None else asyncdiff_fast.Config.from_options(options).world_size


def captions_and_seeds(args):
    """One caption and one seed per picture: captions with one and with two things take turns, all of them held out."""
    half = -(-args.prompts // 2)
    pairs = zip(grammar.held_out_set(half, 1), grammar.held_out_set(half, 2), strict=True)
    captions = [caption for pair in pairs for caption in pair][: args.prompts]
    seeds = [1000 * prompt_idx + seed for prompt_idx in range(args.prompts) for seed in range(args.seeds)]
    return [caption for caption in captions for _ in range(args.seeds)], seeds


def picture_file(name, args):
    """Where the pictures of a configuration lie; another model or another set of prompts has another folder."""
    digest = hashlib.sha256(f"{args.prompts} {args.seeds} {args.guidance} {args.batch_size}".encode())
    for weights in sorted(args.model.rglob("*.safetensors")):
        digest.update(weights.read_bytes())
    return args.work / digest.hexdigest()[:12] / f"{name.replace('/', ' ')}.npy"


def draw_configurations(args):
    """What every rank runs: each configuration in turn; rank 0 keeps the pictures."""
    torch.set_num_threads(1)
    pipe = load(args.model).to(asyncdiff_fast.device())
    own = pipe.scheduler
    for name in args.configurations:
        options, steps = parse_configuration(name)
        sampler = SAMPLERS.get(name.rpartition("@")[2].partition("/")[2])
        pipe.scheduler = sampler.from_config(own.config) if sampler else own
        began = time.perf_counter()
        runtime = None if options is None else asyncdiff_fast.patch(pipe, **options)
        pictures, calls = draw_batches(pipe, runtime, steps, args)
        if options is not None:
            asyncdiff_fast.unpatch(pipe)
        if int(os.environ.get("RANK", 0)) == 0:
            seconds = (time.perf_counter() - began) / (steps * -(-len(pictures) // args.batch_size))
            facts = {"s_per_step": seconds, "date": measure.facts()["date"]}
            keep(picture_file(name, args), pictures, facts | calls)
            print(f"drawn: {name}", flush=True)


def draw_batches(pipe, runtime, steps, args):
    """(pictures, {"calls": those of the denoiser that each batch waited for, one after the other, "exact_calls": those
    of them that all ranks made}).

    Calls are counted where steps run side by side; elsewhere there are as many as steps, and the dict is empty.
    """
    captions, seeds = captions_and_seeds(args)
    pictures, calls = [], {}
    for start in range(0, len(captions), args.batch_size):
        batch = slice(start, start + args.batch_size)
        pictures.append(draw(pipe, captions[batch], seeds[batch], steps, args.guidance, args.batch_size))
        if runtime is not None and runtime.config.parallel_steps > 1:
            done = runtime.stats()["steps"]
            runtime.clear_stats()
            every = done["exact_steps"] + done["blocks"] + done["blocks_cut_short"]
            calls.setdefault("calls", []).append(every)
            calls.setdefault("exact_calls", []).append(done["exact_steps"])
    return torch.cat(pictures), calls


def keep(path, pictures, facts):
    """Write the facts, then the pictures: where these are, a configuration is finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(facts))
    np.save(path.with_suffix(".tmp.npy"), pictures.cpu().numpy())
    path.with_suffix(".tmp.npy").replace(path)


def launch_missing(args):
    """Draw what is not there yet, one launch for each world size; an interrupted run goes on where it was."""
    missing = [name for name in args.configurations if args.fresh or not picture_file(name, args).exists()]
    for size in sorted({world_size(name) for name in missing}):
        names = [name for name in missing if world_size(name) == size]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        command += [__file__, "--worker", "--model", args.model, "--work", args.work, "--prompts", str(args.prompts)]
        command += ["--seeds", str(args.seeds), "--guidance", str(args.guidance), "--batch-size", str(args.batch_size)]
        subprocess.run([*command, *names], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def measured(args, pairs):
    """Yields (name, reference, closeness, facts) of each (name, reference) of which all pictures are there."""
    captions, _ = captions_and_seeds(args)
    rulers = {}
    for name, reference in pairs:
        path, exact = picture_file(name, args), picture_file(reference, args)
        if not path.exists() or not exact.exists():
            continue
        if reference not in rulers:
            rulers[reference] = Ruler(np.load(exact), captions, args.seeds)
        facts = json.loads(path.with_suffix(".json").read_text())
        yield name, reference, rulers[reference].closeness(np.load(path)), facts


def result(args, how, rows):
    """What a file of results holds: `how` the pictures were drawn, facts of the machine, {configuration: figures}."""
    return {"title": title(args, how), **measure.facts(), "rows": rows}


def title(args, how):
    """Of results: what was drawn."""
    return f"{args.prompts} held-out prompts × {args.seeds} seeds, guidance {args.guidance:g}, {how}."


def main(args):
    launch_missing(args)
    captions, _ = captions_and_seeds(args)
    pictures_of = {name: np.load(picture_file(name, args)) for name in args.configurations}
    reference = next(name for name in args.configurations if name.startswith("exact@"))
    ruler = Ruler(pictures_of[reference], captions, args.seeds)
    result = {
        "title": title(args, f"DDIM; reference `{reference}`"),
        "note": "100 dB stands for equal; `only by exact`: obeyed by the reference alone; 95 % intervals over prompts.",
        **measure.facts(),
        "rows": {name: ruler.row(pictures) for name, pictures in pictures_of.items()},
        "pairs": {" − ".join(pair): ruler.pair(*map(pictures_of.get, pair)) for pair in pairs(args.configurations)},
    }
    name = FILES.get(args.preset, "quality")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(tables.as_json(result))
    (args.out / f"{name}.md").write_text(tables.as_markdown(result))
    tables.grid(pictures_of, result["rows"], args.seeds).save(args.out / f"{name}.png", optimize=True)
    print(tables.as_markdown(result))


def parse_arguments(**defaults):
    """The command line; `defaults` stand for what another script's grid has otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configurations", nargs="*", help="such as exact@50, num_stages=2,warmup_steps=3@50")
    parser.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2, help="pictures per prompt")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--model", type=Path, default=SHAPES / "unet")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "quality", help="where the pictures lie")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--fresh", action="store_true", help="draw everything again")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    args.configurations = PRESETS.get(args.preset, []) + args.configurations
    if not any(name.startswith("exact@") for name in args.configurations) and not args.worker:
        parser.error("the list needs an exact@STEPS, the reference")
    return args


if __name__ == "__main__":
    arguments = parse_arguments()
    draw_configurations(arguments) if arguments.worker else main(arguments)
