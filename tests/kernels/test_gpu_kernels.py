"""Every kernel on a real GPU, compiled: what the interpreter cannot show.

Races, masks that read mapped memory, pipelining, tensor cores, layouts of real sizes.
"""

import itertools
import os
from pathlib import Path

import pytest
import torch
from norm_cases import CASES, EPS, inputs
from norm_oracle import assert_near, group_norm_oracle
from ring_views import key_value

from asyncdiff_fast.fused import attention_ops, ops, registry
from asyncdiff_fast.fused.choice import KernelChoice

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rounding of the result; float32 leaves room for sums in another order, and for x·a + b, which alone takes 4e-6.
TOLERANCE = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def on_device(x):
    """Tensors of a tree of dicts, lists and tuples on the GPU, laid out as before."""
    if isinstance(x, torch.Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)
    if isinstance(x, dict):
        return {name: on_device(value) for name, value in x.items()}
    return type(x)(map(on_device, x)) if isinstance(x, list | tuple) else x


def near(got, want, dtype):
    assert got.dtype == dtype and got.shape == want.shape
    error = ((got.double() - want.double()).abs() / want.double().abs().clamp(min=1)).max().item()
    assert error <= TOLERANCE[dtype], error


# GroupNorm and halo rows.


@pytest.mark.parametrize("launches", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_group_norm(case, launches, monkeypatch):
    from asyncdiff_fast.kernels import group_norm, tuning

    monkeypatch.setattr(tuning, "GROUP_NORM_SMALL_BYTES", dict.fromkeys((True, False), 2**40 * (launches == 1)))
    x, weight, bias, keywords = inputs(case)
    want, _, stats = group_norm_oracle(x, weight, bias, case.groups, EPS, **keywords)
    if case.tokens:
        want = want.flatten(2).transpose(1, 2)
    x, weight, bias, keywords = on_device([x, weight, bias, keywords])
    calls = [group_norm.group_norm(x, weight, bias, case.groups, EPS, tokens=case.tokens, **keywords) for _ in range(2)]
    assert_near(calls[0][0].cpu(), want, case.dtype)
    assert_near(calls[0][1].cpu(), stats, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*calls, strict=True)), "must repeat bit for bit"


# SDXL at 1024 pixels whole and in 8 patches, a level of 3840 pixels, a width that 16 does not divide.
SHAPES = [(2, 320, 128, 128), (1, 1280, 4, 32), (1, 640, 240, 240), (1, 2560, 15, 120), (1, 960, 61, 77)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_group_norm_of_real_sizes(shape, layout, dtype):
    from asyncdiff_fast.kernels import group_norm
    from asyncdiff_fast.kernels.reference import group_norm_reference

    n, c = shape[:2]
    torch.manual_seed(0)
    x = (torch.randn(shape, device=DEVICE) * 2 + 30).to(dtype).to(memory_format=layout)
    weight, bias, temb = (torch.randn(size, device=DEVICE, dtype=dtype) for size in (c, c, (n, c)))
    halo = dict(halo=(1, 1), above=x[:, :, -1:], below=x[:, :, :1])
    borders = [torch.empty_like(x[:, :, :1]) for _ in range(4)]
    for kwargs in ({}, halo | dict(top=borders[0], bottom=borders[1])):
        got = group_norm.group_norm(x, weight, bias, 32, 1e-5, act="silu", temb=temb, **kwargs)
        again = group_norm.group_norm(x, weight, bias, 32, 1e-5, act="silu", temb=temb, **kwargs)
        kwargs |= dict(zip(("top", "bottom"), borders[2:], strict=True)) if kwargs else {}
        want = group_norm_reference(x.double(), weight.double(), bias.double(), 32, 1e-5, act="silu",
                                    temb=temb.double(), **_double(kwargs))  # fmt: skip
        near(got[0], want[0], dtype)
        torch.testing.assert_close(got[1].double(), want[1].double(), rtol=1e-4, atol=1e-4)
        assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])
    near(borders[0], got[0][:, :, 1:2], dtype)
    near(borders[1], got[0][:, :, -2:-1], dtype)


