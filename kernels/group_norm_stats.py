"""Partial statistics of (n, c, *spatial): mean and m2 of every channel over every chunk of pixels.

A program loads a tile of pixels at once. Mean and m2 of each lane, eight pixels of a channel that one thread holds, are
taken by two passes over registers; tiles merge to the lane's statistics, and lanes to the chunk's, by

    mean = Σ count_i mean_i / Σ count_i,    m2 = Σ (m2_i + count_i (mean_i − mean)²)

All in float32. No sum is of values far from their mean, so that none cancels where |mean| ≫ σ, and no load waits for
another one. Statistics are kept per channel, not per group: a group of 10 to 80 channels never fills a power of two,
whole channels make 16-byte loads, a constant added to a channel (bias, time embedding) costs nothing afterwards, and
the partials of a concatenation are the concatenation of partials. Chunks depend on the shape only: results repeat bit
for bit.

A tile is (pixels, channels) whatever the memory format; which of the two runs along a warp follows from the strides.
Source: T. Chan, G. Golub, R. LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
1979.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from asyncdiff_fast.kernels import checks, pixels, plans, tuning

# Pixels of a lane: where pixels are adjacent, those of one 16-byte load in half precision.
ROWS = tl.constexpr(8)


@triton.jit
def load_tile(
    x_ptr, shortcut_ptr, bias, scale, x_strides, s_strides, n, frame, offs_p, offs_c, mask, UNIT: tl.constexpr
):  # fmt: skip
    """One (pixels, channels) tile in float32; with a shortcut, what `residual_partials` stores, rounded alike."""
    offs_x = offs_p[:, None].to(tl.int64) * x_strides[3] + offs_c[None, :].to(tl.int64) * x_strides[1] * UNIT
    base_x = n * x_strides[0] * UNIT + frame * x_strides[2] * UNIT
    x = tl.load(x_ptr + base_x + offs_x, mask=mask, other=0.0).to(tl.float32)
    if shortcut_ptr is not None:
        offs_s = offs_p[:, None].to(tl.int64) * s_strides[3] + offs_c[None, :].to(tl.int64) * s_strides[1] * UNIT
        base_s = n * s_strides[0] * UNIT + frame * s_strides[2] * UNIT
        shortcut = tl.load(shortcut_ptr + base_s + offs_s, mask=mask, other=0.0).to(tl.float32)
        x = ((x + bias[None, :] + shortcut) * scale).to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def pixel_statistics(
    x_ptr, shortcut_ptr, y_ptr, bias, scale, x_strides, s_strides, y_strides,
    n, frame, begin, end, offs_c, mask_c,
    UNIT: tl.constexpr, CHANNELS_INNER: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(BLOCK_C,) mean and m2 of the pixels from `begin` to `end` of a frame; with a shortcut, of the sums, for `y`."""
    LANES: tl.constexpr = BLOCK_P // ROWS
    # What a thread holds of a tile is eight pixels far apart, or adjacent ones: no sum over a lane leaves its thread.
    STEP: tl.constexpr = LANES if CHANNELS_INNER else 1
    lane = tl.arange(0, LANES) * (1 if CHANNELS_INNER else ROWS)
    count = tl.zeros((LANES,), tl.float32)
    mean = tl.zeros((LANES, BLOCK_C), tl.float32)
    m2 = tl.zeros((LANES, BLOCK_C), tl.float32)
    for start in range(begin, end, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < end)[:, None] & mask_c[None, :]
        x = load_tile(x_ptr, shortcut_ptr, bias, scale, x_strides, s_strides, n, frame, offs_p, offs_c, mask, UNIT)
        if y_ptr is not None:
            offs_y = offs_p[:, None].to(tl.int64) * y_strides[3] + offs_c[None, :].to(tl.int64) * y_strides[1] * UNIT
            base_y = n * y_strides[0] * UNIT + frame * y_strides[2] * UNIT
            tl.store(y_ptr + base_y + offs_y, x.to(y_ptr.dtype.element_ty), mask=mask)
        added = tl.minimum(tl.maximum((end - start - lane + STEP - 1) // STEP, 0), ROWS)
        if CHANNELS_INNER:
            within = tl.arange(0, ROWS)[:, None, None] < added[None, :, None]
            x = tl.where(within, tl.reshape(x, (ROWS, LANES, BLOCK_C)), 0.0)
            tile_mean = tl.sum(x, axis=0) / tl.maximum(added, 1).to(tl.float32)[:, None]
            d = tl.where(within, x - tile_mean[None, :, :], 0.0)
            tile_m2 = tl.sum(d * d, axis=0)
        else:
            within = tl.arange(0, ROWS)[None, :, None] < added[:, None, None]
            x = tl.where(within, tl.reshape(x, (LANES, ROWS, BLOCK_C)), 0.0)
            tile_mean = tl.sum(x, axis=1) / tl.maximum(added, 1).to(tl.float32)[:, None]
            d = tl.where(within, x - tile_mean[:, None, :], 0.0)
            tile_m2 = tl.sum(d * d, axis=1)
        before = count
        count += added.to(tl.float32)
        share = added.to(tl.float32) / tl.maximum(count, 1.0)
        d = tile_mean - mean
        mean += d * share[:, None]
        m2 += tile_m2 + d * d * (before * share)[:, None]

    total = tl.maximum(end - begin, 1).to(tl.float32)
    chunk_mean = tl.sum(count[:, None] * mean, axis=0) / total
    d = mean - chunk_mean[None, :]
    # The estimate's own rounding, which a large mean makes noticeable.
    rest = tl.sum(count[:, None] * d, axis=0) / total
    chunk_m2 = tl.sum(m2 + count[:, None] * d * d, axis=0) - total * rest * rest
    return chunk_mean + rest, tl.maximum(chunk_m2, 0.0)


@triton.jit
def _partials_kernel(
    x_ptr, shortcut_ptr, bias_ptr, y_ptr, partials_ptr,
    x_strides, s_strides, y_strides,
    num_channels, num_pixels, chunk, chunks_per_frame, scale,
    UNIT: tl.constexpr, CHANNELS_INNER: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid_k = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_channels
    n = tl.program_id(2).to(tl.int64)
    begin = (pid_k % chunks_per_frame) * chunk
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    mean, m2 = pixel_statistics(
        x_ptr, shortcut_ptr, y_ptr, bias, scale, x_strides, s_strides, y_strides,
        n, (pid_k // chunks_per_frame).to(tl.int64), begin, tl.minimum(begin + chunk, num_pixels * UNIT),
        offs_c, mask_c, UNIT, CHANNELS_INNER, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    offs = (n * tl.num_programs(0) + pid_k) * 2 * num_channels + offs_c
    tl.store(partials_ptr + offs, mean, mask=mask_c)
    tl.store(partials_ptr + offs + num_channels, m2, mask=mask_c)


def group_norm_partials(x):
    """Partials (n, num_chunks, 2, c) float32 of `x`: mean and m2 of each channel over each chunk.

    Args:
        x: (n, c, *spatial), 1 to 3 spatial sizes, float32, float16 or bfloat16, rows dense.
    Returns: contiguous partials; two of them joined along the last axis are those of the tensors joined along channels.
    Raises: ValueError for rows that are not dense.
    """
    return _launch(_plan((x, None, None, None)), x, None, None, None, 1.0)


def residual_partials(h, shortcut, *, bias=None, scale=1.0, out=None):
    """(y, partials): y = (h + bias + shortcut) × scale, and the partials of y as it is stored.

    Args:
        h, shortcut: (n, c, *spatial), alike in shape and dtype, rows dense.
        bias: (c,), of the convolution that made `h` without it.
        scale: float, one over the block's output scale factor.
        out: as `h`, to write y into; made like `h` where None.
    Raises: ValueError for shapes that differ or rows that are not dense.
    """
    plan = _plan((h, shortcut, bias, out))
    y = plans.new(plan.y, h) if out is None else out
    return y, _launch(plan, h, shortcut, bias, y, scale)


def _launch(plan, x, shortcut, bias, y, scale):
    partials = plans.new(plan.partials, x)
    _partials_kernel[plan.grid](x, shortcut, bias, y, partials, *plan.sizes, scale, **plan.constants)
    return partials


class _Statistics(NamedTuple):
    grid: tuple
    sizes: tuple
    constants: dict
    partials: torch.Tensor
    y: torch.Tensor | None


@plans.planned
def _plan(x, shortcut, bias, out):
    y = None
    if shortcut is not None:
        checks.check_residual(x, shortcut, bias)
        y = pixels.new_output(x, (0, 0), 1, False, out)[1]
    views = [None if t is None else pixels.pixel_view(t) for t in (x, shortcut, y)]
    view = views[0]
    num_pixels = view.height * view.width
    chunk = pixels.chunk_pixels(view.frames, num_pixels)
    chunks_per_frame = plans.ceil_div(num_pixels, chunk)
    partials = x.new_empty((view.n, view.frames * chunks_per_frame, 2, view.c), dtype=torch.float32)
    unit = pixels.common_unit(view, *views[1:])
    channels_inner = pixels.channels_inner(x)
    launch = tuning.statistics_tile(channels_inner, unit > 1, chunk)
    sizes = (
        *(None if v is None else pixels.strides_in(v, unit) for v in views),
        view.c, num_pixels // unit, chunk, chunks_per_frame,
    )  # fmt: skip
    constants = dict(UNIT=unit, CHANNELS_INNER=channels_inner, BLOCK_P=launch.block_p, BLOCK_C=launch.block_c)
    grid = partials.shape[1], plans.ceil_div(view.c, launch.block_c), view.n
    return _Statistics(grid, sizes, constants | {"num_warps": launch.num_warps}, partials, y)
