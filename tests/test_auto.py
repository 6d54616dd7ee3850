"""`import asyncdiff_fast.auto`: which pipelines it patches, with what, and that it leaves nothing behind."""

import importlib
import os

import diffusers
import pytest
import ranks
import tiny_pipelines
import torch


@pytest.fixture
def auto(monkeypatch):
    """The module, enabled; everything is as before afterwards."""
    monkeypatch.delenv("ASYNCDIFF_FAST", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    module = importlib.import_module("asyncdiff_fast.auto")
    module.enable()
    yield module
    module.disable()


def _generate(pipe, steps=2):
    generator = torch.Generator().manual_seed(0)
    return pipe(
        tiny_pipelines.PROMPT, num_inference_steps=steps, height=32, width=32, generator=generator, output_type="latent"
    )


def _is_patched(pipe):
    return "_asyncdiff_fast" in vars(pipe.unet)


def test_alone_and_without_options_nothing_is_patched(auto):
    pipe = tiny_pipelines.build("sd15")
    _generate(pipe)
    assert auto.options() is None and not _is_patched(pipe)


def test_options_come_from_the_environment(auto, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert auto.options() == {"parallel_steps": 3}
    monkeypatch.setenv("ASYNCDIFF_FAST", "warmup_steps=auto")
    assert auto.options() == {"warmup_steps": "auto", "parallel_steps": 3}
    monkeypatch.setenv("ASYNCDIFF_FAST", "stride=2,warmup_steps=2")
    assert auto.options() == {"stride": 2, "warmup_steps": 2, "num_stages": 2}
    monkeypatch.setenv("ASYNCDIFF_FAST", "nun_stages=2")
    with pytest.raises(TypeError, match="unknown option nun_stages"):
        auto.options()


def test_a_pipeline_is_patched_when_first_called_and_only_then(auto, monkeypatch):
    monkeypatch.setenv("ASYNCDIFF_FAST", "warmup_steps=2")
    pipe = tiny_pipelines.build("sd15")
    assert not _is_patched(pipe)
    _generate(pipe)
    assert _is_patched(pipe) and pipe.unet._asyncdiff_fast.config.warmup_steps == 2
    # Another pipeline around the same denoiser, and the same one again: once is enough.
    runtime = pipe.unet._asyncdiff_fast
    _generate(diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False))
    _generate(pipe)
    assert pipe.unet._asyncdiff_fast is runtime
    # Unpatched by hand, it stays so.
    importlib.import_module("asyncdiff_fast").unpatch(pipe)
    _generate(pipe)
    assert not _is_patched(pipe)


def test_a_pipeline_patched_by_hand_is_left_alone(auto, monkeypatch):
    monkeypatch.setenv("ASYNCDIFF_FAST", "warmup_steps=2")
    pipe = tiny_pipelines.build("sd15")
    package = importlib.import_module("asyncdiff_fast")
    runtime = package.patch(pipe, warmup_steps=3)
    _generate(pipe)
    assert pipe.unet._asyncdiff_fast is runtime
    auto.disable()
    assert pipe.unet._asyncdiff_fast is runtime
    package.unpatch(pipe)


def test_classes_defined_later_are_patched_too_and_disable_restores_all(auto, monkeypatch):
    monkeypatch.setenv("ASYNCDIFF_FAST", "warmup_steps=2")
    auto.disable()
    pristine = diffusers.StableDiffusionPipeline.__call__
    auto.enable()
    auto.enable()
    assert diffusers.StableDiffusionPipeline.__call__.__wrapped__ is pristine

    class Mine(diffusers.StableDiffusionPipeline):
        def __call__(self, prompt, **kwargs):
            return super().__call__(prompt, guidance_scale=1.0, **kwargs)

    parts = tiny_pipelines.build("sd15").components
    pipe = Mine(**parts, requires_safety_checker=False)
    _generate(pipe)
    assert _is_patched(pipe)
    auto.disable()
    assert not _is_patched(pipe)
    assert diffusers.StableDiffusionPipeline.__call__ is pristine
    assert not hasattr(Mine.__call__, "__wrapped__") and "__init_subclass__" not in vars(diffusers.DiffusionPipeline)


def test_too_few_processes_are_refused_with_the_way_out(auto, monkeypatch):
    monkeypatch.setenv("ASYNCDIFF_FAST", "num_stages=2")
    pipe = tiny_pipelines.build("sd15")
    with pytest.raises(ValueError, match="start 2 processes"):
        _generate(pipe)
    assert not _is_patched(pipe)


def _two_ranks(rank):
    os.environ["ASYNCDIFF_FAST"] = "warmup_steps=1,tolerance=1000"
    exact = _generate(tiny_pipelines.build("sd15"), 4).images
    auto = importlib.import_module("asyncdiff_fast.auto")
    pipe = tiny_pipelines.build("sd15")
    predicted = _generate(pipe, 4).images
    steps = pipe.unet._asyncdiff_fast.stats()["steps"]
    auto.disable()
    again = _generate(pipe, 4).images
    return steps["exact_steps"], steps["block_lengths"], torch.equal(predicted, exact), torch.equal(again, exact)


def test_two_ranks_evaluate_steps_side_by_side_and_disable_gives_the_pipeline_back():
    assert ranks.run(2, _two_ranks) == [(2, {2: 1}, False, True)] * 2
