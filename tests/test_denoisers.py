"""Which modules of a pipeline are its denoisers, whatever the pipeline calls them."""

import importlib
import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, PriorTransformer, StableCascadeUNet

from asyncdiff_fast.patching import denoisers, is_patched


def _cascade():
    return StableCascadeUNet(
        in_channels=4, out_channels=4, conditioning_dim=32, block_out_channels=(32, 32), num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), clip_text_pooled_in_channels=16,
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock"),) * 2, self_attn=(False, False),
        down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1), dropout=(0.1, 0.1), patch_size=1,
        timestep_ratio_embedding_dim=16,
    )  # fmt: skip


def _prior():
    return PriorTransformer(num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=8)


def _pipeline(**parts):
    return SimpleNamespace(components=parts)


@pytest.mark.parametrize("name, make", [("decoder", _cascade), ("prior", _prior), ("super_res_first", _cascade)])
def test_a_denoiser_is_known_by_its_timestep(name, make):
    model = make()
    pipe = _pipeline(**{name: model, "vqgan": torch.nn.Linear(2, 2), "scheduler": None})
    assert denoisers(pipe) == [model]


def test_names_come_first_and_controls_never():
    unet, control = _cascade(), _cascade()
    assert denoisers(_pipeline(unet=unet, prior=_prior())) == [unet]
    with pytest.raises(TypeError, match="pass the denoiser itself"):
        denoisers(_pipeline(controlnet=control))


class Decoder(DiffusionPipeline):
    """As Stable Cascade's decoder holds its denoiser."""

    def __init__(self, decoder, scheduler):
        super().__init__()
        self.register_modules(decoder=decoder, scheduler=scheduler)

    def __call__(self):
        """Draw nothing."""


class Upscaler(Decoder):
    """Holds none."""

    def __call__(self):
        """Draw nothing."""


def test_auto_patches_it_or_says_once_that_it_does_not(monkeypatch, caplog):
    monkeypatch.setenv("ASYNCDIFF_FAST", "kernels=auto")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    auto = importlib.import_module("asyncdiff_fast.auto")
    auto.enable()
    try:
        pipe = Decoder(_cascade(), DDPMScheduler())
        pipe()
        assert is_patched(pipe.decoder)
        with caplog.at_level(logging.WARNING):
            other = Upscaler(torch.nn.Linear(2, 2), DDPMScheduler())
            other()
            other()
        assert [r.getMessage().split(":")[0] for r in caplog.records] == ["Upscaler is not patched"]
    finally:
        auto.disable()
