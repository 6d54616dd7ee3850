"""Sampling by fixed-point iteration on a window of steps, for sampling loops of users.

All points of a window are evaluated at once, from guesses that every round betters, until they solve the sampler's own
equations: the picture is the sequential one, within the tolerances. `linear.py` reads the equations off a scheduler,
`picard.py` and `anderson.py` iterate, `divided.py` shares a round's points among ranks.
"""

import contextlib
import dataclasses
from dataclasses import dataclass

import torch

from ..config import Config
from ..exchange import fingerprint
from ..exchange.choice import open_exchange
from ..exchange.engine import described
from ..exchange.errors import ExchangeError
from ..exchange.world import World, start_process_group, stop_process_group
from .anderson import Anderson
from .divided import Divided
from .linear import linear
from .picard import Picard

METHODS = {"picard": Picard, "anderson": Anderson}
# The smallest value of each option, and whether it must be larger.
_LEAST = {"window": (1, False), "order": (1, False), "memory": (1, False), "regularisation": (0, True)}
_LEAST |= dict.fromkeys(("tolerance", "tol1", "tol2"), (0, False))


@dataclass(frozen=True)
class WindowRecord:
    """What `sample_window` did.

    Args:
        windows: (first step, step after the last) of each round.
        num_ranks: among which a round's points were divided.
        points: if asked for, (num_steps + 1, …) fp64 after each round, from noise to picture.
    """

    windows: tuple[tuple[int, int], ...]
    num_ranks: int
    points: tuple[torch.Tensor, ...] | None = None

    @property
    def rounds(self):
        """Rounds: exchanges between ranks, and calls of `predict` on each."""
        return len(self.windows)

    @property
    def evaluations(self):
        """Points that all ranks together evaluated; a sequential loop evaluates one a step."""
        return sum(end - begin for begin, end in self.windows)

    @property
    def waits(self):
        """Points that the picture waited for, one after the other, where a device takes as long as it has points."""
        return sum(-(-(end - begin) // self.num_ranks) for begin, end in self.windows)


@torch.no_grad()
def sample_window(
    predict,
    scheduler,
    noise,
    method="anderson",
    *,
    group=None,
    keep_points=False,
    timeout_s=Config.timeout_s,
    **options,
):
    """Sample with many steps evaluated at once, on one device or on several ranks. Collective.

    Args:
        predict: function of points (n, …) in the noise's dtype, scaled as the denoiser's input, and timesteps (n,);
            returns outputs (n, …) as `scheduler.step` takes them, after guidance. The denoiser is not a patched one.
        scheduler: of diffusers, deterministic, one-step, see `linear.LINEAR`; its timesteps are set. Stays as it is.
        noise: (…), one picture's or a batch's latents as the loop begins with them: times `init_noise_sigma`.
        method: "anderson" (ParaTAA) or "picard" (ParaDiGMS).
        group: process group whose ranks divide the points; default: all ranks of torchrun, or this device alone.
        keep_points: record all points after every round.
        timeout_s: seconds to wait for another rank before failing.
        options: see `Anderson` and `Picard`.
    Returns: (latents like `noise`, `WindowRecord`); the same bits on every rank.
    Raises: ValueError or TypeError on every rank alike before anything runs; ExchangeError if a rank fails later.
    Source: ParaTAA (Tang et al., 2024), ParaDiGMS (Shih et al., 2023).
    """
    start_process_group(timeout_s)
    try:
        world = World(_ranks(group), timeout_s)
        rule, sampler = _agreed(world, predict, scheduler, noise, method, options)
        window = min(rule.window or sampler.num_steps, sampler.num_steps)
        windows, kept = [], []
        with _opened(world, noise.device) as exchange:
            evaluate = Divided(predict, sampler, noise, window, world, exchange)
            for begin, end, points in rule.rounds(sampler, noise.double(), evaluate):
                windows.append((begin, end))
                if keep_points:
                    kept.append(points.clone())
    finally:
        stop_process_group()
    return points[-1].to(noise.dtype), WindowRecord(tuple(windows), world.size, tuple(kept) if keep_points else None)


def _ranks(group):
    """torch.distributed's numbers of the ranks that divide the points. Raises: ValueError if this rank is not one."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return (0,)
    ranks = range(dist.get_world_size()) if group is None else dist.get_process_group_ranks(group)
    if dist.get_rank() not in ranks:
        raise ValueError(f"only ranks of the group call sample_window: got rank {dist.get_rank()}, not in {ranks}")
    return ranks


def _agreed(world, predict, scheduler, noise, method, options):
    """(rule, sampler), checked on all ranks together. Raises on all if one refuses, or has got other inputs."""
    problem, mine = None, {}
    try:
        rule = _rule(method, options)
        _check(predict, noise)
        sampler = linear(scheduler, getattr(rule, "end_at_one", False))
        given = {"noise": noise, "method": repr(rule), "sampler": repr((sampler.scales, sampler.a, sampler.b))}
        mine = fingerprint.input_digests(given | {"timesteps": sampler.timesteps})
    except (ValueError, TypeError) as error:
        problem = error
    everyone = world.gather((problem and str(problem), mine), "sample_window")
    if problem is not None:
        raise problem
    for rank, (refusal, theirs) in enumerate(everyone):
        if refusal:
            raise ValueError(f"rank {rank} refused to sample: {refusal}")
        different = sorted(name for name in mine if theirs.get(name) != mine[name])
        if different:
            raise ValueError(
                f"every rank must sample the same: {', '.join(different)} differ between rank {world.rank} and rank "
                f"{rank}; seed the noise alike, and pass the same scheduler and options"
            )
    return rule, sampler


def _rule(method, options):
    """The method with its options. Raises: ValueError or TypeError that names the option and what is allowed."""
    if method not in METHODS:
        raise ValueError(f"method must be {' or '.join(map(repr, METHODS))}: got {method!r}")
    known = {field.name: field for field in dataclasses.fields(METHODS[method])}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise TypeError(f"{method!r} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    for name, value in options.items():
        if name not in _LEAST or (name == "window" and value is None):
            continue
        least, larger = _LEAST[name]
        whole = isinstance(known[name].default, int) or name == "window"
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise TypeError(f"{name} must be {'a whole number' if whole else 'a number'}: got {value!r}")
        if not (value > least if larger else value >= least):
            raise ValueError(f"{name} must be {'more than' if larger else 'at least'} {least}: got {value!r}")
    return METHODS[method](**options)


def _check(predict, noise):
    if not callable(predict):
        raise TypeError(f"predict must be a function of points and timesteps: got {type(predict).__name__}")
    if not isinstance(noise, torch.Tensor) or not noise.is_floating_point() or noise.numel() == 0:
        got = f"{noise.dtype} {tuple(noise.shape)}" if isinstance(noise, torch.Tensor) else type(noise).__name__
        raise TypeError(f"noise must be a floating-point tensor with numbers in it: got {got}")


@contextlib.contextmanager
def _opened(world, device):
    """An exchange for one sampling, or None for one rank; the other ranks learn of what is raised meanwhile."""
    if world.size == 1:
        yield None
        return
    exchange = open_exchange(world, device)
    try:
        with exchange.step():
            yield exchange
    except BaseException as error:
        world.leave(described(error))
        exchange.abort(described(error))
        with contextlib.suppress(ExchangeError):
            exchange.close()
        raise
    exchange.close()
