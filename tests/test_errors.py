"""Bad input is refused on every rank with one clear error and nothing changed; a lost peer is named, not waited for."""

import importlib
import os
import signal
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
from sequences import Bare, noise, quick
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import asyncdiff_fast
from asyncdiff_fast import patching
from asyncdiff_fast.config import EXCHANGE_VARIABLE

DOWN = [900, 700, 500, 300, 100, 50]
TIMEOUT_S = 5


class Short(torch.nn.Module):
    """Two modules, fewer than three stages."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x, t):
        return self.b(self.a(x)) * t


class Detour(Bare):
    """Has a module that its forward does not call."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Linear(2, 2)


@torch.no_grad()
def _loop(model, seed=0, times=DOWN, stop=None):
    x = noise(seed)
    for step, t in enumerate(times):
        if stop is not None:
            stop(step)
        x = x - 0.1 * model(x, t)
    return x


def _state(target):
    """Everything that is in the modules of a target, by identity."""
    if isinstance(target, torch.nn.Module):
        return {
            n: {k: id(v) for k, v in vars(m).items() if k[0] != "_"} | dict.fromkeys(vars(m))
            for n, m in target.named_modules()
        }
    return {n: _state(m) for n, m in getattr(target, "components", {}).items() if isinstance(m, torch.nn.Module)}


def _attempt(target, **options):
    """(type, message, seconds, what was changed) of a refused patch."""
    before, began = _state(target), time.monotonic()
    try:
        asyncdiff_fast.patch(target, **{"timeout_s": 60} | options)
    except Exception as error:
        seconds = time.monotonic() - began
        changed = [n for n, v in _state(target).items() if v != before[n]]
        return type(error).__name__, str(error), seconds, changed
    asyncdiff_fast.unpatch(target)
    return "nothing", "", 0.0, []


def _assert_refused(results, *words, kind="ValueError"):
    for rank, (name, message, seconds, changed) in enumerate(results):
        assert name == kind, f"rank {rank}: {name}: {message}"
        assert all(word in message for word in words), f"rank {rank}: {message}"
        assert seconds < 20, f"rank {rank} took {seconds:.0f} s"
        assert not changed, f"rank {rank} changed {changed}"


# What is refused before anything is patched, alike on all ranks.

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
    plain = _loop(model)
    results = {name: _attempt(model, **options) for name, (options, _) in OPTIONS.items()}
    results["unknown"] = _attempt(model, num_stages=2, warm_up=3)
    asyncdiff_fast.patch(model, num_stages=2, warmup_steps=9, timeout_s=30)
    same = torch.allclose(_loop(model), plain, atol=1e-6)
    asyncdiff_fast.unpatch(model)
    return results, same


def test_bad_options_are_refused():
    results = ranks.run(2, _bad_options)
    problems = []
    for name, (_, words) in OPTIONS.items():
        try:
            _assert_refused([rank[name] for rank, _ in results], *words)
        except AssertionError as error:
            problems.append(f"{name}: {error}".splitlines()[0])
    assert not problems, "\n".join(problems)
    _assert_refused([r["unknown"] for r, _ in results], "warm_up", "warmup_steps", "num_stages", kind="TypeError")
    assert all(same for _, same in results)


def _bad_targets(rank):
    results = {
        name: _attempt(target, num_stages=2) for name, target in [("number", 3), ("none", None), ("class", Bare)]
    }
    unet = tiny_denoisers.sd15_unet()
    pipe = tiny_pipelines.build("sd15")
    pipe.unet = unet
    plain = tiny_pipelines.generate(pipe, "sd15")
    unet.compile()
    results["compiled"] = _attempt(pipe, num_stages=2)
    unet._compiled_call_impl = None
    pipe.unet = torch.compile(unet)
    results["compile"] = _attempt(pipe, num_stages=2)
    results["compile_module"] = _attempt(pipe.unet, num_stages=2)
    pipe.unet = unet
    transformer = tiny_pipelines.build("flux").transformer
    transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    results["cache"] = _attempt(transformer, num_stages=2)
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
        _assert_refused([results[name] for results, _ in by_rank], word)
    for name, got in {"number": "int", "none": "NoneType", "class": "type"}.items():
        _assert_refused([results[name] for results, _ in by_rank], "pipeline", got, kind="TypeError")
    assert all(error < 1e-5 for _, error in by_rank)


def _too_many_stages(rank):
    model = Short()
    result = _attempt(model, num_stages=3)
    model(torch.ones(1, 4), 1.0)
    return result


def test_more_stages_than_units():
    _assert_refused(ranks.run(3, _too_many_stages), "num_stages=3", "Short", "2")


