"""What one rank keeps of a site from micro-step to micro-step: all patches' rows, statistics, keys and values.

There is one buffer for all patches, written by turns, so that a patch finds those before it as this call has made them
and those after it as the call before has. An exact call on the whole picture fills all of it.
"""

import math

import torch

from ..patches.halo import HaloState
from ..patches.kinds import make_state
from ..patches.norm import NormState, normalise, statistics
from ..patches.ring import RingState, place
from ..patches.site import Halo, Norm, Ring
from .carried import Carried, Reused

_ATTENTION_NAMES = ("query", "key", "value")


class KeptRing(Carried):
    """Keys and values of all tokens, as `RingState` has them."""

    def __init__(self, site, device):
        state = RingState(site, 0, device)
        self.site, self.ring, self.parts = site, state.ring, state.parts
        # How many others come before the picture's tokens; until a micro-step tells, what is to be kept waits.
        self.before = state.before
        self.sample, self._waiting, self._saved = None, [], None
        places = [i for p in range(len(site.shapes)) for i in site.tokens.places(p)]
        self._places = None if places == sorted(places) else torch.tensor(places, device=device)

    def tensors(self):
        """The buffer."""
        return (self.ring,)

    def fill(self, args, kwargs, part=0):
        """Keep what attention to the whole picture is given, of one part of the batch."""
        named = dict(zip(_ATTENTION_NAMES, args, strict=False)) | kwargs
        key, value = (x.unsqueeze(1) if x.dim() == 3 else x for x in (named["key"], named["value"]))
        if self.before is not None:
            self._write(key, value, part)
            return
        if part == 0:
            self.sample, self._waiting = key[(0,) * (key.dim() - 2)][:, :8].clone(), []
        self._waiting.append((key.clone(), value.clone(), part))

    def settle(self, before):
        """It is known now how many of the others come first."""
        self.before = before
        for given in self._waiting:
            self._write(*given)

    def remember(self):
        """What is kept now comes back by `restore`."""
        self._saved = self.ring.clone() if self.before is not None else None

    def restore(self):
        """Keep again what was kept at `remember`."""
        if self._saved is not None:
            self.ring.copy_(self._saved)
        elif self.before is not None:
            self.settle(self.before)
        self._saved, self._waiting = None, []

    def state(self, patch):
        """The site on one patch."""
        return _MicroRing(self, patch)

    def _write(self, key, value, part):
        ring = _part(self.ring, part, len(key), 1)
        extra, count = self.site.tokens.extra, self.ring.shape[0] - self.site.tokens.extra
        keys, targets = math.prod(self.site.key[1:]), ring.tensor_split((count, count + self.before))
        for x, features in ((key, slice(0, keys)), (value, slice(keys, None))):
            before, picture, after = x.split((self.before, count, extra - self.before), -2)
            picture = picture if self._places is None else picture.index_select(-2, self._places)
            for target, tokens in zip(targets, (picture, before, after), strict=True):
                place(target, features, tokens)


class _MicroRing(RingState):
    def __init__(self, kept, patch):
        super().__init__(kept.site, patch, "meta")
        self._kept, self.ring, self.parts, self.received = kept, kept.ring, kept.parts, []

    def _told(self, key):
        if self._kept.before is None:
            self.sample = self._kept.sample
            self._kept.settle(super()._told(key))
        return self._kept.before


class _Saved:
    """What is kept in `tensors()`, put aside and back."""

    def remember(self):
        """What is kept now comes back by `restore`."""
        self._saved = [x.clone() for x in self.tensors()]

    def restore(self):
        """Keep again what was kept at `remember`."""
        for x, saved in zip(self.tensors(), self._saved, strict=True):
            x.copy_(saved)
        self._saved = None


class KeptHalo(_Saved, Carried):
    """The rows that patches read of each other before a convolution."""

    def __init__(self, site, device):
        self.site = site
        self.buffers = {
            m: torch.zeros(site.rows_shape(m.source, m.stop - m.start), dtype=site.dtype, device=device)
            for m in site.messages
        }

    def tensors(self):
        """All rows kept."""
        return self.buffers.values()

    def fill(self, args, kwargs, part=0):
        """Keep what a convolution of the whole picture is given, of one part of the batch."""
        x = args[0] if args else kwargs["input"]
        for m, buffer in self.buffers.items():
            _part(buffer, part, len(x)).copy_(x.narrow(-2, m.start, m.stop - m.start))

    def state(self, patch):
        """The site on one patch."""
        return _MicroHalo(self, patch)


