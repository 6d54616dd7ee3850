"""GroupNorm on one patch, with the statistics of all patches."""

import math

import torch

from ..calls.schedule import PatchMode
from ..fused import patch_ops
from ..kernels.checks import rows_are_dense
from .sites import NORM
from .state import Received, State


class NormState(State):
    """A GroupNorm with the statistics of all patches, merged in fp32 from (mean, biased variance) of each."""

    def __init__(self, site, patch, device, predicts=False):
        super().__init__(site, patch, device)
        self.parts = torch.zeros(len(site.shapes), *site.message_shape(), device=device)
        # A prediction of a variance may be negative, and of what is corrected brings nothing.
        self.received = [Received(s, x, False) for s, x in enumerate(self.parts) if s != patch]
        self.weights = torch.tensor(site.weights, device=device).view(-1, 1, 1)

    def sends(self):
        return [(t, self.parts[self.patch]) for t in range(len(self.parts)) if t != self.patch]

    def run(self, func, args, kwargs, step):
        how = "sync" if step.mode is PatchMode.SYNC else step.group_norm
        if how == "local" or step.mode in (PatchMode.LOCAL, PatchMode.FROZEN):
            return func(*args, **kwargs)
        named = dict(zip(("input", "num_groups", "weight", "bias", "eps"), args, strict=False)) | kwargs
        x = named["input"]
        weight, bias, eps = named.get("weight"), named.get("bias"), named.get("eps", 1e-5)
        if self.by_kernel(x, how, step):
            return self.fused(x, weight, bias, eps, how, step)
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
        return normalise(x, mean, var, weight, bias, eps)

    def by_kernel(self, x, how, step, fused=()):
        """True if the norm runs as one op on this patch's rows; `fused` tells what else is done in its passes."""
        if self.site.rows.held[self.patch] != self.site.rows.owned[self.patch] or not rows_are_dense(x):
            return False
        facts = (self.site.num_groups, len(self.parts), how, *fused)

        def trial(kernel):
            return self._op(x, None, None, 1e-5, how, step.bessel, kernel)

        return step.pick("patch_group_norm", x, facts, trial) == "triton"

    def fused(self, x, weight, bias, eps, how, step, **around):
        """The norm by its kernel; `around` as `patch_ops.patch_group_norm` takes it."""
        if how == "sync":
            added = (around.get("conv_bias"), around.get("temb"))
            around["partials"], own = patch_ops.patch_statistics(x, self.site.num_groups, *added, "triton")
            self.parts[self.patch].copy_(own)
            step.exchange(self)
        y, own = self._op(x, weight, bias, eps, how, step.bessel, "triton", **around)
        self.parts[self.patch].copy_(own)
        return y

    def _op(self, x, weight, bias, eps, how, bessel, kernel, **around):
        """(result, own statistics)."""
        return patch_ops.patch_group_norm(
            x, weight, bias, self.site.num_groups, eps, kernel, combine=how, parts=self.parts, own=self.patch,
            shares=self.weights.view(-1), bessel=bessel, **around,
        )  # fmt: skip

    def _statistics(self, x):
        """(n, groups, 2): mean and biased variance of the rows that this patch owns."""
        held, owned = self.site.rows.held[self.patch], self.site.rows.owned[self.patch]
        if held != owned:
            x = x.narrow(-2, owned[0] - held[0], owned[1] - owned[0])
        if x.numel() == 0:
            return self.parts.new_zeros(self.parts.shape[1:])
        return statistics(x, self.site.num_groups)


def before_rows(step, names, norm, x, **added):
    """GroupNorm, SiLU and the rows around the result in one pass, at a displaced step.

    Args:
        step: the `Patch`.
        names: of the norm's module and of the convolution's that reads the result.
        added: as `patch_ops.patch_group_norm` takes it.
    Returns: what that module is to be called with; None where this must be done one by one.
    """
    found = step.ahead(*names)
    if found is None:
        return None
    (index, state), (reader, halo) = found
    borders = getattr(halo, "borders", None)
    if borders is None or state.site.kind != NORM or step.group_norm in ("sync", "local"):
        return None
    if not state.by_kernel(x, step.group_norm, step, ("silu", *borders["halo"], *sorted(added))):
        return None
    with step.at(names[0], index, reader):
        y = state.fused(x, norm.weight, norm.bias, norm.eps, step.group_norm, step, silu=True, **borders, **added)
    halo.ready = (y.data_ptr(), y.shape)
    return y


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
