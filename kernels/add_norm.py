"""The sum that ends one branch of a transformer block, and the LayerNorm that begins the next, in one pass.

    r = residual + x,    y = (r − mean r)/√(var r + eps) · weight + bias        (Ba et al., "Layer normalization", 2016)

All in fp32 with one rounding at the end; `y` is the norm of `r` as it is stored, which the next sum reads too.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from asyncdiff_fast.kernels import plans, tuning
from asyncdiff_fast.kernels.checks import even_rows


@triton.jit
def _add_layer_norm_kernel(
    residual_ptr, x_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr, stride_residual, stride_x, columns, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    mask = offs_c < columns
    r = tl.load(residual_ptr + row * stride_residual + offs_c, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * stride_x + offs_c, mask=mask, other=0.0).to(tl.float32)
    stored = (r + x).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * columns + offs_c, stored, mask=mask)
    r = stored.to(tl.float32)
    mean = tl.sum(r, 0) / columns
    centred = tl.where(mask, r - mean, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / columns + eps)
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * columns + offs_c, y.to(out_ptr.dtype.element_ty), mask=mask)


def add_layer_norm(residual, x, weight, bias, *, eps=1e-5):
    """Add a branch to the residual and normalise the sum for the next branch.

    Args:
        residual, x: (..., c), fp32, fp16 or bf16, alike; rows evenly spaced in memory, last stride 1.
        weight, bias: (c,), adjacent in memory, or None.
        eps: added to the variance.
    Returns: (residual + x, LayerNorm of that), contiguous.
    Raises: ValueError if shapes or strides do not fit.
    """
    plan = _plan((residual, x, weight, bias))
    total, out = plans.new(plan.out, residual), plans.new(plan.out, residual)
    if plan.grid is not None:
        _add_layer_norm_kernel[plan.grid](
            residual, x, residual if weight is None else weight, residual if bias is None else bias, total, out,
            *plan.sizes, eps, **plan.constants,
        )  # fmt: skip
    return total, out


class _AddNorm(NamedTuple):
    grid: tuple | None
    sizes: tuple
    constants: dict
    out: torch.Tensor


@plans.planned
def _plan(residual, x, weight, bias):
    columns = residual.shape[-1]
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"x must be like residual: got x {tuple(x.shape)} of {x.dtype}, residual {tuple(residual.shape)} of "
            f"{residual.dtype}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.shape != (columns,) or not tensor.is_contiguous()):
            raise ValueError(
                f"{name} must be ({columns},), adjacent in memory: got {tuple(tensor.shape)}, {tensor.stride()}"
            )
    out = residual.new_empty(residual.shape)
    if not residual.numel():
        return _AddNorm(None, (), {}, out)
    rows_residual, rows_x = even_rows("residual", residual), even_rows("x", x)
    block_c = plans.power_of_2(columns)
    constants = dict(HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, BLOCK_C=block_c)
    constants |= {"num_warps": tuning.row_warps(block_c)}
    return _AddNorm((rows_x.shape[0],), (rows_residual.stride(0), rows_x.stride(0), columns), constants, out)
