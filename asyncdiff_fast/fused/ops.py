"""The fused ops of the package, each over the implementations that it can run on.

An op takes the name of its implementation, `kernel`, chosen beforehand by `choice`: "triton" is ours, "torch" the
library calls that it replaces, "cudnn" and "flash" are backends of torch's attention. Every op returns new tensors and
has no gradient. Those that know of other patches are in `patch_ops`.
"""

import torch
import torch.nn.functional as F

from .registry import op


def _fake_group_norm(x, *_):
    return torch.empty_like(x)


@op(_fake_group_norm)
def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    conv_bias: torch.Tensor | None,
    temb: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    partials: torch.Tensor | None,
    kernel: str,
) -> torch.Tensor:
    """SiLU (or not) of GroupNorm(x + conv_bias + temb) * (1 + scale) + shift.

    Args:
        x: (n, c, *spatial), fp32, fp16 or bf16.
        conv_bias: (c,); temb, scale, shift: (n, c); each may be None, scale and shift both or none.
        partials: what `residual_add` gave with `x`, or None.
    Returns: like `x`, in its memory format.
    """
    if kernel == "triton":
        from ..kernels import group_norm as triton_op

        act = "silu" if silu else "none"
        return triton_op.group_norm(
            x, weight, bias, num_groups, eps, act=act, conv_bias=conv_bias, temb=temb, scale=scale, shift=shift,
            partials=partials,
        )[0]  # fmt: skip
    spread = (..., *[None] * (x.ndim - 2))
    for added in (conv_bias, temb):
        x = x if added is None else x + added[spread]
    y = laid_out_as(x, F.group_norm(x, num_groups, weight, bias, eps))
    if scale is not None:
        y = y * (1 + scale[spread]) + shift[spread]
    return F.silu(y) if silu else y


def laid_out_as(x, y):
    """`y` with its channels together in memory if those of `x` are: torch's GroupNorm on a GPU moves them apart.

    What follows would have to bring them together again, and shapes would depend on what was chosen before.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    apart = x.ndim not in formats or x.is_contiguous() or not x.is_contiguous(memory_format=formats[x.ndim])
    return y if apart else y.contiguous(memory_format=formats[x.ndim])


def _fake_residual_add(h, *_):
    from ..kernels.pixels import num_chunks

    n, c, *spatial = h.shape
    return torch.empty_like(h), h.new_empty((n, num_chunks(spatial), 2, c), dtype=torch.float32)


@op(_fake_residual_add)
def residual_add(
    h: torch.Tensor, shortcut: torch.Tensor, bias: torch.Tensor | None, divisor: float, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h + bias + shortcut) / divisor, and its statistics for the norm that reads it.

    Args:
        h, shortcut: (n, c, *spatial), alike; bias: (c,) or None.
    Returns: the sum, like `h`; partials (n, chunks, 2, c) fp32, empty from torch.
    """
    if kernel == "triton":
        from ..kernels import group_norm as triton_op

        return triton_op.residual_partials(h, shortcut, bias=bias, scale=1 / divisor)
    if bias is not None:
        h = h + bias[(..., *[None] * (h.ndim - 2))]
    y = shortcut + h
    return y if divisor == 1 else y / divisor, y.new_empty(0)


def _fake_geglu(x, kernel):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@op(_fake_geglu)
def geglu(x: torch.Tensor, kernel: str) -> torch.Tensor:
    """a * gelu(b) of x (..., 2c) = [a, b]; gelu by the error function. Returns (..., c)."""
    if kernel == "triton":
        from ..kernels import pointwise as triton_op

        return triton_op.geglu(x)
    a, b = x.chunk(2, dim=-1)
    return a * F.gelu(b)


def _fake_gelu_beside(y, x, *_):
    return x.new_empty((*x.shape[:-1], y.shape[-1] + x.shape[-1]))


@op(_fake_gelu_beside)
def gelu_beside(y: torch.Tensor, x: torch.Tensor, approximate: str, kernel: str) -> torch.Tensor:
    """y (..., c) and gelu(x) (..., d) side by side: (..., c + d); `approximate` as torch's gelu takes it."""
    if kernel == "triton":
        from ..kernels import pointwise as triton_op

        out = _fake_gelu_beside(y, x)
        out[..., : y.shape[-1]].copy_(y)
        triton_op.gelu(x, approximate=approximate, out=out[..., y.shape[-1] :])
        return out
    return torch.cat([y, F.gelu(x, approximate=approximate)], dim=-1)


def _fake_adaln(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@op(_fake_adaln)
def adaln(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, kernel: str) -> torch.Tensor:
    """LayerNorm(x) * (1 + scale) + shift without weights; x (b, s, c), scale and shift (b, c). Returns (b, s, c)."""
    if kernel == "triton":
        from ..kernels import pointwise as triton_op

        return triton_op.gate_residual_adaln(x, None, None, scale, shift, eps=eps)[1]
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def _fake_gate_residual_adaln(residual, x, *_):
    return _fake_adaln(residual), _fake_adaln(residual)


@op(_fake_gate_residual_adaln)
def gate_residual_adaln(
    residual: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + gate * x, and `adaln` of it; residual, x (b, s, c), gate, scale, shift (b, c). Returns both."""
    if kernel == "triton":
        from ..kernels import pointwise as triton_op

        return triton_op.gate_residual_adaln(residual, x, gate, scale, shift, eps=eps)
    residual = residual + gate[:, None] * x
    return residual, F.layer_norm(residual, residual.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def _fake_add_layer_norm(residual, *_):
    return _fake_adaln(residual), _fake_adaln(residual)


@op(_fake_add_layer_norm)
def add_layer_norm(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + residual, and LayerNorm of it; residual, x (..., c), contiguous, weight, bias (c,) or None. Returns both."""
    if kernel == "triton":
        from ..kernels import add_norm as triton_op

        return triton_op.add_layer_norm(residual, x, weight, bias, eps=eps)
    total = x + residual
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)
