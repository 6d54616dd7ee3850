"""Every kind of pipeline on two and three ranks: exact in warm-up, the rule after it, as before once unpatched."""

import functools

import numpy as np
import oracle
import pytest
import ranks
import tiny_pipelines
from sequences import quick

import asyncdiff_fast

TWO_CALLS = {"wan", "qwenimage"}


def _family(rank, name, num_stages):
    """One rank, one family: differences of pictures, by what was compared; from rank 0 also the rule's picture."""
    pipe = tiny_pipelines.build(name)
    denoiser = tiny_pipelines.denoiser(pipe)
    plain = tiny_pipelines.generate(pipe, name)
    untouched = {key: set(vars(m)) for key, m in denoiser.named_modules()}

    asyncdiff_fast.patch(pipe, num_stages=num_stages, warmup_steps=100, timeout_s=60)
    exact = tiny_pipelines.generate(pipe, name)
    asyncdiff_fast.unpatch(pipe)

    runtime = asyncdiff_fast.patch(pipe, num_stages=num_stages, warmup_steps=2, timeout_s=60, predict="none")
    first = tiny_pipelines.generate(pipe, name)
    # Another seed and size in between, and no reset.
    tiny_pipelines.generate(pipe, name, seed=1)
    second = tiny_pipelines.generate(pipe, name)
    stats, plan = runtime.stats(), runtime.plan
    asyncdiff_fast.unpatch(pipe)
    after = tiny_pipelines.generate(pipe, name)

    rule = None
    if rank == 0:
        owner = {u.key: s for u, s in zip(plan.graph.units, plan.division.owner, strict=True)}
        with oracle.Simulation(denoiser, owner, num_stages, 2, 2 if name in TWO_CALLS else 1):
            rule = tiny_pipelines.generate(pipe, name)
    return {
        "exact": float(np.abs(exact - plain).max()),
        "after": float(np.abs(after - plain).max()),
        "again": float(np.abs(second - first).max()),
        "rule": rule,
        "stale": float(np.abs(first - plain).max()),
        "left": [key for key, m in denoiser.named_modules() if set(vars(m)) != untouched[key]],
        "compute_calls": stats["compute_calls"],
        "picture": first,
    }


def _families(rank, num_stages, names):
    return {name: _family(rank, name, num_stages) for name in names}


@functools.cache
def families(num_stages, names):
    return ranks.run(num_stages, _families, num_stages, names, timeout=290)


# Of those on three ranks: a U-Net with skips, one in two streams, one that calls twice, one of time and space.
FEW = ("sdxl", "flux", "wan", "svd")
MORE = tuple(name for name in tiny_pipelines.NAMES if name not in FEW)
CASES = [(n, name) for n in (2, 3) for name in tiny_pipelines.NAMES]


@pytest.mark.parametrize("num_stages, name", quick(CASES, *((n, name) for n, name in CASES if n == 2 or name in FEW)))
def test_family(num_stages, name):
    names = tiny_pipelines.NAMES if num_stages == 2 else FEW if name in FEW else MORE
    results = [rank[name] for rank in families(num_stages, names)]
    for result in results:
        assert result["exact"] <= 1e-5, "all steps warm-up must give the unpatched picture"
        assert result["after"] == 0, "unpatch must give the unpatched picture bit for bit"
        assert not result["left"], "unpatch must leave no attribute behind"
        assert result["again"] == 0, "a later generation must not see an earlier one"
        assert np.abs(results[0]["rule"] - result["picture"]).max() <= 1e-5, "asynchronous steps must follow the rule"
        assert result["stale"] > 1e-4, "the test must be able to tell stale from exact"
        assert result["compute_calls"] == 6 * (2 if name in TWO_CALLS else 1)
        assert np.array_equal(result["picture"], results[0]["picture"]), "every rank must return the same picture"
