"""Attention in plain PyTorch against attention written out in float64."""

import pytest
import torch
from asyncdiff_fast.kernels.reference_attention import attention_merge_reference, attention_reference
from attention_oracle import LSE_TOLERANCE, TOLERANCE, among_nans, assert_near, attention_oracle, segments_among_nans

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("head_size", [32, 40, 160])
def test_reference(head_size, scale, dtype):
    make = torch.Generator().manual_seed(0)
    queries = tuple(among_nans((2, size, 2, head_size), dtype, make) for size in (1, 9))
    segments = segments_among_nans((5, 0, 77), 2, 2, head_size, dtype, make)
    buffer = torch.full((2, 9, 2, head_size), torch.nan, dtype=dtype)
    outs, lses = attention_reference(
        queries, segments, scale=scale, outs=(torch.empty_like(queries[0]), buffer), return_lse=True
    )
    assert outs[1] is buffer
    for query, out, lse in zip(queries, outs, lses, strict=True):
        want, want_lse = attention_oracle(query, segments, scale)
        assert_near(out, want, dtype)
        assert (lse - want_lse).abs().max() <= LSE_TOLERANCE
    assert torch.equal(attention_reference(queries[1], segments, scale=scale), outs[1])


def test_merge_reference():
    make = torch.Generator().manual_seed(0)
    query = among_nans((2, 9, 2, 32), torch.float64, make)
    segments = segments_among_nans((5, 20), 2, 2, 32, torch.float64, make)
    parts = [attention_oracle(query, [segment]) for segment in segments]
    outs, lses = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    out, lse = attention_merge_reference(outs, lses, return_lse=True)
    want, want_lse = attention_oracle(query, segments)
    assert_near(out, want, torch.float64)
    assert (lse - want_lse).abs().max() < TOLERANCE[torch.float64] * 100
    nothing = attention_merge_reference(torch.zeros_like(outs), torch.full_like(lses, -torch.inf))
    assert not nothing.any()