def _never_called(rank):
    model = Detour()
    before, plain = _state(model), _loop(model)
    asyncdiff_fast.patch(model, stages=[["first", "blocks.0"], ["unused", "last"]], timeout_s=60)
    began = time.monotonic()
    with pytest.raises(ValueError) as refusal:
        _loop(model)
    seconds = time.monotonic() - began
    changed = [n for n, v in _state(model).items() if v != before[n]]
    same = torch.equal(_loop(model), plain)
    assert not dist.is_initialized()
    return ("ValueError", str(refusal.value), seconds, changed), same


def test_a_stage_module_that_is_never_called():
    results = ranks.run(2, _never_called)
    _assert_refused([r for r, _ in results], "unused", "does not call")
    assert all(same for _, same in results)


# What only one rank does: all refuse, at once, and can go on afterwards.


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
        results[kind] = _attempt(model, num_stages=2)
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
        results[kind] = _attempt(model, **{"num_stages": 2} | options)
    results["no pipeline"] = _attempt(model if rank else "model", num_stages=2)
    if rank == 0:
        model.compile()
    results["compiled"] = _attempt(model, num_stages=2)
    model._compiled_call_impl = None
    results["class"] = _attempt(Bare() if rank else Detour(), num_stages=2)
    results["number of blocks"] = _attempt(Bare(6 + rank), num_stages=2)
    asyncdiff_fast.patch(model, num_stages=2, warmup_steps=2, timeout_s=30)
    picture = _loop(model)
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

    first = _loop(model)
    for kind, (mine, theirs, _) in INPUTS.items():
        began = time.monotonic()
        try:
            runtime._clock.end()
            call(**(theirs if rank else mine))
            results[kind] = ("nothing", "", 0.0, [])
        except Exception as error:
            results[kind] = (type(error).__name__, str(error), time.monotonic() - began, [])
    again = _loop(model)
    compute_calls = runtime.stats()["compute_calls"]
    asyncdiff_fast.unpatch(model)
    return results, torch.equal(first, again), compute_calls


def test_different_inputs_are_refused_and_equal_ones_work_again():
    by_rank = ranks.run(2, _different_inputs)
    for kind, (_, _, name) in INPUTS.items():
        _assert_refused([results[kind] for results, _, _ in by_rank], f": {name} differ", "rank 0", "rank 1")
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


def _wrong_call(rank):
    """A forward that raises ValueError of its own is not a refusal: the model stays patched."""
    model = Bare()
    runtime = asyncdiff_fast.patch(model, num_stages=2, warmup_steps=2, timeout_s=30)
    with pytest.raises((RuntimeError, ValueError)):
        _loop(model, times=["soon"])
    handle = model.last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("own")))
    with pytest.raises(ValueError, match="own"):
        _loop(model)
    handle.remove()
    _loop(model)
    calls = runtime.stats()["compute_calls"]
    asyncdiff_fast.unpatch(model)
    return calls


def test_a_wrong_call_leaves_the_model_patched():
    assert ranks.run(2, _wrong_call) == [4, 4]


# A lost peer.


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _stop():
    """Stopped as a whole, as a process in a debugger; the test kills it."""
    os.kill(os.getpid(), signal.SIGSTOP)


WAYS = {"exit": lambda: os._exit(3), "kill": _die, "stop": _stop}
PLACES = ("before patch", "warm-up", "middle", "between", "after patch")


def _lost(rank, lost, place, way):
    """What the others see when rank `lost` goes at `place`: (type, message, seconds, type and message of unpatch)."""
    model, lose = Bare(), WAYS[way] if rank == lost else lambda: None
    began, error = time.monotonic(), None
    try:
        if place == "before patch":
            lose()
        asyncdiff_fast.patch(model, num_stages=2, warmup_steps=2, timeout_s=TIMEOUT_S)
        if place == "after patch":
            lose()
        at = {"warm-up": 1, "middle": 3}.get(place)
        _loop(model, stop=lambda step: lose() if step == at else None)
        began = time.monotonic()
        if place == "between":
            lose()
        _loop(model)
    except Exception as lost_peer:
        error = lost_peer
    seconds = time.monotonic() - began
    assert error is not None, "the loss must not go unnoticed"
    left = None
    if "_asyncdiff_fast" in vars(model):
        asyncdiff_fast.unpatch(model)
        left = [n for n, m in model.named_modules() if "_diffusers_hook" in vars(m) or "forward" in vars(m)]
    _loop(model)
    return type(error).__name__, str(error), seconds, left


