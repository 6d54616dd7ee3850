"""Every kind of pipeline cut into patches: with synchronous exchange the unpatched picture, at every size and batch."""

import functools

import numpy as np
import pytest
import ranks
import tiny_denoisers
import tiny_pipelines
import torch
from sequences import image_to_image, quick

import asyncdiff_fast

# Another size of each family, whose rows the patches cannot share evenly at every resolution.
TALL = {
    "sd15": (56, 40),
    "sdxl": (72, 40),
    "sdxl_inpaint": (40, 24),
    "sdxl_controlnet": (40, 24),
    "svd": (40, 24),
    "animatediff": (40, 24),
    "sd3": (48, 32),
    "flux": (48, 32),
    "pixart": (48, 32),
    "hunyuandit": (80, 48),
    "wan": (48, 32),
    "qwenimage": (80, 32),
}
CLIPS = ("svd", "animatediff", "wan")
# Its sampler begins at a standard deviation of 700, which the first prediction is multiplied by.
TOLERANCE = {"svd": 3e-4}


def _generations(name):
    """Arguments of generations one after another."""
    yield {}
    if name in TALL:
        yield dict(zip(("height", "width"), TALL[name], strict=True))
    if name not in CLIPS:
        # An odd batch, and no guidance.
        unguided = dict(true_cfg_scale=1.0, negative_prompt=None) if name == "qwenimage" else dict(guidance_scale=1.0)
        yield unguided | dict(num_images_per_prompt=3, seed=1)
    yield dict(seed=2)


def _exact(rank, num_patches, names):
    """{family: (patched pictures, largest differences to the unpatched ones, what unpatch left, held)}"""
    found = {}
    for name in names:
        pipe = tiny_pipelines.build(name)
        before = {key: set(vars(m)) for key, m in tiny_pipelines.denoiser(pipe).named_modules()}
        runs = list(_generations(name))
        runtime = asyncdiff_fast.patch(pipe, num_patches=num_patches, exchange="sync", timeout_s=100)
        pictures = [tiny_pipelines.generate(pipe, name, steps=2, **run) for run in runs]
        held, stats = runtime.plan.rows.held, runtime.stats()
        asyncdiff_fast.unpatch(pipe)
        left = [k for k, m in tiny_pipelines.denoiser(pipe).named_modules() if set(vars(m)) != before[k]]
        errors = []
        if rank == 0:
            plain = [tiny_pipelines.generate(pipe, name, steps=2, **run) for run in runs]
            errors = [float(np.abs(a - b).max()) for a, b in zip(pictures, plain, strict=True)]
        found[name] = pictures, errors, left, held, stats["sent_bytes"]
    return found


FEW = ("sdxl", "flux", "wan")
MORE = tuple(name for name in tiny_pipelines.NAMES if name not in FEW)


@functools.cache
def exact(num_patches, names):
    return ranks.run(num_patches, _exact, num_patches, names, timeout=280)


CASES = [(n, name) for n in (2, 3, 4) for name in tiny_pipelines.NAMES]


@pytest.mark.parametrize("num_patches, name", quick(CASES, *((2, name) for name in FEW)))
def test_synchronous_patches_give_the_unpatched_picture(num_patches, name):
    results = [rank[name] for rank in exact(num_patches, FEW if name in FEW else MORE)]
    pictures, errors, left, held, sent_bytes = results[0]
    for error, arguments in zip(errors, _generations(name), strict=True):
        assert error <= TOLERANCE.get(name, 2e-5), f"{arguments}: differs by {error:.1e}"
    assert len(held) == num_patches and sent_bytes > 0
    assert not left, "unpatch must leave no attribute behind"
    for rank, (theirs, *_) in enumerate(results):
        assert all(map(np.array_equal, theirs, pictures)), f"rank {rank} has another picture"


def _in_a_row(rank, num_patches):
    """Sizes, batches, prompts and image-to-image one after another, and whether unpatch restores bit for bit."""
    pipe = tiny_pipelines.build("sd15")
    strength = image_to_image(pipe)

    def generate(**kwargs):
        return lambda: tiny_pipelines.generate(pipe, "sd15", steps=2, **kwargs)

    runs = [
        generate(),
        strength(0.3),
        generate(height=16, width=72, num_images_per_prompt=3, guidance_scale=1.0),
        generate(prompt=["a cat", "a dog that is rather long and never ends"]),
        generate(),
    ]
    asyncdiff_fast.patch(pipe, num_patches=num_patches, exchange="sync", timeout_s=100)
    pictures = [run() for run in runs]
    asyncdiff_fast.unpatch(pipe)
    plain = [run() for run in runs] if rank == 0 else []
    return pictures, [float(np.abs(a - b).max()) for a, b in zip(pictures, plain, strict=False)]


@pytest.mark.parametrize("num_patches", [pytest.param(n, marks=[pytest.mark.exhaustive] * (n != 2)) for n in (2, 3)])
def test_batches_prompts_and_image_to_image_in_a_row(num_patches):
    results = ranks.run(num_patches, _in_a_row, num_patches, timeout=200)
    pictures, errors = results[0]
    assert len(errors) == 5 and max(errors) <= 2e-5, errors
    for theirs, _ in results:
        assert all(map(np.array_equal, theirs, pictures))


# Latents that no pipeline would make. Height and width; tokens to a row for a sequence.


def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _unet(model, n, height, width):
    return model(_random(n, 4, height, width), 500, encoder_hidden_states=_random(n, 5, 32)).sample


def _svd(model, n, height, width):
    text = _random(n, 1, 32)
    return model(_random(n, 3, 8, height, width), 500.0, text, added_time_ids=_random(n, 3)).sample


