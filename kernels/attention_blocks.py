"""What attention does with one block of keys and values, and where blocks lie; see `attention`."""

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "upcast":
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


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
def scores_of(
    q0, q1, k_ptr, stride_ks, num_keys, D0: tl.constexpr, D1: tl.constexpr, HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q kᵀ of a tile of queries and a block of keys, −inf where there are none."""
    MASK_D: tl.constexpr = D0 + D1 != HEAD_SIZE
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D0)
    mask_n = offs_n < num_keys
    k = _load(k_ptr + offs_n[None, :] * stride_ks + offs_d[:, None], mask_n[None, :], None, MASK_N, False)
    scores = _dot(q0, k, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
    if D1 > 0:
        offs_e = D0 + tl.arange(0, D1)
        mask_e = offs_e < HEAD_SIZE
        k_ptrs = k_ptr + offs_n[None, :] * stride_ks + offs_e[:, None]
        scores = _dot(q1, _load(k_ptrs, mask_n[None, :], mask_e[:, None], MASK_N, MASK_D), scores, PRECISION)
    if MASK_N:
        scores = tl.where(mask_n[None, :], scores, float("-inf"))
    return scores


@triton.jit
def fold(
    scores, acc0, acc1, row_max, row_sum, v_ptr, stride_vs, num_keys, scale_log2,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: a block of keys and values joins the sums of a tile of queries."""
    MASK_D: tl.constexpr = D0 + D1 != HEAD_SIZE
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D0)
    mask_n = offs_n < num_keys
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    # Before the first key, and with none in this block, −inf − −inf would be NaN.
    base = tl.where(new_max == float("-inf"), 0.0, new_max) if MASK_N else new_max
    probs = tl.exp2(scores * scale_log2 - base[:, None])
    decay = tl.exp2(row_max - base)
    row_sum = row_sum * decay + tl.sum(probs, 1)
    v = _load(v_ptr + offs_n[:, None] * stride_vs + offs_d[None, :], mask_n[:, None], None, MASK_N, False)
    probs = probs.to(v.dtype)
    acc0 = _dot(probs, v, acc0 * decay[:, None], PRECISION)
    if D1 > 0:
        offs_e = D0 + tl.arange(0, D1)
        mask_e = offs_e < HEAD_SIZE
        v_ptrs = v_ptr + offs_n[:, None] * stride_vs + offs_e[None, :]
        v = _load(v_ptrs, mask_n[:, None], mask_e[None, :], MASK_N, MASK_D)
        acc1 = _dot(probs, v, acc1 * decay[:, None], PRECISION)
    return acc0, acc1, new_max, row_sum


@triton.jit
def block_of_keys(
    block, batch, head, k_ptrs, v_ptrs, k_strides, v_strides, sizes, first_blocks,
    NUM_SEGMENTS: tl.constexpr, BLOCK_N: tl.constexpr, TAILS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Where a block lies: whole block number `block` of all segments, or what is left over of segment `block`."""
    k_ptr = k_ptrs[0] + (batch * k_strides[0] + head * k_strides[2]) * UNIT
    v_ptr = v_ptrs[0] + (batch * v_strides[0] + head * v_strides[2]) * UNIT
    stride_ks = k_strides[1]
    stride_vs = v_strides[1]
    size = sizes[0]
    first = first_blocks[0]
    for idx in tl.static_range(1, NUM_SEGMENTS):
        reached = block >= (idx if TAILS else first_blocks[idx])
        k_offset = batch * k_strides[3 * idx] + head * k_strides[3 * idx + 2]
        v_offset = batch * v_strides[3 * idx] + head * v_strides[3 * idx + 2]
        k_ptr = tl.where(reached, k_ptrs[idx] + k_offset * UNIT, k_ptr)
        v_ptr = tl.where(reached, v_ptrs[idx] + v_offset * UNIT, v_ptr)
        stride_ks = tl.where(reached, k_strides[3 * idx + 1], stride_ks)
        stride_vs = tl.where(reached, v_strides[3 * idx + 1], stride_vs)
        size = tl.where(reached, sizes[idx], size)
        first = tl.where(reached, first_blocks[idx], first)
    size = tl.cast(size, tl.int64)
    begin = size // BLOCK_N * BLOCK_N if TAILS else tl.cast(block - first, tl.int64) * BLOCK_N
    stride_ks *= UNIT
    stride_vs *= UNIT
    k_ptr += begin * stride_ks
    v_ptr += begin * stride_vs
    return k_ptr, v_ptr, stride_ks, stride_vs, size - begin
