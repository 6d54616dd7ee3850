"""Steps that run side by side: what is known of them until they are replayed, and the replay."""

import torch

from .given import SAMPLE
from .outputs import evaluated
from .snapshot import Draws, Snapshot


class Block:
    """Steps `first` to `first + length - 1` of a generation; rank i evaluates the step `first + i`."""

    def __init__(self, first, length):
        self.first, self.length = first, length
        self.steps, self._draws, self._snapshot = [], [], None
        # What this rank has evaluated, as it reached the sampler.
        self._own = None
        # The generators that steps draw from.
        self._drawn = set()

    def is_own(self, step, rank):
        """True if a rank evaluates this step."""
        return step - self.first == rank

    def take(self, scheduler, step, rank):
        """The next step: how it is given, before the sampler makes it."""
        if not self.steps:
            self._snapshot = Snapshot(scheduler)
        if len(self.steps) == rank:
            self._own = step.output
        self.steps.append(step)
        self._draws.append(Draws(step.named, step.sample.device))

    @property
    def is_complete(self):
        """True once the last step was taken."""
        return len(self.steps) == self.length

    @property
    def own(self):
        """The output that this rank shares; of no meaning where it has evaluated none of these steps."""
        return self.steps[0].output if self._own is None else self._own

    def tried(self, output):
        """What the step taken last leads to with an expected output. Returns as `Step.run`."""
        result = self.steps[-1].run(output)
        self._drawn |= self._draws[-1].used()
        return result

    def replay(self, scheduler, outputs):
        """Put the sampler and its random numbers back to the beginning, and make the steps with true outputs.

        Returns: (what the last step returned, its tensors, an `Evaluated` of each step as it was used, relative errors
            of the latents that had been expected, one for each step but the first: on their device, None if there is
            but one step).
        """
        self._snapshot.restore(scheduler)
        result, results, used, errors = None, None, [], []
        for step, draws, output in zip(self.steps, self._draws, outputs, strict=False):
            said = evaluated(scheduler, step, output)
            if results is not None and step.links:
                latents = results[step.links[SAMPLE]]
                errors.append(relative_error(step.sample, latents))
                said = said.at(latents)
            draws.restore(self._drawn)
            result, results = step.run(said.output, results)
            used.append(said)
        return result, results, used, torch.stack(errors) if errors else None


def relative_error(expected, latents):
    """How far latents were from what was expected: the worst picture's, of the norm. A scalar on the device."""
    difference = (expected.float() - latents.float()).reshape(len(latents), -1).norm(dim=1)
    size = latents.float().reshape(len(latents), -1).norm(dim=1)
    return (difference / size.clamp(min=1e-12)).amax()
