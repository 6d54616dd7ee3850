"""Adds up attention over disjoint sets of keys, whose results are known with their log-sum-exp, in fixed order.

    out = Σ_p exp(lse_p − lse) · out_p,    lse = log Σ_p exp(lse_p)

All in fp32, parts 0, 1, 2 … one after another. A part without keys has lse −inf and counts for nothing.
Source: the merge of FlashDecoding and of ring attention, written with the maximum taken out.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from asyncdiff_fast.kernels import plans
from asyncdiff_fast.kernels.attention_layout import aligned, stride_unit, strides

BLOCK_M = 16


@triton.jit
def tile_of_queries(tile, q_sizes, NUM_QUERIES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where a tile of rows lies when the second query's tiles follow the first's.

    Returns: whether it is the second's, its rows within that query, their mask, rows before that query, rows of both.
    """
    if NUM_QUERIES == 1:
        second = False
        size = q_sizes[0]
        before = 0
        total = size
    else:
        first_tile = tl.cdiv(q_sizes[0], BLOCK_M)
        second = tile >= first_tile
        size = tl.where(second, q_sizes[1], q_sizes[0])
        before = tl.where(second, q_sizes[0], 0)
        total = q_sizes[0] + q_sizes[1]
        tile -= tl.where(second, first_tile, 0)
    offs_m = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return second, offs_m, offs_m < size, before, total


@triton.jit(do_not_specialize=["q_sizes", "num_parts", "num_heads"])
def _attention_merge_kernel(
    part_ptr, part_lse_ptr, out_ptrs, lse_ptr, part_strides, part_lse_strides, out_strides,
    q_sizes, num_parts, num_heads,
    NUM_QUERIES: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr, WRITE_LSE: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    second, offs_m, mask_m, before, total = tile_of_queries(tl.program_id(0), q_sizes, NUM_QUERIES, BLOCK_M)
    out_ptr = out_ptrs[0] + (batch * out_strides[0] + head * out_strides[2]) * UNIT
    stride_os = out_strides[1]
    if NUM_QUERIES == 2:
        out_ptr = tl.where(second, out_ptrs[1] + (batch * out_strides[3] + head * out_strides[5]) * UNIT, out_ptr)
        stride_os = tl.where(second, out_strides[4], stride_os)
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_m[:, None] & (offs_d < HEAD_SIZE)[None, :]
    rows = before + offs_m
    lse_base = part_lse_ptr + batch * part_lse_strides[1] + head * part_lse_strides[2] + rows * part_lse_strides[3]
    part_ptrs = part_ptr + (batch * part_strides[1] + head * part_strides[3]) * UNIT
    part_ptrs += rows[:, None] * (part_strides[2] * UNIT) + offs_d[None, :]

    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    lse_ptrs = lse_base
    for _ in range(num_parts):
        row_max = tl.maximum(row_max, tl.load(lse_ptrs, mask=mask_m, other=float("-inf")))
        lse_ptrs += part_lse_strides[0]
    # Without any key −inf − −inf would be NaN; the result is 0 and lse −inf.
    base = tl.where(row_max == float("-inf"), 0.0, row_max)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    weights = tl.zeros((BLOCK_M,), tl.float32)
    lse_ptrs = lse_base
    for _ in range(num_parts):
        weight = tl.exp(tl.load(lse_ptrs, mask=mask_m, other=float("-inf")) - base)
        acc += weight[:, None] * tl.load(part_ptrs, mask=mask, other=0.0).to(tl.float32)
        weights += weight
        lse_ptrs += part_lse_strides[0]
        part_ptrs += part_strides[0] * UNIT
    weights = tl.where(weights > 0, weights, 1.0)
    acc /= weights[:, None]
    out_rows = out_ptr + offs_m[:, None] * (stride_os * UNIT) + offs_d[None, :]
    tl.store(out_rows, acc.to(out_rows.dtype.element_ty), mask=mask)
    if WRITE_LSE:
        lse = row_max + tl.log(weights)
        tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * total + rows, lse, mask=mask_m)


def launch_merge(parts, part_lses, outs, return_lse):
    """Merge (p, b, s, h, d) with (p, b, h, s) into one or two outs (b, s_i, h, d); give lse (b, h, s) or None."""
    plan = _plan((parts, part_lses, *outs), aligned((parts, *outs)), return_lse)
    lse = None if plan.lse is None else plans.new(plan.lse, parts)
    if plan.grid is not None:
        _attention_merge_kernel[plan.grid](parts, part_lses, outs, lse, *plan.sizes, **plan.constants)
    return lse


class _Merge(NamedTuple):
    grid: tuple | None
    sizes: tuple
    constants: dict
    lse: torch.Tensor | None


@plans.planned
def _plan(parts, part_lses, *given):
    *outs, wide, return_lse = given
    num_parts, batch, _, num_heads, head_size = parts.shape
    q_sizes = tuple(out.shape[1] for out in outs)
    lse = part_lses.new_empty(part_lses.shape[1:]) if return_lse else None
    num_tiles = sum(plans.ceil_div(size, BLOCK_M) for size in q_sizes)
    unit = stride_unit((parts[0], *outs), wide and parts.stride(0) % 8 == 0)
    sizes = (
        tuple(s // unit for s in parts.stride()[:4]), part_lses.stride(), tuple(s // unit for s in strides(outs)),
        q_sizes, num_parts, num_heads,
    )  # fmt: skip
    constants = dict(
        NUM_QUERIES=len(outs), HEAD_SIZE=head_size, BLOCK_D=plans.power_of_2(head_size), BLOCK_M=BLOCK_M,
        UNIT=unit, WRITE_LSE=return_lse, num_warps=4,
    )  # fmt: skip
    return _Merge((num_tiles, batch * num_heads) if num_tiles else None, sizes, constants, lse)


def attention_merge(outs, lses, *, out=None, return_lse=False):
    """Attention over all keys from attention over disjoint sets of them.

    Args:
        outs: (p, b, s, h, d), fp32, fp16 or bf16, last stride 1: the result for each set of keys.
        lses: (p, b, h, s) fp32: its log-sum-exp, natural logarithm; −inf where a set is empty.
        out: (b, s, h, d), any float dtype, last stride 1; a new tensor like `outs` if None.
    Returns: out; with `return_lse` also lse (b, h, s) fp32.
    Raises: ValueError if shapes, dtypes or strides do not fit.
    """
    if outs.ndim != 5 or lses.shape != (*outs.shape[:2], outs.shape[3], outs.shape[2]) or lses.dtype != torch.float32:
        raise ValueError(
            f"outs must be (p, b, s, h, d) and lses (p, b, h, s) of fp32: got {tuple(outs.shape)} and "
            f"{tuple(lses.shape)} of {lses.dtype}"
        )
    if out is None:
        out = torch.empty(outs.shape[1:], dtype=outs.dtype, device=outs.device)
    if out.shape != outs.shape[1:] or out.stride(3) != 1 or outs.stride(4) != 1:
        raise ValueError(
            f"out must be {tuple(outs.shape[1:])}, its last stride 1 as that of outs: got {tuple(out.shape)}, strides "
            f"{out.stride()}, and outs with strides {outs.stride()}"
        )
    lse = launch_merge(outs, lses, (out,), return_lse)
    return (out, lse) if return_lse else out
