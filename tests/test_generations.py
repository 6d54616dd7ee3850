"""Several generations without a reset: each follows the asynchronous rule, whatever happened in the one before."""

import diffusers
import numpy as np
import pytest
import ranks
import tiny_pipelines
import torch
from sequences import assert_right, compare, image_to_image, quick

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
