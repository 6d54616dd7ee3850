"""What every site has on one patch: the parts that it sends, those it receives, and its own way to run.

Every state keeps what it receives. A synchronous step fills it in this call, a displaced one reads what the call before
has left, and either leaves this patch's own part to be sent.
"""

import torch

from ..calls.schedule import PatchMode
from ..exchange.slots import Recv, Send

# Sites whose predictions are looked at, at most.
CHECKED_SITES = 16


class Received:
    """A part that another patch sends: `place` is where it is read, and where a synchronous call receives it.

    Where it is predicted, displaced calls receive into two buffers by turns, so that the last two values stay.
    """

    def __init__(self, source, place, predicts):
        self.source, self.place = source, place
        self._turns = (torch.zeros_like(place), torch.zeros_like(place)) if predicts else None

    @property
    def predicts(self):
        """Whether displaced calls read the trend of it carried on."""
        return self._turns is not None

    @property
    def buffers(self):
        """Where displaced calls receive it: the number of the exchange chooses among them."""
        return self._turns or (self.place, self.place)

    def latest(self, epoch):
        """The value received last, in one dimension, before the exchange of number `epoch`."""
        return self._turns[(epoch - 1) % 2].view(-1)

    def learn(self, epoch):
        """Keep what a synchronous call has received, before the exchange of number `epoch`."""
        if self._turns:
            self._turns[epoch % 2].copy_(self._turns[(epoch - 1) % 2])
            self._turns[(epoch - 1) % 2].copy_(self.place)

    def predict(self, epoch, weight):
        """Put what a displaced call reads in its place, before the exchange of number `epoch`."""
        if self._turns and weight:
            torch.lerp(self._turns[epoch % 2], self._turns[(epoch - 1) % 2], 1 + weight, out=self.place)
        elif self._turns:
            self.place.copy_(self._turns[(epoch - 1) % 2])


class State:
    """A site on one patch that needs no other patch."""

    def __init__(self, site, patch, device, predicts=False):
        self.site, self.patch = site, patch
        self.received = []

    @property
    def predicts(self):
        """Whether displaced calls read the trend of what it receives carried on."""
        return bool(self.received) and self.received[0].predicts

    def sends(self):
        """[(target, tensor)] that travel after every call."""
        return []

    def recvs(self):
        """[(source, tensor)] that are filled by them."""
        return [(part.source, part.place) for part in self.received]

    def arrived(self, step):
        """What a synchronous call has received, or a displaced one reads, is in its place after this."""
        for part in self.received:
            if step.mode is PatchMode.DISPLACED:
                step.note(part)
                part.predict(step.epoch, step.weight)
            elif step.keep:
                part.learn(step.epoch)
                step.note(part)

    def run(self, func, args, kwargs, step):
        """The function's result on this patch; `step`, the `Patch`, has the call's mode and what sites share."""
        return func(*args, **kwargs)


def checked(sites, states):
    """{key: name} of the parts whose predictions are looked at: one of each site, of many sites some."""
    pairs = [(id(x.received[0]), site.label) for site, x in zip(sites, states, strict=True) if x.predicts]
    return dict(pairs[:: max(1, -(-len(pairs) // CHECKED_SITES))])


def messages(state, displaced=False):
    """(sends, receives) of a state, as slots take them: of depth 2 for displaced calls, else 1."""
    sends = [Send(target, (x,) * (1 + displaced)) for target, x in state.sends()]
    if displaced:
        return sends, [Recv(part.source, part.buffers) for part in state.received]
    return sends, [Recv(source, (x,)) for source, x in state.recvs()]
