"""Micro-steps on real ranks, one call after another, beside a plain simulation in one process."""

import functools
import itertools

import pipeline_oracle
import pytest
import ranks
import torch
from oracle_models import MODELS, TIMES, predictions

import asyncdiff_fast
from asyncdiff_fast.prediction.trend import damping

# Of the largest element: rounding, carried on from step to step.
TOLERANCE = 3e-5
# Name, stages, patches, warm-up, options. Text is each patch's own, as the simulation has it.
CASES = [
    *[("unet", 2, 2, 1, dict(group_norm=g)) for g in ("corrected", "stale", "local")],
    ("tall unet", 2, 3, 2, {}),
    ("tall unet", 2, (8, 16), 1, {}),
    *[("pixart", 2, m, 1, {}) for m in (2, 3, 8)],
    *[(name, 2, 3, 1, {}) for name in ("sd3", "flux")],
    ("flux", 2, (5, 1, 10, 8), 1, {}),
    *[(name, 3, 2, 1, {}) for name in ("unet", "pixart", "sd3")],
    ("unet", 2, 2, 1, dict(predict="linear")),
    ("pixart", 2, 4, 2, dict(predict="linear")),
    ("sd3", 2, 3, 1, dict(predict="linear")),
]


@torch.no_grad()
def _patched(rank, cases):
    found = []
    for name, num_stages, patches, warmup_steps, options in cases:
        model = MODELS[name][0]()
        options = options | dict(num_stages=num_stages, pipeline_patches=patches, warmup_steps=warmup_steps)
        runtime = asyncdiff_fast.patch(model, pipeline_text="patch", timeout_s=60, **options)
        found.append((predictions(name)(model), runtime.plan.patches.rows.held, runtime.stats()["compute_calls"]))
        asyncdiff_fast.unpatch(model)
    return found


@functools.cache
def patched(num_stages):
    """[(predictions, rows held, micro-stepped calls) of each case on each rank]"""
    cases = [case for case in CASES if case[1] == num_stages]
    return list(zip(*ranks.run(num_stages, _patched, cases, timeout=250), strict=True))


def _simulated(case, held):
    name, _, _, warmup_steps, options = case
    options = dict(options)
    if options.pop("predict", "none") == "linear":
        # Two layers' hops, steps of one length, as many as where no scheduler tells.
        options["carried"] = damping(len(held) + 2, 25)
    make, _, _, sequences = MODELS[name]
    model = make()
    with torch.no_grad():
        plain = predictions(name)(model)
        with pipeline_oracle.Simulation(model, held, sequences, warmup_steps, **options):
            return predictions(name)(model), plain


def _id(case):
    return "-".join(map(str, [*case[:4], *case[4].values()]))


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_micro_steps_follow_the_rule(case):
    number = [c for c in CASES if c[1] == case[1]].index(case)
    results = patched(case[1])[number]
    simulated, plain = _simulated(case, results[0][1])
    for (mine, _, computed), step in itertools.product(results, range(len(TIMES))):
        error = (mine[step] - simulated[step]).abs().max() / simulated[step].abs().max()
        assert error <= TOLERANCE, f"step {step}: prediction differs by {error:.1e} of its maximum"
        assert computed == len(TIMES) - case[3]
    error = (simulated[-1] - plain[-1]).abs().max() / plain[-1].abs().max()
    assert error > 5 * TOLERANCE, "the case cannot tell displaced from exact"
