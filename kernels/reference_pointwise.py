"""The small fusions in plain PyTorch: truth for tests and the way without a GPU. Any float dtype, fp64 too.

Computed in fp32 (fp64 for fp64 inputs) and rounded once, like the kernels.
"""

import torch
import torch.nn.functional as F


def _exact(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _into(out, result, dtype):
    return result.to(dtype) if out is None else out.copy_(result)


def geglu_reference(x, *, approximate="none", out=None):
    """What `pointwise.geglu` gives; args and returns as there."""
    value, gate = _exact(x).chunk(2, dim=-1)
    return _into(out, value * F.gelu(gate, approximate=approximate), x.dtype)


def gelu_reference(x, *, approximate="tanh", out=None):
    """What `pointwise.gelu` gives; args and returns as there."""
    return _into(out, F.gelu(_exact(x), approximate=approximate), x.dtype)


def gate_residual_adaln_reference(residual, x, gate, scale, shift, *, eps=1e-6, residual_out=None, out=None):
    """What `pointwise.gate_residual_adaln` gives; args and returns as there."""
    if x is not None:
        total = _exact(residual) + _exact(gate)[:, None] * _exact(x)
        residual = _into(residual_out, total, residual.dtype)
    normed = F.layer_norm(_exact(residual), residual.shape[-1:], eps=eps)
    return residual, _into(out, normed * (1 + _exact(scale)[:, None]) + _exact(shift)[:, None], residual.dtype)


def add_layer_norm_reference(residual, x, weight, bias, *, eps=1e-5):
    """What `add_norm.add_layer_norm` gives; args and returns as there."""
    total = (_exact(residual) + _exact(x)).to(residual.dtype)
    weight, bias = (None if given is None else _exact(given) for given in (weight, bias))
    return total, F.layer_norm(_exact(total), total.shape[-1:], weight, bias, eps).to(residual.dtype)


def qk_norm_rope_reference(
    q, k, v, *, q_weight=None, k_weight=None, eps=1e-6, cos=None, sin=None, interleaved=True,
    q_out=None, k_out=None, v_out=None,
):  # fmt: skip
    """What `qk_norm_rope.qk_norm_rope` gives; args and returns as there."""
    results = []
    for x, weight, out in ((q, q_weight, q_out), (k, k_weight, k_out)):
        y = _exact(x)
        if weight is not None:
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * _exact(weight)
        if cos is not None:
            y = y * cos[:, None] + _rotated(y, interleaved) * sin[:, None]
        results.append(_into(out, y, x.dtype))
    return *results, None if v is None else _into(v_out, v.clone(), v.dtype)


def _rotated(x, interleaved):
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1)
    return (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)
