"""The halo kernels in Triton's interpreter."""

import norm_checks as checks
import pytest
from asyncdiff_fast.kernels import halo


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize(
    ("rows", "edge"), [((1, 1), ""), ((1, 1), "above"), ((1, 0), ""), ((2, 1), "below"), ((0, 0), "")]
)
def test_pad_rows(layout, upsample, rows, edge):
    checks.check_pad(halo, layout, upsample, rows, edge)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_pack_rows(layout):
    checks.check_pack(halo, layout)
