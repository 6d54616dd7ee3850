"""What the denoiser will predict at the next steps, from what it predicted at the last ones: the same on every rank.

Outputs are compared as the pictures that they stand for, where the sampler's levels tell that: a picture changes less
from step to step than a noise or a velocity, which change with the level alone. Else they are compared as they are.

A change is expected to be a share of the change before it, so that the last one dies away: the share is found by least
squares over the last few, 0 where they turn at random, 1 where they go straight on (an autoregression of first order),
and damped, since what is carried on too far costs more than what is not. Each picture of a batch has its own share.
"""

import itertools
from dataclasses import dataclass

import torch

from .given import TIMESTEP
from .levels import Level, level

# Outputs that are looked at.
KEPT = 6
# Found by comparing pictures, see docs/steps.md.
DAMPING = 0.7


@dataclass(frozen=True)
class Evaluated:
    """An output of the denoiser, the latents that it is of, and their level, or None where that says nothing of it."""

    output: torch.Tensor
    sample: torch.Tensor
    level: Level | None

    def at(self, latents):
        """The same at other latents of this step: the output as it would probably be there."""
        if self.level is None:
            return Evaluated(self.output, latents, None)
        moved = self.output.float() + self.level.slope * (latents.float() - self.sample.float())
        return Evaluated(moved.to(self.output), latents, self.level)

    @property
    def said(self):
        """The picture that the output stands for, or the output."""
        return self.output.float() if self.level is None else self.level.picture(self.sample, self.output)


def evaluated(scheduler, step, output=None):
    """An `Evaluated` of a step that the scheduler is about to make; `output` if not the one that it is given."""
    output, timestep = step.output if output is None else output, step.named.get(TIMESTEP)
    known = timestep is not None and output.shape == step.sample.shape
    return Evaluated(output, step.sample, level(scheduler, timestep) if known else None)


class Outputs:
    """The newest outputs of one generation, as they reached the sampler's step."""

    def __init__(self):
        self._newest, self._share, self._kind = [], None, None

    def add(self, evaluated):
        """What the denoiser said at the next step, in order."""
        said, kind = evaluated.said, (evaluated.output.shape, evaluated.level is None)
        if kind != self._kind:
            self._newest, self._kind = [], kind
        self._newest, self._share = [*self._newest[1 - KEPT :], said], None

    def __bool__(self):
        return bool(self._newest)

    def ahead(self, number, like):
        """The output expected `number` steps after the newest known: 1 for the next.

        Args:
            like: an `Evaluated` of that step, whatever its output.
        """
        said = self._ahead(number)
        known = like.level is not None and not self._kind[1]
        return (like.level.output(like.sample, said) if known else said).to(like.output)

    def _ahead(self, number):
        last = self._newest[-1]
        if len(self._newest) < 3:
            return last
        if self._share is None:
            self._share = DAMPING * share(self._newest)
        return last + sum(self._share**i for i in range(1, number + 1)) * (last - self._newest[-2])


def share(outputs):
    """(n, 1, …) fp32: the share of a change that comes again, of (n, …) fp32 of three successive steps or more.

    The least squares solution, held within 0 and 1.
    """
    changes = [(b - a).flatten(1) for a, b in itertools.pairwise(outputs)]
    pairs = list(itertools.pairwise(changes))
    products = sum((later * earlier).sum(1) for earlier, later in pairs)
    squares = sum(earlier.square().sum(1) for earlier, _ in pairs)
    found = (products / squares.clamp(min=torch.finfo(torch.float32).tiny)).clamp(0.0, 1.0)
    return found.view(-1, *[1] * (outputs[-1].dim() - 1))
