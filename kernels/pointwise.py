"""Small fusions of transformer blocks: GELU and GEGLU into a view; gate, residual and adaptive LayerNorm in one pass.

    gelu_none(x) = x/2 · (1 + erf(x/√2)),    gelu_tanh(x) = x · σ(2 √(2/π) (x + 0.044715 x³))
    geglu(x, g) = x · gelu(g)                            (Shazeer, "GLU variants improve transformer", 2020)
    r = residual + gate · x,    y = (r − mean r)/√(var r + eps) · (1 + scale) + shift     (Peebles and Xie, DiT, 2023)

All in fp32 with one rounding at the end; `y` is the norm of `r` as it is stored, which the next layers read too.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from asyncdiff_fast.kernels import plans, tuning
from asyncdiff_fast.kernels.checks import even_rows

APPROXIMATE = ("none", "tanh")


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    if TANH:
        # tanh(u) = 2 σ(2u) − 1, and Triton has σ.
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_kernel(
    x_ptr, out_ptr, stride_x, stride_out, num_rows, columns,
    GATED: tl.constexpr, TANH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_r < num_rows)[:, None] & (offs_c < columns)[None, :]
    x_ptrs = x_ptr + offs_r[:, None] * stride_x + offs_c[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        y = x * _gelu(tl.load(x_ptrs + columns, mask=mask, other=0.0).to(tl.float32), TANH)
    else:
        y = _gelu(x, TANH)
    out_ptrs = out_ptr + offs_r[:, None] * stride_out + offs_c[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gate_residual_adaln_kernel(
    residual_ptr, x_ptr, gate_ptr, scale_ptr, shift_ptr, residual_out_ptr, out_ptr,
    residual_strides, x_strides, residual_out_strides, out_strides, stride_gate, stride_scale, stride_shift,
    tokens, columns, eps, HAS_GATE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    mask = offs_c < columns
    row = residual_ptr + batch * residual_strides[0] + token * residual_strides[1] + offs_c
    r = tl.load(row, mask=mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        x = tl.load(x_ptr + batch * x_strides[0] + token * x_strides[1] + offs_c, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + batch * stride_gate + offs_c, mask=mask, other=0.0).to(tl.float32)
        stored = (r + gate * x).to(residual_out_ptr.dtype.element_ty)
        row = residual_out_ptr + batch * residual_out_strides[0] + token * residual_out_strides[1] + offs_c
        tl.store(row, stored, mask=mask)
        r = stored.to(tl.float32)
    mean = tl.sum(r, 0) / columns
    centred = tl.where(mask, r - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / columns + eps)
    scale = tl.load(scale_ptr + batch * stride_scale + offs_c, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + batch * stride_shift + offs_c, mask=mask, other=0.0).to(tl.float32)
    y = centred * rstd * (1.0 + scale) + shift
    out_row = out_ptr + batch * out_strides[0] + token * out_strides[1] + offs_c
    tl.store(out_row, y.to(out_ptr.dtype.element_ty), mask=mask)


def geglu(x, *, approximate="none", out=None):
    """First half of the columns times the GELU of the second.

    Args:
        x: (..., 2c), fp32, fp16 or bf16; rows evenly spaced in memory, last stride 1. The same for `out`.
        approximate: "none" (erf) or "tanh".
        out: (..., c), a slice of a larger buffer if wanted; a new tensor if None.
    Returns: out.
    Raises: ValueError for odd columns, an unknown `approximate`, an `out` of another shape, or uneven rows.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x must have an even number of columns: got {tuple(x.shape)}")
    return _launch_gelu(x, x.shape[-1] // 2, True, approximate, out)


def gelu(x, *, approximate="tanh", out=None):
    """GELU into a view: of the buffer, say, in which attention and MLP of a block meet.

    Args, returns and errors as `geglu`, but `x` is (..., c) like `out`.
    """
    return _launch_gelu(x, x.shape[-1], False, approximate, out)


def _launch_gelu(x, columns, gated, approximate, out):
    if approximate not in APPROXIMATE:
        raise ValueError(f"approximate must be one of {APPROXIMATE}: got {approximate!r}")
    plan = _gelu_plan((x, out), columns, gated, approximate)
    out = plans.new(plan.out, x) if out is None else out
    if plan.grid is not None:
        _gelu_kernel[plan.grid](x, out, *plan.sizes, **plan.constants)
    return out


class _Gelu(NamedTuple):
    grid: tuple | None
    sizes: tuple
    constants: dict
    out: torch.Tensor


@plans.planned
def _gelu_plan(x, out, columns, gated, approximate):
    shape = (*x.shape[:-1], columns)
    out = x.new_empty(shape) if out is None else out
    if out.shape != shape:
        raise ValueError(f"out must be {shape}: got {tuple(out.shape)}")
    rows_x, rows_out = even_rows("x", x), even_rows("out", out)
    block_c = tuning.columns_block(columns)
    block_r = tuning.GELU_TILE // block_c
    grid = (plans.ceil_div(rows_x.shape[0], block_r), plans.ceil_div(columns, block_c)) if x.numel() else None
    constants = dict(GATED=gated, TANH=approximate == "tanh", BLOCK_R=block_r, BLOCK_C=block_c)
    sizes = rows_x.stride(0), rows_out.stride(0), rows_x.shape[0], columns
    return _Gelu(grid, sizes, constants | {"num_warps": tuning.GELU_WARPS}, out)


def gate_residual_adaln(residual, x, gate, scale, shift, *, eps=1e-6, residual_out=None, out=None):
    """Add the gated branch to the residual and normalise the sum for the next branch, in one pass.

    Args:
        residual, x: (b, s, c), fp32, fp16 or bf16, last stride 1. `x` and `gate` None: the norm alone.
        gate, scale, shift: (b, c) each, last stride 1, such as `chunk` makes them.
        eps: added to the variance.
        residual_out, out: (b, s, c), where to write; `residual` itself is allowed. New tensors if None.
    Returns: (residual + gate · x, LayerNorm of that without weights · (1 + scale) + shift); the first is `residual`
        itself where there is no `x`.
    Raises: ValueError if shapes or strides do not fit.
    """
    plan = _modulation_plan((residual, x, gate, scale, shift, residual_out, out))
    out = plans.new(plan.out, residual) if out is None else out
    if x is None:
        residual_out, x, gate = residual, residual, scale
    elif residual_out is None:
        residual_out = plans.new(plan.out, residual)
    if plan.grid is not None:
        _gate_residual_adaln_kernel[plan.grid](
            residual, x, gate, scale, shift, residual_out, out, *plan.sizes, eps, **plan.constants
        )
    return residual_out, out


class _Modulation(NamedTuple):
    grid: tuple | None
    sizes: tuple
    constants: dict
    out: torch.Tensor


@plans.planned
def _modulation_plan(residual, x, gate, scale, shift, residual_out, out):
    if residual.ndim != 3 or (x is None) != (gate is None) or (x is None and residual_out is not None):
        raise ValueError(
            f"residual must be (b, s, c), x and gate both given or both None, and residual_out only with them: got "
            f"{tuple(residual.shape)}, {'no x' if x is None else 'x'}, {'no gate' if gate is None else 'gate'}"
        )
    batch, tokens, columns = residual.shape
    like = torch.empty_like(residual)
    out, has_gate = like if out is None else out, x is not None
    if not has_gate:
        residual_out, x, gate = residual, residual, scale
    elif residual_out is None:
        residual_out = like
    named = {"residual": residual, "x": x, "residual_out": residual_out, "out": out}
    named |= {"gate": gate, "scale": scale, "shift": shift}
    for name, tensor in named.items():
        want = (batch, tokens, columns) if name in ("residual", "x", "residual_out", "out") else (batch, columns)
        if tensor.shape != want or tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be {want} with last stride 1: got {tuple(tensor.shape)}, {tensor.stride()}")
    block_c = plans.power_of_2(columns)
    sizes = (
        *(tensor.stride()[:2] for tensor in (residual, x, residual_out, out)),
        gate.stride(0), scale.stride(0), shift.stride(0), tokens, columns,
    )  # fmt: skip
    constants = dict(HAS_GATE=has_gate, BLOCK_C=block_c, num_warps=tuning.row_warps(block_c))
    return _Modulation((batch * tokens,) if residual.numel() else None, sizes, constants, like)
