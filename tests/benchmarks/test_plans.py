"""Plans of SDXL at real size stay within their bounds, and the table of plans is made of them."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import plans
import real_models

import asyncdiff_fast

# num_stages: cost of the largest stage over the mean, MB (10^6 bytes) of the cut per call
BOUNDS = {2: (1.01, 13.2), 3: (1.01, 42.0), 4: (1.01, 87.0)}


@functools.cache
def sdxl():
    denoiser = real_models.build("sdxl")
    return denoiser, real_models.inputs("sdxl", denoiser)


@pytest.mark.parametrize("num_stages", BOUNDS)
def test_sdxl_is_even_and_little_crosses(num_stages):
    denoiser, inputs = sdxl()
    plan = asyncdiff_fast.plan(denoiser, inputs, num_stages=num_stages, predict="none")
    row = plans.measured(plan, "sdxl", "searched")
    balance, cut_mb = BOUNDS[num_stages]
    assert row["balance"] <= balance
    assert row["cut_mb"] <= cut_mb
    # (2, 4, 128, 128) in fp16 to each other rank
    assert row["prediction_mb"] == round((num_stages - 1) * 2 * 4 * 128 * 128 * 2 / 1e6, 2)
    assert row["cut_mb"] == pytest.approx(plan.division.cut_bytes / 1e6, abs=0.01)
    assert sum(row["stage_units"]) == row["units"]


def test_published_stages_cost_what_was_published():
    denoiser, inputs = sdxl()
    plan = asyncdiff_fast.plan(denoiser, inputs, stages=plans.published_stages("sdxl", 2), predict="none")
    row = plans.measured(plan, "sdxl", "published")
    assert row["balance"] == pytest.approx(1.12, abs=0.01)
    assert plans.broadcast_mb(plan) == pytest.approx(257, abs=1)
    assert row["cut_mb"] < 10


def test_stride_2_repeats_the_last_stage():
    denoiser, inputs = sdxl()
    one = asyncdiff_fast.plan(denoiser, inputs, num_stages=2, predict="none")
    two = asyncdiff_fast.plan(denoiser, inputs, num_stages=2, stride=2, predict="none")
    assert two.division == one.division
    assert [s for s, _ in two.program(2).sends.items()] == []
    assert two.program(2).computes == one.program(1).computes


def test_table_has_a_row_for_each_plan():
    row = {"model": "M", "num_stages": 2, "split": "searched", "hops": [0, 2], "stage_units": [3, 4], "cut_mb": 1.5}
    lines = plans.table([row, row | {"hops": [1, 1]}]).splitlines()
    assert len(lines) == 4
    assert "| M | 2 | searched |" in lines[2] and "| 0–2 | 3 + 4 |" in lines[2] and "| 1 | 3 + 4 |" in lines[3]
