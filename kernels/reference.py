"""GroupNorm of a patch and its halo rows in plain PyTorch: the truth for the kernels, and what runs without a GPU.

Same arguments, results and errors as the launchers of `group_norm.py` and `halo.py`. Arithmetic is float32, or float64
for float64 input. Few passes: mean and m2 by two reductions (`torch.var_mean` is an order slower on CPU), then one
multiply-add and one activation written into the padded buffer.
"""

import torch
import torch.nn.functional as F
from asyncdiff_fast.kernels import checks, pixels


@torch.no_grad()
def group_norm_reference(
    x, weight, bias, num_groups, eps, *, act="none", conv_bias=None, temb=None, scale=None, shift=None,
    mode="local", parts=None, own=0, shares=None, bessel=False,
    halo=(0, 0), above=None, below=None, top=None, bottom=None, upsample=1, tokens=False, partials=None, out=None,
):  # fmt: skip
    """(y, stats): see `group_norm.group_norm`."""
    merge = dict(conv_bias=conv_bias, temb=temb, scale=scale, shift=shift)
    merge |= dict(mode=mode, parts=parts, own=own, shares=shares)
    if partials is None:
        pixels.pixel_view(x)
        checks.check_norm(*x.shape[:2], num_groups, weight=weight, bias=bias, **merge)
        # Nobody else sees these moments: they need no chunks.
        partials, counts = _moments(x.to(_accumulator(x)).flatten(2)).movedim(0, 1).unsqueeze(1), [x[0, 0].numel()]
    else:
        checks.check_merge(partials, x.shape[2:], num_groups, weight=weight, bias=bias, **merge)
        counts = pixels.chunk_counts(x.shape[2:])
    affine, stats = _merged(partials, counts, weight, bias, num_groups, eps, bessel=bessel, **merge)
    y = group_norm_apply_reference(
        x, affine, act=act, halo=halo, above=above, below=below, top=top, bottom=bottom, upsample=upsample,
        tokens=tokens, out=out,
    )  # fmt: skip
    return y, stats


@torch.no_grad()
def group_norm_partials_reference(x):
    """Partials (n, num_chunks, 2, c): see `group_norm_stats.group_norm_partials`."""
    pixels.pixel_view(x)
    frames, count = pixels.frames_and_pixels(x.shape[2:])
    chunk = pixels.chunk_pixels(frames, count)
    flat = x.to(_accumulator(x)).flatten(2).unflatten(2, (frames, count))
    if not count:
        return flat.new_zeros((*flat.shape[:1], 0, 2, flat.shape[1]))
    moments = torch.stack([_moments(piece) for piece in flat.split(chunk, dim=3)])
    # (chunks, 2, n, c, frames) → (n, frames × chunks, 2, c)
    return moments.permute(2, 4, 0, 1, 3).flatten(1, 2).contiguous()


@torch.no_grad()
def residual_partials_reference(h, shortcut, *, bias=None, scale=1.0, out=None):
    """(y, partials): see `group_norm_stats.residual_partials`."""
    checks.check_residual(h, shortcut, bias)
    wide = h.to(_accumulator(h))
    if bias is not None:
        wide = wide + _spread(bias.to(wide.dtype), h)
    y = ((wide + shortcut) * scale).to(h.dtype)
    if out is not None:
        y = out.copy_(y)
    return y, group_norm_partials_reference(y)


@torch.no_grad()
def group_norm_merge_reference(
    partials, spatial, weight, bias, num_groups, eps, *, conv_bias=None, temb=None, scale=None, shift=None,
    mode="local", parts=None, own=0, shares=None, bessel=False,
):  # fmt: skip
    """(affine (n, 2, c), stats (n, num_groups, 2)): see `group_norm_merge.group_norm_merge`."""
    merge = dict(conv_bias=conv_bias, temb=temb, scale=scale, shift=shift)
    merge |= dict(mode=mode, parts=parts, own=own, shares=shares)
    checks.check_merge(partials, spatial, num_groups, weight=weight, bias=bias, **merge)
    return _merged(partials, pixels.chunk_counts(spatial), weight, bias, num_groups, eps, bessel=bessel, **merge)


@torch.no_grad()
def group_norm_apply_reference(
    x, affine, *, act="none", halo=(0, 0), above=None, below=None, top=None, bottom=None, upsample=1, tokens=False,
    out=None,
):  # fmt: skip
    """y: see `group_norm_apply.group_norm_apply`. `affine` None leaves the values as they are."""
    pixels.pixel_view(x)
    checks.check_act(act)
    checks.check_borders(x, halo, upsample, above, below, top, bottom)
    y, result = pixels.new_output(x, halo, upsample, tokens, out)
    rows = y.narrow(2, halo[0], y.shape[2] - sum(halo)) if any(halo) else y
    direct = upsample == 1 and y.dtype == _accumulator(x)
    source = rows if direct else torch.empty_like(x, dtype=_accumulator(x))
    if affine is None:
        source.copy_(x)
    else:
        a, b = (_spread(part, x) for part in affine.to(source.dtype).unbind(1))
        torch.addcmul(b, x.to(source.dtype), a, out=source)
    if act == "silu":
        F.silu(source, inplace=True)
    for border, first in ((top, 0), (bottom, x.shape[2] - bottom.shape[2] if bottom is not None else 0)):
        if border is not None:
            border.copy_(source.narrow(2, first, border.shape[2]))
    if not direct:
        rows.copy_(_nearest(source) if upsample == 2 else source)
    if halo[0]:
        _fill(y.narrow(2, 0, halo[0]), above, upsample, slice(-halo[0], None))
    if halo[1]:
        _fill(y.narrow(2, y.shape[2] - halo[1], halo[1]), below, upsample, slice(halo[1]))
    return result


