"""Several generations without a reset: each follows the asynchronous rule, whatever happened in the one before."""

import diffusers
import numpy as np
import pytest
import ranks
import tiny_pipelines
import torch
from sequences import Bare, assert_right, compare, image_to_image, noise, quick

import asyncdiff_fast

STAGES = [
    ["conv_in", "down_blocks.0", "down_blocks.1", "down_blocks.2", "down_blocks.3", "mid_block"],
    ["up_blocks.0", "up_blocks.1", "up_blocks.2", "up_blocks.3", "conv_norm_out", "conv_out"],
]
SCHEDULERS = {
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {}),
    "pndm_skip": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "kdpm2a": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "lcm": (diffusers.LCMScheduler, {}),
}


class Stop(Exception):
    """Raised by these tests in the middle of a generation."""


def _interrupted_by(error, generate):
    """A generation that ends with an exception; it has no picture."""

    def run():
        with pytest.raises(error):
            generate()

    return run


def _pipeline(rank, name, make, **options):
    """Build a pipeline and compare the generations that `make(pipe, generate)` lists."""
    pipe = tiny_pipelines.build(name)

    def generate(**kwargs):
        return lambda: tiny_pipelines.generate(pipe, name, **kwargs)

    return compare(rank, pipe, tiny_pipelines.denoiser(pipe), make(pipe, generate), **options)


def _prompts(pipe, generate):
    return [
        generate(steps=4),
        generate(steps=5, prompt="two dogs and a very long story about them that goes on"),
        generate(steps=4, seed=1),
    ]


def _sizes(pipe, generate):
    return [generate(), generate(width=48), generate(), generate(height=16, num_images_per_prompt=2)]


def _one_and_more_pictures(pipe, generate):
    return [generate(), generate(num_images_per_prompt=3), generate(guidance_scale=1.0), generate()]


def _other_scheduler(pipe, generate):
    def swapped(name):
        cls, changes = SCHEDULERS[name]

        def run():
            pipe.scheduler = cls.from_config(config, **changes)
            return generate(steps=5)()

        return run

    config = pipe.scheduler.config

    return [swapped(name) for name in ("heun", "euler", "pndm", "unipc")]


def _callback(pipe, generate):
    def replace(pipe, step, t, tensors):
        return {"latents": tensors["latents"].flip(-1) * 0.9} if step in (1, 2) else {}

    return [generate(callback_on_step_end=replace, steps=5), generate()]


def _exception(pipe, generate):
    def stop_at(last):
        def stop(pipe, step, t, tensors):
            if step == last:
                raise Stop
            return {}

        return _interrupted_by(Stop, generate(callback_on_step_end=stop))

    return [
        stop_at(2),
        generate(),
        stop_at(0),
        generate(seed=1),
        stop_at(3),
        stop_at(1),
        generate(width=48),
        generate(),
    ]


def _interrupt(pipe, generate):
    def interrupt(pipe, step, t, tensors):
        pipe._interrupt = step >= 2
        return {}

    return [generate(callback_on_step_end=interrupt), generate(seed=1), generate()]


def _image_to_image(pipe, generate):
    strength = image_to_image(pipe)
    return [strength(0.6), generate(), strength(0.5), strength(0.9), generate()]


def _two_calls(pipe, generate):
    long = "a dog that runs over the field for hours and hours and then sleeps"
    return [generate(), generate(negative_prompt=long, seed=1), generate(negative_prompt=long), generate()]


def _two_calls_exception(pipe, generate):
    model = tiny_pipelines.denoiser(pipe)

    def stop_at(last):
        calls = [0]

        def stop(module, args):
            calls[0] += 1
            if calls[0] == last:
                raise Stop

        def run():
            handle = model.proj_out.register_forward_pre_hook(stop)
            with pytest.raises(Stop):
                generate()()
            handle.remove()

        return run

    return [generate(), stop_at(6), generate(seed=1), stop_at(5), generate()]


SEQUENCES = {
    "prompts": ("sd15", _prompts, {}),
    "sizes": ("sd15", _sizes, {"stages": STAGES}),
    "batches": ("sd15", _one_and_more_pictures, {"stages": STAGES}),
    "schedulers": ("sd15", _other_scheduler, {}),
    "callback": ("sd15", _callback, {}),
    "exception": ("sd15", _exception, {"stages": STAGES}),
    "interrupt": ("sd15", _interrupt, {"warmup_steps": 1}),
    "image_to_image": ("sd15", _image_to_image, {}),
    "wan": ("wan", _two_calls, {"calls_per_step": 2}),
    "qwenimage": ("qwenimage", _two_calls, {"calls_per_step": 2}),
    "wan_exception": ("wan", _two_calls_exception, {"calls_per_step": 2}),
    "qwenimage_exception": ("qwenimage", _two_calls_exception, {"calls_per_step": 2}),
}


