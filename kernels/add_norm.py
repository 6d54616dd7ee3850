"""The sum that ends one branch of a transformer block, and the LayerNorm that begins the next, in one pass.

    r = residual + x,    y = (r − mean r)/√(var r + eps) · weight + bias        (Ba et al., "Layer normalization", 2016)

All in fp32 with one rounding at the end; `y` is the norm of `r` as it is stored, which the next sum reads too.
"""

import torch
import triton
import triton.language as tl
from asyncdiff_fast.kernels import tuning
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
    total, out = (torch.empty(residual.shape, dtype=residual.dtype, device=residual.device) for _ in range(2))
    if residual.numel():
        rows_residual, rows_x = even_rows("residual", residual), even_rows("x", x)
        block_c = triton.next_power_of_2(columns)
        _add_layer_norm_kernel[(rows_x.shape[0],)](
            rows_residual, rows_x, residual if weight is None else weight, residual if bias is None else bias,
            total, out, rows_residual.stride(0), rows_x.stride(0), columns, eps,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, BLOCK_C=block_c,
            num_warps=tuning.row_warps(block_c),
        )  # fmt: skip
    return total, out
