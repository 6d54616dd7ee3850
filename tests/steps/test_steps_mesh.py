"""Steps side by side with halves of guidance and with exact patches; and what it is not combined with."""

import functools

import numpy as np
import pytest
import ranks
import tiny_pipelines

import asyncdiff_fast

TOLERANCE, STEPS = 0.2, 10
# name: pipeline, what each call is shared among; wan calls twice, sd15 once with both halves
CASES = {
    "halves of a batch": ("sd15", {"cfg_parallel": True}),
    "halves in two calls": ("wan", {"cfg_parallel": True}),
    "patches": ("sd15", {"num_patches": 2, "exchange": "sync"}),
    "patches of a transformer": ("pixart", {"num_patches": 2, "exchange": "sync"}),
}


def _cases(rank):
    found = {}
    for case, (name, options) in CASES.items():
        pipe = tiny_pipelines.build(name)
        plain = tiny_pipelines.generate(pipe, name, steps=STEPS)
        shared = {"parallel_steps": 2, "tolerance": TOLERANCE, "timeout_s": 60}
        runtime = asyncdiff_fast.patch(pipe, **shared, **options)
        pictures = [tiny_pipelines.generate(pipe, name, steps=STEPS) for _ in range(2)]
        stats, plan = runtime.stats(), str(runtime.plan)
        asyncdiff_fast.unpatch(pipe)
        found[case] = pictures, plain, stats["steps"], plan, tiny_pipelines.generate(pipe, name, steps=STEPS)
    return found


def _steps_alone(rank):
    found = {}
    for case, (name, _) in CASES.items():
        pipe = tiny_pipelines.build(name)
        asyncdiff_fast.patch(pipe, parallel_steps=2, tolerance=TOLERANCE, timeout_s=60)
        found[case] = tiny_pipelines.generate(pipe, name, steps=STEPS)
        asyncdiff_fast.unpatch(pipe)
    return found


@functools.cache
def cases():
    return ranks.run(4, _cases, timeout=390), ranks.run(2, _steps_alone, timeout=190)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
def test_each_call_is_shared_exactly(case):
    everyone, alone = cases()
    for found in everyone:
        (first, second), plain, stats, plan, after = found[case]
        assert np.array_equal(first, everyone[0][case][0][0]) and np.array_equal(first, second)
        assert np.abs(first - alone[0][case]).max() <= 2e-4 and np.array_equal(after, plain)
        assert stats["blocks"] > 0 and not stats["exact_because"]
        assert "2 steps side by side" in plan and ("patches" in plan) == ("patches" in case)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"num_stages": 2}, "steps side by side and stages are not combined yet"),
        ({"num_patches": 2}, 'pass exchange="sync"'),
        ({"parallel_steps": 0}, "parallel_steps must be an integer of at least 1: got parallel_steps=0"),
        ({"parallel_steps": True}, "parallel_steps must be an integer"),
    ],
)
def test_refused(options, text):
    with pytest.raises(ValueError, match=text):
        asyncdiff_fast.Config(**{"parallel_steps": 2} | options)


def test_world_size():
    config = asyncdiff_fast.Config(parallel_steps=3, cfg_parallel=True, num_patches=2, exchange="sync")
    assert config.world_size == 12 and config.warmup_steps == 2
    assert asyncdiff_fast.Config().warmup_steps == 4 and asyncdiff_fast.Config(warmup_steps=1).warmup_steps == 1
