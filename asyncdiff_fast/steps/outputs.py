"""What the denoiser will predict at the next steps, from what it predicted at the last ones: the same on every rank.

A change is expected to be a share of the change before it, so that the last one dies away: the share is found by least
squares over the last few outputs, 0 where they turn at random, 1 where they go straight on (an autoregression of first
order), and damped, since what is carried on too far costs more than what is not. Each picture of a batch has a share of
its own.
"""

import itertools

import torch

# Outputs that are looked at.
KEPT = 6
# Found by comparing pictures, see docs/steps.md.
DAMPING = 0.7


class Outputs:
    """The newest outputs of one generation, as they reached the sampler's step."""

    def __init__(self):
        self._newest, self._share = [], None

    def add(self, output):
        """The output of the next step, in order."""
        if self._newest and self._newest[-1].shape != output.shape:
            self._newest = []
        self._newest, self._share = [*self._newest[1 - KEPT :], output], None

    def __bool__(self):
        return bool(self._newest)

    def ahead(self, number):
        """The output expected `number` steps after the newest known: 1 for the next."""
        last = self._newest[-1]
        if len(self._newest) < 3:
            return last
        if self._share is None:
            self._share = DAMPING * share(self._newest)
        change = last.float() - self._newest[-2].float()
        changes = sum(self._share**i for i in range(1, number + 1))
        return (last.float() + changes * change).to(last)


def share(outputs):
    """(n, 1, …) fp32: the share of a change that comes again, of outputs (n, …) of three successive steps or more.

    The least squares solution, held within 0 and 1.
    """
    changes = [(b.float() - a.float()).flatten(1) for a, b in itertools.pairwise(outputs)]
    pairs = list(itertools.pairwise(changes))
    products = sum((later * earlier).sum(1) for earlier, later in pairs)
    squares = sum(earlier.square().sum(1) for earlier, _ in pairs)
    found = (products / squares.clamp(min=torch.finfo(torch.float32).tiny)).clamp(0.0, 1.0)
    return found.view(-1, *[1] * (outputs[-1].dim() - 1))
