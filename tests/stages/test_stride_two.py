"""Stride 2 on two stages and an extra rank, against the intended rule, for every kind of timestep and phase."""

import diffusers
import pytest
import ranks
import tiny_pipelines
import torch
from bare import Bare, noise
from sequences import assert_right, compare, image_to_image, quick
from stride_two import StrideTwo, recorded_timesteps

import asyncdiff_fast

SCHEDULERS = {
    "ddim": None,
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
PIPELINES = [*(("sd15", s) for s in SCHEDULERS), ("sdxl", "ddim"), ("sd3", "ddim"), ("flux", "ddim"), ("svd", "ddim")]


def _compare(rank, target, denoiser, generations, options):
    """`compare` with the rule of stride 2; each generation has its own list of timesteps."""
    times = iter([recorded_timesteps(denoiser, g) for g in generations]) if rank == 0 else None

    def simulate(denoiser, owner):
        rule = {k: options[k] for k in ("time_shift", "stride_phase") if k in options}
        return StrideTwo(denoiser, owner, 2, options["warmup_steps"], next(times), **rule)

    return compare(rank, target, denoiser, generations, simulate, stride=2, **options)


def _pipeline(rank, name, scheduler, variants):
    """All variants of one pipeline, each with two generations."""
    pipe = tiny_pipelines.build(name)
    if SCHEDULERS[scheduler] is not None:
        pipe.scheduler = SCHEDULERS[scheduler].from_config(pipe.scheduler.config)
    results = []
    for steps, options in variants:
        generations = [
            lambda steps=steps: tiny_pipelines.generate(pipe, name, steps=steps),
            lambda steps=steps: tiny_pipelines.generate(pipe, name, steps=steps + 1, seed=1),
        ]
        results.append(_compare(rank, pipe, tiny_pipelines.denoiser(pipe), generations, options))
    return results


def _variants():
    for number, (phase, shift) in enumerate([("warmup", False), ("odd", False), ("warmup", True), ("odd", True)]):
        # Even and odd warm-up, and numbers of steps, against each other.
        for warmup_steps in (1, 2) if number < 2 else (3,):
            options = dict(warmup_steps=warmup_steps, time_shift=shift, stride_phase=phase)
            yield warmup_steps + 3 + number % 2, options


@pytest.mark.parametrize("name, scheduler", quick(PIPELINES, ("sd3", "ddim"), ("flux", "ddim")))
def test_pipeline(name, scheduler):
    by_rank = ranks.run(3, _pipeline, name, scheduler, list(_variants()))
    for results in zip(*by_rank, strict=True):
        assert_right(results, tolerance=2e-5)


def _image_to_image(rank, scheduler):
    """Begins in the middle of the list of timesteps, in which Heun has each one twice."""
    pipe = tiny_pipelines.build("sd15")
    if SCHEDULERS[scheduler] is not None:
        pipe.scheduler = SCHEDULERS[scheduler].from_config(pipe.scheduler.config)
    strength = image_to_image(pipe)
    generations = [strength(0.6), lambda: tiny_pipelines.generate(pipe, "sd15", steps=5), strength(0.8)]
    return _compare(rank, pipe, pipe.unet, generations, dict(warmup_steps=1))


@pytest.mark.parametrize("scheduler", quick([("ddim",), ("heun",), ("euler",)], ("heun",)))
def test_image_to_image(scheduler):
    assert_right(ranks.run(3, _image_to_image, scheduler), tolerance=2e-5)


class OwnScheduler:
    """Not one of diffusers': given to `patch`."""

    timesteps = torch.linspace(0.99, 0.1, 7)


def _loop(model, times, seed=0):
    @torch.no_grad()
    def run():
        x = noise(seed)
        for t in times:
            x = x - 0.1 * model(x, t)
        return x

    return run


def _own_scheduler(rank, after_a_pipeline):
    """A loop of one's own, also after a scheduler of diffusers has been at work in the same process."""
    model, scheduler = Bare(), OwnScheduler()
    watched = Bare()
    if after_a_pipeline:
        asyncdiff_fast.patch(watched, num_stages=2, stride=2, timeout_s=40)
        used = diffusers.DDIMScheduler()
        used.set_timesteps(5)
    kinds = [scheduler.timesteps, scheduler.timesteps.tolist(), scheduler.timesteps[:, None]]
    generations = [_loop(model, times, seed) for seed, times in enumerate(kinds)]
    options = dict(warmup_steps=2, scheduler=scheduler)
    results = _compare(rank, model, model, generations, options)
    if after_a_pipeline:
        asyncdiff_fast.unpatch(watched)
        assert used is not None
    return results


@pytest.mark.parametrize("after_a_pipeline", [False, True])
def test_own_scheduler(after_a_pipeline):
    assert_right(ranks.run(3, _own_scheduler, after_a_pipeline), tolerance=1e-6)


def _refused(rank, kind):
    """(message, unpatched result is the same, attributes left) of a loop that stride 2 cannot follow."""
    model = Bare()
    before, plain = {n: set(vars(m)) for n, m in model.named_modules()}, _loop(model, [9.0, 8.0, 7.0])()
    scheduler = OwnScheduler() if kind != "no scheduler" else None
    asyncdiff_fast.patch(model, num_stages=2, stride=2, warmup_steps=2, timeout_s=40, scheduler=scheduler)
    # Of the second kind the first timestep fits and the second does not.
    times = [123.4, 100.0] if kind != "second" else [OwnScheduler.timesteps[0], torch.tensor(0.5171)]
    with pytest.raises(ValueError) as refusal:
        _loop(model, times)()
    after = _loop(model, [9.0, 8.0, 7.0])()
    left = [n for n, m in model.named_modules() if set(vars(m)) != before[n]]
    with pytest.raises(ValueError, match="not patched"):
        asyncdiff_fast.unpatch(model)
    return str(refusal.value), torch.equal(plain, after), left


@pytest.mark.parametrize("kind", ["first", "second", "no scheduler"])
def test_unknown_timesteps_are_refused_and_the_model_restored(kind):
    for message, same, left in ranks.run(3, _refused, kind):
        assert "stride=2" in message and "use stride=1" in message
        assert same and not left
