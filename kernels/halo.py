"""Border rows of a patch: packed for sending, and put around a patch that no norm writes.

Both only move rows: `pad_rows` is the pass of `group_norm_apply` without a norm, for convolutions whose input comes
from elsewhere; `pack_rows` copies the first and the last rows in one launch.
"""

import triton
import triton.language as tl
from asyncdiff_fast.kernels import checks, pixels, plans, tuning
from asyncdiff_fast.kernels.group_norm_apply import group_norm_apply


@triton.jit
def _pack_kernel(
    x_ptr, top_ptr, bottom_ptr, x_strides, top_strides, bottom_strides,
    num_channels, num_pixels, top_pixels, bottom_pixels, CHANNELS_INNER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # One index over both borders; consecutive lanes take what is adjacent in memory.
    border_pixels = top_pixels + bottom_pixels
    if CHANNELS_INNER:
        offs_c = offs % num_channels
        offs_p = offs // num_channels
    else:
        offs_c = offs // border_pixels
        offs_p = offs % border_pixels
    mask = (offs_c < num_channels) & (offs_p < border_pixels)
    is_top = offs_p < top_pixels
    source = tl.where(is_top, offs_p, num_pixels - border_pixels + offs_p)
    rows = tl.load(x_ptr + n * x_strides[0] + offs_c * x_strides[1] + source * x_strides[3], mask=mask, other=0.0)
    if top_ptr is not None:
        offs_t = n * top_strides[0] + offs_c * top_strides[1] + offs_p * top_strides[3]
        tl.store(top_ptr + offs_t, rows, mask=mask & is_top)
    if bottom_ptr is not None:
        offs_b = n * bottom_strides[0] + offs_c * bottom_strides[1] + (offs_p - top_pixels) * bottom_strides[3]
        tl.store(bottom_ptr + offs_b, rows, mask=mask & (offs_p >= top_pixels))


def pad_rows(x, halo, *, above=None, below=None, top=None, bottom=None, upsample=1, out=None):
    """y: `x`, upsampled by nearest if asked, between its neighbours' rows; own border rows packed in the same pass.

    Args and errors: as in `group_norm_apply`. Returns: (n, c, halo[0] + upsample × h + halo[1], upsample × w).
    """
    return group_norm_apply(
        x, None, halo=halo, above=above, below=below, top=top, bottom=bottom, upsample=upsample, out=out
    )


def pack_rows(x, *, top=None, bottom=None):
    """Copy the first rows of `x` (n, c, h, w) into `top` and its last into `bottom`: (n, c, any rows, w), or None.

    Raises: ValueError for sizes or dtypes that differ or rows that are not dense.
    """
    checks.check_borders(x, (0, 0), 1, None, None, top, bottom)
    view = pixels.pixel_view(x)
    views = [None if t is None else pixels.pixel_view(t) for t in (top, bottom)]
    border_pixels = [0 if v is None else v.height * v.width for v in views]
    grid = (plans.ceil_div(sum(border_pixels) * view.c, tuning.HALO_BLOCK), view.n)
    if not any(border_pixels):
        return
    _pack_kernel[grid](
        x, top, bottom, *(None if v is None else pixels.strides_in(v, 1) for v in (view, *views)),
        view.c, view.height * view.width, *border_pixels,
        CHANNELS_INNER=pixels.channels_inner(x), BLOCK=tuning.HALO_BLOCK,
    )  # fmt: skip
