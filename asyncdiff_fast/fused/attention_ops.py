"""The ops of attention, beside those of `ops`: queries, keys and values made ready, and attention over segments."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .registry import op


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
    if kernel in ("triton", "ahead"):
        from ..kernels import attention as triton_op

        return triton_op.attention(q, list(zip(keys, values, strict=True)), scale=scale, ahead=kernel == "ahead")
    k, v = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in (keys, values))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if kernel == "torch":
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()
    backend = SDPBackend.CUDNN_ATTENTION if kernel == "cudnn" else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()
