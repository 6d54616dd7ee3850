"""Bad input is refused on every rank with one clear error, and nothing is changed."""

import threading
import time

import diffusers
import numpy as np
import pytest
import ranks
import tiny_denoisers
import tiny_pipelines
import torch
import torch.distributed as dist
from bare import Bare, Detour, loop
from refusals import assert_refused, attempt, state

import asyncdiff_fast


class Short(torch.nn.Module):
    """Two modules, fewer than three stages."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x, t):
        return self.b(self.a(x)) * t


OPTIONS = {
    "world_size": (dict(num_stages=3), ("world_size", "num_stages=2", "3 processes")),
    "stride_world_size": (dict(num_stages=2, stride=2), ("world_size", "= 3", "world_size 2")),
    "one_stage": (dict(num_stages=1), ("world_size",)),
    "warmup_steps": (dict(num_stages=2, warmup_steps=0), ("warmup_steps", "at least 1", "warmup_steps=0")),
    "warmup_steps_float": (dict(num_stages=2, warmup_steps=1.5), ("warmup_steps=1.5",)),
    "stride": (dict(num_stages=2, stride=3), ("stride", "1 or 2", "stride=3")),
    "stride_float": (dict(num_stages=2, stride=1.0), ("stride=1.0",)),
    "stride_bool": (dict(num_stages=2, stride=True), ("stride=True",)),
    "stride_one_stage": (dict(num_stages=1, stride=2), ("stride=2", "num_stages of at least 2")),
    "num_stages": (dict(num_stages=0), ("num_stages", "num_stages=0")),
    "num_stages_text": (dict(num_stages="2"), ("num_stages='2'",)),
    "time_shift": (dict(num_stages=2, time_shift=1), ("time_shift", "True or False")),
    "stride_phase": (dict(num_stages=2, stride_phase="even"), ("stride_phase", "odd")),
    "balance": (dict(num_stages=2, balance="bytes"), ("balance", "flops")),
    "timeout_s": (dict(num_stages=2, timeout_s=0), ("timeout_s", "positive")),
    "timeout_s_nan": (dict(num_stages=2, timeout_s=float("nan")), ("timeout_s", "positive")),
    "timeout_s_infinite": (dict(num_stages=2, timeout_s=float("inf")), ("timeout_s", "positive")),
    "stages_unknown": (dict(stages=[["first"], ["bloks.0", "last"]]), ("bloks.0", "Bare")),
    "stages_twice": (dict(stages=[["first", "blocks.0"], ["blocks.0"]]), ("blocks.0", "stages 0 and 1")),
    "stages_twice_in_one": (dict(stages=[["first", "first"], ["last"]]), ("first", "keep one")),
    "stages_nested": (dict(stages=[["blocks.0"], ["blocks"]]), ("blocks.0", "inside")),
    "stages_empty": (dict(stages=[["first"], []]), ("stage 1 is empty",)),
    "stages_none": (dict(stages=[]), ("stages",)),
    "stages_number": (dict(stages=2), ("stages", "list of lists")),
    "stages_text": (dict(stages=["first", "last"]), ("stages", "list of lists")),
    "stages_module": (dict(stages=[[torch.nn.Identity()], ["last"]]), ("stages", "names")),
    "stages_root": (dict(stages=[[""], ["last"]]), ("stages", "names")),
    "stages_num_stages": (dict(stages=[["first"], ["last"]], num_stages=3), ("num_stages=3",)),
}


def _bad_options(rank):
    model, plain = Bare(), None
    plain = loop(model)
    results = {name: attempt(model, **options) for name, (options, _) in OPTIONS.items()}
    results["unknown"] = attempt(model, num_stages=2, warm_up=3)
    asyncdiff_fast.patch(model, num_stages=2, warmup_steps=9, timeout_s=30)
    same = torch.allclose(loop(model), plain, atol=1e-6)
    asyncdiff_fast.unpatch(model)
    return results, same


def test_bad_options_are_refused():
    results = ranks.run(2, _bad_options)
    problems = []
    for name, (_, words) in OPTIONS.items():
        try:
            assert_refused([rank[name] for rank, _ in results], *words)
        except AssertionError as error:
            problems.append(f"{name}: {error}".splitlines()[0])
    assert not problems, "\n".join(problems)
    assert_refused([r["unknown"] for r, _ in results], "warm_up", "warmup_steps", "num_stages", kind="TypeError")
    assert all(same for _, same in results)


def _bad_targets(rank):
    results = {name: attempt(target, num_stages=2) for name, target in [("number", 3), ("none", None), ("class", Bare)]}
    unet = tiny_denoisers.sd15_unet()
    pipe = tiny_pipelines.build("sd15")
    pipe.unet = unet
    plain = tiny_pipelines.generate(pipe, "sd15")
    unet.compile()
    results["compiled"] = attempt(pipe, num_stages=2)
    unet._compiled_call_impl = None
    pipe.unet = torch.compile(unet)
    results["compile"] = attempt(pipe, num_stages=2)
    results["compile_module"] = attempt(pipe.unet, num_stages=2)
    pipe.unet = unet
    transformer = tiny_pipelines.build("flux").transformer
    transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    results["cache"] = attempt(transformer, num_stages=2)
    with pytest.raises(ValueError, match="not patched"):
        asyncdiff_fast.unpatch(pipe)
    asyncdiff_fast.patch(pipe, num_stages=2, timeout_s=30)
    try:
        asyncdiff_fast.patch(pipe, num_stages=2, timeout_s=60)
    except ValueError as error:
        results["twice"] = ("ValueError", str(error), 0, [])
    patched = tiny_pipelines.generate(pipe, "sd15")
    asyncdiff_fast.unpatch(pipe)
    with pytest.raises(ValueError, match="not patched"):
        asyncdiff_fast.unpatch(pipe)
    return results, float(np.abs(patched - plain).max())


def test_bad_targets_are_refused():
    by_rank = ranks.run(2, _bad_targets)
    words = {"compiled": "compiled", "compile": "compiled", "compile_module": "compiled", "cache": "disable_cache"}
    for name, word in {**words, "twice": "unpatch"}.items():
        assert_refused([results[name] for results, _ in by_rank], word)
    for name, got in {"number": "int", "none": "NoneType", "class": "type"}.items():
        assert_refused([results[name] for results, _ in by_rank], "pipeline", got, kind="TypeError")
    assert all(error < 1e-5 for _, error in by_rank)


def _too_many_stages(rank):
    model = Short()
    result = attempt(model, num_stages=3)
    model(torch.ones(1, 4), 1.0)
    return result


def test_more_stages_than_units():
    assert_refused(ranks.run(3, _too_many_stages), "num_stages=3", "Short", "2")


def _never_called(rank):
    model = Detour()
    before, plain = state(model), loop(model)
    asyncdiff_fast.patch(model, stages=[["first", "blocks.0"], ["unused", "last"]], timeout_s=60)
    began = time.monotonic()
    with pytest.raises(ValueError) as refusal:
        loop(model)
    seconds = time.monotonic() - began
    changed = [n for n, v in state(model).items() if v != before[n]]
    same = torch.equal(loop(model), plain)
    assert not dist.is_initialized()
    return ("ValueError", str(refusal.value), seconds, changed), same


def test_a_stage_module_that_is_never_called():
    results = ranks.run(2, _never_called)
    assert_refused([r for r, _ in results], "unused", "does not call")
    assert all(same for _, same in results)


def _wrong_call(rank):
    """A forward that raises ValueError of its own is not a refusal: the model stays patched."""
    model = Bare()
    runtime = asyncdiff_fast.patch(model, num_stages=2, warmup_steps=2, timeout_s=30)
    with pytest.raises((RuntimeError, ValueError)):
        loop(model, times=["soon"])
    handle = model.last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("own")))
    with pytest.raises(ValueError, match="own"):
        loop(model)
    handle.remove()
    loop(model)
    calls = runtime.stats()["compute_calls"]
    asyncdiff_fast.unpatch(model)
    return calls


def test_a_wrong_call_leaves_the_model_patched():
    assert ranks.run(2, _wrong_call) == [4, 4]


# One process, without a launcher.


def test_alone_nothing_changes(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    model, threads = Bare(), threading.active_count()
    before, plain = state(model), loop(model)
    for _ in range(2):
        asyncdiff_fast.patch(model)
        assert torch.equal(loop(model), plain)
        asyncdiff_fast.unpatch(model)
    assert state(model) == before and threading.active_count() == threads
    for options in (dict(num_stages=2), dict(num_stages=2, stride=2), dict(stages=[["first"], ["last"]])):
        with pytest.raises(ValueError, match=r"world_size 1; start [23] processes \(torchrun"):
            asyncdiff_fast.patch(model, **options)
    assert state(model) == before and torch.equal(loop(model), plain)
    with pytest.raises(ValueError, match="not patched"):
        asyncdiff_fast.unpatch(model)
    with pytest.raises(TypeError, match="pipeline"):
        asyncdiff_fast.patch("stable-diffusion")
