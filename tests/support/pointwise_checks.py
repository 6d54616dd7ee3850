"""What the small fusions must give, for the reference and for the kernels alike: `ops` has the functions of either."""

import math

import pytest
import torch
from attention_oracle import among_nans, assert_near

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def made(seed=0):
    return torch.Generator().manual_seed(seed)


def gelu_oracle(x, approximate):
    """GELU by its definition, float64."""
    x = x.double()
    if approximate == "tanh":
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / 2 * torch.special.erfc(-x / math.sqrt(2))


def check_gelu(ops, shape, dtype, approximate):
    """Into a slice of a larger buffer, whose other columns stay as they are."""
    x = 3 * torch.randn(*shape[:-1], 2 * shape[-1], generator=made())
    x = x.to(dtype)
    buffer = torch.full((*shape[:-1], shape[-1] + 24), torch.nan, dtype=dtype)
    view = buffer[..., 16:-8]
    columns = shape[-1]
    for function, source, want in (
        (ops.geglu, x, x[..., :columns].double() * gelu_oracle(x[..., columns:], approximate)),
        (ops.gelu, x[..., columns:], gelu_oracle(x[..., columns:], approximate)),
    ):
        out = function(source, approximate=approximate, out=view.fill_(torch.nan))
        assert out is view
        assert_near(out, want, dtype)
        assert torch.equal(function(source, approximate=approximate), out)
    assert buffer[..., :16].isnan().all() and buffer[..., -8:].isnan().all()


def check_adaln(ops, shape, dtype):
    """Rows of a larger tensor, modulation as `chunk` gives it, a mean far from 0; in place; without a branch."""
    batch, _, columns = shape
    make = made()
    residual, x = (among_nans((*shape[:2], 1, columns), dtype, make)[:, :, 0] for _ in range(2))
    residual += 30
    gate, scale, shift = torch.randn(batch, 6 * columns, generator=make).to(dtype).chunk(6, dim=1)[:3]
    total, y = ops.gate_residual_adaln(residual, x, gate, scale, shift, eps=1e-6)
    assert_near(total, residual.double() + gate.double()[:, None] * x.double(), dtype)
    want = adaln_oracle(total, scale, shift)
    assert_near(y, want, dtype)
    alone = ops.gate_residual_adaln(total, None, None, scale, shift)
    assert alone[0] is total and torch.equal(alone[1], y)
    again = ops.gate_residual_adaln(residual, x, gate, scale, shift, residual_out=residual, out=torch.empty_like(y))
    assert again[0] is residual and torch.equal(residual, total) and torch.equal(again[1], y)


def check_add_layer_norm(ops, shape, dtype):
    """Rows of larger tensors, a mean far from 0; with weights and without."""
    make, columns = made(), shape[-1]
    residual, x = torch.full((2, *shape[:-1], columns + 8), torch.nan, dtype=dtype)[..., :columns]
    residual.copy_(30 + torch.randn(shape, generator=make))
    x.copy_(torch.randn(shape, generator=make))
    weight, bias = torch.randn(2, columns, generator=make).to(dtype)
    nothing = torch.zeros(shape[0], columns)
    for given in ((weight, bias), (weight, None), (None, None)):
        total, y = ops.add_layer_norm(residual, x, *given, eps=1e-6)
        assert_near(total, residual.double() + x.double(), dtype)
        scale, shift = (None if one is None else one.expand(shape[0], -1) for one in given)
        scale = nothing if scale is None else scale.double() - 1
        assert_near(y, adaln_oracle(total, scale, nothing if shift is None else shift), dtype)
        assert total.is_contiguous() and y.is_contiguous()


def adaln_oracle(x, scale, shift):
    """LayerNorm without weights, then scale and shift, float64."""
    x = x.double()
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return normed * (1 + scale.double()[:, None]) + shift.double()[:, None]


def check_qk_norm_rope(ops, shape, dtype, interleaved, norm=True, rope=True):
    """Strided inputs, and outputs into a pool of NaNs of which nothing else is written."""
    batch, tokens, heads, head_size = shape
    make = made()
    q, k, v = (among_nans(shape, dtype, make, order) for order in ((0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)))
    options = {"interleaved": interleaved, "eps": 1e-6}
    if norm:
        options |= {name: torch.randn(head_size, generator=make).to(dtype) for name in ("q_weight", "k_weight")}
    if rope:
        # Not a table of cosines: every element must find its own factor.
        options |= {name: torch.randn(tokens, head_size, generator=make) for name in ("cos", "sin")}
    pool = torch.full((tokens + 2, batch, 3, heads, head_size + 8), torch.nan, dtype=dtype)
    outs = pool[1:-1, ..., :head_size].permute(2, 1, 0, 3, 4)
    given = ops.qk_norm_rope(q, k, v, **options, **dict(zip(("q_out", "k_out", "v_out"), outs, strict=True)))
    for x, weight, out in ((q, options.get("q_weight"), given[0]), (k, options.get("k_weight"), given[1])):
        assert_near(out, norm_rope_oracle(x, weight, options.get("cos"), options.get("sin"), interleaved), dtype)
    assert torch.equal(outs[2], v) and given[2].data_ptr() == outs[2].data_ptr()
    assert pool.isnan().sum() == pool.numel() - outs.numel()
    fresh = ops.qk_norm_rope(q, k, None, **options)
    assert torch.equal(fresh[0], outs[0]) and torch.equal(fresh[1], outs[1]) and fresh[2] is None


def norm_rope_oracle(x, weight, cos, sin, interleaved):
    """RMSNorm, then a rotation pair by pair, float64."""
    x = x.double()
    if weight is not None:
        x = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    if cos is None:
        return x
    half = x.shape[-1] // 2
    result = torch.empty_like(x)
    for pair in range(half):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        cosines, sines = cos.double()[:, None], sin.double()[:, None]
        result[..., first] = x[..., first] * cosines[..., first] - x[..., second] * sines[..., first]
        result[..., second] = x[..., second] * cosines[..., second] + x[..., first] * sines[..., second]
    return result


def check_refused(ops):
    """Each rule with its message."""
    x = torch.zeros(2, 3, 8)
    vector = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="even number of columns"):
        ops.geglu(x[..., :7])
    with pytest.raises(ValueError, match="approximate must be one of"):
        ops.gelu(x, approximate="sigmoid")
    with pytest.raises(ValueError, match="out must be"):
        ops.geglu(x, out=x)
    with pytest.raises(ValueError, match="evenly spaced rows"):
        ops.gelu(x.transpose(0, 1))
    with pytest.raises(ValueError, match="x and gate both given or both None"):
        ops.gate_residual_adaln(x, x, None, vector, vector)
    with pytest.raises(ValueError, match="scale must be"):
        ops.gate_residual_adaln(x, x, vector, vector[:1], vector)
    with pytest.raises(ValueError, match="x must be like residual"):
        ops.add_layer_norm(x, x[:1], None, None)
    with pytest.raises(ValueError, match="bias must be"):
        ops.add_layer_norm(x, x, None, vector)
    with pytest.raises(ValueError, match="x must have evenly spaced rows"):
        ops.add_layer_norm(x, torch.zeros(3, 2, 8).transpose(0, 1), None, None)
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="cos and sin both given"):
        ops.qk_norm_rope(q, q, None, cos=torch.zeros(4, 8))
    with pytest.raises(ValueError, match="k must be"):
        ops.qk_norm_rope(q, q[:, :2], None)
    with pytest.raises(ValueError, match="cos must be"):
        ops.qk_norm_rope(q, q, None, cos=torch.zeros(3, 8), sin=torch.zeros(4, 8))
