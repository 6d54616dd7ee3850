"""Attention of one or two query segments over any number of key/value segments that lie anywhere in memory.

    out = softmax(scale · q kᵀ) v,    lse = log Σ_keys exp(scale · q kᵀ),    k, v = all segments, one after another

Segments may be a ring's view, text and image tokens, a rank's own part and its peers': nothing is concatenated. One
flat loop runs over the whole key blocks of all segments and picks a block's segment by scalar select, so the software
pipeline never drains where a segment ends; what is left over of each segment follows in a second, masked loop.
Scores, softmax and sums are fp32; probabilities are rounded to the dtype of `v` for the second product, as in
FlashAttention-2 (Dao, 2023, algorithm 1), whose online softmax this is.

A head size that is no power of two is cut into two that are, 80 = 64 + 16 and 160 = 128 + 32, so that little is padded.
With few queries the keys are divided between programs too (split-KV), and `attention_merge` adds the results in fixed
order. Nothing is atomic and all choices depend on shapes alone: equal inputs give equal bits.
"""

import itertools

import torch
import triton
import triton.language as tl

from asyncdiff_fast.kernels import tuning
from asyncdiff_fast.kernels.attention_merge import launch_merge, tile_of_queries

MAX_SEGMENTS = 8
LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ("q_sizes", "sizes", "first_blocks", "num_blocks", "num_tails", "blocks_per_split")


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _load(ptrs, mask_n, mask_d, MASK_N: tl.constexpr, MASK_D: tl.constexpr):
    if MASK_N and MASK_D:
        return tl.load(ptrs, mask=mask_n & mask_d, other=0.0)
    elif MASK_N:
        return tl.load(ptrs, mask=mask_n, other=0.0)
    elif MASK_D:
        return tl.load(ptrs, mask=mask_d, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _fold_keys(
    q0, q1, acc0, acc1, row_max, row_sum, k_ptr, v_ptr, stride_ks, stride_vs, num_keys, scale_log2,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: a block of keys and values joins the sums of a tile of queries."""
    MASK_D: tl.constexpr = D0 + D1 != HEAD_SIZE
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D0)
    mask_n = offs_n < num_keys
    k = _load(k_ptr + offs_n[None, :] * stride_ks + offs_d[:, None], mask_n[None, :], None, MASK_N, False)
    scores = _dot(q0, k, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), UPCAST)
    if D1 > 0:
        offs_e = D0 + tl.arange(0, D1)
        mask_e = offs_e < HEAD_SIZE
        k_ptrs = k_ptr + offs_n[None, :] * stride_ks + offs_e[:, None]
        scores = _dot(q1, _load(k_ptrs, mask_n[None, :], mask_e[:, None], MASK_N, MASK_D), scores, UPCAST)
    if MASK_N:
        scores = tl.where(mask_n[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    # Before the first key, and with none in this block, −inf − −inf would be NaN.
    base = tl.where(new_max == float("-inf"), 0.0, new_max) if MASK_N else new_max
    probs = tl.exp2(scores * scale_log2 - base[:, None])
    decay = tl.exp2(row_max - base)
    row_sum = row_sum * decay + tl.sum(probs, 1)
    v = _load(v_ptr + offs_n[:, None] * stride_vs + offs_d[None, :], mask_n[:, None], None, MASK_N, False)
    probs = probs.to(v.dtype)
    acc0 = _dot(probs, v, acc0 * decay[:, None], UPCAST)
    if D1 > 0:
        v_ptrs = v_ptr + offs_n[:, None] * stride_vs + offs_e[None, :]
        v = _load(v_ptrs, mask_n[:, None], mask_e[None, :], MASK_N, MASK_D)
        acc1 = _dot(probs, v, acc1 * decay[:, None], UPCAST)
    return acc0, acc1, new_max, row_sum


@triton.jit
def _aligned(offset, ALIGNED: tl.constexpr):
    """An offset that the compiler may take for a multiple of 8 elements, so that loads are 16 bytes wide."""
    return tl.multiple_of(offset, 8) if ALIGNED else offset


@triton.jit
def _block_of_keys(
    block, batch, head, k_ptrs, v_ptrs, k_strides, v_strides, sizes, first_blocks,
    NUM_SEGMENTS: tl.constexpr, BLOCK_N: tl.constexpr, TAILS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Where a block lies: whole block number `block` of all segments, or what is left over of segment `block`."""
    k_ptr = k_ptrs[0] + _aligned(batch * k_strides[0] + head * k_strides[2], ALIGNED)
    v_ptr = v_ptrs[0] + _aligned(batch * v_strides[0] + head * v_strides[2], ALIGNED)
    stride_ks = k_strides[1]
    stride_vs = v_strides[1]
    size = sizes[0]
    first = first_blocks[0]
    for idx in tl.static_range(1, NUM_SEGMENTS):
        reached = block >= (idx if TAILS else first_blocks[idx])
        k_offset = batch * k_strides[3 * idx] + head * k_strides[3 * idx + 2]
        v_offset = batch * v_strides[3 * idx] + head * v_strides[3 * idx + 2]
        k_ptr = tl.where(reached, k_ptrs[idx] + _aligned(k_offset, ALIGNED), k_ptr)
        v_ptr = tl.where(reached, v_ptrs[idx] + _aligned(v_offset, ALIGNED), v_ptr)
        stride_ks = tl.where(reached, k_strides[3 * idx + 1], stride_ks)
        stride_vs = tl.where(reached, v_strides[3 * idx + 1], stride_vs)
        size = tl.where(reached, sizes[idx], size)
        first = tl.where(reached, first_blocks[idx], first)
    begin = size // BLOCK_N * BLOCK_N if TAILS else (block - first) * BLOCK_N
    stride_ks = _aligned(stride_ks + 0, ALIGNED)
    stride_vs = _aligned(stride_vs + 0, ALIGNED)
    k_ptr += begin.to(tl.int64) * stride_ks
    v_ptr += begin.to(tl.int64) * stride_vs
    return k_ptr, v_ptr, stride_ks, stride_vs, size - begin


@triton.jit(do_not_specialize=SHAPES)
def _attention_kernel(
    q_ptrs, out_ptrs, k_ptrs, v_ptrs, partial_ptr, lse_ptr, q_strides, out_strides, k_strides, v_strides,
    q_sizes, sizes, first_blocks, num_heads, num_blocks, num_tails, blocks_per_split, scale_log2,
    NUM_QUERIES: tl.constexpr, NUM_SEGMENTS: tl.constexpr, HEAD_SIZE: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, WRITE_LSE: tl.constexpr,
    ALIGNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    second, offs_m, mask_m, before, total = tile_of_queries(tl.program_id(0), q_sizes, NUM_QUERIES, BLOCK_M)
    q_ptr = q_ptrs[0] + _aligned(batch * q_strides[0] + head * q_strides[2], ALIGNED)
    out_ptr = out_ptrs[0] + batch * out_strides[0] + head * out_strides[2]
    stride_qs = q_strides[1]
    stride_os = out_strides[1]
    if NUM_QUERIES == 2:
        q_ptr = tl.where(second, q_ptrs[1] + _aligned(batch * q_strides[3] + head * q_strides[5], ALIGNED), q_ptr)
        out_ptr = tl.where(second, out_ptrs[1] + batch * out_strides[3] + head * out_strides[5], out_ptr)
        stride_qs = tl.where(second, q_strides[4], stride_qs)
        stride_os = tl.where(second, out_strides[4], stride_os)
    offs_d = tl.arange(0, D0)
    q_rows = q_ptr + offs_m[:, None] * _aligned(stride_qs + 0, ALIGNED)
    q0 = tl.load(q_rows + offs_d[None, :], mask=mask_m[:, None], other=0.0)
    acc0 = tl.zeros((BLOCK_M, D0), tl.float32)
    q1 = 0
    acc1 = 0.0
    if D1 > 0:
        offs_e = D0 + tl.arange(0, D1)
        mask_e = mask_m[:, None] & (offs_e < HEAD_SIZE)[None, :]
        q1 = tl.load(q_rows + offs_e[None, :], mask=mask_e, other=0.0)
        acc1 = tl.zeros((BLOCK_M, D1), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)

    begin = tl.program_id(2) * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, num_blocks + num_tails)
    for block in tl.range(begin, tl.minimum(end, num_blocks), num_stages=STAGES):
        k_ptr, v_ptr, stride_ks, stride_vs, num_keys = _block_of_keys(
            block, batch, head, k_ptrs, v_ptrs, k_strides, v_strides, sizes, first_blocks,
            NUM_SEGMENTS, BLOCK_N, False, ALIGNED,
        )  # fmt: skip
        acc0, acc1, row_max, row_sum = _fold_keys(
            q0, q1, acc0, acc1, row_max, row_sum, k_ptr, v_ptr, stride_ks, stride_vs, num_keys, scale_log2,
            D0, D1, HEAD_SIZE, BLOCK_M, BLOCK_N, False, UPCAST,
        )  # fmt: skip
    for block in tl.range(tl.maximum(begin, num_blocks), end, num_stages=1):
        k_ptr, v_ptr, stride_ks, stride_vs, num_keys = _block_of_keys(
            block - num_blocks, batch, head, k_ptrs, v_ptrs, k_strides, v_strides, sizes, first_blocks,
            NUM_SEGMENTS, BLOCK_N, True, ALIGNED,
        )  # fmt: skip
        acc0, acc1, row_max, row_sum = _fold_keys(
            q0, q1, acc0, acc1, row_max, row_sum, k_ptr, v_ptr, stride_ks, stride_vs, num_keys, scale_log2,
            D0, D1, HEAD_SIZE, BLOCK_M, BLOCK_N, True, UPCAST,
        )  # fmt: skip

    # A split whose only blocks are left-overs of nothing has no key: out 0, lse −inf.
    row_sum = tl.where(row_sum > 0, row_sum, 1.0)
    rows = tl.program_id(1).to(tl.int64) * total + before + offs_m
    if SPLIT:
        rows += tl.program_id(2).to(tl.int64) * tl.num_programs(1) * total
        out_rows = partial_ptr + rows[:, None] * HEAD_SIZE
    else:
        out_rows = out_ptr + offs_m[:, None] * stride_os
    dtype = out_rows.dtype.element_ty
    tl.store(out_rows + offs_d[None, :], (acc0 / row_sum[:, None]).to(dtype), mask=mask_m[:, None])
    if D1 > 0:
        tl.store(out_rows + offs_e[None, :], (acc1 / row_sum[:, None]).to(dtype), mask=mask_e)
    if WRITE_LSE:
        tl.store(lse_ptr + rows, (row_max + tl.log2(row_sum)) * LN_2, mask=mask_m)


def _pieces(head_size):
    """`head_size` as two powers of two, the second rounded up to what a tensor core takes, or 0."""
    first = 1 << (head_size.bit_length() - 1)
    rest = head_size - first
    return {"D0": first, "D1": max(16, triton.next_power_of_2(rest)) if rest else 0}


def _strides(tensors):
    """Strides of batch, token and head of each tensor, one after another; 0 where a size of 1 makes them meaningless."""
    return tuple(x.stride(dim) if x.shape[dim] > 1 else 0 for x in tensors for dim in (0, 1, 2))


def _is_aligned(tensors):
    return not any(x.data_ptr() % 16 for x in tensors) and not any(stride % 8 for stride in _strides(tensors))


def _check(queries, segments, outs, scale, num_splits):
    batch, _, num_heads, head_size = queries[0].shape
    dtype = queries[0].dtype
    if len(queries) > 2 or not 0 < len(segments) <= MAX_SEGMENTS:
        raise ValueError(
            f"attention takes one or two queries and 1 to {MAX_SEGMENTS} segments that are not empty: got {len(queries)} "
            f"and {len(segments)}; use a KVRing for parts that lie together"
        )
    if head_size % 8 or not 16 <= head_size <= 160 or dtype not in DTYPES:
        raise ValueError(
            f"head size must be a multiple of 8 from 16 to 160, dtype fp32, fp16 or bf16: got {head_size}, {dtype}; "
            "use torch's scaled_dot_product_attention"
        )
    for name, tensors in (("queries", queries), ("outs", outs), *((f"segment {i}", s) for i, s in enumerate(segments))):
        for x in tensors:
            if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (batch, num_heads, head_size) or x.dtype != dtype:
                raise ValueError(
                    f"{name} must be (b, s, h, d) = ({batch}, s, {num_heads}, {head_size}) of {dtype} as the first query "
                    f"is: got {tuple(x.shape)} of {x.dtype}"
                )
            if x.stride(3) != 1 or x.stride(1) >= 2**24:
                raise ValueError(
                    f"{name} must have last stride 1 and less than 2**24 elements from token to token: got strides "
                    f"{x.stride()}; pass a contiguous copy"
                )
    if any(key.shape != value.shape for key, value in segments) or [q.shape for q in queries] != [
        o.shape for o in outs
    ]:
        raise ValueError("a segment's key and value must have one shape, and each out that of its query")
    if (scale is not None and scale <= 0) or (num_splits is not None and num_splits < 1):
        raise ValueError(f"scale and num_splits must be positive: got {scale} and {num_splits}")


def attention(queries, segments, *, scale=None, outs=None, return_lse=False, num_splits=None, settings=None):
    """Attention of one or two query segments over the keys and values of all segments.

    Args:
        queries: (b, s, h, d), or a tuple of two such with lengths of their own (text and image, say); fp32, fp16 or bf16;
            `d` a multiple of 8 from 16 to 160. Last strides are 1, all others free, here and below.
        segments: one to eight pairs (key, value), each (b, s_i, h, d), with lengths and strides of their own. Empty ones
            count for nothing. Their order changes the result by rounding only.
        scale: factor of the scores, positive; `d ** -0.5` if None.
        outs: where to write, like `queries`; new tensors if None.
        return_lse: also give log Σ exp(scores) of each row.
        num_splits: programs among which the keys of one row are divided; chosen from the shapes if None.
        settings: `tuning.AttentionSettings` in place of the table's.
    Returns: out, or a tuple of two; with `return_lse` a pair of that and lse: (b, h, s) fp32 each, natural logarithm.
    Raises: ValueError if shapes, dtypes or strides do not fit, or if there is no key at all.
    """
    single = isinstance(queries, torch.Tensor)
    queries = (queries,) if single else tuple(queries)
    segments = tuple((key, value) for key, value in segments if key.shape[1] or value.shape[1])
    if outs is None:
        outs = tuple(torch.empty(q.shape, dtype=q.dtype, device=q.device) for q in queries)
    elif single:
        outs = (outs,)
    _check(queries, segments, outs, scale, num_splits)
    keys, values = zip(*segments, strict=True)
    batch, _, num_heads, head_size = queries[0].shape
    q_sizes = tuple(q.shape[1] for q in queries)
    sizes = tuple(key.shape[1] for key in keys)
    if settings is None:
        settings = tuning.attention_settings(head_size, queries[0].dtype)
    whole = [size // settings.block_n for size in sizes]
    num_tails = len(sizes) if any(size % settings.block_n for size in sizes) else 0
    num_tiles = sum(triton.cdiv(size, settings.block_m) for size in q_sizes)
    num_splits = num_splits or tuning.attention_splits(batch * num_heads * num_tiles, sum(sizes), settings)
    blocks_per_split = triton.cdiv(sum(whole) + num_tails, num_splits)
    num_splits = triton.cdiv(sum(whole) + num_tails, blocks_per_split)
    rows = (num_splits, batch, num_heads, sum(q_sizes))
    fp32 = {"dtype": torch.float32, "device": queries[0].device}
    partial = torch.empty((*rows, head_size), **fp32) if num_splits > 1 else None
    lse = torch.empty(rows, **fp32) if num_splits > 1 or return_lse else None
    if num_tiles:
        _attention_kernel[(num_tiles, batch * num_heads, num_splits)](
            queries, outs, keys, values, partial, lse, *map(_strides, (queries, outs, keys, values)),
            q_sizes, sizes, tuple(itertools.accumulate(whole[:-1], initial=0)), num_heads, sum(whole), num_tails,
            blocks_per_split, (head_size**-0.5 if scale is None else scale) * LOG2_E,
            NUM_QUERIES=len(queries), NUM_SEGMENTS=len(sizes), HEAD_SIZE=head_size, **_pieces(head_size),
            BLOCK_M=settings.block_m, BLOCK_N=settings.block_n, STAGES=settings.num_stages,
            SPLIT=num_splits > 1, WRITE_LSE=lse is not None, ALIGNED=_is_aligned((*queries, *keys, *values)),
            UPCAST=not isinstance(_attention_kernel, triton.JITFunction) and queries[0].dtype == torch.bfloat16,
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip
        if num_splits > 1:
            lse = launch_merge(partial.transpose(2, 3), lse, outs, return_lse)
        elif return_lse:
            lse = lse[0]
    result = outs[0] if single else outs
    if not return_lse:
        return result
    lses = lse.split(q_sizes, dim=2)
    return result, lses[0] if single else lses
