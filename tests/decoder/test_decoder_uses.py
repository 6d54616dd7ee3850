"""Decoders shared beside every way of sharing the denoiser: settings of diffusers, faults, and what is refused."""

import functools
import time

import accelerate
import numpy as np
import pytest
import ranks
import tiny_decoders
import tiny_parts
import tiny_pipelines
import torch
from tiny_decoders import Pipe

import asyncdiff_fast

WAYS = ({"num_stages": 2}, {"num_patches": 2}, {"parallel_steps": 2}, {"cfg_parallel": True})


def _pictures(pipe, **options):
    return tiny_pipelines.generate(pipe, "sd15", steps=2, **options)


def _in_pipelines():
    """(largest difference to the unpatched decode of the same latents, of each way; whether latents came alike)"""
    errors, alike = [], []
    for way in WAYS:
        pipe = tiny_pipelines.build("sd15")
        asyncdiff_fast.patch(pipe, vae=True, warmup_steps=2, timeout_s=60, **way)
        shared = _pictures(pipe)
        sent = pipe.vae._asyncdiff_fast.stats()["sent_bytes"]
        latents = tiny_pipelines.generate(pipe, "sd15", steps=2, output_type="latent")
        alike.append(sent == pipe.vae._asyncdiff_fast.stats()["sent_bytes"] > 0 and np.shape(latents)[1] == 4)
        asyncdiff_fast.unpatch(pipe)
        errors.append(float(np.abs(shared - _pictures(pipe)).max()))
    return errors, alike


def _decoded(vae, latent):
    with torch.no_grad():
        return vae.decode(latent).sample


def _against_plain(vae, latent, size):
    """Relative difference of a shared decode to the plain one, and bytes sent."""
    pipe = Pipe(vae)
    asyncdiff_fast.patch(pipe, num_patches=size, exchange="sync", vae=True, timeout_s=60)
    shared, sent = _decoded(vae, latent), vae._asyncdiff_fast.stats()["sent_bytes"]
    asyncdiff_fast.unpatch(pipe)
    plain = _decoded(vae, latent)
    return float((shared - plain).float().abs().max() / plain.float().abs().max()), sent


def _settings(size):
    """{setting: (difference, bytes sent)}"""
    found, latent = {}, torch.randn(2, 4, 11, 6, generator=torch.Generator().manual_seed(0))
    vae = tiny_parts.image_vae()
    vae.enable_slicing()
    found["slices"] = _against_plain(vae, latent, size)
    vae = tiny_parts.image_vae(sample_size=16)
    vae.enable_tiling()
    found["tiles"] = _against_plain(vae, latent, size)
    vae = tiny_parts.image_vae()
    accelerate.cpu_offload(vae, torch.device("cpu"))
    found["offloaded"] = _against_plain(vae, latent, size)
    found["half"] = _against_plain(tiny_parts.image_vae().to(torch.bfloat16), latent.bfloat16(), size)
    return found


def _said(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _faults(rank, size):
    """What is said of tiles of a clip, of latents that differ, of a failure; and the difference of the next decode."""
    found, options = {}, dict(num_patches=size, exchange="sync", vae=True, timeout_s=30)
    clip = tiny_decoders.build("AutoencoderKLWan")
    clip.enable_tiling()
    found["tiles of a clip"] = _said(asyncdiff_fast.patch, Pipe(clip), **options)
    found["no autoencoder"] = _said(asyncdiff_fast.patch, Pipe(clip).components["unet"], **options)
    vae, latent = tiny_parts.image_vae(), torch.randn(1, 4, 9, 6, generator=torch.Generator().manual_seed(0))
    plain, pipe = _decoded(vae, latent), Pipe(vae)
    asyncdiff_fast.patch(pipe, **options)
    found["again"] = _said(asyncdiff_fast.patch, Pipe(vae), **options)
    found["other latents"] = _said(_decoded, vae, latent + rank)
    handle = vae.decoder.mid_block.register_forward_pre_hook(_fail) if rank == 1 else None
    found["failure"] = _said(_decoded, vae, latent)
    if handle is not None:
        handle.remove()
    found["after"] = float((_decoded(vae, latent) - plain).abs().max())
    # The second time nothing is forgotten.
    weight = vae.decoder.conv_in.weight
    weight.data.mul_(1 + rank)
    found["other weights"], found["other weights again"] = (_said(_decoded, vae, latent) for _ in range(2))
    weight.data.div_(1 + rank)
    handle = vae.decoder.mid_block.register_forward_hook(_halved) if rank == 1 else None
    found["a hook on one rank"] = _said(_decoded, vae, latent)
    if handle is not None:
        handle.remove()
    found["after these"] = float((_decoded(vae, latent) - plain).abs().max())
    vae._asyncdiff_fast.world.timeout_s = 1
    _said(_decoded, vae, latent) if rank == 1 else time.sleep(3)
    vae._asyncdiff_fast.world.timeout_s = 30
    found["after one alone"] = float((_decoded(vae, latent) - plain).abs().max())
    with torch.enable_grad():
        found["gradients"] = vae.decode(latent.clone().requires_grad_()).sample.requires_grad
    asyncdiff_fast.unpatch(pipe)
    found["left"] = bool(torch.equal(_decoded(vae, latent), plain))
    return found


def _halved(module, args, output):
    return output / 2


def _fail(module, args):
    raise RuntimeError("out of memory, say")


def _two(rank):
    return _in_pipelines(), _settings(2), _faults(rank, 2)


@functools.cache
def two():
    return ranks.run(2, _two, timeout=280)


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_the_ranks_of_every_way_share_the_decode(way):
    for (errors, alike), *_ in two():
        # Pictures have values from 0 to 1. Those of stale inputs are drawn exact here: all steps are warm-up.
        assert errors[way] < 1e-4 and alike[way]


@pytest.mark.parametrize("setting, tolerance", (("slices", 2e-5), ("tiles", 2e-5), ("offloaded", 2e-5), ("half", 4e-2)))
def test_settings_of_diffusers_go_on_working(setting, tolerance):
    for _, found, _ in two():
        error, sent = found[setting]
        assert error < tolerance and sent > 0


SAID = {
    "tiles of a clip": "call disable_tiling()",
    "no autoencoder": "pass the pipeline, or vae=False",
    "again": "patched already: call unpatch() first",
    "other latents": "every rank must decode the same latent",
    "failure": "out of memory, say",
    "other weights": "every rank must hold the same weights: those of the autoencoder",
    "other weights again": "every rank must hold the same weights",
    "a hook on one rank": "every rank must run the same autoencoder",
}


@pytest.mark.parametrize("case", SAID)
def test_all_ranks_say_what_is_wrong(case):
    for *_, found in two():
        assert SAID[case] in found[case]


def test_after_a_failure_the_next_decode_is_right_and_unpatch_restores():
    for *_, found in two():
        assert found["after"] < 1e-5 and found["left"] and found["gradients"]
        assert found["after these"] < 1e-5 and found["after one alone"] < 1e-5


def test_the_plan_shows_what_a_decode_sends():
    inputs = dict(prompt="a cat", height=32, width=32)
    text = str(asyncdiff_fast.plan(tiny_pipelines.build("sd15"), inputs, num_patches=3, exchange="sync", vae=True))
    assert "decoder AutoencoderKL, 3 ranks" in text and "MB sent per decode" in text