def _double(kwargs):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_residual_and_halo(layout, dtype):
    from asyncdiff_fast.kernels import group_norm, halo, reference

    torch.manual_seed(0)
    h, shortcut = (torch.randn(2, 640, 33, 48, device=DEVICE).to(dtype).to(memory_format=layout) for _ in range(2))
    bias = torch.randn(640, device=DEVICE, dtype=dtype)
    y, partials = group_norm.residual_partials(h, shortcut, bias=bias, scale=0.5)
    want, _ = reference.residual_partials_reference(h.double(), shortcut.double(), bias=bias.double(), scale=0.5)
    near(y, want, dtype)
    torch.testing.assert_close(partials, reference.group_norm_partials_reference(y), rtol=1e-3, atol=1e-4)
    rows = [torch.empty_like(h[:, :, :1]) for _ in range(2)]
    padded = halo.pad_rows(h, (1, 1), above=shortcut[:, :, -1:], top=rows[0], bottom=rows[1])
    assert torch.equal(padded, reference.pad_rows_reference(h, (1, 1), above=shortcut[:, :, -1:]))
    assert torch.equal(rows[0], h[:, :, :1]) and torch.equal(rows[1], h[:, :, -1:])


# Attention.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [16, 32, 40, 64, 80, 128, 160])
@pytest.mark.parametrize("lengths", [(512, (4096,)), (77, (333, 129, 1)), (1, (1,)), (130, (77, 0, 200))])
def test_attention(lengths, head_size, dtype):
    from asyncdiff_fast.kernels import attention
    from asyncdiff_fast.kernels.reference_attention import attention_reference

    torch.manual_seed(0)
    s_q, keys = lengths
    q = torch.randn(2, s_q, 3, head_size, device=DEVICE, dtype=dtype)
    segments = [[torch.randn(2, s, 3, head_size, device=DEVICE, dtype=dtype) for _ in "kv"] for s in keys]
    want, want_lse = attention_reference(q.double(), [[x.double() for x in kv] for kv in segments], return_lse=True)
    ways = (False, True) if head_size & (head_size - 1) == 0 and dtype is not torch.float32 else (False,)
    for num_splits, ahead in itertools.product((None, 1, 3), ways):
        got, lse = attention.attention(q, segments, return_lse=True, num_splits=num_splits, ahead=ahead)
        again = attention.attention(q, segments, num_splits=num_splits, ahead=ahead)
        assert torch.equal(got, again)
        near(got, want, dtype)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_text_and_image_over_a_ring(dtype):
    from asyncdiff_fast.kernels import attention
    from asyncdiff_fast.kernels.reference_attention import attention_reference

    torch.manual_seed(0)
    ring = torch.randn(600, 2, 2, 3, 64, device=DEVICE, dtype=dtype)
    queries = tuple(torch.randn(2, s, 3, 64, device=DEVICE, dtype=dtype) for s in (77, 256))
    got = attention.attention(queries, [key_value(ring)])
    parts = [[x.double() for x in key_value(part)] for part in ring.split((77, 256, 267))]
    want = attention_reference(tuple(q.double() for q in queries), parts)
    for a, b in zip(got, want, strict=True):
        near(a, b, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_merge(dtype):
    from asyncdiff_fast.kernels import attention_merge
    from asyncdiff_fast.kernels.reference_attention import attention_merge_reference

    torch.manual_seed(0)
    outs = torch.randn(5, 2, 301, 3, 80, device=DEVICE, dtype=dtype)
    lses = torch.randn(5, 2, 3, 301, device=DEVICE) * 8
    near(attention_merge.attention_merge(outs, lses), attention_merge_reference(outs.double(), lses.double()), dtype)


# The ops of a patch.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_patch_ops(layout, dtype):
    from asyncdiff_fast.fused import patch_ops

    torch.manual_seed(0)
    x = (torch.randn(1, 640, 15, 120, device=DEVICE) + 3).to(dtype).to(memory_format=layout)
    weight = torch.rand(640, device=DEVICE).to(dtype)
    parts, row = torch.rand(8, 1, 32, 2, device=DEVICE), x[:, :, :1]
    found = []
    for kernel in ("triton", "torch"):
        top, bottom = (torch.full_like(row, torch.nan) for _ in range(2))
        partials, stats = patch_ops.patch_statistics(x, 32, weight, None, kernel)
        y, own = patch_ops.patch_group_norm(
            x, weight, None, 32, 1e-5, kernel, halo=[1, 1], silu=True, conv_bias=weight, combine="corrected",
            parts=parts, own=3, partials=partials, above=row, top=top, bottom=bottom,
        )  # fmt: skip
        found.append((y, top, bottom, patch_ops.patch_rows(x, [0, 1], None, row, None, None, 1, kernel), stats, own))
    for got, want in zip(*found, strict=True):
        near(got, want, want.dtype)


# Small fusions.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 4096, 640), (1, 77, 1536), (3, 5, 24)])
def test_pointwise(shape, dtype):
    from asyncdiff_fast.kernels import add_norm, pointwise
    from asyncdiff_fast.kernels import reference_pointwise as reference

    torch.manual_seed(0)
    x, residual = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    near(pointwise.geglu(x), reference.geglu_reference(x.double()), dtype)
    near(pointwise.gelu(x), reference.gelu_reference(x.double()), dtype)
    rows = torch.randn(shape[0], 3 * shape[2], device=DEVICE).to(dtype).chunk(3, dim=1)
    for args in ((residual, x, *rows), (residual, None, None, *rows[1:])):
        got = pointwise.gate_residual_adaln(*args)
        want = reference.gate_residual_adaln_reference(*(a if a is None else a.double() for a in args))
        for a, b in zip(got, want, strict=True):
            near(a, b, dtype)
    for weights in ((rows[0][0], rows[1][0]), (None, None)):
        total, normed = add_norm.add_layer_norm(residual, x, *weights)
        near(total, residual.double() + x.double(), dtype)
        # What is normalised is the sum as it was rounded.
        doubled = [a if a is None else a.double() for a in weights]
        want = reference.add_layer_norm_reference(total.double(), torch.zeros_like(total).double(), *doubled)
        near(normed, want[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("head_size", [16, 64, 128])
def test_qk_norm_rope_into_a_ring(head_size, interleaved, dtype):
    from asyncdiff_fast.kernels import qk_norm_rope
    from asyncdiff_fast.kernels.reference_pointwise import qk_norm_rope_reference

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 257, 9, head_size, device=DEVICE).to(dtype).chunk(3, dim=2)
    angles = torch.randn(257, head_size // 2, device=DEVICE)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    weights = [torch.randn(head_size, device=DEVICE).to(dtype) for _ in "qk"]
    ring = torch.zeros(357, 2, 2, 3, head_size, device=DEVICE, dtype=dtype)
    rope = dict(cos=angles.cos(), sin=angles.sin(), interleaved=interleaved)
    keys, values = key_value(ring[100:])
    got = qk_norm_rope.qk_norm_rope(q, k, v, q_weight=weights[0], k_weight=weights[1], k_out=keys, v_out=values, **rope)
    want = qk_norm_rope_reference(
        *(x.double() for x in (q, k, v)), q_weight=weights[0].double(), k_weight=weights[1].double(), **rope
    )
    for a, b in zip(got, want, strict=True):
        near(a, b, dtype)
    assert torch.equal(keys, got[1]) and torch.equal(values, v)
    assert not ring[:100].any()


# The choice between implementations.


@pytest.fixture
def choices(tmp_path, monkeypatch):
    """A cache of its own for measured choices."""
    monkeypatch.setenv("ASYNCDIFF_FAST_CACHE", str(tmp_path))


@pytest.mark.usefixtures("choices")
@torch.no_grad()
def test_measured_choice():
    choice = KernelChoice("auto", _Alone())
    assert choice.active
    x = torch.randn(1, 320, 256, 256, device=DEVICE).half()
    weight = torch.ones(320, device=DEVICE).half()

    def run(kernel):
        return ops.group_norm(x, weight, weight, 32, 1e-5, True, None, None, None, None, None, kernel)

    kernel = choice.pick("group_norm", x, (), run)
    [file] = Path(os.environ["ASYNCDIFF_FAST_CACHE"]).iterdir()
    assert kernel in registry.KERNELS["group_norm"] and kernel in file.read_text()
    # Kept: nothing runs the second time.
    assert KernelChoice("auto", _Alone()).pick("group_norm", x, (), None) == kernel
    q = torch.randn(2, 1024, 10, 64, device=DEVICE).half()
    keys = torch.randn(2, 4096, 10, 64, device=DEVICE).half()
    chosen = choice.pick(
        "attention", q, ((4096,),), lambda kernel: attention_ops.attention(q, [keys], [keys], 0.125, kernel)
    )
    want = attention_ops.attention(q, [keys], [keys], 0.125, "torch")
    torch.testing.assert_close(attention_ops.attention(q, [keys], [keys], 0.125, chosen), want, rtol=2e-2, atol=2e-3)


class _Alone:
    """A world of one rank."""

    rank, size = 0, 1

    def gather(self, value, what):
        return [value]

    def broadcast(self, value, what):
        return value