def _survivors(world_size, lost, target, *args, timeout=TIMEOUT_S + 25):
    """Results of the ranks that are not lost; the lost one is killed at the end."""
    started = ranks.start(world_size, target, lost, *args)
    try:
        kept = [pair for rank, pair in enumerate(started) if rank != lost]
        return ranks.workers.collect(kept, timeout)
    finally:
        started[lost][0].kill()


def _assert_named(results, lost):
    for name, message, seconds, left in results:
        assert name == "ExchangeError", f"{name}: {message}"
        assert f"for rank {lost} " in message, message
        assert seconds < TIMEOUT_S + 4, f"{seconds:.1f} s: {message}"
        assert not left


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("lost, way", [(1, "kill"), (0, "exit")])
def test_a_rank_dies(place, lost, way):
    _assert_named(_survivors(2, lost, _lost, place, way), lost)


# Each of these waits for the timeout.
HANGS = [(lost, place) for place in PLACES for lost in (0, 1)]


@pytest.mark.parametrize("lost, place", quick(HANGS, (1, "middle"), (0, "between")))
def test_a_rank_hangs(lost, place):
    _assert_named(_survivors(2, lost, _lost, place, "stop"), lost)


def _stops_connecting(rank, lost, module, name):
    """As `_lost`; rank `lost` stops where it would connect by torch.distributed, and keeps its store waiting too."""
    os.environ[EXCHANGE_VARIABLE] = "torch"
    if rank == lost:
        setattr(importlib.import_module(module), name, lambda *_, **__: _stop())
    return _lost(rank, lost, "not here", "stop")


@pytest.mark.slow
@pytest.mark.parametrize("module, name", [(dist, "init_process_group"), (c10d, "_new_process_group_helper")])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_hangs_while_groups_connect(lost, module, name):
    _assert_named(_survivors(2, lost, _stops_connecting, module.__name__, name), lost)


def _sleeps(rank, seconds):
    """Rank 1 is late by `seconds` in an asynchronous step; then both begin anew."""
    model, messages = Bare(), []
    asyncdiff_fast.patch(model, num_stages=2, warmup_steps=2, timeout_s=TIMEOUT_S)
    good = _loop(model)
    began = time.monotonic()
    try:
        _loop(model, stop=lambda step: time.sleep(seconds) if step == 4 and rank == 1 else None)
    except asyncdiff_fast.ExchangeError as error:
        messages.append(str(error))
    waited = time.monotonic() - began
    if rank == 0:
        time.sleep(max(0, seconds + 0.5 - waited))
    asyncdiff_fast.unpatch(model)
    asyncdiff_fast.patch(model, num_stages=2, warmup_steps=2, timeout_s=TIMEOUT_S)
    again = _loop(model)
    asyncdiff_fast.unpatch(model)
    return messages, waited, torch.equal(good, again)


def test_a_rank_sleeps_too_long_and_all_patch_again():
    (messages, waited, same), (_, _, theirs) = ranks.run(2, _sleeps, TIMEOUT_S + 3)
    assert len(messages) == 1 and "rank 0 waited for rank 1 " in messages[0] and waited < TIMEOUT_S + 2
    assert same and theirs


def test_a_rank_sleeps_less_than_the_timeout():
    for messages, _, same in ranks.run(2, _sleeps, 2):
        assert not messages and same


# Process groups of the caller.


def _start_group(rank, world_size):
    dist.init_process_group("gloo", rank=rank, world_size=world_size)


def _own_group(rank, use_mesh):
    _start_group(rank, 2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("stage",)) if use_mesh else None
    model, pictures = Bare(), []
    for _ in range(3):
        asyncdiff_fast.patch(model, mesh=mesh, num_stages=2, warmup_steps=2, timeout_s=30)
        pictures.append(_loop(model))
        asyncdiff_fast.unpatch(model)
    assert dist.is_initialized()
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return pictures, int(total)


@pytest.mark.parametrize("use_mesh", [False, True])
def test_group_of_the_caller_stays(use_mesh):
    by_rank = ranks.run(2, _own_group, use_mesh)
    first = by_rank[0][0][0]
    assert all(total == 3 and all(torch.equal(p, first) for p in pictures) for pictures, total in by_rank)


def _part_of_the_ranks(rank):
    _start_group(rank, 3)
    mesh = DeviceMesh("cpu", [0, 2], mesh_dim_names=("stage",))
    model, picture = Bare(), None
    if rank != 1:
        asyncdiff_fast.patch(model, mesh=mesh, num_stages=2, warmup_steps=2, timeout_s=30)
        picture = _loop(model)
        asyncdiff_fast.unpatch(model)
        outside = None
    else:
        outside = _attempt(model, mesh=mesh, num_stages=2)
    dist.barrier()
    wrong = _attempt(model, mesh=init_device_mesh("cpu", (3, 1), mesh_dim_names=("a", "b")), num_stages=2)
    dist.barrier()
    sizes = _attempt(model, mesh=init_device_mesh("cpu", (3, 1), mesh_dim_names=("stage", "cfg")), num_stages=2)
    dist.barrier()
    dist.destroy_process_group()
    return picture, outside, wrong, sizes


