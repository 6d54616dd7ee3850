"""Steps side by side on every kind of pipeline: the rule on every rank, exact in warm-up, as before once unpatched."""

import functools

import numpy as np
import pytest
import ranks
import steps_oracle
import tiny_pipelines

import asyncdiff_fast

TWO_CALLS = {"wan", "qwenimage"}
# Tiny random models change much between steps: all lengths come up, and none is always the longest.
STEPS, TOLERANCE = 14, 0.15


def _draw(pipe, name, **changes):
    return tiny_pipelines.generate(pipe, name, steps=STEPS, **changes)


def _family(name, rank, num_ranks):
    """One rank, one family: differences of pictures, by what was compared; the rule is computed on rank 0."""
    pipe = tiny_pipelines.build(name)
    denoiser = tiny_pipelines.denoiser(pipe)
    plain = _draw(pipe, name)
    untouched = set(vars(denoiser))

    asyncdiff_fast.patch(pipe, parallel_steps=num_ranks, warmup_steps=100, timeout_s=60)
    exact = _draw(pipe, name)
    asyncdiff_fast.unpatch(pipe)

    runtime = asyncdiff_fast.patch(pipe, parallel_steps=num_ranks, tolerance=TOLERANCE, timeout_s=60)
    first = _draw(pipe, name)
    stats = runtime.stats()
    # Another seed, and another number of steps, and no reset.
    tiny_pipelines.generate(pipe, name, seed=1, steps=6)
    second = _draw(pipe, name)
    asyncdiff_fast.unpatch(pipe)
    after = _draw(pipe, name)

    simulated, lengths = first, None
    if rank == 0:
        with steps_oracle.Simulation(pipe.scheduler, num_ranks, 2, TOLERANCE, lambda: loop_length(pipe)) as rule:
            simulated = _draw(pipe, name)
        lengths = rule.lengths
    return {
        "exact": float(np.abs(exact - plain).max()),
        "after": float(np.abs(after - plain).max()),
        "again": float(np.abs(second - first).max()),
        "rule": float(np.abs(simulated - first).max()),
        "stale": float(np.abs(first - plain).max()),
        "left": set(vars(denoiser)) - untouched,
        "steps": stats["steps"],
        "lengths": lengths,
        "picture": first,
    }


def loop_length(pipe):
    """Steps of the loop under way."""
    return getattr(pipe, "_num_timesteps", None) or len(pipe.scheduler.timesteps)


def _families(rank, num_ranks):
    return {name: _family(name, rank, num_ranks) for name in tiny_pipelines.NAMES}


@functools.cache
def families(num_ranks):
    return ranks.run(num_ranks, _families, num_ranks, timeout=590)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "num_ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive), pytest.param(4, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("name", tiny_pipelines.NAMES)
def test_family(name, num_ranks):
    results = [rank[name] for rank in families(num_ranks)]
    lengths = results[0]["lengths"]
    assert max(lengths) > 1, "the case must have blocks"
    for rank, result in enumerate(results):
        assert result["exact"] == 0, "all steps warm-up must give the unpatched picture"
        assert result["after"] == 0, "unpatch must give the unpatched picture bit for bit"
        assert not result["left"], "unpatch must leave no attribute behind"
        assert result["again"] == 0, "a later generation must not see an earlier one"
        assert result["rule"] <= 1e-5, "blocks must follow the rule"
        assert result["stale"] > 1e-4, "the test must be able to tell predicted from exact"
        assert np.array_equal(result["picture"], results[0]["picture"]), "every rank must return the same picture"
        steps, calls = result["steps"], 2 if name in TWO_CALLS else 1
        blocks = [n for n in lengths if n > 1]
        assert steps["exact_steps"] == lengths.count(1) and steps["blocks"] == len(blocks)
        assert steps["evaluations"] == calls * (lengths.count(1) + sum(rank < n for n in blocks))
