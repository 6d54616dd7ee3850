"""Layers whose forward is replaced by one with fewer passes over memory: which they are, how they are found and undone.

A row is keyed by class, since that fixes what a forward does; a class whose forward takes other arguments than the row
was written for is left alone. The replacement is an attribute of the instance, beneath every hook that comes later, and
a module that carries somebody's hook already is left alone too. Within a layer, modules with weights are called, so
adapters, fused projections, quantised weights and offloading go on working; only norms and activations are taken over,
each only while it is plain (`fused_layers.plain`). With gradients or autocast the module's own forward runs.
"""

import inspect
import logging
from collections import Counter

from ..hooks import Forwards
from . import attending, basic_blocks, blocks, layers, patches, unet

log = logging.getLogger(__name__)
ROWS = {row.kind: row for row in (*unet.ROWS, *layers.ROWS, *blocks.ROWS, *basic_blocks.ROWS, *attending.ROWS)}


PATCH_ROWS = {kind: row for kind, row in ROWS.items() if not row.across_rows}
PATCH_ROWS |= {row.kind: row for row in patches.ROWS}


class Fusion:
    """The replaced layers of one denoiser. `remove` gives them their own forwards back.

    With `patches`, layers in which the rows of a picture meet have forwards of their own, or are left to patches.
    """

    def __init__(self, denoiser, choice, patches=False):
        self.choice = choice
        # Ids of modules that the forwards below may leave uncalled.
        self.taken_over = set()
        self._forwards = Forwards()
        rows = (PATCH_ROWS if patches else ROWS) if choice.active else {}
        for module, row in _fitting(denoiser, rows, self.taken_over):
            self._forwards.replace(module, row.run, choice)
        if self._forwards.replaced:
            log.info("kernels=%s in %s: %s", choice.mode, type(denoiser).__name__, self.layers())

    def layers(self):
        """{class name: how many of its instances are replaced}."""
        return dict(Counter(type(module).__name__ for module in self._forwards.replaced))

    def summary(self):
        """Dict, fit for JSON: what is replaced, and what was chosen for it."""
        return {"layers": self.layers(), **self.choice.summary()}

    def remove(self):
        """Restore every forward. One that somebody's hook lies upon stays, and runs the module's own."""
        self.choice.active = False
        self._forwards.restore()


def _fitting(denoiser, rows, owned):
    """(module, row) of the modules to replace; to `owned` the ids are added of what their rows take over."""
    # Outer modules come before what is inside them.
    for module in denoiser.modules():
        row = rows.get(type(module))
        if row is None or id(module) in owned or "forward" in vars(module):
            continue
        if not _written_for(row) or not row.fits(module):
            continue
        owned.update(id(part) for part in row.takes_over(module))
        yield module, row


def _written_for(row):
    """True if the installed diffusers calls this class as the row expects."""
    ours = [p.name for p in inspect.signature(row.run).parameters.values()][2:]
    theirs = [p.name for p in inspect.signature(row.kind.forward).parameters.values()][1:]
    return ours == theirs
