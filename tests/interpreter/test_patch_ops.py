"""The ops of a patch: as the reference, as tracers are told, and enough for a residual block in patches."""

import pytest
import tiny_parts
import torch
from diffusers.models.resnet import ResnetBlock2D
from seen_ops import SeenOps

from asyncdiff_fast.fused import ops, patch_ops

GROUPS, EPS = 3, 1e-5


def _rows(*shape):
    return torch.full((2, 12, *shape), torch.nan)


def _calls():
    """{name: (op, positional arguments but the kernel's, keywords)}; the border rows to be written are NaN."""
    make = torch.Generator().manual_seed(0)
    x, above, vector = torch.randn(2, 12, 5, 7), torch.randn(2, 12, 1, 7), torch.randn(12)
    temb, scale, shift = torch.randn(3, 2, 12, generator=make)
    parts = torch.rand(3, 2, GROUPS, 2, generator=make)
    shares = torch.tensor((0.2, 0.5, 0.3))
    norm = (x, vector, vector + 1, GROUPS, EPS)
    borders = dict(top=_rows(1, 7), bottom=_rows(2, 7))
    everything = dict(halo=[1, 1], silu=True, conv_bias=vector, temb=temb, scale=scale, shift=shift, above=above)
    everything |= dict(combine="corrected", parts=parts, own=1, shares=shares, bessel=True, **borders)
    nearest = dict(halo=[1, 1], upsample=2, below=above, combine="stale", parts=parts)
    flat = x.to(memory_format=torch.channels_last)
    statistics = patch_ops.patch_statistics(x, GROUPS, None, None, "torch")[0]
    return {
        "statistics": (patch_ops.patch_statistics, (x, GROUPS, vector, temb), {}),
        "norm": (patch_ops.patch_group_norm, (flat, *norm[1:]), everything),
        "nearest": (patch_ops.patch_group_norm, norm, nearest),
        "partials": (patch_ops.patch_group_norm, norm, dict(combine="sync", parts=parts, partials=statistics)),
        "rows": (patch_ops.patch_rows, (x, [0, 2], None, None, *borders.values(), 1), {}),
    }


@pytest.mark.parametrize("name", _calls())
def test_kernel_is_as_reference(name):
    results = []
    for kernel in ("torch", "triton"):
        torch.manual_seed(0)
        op, args, keywords = _calls()[name]
        made = op(*args, kernel, **keywords)
        written = [x for x in (*args, *keywords.values()) if isinstance(x, torch.Tensor) and x.shape[2:3] < (5,)]
        results.append([*(made if isinstance(made, tuple) else (made,)), *written])
    for got, want in zip(*results, strict=True):
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", _calls())
def test_registration(name):
    op, args, keywords = _calls()[name]
    registered = getattr(torch.ops.asyncdiff_fast, op.__name__).default
    torch.library.opcheck(registered, (*args, "triton"), keywords, test_utils=("test_schema", "test_faketensor"))


class _Patch:
    """A residual block's norms and convolutions on one of several patches; exchanges are done by whoever drives it."""

    def __init__(self, x, own, shares):
        self.h, self.own, self.shares = x, own, shares
        self.top, self.bottom = (x.new_full((*x.shape[:2], 1, x.shape[3]), torch.nan) for _ in range(2))

    def normed(self, norm, parts, around, **given):
        """Write the own border rows, then (when `around` has the neighbours') the result between theirs."""
        borders = dict(top=self.top, bottom=self.bottom)
        if around is not None:
            borders = dict(zip(("above", "below"), around, strict=True), halo=[1, 1])
        return patch_ops.patch_group_norm(
            self.h, norm.weight, norm.bias, norm.num_groups, norm.eps, "triton", silu=True, combine="sync", parts=parts,
            own=self.own, shares=self.shares, **given, **borders,
        )[0]  # fmt: skip


@torch.no_grad()
def test_residual_block_in_patches():
    """Synchronous patches are the whole block, and of torch's ops on activations only its convolutions are left."""
    block = tiny_parts.fill(ResnetBlock2D(in_channels=12, temb_channels=8, groups=3))
    image, temb, rows = torch.randn(2, 12, 9, 7) * 2 + 3, torch.randn(2, 8), (2, 4, 3)
    want = block(image, temb)
    shares, embedded = torch.tensor(rows) / 9, block.time_emb_proj(block.nonlinearity(temb))
    patches = [_Patch(x, i, shares) for i, x in enumerate(image.split(rows, 2))]
    with SeenOps() as names:
        for norm, conv, given in (
            (block.norm1, block.conv1, {}),
            (block.norm2, block.conv2, dict(conv_bias=block.conv1.bias, temb=embedded)),
        ):
            stats = [
                patch_ops.patch_statistics(p.h, norm.num_groups, given.get("conv_bias"), given.get("temb"), "triton")[1]
                for p in patches
            ]
            parts = torch.empty(len(rows), *stats[0].shape)
            for part, own in zip(parts, stats, strict=True):
                part.copy_(own)
            for patch in patches:
                patch.normed(norm, parts, None, **given)
            for i, patch in enumerate(patches):
                around = (patches[i - 1].bottom if i else None, patches[i + 1].top if i + 1 < len(rows) else None)
                y = patch.normed(norm, parts, around, **given)
                patch.h = torch.conv2d(y, conv.weight, None, padding=(0, 1))
        sums = [
            ops.residual_add(p.h, x.contiguous(), block.conv2.bias, block.output_scale_factor, "triton")[0]
            for p, x in zip(patches, image.split(rows, 2), strict=True)
        ]
    torch.testing.assert_close(torch.cat(sums, 2), want, rtol=1e-5, atol=1e-5)
    own = {name for name in names.names if name.startswith("asyncdiff_fast::")}
    assert own == {f"asyncdiff_fast::{name}" for name in ("patch_statistics", "patch_group_norm", "residual_add")}
    assert not set(names.names) & {
        "aten::cat",
        "aten::pad",
        "aten::constant_pad_nd",
        "aten::silu",
        "aten::native_group_norm",
    }
    assert {"aten::convolution", "aten::mkldnn_convolution"} & set(names.names)


@torch.no_grad()
def test_compiled_with_its_writes():
    """A compiled function keeps the op whole, and sees that it writes the border rows."""
    torch._dynamo.reset()
    x, vector = torch.randn(2, 12, 5, 7), torch.randn(12)

    def call(x):
        top = x.new_zeros(2, 12, 1, 7)
        y, stats = patch_ops.patch_group_norm(x * 2, vector, None, GROUPS, EPS, "triton", halo=[1, 0], top=top)
        return y + 1, stats, top

    for got, want in zip(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x), strict=True):
        torch.testing.assert_close(got, want)
    assert call(x)[2].abs().min() > 0
