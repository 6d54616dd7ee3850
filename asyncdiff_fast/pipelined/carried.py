"""What a call of micro-steps reads of the call before, with its last change carried on."""

import torch


class Carried:
    """What patches read of later ones, of which the last change is carried on; in `tensors()`."""

    _before = None

    def put_aside(self):
        """An exact call is to fill this: the trend is from what it is now."""
        self._before = [x.clone() for x in self.tensors()]

    def carry_on(self, weight):
        """A call of micro-steps begins: a value becomes last + weight * (last - before), and `last` the one before."""
        last = [x.clone() for x in self.tensors()]
        if weight:
            for x, before in zip(self.tensors(), self._before, strict=True):
                torch.lerp(before, x, 1 + weight, out=x)
        self._before = last


class Reused:
    """What stays as it is: a prediction of a variance may be negative, and of what is corrected brings nothing."""

    def put_aside(self):
        """See `Carried`."""

    def carry_on(self, weight):
        """See `Carried`."""
