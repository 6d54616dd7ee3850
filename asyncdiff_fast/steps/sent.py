"""What ranks have sent each other at an exact step or at the end of a block, compared: alike, or another picture."""

import torch

from .block import relative_error

# Goes with an output where latents were changed before an exact step; else how many steps of a block it follows, 0 in
# an exact step.
CUT = -1
# How far outputs of ranks may be apart, of their norm: devices round differently, and guidance makes more of that.
CLOSE = {torch.float64: 1e-5, torch.float32: 1e-2}
CLOSE_IN_HALF = 1e-1


class Sent:
    """Outputs of one exchange, with the number that goes with each: `check` waits for the device.

    Args:
        numbers: tensor of every rank's.
        block: the `Block` that they end, None in an exact step.
        alike: outputs of all ranks that must be the same, to rounding.
    """

    def __init__(self, world, numbers, block=None, alike=()):
        self._names, self._numbers, self._block, self._alike = world.ranks, numbers, block, alike

    def check(self):
        """Raises: ValueError on all ranks if one of them has sent what is of another place, or something else."""
        self._check_places(self._numbers.tolist())
        if len(self._alike) > 1:
            self._check_outputs()

    def _check_places(self, numbers):
        if len(set(numbers)) == 1:
            return
        first = min(range(len(numbers)), key=lambda rank: (numbers[rank] != CUT, numbers[rank]))
        where = "an exact step" if self._block is None else f"step {self._block.first + numbers[first]}"
        raise ValueError(
            f"every rank must change the latents alike: rank {self._names[first]} has changed them before {where}, and "
            "others have not; use the same callbacks on all ranks, with generators of the same seed"
        )

    def _check_outputs(self):
        first, close = self._alike[0], CLOSE.get(self._alike[0].dtype, CLOSE_IN_HALF)
        errors = torch.stack([relative_error(other, first) for other in self._alike[1:]]).tolist()
        for rank, error in enumerate(errors, 1):
            # What is not a number on all ranks is the same picture.
            if not error <= close and not (error != error and torch.equal(first.isnan(), self._alike[rank].isnan())):
                raise ValueError(
                    f"every rank must evaluate a step alike: outputs of rank {self._names[0]} and rank "
                    f"{self._names[rank]} differ by {error:.1e} of their norm, at a step that both have evaluated; use "
                    "the same weights, hooks, guidance, precision and random numbers on all ranks"
                )
