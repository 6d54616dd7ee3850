"""Denoisers of real size, and the arguments with which their pipelines call them; no checkpoint is read.

On the meta device both cost no memory, which is enough to trace, plan and count FLOPs; on another device the weights
have their class's own random start. Configs are those of the published checkpoints. Batch 2 means that the pipeline
sends both CFG halves in one call; FLUX takes its guidance as an input and Wan sends its halves in two calls.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import diffusers
import torch

_ANIMATEDIFF_FRAMES = 16
_WAN_FRAMES = 81


def _sd_inputs(config, height, width):
    return dict(
        sample=torch.randn(2, config.in_channels, height // 8, width // 8),
        timestep=torch.tensor(500),
        encoder_hidden_states=torch.randn(2, 77, config.cross_attention_dim),
        timestep_cond=None,
        cross_attention_kwargs=None,
        added_cond_kwargs=None,
        return_dict=False,
    )


def _sdxl_inputs(config, height, width):
    # original size, crop corner, target size
    time_ids = torch.tensor([[height, width, 0.0, 0.0, height, width]] * 2)
    return _sd_inputs(config, height, width) | dict(
        timestep=torch.tensor(500.0, dtype=torch.float32),
        added_cond_kwargs=dict(text_embeds=torch.randn(2, 1280), time_ids=time_ids),
    )


def _sd3_inputs(config, height, width):
    return dict(
        hidden_states=torch.randn(2, config.in_channels, height // 8, width // 8),
        timestep=torch.full((2,), 500.0, dtype=torch.float32),
        # 77 tokens of CLIP and 256 of T5
        encoder_hidden_states=torch.randn(2, 77 + 256, config.joint_attention_dim),
        pooled_projections=torch.randn(2, config.pooled_projection_dim),
        joint_attention_kwargs=None,
        return_dict=False,
    )


def _svd_inputs(config, height, width):
    return dict(
        # in_channels: the noisy latents and those of the first frame
        sample=torch.randn(2, config.num_frames, config.in_channels, height // 8, width // 8),
        timestep=torch.tensor(1.5, dtype=torch.float32),
        encoder_hidden_states=torch.randn(2, 1, config.cross_attention_dim),
        # frames per second, motion bucket, noise level
        added_time_ids=torch.tensor([[6.0, 127.0, 0.02]] * 2),
        return_dict=False,
    )


def _animatediff_inputs(config, height, width):
    frames = _ANIMATEDIFF_FRAMES
    return dict(
        sample=torch.randn(2, config.in_channels, frames, height // 8, width // 8),
        timestep=torch.tensor(500),
        # the pipeline repeats the text for each frame
        encoder_hidden_states=torch.randn(2 * frames, 77, config.cross_attention_dim),
        cross_attention_kwargs=None,
        added_cond_kwargs=None,
    )


def _flux_inputs(config, height, width):
    # a token is 2x2 latent pixels
    positions = [[0.0, row, column] for row in range(height // 16) for column in range(width // 16)]
    return dict(
        hidden_states=torch.randn(1, len(positions), config.in_channels),
        timestep=torch.full((1,), 0.5),
        guidance=torch.full((1,), 3.5, dtype=torch.float32),
        pooled_projections=torch.randn(1, config.pooled_projection_dim),
        encoder_hidden_states=torch.randn(1, 512, config.joint_attention_dim),
        txt_ids=torch.zeros(512, 3),
        img_ids=torch.tensor(positions),
        joint_attention_kwargs=None,
        return_dict=False,
    )


def _pixart_inputs(config, height, width):
    size = torch.tensor([[float(height), width]] * 2)
    return dict(
        hidden_states=torch.randn(2, config.in_channels, height // 8, width // 8),
        encoder_hidden_states=torch.randn(2, 120, config.caption_channels),
        encoder_attention_mask=torch.ones(2, 120, dtype=torch.int64),
        timestep=torch.full((2,), 500),
        added_cond_kwargs=dict(resolution=size, aspect_ratio=torch.full((2, 1), height / width)),
        return_dict=False,
    )


def _wan_inputs(config, height, width):
    # the autoencoder keeps the first frame and then one in four
    frames = 1 + (_WAN_FRAMES - 1) // 4
    return dict(
        hidden_states=torch.randn(1, config.in_channels, frames, height // 8, width // 8),
        timestep=torch.full((1,), 500),
        encoder_hidden_states=torch.randn(1, 512, config.text_dim),
        attention_kwargs=None,
        return_dict=False,
    )


class _Model(NamedTuple):
    title: str
    batch_size: int
    height: int
    width: int
    class_name: str
    config: dict
    make_inputs: Callable
    dtype: torch.dtype = torch.float16


# what a config leaves out is the default of its class
_SD15 = dict(cross_attention_dim=768, sample_size=64)
_SD21 = dict(
    cross_attention_dim=1024,
    attention_head_dim=(5, 10, 20, 20),
    sample_size=96,
    use_linear_projection=True,
    upcast_attention=True,
)
_SDXL = dict(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    sample_size=128,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
_SD3 = dict(
    sample_size=128,
    num_layers=24,
    attention_head_dim=64,
    num_attention_heads=24,
    caption_projection_dim=1536,
    pos_embed_max_size=192,
)
_SVD = dict(sample_size=96, num_attention_heads=(5, 10, 20, 20), num_frames=14)
_ANIMATEDIFF = dict(sample_size=64, cross_attention_dim=768)
_FLUX = dict(guidance_embeds=True)
_PIXART = dict(sample_size=128, caption_channels=4096)
_WAN = dict(num_attention_heads=12, num_layers=30, ffn_dim=8960)

_UNET = "UNet2DConditionModel"
_TABLE = {
    "sd15": _Model("SD1.5", 2, 512, 512, _UNET, _SD15, _sd_inputs),
    "sd21": _Model("SD2.1", 2, 768, 768, _UNET, _SD21, _sd_inputs),
    "sdxl": _Model("SDXL", 2, 1024, 1024, _UNET, _SDXL, _sdxl_inputs),
    "sd3": _Model("SD3-medium", 2, 1024, 1024, "SD3Transformer2DModel", _SD3, _sd3_inputs),
    "svd": _Model("SVD, 14 frames", 2, 576, 1024, "UNetSpatioTemporalConditionModel", _SVD, _svd_inputs),
    "animatediff": _Model(
        f"AnimateDiff, {_ANIMATEDIFF_FRAMES} frames", 2, 512, 512, "UNetMotionModel", _ANIMATEDIFF, _animatediff_inputs
    ),
    "flux": _Model("FLUX.1-dev", 1, 1024, 1024, "FluxTransformer2DModel", _FLUX, _flux_inputs, torch.bfloat16),
    "pixart": _Model("PixArt-alpha", 2, 1024, 1024, "PixArtTransformer2DModel", _PIXART, _pixart_inputs),
    "wan": _Model(
        f"Wan2.1-1.3B, {_WAN_FRAMES} frames", 1, 480, 832, "WanTransformer3DModel", _WAN, _wan_inputs, torch.bfloat16
    ),
}
MODELS = {name: f"{m.title}, {m.height}x{m.width}, batch {m.batch_size}" for name, m in _TABLE.items()}


@contextlib.contextmanager
def _defaults(device, dtype):
    """Make new tensors on `device`, floating ones in `dtype`."""
    dtype_before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(dtype_before)


def build(name, device="meta", dtype=None):
    """The denoiser called `name`, a key of `MODELS`, in eval mode and without gradients.

    Args:
        dtype: of the weights; by default fp16, and bf16 for FLUX and Wan. What the class keeps in fp32 stays so.
    """
    model = _TABLE[name]
    denoiser_class = getattr(diffusers, model.class_name)
    with _defaults(device, dtype or model.dtype):
        denoiser = denoiser_class(**model.config)
    kept = set(denoiser_class._keep_in_fp32_modules or ())
    for path, parameter in denoiser.named_parameters():
        if kept & set(path.split(".")):
            parameter.data = parameter.data.float()
    # a few tensors, such as the mixing factors of SVD, are made on the CPU all the same
    return denoiser.to(device).requires_grad_(False).eval()


def inputs(name, denoiser, device="meta", height=None, width=None):
    """Keyword arguments of one call of `denoiser`, as the pipeline passes them in the middle of a generation.

    Args:
        height, width: of the picture in pixels, multiples of 16; by default those in `MODELS`.
    Returns: a dict; latents and text are random, in the dtype of `denoiser`, and alike on every rank: torch is seeded.
    """
    model = _TABLE[name]
    torch.manual_seed(0)
    with _defaults(device, denoiser.dtype):
        return model.make_inputs(denoiser.config, height or model.height, width or model.width)


def _fill(module, dtype):
    """Seeded weights of variance 1 / fan_in, biases of 0, scales of 1: activations stay near 1.

    Filling each weight from a random place of one pool takes a tenth of the time of drawing all of them. The length
    of the repeated piece is prime, so that no two rows of a weight are alike.
    """
    generator = torch.Generator().manual_seed(0)
    num_values = 2**20 + 7
    pool = torch.rand(2 * num_values, generator=generator, dtype=dtype) * 2 - 1
    for path, weights in module.named_parameters():
        if weights.ndim == 1:
            weights.fill_(path.endswith("weight"))
            continue
        start = torch.randint(num_values, (), generator=generator)
        bound = (3 * weights.shape[0] / weights.numel()) ** 0.5
        for piece in weights.view(-1).split(num_values):
            torch.mul(pool[start : start + len(piece)], bound, out=piece)


def sd15_width(dtype=torch.float32):
    """The SD1.5 UNet on the CPU with seeded random weights, and inputs: sample (2, 4, 32, 32), text (2, 77, 768)."""
    unet = build("sd15", dtype=dtype).to_empty(device="cpu")
    _fill(unet, dtype)
    return unet, inputs("sd15", unet, device="cpu", height=256, width=256)


def tiny(device="cpu", dtype=torch.float32, groups=8):
    """A UNet of two narrow levels with random weights, to try a script, and inputs: sample (2, 4, 16, 16)."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), norm_num_groups=groups, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    ).to(device, dtype)  # fmt: skip
    found = dict(sample=torch.randn(2, 4, 16, 16), timestep=torch.tensor(500))
    found |= dict(encoder_hidden_states=torch.randn(2, 7, 32), return_dict=False)
    found = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in found.items()}
    for name in ("sample", "encoder_hidden_states"):
        found[name] = found[name].to(dtype)
    return unet.requires_grad_(False).eval(), found


def sd3_width(num_layers=2):
    """Two of PixArt's blocks, as wide as SD3-medium's, on the CPU with seeded random weights, and inputs for 512x512
    pixels: latent (2, 4, 64, 64), text (2, 120, 4096).
    """
    options = dict(num_layers=num_layers, num_attention_heads=24, attention_head_dim=64, cross_attention_dim=1536)
    torch.manual_seed(0)
    dit = diffusers.PixArtTransformer2DModel(**_PIXART | options | dict(sample_size=64, out_channels=4))
    return dit.requires_grad_(False).eval(), inputs("pixart", dit, device="cpu", height=512, width=512)
