"""Pictures drawn and timed, by one process or by all together."""

import sys
import time
from dataclasses import dataclass

GUIDANCE = 5.0

# The other ranks wait this long while rank 0 draws alone; a rank that dies is noticed by the launcher, at once.
_PATIENCE_S = 3600.0


@dataclass(frozen=True)
class Drawn:
    """One picture: (3, h, w) fp32 in 0..1; seconds for all of it, and for a step after warm-up (None: no such step).

    The latter is the mean over those steps, since those of a block end together. `core_s` are the seconds of a CPU core
    that this process got meanwhile.
    """

    picture: object
    seconds: float
    step_s: float | None
    core_s: float


class Artist:
    """Draws with one pipeline, and keeps the times.

    Args:
        steps: of the sampler.
        bar: of tqdm, moved by every call.
        inputs: more arguments of the pipeline; default: the guidance of the demo.
    """

    def __init__(self, pipe, denoisers, device, steps, bar, inputs=None):
        self.steps, self._pipe, self._device, self._bar = steps, pipe, device, bar
        self._inputs = {"guidance_scale": GUIDANCE} if inputs is None else inputs
        self._ends = []
        for denoiser in denoisers:
            denoiser.register_forward_hook(self._call_ended)

    def _call_ended(self, *_):
        self._ends.append(self._now())
        # A sampler may call the denoiser more than once a step.
        self._bar.update(min(1, self.steps / len(self._ends)))

    def _now(self):
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def draw(self, prompt, seed, warmup_steps):
        """`Drawn`: the picture of one prompt, its noise from `seed`."""
        import torch

        self._ends.clear()
        begin, core_begin = self._now(), time.process_time()
        made = self._pipe(
            prompt,
            num_inference_steps=self.steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            **self._inputs,
        ).images[0]
        seconds, core_s = self._now() - begin, time.process_time() - core_begin
        return Drawn(made.float().cpu(), seconds, self._step_s(begin, warmup_steps), core_s)

    def _step_s(self, begin, warmup_steps):
        steady = self.steps - warmup_steps
        if steady <= 0:
            return None
        num_exact = warmup_steps * len(self._ends) // self.steps
        # Naive patches have no warm-up.
        return (self._ends[-1] - (self._ends[num_exact - 1] if num_exact else begin)) / steady


def draw_together(artist, world, prompt, seed, warmup_steps):
    """A picture that all ranks draw, with the times of the slowest, from barrier to barrier."""
    world.gather(None, "the start of a picture")
    drawn = artist.draw(prompt, seed, warmup_steps)
    times = world.gather((drawn.seconds, drawn.step_s or 0.0), "the end of a picture")
    seconds, step_s = (max(column) for column in zip(*times, strict=True))
    return Drawn(drawn.picture, seconds, step_s or None, drawn.core_s)


def together(num_processes, out, what):
    """(the `World` of all ranks, this one's device), ready to draw; None on all ranks where `out` cannot be written.

    Rank 0 says so on stderr. Collective.
    """
    import torch

    from ..exchange.world import World, device, start_process_group, stop_process_group
    from ..profiling.session import unwritable

    place = device()
    if place.type == "cpu":
        torch.set_num_threads(1)
    start_process_group(_PATIENCE_S)
    world = World(range(num_processes), _PATIENCE_S)
    problem = world.broadcast(unwritable(out) if world.rank == 0 else None, what)
    if not problem:
        return world, place
    stop_process_group()
    if world.rank == 0:
        print(f"asyncdiff-fast: --out must be a folder that can be written: {problem}; name another", file=sys.stderr)
    return None
