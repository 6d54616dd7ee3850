"""What the GroupNorm and halo launchers and their references refuse, each with one message."""

import torch
from asyncdiff_fast.kernels import pixels

MODES = ("local", "sync", "stale", "corrected")
ACTIVATIONS = ("none", "silu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_SIZES = range(16, 161, 8)
# Within a tile of attention offsets are 32 bits wide.
MAX_TOKEN_STRIDE = 2**24 - 1


def suits_attention(x):
    """Whether `attention.attention` takes queries, keys or values like x (b, s, h, d), wherever it runs."""
    dense = x.stride(3) == 1 and x.stride(1) <= MAX_TOKEN_STRIDE
    return dense and x.shape[3] in HEAD_SIZES and x.dtype in DTYPES


def rows_are_dense(x):
    """Whether a picture's rows lie one after another, as the GroupNorm and halo launchers read x (n, c, *spatial)."""
    return x.ndim == 3 or (x.ndim in (4, 5) and x.stride(-2) == x.shape[-1] * x.stride(-1))


def even_rows(name, x):
    """`x` (..., columns) as (rows, columns) without a copy. Raises ValueError if its rows are not evenly spaced."""
    try:
        rows = x.view(-1, x.shape[-1])
    except RuntimeError:
        rows = None
    if rows is None or x.stride(-1) != 1:
        raise ValueError(
            f"{name} must have evenly spaced rows and last stride 1: got {tuple(x.shape)} with strides {x.stride()}; "
            "pass a contiguous copy"
        )
    return rows


def check_borders(x, halo, upsample, above, below, top, bottom):
    """Raise unless the neighbours' rows fit the halo and the own ones `x`, all in the resolution of `x`."""
    for name, rows, count in (
        ("above", above, -(-halo[0] // upsample)),
        ("below", below, -(-halo[1] // upsample)),
        ("top", top, None),
        ("bottom", bottom, None),
    ):
        if rows is None:
            continue
        want = (*x.shape[:2], min(rows.shape[2], x.shape[2]) if count is None else count, x.shape[-1])
        if x.ndim != 4 or tuple(rows.shape) != want or rows.dtype != x.dtype:
            raise ValueError(
                f"{name} must be rows {want} of {x.dtype} for x {tuple(x.shape)}, halo {halo}, upsample {upsample}: "
                f"got {tuple(rows.shape)} of {rows.dtype}"
            )


def check_norm(n, c, num_groups, mode, parts, own, shares, **per_channel):
    """Raise unless groups, mode, parts and the named per-channel tensors (c,) or (n, c) fit together."""
    if num_groups < 1 or c % num_groups:
        raise ValueError(f"num_groups must divide the channels: got {c} channels, {num_groups} groups")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}: got {mode!r}")
    if (mode == "local") != (parts is None):
        got = None if parts is None else tuple(parts.shape)
        raise ValueError(f"every mode but 'local' needs parts, and 'local' takes none: got mode={mode!r}, parts {got}")
    if parts is not None:
        want = (parts.shape[0], n, num_groups, 2)
        if (
            tuple(parts.shape) != want
            or parts.dtype != torch.float32
            or not parts.is_contiguous()
            or not 0 <= own < want[0]
        ):
            raise ValueError(
                f"parts must be (num_parts, n, num_groups, 2) = {want} contiguous float32 and own one of them: got "
                f"{tuple(parts.shape)} of {parts.dtype}, own={own}"
            )
        if shares is not None and (tuple(shares.shape) != want[:1] or shares.dtype != torch.float32):
            raise ValueError(f"shares must be {want[:1]} float32: got {tuple(shares.shape)} of {shares.dtype}")
    if (per_channel.get("scale") is None) != (per_channel.get("shift") is None):
        raise ValueError("scale and shift must be given together")
    for name, tensor in per_channel.items():
        want = (c,) if name in ("weight", "bias", "conv_bias") else (n, c)
        if tensor is not None and (tuple(tensor.shape) != want or tensor.stride(-1) != 1 < c):
            raise ValueError(
                f"{name} must be {want}, its channels adjacent: got {tuple(tensor.shape)}, strides {tensor.stride()}"
            )


def check_merge(partials, spatial, num_groups, mode, parts, own, shares, **per_channel):
    """`check_norm` for partials, which must have the chunks of `spatial`."""
    n, chunks, moments, c = partials.shape
    if moments != 2 or not partials.is_contiguous() or chunks != pixels.num_chunks(spatial):
        raise ValueError(
            f"partials of spatial sizes {tuple(spatial)} must be contiguous (n, {pixels.num_chunks(spatial)}, 2, c): "
            f"got {tuple(partials.shape)}"
        )
    check_norm(n, c, num_groups, mode, parts, own, shares, **per_channel)


def check_residual(h, shortcut, bias):
    """Raise unless `shortcut` is like `h` and `bias` (c,)."""
    if h.shape != shortcut.shape or h.dtype != shortcut.dtype or (bias is not None and bias.shape != h.shape[1:2]):
        raise ValueError(
            f"shortcut must be like h, bias (c,): got h {tuple(h.shape)} of {h.dtype}, shortcut "
            f"{tuple(shortcut.shape)} of {shortcut.dtype}, bias {None if bias is None else tuple(bias.shape)}"
        )


def check_act(act):
    """Raise unless `act` is a known activation."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {ACTIVATIONS}: got {act!r}")
