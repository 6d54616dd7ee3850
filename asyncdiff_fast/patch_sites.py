"""What happens at a site on one patch: the rows, statistics, keys and values of the other patches take their places.

Every state keeps what it receives. A synchronous step fills it in this call, a displaced one reads what the call before
has left, and either leaves this patch's own part to be sent.
"""

import math

import torch
import torch.nn.functional as F

from .patch_plan import Halo, Norm, Resize, Ring
from .schedule import PatchMode
from .sites import conv_options
from .slots import Recv, Send


class State:
    """A site on one patch that needs no other patch."""

    def __init__(self, site, patch, device):
        self.site, self.patch = site, patch

    def sends(self):
        """[(target, tensor)] that travel after every call."""
        return []

    def recvs(self):
        """[(source, tensor)] that are filled by them."""
        return []

    def run(self, func, args, kwargs, step):
        """The function's result on this patch; `step`, the `Band`, has the call's mode and what sites share."""
        return func(*args, **kwargs)


_CONV_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class HaloState(State):
    """A convolution of this patch's rows and those around them."""

    def __init__(self, site, patch, device):
        super().__init__(site, patch, device)
        self.buffers = {
            m: torch.zeros(site.rows_shape(m.source, m.stop - m.start), dtype=site.dtype, device=device)
            for m in site.messages
            if site.exchanges and device is not None and patch in (m.source, m.target)
        }

    def sends(self):
        return [(m.target, x) for m, x in self.buffers.items() if m.source == self.patch]

    def recvs(self):
        return [(m.source, x) for m, x in self.buffers.items() if m.target == self.patch]

    def run(self, func, args, kwargs, step):
        named = dict(zip(_CONV_NAMES, args, strict=False)) | kwargs
        if self.site.plain:
            return step.convolve(func, named)
        x = named["input"]
        if step.mode is PatchMode.SYNC and self.buffers:
            self._leave(x)
            step.exchange(self)
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


class NormState(State):
    """A GroupNorm with the statistics of all patches, merged in fp32 from (mean, biased variance) of each."""

    def __init__(self, site, patch, device):
        super().__init__(site, patch, device)
        self.parts = torch.zeros(len(site.shapes), *site.message_shape(), device=device)
        self.weights = torch.tensor(site.weights, device=device).view(-1, 1, 1)

    def sends(self):
        return [(t, self.parts[self.patch]) for t in range(len(self.parts)) if t != self.patch]

    def recvs(self):
        return [(s, self.parts[s]) for s in range(len(self.parts)) if s != self.patch]

    def run(self, func, args, kwargs, step):
        how = "sync" if step.mode is PatchMode.SYNC else step.group_norm
        if how == "local" or step.mode in (PatchMode.LOCAL, PatchMode.FROZEN):
            return func(*args, **kwargs)
        named = dict(zip(("input", "num_groups", "weight", "bias", "eps"), args, strict=False)) | kwargs
        x = named["input"]
        fresh, guard = self._statistics(x), step.group_norm == "corrected"
        if how == "corrected":
            mean, var = merge(self.parts, self.weights, fresh, self.parts[self.patch], guard)
            self.parts[self.patch].copy_(fresh)
        else:
            self.parts[self.patch].copy_(fresh)
            if how == "sync":
                step.exchange(self)
            mean, var = merge(self.parts, self.weights, fresh, guard=guard)
        if step.bessel:
            count = math.prod(x.shape[1:]) // self.site.num_groups
            var = var * (count / (count - 1))
        return normalise(x, mean, var, named.get("weight"), named.get("bias"), named.get("eps", 1e-5))

    def _statistics(self, x):
        """(n, groups, 2): mean and biased variance of the rows that this patch owns."""
        held, owned = self.site.rows.held[self.patch], self.site.rows.owned[self.patch]
        if held != owned:
            x = x.narrow(-2, owned[0] - held[0], owned[1] - owned[0])
        if x.numel() == 0:
            return self.parts.new_zeros(self.parts.shape[1:])
        return statistics(x, self.site.num_groups)


def statistics(x, num_groups):
    """(n, groups, 2) fp32: mean and biased variance of each group of x (n, c, ...)."""
    n, channels = x.shape[:2]
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous():
        # Several times as fast as `var_mean` there; with eps = 0 the variance comes back from its root.
        _, mean, rstd = torch.native_group_norm(x, None, None, n, channels, x[0, 0].numel(), num_groups, 0.0)
        return torch.stack((mean, rstd.pow(-2)), -1)
    var, mean = torch.var_mean(x.reshape(n, num_groups, -1).float(), dim=-1, correction=0)
    return torch.stack((mean, var), -1)


def merge(parts, weights, fresh, old=None, guard=False):
    """Mean and variance of the whole from the patches' own.

    Args:
        parts: (patches, n, groups, 2) fp32, mean and biased variance of each.
        weights: (patches, 1, 1), each patch's share of the rows.
        fresh: (n, groups, 2), this patch's own of now.
        old: this patch's own of the call before. With it all `parts` are of that call, and the whole is corrected by
            the full difference between `fresh` and `old`.
        guard: where the corrected variance is negative, this patch's own is used.
    Returns: (mean, variance), each (n, groups).
    Source: DistriFusion (Li et al., 2024), section 4.3, written about this patch's mean so that nothing cancels.
    """
    centre = fresh[..., 0]
    offset = parts[..., 0] - centre
    mean = (weights * offset).sum(0)
    square = (weights * (parts[..., 1] + offset**2)).sum(0)
    if old is not None:
        mean = mean - (old[..., 0] - centre)
        square = square + fresh[..., 1] - (old[..., 1] + (old[..., 0] - centre) ** 2)
    var = square - mean**2
    if guard:
        var = torch.where(var < 0, fresh[..., 1], var)
    return centre + mean, var


