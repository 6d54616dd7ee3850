"""The fused ops of the package, each over the implementations that it can run on.

An op takes the name of its implementation, `kernel`, chosen beforehand by `op_choice`: "triton" is ours, "torch" the
library calls that it replaces, "cudnn" and "flash" are backends of torch's attention. Every op returns new tensors and
has no gradient. Those that know of other patches are in `patch_ops`.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def _fake_joint_qk_norm_rope(q, k, v, *_):
    b, _, h, d = q[0].shape
    return tuple(q[0].new_empty((b, sum(part.shape[1] for part in q), h, d)) for _ in range(3))


@op(_fake_joint_qk_norm_rope)
def joint_qk_norm_rope(
    q: list[torch.Tensor],
    k: list[torch.Tensor],
    v: list[torch.Tensor],
    q_weights: list[torch.Tensor],
    k_weights: list[torch.Tensor],
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm of each part's queries and keys, parts joined along their tokens, rotated by their place.

    Args:
        q, k, v: of each part (b, s, h, d); q_weights, k_weights: of each part (d,).
        cos, sin: (sum of s, d) fp32, for pairs of neighbours, or both None.
    Returns: q, k, v (b, sum of s, h, d).
    """
    if kernel != "triton":
        norm = [
            torch.cat([F.rms_norm(x, x.shape[-1:], w, eps) for x, w in zip(parts, weights, strict=True)], 1)
            for parts, weights in ((q, q_weights), (k, k_weights))
        ]
        return *(_rotated(x, cos, sin) for x in norm), torch.cat(v, 1)
    from ..kernels import qk_norm_rope as triton_op

    outs, start = _fake_joint_qk_norm_rope(q, k, v), 0
    for i, part in enumerate(q):
        rows = slice(start, start := start + part.shape[1])
        angles = {} if cos is None else {"cos": cos[rows], "sin": sin[rows]}
        q_out, k_out, v_out = (x[:, rows] for x in outs)
        triton_op.qk_norm_rope(
            part, k[i], v[i], q_weight=q_weights[i], k_weight=k_weights[i], eps=eps, **angles,
            q_out=q_out, k_out=k_out, v_out=v_out,
        )  # fmt: skip
    return outs


def _rotated(x, cos, sin):
    if cos is None:
        return x
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-b, a], -1).flatten(-2)
    return (x.float() * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def _fake_attention(q, *_):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@op(_fake_attention)
def attention(
    q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], scale: float, kernel: str
) -> torch.Tensor:
    """softmax(scale q k^T) v over all segments of keys and values.

    Args:
        q: (b, s_q, h, d); keys, values: segments (b, s_i, h, d). One segment may be the view of a whole ring: only
            several are joined, and only by the library's kernels.
    Returns: (b, s_q, h, d).
    """
    if kernel == "triton":
        from ..kernels import attention as triton_op

        return triton_op.attention(q, list(zip(keys, values, strict=True)), scale=scale)
    k, v = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in (keys, values))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if kernel == "torch":
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()
    backend = SDPBackend.CUDNN_ATTENTION if kernel == "cudnn" else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()
