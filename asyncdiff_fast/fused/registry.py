"""Which implementations each op has, and how ops are registered with torch.

Registration (namespace `asyncdiff_fast`) is for whoever traces, torch.compile or our own tracer, and for kernels only:
its dispatch costs the host more than launching a small kernel does, and a compiler sees through library calls better
than through an op.
"""

import functools
import inspect

import torch

# Implementations of each op; the first is what it replaces, and the measure of the others.
KERNELS = {
    "group_norm": ("torch", "triton"),
    "residual_add": ("torch", "triton"),
    "geglu": ("torch", "triton"),
    "gelu_beside": ("torch", "triton"),
    "adaln": ("torch", "triton"),
    "gate_residual_adaln": ("torch", "triton"),
    "add_layer_norm": ("torch", "triton"),
    "joint_qk_norm_rope": ("torch", "triton"),
    # "ahead": Triton's, of heads in one piece, a block's scores beside the probabilities of the one before.
    "attention": ("torch", "cudnn", "flash", "triton", "ahead"),
    # Of all keys in one segment, on one device.
    "whole_attention": ("torch", "cudnn", "flash"),
    # Of queries, keys and values, by one matrix product.
    "joined_projections": ("torch", "joined"),
    "patch_statistics": ("torch", "triton"),
    "patch_group_norm": ("torch", "triton"),
    "patch_rows": ("torch", "triton"),
}


def op(fake, writes=()):
    """Register a function as an op whose results are like those of `fake`, and which writes to the arguments `writes`.

    Its argument `kernel`, and those before it, are given by place.
    """

    def register(function):
        place = list(inspect.signature(function).parameters).index("kernel")

        @functools.wraps(function)
        def run(*args, **keywords):
            first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
            # Triton launches on the current device, wherever its arguments are.
            with torch.cuda.device_of(first):
                return function(*args, **keywords)

        registered = _defined(f"asyncdiff_fast::{function.__name__}", run, fake, writes)

        @functools.wraps(function)
        def call(*args, **keywords):
            if args[place] == "torch":
                return function(*args, **keywords)
            traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
            return registered(*args, **keywords) if traced else run(*args, **keywords)

        return call

    return register


def _defined(name, run, fake, writes):
    """An op of torch's. Not by `custom_op`, whose ops cannot leave out a tensor that they write before torch 2.13."""
    torch.library.define(name, torch.library.infer_schema(run, mutates_args=writes))
    torch.library.impl(name, "default", run)
    torch.library.register_fake(name, fake)
    return getattr(torch.ops.asyncdiff_fast, name.partition("::")[2])
