"""Stages that begin the next call before this one is over draw what those that wait draw, to the last bit."""

import functools

import numpy as np
import pytest
import ranks
import tiny_pipelines
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from workers import collect

import asyncdiff_fast

RANKS, STEPS = 3, 7
OPTIONS = dict(num_stages=RANKS, pipeline_patches=4, warmup_steps=1, timeout_s=60)
# The denoiser's calls that come before one is begun ahead: an exact one, one that is foretold, one that is believed.
BEFORE = 3


def _euler(kind):
    def change(pipe):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)

    return change


def _replaced(pipe, step, timestep, tensors):
    return {"latents": tensors["latents"] * 1.5} if step == 3 else {}


def _stopped(pipe, step, timestep, tensors):
    pipe._interrupt = step >= 3
    return {}


# Pipeline, what is changed of it, what its call is given.
CASES = {
    "sd3": ("sd3", None, {}),
    "sd3, sharded": ("sd3", None, {}),
    "sd3, no guidance": ("sd3", None, {"guidance_scale": 1.0}),
    "flux": ("flux", None, {}),
    "pixart, history": ("pixart", None, {}),
    "pixart, scaled": ("pixart", _euler(EulerDiscreteScheduler), {}),
    "pixart, drawn": ("pixart", _euler(EulerAncestralDiscreteScheduler), {}),
    "sd3, replaced": ("sd3", None, {"callback_on_step_end": _replaced}),
    "sd3, stopped": ("sd3", None, {"callback_on_step_end": _stopped}),
}
SAME = ("sd3", "sd3, sharded", "sd3, no guidance", "flux", "pixart, history", "pixart, scaled")


@torch.no_grad()
def _all(rank):
    found = {}
    for case, (name, change, given) in CASES.items():
        pipe = tiny_pipelines.build(name)
        if change is not None:
            change(pipe)
        drawn, shard = [], "sharded" in case
        for run_ahead in (False, True):
            runtime = asyncdiff_fast.patch(pipe, **OPTIONS, run_ahead=run_ahead, shard_weights=shard)
            for _ in range(2):
                drawn.append(tiny_pipelines.generate(pipe, name, steps=STEPS, output_type="latent", **given))
            stats = {name: n for name, n in runtime.stats().items() if name in ("begun_calls", "dropped_calls")}
            asyncdiff_fast.unpatch(pipe)
        found[case] = drawn, stats
    return found


@functools.cache
def results():
    return collect(ranks.start(RANKS, _all), 400)


@pytest.mark.timeout(500)
@pytest.mark.parametrize("case", SAME)
def test_what_is_drawn_is_the_same(case):
    for drawn, stats in (rank[case] for rank in results()):
        assert all(np.array_equal(drawn[0], other) for other in drawn[1:])
        assert stats == {"begun_calls": 2 * (STEPS - BEFORE), "dropped_calls": 0}


def test_a_sampler_that_draws_is_waited_for():
    for drawn, stats in (rank["pixart, drawn"] for rank in results()):
        assert all(np.array_equal(drawn[0], other) for other in drawn[1:])
        assert stats == {"begun_calls": 0, "dropped_calls": 0}


@pytest.mark.parametrize("case, begun, dropped", [("sd3, replaced", 4, 2), ("sd3, stopped", 4, 2)])
def test_a_call_that_does_not_come_is_dropped(case, begun, dropped):
    first = results()[0][case][0]
    for drawn, stats in (rank[case] for rank in results()):
        assert stats == {"begun_calls": begun, "dropped_calls": dropped}
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(drawn, first, strict=True))
        # The call after it is exact, where one comes.
        assert np.array_equal(drawn[2], drawn[3]) and np.abs(drawn[2] - drawn[0]).max() <= 0.05 * np.abs(drawn[0]).max()
