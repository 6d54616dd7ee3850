"""The registered ops: as torch's own sequence, and what tracers are told of their results is true."""

import pytest
import torch
import torch.nn.functional as F
from ring_views import key_value
from seen_ops import SeenOps

from asyncdiff_fast.fused import attention_ops, ops, registry


def _inputs(layout=torch.contiguous_format):
    """{op: its arguments, all but the kernel}; float32, odd sizes."""
    torch.manual_seed(0)
    image = torch.randn(2, 12, 5, 7).to(memory_format=layout)
    partials = ops.residual_add(image / 2, image / 2, None, 1.0, "triton")[1]
    frames = torch.randn(1, 3, 12, 4, 5).transpose(1, 2)
    vector, rows = torch.randn(12), torch.randn(2, 2 * 12).chunk(2, dim=1)
    x, y, gate, scale, shift = torch.randn(2, 5, 24), torch.randn(2, 5, 24), *torch.randn(2, 3 * 24).chunk(3, dim=1)
    heads = [[torch.randn(2, s, 2, 16) for s in (3, 5)] for _ in range(3)]
    weights = [[torch.randn(16) for _ in range(2)] for _ in range(2)]
    cos, sin = torch.randn(8, 16), torch.randn(8, 16)
    return {
        "group_norm": [
            (image, vector, vector + 1, 3, 1e-5, True, vector, rows[0], *rows, None),
            (image, None, None, 4, 1e-5, False, None, None, None, None, None),
            (frames, vector, vector, 2, 1e-6, True, None, None, None, None, None),
            (image, vector, vector, 3, 1e-5, True, None, None, None, None, partials),
        ],
        "residual_add": [(image, image.flip(2).to(memory_format=layout), vector, 2.0), (image, image, None, 1.0)],
        "geglu": [(x,)],
        "gelu_beside": [(y, x, "tanh"), (y, x, "none")],
        "adaln": [(x, scale, shift, 1e-6)],
        "gate_residual_adaln": [(x, y, gate, scale, shift, 1e-6)],
        "add_layer_norm": [(x, y, gate[0], shift[0], 1e-5), (x, y, None, None, 1e-6)],
        "joint_qk_norm_rope": [
            (*heads, *weights, 1e-6, cos, sin),
            (*[part[1:] for part in heads], *[w[1:] for w in weights], 1e-6, None, None),
        ],
        "attention": [(heads[0][1], *heads[1:], 0.25), (heads[0][1], heads[1][:1], heads[2][:1], 0.25)],
    }


CASES = [
    pytest.param(op, layout, i, id=f"{op}-{i}-{str(layout).removeprefix('torch.')}")
    for layout in (torch.contiguous_format, torch.channels_last)
    for op, calls in _inputs().items()
    for i in range(len(calls))
    if layout is torch.contiguous_format or op in ("group_norm", "residual_add")
]


def _leaves(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(("op", "layout", "i"), CASES)
def test_kernel_is_as_torch(op, layout, i):
    args, run = _inputs(layout)[op][i], getattr(ops, op, None) or getattr(attention_ops, op)
    got, want = (_leaves(run(*args, kernel)) for kernel in ("triton", "torch"))
    # Torch leaves no statistics of a sum; that ours are right shows in the norm that reads them.
    for a, b in zip(got[:1] if op == "residual_add" else got, want, strict=op != "residual_add"):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("op", "layout", "i"), CASES)
def test_registration(op, layout, i):
    args = _inputs(layout)[op][i]
    registered = getattr(torch.ops.asyncdiff_fast, op).default
    torch.library.opcheck(registered, (*args, "triton"), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("kernel", ["torch", "flash", "triton"])
def test_attention_reads_a_ring_in_place(kernel):
    """As a patch calls it: queries (b, h, s, d) seen as (b, s, h, d), one segment that views all patches' parts."""
    torch.manual_seed(0)
    key, value = key_value(torch.randn(21, 2, 2, 3, 16))
    q = torch.randn(2, 3, 5, 16)
    want = F.scaled_dot_product_attention(q, *(x.transpose(1, 2).contiguous() for x in (key, value)))
    args = (q.transpose(1, 2), [key], [value], 0.25, kernel)
    with SeenOps(of_activations=False) as names:
        got = attention_ops.attention(*args)
    torch.testing.assert_close(got.transpose(1, 2), want, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous() and "aten::cat" not in names.names
    registered = torch.ops.asyncdiff_fast.attention.default
    torch.library.opcheck(registered, args, test_utils=("test_schema", "test_faketensor"))


def test_every_op_is_registered():
    chosen = {"patch_statistics", "patch_group_norm", "patch_rows", "whole_attention", "joined_projections"}
    assert set(_inputs()) | chosen == set(registry.KERNELS)
    assert all(names[0] == "torch" for names in registry.KERNELS.values())
    # Of one segment on one device torch has what there is, and of matrix products.
    assert {op for op, names in registry.KERNELS.items() if "triton" not in names} == {
        "whole_attention",
        "joined_projections",
    }


def test_tracers_see_the_op_and_others_go_straight_to_the_kernel():
    x = torch.randn(2, 3, 8)
    with SeenOps(of_activations=False) as names:
        ops.geglu(x, "triton")
        ops.geglu(x, "torch")
    assert names.names[0] == "asyncdiff_fast::geglu"
    assert "asyncdiff_fast::geglu" not in names.names[1:] and "aten::gelu" in names.names
