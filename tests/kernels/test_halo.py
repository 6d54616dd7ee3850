"""Border rows by the reference; the kernels meet the same checks in `interpreter/`."""

import norm_checks as checks
import pytest
from test_group_norm import OPS


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize(
    ("halo", "edge"), [((1, 1), ""), ((1, 1), "above"), ((1, 0), ""), ((2, 1), "below"), ((0, 0), "")]
)
def test_pad_rows(layout, upsample, halo, edge):
    checks.check_pad(OPS, layout, upsample, halo, edge)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_pack_rows(layout):
    checks.check_pack(OPS, layout)
