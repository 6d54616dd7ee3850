"""The GroupNorm and halo launches that are compiled for every target: real shapes, one of each kind."""

from functools import partial

import torch
from asyncdiff_fast.kernels import group_norm, halo
from asyncdiff_fast.kernels.group_norm_small import group_norm_small
from compile_kernels import Variant
from norm_oracle import laid_out

WIDE = ("_partials_kernel", "_apply_kernel")
SMALL = ("_small_kernel",)


def tensor(shape, layout, dtype=torch.bfloat16):
    """Memory that nobody touches."""
    return laid_out(torch.empty(shape, dtype=dtype), layout)


def rows(x, layout):
    return {
        name: tensor((*x.shape[:2], 1, x.shape[3]), layout, x.dtype) for name in ("above", "below", "top", "bottom")
    }


def resnet(shape, layout, dtype=torch.bfloat16, small=False, mode="corrected"):
    """A norm as a residual block of one of 8 patches has it: everything folded in, halo rows both read and written."""
    x, vector = tensor(shape, layout, dtype), torch.empty(shape[1], dtype=dtype)
    keywords = {"act": "silu", "conv_bias": vector, "temb": vector[None], "halo": (1, 1), **rows(x, layout)}
    keywords |= {"mode": mode, "parts": torch.empty(8, 1, 32, 2), "own": 3}
    if small:
        return group_norm_small(x, vector, vector, 32, 1e-5, **keywords)
    # Whatever its size, by three launches: the partials are given.
    partials = group_norm.group_norm_partials(x)
    return group_norm.group_norm(x, vector, vector, 32, 1e-5, partials=partials, **keywords)


def tokens(shape, layout):
    x = tensor(shape, layout)
    group_norm.group_norm_apply(x, torch.empty(shape[0], 2, shape[1]), tokens=True)


def residual(shape, layout):
    h = tensor(shape, layout)
    group_norm.residual_partials(h, h, bias=torch.empty(shape[1], dtype=h.dtype))


def upsampled(shape, layout):
    x = tensor(shape, layout)
    halo.pad_rows(x, (1, 1), upsample=2, **rows(x, layout))


def packed(shape, layout):
    x = tensor(shape, layout)
    borders = rows(x, layout)
    halo.pack_rows(x, top=borders["top"], bottom=borders["bottom"])


def frames(shape):
    x = tensor(shape, "frames")
    partials = group_norm.group_norm_partials(x)
    group_norm.group_norm(x, None, None, 32, 1e-5, partials=partials)


# 640 × 15 × 120 is SDXL's middle level at 3840 pixels and 8 patches: its 1800 pixels are no multiple of 16.
SHAPE = (1, 640, 15, 120)
VARIANTS = [
    *(
        Variant(f"{name} {layout}", partial(call, shape, layout), wide, many=wide[:1])
        for layout in ("contiguous", "channels_last")
        for name, call, shape, wide in (
            ("resnet", resnet, SHAPE, WIDE),
            ("resnet of many chunks", resnet, (1, 320, 120, 480), WIDE),
            ("tokens", tokens, SHAPE, WIDE),
            ("residual", residual, SHAPE, WIDE),
            ("pack", packed, SHAPE, ()),
        )
    ),
    Variant("upsampled channels_last", partial(upsampled, SHAPE, "channels_last"), WIDE),
    Variant("upsampled contiguous", partial(upsampled, SHAPE, "contiguous")),
    Variant("small contiguous", partial(resnet, (1, 1280, 4, 32), "contiguous", small=True), SMALL, many=SMALL),
    Variant("small channels_last", partial(resnet, (1, 320, 16, 128), "channels_last", small=True)),
    Variant(
        "groups of 10, float16", partial(resnet, (1, 320, 60, 480), "channels_last", torch.float16, mode="sync"), WIDE
    ),
    Variant("groups of 80, float32", partial(resnet, (1, 2560, 15, 120), "channels_last", torch.float32), WIDE),
    Variant("frames", partial(frames, (1, 320, 14, 24, 32)), WIDE),
]
