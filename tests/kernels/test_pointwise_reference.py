"""The small fusions in plain PyTorch, against float64 and against what diffusers computes."""

from types import SimpleNamespace

import pointwise_checks as checks
import pytest
import torch
from asyncdiff_fast.kernels import reference_pointwise as reference
from diffusers.models.activations import GEGLU
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import AdaLayerNormZero, RMSNorm

NAMES = ("geglu", "gelu", "gate_residual_adaln", "add_layer_norm", "qk_norm_rope")
OPS = SimpleNamespace(**{name: getattr(reference, name + "_reference") for name in NAMES})
DTYPES = (torch.float64, *checks.DTYPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate, dtype):
    checks.check_gelu(OPS, (2, 5, 40), dtype, approximate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adaln(dtype):
    checks.check_adaln(OPS, (2, 5, 100), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_layer_norm(dtype):
    checks.check_add_layer_norm(OPS, (2, 5, 100), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
def test_qk_norm_rope(interleaved, dtype):
    checks.check_qk_norm_rope(OPS, (2, 5, 3, 40), dtype, interleaved)


def test_geglu_is_diffusers():
    layer = GEGLU(8, 12).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    assert torch.allclose(reference.geglu_reference(layer.proj(x)), layer(x))


def test_adaln_is_diffusers():
    layer = AdaLayerNormZero(16).double()
    x, emb = torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    want, gate, shift_mlp, scale_mlp, _ = layer(x, emb=emb)
    shift, scale = layer.linear(layer.silu(emb)).chunk(6, dim=1)[:2]
    assert torch.allclose(reference.gate_residual_adaln_reference(x, None, None, scale, shift)[1], want)
    total, y = reference.gate_residual_adaln_reference(x, want, gate, scale_mlp, shift_mlp)
    assert torch.allclose(total, x + gate[:, None] * want)
    assert torch.allclose(y, layer.norm(total) * (1 + scale_mlp[:, None]) + shift_mlp[:, None])


@pytest.mark.parametrize("interleaved", [True, False])
def test_qk_norm_rope_is_diffusers(interleaved):
    # diffusers computes these in float32, whatever it is given.
    q, k = torch.randn(2, 2, 5, 3, 40)
    norms = [RMSNorm(40, eps=1e-6) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    cos, sin = torch.randn(2, 5, 40)
    got = reference.qk_norm_rope_reference(
        q, k, None, q_weight=norms[0].weight, k_weight=norms[1].weight, cos=cos, sin=sin, interleaved=interleaved
    )
    for mine, x, norm in zip(got, (q, k), norms, strict=False):
        dim = -1 if interleaved else -2
        want = apply_rotary_emb(norm(x), (cos, sin), use_real_unbind_dim=dim, sequence_dim=1)
        assert torch.allclose(mine, want, atol=1e-6)
