"""The demo: the same pictures unpatched and patched, compared by eye, by time and by number."""

import os
import sys
import time
from dataclasses import asdict, dataclass

from . import doctor, folder, report
from .launch import UsageError, launch

PROMPTS = (
    "a striped red star left of a blue ring, sunset background",
    "a green circle, night background",
    "a yellow triangle above a purple square, sky background",
    "a striped white ring, field background",
    "a blue star right of a red circle, desert background",
)
GUIDANCE = 5.0
# The other ranks wait this long while rank 0 draws alone; a rank that dies is noticed by the launcher, at once.
_PATIENCE_S = 3600.0
# So many processes a machine bears, however few its cores.
_FEW = 4


@dataclass(frozen=True)
class Drawn:
    """One picture: (3, h, w) fp32 in 0..1; seconds for all of it, and for a step after warm-up (None: no such step).

    `core_s` are the seconds of a CPU core that this process got meanwhile.
    """

    picture: object
    seconds: float
    step_s: float | None
    core_s: float


def start(config, command_line):
    """Start the ranks, each with the command line that this process got. Returns their exit code.

    Raises: UsageError if there are neither GPUs nor CPU cores for so many.
    """
    import torch

    on_gpus, cores = torch.cuda.device_count() >= config.world_size, len(os.sched_getaffinity(0))
    if not on_gpus and config.world_size > max(cores, _FEW):
        raise UsageError(
            f"the demo needs a CPU core for each process, or no more than {_FEW} processes: got {config.world_size} "
            f"processes, {cores} cores; use fewer stages or patches"
        )
    kind = "GPU" if on_gpus else "CPU"
    print(f"starting {config.world_size} {kind} processes; they import torch and diffusers first", flush=True)
    hidden = {} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return launch(config.world_size, ["-m", "asyncdiff_fast.commands.cli", *command_line], **hidden)


def draw_and_compare(path, config, prompts, steps, out, seed):
    """One rank's work: rank 0 draws every picture alone, then all ranks draw them together. Collective.

    Rank 0 writes `compare.png` and `report.json` into the folder `out`, and prints the table.
    """
    import torch
    from tqdm import tqdm

    from ..exchange.world import World, device, start_process_group, stop_process_group
    from ..patching import denoisers, unpatch

    place = device()
    if place.type == "cpu":
        torch.set_num_threads(1)
    start_process_group(_PATIENCE_S)
    world = World(range(config.world_size), _PATIENCE_S)
    pipe = folder.load(path, place, torch.float32 if place.type == "cpu" else torch.float16)
    with tqdm(total=2 * len(prompts) * steps, unit="step", mininterval=0.5, disable=world.rank != 0) as bar:
        artist = _Artist(pipe, denoisers(pipe), place, steps, config.warmup_steps, bar)
        bar.set_description("unpatched, 1 process")
        alone = [artist.draw(p, seed + i) for i, p in enumerate(prompts)] if world.rank == 0 else []
        world.gather(None, "the unpatched pictures")
        runtimes = _patched(pipe, config, world)
        bar.set_description(f"patched, {world.size} processes")
        together = [_draw_together(artist, world, p, seed + i) for i, p in enumerate(prompts)]
        stats = world.gather([r.stats() for r in runtimes], "the statistics")
    planned = sum(r.plan.bytes_per_call for r in runtimes if r.plan is not None)
    unpatch(pipe)
    stop_process_group()
    if world.rank == 0:
        made = _about(path, place, config, steps, seed) | report.figures(prompts, alone, together, stats, planned)
        report.write(out, made, alone, together)
        print(report.table(made), f"\nsee {out / 'compare.png'} and {out / 'report.json'}", sep="\n")


def _patched(pipe, config, world):
    """The runtimes of a patched pipeline. A refusal, which all ranks get alike, is told by rank 0; all exit with 2."""
    from ..patching import patch

    try:
        runtimes = patch(pipe, **asdict(config))
    except (ValueError, TypeError) as error:
        if world.rank == 0:
            print(f"\nasyncdiff-fast: {error}", file=sys.stderr, flush=True)
        world.gather(None, "the refusal")
        sys.exit(2)
    return runtimes if isinstance(runtimes, list) else [runtimes]


class _Artist:
    """Draws with one pipeline, and keeps the times."""

    def __init__(self, pipe, denoisers, device, steps, warmup_steps, bar):
        self._pipe, self._device, self._steps, self._warmup_steps, self._bar = pipe, device, steps, warmup_steps, bar
        self._ends = []
        for denoiser in denoisers:
            denoiser.register_forward_hook(self._call_ended)

    def _call_ended(self, *_):
        self._ends.append(self._now())
        # A sampler may call the denoiser more than once a step.
        self._bar.update(min(1, self._steps / len(self._ends)))

    def _now(self):
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def draw(self, prompt, seed):
        """`Drawn`: the picture of one prompt, its noise from `seed`."""
        import torch

        self._ends.clear()
        begin, core_begin = self._now(), time.process_time()
        made = self._pipe(
            prompt,
            num_inference_steps=self._steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images[0]
        seconds, core_s = self._now() - begin, time.process_time() - core_begin
        num_exact = self._warmup_steps * len(self._ends) // self._steps
        steady = self._steps - self._warmup_steps
        step_s = (self._ends[-1] - self._ends[num_exact - 1]) / steady if steady > 0 else None
        return Drawn(made.float().cpu(), seconds, step_s, core_s)


def _draw_together(artist, world, prompt, seed):
    """A picture that all ranks draw, with the times of the slowest, from barrier to barrier."""
    world.gather(None, "the start of a picture")
    drawn = artist.draw(prompt, seed)
    times = world.gather((drawn.seconds, drawn.step_s or 0.0), "the end of a picture")
    seconds, step_s = (max(column) for column in zip(*times, strict=True))
    return Drawn(drawn.picture, seconds, step_s or None, drawn.core_s)


def _about(path, device, config, steps, seed):
    import torch

    return {
        "pipeline": str(path),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": config.world_size,
        "threads_per_process": torch.get_num_threads(),
        "versions": doctor.versions(),
        "options": asdict(config),
        "steps": steps,
        "guidance_scale": GUIDANCE,
        "seed": seed,
    }
