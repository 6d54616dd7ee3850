"""RMSNorm and rotary embedding of queries and keys, written where attention reads them; values go along.

    n = w · x / √(mean x² + eps),    out = n · cos + rotate(n) · sin

`rotate` turns the pairs (n0, n1) into (−n1, n0). Pairs are neighbours (Flux, CogVideoX: diffusers'
`use_real_unbind_dim=-1`), or an element and the one half a head further on (`-2`: Stable Audio, OmniGen, Cosmos).
All in fp32, one rounding at the end. A program takes all three tensors for some tokens and heads, so that a token's
cosines are loaded once for all of them.
Source: Su et al., RoFormer, 2021, section 3.4; Zhang and Sennrich, Root mean square layer normalization, 2019.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from asyncdiff_fast.kernels import plans, tuning


@triton.jit
def _load_pairs(rows, mask, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second element of every pair of `rows` (A, B, 1), each (A, B, HALF) fp32."""
    if INTERLEAVED:
        offs_d = tl.arange(0, 2 * HALF)[None, None, :]
        x = tl.load(rows + offs_d, mask=mask & (offs_d < HEAD_SIZE), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], HALF, 2)))
    else:
        offs_d = tl.arange(0, HALF)[None, None, :]
        mask = mask & (offs_d < HEAD_SIZE // 2)
        first = tl.load(rows + offs_d, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(rows + HEAD_SIZE // 2 + offs_d, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_pairs(rows, mask, first, second, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    dtype = rows.dtype.element_ty
    if INTERLEAVED:
        offs_d = tl.arange(0, 2 * HALF)[None, None, :]
        x = tl.reshape(tl.join(first.to(dtype), second.to(dtype)), (first.shape[0], first.shape[1], 2 * HALF))
        tl.store(rows + offs_d, x, mask=mask & (offs_d < HEAD_SIZE))
    else:
        offs_d = tl.arange(0, HALF)[None, None, :]
        mask = mask & (offs_d < HEAD_SIZE // 2)
        tl.store(rows + offs_d, first.to(dtype), mask=mask)
        tl.store(rows + HEAD_SIZE // 2 + offs_d, second.to(dtype), mask=mask)


@triton.jit
def _norm_rope(
    rows, out_rows, mask, weight_ptr, cos0, cos1, sin0, sin1, eps,
    NORM: tl.constexpr, ROPE: tl.constexpr, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    x0, x1 = _load_pairs(rows, mask, HEAD_SIZE, HALF, INTERLEAVED)
    if NORM:
        # Of shape (1, 1, 1), so that weights are loaded by the same function.
        one = tl.zeros((1, 1, 1), tl.int32)
        w0, w1 = _load_pairs(weight_ptr + one, one == 0, HEAD_SIZE, HALF, INTERLEAVED)
        rstd = tl.rsqrt((tl.sum(x0 * x0, 2) + tl.sum(x1 * x1, 2)) / HEAD_SIZE + eps)[:, :, None]
        x0 *= rstd * w0
        x1 *= rstd * w1
    if ROPE:
        x0, x1 = x0 * cos0 - x1 * sin0, x1 * cos1 + x0 * sin1
    _store_pairs(out_rows, mask, x0, x1, HEAD_SIZE, HALF, INTERLEAVED)


@triton.jit
def _qk_norm_rope_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    q_strides, k_strides, v_strides, q_out_strides, k_out_strides, v_out_strides, stride_cos, stride_sin,
    tokens, num_heads, eps,
    NORM_Q: tl.constexpr, NORM_K: tl.constexpr, ROPE: tl.constexpr, COPY_V: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEAD_SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    offs_s = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None, None]
    offs_h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
    mask_s = offs_s < tokens
    mask = mask_s & (offs_h < num_heads)
    cos0, cos1, sin0, sin1 = 1.0, 1.0, 0.0, 0.0
    if ROPE:
        cos0, cos1 = _load_pairs(cos_ptr + offs_s * stride_cos, mask_s, HEAD_SIZE, HALF, INTERLEAVED)
        sin0, sin1 = _load_pairs(sin_ptr + offs_s * stride_sin, mask_s, HEAD_SIZE, HALF, INTERLEAVED)
    rows = q_ptr + batch * q_strides[0] + offs_s * q_strides[1] + offs_h * q_strides[2]
    out_rows = q_out_ptr + batch * q_out_strides[0] + offs_s * q_out_strides[1] + offs_h * q_out_strides[2]
    _norm_rope(
        rows, out_rows, mask, q_weight_ptr, cos0, cos1, sin0, sin1, eps,
        NORM_Q, ROPE, HEAD_SIZE, HALF, INTERLEAVED,
    )  # fmt: skip
    rows = k_ptr + batch * k_strides[0] + offs_s * k_strides[1] + offs_h * k_strides[2]
    out_rows = k_out_ptr + batch * k_out_strides[0] + offs_s * k_out_strides[1] + offs_h * k_out_strides[2]
    _norm_rope(
        rows, out_rows, mask, k_weight_ptr, cos0, cos1, sin0, sin1, eps,
        NORM_K, ROPE, HEAD_SIZE, HALF, INTERLEAVED,
    )  # fmt: skip
    if COPY_V:
        rows = v_ptr + batch * v_strides[0] + offs_s * v_strides[1] + offs_h * v_strides[2]
        out_rows = v_out_ptr + batch * v_out_strides[0] + offs_s * v_out_strides[1] + offs_h * v_out_strides[2]
        offs_d = tl.arange(0, 2 * HALF)[None, None, :]
        mask_d = mask & (offs_d < HEAD_SIZE)
        tl.store(out_rows + offs_d, tl.load(rows + offs_d, mask=mask_d, other=0.0), mask=mask_d)


def qk_norm_rope(
    q, k, v, *, q_weight=None, k_weight=None, eps=1e-6, cos=None, sin=None, interleaved=True,
    q_out=None, k_out=None, v_out=None,
):  # fmt: skip
    """RMSNorm over the head size and rotary embedding of q and k; v is copied along.

    Args:
        q, k, v: (b, s, h, d), fp32, fp16 or bf16, `d` even, last stride 1. `v` may be None: nothing is copied.
        q_weight, k_weight: (d,), or None for no norm.
        eps: added to the mean square.
        cos, sin: (s, d), last stride 1, or both None for no rotation; diffusers' `image_rotary_emb`.
        interleaved: whether pairs are neighbours, or half a head apart.
        q_out, k_out, v_out: where to write, (b, s, h, d) with last stride 1: a part of a ring of keys and values, say.
            They must not overlap the inputs, unless they are the inputs. New tensors if None.
    Returns: (q_out, k_out, v_out).
    Raises: ValueError if shapes or strides do not fit.
    """
    plan = _plan((q, k, v, q_weight, k_weight, cos, sin, q_out, k_out, v_out), interleaved)
    q_out, k_out, v_out = (
        plans.new(like, q) if out is None and like is not None else out
        for out, like in zip((q_out, k_out, v_out), plan.outs, strict=True)
    )
    if plan.grid is not None:
        _qk_norm_rope_kernel[plan.grid](
            q, k, q if v is None else v, q if q_weight is None else q_weight, k if k_weight is None else k_weight,
            q if cos is None else cos, q if sin is None else sin, q_out, k_out, q_out if v is None else v_out,
            *plan.sizes, eps, **plan.constants,
        )  # fmt: skip
    return q_out, k_out, v_out


class _NormRope(NamedTuple):
    grid: tuple | None
    sizes: tuple
    constants: dict
    outs: tuple


@plans.planned
def _plan(q, k, v, q_weight, k_weight, cos, sin, q_out, k_out, v_out, interleaved):
    q_out = q.new_empty(q.shape) if q_out is None else q_out
    k_out = k.new_empty(k.shape) if k_out is None else k_out
    if v is not None and v_out is None:
        v_out = v.new_empty(v.shape)
    _check(q, k, v, q_weight, k_weight, cos, sin, q_out, k_out, v_out)
    batch, tokens, num_heads, head_size = q.shape
    block_s, block_h = tuning.qk_norm_rope_block(num_heads, plans.power_of_2(head_size))
    tensors = (q, k, q if v is None else v, q_out, k_out, q_out if v is None else v_out)
    tables = (q if cos is None else cos, q if sin is None else sin)
    grid = (plans.ceil_div(tokens, block_s), plans.ceil_div(num_heads, block_h), batch) if q.numel() else None
    sizes = (*(x.stride()[:3] for x in tensors), *(x.stride(0) for x in tables), tokens, num_heads)
    constants = dict(
        NORM_Q=q_weight is not None, NORM_K=k_weight is not None, ROPE=cos is not None, COPY_V=v is not None,
        INTERLEAVED=interleaved, HEAD_SIZE=head_size, HALF=plans.power_of_2(head_size) // 2,
        BLOCK_S=block_s, BLOCK_H=block_h, num_warps=tuning.QK_NORM_ROPE_WARPS,
    )  # fmt: skip
    return _NormRope(grid, sizes, constants, (q_out, k_out, v_out))


def _check(q, k, v, q_weight, k_weight, cos, sin, q_out, k_out, v_out):
    if q.ndim != 4 or q.shape[3] % 2 or (cos is None) != (sin is None) or (v is None) != (v_out is None):
        raise ValueError(
            f"q must be (b, s, h, d) with even d, cos and sin both given or both None, v_out only with v: got "
            f"{tuple(q.shape)}, {'no ' if cos is None else ''}cos, {'no ' if sin is None else ''}sin, "
            f"{'no ' if v is None else ''}v, {'no ' if v_out is None else ''}v_out"
        )
    tokens, head_size = q.shape[1], q.shape[3]
    named = {"k": k, "v": v, "q_out": q_out, "k_out": k_out, "v_out": v_out, "q": q}
    wants = dict.fromkeys(named, tuple(q.shape))
    wants |= {
        "q_weight": (head_size,),
        "k_weight": (head_size,),
        "cos": (tokens, head_size),
        "sin": (tokens, head_size),
    }
    named |= {"q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin}
    for name, x in named.items():
        if x is not None and (tuple(x.shape) != wants[name] or x.stride(-1) != 1):
            raise ValueError(f"{name} must be {wants[name]} with last stride 1: got {tuple(x.shape)}, {x.stride()}")
