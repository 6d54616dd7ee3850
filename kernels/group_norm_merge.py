"""From partials to a group's statistics, with other patches' to the image's, and to one multiply-add per channel.

Chunks merge to channels and channels to groups by mean = Σ w mean_i / Σ w, m2 = Σ (m2_i + w (mean_i − mean)²). Then,
with (m, v) the fresh mean and biased variance of the own patch, (m_i, v_i) those of the parts and s_i their shares of
the pixels:

    sync, stale    mean = Σ s_i m_i               var = Σ s_i (v_i + m_i²) − mean²,     the own part taken fresh
    corrected      mean = Σ s_i m_i + m − m_own   var = Σ s_i (v_i + m_i²) + (v + m²) − (v_own + m_own²) − mean²

Moments are taken about m, where they do not cancel: that changes no result but rounding. Where the variance comes out
negative it is v. Published for equal shares only (s_i = 1 / num_parts); weighting by pixels makes synchronous parts
exact for uneven patches too, and leaves the correction, the own part's whole change, as it is.

    y = x a + b,    a = weight (1 + scale) / √(var + eps),    b = (bias + a₀ (add − mean)) (1 + scale) + shift

Source: M. Li et al., "DistriFusion: Distributed Parallel Inference for High-Resolution Diffusion Models", CVPR 2024,
section 4.2; its code multiplies variances by n / (n − 1), n the own patch's count: `bessel`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from asyncdiff_fast.kernels import checks, pixels, plans, tuning


@triton.jit
def merged_channels(
    partials_ptr, n, num_chunks, num_channels, num_pixels, chunk, chunks_per_frame, offs_c, mask_c,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(BLOCK_C,) mean and m2 of channels, from their chunks' ones."""
    base = partials_ptr + n * num_chunks * 2 * num_channels
    count = 0.0
    channel_mean = tl.zeros((BLOCK_C,), tl.float32)
    channel_m2 = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, num_chunks, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < num_chunks)[:, None] & mask_c[None, :]
        offs = (k * 2 * num_channels)[:, None] + offs_c[None, :]
        mean = tl.load(base + offs, mask=mask, other=0.0)
        m2 = tl.load(base + offs + num_channels, mask=mask, other=0.0)
        weight = tl.minimum(chunk, num_pixels - (k % chunks_per_frame) * chunk)
        weight = tl.where(k < num_chunks, weight, 0).to(tl.float32)[:, None]
        added = tl.sum(tl.sum(weight, axis=1), axis=0)
        about = tl.sum(weight * mean, axis=0) / added
        d = mean - about[None, :]
        rest = tl.sum(weight * d, axis=0) / added
        m2 = tl.sum(m2 + weight * d * d, axis=0) - added * rest * rest
        # What came before, with these chunks.
        d = about + rest - channel_mean
        channel_m2 += m2 + d * d * (count * added / (count + added))
        channel_mean += d * (added / (count + added))
        count += added
    return channel_mean, channel_m2


@triton.jit
def group_statistics(channel_mean, channel_m2, members, count, GROUP_CHANNELS: tl.constexpr):
    """(groups,) mean and biased variance, from those channels that are `members`, (groups, channels), of each."""
    mean = tl.sum(tl.where(members, channel_mean[None, :], 0.0), axis=1) / GROUP_CHANNELS
    d = tl.where(members, channel_mean[None, :] - mean[:, None], 0.0)
    m2 = tl.sum(tl.where(members, channel_m2[None, :], 0.0), axis=1)
    return mean, m2 / count + tl.sum(d * d, axis=1) / GROUP_CHANNELS


