"""The KV ring: parts that travel as they are, views that attention reads as they are."""

import pytest
import torch
import torch.nn.functional as F
from asyncdiff_fast.kernels.kv_ring import KVRing

BOUNDS = (0, 7, 7, 12)
BATCH, HEADS, HEAD_SIZE = 2, 3, 16


def filled(buffer=0, depth=1):
    """A ring of NaNs, written, and the (key, value) of its parts."""
    make = torch.Generator().manual_seed(buffer)
    ring = KVRing(BOUNDS, BATCH, HEADS, HEAD_SIZE, torch.float32, "cpu", depth=depth)
    ring.part(0, buffer).fill_(torch.nan)
    parts = []
    for idx, size in enumerate((7, 0, 5)):
        parts.append(tuple(torch.randn(BATCH, size, HEADS, HEAD_SIZE, generator=make) for _ in range(2)))
        ring.write(idx, *parts[-1], buffer=buffer)
    return ring, parts


def test_attention_on_views_is_attention_on_concatenation():
    ring, parts = filled()
    key, value = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    assert torch.equal(ring.key(), key) and torch.equal(ring.value(), value)
    query = torch.randn(BATCH, HEADS, 4, HEAD_SIZE)
    views = F.scaled_dot_product_attention(query, ring.key().transpose(1, 2), ring.value().transpose(1, 2))
    copies = F.scaled_dot_product_attention(query, key.transpose(1, 2), value.transpose(1, 2))
    assert torch.allclose(views, copies, atol=1e-6)


def test_views_share_the_rings_memory():
    ring, _ = filled()
    start, end = ring.part(0).data_ptr(), ring.part(2).data_ptr() + ring.part(2).nbytes
    for view in (ring.key(), ring.value(), *ring.slot(2)):
        assert start <= view.data_ptr() < end and view.stride(3) == 1


def test_a_received_part_is_read():
    """What is written into the contiguous block of a part is what its views show."""
    ring, parts = filled()
    other, other_parts = filled(buffer=1, depth=2)
    block = other.part(2, buffer=1)
    assert block.is_contiguous() and ring.part(2).is_contiguous()
    ring.part(2).view(-1).copy_(block.view(-1))
    assert torch.equal(ring.key(2), other_parts[2][0]) and torch.equal(ring.value(2, 3), other_parts[2][1])
    assert torch.equal(ring.key(0, 2), parts[0][0])


def test_buffers_are_separate():
    ring, parts = filled(buffer=1, depth=2)
    assert not ring.key().any() and torch.equal(ring.key(0, 1, buffer=1), parts[0][0])


def test_a_projection_writes_its_slot():
    """With one sample the block of a part is a matrix of tokens, so the projection's result needs no copy."""
    ring = KVRing((0, 5, 9), 1, HEADS, HEAD_SIZE, torch.float32, "cpu")
    x, weight = torch.randn(5, 8), torch.randn(8, 2 * HEADS * HEAD_SIZE)
    torch.mm(x, weight, out=ring.part(0).view(5, -1))
    key, value = (x @ weight).view(1, 5, 2, HEADS, HEAD_SIZE).unbind(2)
    assert torch.equal(ring.key(0, 1), key) and torch.equal(ring.value(0, 1), value)


def test_made_in_inference_mode():
    with torch.inference_mode():
        ring = KVRing((0, 2), 1, 1, 16, torch.float32, "cpu")
    assert not ring.part(0).is_inference()


@pytest.mark.parametrize(("bounds", "depth"), [((0,), 1), ((1, 2), 1), ((0, 3, 2), 1), ((0, 2), 0)])
def test_bounds_refused(bounds, depth):
    with pytest.raises(ValueError, match="bounds must be 0 and then rising"):
        KVRing(bounds, 1, 1, 16, torch.float32, "cpu", depth=depth)


def test_wrong_parts_refused():
    ring, parts = filled()
    with pytest.raises(ValueError, match="part 2 takes"):
        ring.write(2, *parts[0])
    for first, last in ((0, 4), (-1, 2), (2, 2)):
        with pytest.raises(IndexError, match="parts must be among the ring's 3"):
            ring.key(first, last)
