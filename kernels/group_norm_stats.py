"""Partial statistics of (n, c, *spatial): mean and m2 of every channel over every chunk of pixels.

    mean = k + Σ (x − k) / count,    m2 = Σ (x − k)² − (Σ (x − k))² / count,    k = mean of the chunk's first pixels

All in float32. The shift k keeps the sums from cancelling where |mean| ≫ σ, and is a mean itself so that one outlier
does not spoil it. Statistics are kept per channel, not per group: a group of 10 to 80 channels never fills a power of
two, whole channels make 16-byte loads, a constant added to a channel (bias, time embedding) costs nothing afterwards,
and the partials of a concatenation are the concatenation of partials. Chunks depend on the shape only: results repeat
bit for bit.

A tile is (pixels, channels) whatever the memory format; which of the two runs along a warp follows from the strides.
Source: T. Chan, G. Golub, R. LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
1979.
"""

import torch
import triton
import triton.language as tl
from asyncdiff_fast.kernels import checks, pixels, tuning

# Pixels whose mean is the shift: few, to be cheap; several, so that an outlier among them is diluted.
SHIFT_PIXELS = tl.constexpr(16)


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
def _partials_kernel(
    x_ptr, shortcut_ptr, bias_ptr, y_ptr, partials_ptr,
    x_strides, s_strides, y_strides,
    num_channels, num_pixels, chunk, chunks_per_frame, scale,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid_k = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_channels
    n = tl.program_id(2).to(tl.int64)
    frame = (pid_k // chunks_per_frame).to(tl.int64)
    begin = (pid_k % chunks_per_frame) * chunk
    end = tl.minimum(begin + chunk, num_pixels * UNIT)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)

    offs_s = begin + tl.arange(0, SHIFT_PIXELS)
    mask_s = (offs_s < end)[:, None] & mask_c[None, :]
    sample = load_tile(x_ptr, shortcut_ptr, bias, scale, x_strides, s_strides, n, frame, offs_s, offs_c, mask_s, UNIT)
    sampled = tl.minimum(end - begin, SHIFT_PIXELS).to(tl.float32)
    shift = tl.sum(tl.where(mask_s, sample, 0.0), axis=0) / sampled

    first = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(begin, end, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < end)[:, None] & mask_c[None, :]
        x = load_tile(x_ptr, shortcut_ptr, bias, scale, x_strides, s_strides, n, frame, offs_p, offs_c, mask, UNIT)
        if y_ptr is not None:
            offs_y = offs_p[:, None].to(tl.int64) * y_strides[3] + offs_c[None, :].to(tl.int64) * y_strides[1] * UNIT
            base_y = n * y_strides[0] * UNIT + frame * y_strides[2] * UNIT
            tl.store(y_ptr + base_y + offs_y, x.to(y_ptr.dtype.element_ty), mask=mask)
        d = tl.where(mask, x - shift[None, :], 0.0)
        first += d
        second += d * d

    count = (end - begin).to(tl.float32)
    sum_first = tl.sum(first, axis=0)
    m2 = tl.sum(second, axis=0) - sum_first * sum_first / count
    offs = (n * tl.num_programs(0) + pid_k) * 2 * num_channels + offs_c
    tl.store(partials_ptr + offs, shift + sum_first / count, mask=mask_c)
    tl.store(partials_ptr + offs + num_channels, tl.maximum(m2, 0.0), mask=mask_c)


def group_norm_partials(x):
    """Partials (n, num_chunks, 2, c) float32 of `x`: mean and m2 of each channel over each chunk.

    Args:
        x: (n, c, *spatial), 1 to 3 spatial sizes, float32, float16 or bfloat16, rows dense.
    Returns: contiguous partials; two of them joined along the last axis are those of the tensors joined along channels.
    Raises: ValueError for rows that are not dense.
    """
    return _launch(x, None, None, None, 1.0)


def residual_partials(h, shortcut, *, bias=None, scale=1.0, out=None):
    """(y, partials): y = (h + bias + shortcut) × scale, and the partials of y as it is stored.

    Args:
        h, shortcut: (n, c, *spatial), alike in shape and dtype, rows dense.
        bias: (c,), of the convolution that made `h` without it.
        scale: float, one over the block's output scale factor.
        out: as `h`, to write y into; made like `h` where None.
    Raises: ValueError for shapes that differ or rows that are not dense.
    """
    checks.check_residual(h, shortcut, bias)
    y = pixels.new_output(h, (0, 0), 1, False, out)[1]
    return y, _launch(h, shortcut, bias, y, scale)


def _launch(x, shortcut, bias, y, scale):
    views = [None if t is None else pixels.pixel_view(t) for t in (x, shortcut, y)]
    view = views[0]
    num_pixels = view.height * view.width
    chunk = pixels.chunk_pixels(view.frames, num_pixels)
    chunks_per_frame = triton.cdiv(num_pixels, chunk)
    partials = x.new_empty((view.n, view.frames * chunks_per_frame, 2, view.c), dtype=torch.float32)
    unit = pixels.common_unit(view, *views[1:])
    launch = tuning.GROUP_NORM["stats", pixels.channels_inner(x)]
    grid = (partials.shape[1], triton.cdiv(view.c, launch.block_c), view.n)
    _partials_kernel[grid](
        x, shortcut, bias, y, partials,
        *(None if v is None else pixels.strides_in(v, unit) for v in views),
        view.c, num_pixels // unit, chunk, chunks_per_frame, scale,
        UNIT=unit, BLOCK_P=launch.block_p, BLOCK_C=launch.block_c, num_warps=launch.num_warps,
    )  # fmt: skip
    return partials
