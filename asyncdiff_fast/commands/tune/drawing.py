"""What ranks do together in `tune`: rank 0 alone draws exact pictures, or all draw by one set of options."""

import contextlib
from dataclasses import dataclass

from ...exchange.wire import register
from ..artist import draw_together

# Steps of the sampler, after the exact ones, of the picture that plans and packs weights, and is not counted.
FIRST = 3


@register
@dataclass(frozen=True)
class Task:
    """Pictures to draw, told to all ranks by rank 0.

    `options`: of `patch`; None: rank 0 draws alone. `is_patched`: that it does on a patched pipeline. `wanted`:
    ((number, prompt, seed), ...). `num_steps`: of the sampler.
    """

    options: dict | None
    wanted: tuple
    num_steps: int
    is_patched: bool = True


def carry_out(task, pipe, artist, world, took):
    """Draw. Collective.

    Args:
        took: on rank 0, is given (number of the prompt, `Drawn`) of each picture, and returns False to stop.
    Returns: why the pipeline cannot be shared so, the same on all ranks, or None.
    """
    if task.options is None:
        if world.rank == 0:
            with _patched_alone(pipe) if task.is_patched else contextlib.nullcontext():
                _draw(artist, artist.draw, task, 1, took)
        world.gather(None, "pictures of one device")
        return None
    from ...config import Config

    config = Config.from_options(task.options)
    exact = 1 if config.warmup_steps == "auto" else config.warmup_steps

    def draw(prompt, seed, warmup):
        return draw_together(artist, world, prompt, seed, warmup)

    def agreed(number, drawn):
        return world.broadcast(took(number, drawn) if world.rank == 0 else None, "whether to go on")

    try:
        with _patched(pipe, task.options):
            _draw(artist, draw, task, exact, agreed)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def _draw(artist, draw, task, exact, took):
    """Twice in short, uncounted, then every picture: weights are packed in the second generation."""
    _, prompt, seed = task.wanted[0]
    artist.steps = min(exact + FIRST, task.num_steps)
    for _ in range(2):
        draw(prompt, seed, exact)
    artist.steps = task.num_steps
    for number, prompt, seed in task.wanted:
        if not took(number, draw(prompt, seed, exact)):
            return


@contextlib.contextmanager
def _patched(pipe, options, mesh=None):
    from ...patching import denoisers, is_patched, patch, unpatch

    try:
        patch(pipe, mesh=mesh, **options)
        yield
    finally:
        if any(is_patched(denoiser) for denoiser in denoisers(pipe)):
            unpatch(pipe)


def _patched_alone(pipe):
    """This rank's pipeline, patched for one device."""
    from torch.distributed.device_mesh import DeviceMesh

    from ...exchange.world import device

    return _patched(pipe, {}, DeviceMesh(device().type, [0], _init_backend=False))