class _MicroHalo(HaloState):
    def __init__(self, kept, patch):
        super().__init__(kept.site, patch, "meta")
        self.buffers, self.received = {m: kept.buffers[m] for m in self.buffers}, []


class KeptNorm(_Saved, Reused):
    """Mean and biased variance of all patches."""

    def __init__(self, site, device):
        self.site = site
        self.parts = torch.zeros(len(site.shapes), *site.message_shape(), device=device)
        self.weights = torch.tensor(site.weights, device=device).view(-1, 1, 1)

    def tensors(self):
        """All statistics kept."""
        return (self.parts,)

    def fill(self, args, kwargs, part=0):
        """Keep the statistics, patch by patch, of what a norm is given: a part of the batch."""
        x = args[0] if args else kwargs["input"]
        dim = -2 if x.dim() > 3 else -1
        per_row = x.shape[dim] // self.site.rows.size
        for known, (start, stop) in zip(self.parts, self.site.rows.owned, strict=True):
            rows = x.narrow(dim, start * per_row, (stop - start) * per_row)
            _part(known, part, len(x)).copy_(statistics(rows, self.site.num_groups))

    def state(self, patch):
        """The site on one patch."""
        return _MicroNorm(self, patch)


class _MicroNorm(NormState):
    def __init__(self, kept, patch):
        super().__init__(kept.site, patch, "meta")
        self.parts, self.weights, self.received = kept.parts, kept.weights, []

    def run(self, func, args, kwargs, step):
        named = dict(zip(("input", "num_groups", "weight", "bias", "eps"), args, strict=False)) | kwargs
        x = named["input"]
        if step.group_norm == "local":
            return func(*args, **kwargs)
        old, fresh = self.parts[self.patch].clone(), self._statistics(x)
        self.parts[self.patch].copy_(fresh)
        mean, var = merge_in_turn(self.parts, self.weights, self.patch, old if step.group_norm == "corrected" else None)
        if step.bessel:
            count = math.prod(x.shape[1:]) // self.site.num_groups
            var = var * (count / (count - 1))
        return normalise(x, mean, var, named.get("weight"), named.get("bias"), named.get("eps", 1e-5))


def merge_in_turn(parts, weights, patch, old=None):
    """Mean and variance of the whole, those of the patches up to `patch` being of this call, the others one call old.

    Args:
        parts: (patches, n, groups, 2) fp32: mean and biased variance of each.
        weights: (patches, 1, 1): each patch's share of the rows.
        old: this patch's own of the call before: the later patches are taken to have changed as this one has.
    Returns: (mean, variance), each (n, groups).
    Source: the correction of DistriFusion (Li et al., 2024), section 4.3, for the share of the rows that is stale.
    """
    fresh = parts[patch]
    centre = fresh[..., 0]
    offset = parts[..., 0] - centre
    mean = (weights * offset).sum(0)
    square = (weights * (parts[..., 1] + offset**2)).sum(0)
    if old is not None:
        stale = weights[patch + 1 :].sum()
        mean = mean - stale * (old[..., 0] - centre)
        square = square + stale * (fresh[..., 1] - (old[..., 1] + (old[..., 0] - centre) ** 2))
    var = square - mean**2
    return centre + mean, torch.where(var < 0, fresh[..., 1], var)


# How the sites are kept that patches share.
KINDS = {Ring: KeptRing, Halo: KeptHalo, Norm: KeptNorm}


class _KeptNothing(_Saved, Reused):
    """A site where a patch needs no other."""

    def __init__(self, site):
        self.site = site

    def tensors(self):
        return ()

    def fill(self, args, kwargs, part=0):
        pass

    def state(self, patch):
        return make_state(self.site, patch, None)


def _part(x, part, size, dim=0):
    """Part number `part` of the batch, of `size` samples each."""
    return x.narrow(dim, part * size, size)


def keep(site, device):
    """What is kept of a site: `fill(args, kwargs, part)` by an exact call, `state(patch)` for micro-steps."""
    if site.exchanges:
        return KINDS[type(site)](site, device)
    return _KeptNothing(site)
