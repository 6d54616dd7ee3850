"""Sites: the few function calls of a forward that read more than one row, found and replaced where they happen.

Everything else in a denoiser works row by row (token by token), so it runs on a patch as on a smaller picture. A site
is known by its module, the number of the module's call, and its place among that call's watched functions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..exchange import wire

CONV, NORM, ATTENTION, RESIZE, POOL, PAD = "convolution", "norm", "attention", "resize", "pool", "padding"
SUM = "sum"
# Inputs with these in their names speak of the prompt, whatever their sizes are.
PROMPT = ("encoder", "txt", "text", "prompt", "pooled")
KINDS = {
    torch.conv1d: CONV,
    torch.conv2d: CONV,
    torch.conv3d: CONV,
    F.group_norm: NORM,
    torch.group_norm: NORM,
    F.scaled_dot_product_attention: ATTENTION,
    F.interpolate: RESIZE,
    F.avg_pool2d: POOL,
    F.max_pool2d: POOL,
    F.pad: PAD,
}
# Functions that may sum over rows, and what they make of them. Of norms, those of order 2; of pools, to one pixel.
SUMS = {
    **dict.fromkeys((torch.sum, torch.Tensor.sum, torch.einsum, torch.bmm, torch.Tensor.bmm), "sum"),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), "sum"),
    **dict.fromkeys((torch.mean, torch.Tensor.mean, F.adaptive_avg_pool2d), "mean"),
    **dict.fromkeys((torch.amax, torch.Tensor.amax), "max"),
    **dict.fromkeys((torch.amin, torch.Tensor.amin), "min"),
    **dict.fromkeys((torch.norm, torch.Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm), "norm"),
}
# Functions that join an activation with a tensor of positions, such as a sine embedding.
JOINS = {
    torch.add, torch.mul, torch.sub, torch.Tensor.add, torch.Tensor.mul, torch.Tensor.sub,
    torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.Tensor.__sub__,
}  # fmt: skip


@wire.register
@dataclass(frozen=True)
class Seen:
    """One watched call: shapes of its first argument (of the keys, for attention) and result, and its options."""

    kind: str
    shape: tuple[int, ...]
    result: tuple[int, ...]
    options: tuple
    dtype: torch.dtype
    # A few numbers of each key token, by which the picture's tokens are told from others.
    sample: torch.Tensor | None = None


def kind_of(func, args, kwargs):
    """The kind of site that a call is; None of any other, as of one that pads sequences or features."""
    kind = KINDS.get(func)
    if kind == PAD and (args[0] if args else kwargs["input"]).dim() < 4:
        return None
    return kind


def conv_options(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """((kernel, stride, padding, dilation) by spatial dimension) of a convolution's arguments."""
    n = weight.dim() - 2
    kernel = tuple(weight.shape[2:])
    stride, dilation = ((v,) * n if isinstance(v, int) else tuple(v) * (n // len(v)) for v in (stride, dilation))
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        # An even kernel pads one more after than before, which a symmetric padding cannot say.
        padding = tuple(p // 2 if p % 2 == 0 else None for p in total)
    elif isinstance(padding, int):
        padding = (padding,) * n
    else:
        padding = tuple(padding) * (n // len(padding))
    return tuple(zip(kernel, stride, padding, dilation, strict=True))


def _norm_options(input, num_groups, *_, **__):
    return (num_groups,)


def _resize_options(input, size=None, scale_factor=None, mode="nearest", *_, **__):
    return (mode,)


def _pool_options(input, kernel_size, stride=None, padding=0, *more, **named):
    """As `conv_options`; what is padded, dilated or rounded up has None for its padding."""
    pairs = [(v, v) if isinstance(v, int) else tuple(v) * (2 // len(v)) for v in (kernel_size, stride or kernel_size)]
    plain = padding in (0, (0, 0)) and not any(m is True or m not in (1, (1, 1), False, None) for m in more[:1])
    plain &= not named.get("ceil_mode") and named.get("dilation", 1) in (1, (1, 1))
    return tuple((k, s, 0 if plain else None, 1) for k, s in zip(*pairs, strict=True))


def _pad_options(input, pad, *_, **__):
    """((above, below) in rows,) of a padding: (0, 0) if it adds no rows to a picture."""
    return (tuple(pad[2:4]) if len(pad) >= 4 else (0, 0),)


_OPTIONS = {
    CONV: conv_options, NORM: _norm_options, RESIZE: _resize_options, POOL: _pool_options, PAD: _pad_options,
}  # fmt: skip


def sample_of(key):
    """(tokens, 8): a few numbers of each key."""
    return key.detach()[(0,) * (key.dim() - 2)][:, :8].clone()


def seen(kind, args, kwargs, result, sampled=True):
    """The `Seen` of a call; `sampled` keeps a few numbers of each key."""
    first = args[0] if args else next(iter(kwargs.values()))
    if kind == ATTENTION:
        key = args[1] if len(args) > 1 else kwargs["key"]
        sample = sample_of(key) if sampled else None
        value = args[2] if len(args) > 2 else kwargs["value"]
        causal = bool(args[5] if len(args) > 5 else kwargs.get("is_causal", False))
        return Seen(kind, tuple(key.shape), tuple(first.shape), (tuple(value.shape), causal), key.dtype, sample)
    options = _OPTIONS[kind](*args, **kwargs)
    return Seen(kind, tuple(first.shape), tuple(result.shape), options, first.dtype)