def _pixart(model, n, height, width):
    conditions = {"resolution": None, "aspect_ratio": None}
    text, timestep = _random(n, 5, 32), torch.full((n,), 500.0)
    return model(_random(n, 4, height, width), text, timestep=timestep, added_cond_kwargs=conditions).sample


def _wan(model, n, height, width):
    return model(_random(n, 16, 3, height, width), torch.full((n,), 500.0), _random(n, 5, 32)).sample


def _flux(model, n, height, width):
    ids = torch.zeros(height * width, 3)
    ids[:, 1], ids[:, 2] = torch.arange(height * width) // width, torch.arange(height * width) % width
    numbers = dict(timestep=torch.full((n,), 0.5), guidance=torch.full((n,), 3.0), pooled_projections=_random(n, 32))
    text = dict(encoder_hidden_states=_random(n, 5, 32), txt_ids=torch.zeros(5, 3))
    return model(_random(n, height * width, 16), img_ids=ids, **numbers, **text).sample


SIZES = {
    "unet": (tiny_denoisers.sd15_unet, _unet, [(17, 13), (9, 9), (5, 8), (4, 4), (31, 6), (64, 8)]),
    "svd": (tiny_denoisers.svd_unet, _svd, [(20, 12), (4, 4)]),
    "pixart": (tiny_denoisers.pixart_transformer, _pixart, [(18, 10), (8, 6), (14, 4)]),
    "wan": (tiny_denoisers.wan_transformer, _wan, [(18, 10), (8, 6)]),
    "flux": (tiny_denoisers.flux_transformer, _flux, [(9, 7), (5, 5), (4, 10)]),
}


# Unpatched, fp32 is 4e-5 from fp64 here: the norms of its lowest level see one pixel of each frame.
ROUNDING = {("svd", (3, 4, 4)): 2e-4}


@torch.no_grad()
def _odd_sizes(rank, num_patches):
    errors = {}
    for name, (make, call, sizes) in SIZES.items():
        model = make()
        calls = [(1 + 2 * (i == 1), *size) for i, size in enumerate(sizes)]
        asyncdiff_fast.patch(model, num_patches=num_patches, exchange="sync", timeout_s=100)
        patched = [call(model, *size) for size in calls]
        asyncdiff_fast.unpatch(model)
        plain = [call(model, *size) for size in calls]
        errors |= {
            (name, size): float((a - b).abs().max() / b.abs().max())
            for size, a, b in zip(calls, patched, plain, strict=True)
        }
    return errors


@pytest.mark.parametrize("num_patches", [pytest.param(n, marks=[pytest.mark.exhaustive] * (n != 3)) for n in (2, 3, 4)])
def test_odd_sizes(num_patches):
    for errors in ranks.run(num_patches, _odd_sizes, num_patches, timeout=200):
        assert not {case: error for case, error in errors.items() if not error <= ROUNDING.get(case, 2e-5)}


def _sd3(model, n, height, width, length):
    numbers = dict(pooled_projections=_random(n, 64), timestep=torch.full((n,), 500.0))
    return model(_random(n, 4, height, width), _random(n, length, 32), **numbers).sample


def _qwen(model, n, height, width, length):
    x, text = _random(n, height * width // 4, 16), _random(n, length, 32)
    mask, shapes = torch.ones(n, length, dtype=torch.bool), [[(1, height // 2, width // 2)]] * n
    return model(x, text, mask, torch.full((n,), 0.5), shapes).sample


def _long_flux(model, n, height, width, length):
    ids = torch.zeros(height * width // 4, 3)
    ids[:, 1], ids[:, 2] = torch.arange(len(ids)) // (width // 2), torch.arange(len(ids)) % (width // 2)
    numbers = dict(timestep=torch.full((n,), 0.5), guidance=torch.full((n,), 3.0), pooled_projections=_random(n, 32))
    text = dict(encoder_hidden_states=_random(n, length, 32), txt_ids=torch.zeros(length, 3))
    return model(_random(n, len(ids), 16), img_ids=ids, **numbers, **text).sample


def _long_pixart(model, n, height, width, length):
    conditions = {"resolution": None, "aspect_ratio": None}
    text, timestep = _random(n, length, 32), torch.full((n,), 500.0)
    return model(_random(n, 4, height, width), text, timestep=timestep, added_cond_kwargs=conditions).sample


def _long_wan(model, n, height, width, length):
    return model(_random(n, 16, 1, height, width), torch.full((n,), 500.0), _random(n, length, 32)).sample


JOINT = {
    "sd3": (tiny_denoisers.sd3_transformer, _sd3),
    "qwen": (tiny_denoisers.qwenimage_transformer, _qwen),
    "flux": (tiny_denoisers.flux_transformer, _long_flux),
    "pixart": (tiny_denoisers.pixart_transformer, _long_pixart),
    "wan": (tiny_denoisers.wan_transformer, _long_wan),
}


@torch.no_grad()
def _long_text(rank, num_patches):
    """Text of as many tokens as the picture, as one of its rows, as the height."""
    errors = {}
    for name, (make, call) in JOINT.items():
        model = make()
        for length in (32, 4, 16):
            plain = call(model, 1, 16, 8, length)
            try:
                asyncdiff_fast.patch(model, num_patches=num_patches, exchange="sync", timeout_s=100)
                patched = call(model, 1, 16, 8, length)
                errors[name, length] = float((patched - plain).abs().max() / plain.abs().max())
            except ValueError as error:
                errors[name, length] = str(error)
            if "_asyncdiff_fast" in vars(model):
                asyncdiff_fast.unpatch(model)
    return errors


def test_text_as_long_as_the_picture():
    for errors in ranks.run(2, _long_text, 2, timeout=200):
        assert not {k: e for k, e in errors.items() if not (isinstance(e, float) and e <= 2e-5)}
