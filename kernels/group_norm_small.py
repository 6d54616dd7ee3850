"""GroupNorm of small groups in one launch: one program makes statistics, merges parts and writes its group.

The program reads its group twice, the second time from cache; formulas are those of `group_norm_stats`, with a whole
frame as the chunk, of `group_norm_merge` and of `group_norm_apply`. It pays where more launches cost more than reading
a group with one multiprocessor.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from asyncdiff_fast.kernels import checks, pixels, plans, tuning
from asyncdiff_fast.kernels.group_norm_apply import Output, write_arguments, write_tile
from asyncdiff_fast.kernels.group_norm_merge import (
    channel_affine,
    channel_terms,
    group_statistics,
    image_statistics,
)
from asyncdiff_fast.kernels.group_norm_stats import pixel_statistics


@triton.jit(do_not_specialize=["own"])
def _small_kernel(
    x_ptr, above_ptr, below_ptr, y_ptr, top_ptr, bottom_ptr,
    weight_ptr, bias_ptr, conv_bias_ptr, temb_ptr, scale_ptr, shift_ptr, parts_ptr, shares_ptr, stats_ptr,
    x_strides, above_strides, below_strides, y_strides, top_strides, bottom_strides,
    height, width, halo_above, halo_below, top_rows, bottom_rows,
    stride_temb, stride_scale, stride_shift, num_frames, num_out, num_groups, num_parts, own, count, eps,
    MODE: tl.constexpr, BESSEL: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
    SILU: tl.constexpr, HALO: tl.constexpr, UPSAMPLE: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    CHANNELS_INNER: tl.constexpr, READ_P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0) + tl.arange(0, 1)
    n = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    mask_c = channel < GROUP_CHANNELS
    offs_c = tl.program_id(0) * GROUP_CHANNELS + channel
    num_pixels = height * (width * X_UNIT)

    channel_mean = tl.zeros((BLOCK_C,), tl.float32)
    channel_m2 = tl.zeros((BLOCK_C,), tl.float32)
    for frame in range(0, num_frames):
        frame_mean, frame_m2 = pixel_statistics(
            x_ptr, None, None, None, 1.0, x_strides, None, None, n, frame + n * 0, num_pixels * 0, num_pixels,
            offs_c, mask_c, X_UNIT, CHANNELS_INNER, READ_P, BLOCK_C,
        )  # fmt: skip
        d = frame_mean - channel_mean
        channel_m2 += frame_m2 + d * d * (num_pixels * (frame / (frame + 1.0)))
        channel_mean += d / (frame + 1.0)

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
    for frame in range(0, num_frames):
        for start in range(0, num_out, BLOCK_P):
            write_tile(
                x_ptr, above_ptr, below_ptr, y_ptr, top_ptr, bottom_ptr,
                x_strides, above_strides, below_strides, y_strides, top_strides, bottom_strides,
                n, frame + n * 0, start + tl.arange(0, BLOCK_P), offs_c, mask_c, a, b,
                height, width, halo_above, halo_below, top_rows, bottom_rows, SILU, HALO, UPSAMPLE, X_UNIT, Y_UNIT,
            )  # fmt: skip


def group_norm_small(
    x, weight, bias, num_groups, eps, *, act="none", conv_bias=None, temb=None, scale=None, shift=None,
    mode="local", parts=None, own=0, shares=None, bessel=False,
    halo=(0, 0), above=None, below=None, top=None, bottom=None, upsample=1, tokens=False, out=None,
):  # fmt: skip
    """(y, stats) of `group_norm.group_norm`, in one launch."""
    plan = _plan(
        (x, above, below, top, bottom, out, weight, bias, conv_bias, temb, scale, shift, parts, shares),
        act, tuple(halo), upsample, tokens, num_groups, mode, own, bessel,
    )  # fmt: skip
    y, result = plan.write.output(x, tokens, out)
    stats = plans.new(plan.stats, x)
    _small_kernel[plan.write.grid](
        x, above, below, y, top, bottom, weight, bias, conv_bias, temb, scale, shift, parts, shares, stats,
        *plan.write.sizes, eps, **plan.write.constants,
    )  # fmt: skip
    return result, stats


class _Small(NamedTuple):
    write: Output
    stats: torch.Tensor


@plans.planned
def _plan(
    x, above, below, top, bottom, out, weight, bias, conv_bias, temb, scale, shift, parts, shares,
    act, halo, upsample, tokens, num_groups, mode, own, bessel,
):  # fmt: skip
    n, c = x.shape[:2]
    checks.check_act(act)
    checks.check_borders(x, halo, upsample, above, below, top, bottom)
    checks.check_norm(
        n, c, num_groups, mode, parts, own, shares,
        weight=weight, bias=bias, conv_bias=conv_bias, temb=temb, scale=scale, shift=shift,
    )  # fmt: skip
    y = pixels.new_output(x, halo, upsample, tokens, out)[0]
    view, view_y = pixels.pixel_view(x), pixels.pixel_view(y, "out")
    arguments, constants = write_arguments(view, view_y, halo, above, below, top, bottom)
    num_parts = 0 if parts is None else parts.shape[0]
    channels_inner = pixels.channels_inner(x)
    tile = tuning.small_tile(channels_inner, constants["X_UNIT"] > 1, c // num_groups, view.height * view.width)
    sizes = (
        *arguments, *(0 if t is None else t.stride(0) for t in (temb, scale, shift)),
        view.frames, view_y.height * view_y.width, num_groups, num_parts, own,
        float(max(1, x[0].numel() // num_groups)),
    )  # fmt: skip
    constants |= dict(
        MODE=mode, BESSEL=bessel, GROUP_CHANNELS=c // num_groups, SILU=act == "silu", UPSAMPLE=upsample,
        CHANNELS_INNER=channels_inner, READ_P=tile.block_p, BLOCK_P=tile.block_p // 2, BLOCK_C=tile.block_c,
        BLOCK_PARTS=plans.power_of_2(max(1, num_parts)), num_warps=tile.num_warps,
    )  # fmt: skip
    stats = x.new_empty((n, num_groups, 2), dtype=torch.float32)
    return _Small(Output((num_groups, n), sizes, constants, y), stats)
