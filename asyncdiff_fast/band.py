"""One patch of one call: the state of every site, the slots between patches, and what the forward meets on its way."""

import torch
from torch.nn import functional as F

from .fused_layers import exact
from .patch_result import PatchResult
from .patch_sites import make_state
from .patch_state import messages
from .prediction import Trend
from .schedule import PatchMode
from .self_check import Report, SelfCheck
from .sites import CONV, JOINS, KINDS, NORM, seen

# Sites whose predictions are looked at, at most.
CHECKED_SITES = 16
# Within one call what is stale goes through many layers: that counts like this many hops, beside one for each patch.
LAYER_HOPS = 2


class Band:
    """A patch's part of one pass, for one plan.

    While it is `probing` there is no plan yet: every patch works for itself, and `found` collects what it meets.
    """

    def __init__(self, config, cutter, patch, device, packed, choice):
        self._packed, self._choice = packed, choice
        self.config, self.cutter, self.patch, self.device = config, cutter, patch, device
        self.mode, self.group_norm, self.bessel = PatchMode.LOCAL, config.group_norm, config.bessel
        self.plan = None
        self.probing, self.bound, self.found = True, False, {}
        # Whether the first convolution reads the latent where it lies.
        self.sees_latent = False
        self._states, self._order, self._constants, self._joins = {}, [], {}, {}
        self._slots, self._groups, self._first_of, self._last_of = {}, [], {}, {}
        # Sites met by the first displaced call, whose own parts are sent at its end; the way of all later ones.
        self._met, self._way, self._cursor = [], None, 0
        self.trend = Trend(config.num_patches + LAYER_HOPS)
        # Number of the next displaced exchange; whether a call's values may be predicted from later.
        self.epoch, self.keep = 0, False
        self.check, self.report = None, Report()
        self._notes = self._was_exact = False
        self._result = self._latent = None
        self.displaced_calls = 0
        self.restart()

    def note(self, part):
        """Let the check see what a part's latest value is."""
        row = self._rows.get(id(part)) if self._notes else None
        if row is not None:
            self.check.note(row, part.latest(self.epoch))

    def _bind_check(self):
        """Of each site that predicts one part is looked at, of many sites some."""
        pairs = [
            (s.label, state.received[0])
            for s, state in zip(self.plan.sites, self._order, strict=True)
            if state.received
        ]
        pairs = [(label, part) for label, part in pairs if part.predicts]
        pairs = pairs[:: max(1, -(-len(pairs) // CHECKED_SITES))]
        self._rows = {id(part): row for row, (_, part) in enumerate(pairs)}
        self.check = SelfCheck([label for label, _ in pairs], self.device)

    @property
    def weight(self):
        """What the last change counts in a prediction."""
        return self.trend.weight

    # What is met in a forward.

    def restart(self):
        """A forward begins: the calls of its modules are counted from here."""
        self._calls, self._stack, self._cursor = {}, [], 0

    def enter(self, name):
        """A module with sites is called; `leave` ends it. True if it lies in no other such module."""
        call = self._calls[name] = self._calls.get(name, -1) + 1
        # Its sites and its joins are counted apart.
        self._stack.append([(name, call), -1, -1])
        return len(self._stack) == 1

    def leave(self):
        """Ends the module call entered last."""
        self._stack.pop()

    def constant(self):
        """The result of the module call entered last, if it follows from positions alone, else None."""
        return self._constants.get(self._stack[-1][0])

    @property
    def constant_modules(self):
        """Names of the modules whose results follow from positions alone."""
        return {name for name, _ in self._constants}

    @property
    def joining_modules(self):
        """Names of the modules that join an activation with positions."""
        return {key[0] for key, _ in self._joins}

    def meet(self, func, args, kwargs):
        """The result of a watched function call on this patch."""
        top = self._stack[-1]
        key = top[0]
        if func in JOINS:
            top[2] += 1
            for i, x in self._joins.get((key, top[2]), ()):
                args = (*args[:i], x, *args[i + 1 :])
            return func(*args, **kwargs)
        top[1] += 1
        entry = self._states.get((key, top[1]))
        if self.probing:
            result = func(*args, **kwargs) if entry is None else entry[1].run(func, args, kwargs, self)
            self._note(key, func, args, kwargs, result)
            return result
        if entry is None and self.plan is None:
            return func(*args, **kwargs)
        if entry is None:
            self._lost(f"{key[0]} was called once more")
        index, state = entry
        self._follow(index)
        if self.mode is not PatchMode.DISPLACED:
            return state.run(func, args, kwargs, self)
        if index in self._first_of:
            self._exchange.wait(self._groups[self._first_of[index]])
        if getattr(state, "ready", None) is None:
            state.arrived(self)
        result = state.run(func, args, kwargs, self)
        if index in self._last_of:
            self._exchange.post(self._groups[self._last_of[index]])
        return result

    def _follow(self, index):
        """Check that the sites are met in the order of the plan, or of the first displaced call."""
        if self.mode is PatchMode.FROZEN:
            return
        way = range(len(self._order)) if self.mode is PatchMode.SYNC else self._way
        if way is None:
            self._met.append(index)
        elif self._cursor >= len(way) or way[self._cursor] != index:
            site = self.plan.sites[index]
            self._lost(f"{site.label} was called out of turn")
        self._cursor += 1

    def _lost(self, what):
        raise RuntimeError(
            f"the denoiser took another way than at its first call: {what}; patches need the same modules at every step"
        )

    def _note(self, key, func, args, kwargs, result):
        first = not self.found
        self.found.setdefault(key, []).append(seen(KINDS[func], args, kwargs, result, sampled=False))
        if first and KINDS[func] == CONV:
            self.sees_latent = self._lies_in_latent(args[0] if args else kwargs["input"])

    def exchange(self, state):
        """Synchronously: the others' parts of this call take their places."""
        slot = self._slots.get(id(state))
        if slot is not None:
            self._exchange.post(slot)
            self._exchange.wait(slot)
            state.arrived(self)

    def pick(self, op, x, facts, run):
        """Name of the implementation of an op on this patch, see `KernelChoice.pick`."""
        if self._choice is None or exact(self._choice, x):
            return "torch"
        return self._choice.pick(op, x, facts, run)

    def norm_before(self, names, norm, x, **added):
        """GroupNorm, SiLU and the rows around the result in one pass, at a displaced step.

        Args:
            names: of the norm's module and of the convolution's that reads the result.
            added: as `patch_ops.patch_group_norm` takes it.
        Returns: what that module is to be called with; None where this must be done one by one.
        """
        places = [((name, self._calls.get(name, -1) + 1), 0) for name in names]
        if self.mode is not PatchMode.DISPLACED or self._way is None or any(p not in self._states for p in places):
            return None
        (index, state), (reader, halo) = (self._states[p] for p in places)
        borders = getattr(halo, "borders", None)
        if borders is None or state.site.kind != NORM or self.group_norm in ("sync", "local"):
            return None
        if not state.by_kernel(x, self.group_norm, self, ("silu", *borders["halo"], *sorted(added))):
            return None
        self.enter(names[0])
        self._follow(index)
        for i in (index, reader):
            if i in self._first_of:
                self._exchange.wait(self._groups[self._first_of[i]])
        halo.arrived(self)
        y = state.fused(x, norm.weight, norm.bias, norm.eps, self.group_norm, self, silu=True, **borders, **added)
        if index in self._last_of:
            self._exchange.post(self._groups[self._last_of[index]])
        self.leave()
        halo.ready = (y.data_ptr(), y.shape)
        return y

    def convolve(self, func, named):
        """The result of a convolution with named arguments."""
        return self._packed.conv2d(**named) if func is F.conv2d else func(**named)

    def rows_of_latent(self, x, above, count):
        """`count` rows of the latent seen as `x` sees its own, from `above` rows relative to the first of them."""
        stride, latent = x.stride(-2), self._latent
        if (stride, x.untyped_storage().nbytes()) != (
            latent.stride(self.cutter.dim),
            latent.untyped_storage().nbytes(),
        ):
            name = self._stack[-1][0][0]
            raise RuntimeError(f"{name} no longer reads the latent where it lies; unpatch() and patch() anew")
        shape = (*x.shape[:-2], count, x.shape[-1])
        return torch.as_strided(x, shape, x.stride(), x.storage_offset() + above * stride)

    def _lies_in_latent(self, x):
        """True if a tensor is a view of the whole latent, rows for rows."""
        latent, dim = self._latent, self.cutter.dim
        same = x.untyped_storage()._cdata == latent.untyped_storage()._cdata
        return same and x.dim() >= 4 and (x.stride(-2), x.stride(-1)) == (latent.stride(dim), latent.stride(-1))

    # The plan.

    def prepare(self, sites, constants, joins):
        """What is known before the first look: the sites that change the rows, and this patch's positions."""
        for site in sites:
            self._states[(site.name, site.call), site.place] = (-1, make_state(site, self.patch, None))
        self._constants, self._joins = constants, joins

    def bind(self, plan, exchange, phase, samples):
        """Allocate buffers and register slots for a plan. Collective."""
        self.plan, self._exchange, self.phase = plan, exchange, phase
        self.probing, self.found = False, {}
        self._states = {}
        # Ordinary tensors, whatever mode the first call runs in: they are written in later ones too.
        with torch.inference_mode(False):
            self._order = [
                make_state(site, self.patch, self.device, self.config.predicts_patches) for site in plan.sites
            ]
        for index, (site, state) in enumerate(zip(plan.sites, self._order, strict=True)):
            self._states[(site.name, site.call), site.place] = (index, state)
            state.sample = samples.get(index)
        if self.config.predicts_patches:
            self._bind_check()
        for norms in (False, True):
            numbers = []
            for index, (site, state) in enumerate(zip(plan.sites, self._order, strict=True)):
                sends, recvs = messages(state)
                if site.exchanges and (site.kind == NORM) == norms and (sends or recvs):
                    self._slots[id(state)] = exchange.slot(site.label, sends, recvs, depth=1)
                    numbers.append(index)
            exchange.freeze(f"{phase} {'norms' if norms else 'sync'}", numbers)

    def _bind_groups(self):
        """Register what displaced steps post together, of the sites that the first of them has met. Collective.

        With stages a rank meets only those of its own stage, the same on all patches.
        """
        numbers = []
        for number, group in enumerate(self.plan.groups(self._way)):
            pairs = [messages(self._order[i], displaced=True) for i in group]
            sends, recvs = [s for p in pairs for s in p[0]], [r for p in pairs for r in p[1]]
            if not sends and not recvs:
                continue
            self._first_of[group[0]] = self._last_of[group[-1]] = len(self._groups)
            self._groups.append(self._exchange.slot(f"patches {number}", sends, recvs, depth=2))
            numbers.append(number)
        self._exchange.freeze(f"{self.phase} displaced", numbers)

    def learn_result(self, whole, mine):
        """Learn where the rows are in the denoiser's results, on the whole picture and on this patch."""
        self._result = PatchResult(self.cutter.rows, self.patch, whole, mine, self.config.checks)

    def bind_result(self, exchange, phase):
        """Register the slot for the parts of the result. Collective."""
        self._exchange, self.phase, self.probing, self.bound = exchange, phase, False, True
        self._result.bind(exchange, phase)

    def release(self):
        """Forget the slots and buffers of this plan."""
        for name in [] if self.plan is None else ["sync", "norms"] + ["displaced"] * (self._way is not None):
            self._exchange.release(f"{self.phase} {name}")
        self._result.release()

    # One call.

    def begin_generation(self, instants):
        """Nothing that an earlier generation left is predicted from or compared with."""
        self.trend.begin(instants)
        self.report.forget()
        if self.check is not None:
            self.check.restart()

    def begin(self, signature, mode, args, kwargs, exact=False):
        """(args, kwargs) of this patch. With `exact` the result is the unpatched denoiser's, whatever the options."""
        self.mode, self._latent = mode, signature.latent(args, kwargs)
        self.bessel = self.config.bessel and not exact
        sync = mode is PatchMode.SYNC
        if sync and not self._was_exact and self.check is not None:
            self.check.restart()
        # A displaced call sees what the call before made: of a synchronous one, that was seen already.
        self._notes = self.keep and self.check is not None and (sync or not self._was_exact)
        self._was_exact = sync
        if sync and self._way is not None:
            # What displaced steps of an earlier generation have under way must not come later than what is sent now.
            self._exchange.drain({f"{self.phase} displaced"})
        return self.cutter.cut(signature, args, kwargs)

    def end(self, result):
        """The result for the whole picture, in new tensors."""
        self._latent = None
        self.displaced_calls += self.mode is PatchMode.DISPLACED
        if self.mode is PatchMode.DISPLACED and self._way is None:
            self._way = tuple(self._met)
            self._bind_groups()
            for slot in self._groups:
                self._exchange.post(slot)
        elif self.mode in (PatchMode.SYNC, PatchMode.DISPLACED) and self.plan is not None:
            expected = len(self._order) if self.mode is PatchMode.SYNC else len(self._way)
            if self._cursor != expected:
                self._lost(f"{expected - self._cursor} sites were not met")
        self.epoch += self.mode is PatchMode.DISPLACED
        if self._notes:
            self.check.judge(self.trend.weight_before if self.mode is PatchMode.DISPLACED else self.trend.weight)
        if not self.config.checks:
            return self._result.share(result)
        self._result.reports[self.patch].copy_(self.check.worst)
        whole = self._result.share(result)
        self.report.give(self._result.reports.amax(0))
        return whole
