"""Attention written out in float64, and segments that lie among NaNs."""

import torch

# Norm of the difference over norm of the truth. The probabilities and the result are rounded to the dtype; Triton's
# interpreter cuts bf16 off instead of rounding it, which doubles the error.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}
# Scores of a dozen are sums of products in float32.
LSE_TOLERANCE = 2e-5


def attention_oracle(query, segments, scale=None):
    """(out (b, s, h, d), lse (b, h, s)), float64."""
    key, value = (torch.cat([part.double() for part in parts], dim=1) for parts in zip(*segments, strict=True))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bshd,bthd->bhst", query.double(), key) * scale
    top = scores.amax(dim=-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(dim=-1, keepdim=True)
    return torch.einsum("bhst,bthd->bshd", weights / total, value), (top + total.log()).squeeze(-1)


def error(got, want):
    """Norm of the difference over norm of the truth; NaN if anything is NaN."""
    return ((got.double() - want).norm() / want.norm()).item()


def assert_near(got, want, dtype):
    """Within the tolerance of the dtype, which `got` has."""
    assert got.dtype == dtype and got.shape == want.shape
    assert error(got, want) <= TOLERANCE[dtype], error(got, want)


def among_nans(shape, dtype, make, order=(0, 1, 2, 3)):
    """A random (b, s, h, d) in a larger tensor of NaNs, whose dimensions lie in `order` in memory."""
    larger = [shape[dim] + 8 for dim in order]
    pool = torch.full(larger, torch.nan, dtype=dtype).permute(*(order.index(dim) for dim in range(4)))
    view = pool[tuple(slice(0, size) if dim == 3 else slice(3, 3 + size) for dim, size in enumerate(shape))]
    return view.copy_(torch.randn(shape, generator=make))


def segments_among_nans(sizes, batch, heads, head_size, dtype, make):
    """A (key, value) for each size: the first head by head in memory, the next token by token, and so on."""
    orders = ((0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 2, 3))
    return [
        tuple(among_nans((batch, size, heads, head_size), dtype, make, orders[idx % 3]) for _ in range(2))
        for idx, size in enumerate(sizes)
    ]
