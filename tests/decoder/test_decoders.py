"""Every decoder on two and three ranks: to rounding what one process decodes, on all ranks, and nothing left behind."""

import functools

import pytest
import ranks
import tiny_decoders
import torch
from sequences import quick

import asyncdiff_fast

# What patching puts on a module; some autoencoders keep frames of their own from their first call on.
OURS = {"forward", "_decode", "_asyncdiff_fast", "_diffusers_hook", "__reduce_ex__"}


def _latents(latent, more):
    """Latents one after another: as it is, again, and of fewer rows."""
    yield latent
    yield -latent
    yield latent[..., :5, :]


def _decode(vae, latents, more):
    with torch.no_grad():
        return [vae.decode(latent, **more).sample for latent in latents]


def _all(rank, names, size):
    """{name: (pictures, largest errors of rank 0, what unpatch left, bytes sent, or what was refused)}"""
    found = {}
    for name in names:
        vae = tiny_decoders.build(name)
        latents = list(_latents(*tiny_decoders.latent(name)))
        more = tiny_decoders.latent(name)[1]
        before = {key: set(vars(m)) for key, m in vae.named_modules()}
        pipe = tiny_decoders.Pipe(vae)
        try:
            runtime = asyncdiff_fast.patch(pipe, num_patches=size, exchange="sync", vae=True, timeout_s=100)
            pictures = _decode(vae, latents, more)
        except ValueError as error:
            found[name] = str(error), [m for m in pipe.components.values() if asyncdiff_fast.patching.is_patched(m)]
            continue
        sent = runtime.decoder.stats()["sent_bytes"]
        asyncdiff_fast.unpatch(pipe)
        left = [key for key, m in vae.named_modules() if OURS & (vars(m).keys() - before[key])]
        plain = _decode(vae, latents, more) if rank == 0 else []
        errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(pictures, plain, strict=False)]
        found[name] = pictures, errors, left, sent
    return found


# Of an image, and of clips: with caches, and with attention that tells frames apart.
FEW = ("AutoencoderKL", "AutoencoderKLWan", "AutoencoderKLHunyuanVideo")
MORE = tuple(name for name in tiny_decoders.NAMES if name not in FEW)


@functools.cache
def _run(size, names):
    return ranks.run(size, _all, names, size, timeout=280)


def decoded(size, name):
    """What all ranks found of a decoder: two ranks look at all in one run."""
    names = tiny_decoders.NAMES if size == 2 else FEW if name in FEW else MORE
    return [found[name] for found in _run(size, names)]


# Their modules keep what one call leaves.
REFUSED = ("AutoencoderKLMagvit",)
SHARED = tuple(name for name in tiny_decoders.NAMES if name not in REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name_before_anything_is_patched(name):
    for said, patched in decoded(2, name):
        assert f"decoder of {name} cannot be shared" in said and "pass vae=False" in said and not patched


CASES = [(size, name) for size in (2, 3) for name in SHARED]


@pytest.mark.parametrize("size, name", quick(CASES, *((2, name) for name in SHARED), *((3, name) for name in FEW)))
def test_all_ranks_decode_the_picture_of_one(size, name):
    first, *others = decoded(size, name)
    assert len(first) == 4, first
    pictures, errors, left, sent = first
    # Sums of fp32 in another order.
    assert max(errors) < 2e-5 and len(errors) == 3, errors
    assert not left and sent > 0
    for theirs in others:
        assert all(map(torch.equal, pictures, theirs[0]))
