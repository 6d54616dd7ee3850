"""What a launch needs beside its tensors: worked out once for each of their layouts and its options, then looked up.

A launch costs the host more than a small kernel takes, and most of that is to check and to count.
"""

import functools

import torch

# Layouts of which plans are kept, for each launcher.
KEPT = 4096


def planned(work_out):
    """`plan(tensors, *options)` gives what `work_out(*tensors, *options)` does, which sees shapes, strides and dtypes.

    `tensors`: a tuple of tensors and None, in whose place `work_out` has tensors of the meta device; `options` are
    hashable. What is raised is raised each time.
    """

    @functools.lru_cache(KEPT)
    def known(layouts, *options):
        tensors = (
            None if x is None else torch.empty_strided(x[0], x[1], dtype=x[2], device="meta", requires_grad=False)
            for x in layouts
        )
        return work_out(*tensors, *options)

    def plan(tensors, *options):
        return known(tuple([None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors]), *options)

    return plan


def new(like, x):
    """A tensor laid out like one of a plan's, where `x` is."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=x.device)


def ceil_div(a, b):
    """a / b, rounded up. Triton's own of that name is ten times as slow on the host."""
    return -(-a // b)


def power_of_2(n):
    """The least power of two that is no less than n."""
    return 1 << (n - 1).bit_length() if n > 0 else 0
