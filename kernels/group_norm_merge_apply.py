"""GroupNorm of a tensor whose partials are known, in one launch: each program merges those of its channels' groups.

Formulas are those of `group_norm_merge` and `group_norm_apply`. It pays where chunks are few: each program reads all
partials of its groups, and takes several tiles so that there are not too many programs.
"""

import functools

import torch
import triton
import triton.language as tl
from asyncdiff_fast.kernels import checks, pixels, tuning
from asyncdiff_fast.kernels.group_norm_apply import write_arguments, write_tile
from asyncdiff_fast.kernels.group_norm_merge import (
    channel_affine,
    channel_terms,
    group_statistics,
    image_statistics,
    merged_channels,
)


# Neither which part is the own nor how the work is cut makes another kernel.
@triton.jit(do_not_specialize=["own", "tiles_per_frame", "num_tiles", "tiles_per_program"])
def _merge_apply_kernel(
    x_ptr, partials_ptr, above_ptr, below_ptr, y_ptr, top_ptr, bottom_ptr,
    weight_ptr, bias_ptr, conv_bias_ptr, temb_ptr, scale_ptr, shift_ptr, parts_ptr, shares_ptr, stats_ptr,
    x_strides, above_strides, below_strides, y_strides, top_strides, bottom_strides,
    height, width, halo_above, halo_below, top_rows, bottom_rows,
    stride_temb, stride_scale, stride_shift, num_channels, chunk, chunks_per_frame, num_chunks,
    tiles_per_frame, num_tiles, tiles_per_program, num_groups, num_parts, own, count, eps,
    MODE: tl.constexpr, BESSEL: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
    SILU: tl.constexpr, HALO: tl.constexpr, UPSAMPLE: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_channels
    n = tl.program_id(2).to(tl.int64)
    # The groups that the tile's channels belong to, and all channels of those: more than the tile's.
    g = tl.program_id(1) * BLOCK_C // GROUP_CHANNELS + tl.arange(0, BLOCK_G)
    offs_m = tl.program_id(1) * BLOCK_C // GROUP_CHANNELS * GROUP_CHANNELS + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_channels
    members = mask_m[None, :] & ((offs_m // GROUP_CHANNELS)[None, :] == g[:, None])
    channel_mean, channel_m2 = merged_channels(
        partials_ptr, n, num_chunks, num_channels, height * (width * X_UNIT), chunk, chunks_per_frame, offs_m, mask_m,
        BLOCK_K, BLOCK_M,
    )  # fmt: skip
    channel_mean += channel_terms(conv_bias_ptr, temb_ptr, stride_temb, n, offs_m, mask_m, BLOCK_M)
    mean, var = group_statistics(channel_mean, channel_m2, members, count, GROUP_CHANNELS)
    # Each group is stored by one program, the first that has its end.
    last = (g + 1) * GROUP_CHANNELS - 1
    mask_g = (tl.program_id(0) == 0) & (last // BLOCK_C == tl.program_id(1)) & (g < num_groups)
    tl.store(stats_ptr + (n * num_groups + g) * 2, mean, mask=mask_g)
    tl.store(stats_ptr + (n * num_groups + g) * 2 + 1, var, mask=mask_g)
    mean, var = image_statistics(
        mean, var, parts_ptr, shares_ptr, n, g, tl.num_programs(2), num_groups, num_parts, own, count,
        MODE, BESSEL, BLOCK_PARTS,
    )  # fmt: skip

    own_group = g[:, None] == (offs_c // GROUP_CHANNELS)[None, :]
    mean = tl.sum(tl.where(own_group, mean[:, None], 0.0), axis=0)
    var = tl.sum(tl.where(own_group, var[:, None], 0.0), axis=0)
    add = channel_terms(conv_bias_ptr, temb_ptr, stride_temb, n, offs_c, mask_c, BLOCK_C)
    a, b = channel_affine(
        mean, var, eps, add, weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_scale, stride_shift, n, offs_c, mask_c
    )
    first = tl.program_id(0) * tiles_per_program
    for tile in range(first, tl.minimum(first + tiles_per_program, num_tiles)):
        write_tile(
            x_ptr, above_ptr, below_ptr, y_ptr, top_ptr, bottom_ptr,
            x_strides, above_strides, below_strides, y_strides, top_strides, bottom_strides,
            n, (tile // tiles_per_frame).to(tl.int64), (tile % tiles_per_frame) * BLOCK_P + tl.arange(0, BLOCK_P),
            offs_c, mask_c, a, b,
            height, width, halo_above, halo_below, top_rows, bottom_rows, SILU, HALO, UPSAMPLE, X_UNIT, Y_UNIT,
        )  # fmt: skip


@functools.lru_cache(1024)
def groups_of_tile(c, group_channels, block_c):
    """The most groups that any tile of `block_c` of the `c` channels has to do with."""
    tiles = range(0, c, block_c)
    return max((min(first + block_c, c) - 1) // group_channels - first // group_channels + 1 for first in tiles)


def group_norm_merge_apply(
    x, partials, weight, bias, num_groups, eps, *, act="none", conv_bias=None, temb=None, scale=None, shift=None,
    mode="local", parts=None, own=0, shares=None, bessel=False,
    halo=(0, 0), above=None, below=None, top=None, bottom=None, upsample=1, tokens=False, out=None,
):  # fmt: skip
    """(y, stats) of `group_norm.group_norm`, given `partials`, in one launch."""
    n, c = x.shape[:2]
    checks.check_act(act)
    checks.check_borders(x, halo, upsample, above, below, top, bottom)
    checks.check_merge(
        partials, x.shape[2:], num_groups, mode, parts, own, shares,
        weight=weight, bias=bias, conv_bias=conv_bias, temb=temb, scale=scale, shift=shift,
    )  # fmt: skip
    y, result = pixels.new_output(x, halo, upsample, tokens, out)
    view, view_y = pixels.pixel_view(x), pixels.pixel_view(y, "out")
    stats = x.new_empty((n, num_groups, 2), dtype=torch.float32)
    arguments, constants = write_arguments(view, view_y, halo, above, below, top, bottom)
    num_parts = 0 if parts is None else parts.shape[0]
    num_pixels, num_chunks = view.height * view.width, partials.shape[1]
    chunk = pixels.chunk_pixels(view.frames, num_pixels)
    launch = tuning.GROUP_NORM_APPLY[pixels.channels_inner(x)]
    tiles_per_frame = triton.cdiv(view_y.height * view_y.width, launch.block_p)
    num_tiles, channel_tiles = tiles_per_frame * view.frames, triton.cdiv(c, launch.block_c)
    num_warps = num_tiles * channel_tiles * n * launch.num_warps
    tiles_per_program = max(1, triton.cdiv(num_warps, tuning.GROUP_NORM_MERGE_APPLY_WARPS))
    groups = groups_of_tile(c, c // num_groups, launch.block_c)
    block_m = triton.next_power_of_2(groups * (c // num_groups))
    # Statistics are due even where nothing is to be written.
    _merge_apply_kernel[max(1, triton.cdiv(num_tiles, tiles_per_program)), channel_tiles, n](
        x, partials, above, below, y, top, bottom, weight, bias, conv_bias, temb, scale, shift, parts, shares, stats,
        *arguments, *(0 if t is None else t.stride(0) for t in (temb, scale, shift)),
        c, chunk, triton.cdiv(num_pixels, chunk), num_chunks, tiles_per_frame, num_tiles, tiles_per_program,
        num_groups, num_parts, own, float(max(1, x[0].numel() // num_groups)), eps,
        MODE=mode, BESSEL=bessel, GROUP_CHANNELS=c // num_groups, SILU=act == "silu", UPSAMPLE=upsample, **constants,
        BLOCK_P=launch.block_p, BLOCK_C=launch.block_c,
        BLOCK_K=max(16, min(triton.next_power_of_2(num_chunks), tuning.GROUP_NORM_MERGE_APPLY_TILE // block_m)),
        BLOCK_G=triton.next_power_of_2(groups), BLOCK_M=block_m,
        BLOCK_PARTS=triton.next_power_of_2(max(1, num_parts)), num_warps=launch.num_warps,
    )  # fmt: skip
    return result, stats
