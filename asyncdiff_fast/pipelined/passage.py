"""A plan as one rank carries it out: its routes' micro-steps, their slots, and what sites keep."""

import torch

from ..fused.capture import at_once
from ..patches.patch import LAYER_HOPS
from ..prediction.trend import Trend
from ..stages.replay import Replay, structure_of, with_tensors
from .first import First
from .kept import keep
from .micro import MicroStep
from .picture import WholePicture
from .slots import MicroSlots


class Passage:
    """One route on one rank: its micro-steps and their slots. Collective to make."""

    def __init__(self, route, structures, world, exchange, device, placeholders, phase, outside=at_once):
        self.route, self.slots = route, MicroSlots(route, world.rank, device, exchange, phase)
        before, after = (world.rank, placeholders), (self.slots, First(), outside)
        self.steps = [MicroStep(route, p, *before, found, *after) for p, found in enumerate(structures)]

    def begin(self):
        """A call begins."""
        self.slots.begin()

    def result(self, like):
        """The denoiser's result, as `like` is built, from those of all micro-steps."""
        parts = zip(*(step.prediction() for step in self.steps), strict=True)
        if self.route.joints:
            whole = [torch.cat(found, dim) for found, dim in zip(parts, self.route.joints, strict=True)]
        else:
            whole = [part.clone() for (part,) in parts]
        return with_tensors(structure_of(like), whole)


class Pipeline:
    """One plan on one rank: its routes, and what sites keep. Collective to make.

    `graphs` captures the micro-steps of patches that pass through, if it is not None.
    """

    def __init__(self, plan, patches, structures, world, exchange, device, placeholders, phase, graphs=None):
        self.plan, self.patches = plan, patches
        self.trend = Trend(plan.config.pipeline_count + LAYER_HOPS)
        made = (world, exchange, device, placeholders)
        self._graphs, outside = graphs, at_once if graphs is None else graphs.outside
        self.passing = plan.passing and Passage(plan.passing, structures["passing"], *made, phase, outside)
        self.exact = plan.exact and Passage(plan.exact, structures["exact"], *made, f"{phase}, exact")
        self.whole, self.kept = None, {}
        if plan.patches is not None:
            with torch.inference_mode(False):
                self.kept = {i: keep(site, device) for i, site in plan.sites(world.rank).items()}
            self.whole = WholePicture(plan.patches, self.kept)
            for patch in patches:
                patch.bind(plan.patches, self.kept)

    def release(self, released=False):
        """Forget the graphs, and the slots unless they are `released`."""
        if self._graphs is not None:
            for patch in self.patches:
                self._graphs.forget(patch)
        for passage in () if released else filter(None, (self.passing, self.exact)):
            passage.slots.release()


class Learning:
    """In place of a micro-step: learns what results of units look like."""

    def __init__(self, graph):
        self.units = Replay(graph, None)

    def run(self, name, forward, args, kwargs):
        """What a module's hook returns."""
        result = forward(*args, **kwargs)
        index = self.units.turn(name)[0] if self.units.knows(name) else None
        if index is not None:
            self.units.learn(index, result)
        return result