@triton.jit
def image_statistics(
    mean, var, parts_ptr, shares_ptr, n, g, num_samples, num_groups, num_parts, own, count,
    MODE: tl.constexpr, BESSEL: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Like `mean` and `var`, the own fresh ones of groups `g` (groups,) of sample `n`: the image's, with the parts."""
    image_mean = mean
    image_var = var
    if MODE != "local":
        part = tl.arange(0, BLOCK_PARTS)[:, None]
        mask = (part < num_parts) & (g < num_groups)[None, :]
        offs = ((part * num_samples + n) * num_groups + g[None, :]) * 2
        part_mean = tl.load(parts_ptr + offs, mask=mask, other=0.0)
        part_var = tl.load(parts_ptr + offs + 1, mask=mask, other=0.0)
        if shares_ptr is not None:
            share = tl.load(shares_ptr + part, mask=part < num_parts, other=0.0)
        else:
            share = tl.where(part < num_parts, 1.0 / num_parts, 0.0)
        first = part_mean - mean[None, :]
        second = part_var + first * first
        if MODE == "corrected":
            change = tl.where(part == own, 1.0, 0.0)
            first_moment = tl.sum(share * first, axis=0) - tl.sum(change * first, axis=0)
            second_moment = tl.sum(share * second, axis=0) + var - tl.sum(change * second, axis=0)
        else:
            first_moment = tl.sum(tl.where(part == own, 0.0, share * first), axis=0)
            second_moment = tl.sum(share * tl.where(part == own, var[None, :], second), axis=0)
        image_mean = mean + first_moment
        image_var = second_moment - first_moment * first_moment
        image_var = tl.where(image_var < 0.0, var, image_var)
    if BESSEL:
        image_var = image_var * (count / (count - 1.0))
    return image_mean, image_var


@triton.jit
def channel_terms(conv_bias_ptr, temb_ptr, stride_temb, n, offs_c, mask_c, BLOCK_C: tl.constexpr):
    """(BLOCK_C,) float32: what is added to each channel before the norm."""
    add = tl.zeros((BLOCK_C,), tl.float32)
    if conv_bias_ptr is not None:
        add += tl.load(conv_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    if temb_ptr is not None:
        add += tl.load(temb_ptr + n * stride_temb + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return add


@triton.jit
def channel_affine(
    mean, var, eps, add, weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_scale, stride_shift, n, offs_c, mask_c
):  # fmt: skip
    """(a, b), each like `add`: y = x a + b. `mean` and `var` are of one group, (1,), or of each channel's."""
    a = tl.where(mask_c, 1.0 / tl.sqrt(var + eps), 0.0)
    if weight_ptr is not None:
        a *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    b = a * (add - mean)
    if bias_ptr is not None:
        b += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = 1.0 + tl.load(scale_ptr + n * stride_scale + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        a *= scale
        b = b * scale + tl.load(shift_ptr + n * stride_shift + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return a, b


# The index of the own part differs from rank to rank, which must not make them compile different kernels.
@triton.jit(do_not_specialize=["own"])
def _merge_kernel(
    partials_ptr, weight_ptr, bias_ptr, conv_bias_ptr, temb_ptr, scale_ptr, shift_ptr, parts_ptr, shares_ptr,
    affine_ptr, stats_ptr,
    stride_temb, stride_scale, stride_shift,
    num_channels, num_pixels, chunk, chunks_per_frame, num_chunks, num_groups, num_parts, own, count, eps,
    MODE: tl.constexpr, BESSEL: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0) + tl.arange(0, 1)
    n = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    mask_c = channel < GROUP_CHANNELS
    offs_c = tl.program_id(0) * GROUP_CHANNELS + channel
    channel_mean, channel_m2 = merged_channels(
        partials_ptr, n, num_chunks, num_channels, num_pixels, chunk, chunks_per_frame, offs_c, mask_c, BLOCK_K, BLOCK_C
    )
    add = channel_terms(conv_bias_ptr, temb_ptr, stride_temb, n, offs_c, mask_c, BLOCK_C)
    mean, var = group_statistics(channel_mean + add, channel_m2, mask_c[None, :], count, GROUP_CHANNELS)
    tl.store(stats_ptr + (n * num_groups + g) * 2, mean)
    tl.store(stats_ptr + (n * num_groups + g) * 2 + 1, var)
    mean, var = image_statistics(
        mean, var, parts_ptr, shares_ptr, n, g, tl.num_programs(1), num_groups, num_parts, own, count,
        MODE, BESSEL, BLOCK_PARTS,
    )  # fmt: skip
    a, b = channel_affine(
        mean, var, eps, add, weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_scale, stride_shift, n, offs_c, mask_c
    )
    tl.store(affine_ptr + n * 2 * num_channels + offs_c, a, mask=mask_c)
    tl.store(affine_ptr + (n * 2 + 1) * num_channels + offs_c, b, mask=mask_c)


def group_norm_merge(
    partials, spatial, weight, bias, num_groups, eps, *, conv_bias=None, temb=None, scale=None, shift=None,
    mode="local", parts=None, own=0, shares=None, bessel=False,
):  # fmt: skip
    """(affine, stats): the multiply-add that normalises each channel, and the own patch's statistics to send.

    Args:
        partials: (n, num_chunks, 2, c) of `group_norm_partials` or `residual_partials`, for spatial sizes `spatial`.
        weight, bias: (c,) or None. eps: float.
        conv_bias, temb: (c,) and (n, c), added to the tensor before the norm, or None.
        scale, shift: (n, c), the result times 1 + scale, plus shift; both or None.
        mode: "local", or "sync", "stale", "corrected" with `parts` (num_parts, n, num_groups, 2) float32: mean and
            biased variance of every patch; `parts[own]`, what this one sent then, is read by "corrected" only.
        shares: (num_parts,) float32, each patch's share of the image's pixels, on the device of `x`; None: equal.
        bessel: multiply the variance by n / (n − 1), n the elements of a group in this patch.
    Returns: affine (n, 2, c) and stats (n, num_groups, 2), float32.
    Raises: ValueError for shapes, dtypes or modes that do not fit together.
    """
    plan = _plan(
        (partials, weight, bias, conv_bias, temb, scale, shift, parts, shares),
        tuple(spatial), num_groups, mode, own, bessel,
    )  # fmt: skip
    affine, stats = plans.new(plan.affine, partials), plans.new(plan.stats, partials)
    _merge_kernel[plan.grid](
        partials, weight, bias, conv_bias, temb, scale, shift, parts, shares, affine, stats, *plan.sizes, eps,
        **plan.constants,
    )  # fmt: skip
    return affine, stats


class _Merge(NamedTuple):
    grid: tuple
    sizes: tuple
    constants: dict
    affine: torch.Tensor
    stats: torch.Tensor


@plans.planned
def _plan(partials, weight, bias, conv_bias, temb, scale, shift, parts, shares, spatial, num_groups, mode, own, bessel):
    n, num_chunks, _, c = partials.shape
    checks.check_merge(
        partials, spatial, num_groups, mode, parts, own, shares,
        weight=weight, bias=bias, conv_bias=conv_bias, temb=temb, scale=scale, shift=shift,
    )  # fmt: skip
    frames, num_pixels = pixels.frames_and_pixels(spatial)
    chunk = pixels.chunk_pixels(frames, num_pixels)
    num_parts, block_c = 0 if parts is None else parts.shape[0], plans.power_of_2(c // num_groups)
    sizes = (
        *(0 if t is None else t.stride(0) for t in (temb, scale, shift)),
        c, num_pixels, chunk, plans.ceil_div(num_pixels, chunk), num_chunks, num_groups, num_parts, own,
        # A patch without rows has mean and variance 0 and, with its share of 0, no part in the image's.
        float(max(1, c // num_groups * frames * num_pixels)),
    )  # fmt: skip
    constants = dict(
        MODE=mode, BESSEL=bessel, GROUP_CHANNELS=c // num_groups,
        BLOCK_K=max(16, min(plans.power_of_2(num_chunks), tuning.GROUP_NORM_MERGE_TILE // block_c)),
        BLOCK_C=block_c, BLOCK_PARTS=plans.power_of_2(max(1, num_parts)), num_warps=tuning.GROUP_NORM_MERGE_WARPS,
    )  # fmt: skip
    made = (partials.new_empty(shape, dtype=torch.float32) for shape in ((n, 2, c), (n, num_groups, 2)))
    return _Merge((num_groups, n), sizes, constants, *made)
