"""Steps side by side with halves of guidance, patches and stages; and what they are not combined with."""

import functools

import numpy as np
import pytest
import ranks
import tiny_pipelines

import asyncdiff_fast

TOLERANCE, STEPS = 0.2, 10
# Of pictures, 0..1: rounding; and in the mean what is stale.
EXACT, STALE = 2e-4, 0.1
# name: pipeline, what each call is shared among; wan calls twice, sd15 once with both halves
CASES = {
    "halves of a batch": ("sd15", {"cfg_parallel": True}),
    "halves in two calls": ("wan", {"cfg_parallel": True}),
    "patches": ("sd15", {"num_patches": 2, "exchange": "sync"}),
    "patches of a transformer": ("pixart", {"num_patches": 2, "exchange": "sync", "warmup_steps": "auto"}),
    "displaced patches": ("sd15", {"num_patches": 2}),
    "stages": ("sd15", {"num_stages": 2}),
    "stages in two calls": ("wan", {"num_stages": 2}),
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
    for case, (name, options) in CASES.items():
        pipe = tiny_pipelines.build(name)
        warmup = {key: x for key, x in options.items() if key == "warmup_steps"}
        asyncdiff_fast.patch(pipe, parallel_steps=2, tolerance=TOLERANCE, timeout_s=60, **warmup)
        found[case] = tiny_pipelines.generate(pipe, name, steps=STEPS)
        asyncdiff_fast.unpatch(pipe)
    return found


@functools.cache
def cases():
    return ranks.run(4, _cases, timeout=390), ranks.run(2, _steps_alone, timeout=190)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
def test_each_call_is_shared(case):
    everyone, alone = cases()
    stale = case in ("displaced patches", "stages", "stages in two calls")
    for found in everyone:
        (first, second), plain, stats, plan, after = found[case]
        assert np.array_equal(first, everyone[0][case][0][0]) and np.array_equal(first, second)
        difference = np.abs(first - alone[0][case])
        assert EXACT < difference.mean() < STALE if stale else difference.max() <= EXACT
        assert np.array_equal(after, plain)
        assert stats["blocks"] > 0 and not stats["exact_because"]
        assert "2 steps side by side" in plan and ("patches" in plan) == ("patches" in case)
        assert ("stages" in plan) == ("stages" in case)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"num_stages": 2, "stride": 2}, "stride=1 only: got parallel_steps=2, stride=2"),
        ({"num_stages": 2, "time_shift": True}, "time_shift=False only"),
        ({"num_stages": 2, "predict": "linear"}, "pass parallel_steps=1, or leave predict out"),
        ({"num_patches": 2, "exchange": "none"}, "exchange='displaced' or 'sync' only"),
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
