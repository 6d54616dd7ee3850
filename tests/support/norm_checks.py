"""What GroupNorm of a patch must do, for the reference and for the kernels alike: `ops` has the functions of either."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from norm_cases import EPS, inputs
from norm_oracle import assert_near, group_norm_oracle, laid_out, padded, stats_of


def check_case(ops, case):
    """Result, own statistics and packed border rows against the oracle; nothing unwritten, nothing else written."""
    x, weight, bias, keywords = inputs(case)
    want, inner, stats = group_norm_oracle(x, weight, bias, case.groups, EPS, **keywords)
    borders = {}
    if x.ndim == 4:
        shape = (*x.shape[:2], 1, x.shape[3])
        borders = {
            name: laid_out(torch.full(shape, torch.nan, dtype=x.dtype), case.layout) for name in ("top", "bottom")
        }
    y, own = ops.group_norm(x, weight, bias, case.groups, EPS, tokens=case.tokens, **keywords, **borders)
    if case.tokens:
        want = want.flatten(2).transpose(1, 2)
    elif x.ndim == 4 and x.shape[1] > 1 and x.shape[2] * x.shape[3] > 1:
        assert (y.stride(1) == 1) == (case.layout == "channels_last")
    assert y.dtype == x.dtype
    assert_near(y, want, x.dtype)
    assert_near(own, stats, torch.float32)
    if borders:
        assert_near(borders["top"], inner[:, :, :1], x.dtype)
        assert_near(borders["bottom"], inner[:, :, -1:], x.dtype)
    again = ops.group_norm(x, weight, bias, case.groups, EPS, tokens=case.tokens, **keywords, **borders)
    assert torch.equal(y, again[0]) and torch.equal(own, again[1])


def check_views(ops):
    """Rows of a larger tensor are read, and rows of a larger tensor written, where they lie."""
    whole = torch.randn(2, 12, 9, 8)
    for layout in ("contiguous", "channels_last"):
        x = laid_out(whole, layout)[:, :, 2:7]
        buffer = laid_out(torch.full((2, 12, 11, 8), torch.nan), layout)
        want, _, _ = group_norm_oracle(x, None, None, 3, EPS, halo=(1, 1))
        y, _ = ops.group_norm(x, None, None, 3, EPS, halo=(1, 1), out=buffer[:, :, 2:9])
        assert y.data_ptr() == buffer[:, :, 2:9].data_ptr()
        assert_near(buffer[:, :, 2:9], want, torch.float32)
        assert buffer[:, :, :2].isnan().all() and buffer[:, :, 9:].isnan().all()


def check_statistics(ops, dtype, mean, std):
    """Mean within 1e-5 of the deviation and variance within 1e-5 of float64, of the values as rounded to the dtype."""
    make = torch.Generator().manual_seed(1)
    x = (torch.randn(1, 20, 24, 40, generator=make) * std + mean).to(dtype)
    grouped = x.double().reshape(1, 2, -1)
    var = grouped.var(dim=2, correction=0)
    _, stats = ops.group_norm(x, None, None, 2, EPS)
    assert ((stats[..., 1] - var) / var).abs().max() < 1e-5
    assert ((stats[..., 0] - grouped.mean(dim=2)) / var.sqrt()).abs().max() < 1e-5


def check_outlier(ops):
    """One huge value where the shift is taken does not spoil the variance."""
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    x[:, :, 0, 0] = 1e4
    var = x.double().reshape(1, 2, -1).var(dim=2, correction=0)
    _, stats = ops.group_norm(x, None, None, 2, EPS)
    assert ((stats[..., 1] - var) / var).abs().max() < 1e-5


split_images = st.fixed_dictionaries(
    {
        "rows": st.lists(st.integers(1, 4), min_size=1, max_size=4),
        "width": st.sampled_from((1, 5, 8)),
        "groups": st.sampled_from((1, 2, 3)),
        "group_channels": st.sampled_from((1, 2, 5)),
        "layout": st.sampled_from(("contiguous", "channels_last")),
        "seed": st.integers(0, 99),
    }
)


def check_patches_are_the_image(ops, rows, width, groups, group_channels, layout, seed):
    """Synchronous patches of any heights, with halo rows packed by one and read by the next, give the image's norm."""
    make = torch.Generator().manual_seed(seed)
    c = groups * group_channels
    image = laid_out(
        torch.randn(2, c, sum(rows), width, generator=make) + torch.rand(c, generator=make)[:, None, None], layout
    )
    weight, bias = torch.rand(c, generator=make), torch.rand(c, generator=make)
    want = F.pad(F.silu(F.group_norm(image.double(), groups, weight.double(), bias.double(), EPS)), (0, 0, 1, 1))
    patches = image.split(rows, dim=2)
    partials = [ops.group_norm_partials(patch) for patch in patches]
    spatial = [patch.shape[2:] for patch in patches]
    locals_ = [ops.group_norm_merge(p, s, None, None, groups, EPS) for p, s in zip(partials, spatial, strict=True)]
    parts = torch.stack([stats for _, stats in locals_])
    shares = torch.tensor(rows) / sum(rows)
    tops, bottoms = ([torch.full((2, c, 1, width), torch.nan) for _ in rows] for _ in range(2))
    keywords = {"act": "silu", "mode": "sync", "parts": parts, "shares": shares}
    for idx, patch in enumerate(patches):
        ops.group_norm(
            patch, weight, bias, groups, EPS, own=idx, top=tops[idx], bottom=bottoms[idx], partials=partials[idx],
            **keywords,
        )  # fmt: skip
    first = 0
    for idx, patch in enumerate(patches):
        above = bottoms[idx - 1] if idx else None
        below = tops[idx + 1] if idx + 1 < len(rows) else None
        y, _ = ops.group_norm(
            patch, weight, bias, groups, EPS, own=idx, halo=(1, 1), above=above, below=below, **keywords
        )
        assert_near(y, want[:, :, first : first + rows[idx] + 2], torch.float32)
        first += rows[idx]


