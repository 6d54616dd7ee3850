"""Normalise, activate and lay out for the next convolution, in one pass.

    y[halo_above + r, w] = act(x[r, w] · a + b),    rows around it from the neighbours or zero

(a, b) per channel come from `group_norm_merge`; without them the values pass unchanged (`halo.pad_rows`). Arithmetic
in float32, one rounding. Programs run over the pixels of the *padded* buffer: in either memory format it is the same
sequence of pixels moved by halo_above rows, so interior tiles are plain vector loads and stores and border tiles need
no second path. The own first and last rows are also stored where they will be sent from. Nearest upsampling reads a
pixel for each of its four copies, from cache but once, and exchanges rows of the source's resolution: half as wide.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from asyncdiff_fast.kernels import checks, pixels, plans, tuning


@triton.jit
def _row_offsets(strides, n, offs_p, offs_c, UNIT: tl.constexpr):
    """Offsets of a (pixels, channels) tile into border rows (n, c, rows, w)."""
    offs = offs_p[:, None].to(tl.int64) * strides[3] + offs_c[None, :].to(tl.int64) * strides[1] * UNIT
    return n * strides[0] * UNIT + offs


@triton.jit
def write_tile(
    x_ptr, above_ptr, below_ptr, y_ptr, top_ptr, bottom_ptr,
    x_strides, above_strides, below_strides, y_strides, top_strides, bottom_strides,
    n, frame, offs_o, offs_c, mask_c, a, b, height, width, halo_above, halo_below, top_rows, bottom_rows,
    SILU: tl.constexpr, HALO: tl.constexpr, UPSAMPLE: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
):  # fmt: skip
    """Make the tile of pixels `offs_o` of the padded frame, and store what of it is a border row."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    # A product with a constant tells the compiler the divisor that 16-byte accesses need.
    width = width * X_UNIT
    num_pixels = height * width
    written = offs_o < (halo_above + height * UPSAMPLE + halo_below) * width * UPSAMPLE
    # Border rows are stored once, for the first of a pixel's copies.
    once = written
    rows_above = (halo_above + UPSAMPLE - 1) // UPSAMPLE
    if UPSAMPLE == 1:
        offs_p = offs_o - halo_above * width
    else:
        # From the first whole source row on, as division truncates towards zero.
        row = offs_o // (width * UPSAMPLE) + rows_above * UPSAMPLE - halo_above
        column = offs_o % (width * UPSAMPLE)
        offs_p = (row // UPSAMPLE - rows_above) * width + column // UPSAMPLE
        once = once & (row % UPSAMPLE == 0) & (column % UPSAMPLE == 0)
    inside = written & (offs_p >= 0) & (offs_p < num_pixels)

    offs_x = offs_p[:, None].to(tl.int64) * x_strides[3] + offs_c[None, :].to(tl.int64) * x_strides[1] * X_UNIT
    base_x = n * x_strides[0] * X_UNIT + frame * x_strides[2] * X_UNIT
    y = tl.load(x_ptr + base_x + offs_x, mask=inside[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
    if a is not None:
        y = y * a[None, :] + b[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    y = y.to(dtype)
    if top_ptr is not None:
        mask = (inside & once & (offs_p < top_rows * width))[:, None] & mask_c[None, :]
        tl.store(top_ptr + _row_offsets(top_strides, n, offs_p, offs_c, X_UNIT), y, mask=mask)
    if bottom_ptr is not None:
        offs_b = offs_p - (height - bottom_rows) * width
        mask = (inside & once & (offs_b >= 0))[:, None] & mask_c[None, :]
        tl.store(bottom_ptr + _row_offsets(bottom_strides, n, offs_b, offs_c, X_UNIT), y, mask=mask)
    if HALO:
        y = tl.where(inside[:, None], y, 0.0).to(dtype)
        if above_ptr is not None:
            mask = (offs_p < 0)[:, None] & mask_c[None, :]
            offs = _row_offsets(above_strides, n, offs_p + rows_above * width, offs_c, X_UNIT)
            y = tl.where(mask, tl.load(above_ptr + offs, mask=mask, other=0.0), y)
        if below_ptr is not None:
            mask = (written & (offs_p >= num_pixels))[:, None] & mask_c[None, :]
            offs = _row_offsets(below_strides, n, offs_p - num_pixels, offs_c, X_UNIT)
            y = tl.where(mask, tl.load(below_ptr + offs, mask=mask, other=0.0), y)
    offs_y = offs_o[:, None].to(tl.int64) * y_strides[3] + offs_c[None, :].to(tl.int64) * y_strides[1] * Y_UNIT
    base_y = n * y_strides[0] * Y_UNIT + frame * y_strides[2] * Y_UNIT
    tl.store(y_ptr + base_y + offs_y, y, mask=written[:, None] & mask_c[None, :])


@triton.jit
def _apply_kernel(
    x_ptr, affine_ptr, above_ptr, below_ptr, y_ptr, top_ptr, bottom_ptr, num_channels, tiles_per_frame,
    x_strides, above_strides, below_strides, y_strides, top_strides, bottom_strides,
    height, width, halo_above, halo_below, top_rows, bottom_rows,
    SILU: tl.constexpr, HALO: tl.constexpr, UPSAMPLE: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid_t = tl.program_id(0)
    offs_o = (pid_t % tiles_per_frame) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_channels
    n = tl.program_id(2).to(tl.int64)
    a = None
    b = None
    if affine_ptr is not None:
        a = tl.load(affine_ptr + n * 2 * num_channels + offs_c, mask=mask_c, other=0.0)
        b = tl.load(affine_ptr + (n * 2 + 1) * num_channels + offs_c, mask=mask_c, other=0.0)
    write_tile(
        x_ptr, above_ptr, below_ptr, y_ptr, top_ptr, bottom_ptr,
        x_strides, above_strides, below_strides, y_strides, top_strides, bottom_strides,
        n, (pid_t // tiles_per_frame).to(tl.int64), offs_o, offs_c, mask_c, a, b,
        height, width, halo_above, halo_below, top_rows, bottom_rows, SILU, HALO, UPSAMPLE, X_UNIT, Y_UNIT,
    )  # fmt: skip


def group_norm_apply(
    x, affine, *, act="none", halo=(0, 0), above=None, below=None, top=None, bottom=None, upsample=1, tokens=False,
    out=None,
):  # fmt: skip
    """y: `x` normalised by `affine`, activated, upsampled, between its halo rows.

    Args:
        x: (n, c, *spatial), rows dense. affine: (n, 2, c) float32 of `group_norm_merge`, or None to leave the values.
        act: "none" or "silu".
        halo: (rows above, rows below) to add; (n, c, h, w) only, as are all of the following.
        above, below: (n, c, rows, w), dtype of `x`: the neighbours' rows; None: zeros, the border of the image.
        top, bottom: (n, c, any rows, w), written: the own first and last rows of the result, for the neighbours.
        upsample: 1, or 2 for nearest; the four border tensors then have the source's resolution, ⌈halo / 2⌉ rows.
        tokens: return (n, pixels, c). out: tensor to write y into, (n, c, *padded spatial), rows dense.
    Returns: (n, c, halo[0] + upsample × h + halo[1], upsample × w) in the memory format of `x`, `out`, or tokens.
    Raises: ValueError for shapes or dtypes that do not fit together.
    """
    plan = _plan((x, above, below, top, bottom, out), act, tuple(halo), upsample, tokens)
    y, result = plan.output(x, tokens, out)
    _apply_kernel[plan.grid](x, affine, above, below, y, top, bottom, *plan.sizes, **plan.constants)
    return result


class Output(NamedTuple):
    """Of a launcher that writes a picture: grid, sizes and constants of its kernel; `y` is like its result."""

    grid: tuple
    sizes: tuple
    constants: dict
    y: torch.Tensor

    def output(self, x, tokens, out):
        """(tensor to write, tensor to return), as `pixels.new_output` makes them."""
        y = plans.new(self.y, x) if out is None else out
        return y, y.flatten(2).transpose(1, 2) if tokens else y


@plans.planned
def _plan(x, above, below, top, bottom, out, act, halo, upsample, tokens):
    checks.check_act(act)
    checks.check_borders(x, halo, upsample, above, below, top, bottom)
    y = pixels.new_output(x, halo, upsample, tokens, out)[0]
    view, view_y = pixels.pixel_view(x), pixels.pixel_view(y, "out")
    launch = tuning.GROUP_NORM_APPLY[pixels.channels_inner(x)]
    tiles_per_frame = plans.ceil_div(view_y.height * view_y.width, launch.block_p)
    arguments, constants = write_arguments(view, view_y, halo, above, below, top, bottom)
    constants |= dict(SILU=act == "silu", UPSAMPLE=upsample, BLOCK_P=launch.block_p, BLOCK_C=launch.block_c)
    grid = tiles_per_frame * view.frames, plans.ceil_div(view.c, launch.block_c), view.n
    return Output(grid, (view.c, tiles_per_frame, *arguments), constants | {"num_warps": launch.num_warps}, y)


def write_arguments(view, view_y, halo, above, below, top, bottom):
    """The strides and sizes that `write_tile` takes, and its constants but SILU and UPSAMPLE."""
    borders = [None if t is None else pixels.pixel_view(t) for t in (above, below, top, bottom)]
    x_unit, y_unit = pixels.common_unit(view, *borders), pixels.common_unit(view_y)
    rows = [None if border is None else pixels.strides_in(border, x_unit) for border in borders]
    border_rows = [0 if t is None else t.shape[2] for t in (top, bottom)]
    arguments = (
        pixels.strides_in(view, x_unit), *rows[:2], pixels.strides_in(view_y, y_unit), *rows[2:],
        view.height, view.width // x_unit, *halo, *border_rows,
    )  # fmt: skip
    return arguments, {"HALO": any(halo), "X_UNIT": x_unit, "Y_UNIT": y_unit}
