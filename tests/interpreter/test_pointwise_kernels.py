"""The small fusions in Triton's interpreter."""

from types import SimpleNamespace

import pointwise_checks as checks
import pytest
import torch
from asyncdiff_fast.kernels.add_norm import add_layer_norm
from asyncdiff_fast.kernels.pointwise import gate_residual_adaln, geglu, gelu
from asyncdiff_fast.kernels.qk_norm_rope import qk_norm_rope
from hypothesis import given, settings
from hypothesis import strategies as st

OPS = SimpleNamespace(
    geglu=geglu,
    gelu=gelu,
    gate_residual_adaln=gate_residual_adaln,
    add_layer_norm=add_layer_norm,
    qk_norm_rope=qk_norm_rope,
)


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(2, 5, 40), (3, 128), (1, 1, 1), (2, 9, 640)], ids=str)
def test_gelu(shape, approximate, dtype):
    checks.check_gelu(OPS, shape, dtype, approximate)


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 100), (1, 1, 64), (3, 2, 1536)], ids=str)
def test_adaln(shape, dtype):
    checks.check_adaln(OPS, shape, dtype)


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 100), (1, 1, 64), (3, 2, 640)], ids=str)
def test_add_layer_norm(shape, dtype):
    checks.check_add_layer_norm(OPS, shape, dtype)


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 3, 128), (1, 17, 2, 64), (2, 3, 5, 40), (1, 1, 1, 80)], ids=str)
def test_qk_norm_rope(shape, interleaved, dtype):
    checks.check_qk_norm_rope(OPS, shape, dtype, interleaved)


@pytest.mark.parametrize(("norm", "rope"), [(True, False), (False, True), (False, False)])
def test_qk_norm_or_rope(norm, rope):
    checks.check_qk_norm_rope(OPS, (2, 5, 3, 64), torch.float32, True, norm, rope)


@settings(max_examples=10, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 9), st.sampled_from((16, 48, 64))), st.booleans()
)
def test_qk_norm_rope_of_any_size(shape, interleaved):
    checks.check_qk_norm_rope(OPS, shape, torch.float32, interleaved)


def test_refused():
    checks.check_refused(OPS)
