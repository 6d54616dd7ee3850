"""Convolutions and interpolations on one patch: the rows of its neighbours around its own."""

import functools

import torch
import torch.nn.functional as F

from ..calls.schedule import PatchMode
from ..fused import patch_ops
from ..kernels.checks import rows_are_dense
from .sites import conv_options
from .state import Received, State

SIDES = ("above", "below", "top", "bottom")
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
        # Address and shape of an input that has the rows around it already.
        self.ready = None
        self.received = [Received(m.source, x, predicts) for m, x in self.buffers.items() if m.target == patch]

    def sends(self):
        return [(m.target, x) for m, x in self.buffers.items() if m.source == self.patch]

    def run(self, func, args, kwargs, step):
        named = dict(zip(_CONV_NAMES, args, strict=False)) | kwargs
        if self.site.plain:
            return step.convolve(func, named)
        x = named["input"]
        ready, self.ready = self.ready, None
        if ready == (x.data_ptr(), x.shape):
            named["input"] = x
        elif step.mode is PatchMode.DISPLACED and self._by_kernel(x, step):
            named["input"] = self._op(x, "triton")
        else:
            named["input"] = self._gathered(x, step)
        options = enumerate(conv_options(**named))
        named["padding"] = tuple(0 if i == x.dim() - 4 else option[2] for i, option in options)
        return step.convolve(func, named)

    def _gathered(self, x, step):
        """This patch's rows and those around them; the own ones are left to be sent."""
        if step.mode is PatchMode.SYNC and self.buffers:
            self._leave(x)
            step.exchange(self)
        rows = self._around(x, step)
        if step.mode is PatchMode.DISPLACED:
            self._leave(x)
        return rows

    @functools.cached_property
    def borders(self):
        """What kernels add and pack at a displaced step; None where rows come and go in more pieces than they know.

        A dict: halo, the numbers of rows above and below; above, below, what comes there, None for zeros; top, bottom,
        the own border rows to be sent, or None.
        """
        window, (start, stop) = self.site.windows[self.patch], self.site.before.held[self.patch]
        if not self.buffers or self.site.before.owned[self.patch] != (start, stop) or len(self.site.shapes[0]) != 4:
            return None
        sides = {"above": [], "below": [], "top": [], "bottom": []}
        for m, buffer in self.buffers.items():
            if m.target == self.patch:
                sides["above" if m.start < start else "below"].append(buffer)
            else:
                sides["top" if m.target < self.patch else "bottom"].append(buffer)
                if (m.start != start) if m.target < self.patch else (m.stop != stop):
                    return None
        rows = (start - window.needs[0], window.needs[1] - stop)
        mixed = any(n and zeros for n, zeros in zip(rows, window.zeros, strict=True))
        if mixed or min(rows) < 0 or any(len(found) > 1 for found in sides.values()):
            return None
        halo = [n + zeros for n, zeros in zip(rows, window.zeros, strict=True)]
        return {"halo": halo, **{side: found[0] if found else None for side, found in sides.items()}}

    def _by_kernel(self, x, step):
        if self.borders is None or not rows_are_dense(x):
            return False
        facts = (*self.borders["halo"], *(self.borders[side] is not None for side in SIDES))
        return step.pick("patch_rows", x, facts, lambda kernel: self._op(x, kernel)) == "triton"

    def _op(self, x, kernel):
        return patch_ops.patch_rows(x, self.borders["halo"], *(self.borders[side] for side in SIDES), 1, kernel)

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


class PoolState(HaloState):
    """Pooling of this patch's rows and those around them."""

    def run(self, func, args, kwargs, step):
        if self.site.plain:
            return func(*args, **kwargs)
        x, *more = args or (kwargs["input"],)
        return func(self._gathered(x, step), *more, **{k: v for k, v in kwargs.items() if k != "input"})


class PadState(HaloState):
    """Padding of this patch's rows: by those around them, and at the picture's borders as the function does it."""

    def run(self, func, args, kwargs, step):
        named = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
        left, right, _, _, *rest = named["pad"]
        named["pad"] = (left, right, *self.site.edges[self.patch], *rest)
        named["input"] = self._gathered(named["input"], step)
        return func(**named)


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
