"""What only one rank does: all refuse, at once, and can go on afterwards."""

import time

import numpy as np
import pytest
import ranks
import tiny_pipelines
import torch
from bare import Bare, Detour, loop, noise
from refusals import assert_refused, attempt

import asyncdiff_fast


def _changed_weights(model, kind):
    with torch.no_grad():
        weight = model.last.weight.view(-1)
        if kind == "one element":
            weight[7] += 1e-3
        elif kind == "two swapped":
            weight[:2] = weight[:2].flip(0)
        elif kind == "moved":
            weight[3] += 0.25
            weight[4] -= 0.25
        elif kind == "rows swapped":
            model.last.weight.copy_(model.last.weight.flip(0))
        elif kind == "buffer":
            model.register_buffer("extra", torch.zeros(1))


# Of the rank that is wrong, or what the others hear of it.
REASONS = ("rank 0", "rank 1", "must", "unknown", "does not have", "patch needs", "is compiled")
WEIGHTS = ("one element", "two swapped", "moved", "rows swapped", "buffer")


def _one_differs(rank):
    results = {}
    for kind in WEIGHTS:
        model = Bare()
        if rank == 1:
            _changed_weights(model, kind)
        results[kind] = attempt(model, num_stages=2)
    model = Bare()
    others = {
        "options": dict(warmup_steps=2 + rank),
        "bad option": dict(warmup_steps=1 - rank),
        "unknown option": dict(timeout_s=60) | ({"warm_up": 1} if rank == 1 else {}),
        "bad stages": dict(stages=[["first"], ["last" if rank else "lost"]]),
        "stride": dict(stride=1 + 2 * rank),
        "timeout": dict(timeout_s=60 + rank),
    }
    for kind, options in others.items():
        results[kind] = attempt(model, **{"num_stages": 2} | options)
    results["no pipeline"] = attempt(model if rank else "model", num_stages=2)
    if rank == 0:
        model.compile()
    results["compiled"] = attempt(model, num_stages=2)
    model._compiled_call_impl = None
    results["class"] = attempt(Bare() if rank else Detour(), num_stages=2)
    results["number of blocks"] = attempt(Bare(6 + rank), num_stages=2)
    asyncdiff_fast.patch(model, num_stages=2, warmup_steps=2, timeout_s=30)
    picture = loop(model)
    asyncdiff_fast.unpatch(model)
    return results, picture


def test_one_rank_differs():
    by_rank = ranks.run(2, _one_differs)
    problems = []
    words = {kind: "same model" for kind in WEIGHTS} | {"options": "same options", "timeout": "same options"}
    for kind in by_rank[0][0]:
        for rank, (results, _) in enumerate(by_rank):
            name, message, seconds, changed = results[kind]
            right = name in ("ValueError", "TypeError") and any(word in message for word in REASONS)
            if not right or words.get(kind, "") not in message or seconds > 20 or changed:
                problems.append(f"{kind}: rank {rank}: {name} after {seconds:.1f} s: {message[:150]} {changed}")
    assert not problems, "\n".join(problems)
    assert torch.equal(by_rank[0][1], by_rank[1][1])


INPUTS = {
    "latent": (dict(), dict(seed=1), "x"),
    "swapped": (dict(text=[1.0, 2.0]), dict(text=[2.0, 1.0]), "text"),
    "number": (dict(t=3.0), dict(t=4.0), "t"),
    "shape": (dict(size=8), dict(size=12), "x"),
}


def _different_inputs(rank):
    model, results = Bare(), {}
    runtime = asyncdiff_fast.patch(model, num_stages=2, warmup_steps=2, timeout_s=60)

    def call(seed=0, text=(0.0, 1.0), t=5.0, size=8):
        with torch.no_grad():
            return model(noise(seed, size), t=t, text=torch.tensor(text))

    first = loop(model)
    for kind, (mine, theirs, _) in INPUTS.items():
        began = time.monotonic()
        try:
            runtime._generations.end()
            call(**(theirs if rank else mine))
            results[kind] = ("nothing", "", 0.0, [])
        except Exception as error:
            results[kind] = (type(error).__name__, str(error), time.monotonic() - began, [])
    again = loop(model)
    compute_calls = runtime.stats()["compute_calls"]
    asyncdiff_fast.unpatch(model)
    return results, torch.equal(first, again), compute_calls


def test_different_inputs_are_refused_and_equal_ones_work_again():
    by_rank = ranks.run(2, _different_inputs)
    for kind, (_, _, name) in INPUTS.items():
        assert_refused([results[kind] for results, _, _ in by_rank], f": {name} differ", "rank 0", "rank 1")
    assert all(same and compute_calls == 8 for _, same, compute_calls in by_rank)


def _different_seeds(rank):
    pipe = tiny_pipelines.build("sd15")
    asyncdiff_fast.patch(pipe, num_stages=2, warmup_steps=2, timeout_s=60)
    errors = []
    for kwargs in (dict(seed=rank), dict(prompt="abc"[rank]), dict(prompt=["a cat", "a dog"][:: 1 - 2 * rank])):
        with pytest.raises(ValueError) as refusal:
            tiny_pipelines.generate(pipe, "sd15", **kwargs)
        errors.append(str(refusal.value))
    picture = tiny_pipelines.generate(pipe, "sd15")
    asyncdiff_fast.unpatch(pipe)
    return errors, picture


def test_different_seeds_and_prompts():
    mine, theirs = ranks.run(2, _different_seeds)
    assert np.array_equal(mine[1], theirs[1])
    for errors in (mine[0], theirs[0]):
        assert all("same prompt, size and seed" in error and "rank 0 and rank 1" in error for error in errors)
        assert "encoder_hidden_states" in errors[1] and "encoder_hidden_states" in errors[2]
