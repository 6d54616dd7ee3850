"""Displaced steps on real ranks, one after another, beside a plain simulation in one process."""

import functools
import itertools

import patch_oracle
import pytest
import ranks
import torch
from oracle_models import MODELS, TIMES, predictions

import asyncdiff_fast

# Of the largest element: rounding, carried on from step to step.
TOLERANCE = 3e-5
CASES = [
    *[("unet", 2, w, dict(group_norm=g)) for g in ("corrected", "stale", "sync", "local") for w in (1, 2)],
    *[("unet", 2, w, dict(exchange="none")) for w in (1, 2)],
    # Patches that share a row of the coarse resolutions, and patches that do not.
    *[(name, 3, 1, dict(group_norm=g)) for name in ("unet", "tall unet") for g in ("corrected", "stale", "local")],
    ("tall unet", 3, 2, dict(group_norm="sync")),
    ("tall unet", 3, 1, dict(exchange="none")),
    *[(name, n, 1, {}) for name in ("pixart", "sd3", "flux") for n in (2, 3)],
    ("pixart", 2, 2, {}),
    ("sd3", 2, 1, dict(exchange="none")),
]


@torch.no_grad()
def _patched(rank, cases):
    found = []
    for name, num_patches, warmup_steps, options in cases:
        model = MODELS[name][0]()
        options = options | dict(num_patches=num_patches, warmup_steps=warmup_steps, timeout_s=60, predict="none")
        runtime = asyncdiff_fast.patch(model, **options)
        found.append((predictions(name)(model), runtime.plan.rows.held))
        asyncdiff_fast.unpatch(model)
    return found


@functools.cache
def patched(num_patches):
    """[(predictions, held) of each case on each rank]"""
    cases = [case for case in CASES if case[1] == num_patches]
    return list(zip(*ranks.run(num_patches, _patched, cases, timeout=250), strict=True))


def _simulated(case, held):
    name, _, warmup_steps, options = case
    make, _, _, sequences = MODELS[name]
    model = make()
    with torch.no_grad():
        plain = predictions(name)(model)
        with patch_oracle.Simulation(model, held, sequences, warmup_steps, **options):
            return predictions(name)(model), plain


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Each of the simulation's own threads would start as many again."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


def _id(case):
    name, num_patches, warmup_steps, options = case
    return "-".join([name, str(num_patches), str(warmup_steps), *options.values()])


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.exhaustive] * (c[1] > 2), id=_id(c)) for c in CASES]
)
def test_displaced_steps_follow_the_rule(case):
    number = [c for c in CASES if c[1] == case[1]].index(case)
    results = patched(case[1])[number]
    simulated, plain = _simulated(case, results[0][1])
    for (mine, _), step in itertools.product(results, range(len(TIMES))):
        error = (mine[step] - simulated[step]).abs().max() / simulated[step].abs().max()
        assert error <= TOLERANCE, f"step {step}: prediction differs by {error:.1e} of its maximum"
    error = (simulated[-1] - plain[-1]).abs().max() / plain[-1].abs().max()
    assert error > 5 * TOLERANCE, "the case cannot tell displaced from exact"


def test_the_rules_differ():
    """The simulation itself tells the modes apart."""
    held = ((0, 8), (8, 16))
    modes = [dict(group_norm=g) for g in ("corrected", "stale", "sync", "local")] + [dict(exchange="none")]
    runs = [_simulated(("unet", 2, 1, mode), held)[0] for mode in modes]
    for a, b in itertools.combinations(runs, 2):
        assert (a[-1] - b[-1]).abs().max() / b[-1].abs().max() > 5 * TOLERANCE
