"""Ranks that would draw different pictures are told so as the generation begins, and draw the same ones again later."""

import contextlib
import os
import threading
import time

import diffusers
import numpy as np
import pytest
import ranks
import tiny_pipelines
import torch
from bare import Bare, loop
from diffusers.models.attention_processor import AttnProcessor

import asyncdiff_fast
from asyncdiff_fast import generations
from asyncdiff_fast.calls import turns
from asyncdiff_fast.environment import EXCHANGE_VARIABLE

STEPS = 9


def _kind(scheduler, kind, **config):
    return kind.from_config(scheduler.config, **config)


@contextlib.contextmanager
def _weight(pipe, change):
    kept = pipe.unet.conv_in.weight.detach().clone()
    with torch.no_grad():
        change(pipe.unet.conv_in.weight)
    yield {}
    with torch.no_grad():
        pipe.unet.conv_in.weight.copy_(kept)


@contextlib.contextmanager
def _scheduler(pipe, other):
    kept, pipe.scheduler = pipe.scheduler, other
    yield {}
    pipe.scheduler = kept


@contextlib.contextmanager
def _processors(pipe):
    kept = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(AttnProcessor())
    yield {}
    pipe.unet.set_attn_processor(kept)


@contextlib.contextmanager
def _hook(pipe):
    # One that looks on only is no difference.
    handle = pipe.unet.conv_in.register_forward_hook(lambda module, args, output: None)
    assert _attempt(pipe)[0] is None
    handle.remove()
    handle = pipe.unet.mid_block.register_forward_hook(lambda module, args, output: output * 0.9)
    yield {}
    handle.remove()


def _changed_at(step):
    """Arguments with a callback that changes latents once."""

    def callback(pipe, at, t, kwargs):
        return {"latents": kwargs["latents"] * (1.05 if at == step else 1)}

    return contextlib.nullcontext(dict(callback_on_step_end=callback))


def _guided_from(step):
    """Arguments with a callback that changes the guidance."""

    def callback(pipe, at, t, kwargs):
        pipe._guidance_scale = 2.0 if at >= step else pipe._guidance_scale
        return kwargs

    return contextlib.nullcontext(dict(callback_on_step_end=callback))


def _one_element(weight):
    weight.view(-1)[3] += 1e-3


# {name: (what rank 1 does otherwise, giving arguments of its call; what the error names)}
DIFFERENCES = {
    "guidance": (lambda pipe: contextlib.nullcontext(dict(guidance_scale=3.0)), "guidance_scale is"),
    "eta": (lambda pipe: contextlib.nullcontext(dict(eta=0.7)), "eta is"),
    "scheduler": (lambda pipe: _scheduler(pipe, _kind(pipe.scheduler, diffusers.DDPMScheduler)), "scheduler is DDIM"),
    "configuration": (
        lambda pipe: _scheduler(pipe, _kind(pipe.scheduler, diffusers.DDIMScheduler, prediction_type="sample")),
        "prediction_type is",
    ),
    "steps": (lambda pipe: contextlib.nullcontext(dict(num_inference_steps=STEPS + 1)), "differ"),
    "one element of a weight": (lambda pipe: _weight(pipe, _one_element), "same weights"),
    "a weight, behind torch's back": (lambda pipe: _weight(pipe, lambda w: w.data.mul_(1.1)), "same weights"),
    "attention processors": (_processors, "same denoiser"),
    "a hook of torch's": (_hook, "same denoiser"),
    "latents by a callback": (lambda pipe: _changed_at(0), "after the first one"),
    "guidance midway": (lambda pipe: _guided_from(5), "guidance_scale is"),
}
# Later ones, and of what rounding would hide at first: where steps are side by side, all evaluate the first ones.
OF_STAGES = {"latents by a callback midway": (lambda pipe: _changed_at(3), "before the last one")}
OF_STEPS = {
    "one element of a weight, behind torch's back": (
        lambda pipe: _weight(pipe, lambda w: w.data.view(-1)[3:4].add_(2)),
        "must evaluate a step alike",
    ),
    "latents by a callback in an exact step": (lambda pipe: _changed_at(1), "change the latents alike"),
    "latents by a callback in a block": (lambda pipe: _changed_at(5), "changed them before step 6"),
    "latents by a callback before a block": (lambda pipe: _changed_at(4), "before the last one"),
}


def _attempt(pipe, **arguments):
    try:
        return None, tiny_pipelines.generate(pipe, "sd15", **dict(steps=STEPS) | arguments)
    except ValueError as error:
        return str(error), None


def _differences(options):
    return DIFFERENCES | (OF_STEPS if "parallel_steps" in options else OF_STAGES)


