"""How the GroupNorm and halo launchers see a tensor: frames of evenly spaced pixels, cut into chunks.

A tensor (n, c, *spatial) is read as (n, c, frames, pixels). Four strides address it, so contiguous and channels_last
tensors, views of some rows and the permuted (batch, channels, frames, h, w) views of temporal layers all are read
where they lie.
"""

import functools
from typing import NamedTuple

import torch

# Few chunks are merged cheaply, small ones keep a device busy: about sixteen, of at most 1024 pixels unless there would
# be too many.
MIN_CHUNK, LARGE_CHUNK, FEW_CHUNKS, MAX_CHUNKS = 128, 1024, 16, 256


class PixelView(NamedTuple):
    """Sizes of (n, c, frames, height, width), and the strides of sample, channel, frame and pixel in elements."""

    n: int
    c: int
    frames: int
    height: int
    width: int
    stride_n: int
    stride_c: int
    stride_f: int
    stride_p: int


def pixel_view(x, name="x"):
    """The `PixelView` of (n, c, *spatial), one to three spatial sizes. Raises ValueError unless its rows are dense."""
    return _pixel_view(x.shape, x.stride(), name)


# A launch costs the host more than a small kernel takes: what follows from shapes and strides is worked out once.
@functools.lru_cache(4096)
def _pixel_view(shape, stride, name):
    ndim = len(shape)
    if not 3 <= ndim <= 5:
        raise ValueError(f"{name} must be (n, c, *spatial) with 1 to 3 spatial sizes: got shape {tuple(shape)}")
    sizes = [*shape[:2], *[1] * (5 - ndim), *shape[2:]]
    strides = [*stride[:2], *[0] * (5 - ndim), *stride[2:]]
    # A stride along a size of 1 is never used; 0 keeps it from looking unaligned.
    stride_n, stride_c, stride_f, stride_h, stride_w = (
        s if size > 1 else 0 for s, size in zip(strides, sizes, strict=True)
    )
    height, width = sizes[3:]
    if height > 1 and width > 1 and stride_h != width * stride_w:
        raise ValueError(
            f"{name} must have dense rows (stride of a row = width × stride of a pixel): got shape {tuple(shape)}, "
            f"strides {stride}; pass {name}.contiguous()"
        )
    return PixelView(*sizes, stride_n, stride_c, stride_f, stride_w or stride_h)


@functools.lru_cache(4096)
def common_unit(*views):
    """8 where pixels are adjacent and the width and all other strides are multiples of 8, else 1; skips None.

    The kernels take strides and width in this unit: by itself the compiler sees only multiples of 16, which the width
    of a level need not be.
    """
    for view in views:
        if view is not None and (view.stride_p != 1 or any(s % 8 for s in (view.width, *view[5:8]))):
            return 1
    return 8


def strides_in(view, unit):
    """(sample, channel, frame, pixel) strides for a kernel, the first three in units."""
    return view.stride_n // unit, view.stride_c // unit, view.stride_f // unit, view.stride_p


def channels_inner(x):
    """Whether neighbours in memory are channels of one pixel."""
    return x.shape[1] > 1 and x.stride(1) == 1


def chunk_pixels(frames, pixels):
    """Pixels of one chunk of a frame. Depends on the shape only, so that sums are made in the same order everywhere."""
    chunk = MIN_CHUNK
    while frames * -(-pixels // chunk) > (FEW_CHUNKS if chunk < LARGE_CHUNK else MAX_CHUNKS) and chunk < pixels:
        chunk *= 2
    return chunk


def frames_and_pixels(spatial):
    """(frames, pixels of one) of the spatial sizes: only a tensor with three of them has more than one frame."""
    *frames, height, width = [1] * (3 - len(spatial)) + list(spatial)
    return frames[0], height * width


def num_chunks(spatial):
    """Chunks of one sample with these spatial sizes: the second size of its partials."""
    frames, pixels = frames_and_pixels(spatial)
    return frames * -(-pixels // chunk_pixels(frames, pixels))


def padded_shape(x, halo, upsample):
    """Shape of (n, c, *spatial) after nearest upsampling and with `halo` = (rows above, rows below)."""
    if upsample not in (1, 2):
        raise ValueError(f"upsample must be 1 or 2: got {upsample}")
    if min(halo) < 0 or ((any(halo) or upsample > 1) and x.ndim != 4):
        raise ValueError(
            f"halo rows are counts, for (n, c, h, w) only, as is upsample: got halo {halo}, shape {tuple(x.shape)}"
        )
    if not any(halo) and upsample == 1:
        return x.shape
    n, c, height, width = x.shape
    return torch.Size((n, c, halo[0] + upsample * height + halo[1], upsample * width))


def new_output(x, halo, upsample, tokens, out=None):
    """(tensor to write as (n, c, *spatial), tensor to return): `out`, new like `x`, or new tokens (n, pixels, c)."""
    shape = padded_shape(x, halo, upsample)
    if out is not None:
        if tokens or out.shape != shape or out.dtype != x.dtype:
            raise ValueError(
                f"out must be {tuple(shape)} of {x.dtype} and excludes tokens=True: got {tuple(out.shape)} of "
                f"{out.dtype}, tokens={tokens}"
            )
        return out, out
    if tokens:
        if any(halo):
            raise ValueError(f"tokens=True needs halo (0, 0): got {halo}")
        made = torch.empty(shape[0], shape[2:].numel(), shape[1], dtype=x.dtype, device=x.device)
        return made.transpose(1, 2).unflatten(2, shape[2:]), made
    if shape == x.shape:
        made = torch.empty_like(x)
    else:
        memory_format = torch.channels_last if channels_inner(x) else torch.contiguous_format
        made = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    return made, made


def chunk_counts(spatial):
    """Pixels of each chunk of one sample, a list."""
    frames, count = frames_and_pixels(spatial)
    chunk = chunk_pixels(frames, count)
    return [min(chunk, count - start) for start in range(0, count, chunk)] * frames
