"""What processes hold of a denoiser that `load` divides among them: `python benchmarks/memory.py [--save]`.

Writes a denoiser with random weights to a temporary folder, then loads and runs it: whole in one process, by 2 and by 4
ranks; and, with half as much memory for each process as its weights take (RLIMIT_DATA, which counts what a process has
of its own: neither mapped files nor address space that is reserved), in one process and by 4 ranks.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

import diffusers
import measure
import torch
import torch.distributed as dist

import asyncdiff_fast
from asyncdiff_fast.commands.launch import launch
from asyncdiff_fast.exchange.world import World

WIDTH = dict(attention_head_dim=64, num_attention_heads=20, cross_attention_dim=1280)
SIZES = dict(sample_size=16, caption_channels=32)
CALLS, PATIENCE_S = 3, 300
# Of all tensors' largest element: a denoiser in parts rounds differently.
CLOSE = 1e-4
ABSENT = dict.fromkeys(("text_encoder", "tokenizer", "vae"))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=20, help="blocks of 105 MB each")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", action="store_true", help="print each row as a JSON object")
    parser.add_argument("--save", action="store_true", help="append the rows to benchmarks/results/memory.jsonl")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def status(name):
    """Bytes of a line of /proc/self/status."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def denoiser(layers, **sizes):
    """A PixArt with random weights."""
    return diffusers.PixArtTransformer2DModel(**{**SIZES, **sizes}, num_layers=layers).eval().requires_grad_(False)


def write(folder, layers):
    """Save a pipeline of which only the denoiser and the sampler are there; returns the bytes of its weights."""
    torch.manual_seed(0)
    model = denoiser(layers, **WIDTH)
    pipe = diffusers.PixArtAlphaPipeline(transformer=model, scheduler=diffusers.DDIMScheduler(), **ABSENT)
    pipe.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def results(model):
    """What a few calls give."""
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 8, 32, generator=generator)
    found, conditions = [], {"resolution": None, "aspect_ratio": None}
    for t in range(900, 900 - 50 * CALLS, -50):
        times = torch.full((2,), t)
        found.append(model(x, text, timestep=times, added_cond_kwargs=conditions).sample.chunk(2, 1)[0])
        x = x - 0.1 * found[-1]
    return found


def load(folder):
    """(pipeline, runtime or None): whole in one process, else by all ranks."""
    if dist.get_world_size() == 1:
        return diffusers.PixArtAlphaPipeline.from_pretrained(folder, **ABSENT), None
    options = dict(num_stages=dist.get_world_size(), pipeline_patches=2, balance="memory", warmup_steps=1)
    pipe = asyncdiff_fast.load(diffusers.PixArtAlphaPipeline, folder, components=ABSENT, **options)
    return pipe, pipe.transformer._asyncdiff_fast


def measured(folder, limit):
    """What this rank held. Raises what loading or running raises."""
    # What code and libraries take that any denoiser needs.
    results(denoiser(1, attention_head_dim=4, num_attention_heads=2, cross_attention_dim=8))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + limit, resource.RLIM_INFINITY))
    pipe, runtime = load(folder)
    found = results(pipe.transformer)
    row = {"peak": status("VmHWM") - before, "after": status("VmRSS") - before}
    if runtime is not None:
        plan, modules = runtime.plan, dict(pipe.transformer.named_modules())
        unit = max(sum(p.nbytes for p in modules[u.name].parameters()) for u in plan.whole.units)
        row |= {"held": plan.held_bytes(dist.get_rank()), "glue": plan.weight_bytes[-1], "unit": unit}
    expected = folder / "results.pt"
    if not expected.exists():
        torch.save(found[0], expected)
    whole = torch.load(expected)
    # The first call is exact.
    error = float((found[0] - whole).abs().max() / whole.abs().max())
    if not error <= CLOSE:
        raise ValueError(f"the ranks' first result is off by {error:.1e} of its maximum")
    return row


def measure_rank(options):
    """A row of what all ranks held; None but on rank 0."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    try:
        mine = measured(options.folder, options.limit)
    except (MemoryError, RuntimeError) as error:
        # Where there are others, they would wait.
        if dist.get_world_size() > 1:
            raise
        mine = {"refused": f"{type(error).__name__}: {error}".splitlines()[0]}
    ranks = World(range(dist.get_world_size()), PATIENCE_S).gather(mine, "what was held")
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
    if dist.get_rank():
        return None
    weights = sum(path.stat().st_size for path in options.folder.rglob("*.safetensors"))
    return {"nproc": len(ranks), "weights": weights, "limit": options.limit, "ranks": ranks}


def bound(row):
    """The most that a rank is to hold at any time: its share, the largest unit and the glue, one unit while loading."""
    first = row["ranks"][0]
    return row["weights"] / row["nproc"] + 2 * first["unit"] + first["glue"]


def cells(rows):
    """(header, rows) of a table of the latest rows of each kind."""
    latest = {(row["limit"] is not None, row["nproc"]): row for row in rows}
    header = ["processes, most memory of each", "weights held, MB", "peak, MB", "share + glue + 2 units, MB"]
    body = []
    for (limited, nproc), row in sorted(latest.items()):
        most = f"{_mb(row['limit'])} MB" if limited else "no limit"
        ranks = row["ranks"]
        if "refused" in ranks[0]:
            body.append([f"{nproc}, {most}", "cannot load", "", ""])
            continue
        held = " / ".join(_mb(rank.get("held", row["weights"])) for rank in ranks)
        peaks = " / ".join(_mb(rank["peak"]) for rank in ranks)
        body.append([f"{nproc}, {most}", held, peaks, _mb(bound(row)) if nproc > 1 else ""])
    return header, body


def _mb(n):
    return f"{n / 1e6:.0f}"


def as_rank(options):
    """What each process that `main` starts does."""
    dist.init_process_group("gloo")
    row = measure_rank(options)
    if row is not None:
        if options.save:
            measure.write_row("memory", row)
        print(json.dumps(row) if options.json else row, flush=True)
    dist.destroy_process_group()
    return 0


def main(argv):
    options = parse(argv)
    if "RANK" in os.environ:
        return as_rank(options)
    with tempfile.TemporaryDirectory() as folder:
        weights = write(Path(folder), options.layers)
        limits = [(n, None) for n in options.ranks] + [(n, weights // 2) for n in (1, max(options.ranks))]
        for nproc, limit in limits:
            more = [] if limit is None else ["--limit", str(limit)]
            code = launch(nproc, ["--", __file__, *argv, "--folder", folder, *more])
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
