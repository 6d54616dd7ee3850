"""A generation as events: calls one after the other or steps side by side, and the halves of guidance."""

import math

from ..steps.lengths import Lengths
from .events import Compute, Mark, Post, Wait

ERROR_BYTES = 4


def everyone(key, ranks, mine, nbytes):
    """Events: every rank gets every other's message."""
    others = [rank for rank in ranks if rank != mine]
    yield Post(key, tuple((rank, nbytes) for rank in others))
    for rank in others:
        yield Wait(key, rank)


def from_first(key, ranks, mine, nbytes):
    """Events: every rank gets the first one's message."""
    if mine == ranks[0]:
        yield Post(key, tuple((rank, nbytes) for rank in ranks[1:]))
    else:
        yield Wait(key, ranks[0])


class WholeCalls:
    """The calls of a rank that shares none."""

    def __init__(self, seconds):
        self._seconds = seconds

    def call(self, step, exact=False):
        """Events of one call, which reads nothing that an earlier one has made if it is `exact`."""
        yield Compute(self._seconds)


class HalfCalls:
    """The calls of a rank that runs one half of guidance: `calls`, and then both get both results of `nbytes`."""

    def __init__(self, calls, ranks, mine, nbytes):
        self._calls, self._ranks, self._mine, self._nbytes = calls, ranks, mine, nbytes

    def call(self, step, exact=False):
        """Events of one call."""
        yield from self._calls.call(step, exact)
        yield from everyone(("half", step), self._ranks, self._mine, self._nbytes)


def one_by_one(calls, steps, sampler_s):
    """Events of steps of a generation, each with a call on every rank."""
    for step in steps:
        yield Mark(step)
        yield from calls.call(step)
        yield Compute(sampler_s)


def side_by_side(calls, config, ranks, mine, nbytes, num_steps, times, error=0.0):
    """Events of a generation in blocks.

    Args:
        ranks: that evaluate steps side by side; `mine` is this one.
        nbytes: of an output.
        error: of a latent predicted one step ahead, at every step.
    """
    place, step = ranks.index(mine), 0
    lengths = Lengths(len(ranks), config.least_warmup, config.tolerance)
    while step < num_steps:
        yield Mark(step)
        length = lengths.at(step, num_steps - step)
        if place < length or length == 1:
            yield from calls.call(step + (place if length > 1 else 0), exact=length == 1)
        yield from everyone(("outputs", step), ranks, mine, nbytes)
        yield Compute(length * (times.sampler_s + (times.block_s if length > 1 else 0.0)))
        if step > 0:
            # The first exact step has no output to predict from.
            lengths.learn(error, 1)
        yield from from_first(("error", step), ranks, mine, ERROR_BYTES)
        step += length


def lasting(error):
    """Blocks that a constant error leaves, checked to be a number."""
    if not (math.isfinite(error) and error >= 0):
        raise ValueError(f"error must be a relative error, a number of at least 0: got {error!r}")
    return error
