"""CFG halves, patches and stages on one mesh of ranks."""

import functools

import numpy as np
import pytest
import ranks
import tiny_denoisers
import tiny_pipelines
import torch
from sequences import quick

import asyncdiff_fast

HALVES = ("sd15", "sdxl", "sdxl_controlnet", "svd", "animatediff", "sd3", "pixart", "hunyuandit", "wan", "qwenimage")
# torch gives half a batch 1e-6 (of the largest element) otherwise than the whole. Guidance and steps multiply that; for
# SVD the sampler's first standard deviation of 700 does.
TOLERANCE = {"svd": 3e-4}


def _run(rank, name, options, runs):
    """(patched pictures, largest differences to the unpatched ones, statistics)"""
    pipe = tiny_pipelines.build(name)
    runtime = asyncdiff_fast.patch(pipe, timeout_s=100, **options)
    pictures = [tiny_pipelines.generate(pipe, name, **run) for run in runs]
    stats = runtime.stats()
    asyncdiff_fast.unpatch(pipe)
    plain = [tiny_pipelines.generate(pipe, name, **run) for run in runs] if rank == 0 else []
    return pictures, [float(np.abs(a - b).max()) for a, b in zip(pictures, plain, strict=False)], stats


def _run_all(rank, names, options, runs):
    return {name: _run(rank, name, options, runs) for name in names}


def assert_same_everywhere(results):
    for pictures, *_ in results[1:]:
        assert all(map(np.array_equal, pictures, results[0][0]))


@functools.cache
def halves(names):
    return ranks.run(2, _run_all, names, dict(cfg_parallel=True), [dict(steps=3), dict(steps=3, seed=1)], timeout=280)


FEW = ("sd15", "wan")


@pytest.mark.parametrize("name", quick([(n,) for n in HALVES], *((n,) for n in FEW)))
def test_halves_give_the_unpatched_picture(name):
    results = [rank[name] for rank in halves(FEW if name in FEW else tuple(n for n in HALVES if n not in FEW))]
    assert_same_everywhere(results)
    assert max(results[0][1]) <= TOLERANCE.get(name, 3e-5)
    # One call of two, or half a batch, and nothing else.
    assert all(stats["sent_bytes"] > 0 for *_, stats in results)


MESHES = {
    "halves x patches, sync": (4, "sdxl", dict(cfg_parallel=True, num_patches=2, exchange="sync"), True),
    "two calls x patches, sync": (4, "wan", dict(cfg_parallel=True, num_patches=2, exchange="sync"), True),
    "halves x patches": (4, "sd15", dict(cfg_parallel=True, num_patches=2, warmup_steps=1), False),
    "two calls x patches": (4, "qwenimage", dict(cfg_parallel=True, num_patches=2, warmup_steps=1), False),
    "patches x stages, exact": (4, "sd15", dict(num_patches=2, num_stages=2, warmup_steps=9), True),
    "patches x stages": (4, "sd15", dict(num_patches=2, num_stages=2, warmup_steps=2), False),
    "patches x stages of tokens": (4, "flux", dict(num_patches=2, num_stages=2, warmup_steps=2), False),
    "halves x stages": (4, "sd15", dict(cfg_parallel=True, num_stages=2, warmup_steps=2), False),
}


@pytest.mark.parametrize("name", quick([(n,) for n in MESHES], ("halves x patches, sync",), ("patches x stages",)))
def test_mesh(name):
    world_size, family, options, exact = MESHES[name]
    runs = [dict(steps=4), dict(steps=4, prompt="two dogs"), dict(steps=4)]
    results = ranks.run(world_size, _run, family, options, runs, timeout=280)
    assert_same_everywhere(results)
    pictures, errors, _ = results[0]
    assert np.array_equal(pictures[0], pictures[2]), "a later generation must not see an earlier one"
    assert all(np.isfinite(picture).all() for picture in pictures)
    for error in errors:
        assert error <= 2e-5 if exact else 1e-5 < error < 0.5, f"{error:.1e} from the unpatched picture"


@torch.no_grad()
def _half_predictions(rank):
    """Largest difference of a few predictions, of the largest element: of CFG halves, and of torch on half a batch."""
    model = tiny_denoisers.sd15_unet()
    x, text = (torch.randn(*s, generator=torch.Generator().manual_seed(1)) for s in ((2, 4, 16, 8), (2, 5, 32)))

    def call(t, rows=slice(None)):
        return model(x[rows], t, encoder_hidden_states=text[rows]).sample

    times = (900, 500, 100)
    plain = torch.stack([call(t) for t in times])
    alone = torch.stack([torch.cat([call(t, slice(i, i + 1)) for i in (0, 1)]) for t in times])
    asyncdiff_fast.patch(model, cfg_parallel=True, timeout_s=60)
    found = torch.stack([call(t) for t in times])
    asyncdiff_fast.unpatch(model)
    return float((found - plain).abs().max() / plain.abs().max()), torch.equal(found, alone)


def test_halves_are_what_half_the_batch_gives():
    for error, same in ranks.run(2, _half_predictions):
        assert same and error <= 2e-6
