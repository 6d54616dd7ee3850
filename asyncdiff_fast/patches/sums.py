"""A sum over rows on one patch, of the sums of all patches: means and norms over a picture, linear attention."""

import torch

from ..calls.schedule import PatchMode
from .state import Received, State


class SumState(State):
    """What a function that sums over rows gives for the whole picture, as the sum of all patches' own."""

    def __init__(self, site, patch, device, predicts=False):
        super().__init__(site, patch, device)
        self.parts = torch.zeros(len(site.shapes), *site.message_shape(), dtype=site.dtype, device=device)
        self.received = [Received(s, x, predicts) for s, x in enumerate(self.parts) if s != patch]

    def sends(self):
        return [(t, self.parts[self.patch]) for t in range(len(self.parts)) if t != self.patch]

    def run(self, func, args, kwargs, step):
        own = func(*args, **kwargs)
        if step.mode is PatchMode.LOCAL:
            return own
        how, share = self.site.how, self.site.shares[self.patch]
        self.parts[self.patch].copy_(own.square() if how == "norm" else own if share == 1 else own * share)
        if step.mode is PatchMode.SYNC:
            step.exchange(self)
        if how in ("max", "min"):
            return self.parts.amax(0) if how == "max" else self.parts.amin(0)
        whole = self.parts.sum(0)
        # A predicted square may be negative.
        return whole.clamp(min=0).sqrt() if how == "norm" else whole
