"""What shows that a weight was written, also where torch does not count the write."""

import torch

from ..versions import version

NUM_SAMPLES = 64


class Stamp:
    """A weight as it was: the object, its version, and on the CPU some of its values."""

    def __init__(self, weight):
        self.weight, self._version = weight, version(weight)
        self._sample = _sample(weight).clone() if weight.device.type == "cpu" else None

    def is_of(self, weight):
        """True if this is the same weight with the same values, as far as can be told without waiting for a device."""
        if weight is not self.weight or version(weight) != self._version:
            return False
        return self._sample is None or torch.equal(_sample(weight), self._sample)


def flat(weight):
    """All values, without a copy if they are dense in either memory format."""
    dense = weight.detach()
    if weight.dim() == 4 and not weight.is_contiguous():
        dense = dense.permute(0, 2, 3, 1)
    return dense.reshape(-1)


def _sample(weight):
    values = flat(weight)
    return values[:: max(1, values.numel() // NUM_SAMPLES)]