def check_modes_agree(ops, rows, width, groups, group_channels, layout, seed):
    """With parts of this very step all modes are one, and an order of the parts is as good as any other."""
    # Of one element or two alike there is no deviation to divide by: 1 / √eps would magnify what rounding leaves.
    assume(sum(rows) * width * group_channels >= 8)
    make = torch.Generator().manual_seed(seed)
    image = laid_out(torch.randn(2, groups * group_channels, sum(rows), width, generator=make) * 2 + 3, layout)
    patches = image.split(rows, dim=2)
    parts, shares = torch.stack([stats_of(patch, groups) for patch in patches]), torch.tensor(rows) / sum(rows)
    order = torch.randperm(len(rows), generator=make)
    own = seed % len(rows)
    mixed = {"parts": parts[order], "shares": shares[order], "own": order.tolist().index(own)}
    want, _, _ = group_norm_oracle(image, None, None, groups, EPS)
    first = sum(rows[:own])
    for mode in ("sync", "stale", "corrected"):
        for given in ({"parts": parts, "shares": shares, "own": own}, mixed):
            y, _ = ops.group_norm(patches[own], None, None, groups, EPS, mode=mode, **given)
            assert_near(y, want[:, :, first : first + rows[own]], torch.float32)


def check_no_rows(ops):
    """A patch without rows sends finite statistics, which count for nothing, and still gets its neighbours' rows."""
    image = torch.randn(2, 12, 5, 7, generator=torch.Generator().manual_seed(7))
    empty, row = image[:, :, :0], image[:, :, :1]
    partials = ops.group_norm_partials(empty)
    for y, stats in (
        ops.group_norm(empty, None, None, 3, EPS, halo=(1, 1), above=row),
        (None, ops.group_norm_merge(partials, (0, 7), None, None, 3, EPS)[1]),
    ):
        assert not stats.any()
        assert y is None or (torch.equal(y[:, :, :1], row) and not y[:, :, 1:].any() and y.shape[2] == 2)
    parts = torch.stack((stats_of(image, 3), torch.zeros(2, 3, 2)))
    shares = torch.tensor((1.0, 0.0))
    y, _ = ops.group_norm(image, None, None, 3, EPS, mode="sync", parts=parts, shares=shares)
    assert_near(y, F.group_norm(image.double(), 3, eps=EPS), torch.float32)


def check_negative_variance(ops):
    """A correction that would make the variance negative leaves the own fresh one."""
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(4))
    parts = torch.zeros(2, 1, 2, 2)
    parts[1, ..., 1] = 100.0
    y, stats = ops.group_norm(x, None, None, 2, 0.0, mode="corrected", parts=parts, own=1)
    mean = stats[..., 0] + parts[..., 0].mean(dim=0)
    want = (x.double().reshape(1, 2, -1) - mean[..., None]) / stats[..., 1:].double().sqrt()
    assert_near(y, want.reshape(x.shape), torch.float32)


def check_residual(ops, dtype, layout):
    """The sum is right, and its partials are those of the stored sum; joined partials are those of joined tensors."""
    make = torch.Generator().manual_seed(5)
    h, shortcut = (laid_out(torch.randn(2, 12, 17, 23, generator=make).to(dtype), layout) for _ in range(2))
    bias = torch.randn(12, generator=make).to(dtype)
    y, partials = ops.residual_partials(h, shortcut, bias=bias, scale=0.5)
    want = (h.double() + bias.double()[:, None, None] + shortcut.double()) * 0.5
    assert y.dtype == dtype and y.stride() == h.stride()
    assert_near(y, want, dtype)
    assert torch.equal(partials, ops.group_norm_partials(y))
    plain, _ = ops.residual_partials(h, shortcut, out=torch.full_like(h, torch.nan))
    assert_near(plain, h.double() + shortcut.double(), dtype)
    joined = torch.cat((y, h), dim=1)
    both = torch.cat((partials, ops.group_norm_partials(h)), dim=3)
    normed, stats = ops.group_norm(joined, None, None, 3, EPS, partials=both)
    want, _, want_stats = group_norm_oracle(joined, None, None, 3, EPS)
    assert_near(normed, want, dtype)
    assert_near(stats, want_stats, torch.float32)


