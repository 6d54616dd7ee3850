"""`cfg_parallel` is exact whatever guidance does: guiders of modular pipelines, adapters, pictures without guidance."""

import diffusers
import guided
import pytest
import ranks
import tiny_denoisers
import tiny_pipelines
from tiny_parts import fill

import asyncdiff_fast

GUIDERS = (guided.interval, guided.auto_guidance, guided.late_auto_guidance, guided.skip_layers)


def _error(found, right):
    return float(abs(found - right).max() / abs(right).max())


def _guiders():
    """{guider: error} of one model, patched once."""
    model = tiny_denoisers.wan_transformer()
    plain = {make.__name__: guided.sample(model, make(), 6) for make in GUIDERS}
    asyncdiff_fast.patch(model, cfg_parallel=True, timeout_s=60)
    return {make.__name__: _error(guided.sample(model, make(), 6), plain[make.__name__]) for make in GUIDERS}


def _adapter_pipeline():
    adapter = fill(diffusers.T2IAdapter(channels=[16, 32, 32, 32], num_res_blocks=1, downscale_factor=2))
    parts = dict(tiny_pipelines._sd_parts(), unet=tiny_denoisers.sd15_unet(), adapter=adapter)
    none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return diffusers.StableDiffusionAdapterPipeline(**parts, **none)


def _adapter():
    """Its features come in a list that the forward empties."""
    pipe = _adapter_pipeline()

    def draw():
        image = tiny_pipelines._picture(32)
        return tiny_pipelines.generate(pipe, "sd15", steps=3, image=image)

    plain = draw()
    asyncdiff_fast.patch(pipe, cfg_parallel=True, timeout_s=60)
    return {"t2i_adapter": _error(draw(), plain)}


def _without_guidance():
    """Refused, as nothing could be shared; but the pipeline stays patched for those that have guidance."""
    pipe = tiny_pipelines.build("sd15")
    plain = [tiny_pipelines.generate(pipe, "sd15", steps=3, guidance_scale=scale) for scale in (5.0, 1.0)]
    runtime = asyncdiff_fast.patch(pipe, cfg_parallel=True, timeout_s=60)
    with pytest.raises(ValueError, match=r"cfg_parallel needs classifier-free guidance.*guidance_scale above 1"):
        tiny_pipelines.generate(pipe, "sd15", steps=3, guidance_scale=1.0)
    # Once guidance was seen, a picture without it is drawn.
    found = [tiny_pipelines.generate(pipe, "sd15", steps=3, guidance_scale=scale) for scale in (5.0, 1.0)]
    calls = runtime.stats()["sent_bytes"] > 0
    asyncdiff_fast.unpatch(pipe)
    return {"guided": _error(found[0], plain[0]), "unguided": _error(found[1], plain[1]), "shared": 0 if calls else 1}


def _run(rank):
    return _guiders() | _adapter() | _without_guidance()


def test_halves_are_exact():
    for rank, errors in enumerate(ranks.run(2, _run, timeout=200)):
        assert all(error < 1e-4 for error in errors.values()), f"rank {rank}: {errors}"