def normalise(x, mean, var, weight, bias, eps):
    """GroupNorm of x (n, c, ...) with given mean and variance (n, groups), in fp32; the dtype of `x` comes back."""
    n, channels = x.shape[:2]
    scale = (var + eps).rsqrt().repeat_interleave(channels // mean.shape[1], 1)
    if weight is not None:
        scale = scale * weight
    shift = -mean.repeat_interleave(channels // mean.shape[1], 1) * scale
    if bias is not None:
        shift = shift + bias
    shape = (n, channels, *(1,) * (x.dim() - 2))
    return torch.addcmul(shift.view(shape), x.float(), scale.view(shape)).to(x.dtype)


_ATTENTION_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class RingState(State):
    """Self-attention: this patch's queries, keys and values of all patches, which lie in one buffer.

    `ring` is (tokens, b, features), tokens of the picture in order of patches, each part in one piece, so that it is
    received where it is read.
    """

    def __init__(self, site, patch, device):
        super().__init__(site, patch, device)
        counts = [site.tokens.count(p) for p in range(len(site.shapes))]
        self.picture, extra = sum(counts), site.tokens.extra
        self.ring = torch.zeros(self.picture + extra, site.key[0], site.features, dtype=site.dtype, device=device)
        self.parts = self.ring[: self.picture].split(counts)
        # True if the others come first; told at the first synchronous step.
        self.extra_first = None
        self.sample = None

    def sends(self):
        mine = self.parts[self.patch]
        return [(t, mine) for t in range(len(self.parts)) if t != self.patch and len(mine)]

    def recvs(self):
        return [(s, x) for s, x in enumerate(self.parts) if s != self.patch and len(x)]

    def run(self, func, args, kwargs, step):
        if step.mode is PatchMode.LOCAL:
            return func(*args, **kwargs)
        named = dict(zip(_ATTENTION_NAMES, args, strict=False)) | kwargs
        one_head = named["key"].dim() == 3
        if one_head:
            named |= {name: named[name].unsqueeze(1) for name in ("query", "key", "value")}
        self._write(named["key"], named["value"])
        if step.mode is PatchMode.SYNC:
            step.exchange(self)
        if named.get("attn_mask") is not None:
            named["attn_mask"] = self._mask(named["attn_mask"])
            if one_head:
                named["attn_mask"] = named["attn_mask"].unsqueeze(-3)
        named["key"], named["value"] = self.key_value()
        return func(**named).squeeze(1) if one_head else func(**named)

    def _split(self, x, dim=-2):
        """(picture, others) of this patch's tokens."""
        extra = self.site.tokens.extra
        picture = x.narrow(dim, extra if self.extra_first else 0, x.shape[dim] - extra)
        return picture, x.narrow(dim, 0 if self.extra_first else x.shape[dim] - extra, extra)

    def _write(self, key, value):
        if self.extra_first is None:
            self.extra_first = self._told(key)
        for x, features in ((key, slice(0, math.prod(self.site.key[1:]))), (value, slice(-self._value_size, None))):
            picture, others = self._split(x)
            start, stop = self.site.tokens.own(self.patch)
            own = picture[..., start:stop, :]
            for target, tokens in ((self.parts[self.patch], own), (self.ring[self.picture :], others)):
                # (b, h, s, d) to (s, b, h * d)
                target[..., features].unflatten(-1, (x.shape[1], x.shape[-1])).copy_(tokens.permute(2, 0, 1, 3))

    @property
    def _value_size(self):
        return math.prod(self.site.value[1:])

    def key_value(self):
        """Keys and values of all tokens, (b, h, s, d) views of the ring."""
        key, value = self.ring.split((self.site.features - self._value_size, self._value_size), -1)
        return tuple(
            x.unflatten(-1, shape[1:]).permute(1, 2, 0, 3)
            for x, shape in ((key, self.site.key), (value, self.site.value))
        )

    def _told(self, key):
        """True if the others come before the picture, by their keys in the forward on the whole picture."""
        extra = self.site.tokens.extra
        if not extra or self.sample is None:
            return False
        mine = key[(0,) * (key.dim() - 2)][:, : self.sample.shape[-1]].float()
        whole = self.sample.float()
        places = torch.tensor(self.site.tokens.places(self.patch), device=key.device)
        others = torch.arange(extra, device=key.device)
        first = whole[torch.cat((others, places + extra))]
        last = whole[torch.cat((places, others + len(whole) - extra))]
        return bool((mine - first).abs().max() < (mine - last).abs().max())

    def _mask(self, mask):
        """A mask over this patch's keys, as one over the ring; of the picture's tokens nothing may be masked."""
        if mask.shape[-1] == 1:
            return mask
        picture, others = self._split(mask, -1)
        return torch.cat((picture[..., :1].expand(*mask.shape[:-1], self.picture), others), -1)


def make_state(site, patch, device):
    """The `State` of a site."""
    kinds = {Halo: HaloState, Norm: NormState, Ring: RingState, Resize: ResizeState}
    return kinds.get(type(site), State)(site, patch, device)


def messages(state):
    """(sends, receives) of a state, as slots take them."""
    sends = [Send(target, (x,)) for target, x in state.sends()]
    return sends, [Recv(source, (x,)) for source, x in state.recvs()]