def check_pad(ops, layout, upsample, halo, edge):
    """Rows are moved, never changed: bit-equal to plain indexing."""
    make = torch.Generator().manual_seed(6)
    x = laid_out(torch.randn(2, 10, 4, 9, generator=make).to(torch.bfloat16), layout)
    rows = {
        name: laid_out(torch.randn(2, 10, -(-count // upsample), 9, generator=make).to(x.dtype), layout)
        for name, count in zip(("above", "below"), halo, strict=True)
        if count and name != edge
    }
    top, bottom = (torch.full((2, 10, count, 9), torch.nan, dtype=x.dtype) for count in (1, 2))
    y = ops.pad_rows(x, halo, upsample=upsample, top=top, bottom=bottom, **rows)
    assert torch.equal(y.double(), padded(x.double(), halo, rows.get("above"), rows.get("below"), upsample))
    assert torch.equal(top, x[:, :, :1]) and torch.equal(bottom, x[:, :, -2:])


def check_pack(ops, layout):
    """Both borders, one alone, and borders that overlap in a patch of one row."""
    for height in (1, 5):
        x = laid_out(torch.randn(2, 10, height, 9), layout)
        count = min(2, height)
        top, bottom = (laid_out(torch.full((2, 10, rows, 9), torch.nan), layout) for rows in (count, 1))
        ops.pack_rows(x, top=top, bottom=bottom)
        assert torch.equal(top, x[:, :, :count]) and torch.equal(bottom, x[:, :, -1:])
        bottom.fill_(torch.nan)
        ops.pack_rows(x, bottom=bottom)
        assert torch.equal(bottom, x[:, :, -1:])


def check_addresses_beyond_32_bits(ops, path):
    """A second sample that lies more than 2³¹ elements after the first is found; the file between is a hole."""
    storage = torch.from_file(str(path), shared=True, size=2**31 + 64, dtype=torch.float16)
    x = storage.as_strided((2, 4, 2, 8), (2**31, 16, 8, 1))
    x.copy_(torch.randn(2, 4, 2, 8))
    y, _ = ops.group_norm(x, None, None, 2, EPS, out=torch.full((2, 4, 2, 8), torch.nan, dtype=x.dtype))
    assert_near(y, group_norm_oracle(x, None, None, 2, EPS)[0], x.dtype)


X = torch.zeros(2, 12, 4, 6)
PARTS = torch.zeros(3, 2, 4, 2)
BAD = [
    ({"num_groups": 5}, "num_groups must divide the channels: got 12 channels, 5 groups"),
    ({"mode": "fresh"}, "mode must be one of"),
    ({"mode": "sync"}, "every mode but 'local' needs parts"),
    ({"parts": PARTS}, "'local' takes none"),
    ({"mode": "sync", "parts": PARTS.half()}, "contiguous float32"),
    ({"mode": "sync", "parts": PARTS, "own": 3}, "own=3"),
    ({"mode": "sync", "parts": PARTS, "shares": torch.ones(2)}, r"shares must be \(3,\)"),
    ({"act": "gelu"}, "act must be one of"),
    ({"temb": torch.zeros(12)}, r"temb must be \(2, 12\)"),
    ({"scale": torch.zeros(2, 12)}, "scale and shift must be given together"),
    ({"halo": (1, 1), "above": torch.zeros(2, 12, 1, 5)}, r"above must be rows \(2, 12, 1, 6\)"),
    ({"top": torch.zeros(2, 12, 5, 6)}, r"top must be rows \(2, 12, 4, 6\)"),
    ({"halo": (1, 1), "tokens": True}, "needs halo"),
    ({"halo": (0, -1)}, "halo rows are counts"),
    ({"upsample": 3}, "upsample must be 1 or 2"),
    ({"out": torch.zeros(2, 12, 5, 6)}, r"out must be \(2, 12, 4, 6\)"),
    ({"x": torch.zeros(2, 12, 4, 8)[..., :6]}, "dense rows"),
    ({"x": torch.zeros(2, 12)}, "1 to 3 spatial sizes"),
    ({"partials": torch.zeros(2, 2, 2, 12)}, r"contiguous \(n, 1, 2, c\)"),
]


def check_refused(ops, changed, message):
    arguments = {"x": X, "weight": None, "bias": None, "num_groups": 4, "eps": EPS} | changed
    with pytest.raises(ValueError, match=message):
        ops.group_norm(**arguments)