def _differ(rank, options):
    """{difference: (errors, whether the next picture is right)}; and the pictures of random numbers."""
    pipe = tiny_pipelines.build("sd15")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    asyncdiff_fast.patch(pipe, warmup_steps=2, timeout_s=30, **options)
    right, found = _attempt(pipe)[1], {}
    for name, (make, _) in _differences(options).items():
        if rank == 0 and make is _hook:
            assert _attempt(pipe)[0] is None
        with make(pipe) if rank == 1 else contextlib.nullcontext({}) as arguments:
            # Tried once more, nothing is forgotten.
            errors = [_attempt(pipe, **arguments)[0] for _ in range(2)]
        again, picture = _attempt(pipe)
        found[name] = errors, again is None and np.array_equal(picture, right)
    # From torch's own generator, which something else on one rank has used before.
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    side = 32 // pipe.vae_scale_factor
    latents = torch.randn(1, pipe.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    given = dict(generator=torch.default_generator, latents=latents)
    if rank == 1:
        torch.rand(3)
    drawn = tiny_pipelines.generate(pipe, "sd15", steps=STEPS, **given)

    def preview(pipe, step, t, kwargs):
        # And in the middle.
        if rank == 1 and step == 2:
            torch.rand(1)
        time.sleep(0.1)
        return kwargs

    error = None
    try:
        tiny_pipelines.generate(pipe, "sd15", steps=12, callback_on_step_end=preview, **given)
    except (ValueError, asyncdiff_fast.ExchangeError) as late:
        error = str(late)
    # A picture that is lost is so on all ranks alike.
    lost, _ = _attempt(pipe, latents=torch.full_like(latents, torch.nan))
    asyncdiff_fast.unpatch(pipe)
    return found, drawn, error, lost


@pytest.mark.parametrize("options", [dict(num_stages=2), dict(parallel_steps=2)])
def test_what_differs_is_named_and_the_next_picture_is_right(options):
    mine, theirs = ranks.run(2, _differ, options)
    for name, (_, words) in _differences(options).items():
        for errors, again in (mine[0][name], theirs[0][name]):
            assert all(error is not None and words in error for error in errors), f"{name}: {errors}"
            assert again, f"{name}: the next picture is not right"
    assert np.array_equal(mine[1], theirs[1]) and mine[3] is None and theirs[3] is None
    # Steps that all evaluate may tell it first.
    assert "random numbers" in mine[2] and "random numbers" in theirs[2], (mine[2], theirs[2])


OPTIONS = {
    "stages": dict(num_stages=2),
    "patches": dict(num_patches=2),
    "halves": dict(cfg_parallel=True),
    "steps": dict(parallel_steps=2),
}


def _stopped(rank, exchange, late):
    """[(way, error of a picture that ranks stop at different steps, its seconds, whether the next one is right, error
    of a picture in which a callback of rank 1 alone raises, its seconds, whether the next one is right)].
    """
    os.environ[EXCHANGE_VARIABLE] = exchange
    pipe, found = tiny_pipelines.build("sd15"), []

    def draw(stop=None, fail=None):
        def callback(pipe, step, t, kwargs):
            if step == stop:
                pipe._interrupt = True
            if step == fail:
                raise OSError("no disk")
            return kwargs

        return tiny_pipelines.generate(pipe, "sd15", steps=12, callback_on_step_end=callback)

    for name, options in OPTIONS.items():
        asyncdiff_fast.patch(pipe, warmup_steps=2, timeout_s=20, **options)
        right, error, began = draw(), None, time.monotonic()
        try:
            draw(stop=6 if rank == 0 else 6 + late)
        except asyncdiff_fast.ExchangeError as raised:
            error = str(raised)
        stopped = error, time.monotonic() - began, np.array_equal(draw(), right)
        error, began = None, time.monotonic()
        try:
            draw(fail=6 if rank == 1 else None)
        except (asyncdiff_fast.ExchangeError, OSError) as raised:
            error = f"{type(raised).__name__}: {raised}"
        found.append((name, *stopped, error, time.monotonic() - began, np.array_equal(draw(), right)))
        asyncdiff_fast.unpatch(pipe)
    return found


@pytest.mark.parametrize("exchange, late", [("", 1), ("torch", 100)])
def test_a_picture_that_one_rank_stops_ends_on_all(exchange, late):
    for rank, said in enumerate(ranks.run(2, _stopped, exchange, late)):
        for name, error, seconds, again, failed, failed_s, after in said:
            assert error is None and seconds < 8, f"{name}: {error} after {seconds:.1f} s"
            assert again and after, f"{name}: the next picture is another one"
            # Half a picture is none where nobody has asked for it.
            assert ("rank 1", "OSError: no disk")[rank] in str(failed) and failed_s < 8, f"{name}: {failed}"


def _threads(rank, options):
    """How far latents of three threads are from what they should be, one that ends and two that go on; and errors of
    threads that the other rank does not have.
    """
    turns.QUIET_S, generations.SHARED_S = 0.3, 2.0
    model, found, done = Bare(), {}, threading.Event()
    asyncdiff_fast.patch(model, warmup_steps=2, timeout_s=20, **options)
    alone = {seed: loop(model, seed=seed) for seed in range(4)}

    def work(seed, again):
        try:
            found[seed] = [
                float((loop(model, seed=s) - alone[s]).abs().max()) for s in ([seed, 3] if again else [seed])
            ]
        except ValueError as error:
            found[seed] = str(error)
        if again:
            done.wait(60)

    def run(seeds, again=()):
        threads = [threading.Thread(target=work, args=(seed, seed in again)) for seed in seeds]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        while len(found) < len(seeds):
            time.sleep(0.02)
        done.set()
        for thread in threads:
            thread.join(100)
        result = dict(found)
        found.clear()
        return result

    overlapping = run([0, 1, 2] if rank == 0 else [2, 1, 0], again=(1, 2))
    strange = run([rank])
    after = float((loop(model) - alone[0]).abs().max())
    asyncdiff_fast.unpatch(model)
    return overlapping, strange, after


def test_threads_take_turns():
    for rank, (overlapping, strange, after) in enumerate(ranks.run(2, _threads, dict(num_stages=2))):
        assert overlapping == {0: [0.0], 1: [0.0, 0.0], 2: [0.0, 0.0]}
        assert "with the same inputs" in strange[rank] and after == 0.0
