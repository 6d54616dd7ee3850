"""Convolutions and interpolations on one patch: the rows of its neighbours around its own."""

import torch
import torch.nn.functional as F

from .patch_state import Received, State
from .schedule import PatchMode
from .sites import conv_options

_CONV_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class HaloState(State):
    """A convolution of this patch's rows and those around them."""

    def __init__(self, site, patch, device, predicts=False):
        super().__init__(site, patch, device)
        self.buffers = {
            m: torch.zeros(site.rows_shape(m.source, m.stop - m.start), dtype=site.dtype, device=device)
            for m in site.messages
            if site.exchanges and device is not None and patch in (m.source, m.target)
        }
        self.received = [Received(m.source, x, predicts) for m, x in self.buffers.items() if m.target == patch]

    def sends(self):
        return [(m.target, x) for m, x in self.buffers.items() if m.source == self.patch]

    def run(self, func, args, kwargs, step):
        named = dict(zip(_CONV_NAMES, args, strict=False)) | kwargs
        if self.site.plain:
            return step.convolve(func, named)
        x = named["input"]
        if step.mode is PatchMode.SYNC and self.buffers:
            self._leave(x)
            step.exchange(self)
        self.arrived(step)
        named["input"] = self._around(x, step)
        if step.mode is PatchMode.DISPLACED:
            self._leave(x)
        options = enumerate(conv_options(**named))
        named["padding"] = tuple(0 if i == x.dim() - 4 else option[2] for i, option in options)
        return step.convolve(func, named)

    def _leave(self, x):
        start = self.site.before.held[self.patch][0]
        for m, buffer in self.buffers.items():
            if m.source == self.patch:
                buffer.copy_(x.narrow(-2, m.start - start, m.stop - m.start))

    def _around(self, x, step):
        """The rows of this patch's window: (..., rows, w)."""
        window, (start, stop) = self.site.windows[self.patch], self.site.before.held[self.patch]
        low, high = window.needs
        inside = x.narrow(-2, max(low - start, 0), min(high, stop) - max(low, start))
        above, below = window.zeros
        if self.site.from_latent and step.mode is not PatchMode.LOCAL:
            inside = step.rows_of_latent(x, low - start, high - low)
            pieces = []
        else:
            pieces = sorted((m.start, b) for m, b in self.buffers.items() if m.target == self.patch)
            if not self.buffers:
                # Nobody's rows: zeros, as at the picture's border.
                above, below = above + max(start - low, 0), below + max(high - stop, 0)
        rows = [b for first, b in pieces if first < start] + [inside] + [b for first, b in pieces if first >= stop]
        if above:
            rows.insert(0, x.new_zeros(()).expand(*x.shape[:-2], above, x.shape[-1]))
        if below:
            rows.append(x.new_zeros(()).expand(*x.shape[:-2], below, x.shape[-1]))
        return torch.cat(rows, -2) if len(rows) > 1 else inside


class ResizeState(State):
    """A nearest-neighbour interpolation where a patch's rows are not whole multiples."""

    def run(self, func, args, kwargs, step):
        if self.site.plain:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        before, after = self.site.before, self.site.after
        rows = torch.arange(*after.held[self.patch], device=x.device) * before.size // after.size
        x = x.index_select(-2, rows - before.held[self.patch][0])
        return F.interpolate(x, size=(*self.site.around[0], len(rows), *self.site.around[1]), mode="nearest")
