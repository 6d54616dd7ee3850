"""Patches through stages on real ranks: generations, what travels, and weights that are divided."""

import functools

import pytest
import ranks
import torch
from oracle_models import INSIDE_A_BLOCK, MODELS, predictions
from workers import collect

import asyncdiff_fast

# Of the largest element: other sizes of the same products.
CLOSE = 2e-5


@torch.no_grad()
def _run(rank, name, options, repeats=1):
    """What a patched denoiser gives in each generation, what was sent, held and left behind."""
    model = MODELS[name][0]()
    before = {n: p.clone() for n, p in model.named_parameters()}
    runtime = asyncdiff_fast.patch(model, timeout_s=60, num_stages=2, **options)
    found = {"plain": None, "generations": []}
    for _ in range(repeats):
        found["generations"].append(predictions(name)(model))
        # A loop of one's own: the timestep rises as it starts again.
    runtime.clear_stats()
    predictions(name)(model)
    found["stats"], found["plan"], found["text"] = runtime.stats(), runtime.plan.bytes_per_call, str(runtime.plan)
    found["sent"] = sum(n for (source, _, _), n in runtime.plan.sent_bytes().items() if source == rank)
    found["held"] = sum(p.untyped_storage().nbytes() for p in model.parameters())
    found["planned"] = runtime.plan.held_bytes(rank)
    asyncdiff_fast.unpatch(model)
    found["restored"] = all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    found["unpatched"] = predictions(name)(model)
    return found


CASES = {
    "one patch": ("sd3", dict(pipeline_patches=1, warmup_steps=1)),
    "one patch, sharded": ("pixart", dict(pipeline_patches=1, warmup_steps=1, shard_weights=True)),
    "warm-up": ("pixart", dict(pipeline_patches=4, warmup_steps=9)),
    "warm-up, sharded": ("unet", dict(pipeline_patches=2, warmup_steps=9, shard_weights=True)),
    "patches": ("pixart", dict(pipeline_patches=3, warmup_steps=2)),
    "patches, sharded": ("pixart", dict(pipeline_patches=3, warmup_steps=2, shard_weights=True)),
    "text": ("flux", dict(pipeline_patches=3, warmup_steps=1)),
    "text, sharded": ("flux", dict(pipeline_patches=3, warmup_steps=1, shard_weights=True)),
    "text, cut inside a block": ("sd3", dict(pipeline_patches=3, warmup_steps=1, stages=INSIDE_A_BLOCK)),
    "unet": ("unet", dict(pipeline_patches=2, warmup_steps=1)),
    "unet, sharded": ("unet", dict(pipeline_patches=2, warmup_steps=1, shard_weights=True)),
}


def _all(rank):
    return {case: _run(rank, name, options, repeats=2) for case, (name, options) in CASES.items()}


@functools.cache
def results():
    return collect(ranks.start(2, _all), 280)


def _error(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_get_the_same_in_every_generation(case):
    first, *others = [g for rank in results() for g in rank[case]["generations"]]
    assert all(torch.equal(first, g) for g in others)


@pytest.mark.parametrize("case", ["one patch", "one patch, sharded", "warm-up", "warm-up, sharded"])
def test_exact_calls_are_exact(case):
    for rank in results():
        assert _error(rank[case]["generations"][0], rank[case]["unpatched"]) <= CLOSE


@pytest.mark.parametrize("case", ["patches", "text", "unet"])
def test_dividing_the_weights_changes_nothing(case):
    for rank in results():
        assert _error(rank[f"{case}, sharded"]["generations"][1], rank[case]["generations"][1]) <= CLOSE
        assert _error(rank[case]["generations"][1], rank[case]["unpatched"]) > 5 * CLOSE


@pytest.mark.parametrize("case", CASES)
def test_unpatch_brings_everything_back(case):
    for rank in results():
        assert rank[case]["restored"]
    assert torch.equal(results()[0][case]["unpatched"], results()[1][case]["unpatched"])


@pytest.mark.parametrize("case", CASES)
def test_what_is_sent_and_held_is_what_the_plan_says(case):
    options = CASES[case][1]
    for rank in results():
        found, micro = rank[case], max(4 - options["warmup_steps"], 0)
        if not options.get("shard_weights") and options["pipeline_patches"] > 1:
            assert found["stats"]["sent_bytes"] == micro * found["sent"]
        assert found["stats"]["compute_calls"] == micro and found["stats"]["exact_calls"] == 4 - micro
        # Numbers that stand for what is not held are a few bytes each.
        assert found["planned"] <= found["held"] <= found["planned"] + 8192
        assert "micro-steps per call" in found["text"]


def test_divided_weights_are_fewer():
    for rank in results():
        assert rank["patches, sharded"]["held"] < 0.7 * rank["patches"]["held"]