def pad_rows_reference(x, halo, *, above=None, below=None, top=None, bottom=None, upsample=1, out=None):
    """y: see `halo.pad_rows`."""
    return group_norm_apply_reference(
        x, None, halo=halo, above=above, below=below, top=top, bottom=bottom, upsample=upsample, out=out
    )


def pack_rows_reference(x, *, top=None, bottom=None):
    """See `halo.pack_rows`."""
    checks.check_borders(x, (0, 0), 1, None, None, top, bottom)
    if top is not None:
        top.copy_(x[:, :, : top.shape[2]])
    if bottom is not None:
        bottom.copy_(x[:, :, x.shape[2] - bottom.shape[2] :])


def _accumulator(x):
    return torch.promote_types(x.dtype, torch.float32)


def _spread(per_channel, x):
    """(c,) or (n, c) shaped to broadcast over the pixels of `x`."""
    return per_channel.reshape(*per_channel.shape, *[1] * (x.ndim - 2))


def _moments(flat):
    """(2, ...): mean and m2 over the last axis; zeros of nothing."""
    if not flat.shape[-1]:
        return flat.new_zeros((2, *flat.shape[:-1]))
    mean = flat.mean(dim=-1, keepdim=True)
    return torch.stack((mean.squeeze(-1), (flat - mean).square_().sum(dim=-1)))


def _merged(
    partials, counts, weight, bias, num_groups, eps, *, conv_bias, temb, scale, shift, mode, parts, own, shares, bessel
):
    """(affine, stats) out of partials whose chunks have `counts` pixels, a list."""
    n, _, _, c = partials.shape
    add = None
    for term in (conv_bias, temb):
        if term is not None:
            add = term.to(partials.dtype) if add is None else add + term
    mean, var = _group_moments(partials, counts, add, num_groups)
    stats = torch.stack((mean, var), dim=-1)
    if mode != "local":
        mean, var = _combined(mean, var, parts, own, shares, mode)
    if bessel:
        count = c // num_groups * sum(counts)
        var = var * (count / (count - 1))
    grouped = (n, num_groups, c // num_groups)
    a = torch.rsqrt(var + eps).unsqueeze(2).expand(grouped).reshape(n, c)
    if weight is not None:
        a = a * weight
    offset = -mean.unsqueeze(2).expand(grouped).reshape(n, c)
    b = a * (offset if add is None else add + offset)
    if bias is not None:
        b = b + bias
    if scale is not None:
        a, b = a * (1 + scale), b * (1 + scale) + shift
    return torch.stack((a, b), dim=1), stats


def _group_moments(partials, counts, add, num_groups):
    """Mean and biased variance (n, num_groups): chunks merged to channels, `add` put on, channels merged to groups."""
    mean, m2 = partials.unbind(2)  # (n, num_chunks, c)
    total = max(1, sum(counts))
    if len(counts) == 1:
        channel_mean, channel_m2 = mean.squeeze(1), m2.squeeze(1)
    else:
        weights = partials.new_tensor(counts).unsqueeze(1)
        channel_mean = (mean * weights).sum(dim=1) / total
        channel_m2 = (m2 + weights * (mean - channel_mean.unsqueeze(1)).square()).sum(dim=1)
    if add is not None:
        channel_mean = channel_mean + add
    channel_mean = channel_mean.unflatten(1, (num_groups, -1))
    group_mean = channel_mean.mean(dim=2)
    spread = (channel_mean - group_mean.unsqueeze(2)).square().mean(dim=2)
    return group_mean, channel_m2.unflatten(1, (num_groups, -1)).mean(dim=2) / total + spread


def _combined(mean, var, parts, own, shares, mode):
    """Mean and variance of the image; moments are taken about the own fresh mean, where they do not cancel."""
    part_mean, part_var = parts.to(mean.dtype).unbind(-1)  # (num_parts, n, num_groups)
    first = part_mean - mean
    second = part_var + first.square()
    stale_first, stale_second = first[own], second[own]
    if mode != "corrected":
        is_own = (torch.arange(parts.shape[0], device=parts.device) == own)[:, None, None]
        first, second = torch.where(is_own, 0, first), torch.where(is_own, var, second)
    if shares is None:
        first, second = first.mean(dim=0), second.mean(dim=0)
    else:
        first, second = (torch.tensordot(shares.to(mean.dtype), m, dims=1) for m in (first, second))
    if mode == "corrected":
        first, second = first - stale_first, second + var - stale_second
    image_var = second - first.square()
    return mean + first, torch.where(image_var < 0, var, image_var)


def _nearest(rows):
    return F.interpolate(rows, scale_factor=2.0, mode="nearest")


def _fill(rows, neighbour, upsample, kept):
    """Write the neighbour's rows, the `kept` ones after upsampling, or zeros at the border of the image."""
    if neighbour is None:
        rows.zero_()
    else:
        rows.copy_(_nearest(neighbour)[:, :, kept] if upsample == 2 else neighbour)
