"""Stages that patches pass through, beside halves of guidance and steps side by side."""

import functools

import numpy as np
import pytest
import ranks
import tiny_pipelines
from workers import collect

import asyncdiff_fast

CASES = {
    # How far the pictures, 0..1, may be from exact ones: not at all but for rounding, or in the mean by what is stale
    # or predicted.
    "halves": (dict(cfg_parallel=True, pipeline_patches=2, warmup_steps=9), 1e-3),
    "halves, stale": (dict(cfg_parallel=True, pipeline_patches=2, warmup_steps=1), 0.1),
    "steps": (dict(parallel_steps=2, pipeline_patches=1), 0.1),
    "steps, exact": (dict(parallel_steps=2, pipeline_patches=2, warmup_steps=9), 1e-3),
    "steps, stale": (dict(parallel_steps=2, pipeline_patches=2), 0.1),
}


def _all(rank):
    found, pipe = {}, tiny_pipelines.build("pixart")
    plain = tiny_pipelines.generate(pipe, "pixart", steps=6)
    for case, (options, _) in CASES.items():
        runtime = asyncdiff_fast.patch(pipe, num_stages=2, shard_weights=True, timeout_s=60, **options)
        pictures = [tiny_pipelines.generate(pipe, "pixart", steps=6) for _ in range(2)]
        held = sum(p.untyped_storage().nbytes() for p in tiny_pipelines.denoiser(pipe).parameters())
        stats = runtime.stats()
        asyncdiff_fast.unpatch(pipe)
        found[case] = pictures, plain, held, stats
    found["whole"] = sum(p.untyped_storage().nbytes() for p in tiny_pipelines.denoiser(pipe).parameters())
    return found


@functools.cache
def results():
    return collect(ranks.start(4, _all), 200)


@pytest.mark.parametrize("case", CASES)
def test_pictures(case):
    first = results()[0][case][0][0]
    for rank in results():
        pictures, plain, held, stats = rank[case]
        assert all(np.array_equal(first, picture) for picture in pictures)
        assert np.abs(first - plain).mean() <= CASES[case][1]
        assert held < 0.75 * rank["whole"]
        # Side by side, a rank makes at most half of the calls after two exact steps.
        calls = stats["exact_calls"] + stats["compute_calls"]
        assert "steps" not in case or (calls < 2 * 6) == (case != "steps, exact")
        assert "exact" not in case or stats["compute_calls"] == 0
        assert "stale" not in case or stats["compute_calls"] > 0
