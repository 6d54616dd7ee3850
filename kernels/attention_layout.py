"""How the attention launcher sees its tensors: strides, head sizes in two pieces, and what it refuses."""

from asyncdiff_fast.kernels import plans
from asyncdiff_fast.kernels.checks import DTYPES, HEAD_SIZES, MAX_TOKEN_STRIDE

MAX_SEGMENTS = 8


def pieces(head_size):
    """(D0, D1): `head_size` as two powers of two, the second rounded up to what a tensor core takes, or 0."""
    first = 1 << (head_size.bit_length() - 1)
    rest = head_size - first
    return first, max(16, plans.power_of_2(rest)) if rest else 0


def strides(tensors):
    """Strides of batch, token and head of each tensor, one after another; 0 where a size is 1."""
    return tuple(x.stride(dim) if x.shape[dim] > 1 else 0 for x in tensors for dim in (0, 1, 2))


def aligned(tensors):
    """Whether all begin at multiples of 16 bytes. An address is no part of a layout: each launch must look."""
    ends = 0
    for x in tensors:
        ends |= x.data_ptr()
    return ends % 16 == 0


def stride_unit(tensors, wide):
    """8 if all rows begin at multiples of 8 elements of `aligned` tensors, so that loads may be `wide`; else 1."""
    return 8 if wide and all(stride % 8 == 0 for stride in strides(tensors)) else 1


def check_attention(queries, segments, outs, scale, num_splits, ahead=False):
    """Raise ValueError unless queries, outs and the pairs of `segments` fit together and suit the kernel."""
    if not 0 < len(queries) <= 2 or not 0 < len(segments) <= MAX_SEGMENTS or len(outs) != len(queries):
        raise ValueError(
            f"attention takes one or two queries, as many outs, and 1 to {MAX_SEGMENTS} segments that are not empty: "
            f"got {len(queries)}, {len(outs)} and {len(segments)}; parts that lie together are one segment"
        )
    batch, _, num_heads, head_size = queries[0].shape
    dtype = queries[0].dtype
    if head_size not in HEAD_SIZES or dtype not in DTYPES:
        raise ValueError(
            f"head size must be a multiple of 8 from 16 to 160 and dtype fp32, fp16 or bf16: got {head_size} and "
            f"{dtype}; use scaled_dot_product_attention"
        )
    if ahead and pieces(head_size)[1]:
        raise ValueError(f"ahead=True needs a head size that is a power of two: got {head_size}; pass ahead=False")
    if (scale is not None and scale <= 0) or (num_splits is not None and num_splits < 1):
        raise ValueError(f"scale and num_splits must be positive: got {scale} and {num_splits}")
    for name, tensors in (("queries", queries), ("outs", outs), *((f"segment {i}", s) for i, s in enumerate(segments))):
        for x in tensors:
            if (*x.shape[:1], *x.shape[2:]) != (batch, num_heads, head_size) or x.dtype != dtype:
                raise ValueError(
                    f"{name} must be (b, s, h, d) = ({batch}, s, {num_heads}, {head_size}) of {dtype}, as the first "
                    f"query is: got {tuple(x.shape)} of {x.dtype}"
                )
            if x.stride(3) != 1 or x.stride(1) > MAX_TOKEN_STRIDE:
                raise ValueError(
                    f"{name} must have last stride 1 and less than 2**24 elements from token to token: got strides "
                    f"{x.stride()}; pass a contiguous copy"
                )
    for name, pairs in (("key and value of a segment", segments), ("query and out", zip(queries, outs, strict=True))):
        for x, y in pairs:
            if x.shape != y.shape:
                raise ValueError(f"{name} must have one shape: got {tuple(x.shape)} and {tuple(y.shape)}")
