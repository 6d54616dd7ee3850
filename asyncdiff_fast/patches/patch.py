"""One patch of one call: the state of every site, the slots between patches, and what the forward meets on its way."""

import contextlib
import functools

import torch
from torch.nn import functional as F

from ..calls.schedule import PatchMode
from ..fused.capture import at_once
from ..fused.layers import exact
from ..prediction.call_check import CallCheck
from ..prediction.trend import Trend
from .first_look import FirstLook
from .kinds import make_state
from .result import PatchResult
from .sites import JOINS, SUMS, kind_of
from .slots import PatchSlots
from .state import checked
from .way import Way, lost

# Within one call what is stale goes through many layers: that counts like this many hops, beside one for each patch.
LAYER_HOPS = 2


class Patch:
    """One patch, by its number, in one pass, for one plan.

    Until there is a plan `look` is its `FirstLook`, and every patch works for itself.
    """

    def __init__(self, shared, cutter, number, device):
        config, self._packed, self._choice = shared.config, shared.packed, shared.choice
        self.config, self.cutter, self.number, self.device = config, cutter, number, device
        self._outside = at_once if shared.graphs is None else shared.graphs.outside
        self.mode, self.group_norm, self.bessel = PatchMode.LOCAL, config.group_norm, config.bessel
        self.plan = None
        # Where alone this is a patch; None: in all of a call.
        self.within = None
        self.look, self.bound = FirstLook(cutter), False
        # Generations begun, and what compares its results with the whole picture's.
        self.generations, self.result_check = 0, None
        # Names of inputs whose values the plan depends on.
        self.reads = ()
        self._states, self._order, self.positions = {}, [], None
        self.way, self.check, self._slots = Way(), CallCheck(), None
        self.trend = Trend(config.num_patches + LAYER_HOPS)
        # Number of the next displaced exchange; whether a call's values may be predicted from later.
        self.epoch, self.keep = 0, False
        self._result = self._latent = None
        self.displaced_calls = 0

    def note(self, part):
        """Let the check see what a part's latest value is."""
        if self.check.wants(id(part)):
            self.check.note(id(part), part.latest(self.epoch))

    @property
    def weight(self):
        """What the last change counts in a prediction."""
        return self.trend.weight

    # What is met in a forward.

    def constant(self):
        """The result of the module call entered last, if it follows from positions alone, else None."""
        return self.positions.constants.get(self.way.key)

    def meet(self, func, args, kwargs):
        """The result of a watched function call on this patch."""
        if func in JOINS:
            return func(*self.positions.joined(self.way.at_join(), args), **kwargs)
        if func not in SUMS and kind_of(func, args, kwargs) is None:
            return func(*args, **kwargs)
        key, place = self.way.at_sum() if func in SUMS else self.way.at_site()
        entry = self._states.get((key, place))
        if self.look is not None:
            own = (func, *args) if entry is None else (entry[1].run, func, args, kwargs, self)
            run = functools.partial(*own, **(kwargs if entry is None else {}))
            return self.look.meet(key, func, args, kwargs, run)
        if entry is None and (self.plan is None or func in SUMS):
            return func(*args, **kwargs)
        if entry is None:
            lost(f"{key[0]} was called once more")
        index, state = entry
        self._follow(index)
        return self._at_site(index, state, func, args, kwargs)

    def _at_site(self, index, state, func, args, kwargs):
        """What a site of the plan gives on this patch."""
        if self.mode is not PatchMode.DISPLACED:
            return state.run(func, args, kwargs, self)
        if getattr(state, "ready", None) is None:
            self._slots.before(index, self._arrived)
        result = state.run(func, args, kwargs, self)
        self._slots.after(index)
        return result

    def _arrived(self, state):
        state.arrived(self)

    def following(self, latent):
        """Within it the first look notes what is called on a patch's latent."""
        return contextlib.nullcontext() if self.look is None else self.look.follow(self._latent, latent)

    def _follow(self, index):
        """A site of the plan is met: in the plan's order, or in that of the first displaced call."""
        if self.mode is not PatchMode.FROZEN:
            self.way.follow(index, self._expected(), self.plan.sites[index].label)

    def _expected(self):
        return range(len(self._order)) if self.mode is PatchMode.SYNC else self.way.displaced

    def exchange(self, state):
        """Synchronously: the others' parts of this call take their places."""
        if self._slots is not None and self._slots.swap(state):
            state.arrived(self)

    def pick(self, op, x, facts, run):
        """Name of the implementation of an op on this patch, see `KernelChoice.pick`."""
        if self._choice is None or exact(self._choice, x):
            return "torch"
        return self._choice.pick(op, x, facts, run)

    def ahead(self, *names):
        """[(number, state)] of the sites that the next calls of modules meet first, at a displaced step; else None."""
        places = [self.way.ahead(name) for name in names]
        displaced = self.mode is PatchMode.DISPLACED and self.way.displaced is not None
        return [self._states[p] for p in places] if displaced and all(p in self._states for p in places) else None

    @contextlib.contextmanager
    def at(self, name, index, *readers):
        """Within it a site in a module's call is met, and what came for it and for its `readers` has arrived."""
        self.way.enter(name)
        self._follow(index)
        for i in (index, *readers):
            self._slots.before(i, self._arrived)
        yield
        self._slots.after(index)
        self.way.leave()

    def convolve(self, func, named):
        """The result of a convolution with named arguments."""
        return self._packed.conv2d(**named) if func is F.conv2d else func(**named)

    def rows_of_latent(self, x, above, count):
        """`count` rows of the latent seen as `x` sees its own, from `above` rows relative to the first of them."""
        rows = self.cutter.rows_beside(x, self._latent, above, count)
        if rows is None:
            lost(f"{self.way.key[0]} no longer reads the latent where it lies")
        return rows

    # The plan.

    def prepare(self, sites, positions):
        """What is known before the first look: the sites that change the rows, and this patch's `Positions`."""
        for site in sites:
            self._states[(site.name, site.call), site.place] = (-1, make_state(site, self.number, None))
        self.positions = positions

    def bind(self, plan, exchange, phase, samples):
        """Allocate buffers and register slots for a plan. Collective."""
        self.plan = plan
        self.look, self._states = None, {}
        # Ordinary tensors, whatever mode the first call runs in: they are written in later ones too.
        with torch.inference_mode(False):
            self._order = [
                make_state(site, self.number, self.device, self.config.predicts_patches) for site in plan.sites
            ]
        for index, (site, state) in enumerate(zip(plan.sites, self._order, strict=True)):
            self._states[(site.name, site.call), site.place] = (index, state)
            state.sample = samples.get(index)
        if self.config.predicts_patches:
            self.check.bind(checked(plan.sites, self._order), self.device)
        self._slots = PatchSlots(plan, self._order, exchange, phase, self._outside)

    def learn_result(self, whole, mine):
        """Learn where the rows are in the denoiser's results, on the whole picture and on this patch."""
        rows = self.cutter.rows
        if self.within is not None:
            rows, (whole, mine) = self.cutter.grid.rows, self.within.made
        self._result = PatchResult(rows, self.number, whole, mine, self.config.checks)

    def move(self, device):
        """From now on all buffers are on a device: it was planned on the meta device. Before `bind`."""
        self.device = device
        self._result.move(device)

    def bind_result(self, exchange, phase):
        """Register the slot for the parts of the result. Collective."""
        self.look, self.bound = None, True
        self._result.bind(exchange, phase)

    def release(self):
        """Forget the slots and buffers of this plan."""
        if self._slots is not None:
            self._slots.release()
        if self._result is not None:
            self._result.release()

    # One call.

    def begin_generation(self):
        """Nothing that an earlier generation left is compared with."""
        self.generations += 1
        self.check.begin_generation()

    # Of one that is captured `cut` and `complete`, and what is between them, do not run again.

    def begin(self, mode, exact=False):
        """A call begins. With `exact` the result is the unpatched denoiser's, whatever the options."""
        self.mode = mode
        self.bessel = self.config.bessel and not exact
        self.check.begin(mode is PatchMode.SYNC, self.keep)
        if self.within is not None:
            self.within.begin()
        if mode is PatchMode.SYNC and self._slots is not None:
            self._slots.settle()

    def cut(self, signature, args, kwargs):
        """(args, kwargs) of this patch; the whole picture's where the patch is one in a region alone."""
        self._latent = signature.latent(args, kwargs)
        return self.cutter.cut(signature, args, kwargs) if self.within is None else (args, kwargs)

    def complete(self):
        """The forward is over. Raises: Lost if not all sites of the plan were met."""
        self._latent = None
        followed = self.mode is PatchMode.SYNC or (self.mode is PatchMode.DISPLACED and self.way.displaced is not None)
        if followed and self.bound and self.plan is not None:
            self.way.end(self._expected())

    def end(self, result):
        """The result for the whole picture, in new tensors."""
        self.displaced_calls += self.mode is PatchMode.DISPLACED
        if self.mode is PatchMode.DISPLACED and self.way.displaced is None:
            # Its own parts are sent at its end.
            self.way.displaced = tuple(self.way.met)
            self._slots.group(self.way.displaced)
        self.epoch += self.mode is PatchMode.DISPLACED
        if self.within is None:
            return self.share(result)
        self.within.ended()
        return result

    def share(self, result):
        """What patches make together, of this patch's part."""
        self.check.judge(self.trend)
        return self._result.share(result, self.check)
