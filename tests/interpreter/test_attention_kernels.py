"""The attention kernels in Triton's interpreter, held to float64 and to themselves."""

import pytest
import torch
from asyncdiff_fast.kernels import attention as attention_module
from asyncdiff_fast.kernels.attention import attention
from asyncdiff_fast.kernels.attention_merge import attention_merge
from asyncdiff_fast.kernels.checks import suits_attention
from asyncdiff_fast.kernels.reference_attention import attention_merge_reference
from asyncdiff_fast.kernels.tuning import AttentionSettings
from attention_oracle import (
    LSE_TOLERANCE,
    TOLERANCE,
    among_nans,
    assert_near,
    attention_oracle,
    error,
    segments_among_nans,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_views import key_value

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Tiles so small that a few tokens make several.
TINY = AttentionSettings(block_m=16, block_n=16, num_warps=4, num_stages=2, per_sm=1)


def made(seed=0):
    return torch.Generator().manual_seed(seed)


def check(query, segments, **keywords):
    out, lse = attention(query, segments, return_lse=True, settings=TINY, **keywords)
    want, want_lse = attention_oracle(query, segments, keywords.get("scale"))
    assert_near(out, want, query.dtype)
    assert (lse - want_lse).abs().max() <= LSE_TOLERANCE
    again = attention(query, segments, settings=TINY, **keywords)
    assert torch.equal(out, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [16, 32, 40, 64, 72, 80, 96, 128, 160])
def test_head_sizes(head_size, dtype):
    make = made()
    check(among_nans((1, 17, 1, head_size), dtype, make), segments_among_nans((16, 21), 1, 1, head_size, dtype, make))


@pytest.mark.parametrize("num_splits", [1, 2, 5])
@pytest.mark.parametrize("sizes", [(77,), (1,), (16,), (48,), (5, 32, 3), (16, 1, 15, 16), (1,) * 8], ids=str)
def test_scores_made_ahead(sizes, num_splits):
    """Also where a split has left-overs alone."""
    make = made()
    segments = segments_among_nans(sizes, 1, 2, 32, torch.float16, make)
    query = among_nans((1, 5, 2, 32), torch.float16, make)
    check(query, segments, num_splits=num_splits, ahead=True)
    plain, ahead = (
        attention(query, segments, num_splits=num_splits, settings=TINY, ahead=way) for way in (False, True)
    )
    assert torch.equal(plain, ahead), "the same sums in the same order"


def test_scores_ahead_are_of_heads_in_one_piece():
    q = torch.zeros(1, 16, 1, 40)
    with pytest.raises(ValueError, match="ahead=True needs a head size that is a power of two: got 40; pass ahead=F"):
        attention(q, [(q, q)], ahead=True)


@pytest.mark.parametrize("num_splits", [1, 2, 5])
@pytest.mark.parametrize("sizes", [(77,), (1,), (32,), (5, 32, 3), (16, 1, 15, 16), (1,) * 8], ids=str)
def test_ragged_segments(sizes, num_splits):
    make = made()
    segments = segments_among_nans(sizes, 2, 2, 40, torch.float32, make)
    check(among_nans((2, 5, 2, 40), torch.float32, make), segments, num_splits=num_splits)


def test_one_query_and_an_empty_segment():
    make = made()
    segments = segments_among_nans((9, 0, 20), 1, 2, 32, torch.float32, make)
    check(among_nans((1, 1, 2, 32), torch.float32, make), segments)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("sizes", [(7, 33), (16, 16), (1, 1), (0, 5), (5, 0)], ids=str)
def test_two_queries(sizes, num_splits):
    """Text and image: outputs of their own, written where told, with nothing else touched."""
    make = made()
    queries = [among_nans((2, size, 2, 40), torch.float32, make, (2, 0, 1, 3)) for size in sizes]
    segments = segments_among_nans((7, 33), 2, 2, 40, torch.float32, make)
    buffers = [torch.full((2, size + 2, 3, 48), torch.nan) for size in sizes]
    outs = [buffer[:, 1:-1, :2, :40] for buffer in buffers]
    given, lses = attention(queries, segments, outs=outs, return_lse=True, num_splits=num_splits, settings=TINY)
    for query, out, own, lse, buffer in zip(queries, outs, given, lses, buffers, strict=True):
        assert own is out
        want, want_lse = attention_oracle(query, segments)
        if query.numel():
            assert_near(out, want, torch.float32)
            assert (lse - want_lse).abs().max() <= LSE_TOLERANCE
        assert buffer.isnan().sum() == buffer.numel() - out.numel()


def test_scale_and_large_scores():
    make = made()
    query = among_nans((1, 17, 1, 64), torch.float16, make).mul_(40)
    segments = segments_among_nans((30,), 1, 1, 64, torch.float16, make)
    check(query, segments, scale=0.02)
    out = attention(query, segments, scale=1.0, settings=TINY)
    assert error(out, attention_oracle(query, segments, 1.0)[0]) < TOLERANCE[torch.float16]


def test_unaligned_views():
    """Rows that begin at odd elements take the narrow path."""
    make = made()
    query = torch.randn(1, 17, 2, 33, generator=make)[..., 1:]
    key, value = (torch.randn(1, 21, 2, 35, generator=make)[..., 2:34] for _ in range(2))
    check(query, [(key, value)])


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 35), min_size=1, max_size=4).filter(any), st.integers(1, 4), st.randoms())
def test_order_and_splits_do_not_matter(sizes, num_splits, random):
    """Any order of the segments, any division of the keys: one result up to the rounding of sums."""
    make = made(sum(sizes))
    segments = segments_among_nans(sizes, 1, 1, 32, torch.float32, make)
    query = among_nans((1, 9, 1, 32), torch.float32, make)
    shuffled = random.sample(segments, len(segments))
    whole = attention(query, segments, num_splits=1, settings=TINY)
    split = attention(query, shuffled, num_splits=num_splits, settings=TINY)
    assert error(split, whole.double()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge(dtype):
    """Results for disjoint sets of keys add up to the result for all; a set without keys counts for nothing."""
    make = made()
    query = among_nans((2, 19, 2, 40), dtype, make)
    segments = segments_among_nans((5, 20, 11), 2, 2, 40, dtype, make)
    parts = [attention(query, [segment], return_lse=True, settings=TINY) for segment in segments]
    outs = torch.stack([torch.zeros_like(parts[0][0]), *(out for out, _ in parts)])
    lses = torch.stack([torch.full_like(parts[0][1], -torch.inf), *(lse for _, lse in parts)])
    out, lse = attention_merge(outs, lses, return_lse=True)
    want, want_lse = attention_oracle(query, segments)
    assert error(out, want) < 1.5 * TOLERANCE[dtype]
    assert (lse - want_lse).abs().max() <= LSE_TOLERANCE
    reference, reference_lse = attention_merge_reference(outs, lses, return_lse=True)
    assert error(out, reference.double()) < TOLERANCE[dtype] and torch.allclose(lse, reference_lse)
    nothing, minus = attention_merge(outs[:1], lses[:1], return_lse=True)
    assert not nothing.any() and minus.isneginf().all()


@pytest.mark.parametrize("num_splits", [1, 3])
def test_ring_is_concatenation(num_splits):
    """A ring's view gives the bits that concatenated keys and values give."""
    make = made()
    ring = torch.randn(50, 2, 2, 2, 40, generator=make)
    parts = [tuple(x.contiguous() for x in key_value(part)) for part in ring.split((20, 13, 17))]
    query = among_nans((2, 17, 2, 40), torch.float32, make)
    cat = tuple(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    keywords = {"num_splits": num_splits, "settings": TINY}
    views = attention(query, [key_value(ring)], **keywords)
    assert torch.equal(views, attention(query, [cat], **keywords))
    assert error(attention(query, parts, **keywords), views.double()) < TOLERANCE[torch.float32]


def test_shipped_settings():
    """Tiles larger than what there is, as they are compiled; keys enough for a split that nobody asked for."""
    make = made()
    query = among_nans((1, 3, 1, 80), torch.float16, make)
    segments = segments_among_nans((520, 77), 1, 1, 80, torch.float16, make)
    out = attention(query, segments)
    assert_near(out, attention_oracle(query, segments)[0], torch.float16)
    assert attention_module.tuning.attention_splits(1, 597, attention_module.tuning.ATTENTION[80]) == 2


def bad_calls():
    q = torch.zeros(1, 4, 2, 32)
    return [
        ((q, []), "1 to 8 segments"),
        ((q, [(q[:, :0], q[:, :0])]), "1 to 8 segments"),
        ((q, [(q, q)] * 9), "1 to 8 segments"),
        (((q, q, q), [(q, q)]), "one or two queries"),
        ((torch.zeros(1, 4, 2, 36), [(q, q)]), "multiple of 8 from 16 to 160"),
        ((q.double(), [(q.double(), q.double())]), "fp32, fp16 or bf16"),
        ((q, [(q.half(), q.half())]), "segment 0 must be"),
        ((q, [(q, q), (q[:, :, :1], q[:, :, :1])]), "segment 1 must be"),
        ((q, [(q, q[:, :2])]), "one shape"),
        ((q, [(q, torch.zeros(1, 4, 2, 64)[..., ::2])]), "last stride 1"),
    ]


@pytest.mark.parametrize(("arguments", "message"), bad_calls(), ids=[message for _, message in bad_calls()])
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention(*arguments)


def test_what_suits_is_taken():
    """The question that callers ask beforehand is answered as the launcher would."""
    x = torch.zeros(1, 4, 2, 168)
    tensors = [x[..., :d] for d in (8, 15, 16, 36, 40, 160, 168)]
    tensors += [x[..., :32].double(), x[..., :64:2], torch.empty_strided((1, 2, 2, 16), (2**25, 2**24, 16, 1))]
    for q in tensors:
        if suits_attention(q):
            assert attention(q, [(q, q)], settings=TINY).shape == q.shape
        else:
            with pytest.raises(ValueError, match=r"head size must be|last stride 1"):
                attention(q, [(q, q)], settings=TINY)


def test_refused_options():
    q = torch.zeros(1, 4, 2, 32)
    for options in ({"scale": 0.0}, {"scale": -1.0}, {"num_splits": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            attention(q, [(q, q)], **options)
    with pytest.raises(ValueError, match="query and out must have one shape"):
        attention(q, [(q, q)], outs=q[:, :2])
