"""The demo: the same pictures unpatched and in each mode, compared by eye, by time and by number."""

import sys
from dataclasses import asdict, dataclass

from . import doctor, folder, report
from .artist import GUIDANCE, Artist, draw_together, together

PROMPTS = (
    "a striped red star left of a blue ring, sunset background",
    "a green circle, night background",
    "a yellow triangle above a purple square, sky background",
    "a striped white ring, field background",
    "a blue star right of a red circle, desert background",
)


@dataclass(frozen=True)
class Mode:
    """The pictures of one way to share, in the order of the prompts, and what each rank's denoisers counted.

    `planned_bytes` is what all ranks together send in a call after warm-up, by the plan.
    """

    config: object
    drawn: list
    stats: list
    planned_bytes: int


def draw_and_compare(path, configs, prompts, steps, out, seed):
    """One rank's work: rank 0 draws every picture alone, then all ranks draw them together in each mode. Collective.

    Rank 0 writes `compare.png` and `report.json` into the folder `out`, and prints the table. A mode that the pipeline
    cannot be shared by is left out, and named. Returns: exit code, 2 on all ranks where `out` cannot be written, before
    anything is drawn, or no mode is left.
    """
    import torch
    from tqdm import tqdm

    from ..exchange.world import stop_process_group
    from ..patching import denoisers

    opened = together(configs[0].world_size, out, "the folder for the pictures")
    if opened is None:
        return 2
    world, place = opened
    pipe = folder.load(path, place, torch.float32 if place.type == "cpu" else torch.float16)
    wanted = [(prompt, seed + i) for i, prompt in enumerate(prompts)]
    total, modes, refused = (1 + len(configs)) * len(prompts) * steps, [], {}
    with tqdm(total=total, unit="step", mininterval=0.5, disable=world.rank != 0) as bar:
        artist = Artist(pipe, denoisers(pipe), place, steps, bar)
        bar.set_description("unpatched, 1 process")
        shortest = min(_warmup_steps(config) for config in configs)
        alone = [artist.draw(*one, shortest) for one in wanted] if world.rank == 0 else []
        world.gather(None, "the unpatched pictures")
        for config in configs:
            name = report.name(asdict(config))
            bar.set_description(f"{name}, {world.size} processes")
            try:
                modes.append(_in_mode(artist, pipe, config, world, wanted))
            except (ValueError, TypeError) as error:
                refused[name] = str(error)
    stop_process_group()
    if world.rank == 0:
        _tell(out, _about(path, place, world.size, steps, seed), prompts, alone, modes, refused)
    return 0 if modes else 2


def _in_mode(artist, pipe, config, world, wanted):
    """The `Mode`: all pictures, drawn together. Raises ValueError or TypeError on all ranks alike if it is refused."""
    from ..patching import denoisers, is_patched, patch, unpatch

    try:
        runtimes = patch(pipe, **asdict(config))
        runtimes = runtimes if isinstance(runtimes, list) else [runtimes]
        drawn = [draw_together(artist, world, *one, _warmup_steps(config)) for one in wanted]
        stats = world.gather([r.stats() for r in runtimes], "the statistics")
        return Mode(config, drawn, stats, sum(r.plan.bytes_per_call for r in runtimes if r.plan is not None))
    finally:
        if any(is_patched(denoiser) for denoiser in denoisers(pipe)):
            unpatch(pipe)


def _tell(out, about, prompts, alone, modes, refused):
    """Write and print what was found."""
    if modes:
        made = about | report.figures(prompts, about["steps"], alone, modes) | {"refused": refused}
        report.write(out, made, alone, modes)
        print(report.table(made))
    for name, reason in refused.items():
        print(f"asyncdiff-fast: no {name}: {reason}", file=sys.stderr, flush=True)
    if modes:
        print(f"\nsee {out / 'compare.png'} and {out / 'report.json'}")


def _warmup_steps(config):
    """Steps that count as warm-up in the times; "auto" tells only of the first."""
    return 1 if config.warmup_steps == "auto" else config.warmup_steps


def _about(path, device, num_processes, steps, seed):
    import torch

    return {
        "pipeline": str(path),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": num_processes,
        "threads_per_process": torch.get_num_threads(),
        "versions": doctor.versions(),
        "steps": steps,
        "guidance_scale": GUIDANCE,
        "seed": seed,
    }
