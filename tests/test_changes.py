"""What users do to a patched model: its blocks change class, others' hooks come and go, it is copied."""

import copy
import functools
import pickle

import accelerate
import diffusers
import guided
import pytest
import ranks
import tiny_denoisers
import tiny_parts
import tiny_pipelines
import torch

import asyncdiff_fast


def _error(found, right):
    return float(abs(found - right).max() / abs(right).max())


def _draw(pipe, name="sd15", **arguments):
    return tiny_pipelines.generate(pipe, name, steps=3, **arguments)


def _swap(blocks):
    for block in blocks:
        kind = type(block)

        def forward(self, *args, _kind=kind, **kwargs):
            return tuple(0.9 * x for x in _kind.forward(self, *args, **kwargs))

        block.__class__ = type(f"Merging{kind.__name__}", (kind,), {"forward": forward})


def _class_replaced():
    """As token merging does, between two pictures; and back again."""
    pipe = tiny_pipelines.build("flux")
    blocks = pipe.transformer.transformer_blocks
    before = _draw(pipe, "flux")
    asyncdiff_fast.patch(pipe, num_stages=2, warmup_steps=100, timeout_s=60)
    _draw(pipe, "flux")
    _swap(blocks)
    swapped = _draw(pipe, "flux")
    asyncdiff_fast.unpatch(pipe)
    right = _draw(pipe, "flux")
    for block in blocks:
        block.__class__ = type(block).__mro__[1]
    return {"swapped": _error(swapped, right), "restored": _error(_draw(pipe, "flux"), before)}


def _offloaded_after():
    """accelerate's forwards are put upon ours, and go on working when ours are gone."""
    pipe = tiny_pipelines.build("sd15")
    plain = _draw(pipe)
    asyncdiff_fast.patch(pipe, num_stages=2, warmup_steps=100, timeout_s=60)
    _draw(pipe)
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    offloaded = _error(_draw(pipe), plain)
    asyncdiff_fast.unpatch(pipe)
    after = _error(_draw(pipe), plain)
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    return {"offloaded": offloaded, "after": after, "hooks gone": _error(_draw(pipe), plain)}


def _offloaded_before():
    """A pipeline whose models are offloaded takes accelerate's hooks off and puts them on again after each picture."""
    pipe = tiny_pipelines.build("sd15")
    plain = _draw(pipe)
    _, hook = accelerate.cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    runtime = asyncdiff_fast.patch(pipe, num_stages=2, warmup_steps=1, timeout_s=60)
    _draw(pipe)
    hook.remove()
    _, hook = accelerate.cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    _draw(pipe)
    shared = runtime.stats()["compute_calls"]
    asyncdiff_fast.unpatch(pipe)
    error = _error(_draw(pipe), plain)
    hook.remove()
    assert "forward" not in vars(pipe.unet) or pipe.unet.forward.__func__ is type(pipe.unet).forward
    return {"patched still": 0 if shared == 4 else 1, "after": error}


def _copies():
    pipe = tiny_pipelines.build("sd15")
    asyncdiff_fast.patch(pipe, num_stages=2, timeout_s=60)
    _draw(pipe)
    for copied in (lambda: copy.deepcopy(pipe), lambda: copy.deepcopy(pipe.unet), lambda: pickle.dumps(pipe.unet)):
        with pytest.raises(ValueError, match=r"UNet2DConditionModel is patched.*call asyncdiff_fast.unpatch\(\) first"):
            copied()
    asyncdiff_fast.unpatch(pipe)
    pickle.dumps(copy.deepcopy(pipe.unet))
    return {}


def _panorama():
    """Each view of a step is denoised and stepped alone: three views and four steps, of which all are exact."""
    parts = dict(tiny_pipelines._sd_parts(), unet=tiny_denoisers.sd15_unet(), vae=tiny_parts.image_vae(num_levels=4))
    none = dict(safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False)
    pipe = diffusers.StableDiffusionPanoramaPipeline(**parts, **none)
    pipe.get_views = functools.partial(pipe.get_views, window_size=8, stride=4)
    plain = _draw(pipe, height=64, width=128)
    runtime = asyncdiff_fast.patch(pipe, num_stages=2, warmup_steps=2, timeout_s=60)
    drawn = _draw(pipe, height=64, width=128)
    calls = runtime.stats()
    assert (calls["exact_calls"], calls["compute_calls"]) == (6, 3)
    asyncdiff_fast.unpatch(pipe)
    assert 0 < _error(drawn, plain) < 0.5
    return {}


def _kept_maps():
    """Self-attention guidance reads what its processor kept, which ranks that replay the block do not have."""
    parts = dict(tiny_pipelines._sd_parts(), unet=tiny_denoisers.sd15_unet())
    none = dict(safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False)
    pipe = diffusers.StableDiffusionSAGPipeline(**parts, **none)
    plain = _draw(pipe)
    asyncdiff_fast.patch(pipe, num_stages=2, warmup_steps=1, timeout_s=60)
    with pytest.raises(ValueError, match=r"attn1.processor keeps .*parallel_steps"):
        _draw(pipe)
    return {"after": _error(_draw(pipe), plain)}


def _guiders():
    """Hooks of guiders leave layers uncalled in one of a step's calls, or from some step on."""
    model, found = tiny_denoisers.wan_transformer(), {}
    for make, shared in ((guided.skip_layers, 18), (guided.auto_guidance, 12), (guided.late_auto_guidance, 8)):
        plain = guided.sample(model, make(), 8)
        runtime = asyncdiff_fast.patch(model, num_stages=2, warmup_steps=2, timeout_s=60)
        error = _error(guided.sample(model, make(), 8), plain)
        calls = runtime.stats()["compute_calls"]
        asyncdiff_fast.unpatch(model)
        found[f"{make.__name__} shares {calls}"] = 0 if calls >= shared and error < 0.5 else 1
    return found


CASES = (_class_replaced, _offloaded_after, _offloaded_before, _copies, _panorama, _kept_maps, _guiders)


def _run(rank):
    return {f"{case.__name__}, {name}": error for case in CASES for name, error in case().items()}


def test_changes():
    for rank, errors in enumerate(ranks.run(2, _run, timeout=200)):
        assert all(error < 1e-4 for error in errors.values()), f"rank {rank}: {errors}"
