"""Which generation, which step, which call within the step: told from what schedulers and callers do, with no reset."""

from dataclasses import dataclass

import torch

from ..versions import version
from .watch import names_once, seen

# More calls than this without a step are no guidance: begin anew, so that their state does not grow without end.
MOST_CALLS = 32


def timestep_value(timestep):
    """A timestep (number, or tensor of any shape) as a float, None if there is none."""
    if timestep is None:
        return None
    if isinstance(timestep, _Kept):
        timestep = timestep.copy
    return float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)


@dataclass(frozen=True)
class Tick:
    """Place of one call: `step` counts from 0 in each generation; `call` numbers the calls between two steps.

    `exact`: it must read nothing that an earlier call has made, as where steps side by side are evaluated by all ranks.
    """

    begins: bool
    step: int
    call: int
    exact: bool = False


class _Kept:
    """A device timestep as it was at its call: a copy, and where and in which version it was found.

    The tensor itself is kept too, so that no other can come to lie in its place.
    """

    def __init__(self, tensor):
        self.tensor, self.copy, self.place = tensor, tensor.detach().clone(), _place(tensor)


def _place(tensor):
    return tensor.data_ptr(), version(tensor)


def _on_device(timestep):
    return isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu"


def _kept(timestep):
    return _Kept(timestep) if _on_device(timestep) else timestep_value(timestep)


def _same_tensor(timestep, last):
    return isinstance(last, _Kept) and isinstance(timestep, torch.Tensor) and last.place == _place(timestep)


class Clock:
    """Places the calls of one denoiser in generations, steps and calls within a step."""

    def __init__(self):
        self._ended = True
        self._seen = (None, None)
        self._step = self._call = -1
        self._stepped = False
        self._direction = 0
        self._last = None
        self._signatures = {}

    def end(self):
        """The pipeline has ended, or the next call must start anew for another reason."""
        self._ended = True

    def tick(self, timestep, signature):
        """Place the next call.

        Args:
            timestep: the caller's, a tensor or a number.
            signature: anything hashable that changes when cached values no longer fit, such as the inputs' shapes.
        """
        now = seen()
        restarted, stepped = now[0] != self._seen[0], now[1] != self._seen[1]
        # After a scheduler's step only a timestep that costs nothing to read is looked at.
        unread = restarted or self._ended or (stepped and _on_device(timestep))
        moved = 0 if unread else self._moved(timestep)
        begins = self._ended or restarted or self._reversed(moved, stepped)
        if not begins:
            advances = (stepped and not self._is_view(timestep)) or (moved != 0 and not self._stepped)
            step, call = (self._step + 1, 0) if advances else (self._step, self._call + 1)
            begins = call >= MOST_CALLS or self._signatures.get(call, signature) != signature
        if begins:
            step, call = 0, 0
            self._stepped, self._direction, self._signatures = False, 0, {}
        else:
            self._stepped |= stepped
            self._direction = self._direction or moved
        self._step, self._call, self._seen, self._last, self._ended = step, call, now, _kept(timestep), False
        self._signatures[call] = signature
        return Tick(begins, step, call)

    def _is_view(self, timestep):
        """True if a step was made at this very timestep before, as a panorama makes one for each view of it."""
        if timestep is None or self._last is None:
            return False
        on_device = _on_device(timestep) or isinstance(self._last, _Kept)
        same = _same_tensor(timestep, self._last) if on_device else timestep_value(timestep) == self._last
        return same and names_once()

    def _moved(self, timestep):
        """-1, 0 or +1: how the timestep differs from the last call's. Reads a device tensor only if it must."""
        last = self._last
        if last is None or timestep is None or _same_tensor(timestep, last):
            return 0
        a, b = timestep_value(last), timestep_value(timestep)
        return 0 if a == b else (1 if b > a else -1)

    def _reversed(self, moved, stepped):
        """True if the timestep went back, as when a loop starts again."""
        if self._stepped and not stepped:
            return moved > 0
        return moved != 0 and self._direction != 0 and moved != self._direction
