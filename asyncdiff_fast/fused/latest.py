"""What came along with the latest tensor of a kind, for the one layer that reads it next."""

import weakref

import torch

from ..versions import version


class Latest:
    """Of residual sums their statistics, say.

    Only where `active`, with one rank: to those who follow tensors between modules this would be a way past them.
    """

    def __init__(self, active):
        self._active, self._kept = active, None

    def remember(self, y, along):
        """Keep what came along with `y`."""
        if self._active and not torch.compiler.is_compiling() and not y.is_inference():
            self._kept = weakref.ref(y), version(y), along

    def recall(self, x):
        """What came along with `x`, if it is the latest, unchanged; else None."""
        if self._kept is None or torch.compiler.is_compiling() or self._kept[0]() is not x:
            return None
        return self._kept[2] if self._kept[1] == version(x) else None
