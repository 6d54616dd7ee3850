"""The reference GroupNorm of a patch against float64 and torch; the kernels meet the same checks in `interpreter/`."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import norm_checks as checks
import pytest
import torch
import torch.nn.functional as F
from asyncdiff_fast.kernels import reference
from hypothesis import given, settings
from norm_cases import CASES, HALF, RESNET

OPS = SimpleNamespace(**{name.removesuffix("_reference"): function for name, function in vars(reference).items()})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    checks.check_case(OPS, case)


def test_float64_is_the_oracle():
    case = dataclasses.replace(RESNET, dtype=torch.float64, mode="local", bessel=False, shares=None)
    checks.check_case(OPS, case)


@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (1, 12, 3, 5, 6), (2, 12, 9)])
def test_local_is_torch_group_norm(shape):
    x, weight, bias = torch.randn(shape), torch.randn(12), torch.randn(12)
    y, _ = OPS.group_norm(x, weight, bias, 3, 1e-6)
    torch.testing.assert_close(y, F.group_norm(x, 3, weight, bias, 1e-6), rtol=1e-5, atol=1e-5)


def test_parameters_that_want_gradients():
    norm = torch.nn.GroupNorm(3, 12)
    y, _ = OPS.group_norm(torch.randn(2, 12, 5, 7), norm.weight, norm.bias, 3, norm.eps)
    assert not y.requires_grad


def test_views():
    checks.check_views(OPS)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("mean", "std"), [(30, 1), (100, 1), (0, 100), (3000, 100)])
def test_statistics(dtype, mean, std):
    checks.check_statistics(OPS, dtype, mean, std)


def test_outlier():
    checks.check_outlier(OPS)


@settings(max_examples=60, deadline=None)
@given(checks.split_images)
def test_patches_are_the_image(drawn):
    checks.check_patches_are_the_image(OPS, **drawn)


@settings(max_examples=60, deadline=None)
@given(checks.split_images)
def test_modes_agree(drawn):
    checks.check_modes_agree(OPS, **drawn)


def test_no_rows():
    checks.check_no_rows(OPS)


def test_negative_variance():
    checks.check_negative_variance(OPS)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_residual(dtype, layout):
    checks.check_residual(OPS, dtype, layout)


@pytest.mark.parametrize(("changed", "message"), checks.BAD, ids=[message for _, message in checks.BAD])
def test_refused(changed, message):
    checks.check_refused(OPS, changed, message)


def test_reference_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import asyncdiff_fast.kernels.reference"
    subprocess.run([sys.executable, "-c", code], check=True)
