"""Attention of one or two query segments over any number of key/value segments that lie anywhere in memory.

    out = softmax(scale · q kᵀ) v,    lse = log Σ_keys exp(scale · q kᵀ),    k, v = all segments, one after another

Segments may be a ring's view, text and image tokens, a rank's own part and its peers': nothing is concatenated. One
flat loop runs over the whole key blocks of all segments and picks a block's segment by scalar select, so the software
pipeline never drains where a segment ends; what is left over of each segment follows in a second, masked loop, or, for
heads in two pieces, in the first, which is then masked as a whole. Scores, softmax and sums are fp32; probabilities are
rounded to the dtype of `v` for the second product, as in FlashAttention-2 (Dao, 2023, algorithm 1), whose online
softmax this is.

A head size that is no power of two is cut into two that are, 80 = 64 + 16 and 160 = 128 + 32, so that little is padded.
With few queries the keys are divided between programs too (split-KV), and `attention_merge` adds the results in fixed
order. Nothing is atomic and all choices depend on shapes alone: equal inputs give equal bits.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from asyncdiff_fast.kernels import plans, tuning
from asyncdiff_fast.kernels.attention_blocks import block_of_keys, fold, scores_of
from asyncdiff_fast.kernels.attention_layout import aligned, check_attention, pieces, stride_unit, strides
from asyncdiff_fast.kernels.attention_merge import launch_merge, tile_of_queries

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
# A change of these must not compile anew.
SHAPES = ("num_blocks", "num_tails", "blocks_per_split")


@triton.jit(do_not_specialize=SHAPES)
def _attention_kernel(
    q_ptrs, out_ptrs, k_ptrs, v_ptrs, partial_ptr, lse_ptr, q_strides, out_strides, k_strides, v_strides,
    q_sizes, sizes, first_blocks, num_heads, num_blocks, num_tails, blocks_per_split, scale_log2,
    NUM_QUERIES: tl.constexpr, NUM_SEGMENTS: tl.constexpr, HEAD_SIZE: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr, AHEAD: tl.constexpr,
    SPLIT: tl.constexpr, WRITE_LSE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    second, offs_m, mask_m, before, total = tile_of_queries(tl.program_id(0), q_sizes, NUM_QUERIES, BLOCK_M)
    q_ptr = q_ptrs[0] + (batch * q_strides[0] + head * q_strides[2]) * UNIT
    out_ptr = out_ptrs[0] + (batch * out_strides[0] + head * out_strides[2]) * UNIT
    stride_qs = q_strides[1]
    stride_os = out_strides[1]
    if NUM_QUERIES == 2:
        q_ptr = tl.where(second, q_ptrs[1] + (batch * q_strides[3] + head * q_strides[5]) * UNIT, q_ptr)
        out_ptr = tl.where(second, out_ptrs[1] + (batch * out_strides[3] + head * out_strides[5]) * UNIT, out_ptr)
        stride_qs = tl.where(second, q_strides[4], stride_qs)
        stride_os = tl.where(second, out_strides[4], stride_os)
    offs_d = tl.arange(0, D0)
    q_rows = q_ptr + offs_m[:, None] * (stride_qs * UNIT)
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
    whole = tl.minimum(end, num_blocks)
    if AHEAD:
        # The next block's scores are in the making while this one's become probabilities; the last ones are left over.
        k_ptr, v_ptr, stride_ks, stride_vs, num_keys = block_of_keys(
            tl.maximum(tl.minimum(begin, num_blocks - 1), 0), batch, head, k_ptrs, v_ptrs, k_strides, v_strides,
            sizes, first_blocks, NUM_SEGMENTS, BLOCK_N, False, UNIT,
        )  # fmt: skip
        num_keys = tl.where(begin < whole, num_keys, 0)
        scores = scores_of(
            q0, q1, k_ptr, stride_ks, num_keys, D0, D1, HEAD_SIZE, BLOCK_M, BLOCK_N, True, PRECISION
        )  # fmt: skip
        for block in tl.range(begin, whole, num_stages=STAGES):
            k_ptr, next_v_ptr, stride_ks, next_stride_vs, num_keys = block_of_keys(
                tl.minimum(block + 1, whole - 1), batch, head, k_ptrs, v_ptrs, k_strides, v_strides,
                sizes, first_blocks, NUM_SEGMENTS, BLOCK_N, False, UNIT,
            )  # fmt: skip
            next_scores = scores_of(
                q0, q1, k_ptr, stride_ks, num_keys, D0, D1, HEAD_SIZE, BLOCK_M, BLOCK_N, False, PRECISION
            )  # fmt: skip
            acc0, acc1, row_max, row_sum = fold(
                scores, acc0, acc1, row_max, row_sum, v_ptr, stride_vs, num_keys, scale_log2,
                D0, D1, HEAD_SIZE, BLOCK_N, False, PRECISION,
            )  # fmt: skip
            scores = next_scores
            v_ptr = next_v_ptr
            stride_vs = next_stride_vs
    else:
        for block in tl.range(begin, whole, num_stages=STAGES):
            k_ptr, v_ptr, stride_ks, stride_vs, num_keys = block_of_keys(
                block, batch, head, k_ptrs, v_ptrs, k_strides, v_strides, sizes, first_blocks,
                NUM_SEGMENTS, BLOCK_N, False, UNIT,
            )  # fmt: skip
            scores = scores_of(
                q0, q1, k_ptr, stride_ks, num_keys, D0, D1, HEAD_SIZE, BLOCK_M, BLOCK_N, MASKED, PRECISION
            )  # fmt: skip
            acc0, acc1, row_max, row_sum = fold(
                scores, acc0, acc1, row_max, row_sum, v_ptr, stride_vs, num_keys, scale_log2,
                D0, D1, HEAD_SIZE, BLOCK_N, MASKED, PRECISION,
            )  # fmt: skip
    if D1 == 0:
        for block in tl.range(tl.maximum(begin, num_blocks), end, num_stages=1):
            k_ptr, v_ptr, stride_ks, stride_vs, num_keys = block_of_keys(
                block - num_blocks, batch, head, k_ptrs, v_ptrs, k_strides, v_strides, sizes, first_blocks,
                NUM_SEGMENTS, BLOCK_N, True, UNIT,
            )  # fmt: skip
            scores = scores_of(
                q0, q1, k_ptr, stride_ks, num_keys, D0, D1, HEAD_SIZE, BLOCK_M, BLOCK_N, True, PRECISION
            )  # fmt: skip
            acc0, acc1, row_max, row_sum = fold(
                scores, acc0, acc1, row_max, row_sum, v_ptr, stride_vs, num_keys, scale_log2,
                D0, D1, HEAD_SIZE, BLOCK_N, True, PRECISION,
            )  # fmt: skip

    # A split whose only blocks are left-overs of nothing has no key: out 0, lse −inf.
    row_sum = tl.where(row_sum > 0, row_sum, 1.0)
    rows = tl.program_id(1).to(tl.int64) * total + before + offs_m
    if SPLIT:
        rows += tl.program_id(2).to(tl.int64) * tl.num_programs(1) * total
        out_rows = partial_ptr + rows[:, None] * HEAD_SIZE
    else:
        out_rows = out_ptr + offs_m[:, None] * (stride_os * UNIT)
    dtype = out_rows.dtype.element_ty
    tl.store(out_rows + offs_d[None, :], (acc0 / row_sum[:, None]).to(dtype), mask=mask_m[:, None])
    if D1 > 0:
        tl.store(out_rows + offs_e[None, :], (acc1 / row_sum[:, None]).to(dtype), mask=mask_e)
    if WRITE_LSE:
        tl.store(lse_ptr + rows, (row_max + tl.log2(row_sum)) * LN_2, mask=mask_m)


def attention(
    queries, segments, *, scale=None, outs=None, return_lse=False, num_splits=None, ahead=False, settings=None
):  # fmt: skip
    """Attention of one or two query segments over the keys and values of all segments.

    Args:
        queries: (b, s, h, d), or a tuple of two such with lengths of their own (text and image, say); fp32, fp16 or
            bf16; `d` a multiple of 8 from 16 to 160. Last strides are 1, all others free, here and below.
        segments: one to eight pairs (key, value), each (b, s_i, h, d), with lengths and strides of their own. Empty
            ones count for nothing. Their order changes the result by rounding only.
        scale: factor of the scores, positive; `d ** -0.5` if None.
        outs: where to write, like `queries`; new tensors if None.
        return_lse: also give log Σ exp(scores) of each row.
        num_splits: programs among which the keys of one row are divided; chosen from the shapes if None.
        ahead: the scores of the next block of keys are made beside the probabilities of this one, as in
            FlashAttention-3 (Shah et al., 2024, algorithm 2); half precision, and heads of a power of two.
        settings: `tuning.AttentionSettings` in place of the table's.
    Returns: out, or a tuple of two; with `return_lse` a pair of that and lse: (b, h, s) fp32 each, natural logarithm.
    Raises: ValueError if shapes, dtypes or strides do not fit, or if there is no key at all.
    """
    single = isinstance(queries, torch.Tensor)
    queries = (queries,) if single else tuple(queries)
    segments = tuple([(key, value) for key, value in segments if key.shape[1] or value.shape[1]])
    keys, values = zip(*segments, strict=True) if segments else ((), ())
    outs = () if outs is None else (outs,) if isinstance(outs, torch.Tensor) else tuple(outs)
    given = (*queries, *keys, *values, *outs)
    plan = _plan(
        given, (len(queries), len(keys), len(outs)), aligned(given), scale, num_splits, ahead, settings, return_lse
    )  # fmt: skip
    outs = outs or tuple([plans.new(out, queries[0]) for out in plan.outs])
    partial = None if plan.partial is None else plans.new(plan.partial, queries[0])
    lse = None if plan.lse is None else plans.new(plan.lse, queries[0])
    if plan.grid is not None:
        _attention_kernel[plan.grid](queries, outs, keys, values, partial, lse, *plan.sizes, **plan.constants)
    if partial is not None:
        lse = launch_merge(partial.transpose(2, 3), lse, outs, return_lse)
    elif return_lse:
        lse = lse[0]
    result = outs[0] if single else outs
    if not return_lse:
        return result
    lses = lse.split([q.shape[1] for q in queries], dim=2)
    return result, lses[0] if single else lses


def _precision(dtype):
    """How products are made: fp32 on tensor cores in three tf32 passes where there are such; halves as they are."""
    if dtype == torch.bfloat16 and not isinstance(_attention_kernel, triton.JITFunction):
        # Triton's interpreter multiplies bf16 wrongly.
        return "upcast"
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


class _Attention(NamedTuple):
    """Of a launch; `outs`, `partial`, `lse` are like what it writes, the last two None where it does not."""

    grid: tuple | None
    sizes: tuple
    constants: dict
    outs: tuple
    partial: torch.Tensor | None
    lse: torch.Tensor | None


@plans.planned
def _plan(*given):
    *tensors, counts, wide, scale, num_splits, ahead, settings, return_lse = given
    tensors = iter(tensors)
    queries, keys, values, outs = (
        tuple(itertools.islice(tensors, count)) for count in (counts[0], counts[1], counts[1], counts[2])
    )
    outs = outs or tuple(torch.empty(q.shape, dtype=q.dtype, device=q.device) for q in queries)
    check_attention(queries, tuple(zip(keys, values, strict=True)), outs, scale, num_splits, ahead)
    batch, _, num_heads, head_size = queries[0].shape
    q_sizes, sizes = (tuple(x.shape[1] for x in tensors) for tensors in (queries, keys))
    settings = settings or tuning.attention_settings(head_size, queries[0].dtype, len(sizes))
    num_tiles = sum(plans.ceil_div(size, settings.block_m) for size in q_sizes)
    if num_splits is None:
        num_splits = tuning.attention_splits(batch * num_heads * num_tiles, sum(sizes), settings)
    d0, d1 = pieces(head_size)
    left_over = any(size % settings.block_n for size in sizes)
    # A second loop over left-overs needs so many descriptors that ptxas (12.8) mixes those of a head in two pieces up.
    masked = left_over and d1 > 0
    blocks = [plans.ceil_div(size, settings.block_n) if masked else size // settings.block_n for size in sizes]
    num_tails = len(sizes) if left_over and not masked else 0
    num_blocks = sum(blocks) + num_tails
    blocks_per_split = plans.ceil_div(num_blocks, num_splits)
    num_splits = plans.ceil_div(num_blocks, blocks_per_split)
    like = queries[0].new_empty((num_splits, batch, num_heads, sum(q_sizes)), dtype=torch.float32)
    partial = like.new_empty((*like.shape, head_size)) if num_splits > 1 else None
    lse = like if num_splits > 1 or return_lse else None
    groups = queries, outs, keys, values
    unit = stride_unit(sum(groups, ()), wide)
    launch_sizes = (
        *(tuple(stride // unit for stride in strides(tensors)) for tensors in groups),
        q_sizes, sizes, tuple(itertools.accumulate(blocks[:-1], initial=0)), num_heads, sum(blocks), num_tails,
        blocks_per_split, (head_size**-0.5 if scale is None else scale) * LOG2_E,
    )  # fmt: skip
    constants = dict(
        NUM_QUERIES=len(queries), NUM_SEGMENTS=len(sizes), HEAD_SIZE=head_size, D0=d0, D1=d1,
        BLOCK_M=settings.block_m, BLOCK_N=settings.block_n, STAGES=settings.num_stages, MASKED=masked,
        AHEAD=ahead, SPLIT=num_splits > 1, WRITE_LSE=lse is not None, UNIT=unit,
        PRECISION=_precision(queries[0].dtype),
        num_warps=settings.num_warps, num_stages=settings.num_stages,
    )  # fmt: skip
    grid = (num_tiles, batch * num_heads, num_splits) if num_tiles else None
    return _Attention(grid, launch_sizes, constants, outs, partial, lse)