def _sequence(rank, name):
    family, make, options = SEQUENCES[name]
    return _pipeline(rank, family, make, **options)


SLOW = ("batches", "qwenimage_exception")


@pytest.mark.parametrize("name", quick([(n,) for n in SEQUENCES], *((n,) for n in SEQUENCES if n not in SLOW)))
def test_sequence(name):
    assert_right(ranks.run(2, _sequence, name))


def _scheduler(rank, name, warmup_steps):
    def make(pipe, generate):
        cls, changes = SCHEDULERS[name]
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **changes)
        return [generate(steps=5), generate(steps=5, seed=1)]

    return _pipeline(rank, "sd15", make, warmup_steps=warmup_steps)


# Four of them are in the sequence "schedulers" too.
@pytest.mark.parametrize("name", quick([(n,) for n in SCHEDULERS], ("kdpm2a",), ("pndm_skip",)))
def test_scheduler(name):
    assert_right(ranks.run(2, _scheduler, name, 3))


@pytest.mark.parametrize("name", quick([("heun",), ("pndm",)], ("heun",)))
def test_scheduler_all_warm_up(name):
    assert_right(ranks.run(2, _scheduler, name, 100), stale=False)


def _exception_inside(rank, error):
    """A module's hook raises in warm-up, in an asynchronous step, in the first call of all."""
    pipe = tiny_pipelines.build("sd15")

    def generate(seed=0):
        return tiny_pipelines.generate(pipe, "sd15", seed=seed, steps=5)

    def stop_at(module, step):
        def run():
            # Counted from the pipeline's steps: a traced forward calls the hook once more.
            def stop(*_):
                if now[0] == step:
                    raise error("on purpose")

            def count(pipe, step, t, tensors):
                now[0] = step + 1
                return {}

            now, handle = [0], pipe.unet.get_submodule(module).register_forward_pre_hook(stop)
            with pytest.raises(error, match="on purpose"):
                tiny_pipelines.generate(pipe, "sd15", steps=5, callback_on_step_end=count)
            handle.remove()

        return run

    generations = [
        stop_at("mid_block", 0),
        generate,
        stop_at("conv_out", 3),
        lambda: generate(seed=1),
        stop_at("conv_in", 4),
        stop_at("up_blocks.1", 1),
        stop_at("mid_block", 2),
        generate,
    ]
    return compare(rank, pipe, pipe.unet, generations)


@pytest.mark.parametrize("error", quick([(Stop,), (ValueError,), (KeyboardInterrupt,)], (ValueError,)))
def test_exception_inside(error):
    assert_right(ranks.run(2, _exception_inside, error))


# Sampling loops without a pipeline.


def _loop(model, times, seed=0, size=8, calls=1):
    @torch.no_grad()
    def run():
        x = noise(seed, size)
        for t in times() if callable(times) else times:
            for call in range(calls):
                x = x - 0.1 * model(x, t, *([torch.ones(call)] if call else []))
        return x

    return run


def _filled(values):
    """The same tensor for every step, filled in place."""

    def times():
        t = torch.empty(1)
        for value in values:
            yield t.fill_(value)

    return times


DOWN, UP = [900, 700, 500, 300, 100, 50], [0.05, 0.2, 0.4, 0.6, 0.8, 1.0]
LOOPS = {
    "descending": lambda m: [_loop(m, DOWN), _loop(m, DOWN, seed=1), _loop(m, DOWN)],
    "ascending": lambda m: [_loop(m, UP), _loop(m, UP, seed=1), _loop(m, UP)],
    "float": lambda m: [_loop(m, [t / 1000 for t in DOWN]), _loop(m, [float(t) for t in DOWN], seed=1)],
    "tensors": lambda m: [_loop(m, torch.tensor(DOWN)), _loop(m, torch.tensor(DOWN)[:, None], seed=1)],
    "filled": lambda m: [_loop(m, _filled(DOWN)), _loop(m, _filled(DOWN), seed=1)],
    "sizes": lambda m: [_loop(m, DOWN, size=s) for s in (8, 12, 8, 6, 12)],
    "two_calls": lambda m: [_loop(m, DOWN, calls=2), _loop(m, DOWN, calls=2, seed=1)],
    "lengths": lambda m: [_loop(m, DOWN), _loop(m, DOWN[:4]), _loop(m, DOWN, seed=2)],
}


