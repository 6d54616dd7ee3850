"""Autoencoders of diffusers, tiny, random and offline, with a latent for each that three ranks cannot share evenly.

`build(name)` gives the same weights in every process, `latent(name)` the arguments of `decode`.
"""

import diffusers
import tiny_denoisers
import tiny_parts
import torch


class Pipe:
    """As a pipeline with a denoiser and an autoencoder."""

    def __init__(self, vae):
        self.components = {"unet": tiny_denoisers.sd15_unet(), "vae": vae}


def _blocks(family, number):
    return dict(
        down_block_types=(f"{family}DownBlock3D",) * number,
        up_block_types=(f"{family}UpBlock3D",) * number,
    )


def _taesd():
    sizes = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), upsampling_scaling_factor=2)
    return diffusers.AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))


def _cogvideox():
    return diffusers.AutoencoderKLCogVideoX(
        **_blocks("CogVideoX", 4), block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2, latent_channels=4
    )


def _ltx():
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("conv",) * 2,
        upsample_residual=(False,) * 2,
        upsample_factor=(1,) * 2,
    )


def _mochi():
    return diffusers.AutoencoderKLMochi(
        latent_channels=4,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def _hunyuan_video():
    return diffusers.AutoencoderKLHunyuanVideo(
        **_blocks("HunyuanVideo", 4),
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
    )


def _hunyuan_video_15():
    return diffusers.AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1)


def _cosmos():
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4, num_layers=1
    )


def _magvit():
    return diffusers.AutoencoderKLMagvit(
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2, latent_channels=4
    )


def _dc():
    return diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
    )


def _movq():
    return diffusers.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("AttnUpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=16,
        norm_type="spatial",
    )


# name: (how it is built, its latent, other arguments of `decode`)
_DECODERS = {
    "AutoencoderKL": (tiny_parts.image_vae, (2, 4, 11, 6), {}),
    "AutoencoderTiny": (_taesd, (2, 4, 11, 6), {}),
    "AutoencoderKLTemporalDecoder": (tiny_parts.svd_vae, (6, 4, 11, 6), dict(num_frames=3)),
    "VQModel": (_movq, (1, 4, 11, 6), {}),
    "AutoencoderDC": (_dc, (1, 8, 11, 6), {}),
    "AutoencoderKLWan": (tiny_parts.wan_vae, (1, 16, 3, 11, 6), {}),
    "AutoencoderKLQwenImage": (tiny_parts.qwen_vae, (1, 4, 1, 11, 6), {}),
    "AutoencoderKLCogVideoX": (_cogvideox, (1, 4, 5, 7, 4), {}),
    "AutoencoderKLLTXVideo": (_ltx, (1, 8, 3, 11, 6), {}),
    "AutoencoderKLMochi": (_mochi, (1, 4, 3, 7, 4), {}),
    "AutoencoderKLHunyuanVideo": (_hunyuan_video, (1, 4, 3, 7, 4), {}),
    "AutoencoderKLHunyuanVideo15": (_hunyuan_video_15, (1, 4, 2, 7, 4), {}),
    "AutoencoderKLCosmos": (_cosmos, (1, 4, 2, 7, 4), {}),
    "AutoencoderKLMagvit": (_magvit, (1, 4, 2, 7, 4), {}),
}
NAMES = tuple(_DECODERS)


def build(name):
    """A tiny autoencoder of that class."""
    return tiny_parts.fill(_DECODERS[name][0]())


def latent(name):
    """(latent, other arguments) of its `decode`."""
    _, shape, more = _DECODERS[name]
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)), more