def test_mesh_over_two_of_three_ranks():
    results = ranks.run(3, _part_of_the_ranks)
    assert torch.equal(results[0][0], results[2][0])
    _assert_refused([results[1][1]], "mesh", "rank 1")
    _assert_refused([wrong for _, _, wrong, _ in results], "mesh", "stage")
    _assert_refused([sizes for _, _, _, sizes in results], "mesh", "'stage': 2", "'stage': 3")


def _mesh_of_patches_and_stages(rank):
    """The ranks of a mesh whose dimensions are named in another order than ours."""
    _start_group(rank, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "patch"))
    config = asyncdiff_fast.Config(num_patches=2, num_stages=2)
    found = patching._ranks(mesh, config)
    runtime = asyncdiff_fast.patch(Bare(), mesh=mesh, num_patches=2, num_stages=2, timeout_s=30)
    along = {axis: runtime._parts.along(axis) for axis in ("patch", "stage")}
    asyncdiff_fast.unpatch(runtime.denoiser)
    dist.barrier()
    dist.destroy_process_group()
    return found, along


def test_a_mesh_may_name_its_dimensions_in_any_order():
    for rank, (found, along) in enumerate(ranks.run(4, _mesh_of_patches_and_stages)):
        assert found == [0, 2, 1, 3]
        assert along["stage"] == [rank % 2, rank % 2 + 2] and along["patch"] == [rank - rank % 2, rank - rank % 2 + 1]


def _two_pipelines(rank):
    """Two pipelines patched at once, with generations in turns, unpatched in the other order."""
    pipes = {name: tiny_pipelines.build(name) for name in ("sd15", "wan")}
    options = dict(num_stages=2, warmup_steps=2, timeout_s=40)
    alone = {}
    for name, pipe in pipes.items():
        asyncdiff_fast.patch(pipe, **options)
        alone[name] = tiny_pipelines.generate(pipe, name)
        asyncdiff_fast.unpatch(pipe)
    for pipe in pipes.values():
        asyncdiff_fast.patch(pipe, **options)
    same = [np.array_equal(tiny_pipelines.generate(pipes[n], n), alone[n]) for n in ("sd15", "wan", "sd15", "wan")]
    asyncdiff_fast.unpatch(pipes["sd15"])
    same.append(np.array_equal(tiny_pipelines.generate(pipes["wan"], "wan"), alone["wan"]))
    asyncdiff_fast.unpatch(pipes["wan"])
    return [*same, not dist.is_initialized()]


def test_two_pipelines_at_once():
    assert all(all(same) for same in ranks.run(2, _two_pipelines))


def _interleaved(rank):
    """Two bare models that take turns within their loops."""
    models = Bare(), Bare(5)
    options = dict(num_stages=2, warmup_steps=2, timeout_s=40)
    alone = []
    for model in models:
        asyncdiff_fast.patch(model, **options)
        alone.append(_loop(model))
    x = [noise(), noise()]
    with torch.no_grad():
        for t in DOWN:
            for i, model in enumerate(models):
                x[i] = x[i] - 0.1 * model(x[i], t)
    for model in models:
        asyncdiff_fast.unpatch(model)
    return [torch.equal(a, b) for a, b in zip(x, alone, strict=True)]


def test_two_models_take_turns():
    assert ranks.run(2, _interleaved) == [[True, True]] * 2


# One process, without a launcher.


def test_alone_nothing_changes(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    model, threads = Bare(), threading.active_count()
    before, plain = _state(model), _loop(model)
    for _ in range(2):
        asyncdiff_fast.patch(model)
        assert torch.equal(_loop(model), plain)
        asyncdiff_fast.unpatch(model)
    assert _state(model) == before and threading.active_count() == threads
    for options in (dict(num_stages=2), dict(num_stages=2, stride=2), dict(stages=[["first"], ["last"]])):
        with pytest.raises(ValueError, match=r"world_size 1; start [23] processes \(torchrun"):
            asyncdiff_fast.patch(model, **options)
    assert _state(model) == before and torch.equal(_loop(model), plain)
    with pytest.raises(ValueError, match="not patched"):
        asyncdiff_fast.unpatch(model)
    with pytest.raises(TypeError, match="pipeline"):
        asyncdiff_fast.patch("stable-diffusion")