def _bare(rank, name):
    model = Bare()
    stages = [["first", "blocks.0", "blocks.1", "blocks.2"], ["blocks.3", "blocks.4", "blocks.5", "last"]]
    calls = 2 if name == "two_calls" else 1
    return compare(rank, model, model, LOOPS[name](model), calls_per_step=calls, stages=stages)


@pytest.mark.parametrize("name", LOOPS)
def test_bare(name):
    assert_right(ranks.run(2, _bare, name), tolerance=1e-6)


def _many_sizes(rank):
    model = Bare()
    sizes = [*range(4, 16), 4, 15, 5]
    stages = [["first", "blocks.0", "blocks.1", "blocks.2"], ["blocks.3", "blocks.4", "blocks.5", "last"]]
    return compare(rank, model, model, [_loop(model, DOWN, size=s) for s in sizes], stages=stages)


def test_more_sizes_than_plans_are_kept():
    assert_right(ranks.run(2, _many_sizes), tolerance=1e-6)


class OwnScheduler:
    """Knows nothing of diffusers."""

    def loop(self, model, seed):
        @torch.no_grad()
        def run():
            x = noise(seed)
            for t in DOWN:
                x = self.step(model(x, t), x)
            return x

        return run

    def step(self, prediction, x):
        return x - 0.1 * prediction


def _own_scheduler(rank):
    model, scheduler = Bare(), OwnScheduler()
    return compare(rank, model, model, [scheduler.loop(model, seed) for seed in (0, 1, 0)])


def test_own_scheduler():
    assert_right(ranks.run(2, _own_scheduler), tolerance=1e-6)


def _set_once(rank, steps):
    """DDIM has no state of its own, so a loop may set its timesteps once and use them for every picture."""
    model, scheduler = Bare(), diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    scheduler.set_timesteps(6)

    def generation(seed):
        @torch.no_grad()
        def run():
            x = noise(seed)
            for t in scheduler.timesteps[:steps]:
                x = scheduler.step(model(x, t), t, x).prev_sample
            return x

        return run

    return compare(rank, model, model, [generation(seed) for seed in (0, 1, 2)])


@pytest.mark.parametrize("steps", [6, 4])
def test_timesteps_set_once_for_several_generations(steps):
    assert_right(ranks.run(2, _set_once, steps), tolerance=1e-6)


def _gradients(rank):
    """With gradients every call is exact and differentiable; the generation after it begins anew."""
    model = Bare()

    def differentiable():
        x = noise(1).requires_grad_()
        y = x
        for t in DOWN:
            y = y - 0.1 * model(y, t)
        y.square().sum().backward()
        return x.grad

    runtime = asyncdiff_fast.patch(model, num_stages=2, warmup_steps=2, timeout_s=30)
    patched = [_loop(model, DOWN)(), differentiable(), _loop(model, DOWN)()]
    asyncdiff_fast.unpatch(model)
    return patched, differentiable(), runtime.stats()["compute_calls"]


def test_gradients():
    for patched, plain, compute_calls in ranks.run(2, _gradients):
        assert torch.equal(patched[1], plain)
        assert torch.equal(patched[0], patched[2])
        assert compute_calls == 8


def _switched(rank):
    """Gradients in the middle of a generation."""
    model = Bare()

    def run():
        x = noise()
        for i, t in enumerate(DOWN):
            with torch.set_grad_enabled(i == 3):
                x = (x - 0.1 * model(x, t)).detach()
        return x

    asyncdiff_fast.patch(model, num_stages=2, warmup_steps=2, timeout_s=30)
    first, second = run(), run()
    asyncdiff_fast.unpatch(model)
    return first, second


def test_gradients_in_the_middle():
    (first, second), (theirs, _) = ranks.run(2, _switched)
    assert torch.equal(first, second) and torch.equal(first, theirs)


# What the ranks draw.


def _seeds(rank):
    torch.manual_seed(100 + rank)
    pipe = tiny_pipelines.build("sd15")
    asyncdiff_fast.patch(pipe, num_stages=2, warmup_steps=2, timeout_s=30)
    with torch.no_grad():
        pictures = [
            pipe("a cat", num_inference_steps=3, height=32, width=32, output_type="np").images for _ in range(2)
        ]
    asyncdiff_fast.unpatch(pipe)
    return pictures


def test_ranks_draw_the_same_without_a_generator():
    mine, theirs = ranks.run(2, _seeds)
    assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not np.array_equal(mine[0], mine[1])
