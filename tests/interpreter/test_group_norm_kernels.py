"""The GroupNorm kernels in Triton's interpreter, held to the same float64 oracle as their reference."""

from types import SimpleNamespace

import norm_checks as checks
import pytest
import torch
from asyncdiff_fast.kernels import group_norm, tuning
from hypothesis import HealthCheck, given, settings
from norm_cases import CASES, HALF
from norm_oracle import laid_out

OPS = SimpleNamespace(**{name: getattr(group_norm, name) for name in group_norm.__all__})


@pytest.fixture(params=[1, 3], ids=["one launch", "three"])
def launches(request, monkeypatch):
    """Each way to the same result, whatever the size of a group."""
    monkeypatch.setattr(tuning, "GROUP_NORM_SMALL_BYTES", dict.fromkeys((True, False), 2**40 * (request.param == 1)))


@pytest.mark.parametrize(
    ("shape", "layout", "launches"),
    [
        ((1, 40, 24, 24), "contiguous", 1),
        ((1, 40, 24, 24), "channels_last", 3),
        ((1, 8, 4, 4), "channels_last", 1),
        ((1, 8, 192, 192), "contiguous", 3),
    ],
)
def test_launches(shape, layout, launches, monkeypatch):
    """One where a group is small, and where channels are adjacent very small."""
    seen = []

    def watched(name, run):
        return lambda *args, **keywords: (seen.append(name), run(*args, **keywords))[1]

    for name in ("small", "partials", "merge", "apply"):
        launcher = f"group_norm_{name}"
        monkeypatch.setattr(group_norm, launcher, watched(name, getattr(group_norm, launcher)))
    x = laid_out(torch.randn(shape).half(), layout)
    group_norm.group_norm(x, None, None, 2, 1e-5)
    assert seen == {1: ["small"], 3: ["partials", "merge", "apply"]}[launches]


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    checks.check_case(OPS, case)


@pytest.mark.usefixtures("launches")
def test_views():
    checks.check_views(OPS)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("mean", "std"), [(30, 1), (100, 1), (0, 100), (3000, 100)])
def test_statistics(dtype, mean, std):
    checks.check_statistics(OPS, dtype, mean, std)


@pytest.mark.usefixtures("launches")
def test_outlier():
    checks.check_outlier(OPS)


@pytest.mark.usefixtures("launches")
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(checks.split_images)
def test_patches_are_the_image(drawn):
    checks.check_patches_are_the_image(OPS, **drawn)


@pytest.mark.usefixtures("launches")
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(checks.split_images)
def test_modes_agree(drawn):
    checks.check_modes_agree(OPS, **drawn)


@pytest.mark.usefixtures("launches")
def test_no_rows():
    checks.check_no_rows(OPS)


@pytest.mark.usefixtures("launches")
def test_negative_variance():
    checks.check_negative_variance(OPS)


@pytest.mark.parametrize(("layout", "dtype"), [("contiguous", HALF[0]), ("channels_last", HALF[1])])
def test_residual(dtype, layout):
    checks.check_residual(OPS, dtype, layout)


@pytest.mark.usefixtures("launches")
def test_addresses_beyond_32_bits(tmp_path):
    checks.check_addresses_beyond_32_bits(OPS, tmp_path / "sparse")


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize(("changed", "message"), checks.BAD, ids=[message for _, message in checks.BAD])
def test_refused(changed, message):
    checks.check_refused(OPS, changed, message)
