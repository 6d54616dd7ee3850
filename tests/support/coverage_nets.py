"""U-Nets: see `coverage_models`."""

import torch
from coverage_inputs import TEXT, UNET, mask, text, x

MODELS = {
    "UNet2DConditionModel": (
        dict(UNET, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
        lambda: dict(sample=x(2, 4, 16, 16), timestep=900, **text(32)),
    ),
    "UNet2DModel": (
        dict(sample_size=16, block_out_channels=(32, 32), norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")),
        lambda: dict(sample=x(2, 3, 16, 16), timestep=900),
    ),
    "UNet1DModel": (
        dict(block_out_channels=(8, 8, 16, 16), in_channels=14, out_channels=14, time_embedding_type="positional",
            use_timestep_embedding=True, out_block_type="OutConv1DBlock", flip_sin_to_cos=False, freq_shift=1.0,
            mid_block_type="MidResTemporalBlock1D", act_fn="swish", layers_per_block=1,
            down_block_types=("DownResnetBlock1D",) * 4, up_block_types=("UpResnetBlock1D",) * 3),
        lambda: dict(sample=x(2, 14, 16), timestep=torch.tensor([10, 10])),
    ),
    "UNet3DConditionModel": (
        dict(UNET, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), attention_head_dim=4),
        lambda: dict(sample=x(2, 4, 3, 16, 16), timestep=900, **text(32)),
    ),
    "StableCascadeUNet": (
        dict(block_out_channels=(16, 32), in_channels=4, out_channels=4, conditioning_dim=16, patch_size=1,
            num_attention_heads=(2, 4), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1),
            down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1),
            block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
            clip_text_in_channels=16, clip_text_pooled_in_channels=16, clip_image_in_channels=16, clip_seq=2,
            kernel_size=3, dropout=(0.0, 0.0), self_attn=True, switch_level=(False,)),
        lambda: dict(sample=x(2, 4, 16, 16), timestep_ratio=torch.full((2,), 0.5), clip_text_pooled=x(2, 1, 16),
            clip_text=x(2, 5, 16), clip_img=x(2, 1, 16)),
    ),
    "UNetMotionModel": (
        dict(block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), num_attention_heads=4,
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            motion_num_attention_heads=4),
        lambda: dict(sample=x(2, 4, 3, 16, 16), timestep=900, encoder_hidden_states=x(6, TEXT, 32, seed=1)),
    ),
    "UNetSpatioTemporalConditionModel": (
        dict(block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32, num_attention_heads=(2, 4),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=48),
        lambda: dict(sample=x(2, 3, 8, 16, 16), timestep=900, added_time_ids=torch.ones(2, 3), **text(32, 1)),
    ),
    "I2VGenXLUNet": (
        dict(UNET, attention_head_dim=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D")),
        lambda: dict(sample=x(2, 4, 3, 16, 16), timestep=900, fps=torch.tensor([2, 2]),
            image_latents=x(2, 4, 3, 16, 16, seed=2), image_embeddings=x(2, 32, seed=3), **text(32)),
    ),
    "Kandinsky3UNet": (
        dict(time_embedding_dim=32, groups=2, attention_head_dim=4, layers_per_block=2, block_out_channels=(32, 64),
            cross_attention_dim=4, encoder_hid_dim=16),
        lambda: dict(sample=x(2, 4, 16, 16), timestep=torch.tensor(900), encoder_attention_mask=mask(), **text(16)),
    ),
    "Transformer2DModel": (
        dict(num_attention_heads=2, attention_head_dim=8, in_channels=16, num_layers=1, norm_num_groups=4,
            cross_attention_dim=16),
        lambda: dict(hidden_states=x(2, 16, 8, 8), timestep=torch.full((2,), 900), **text(16)),
    ),
    "DreamLiteTransformer2DModel": (
        dict(num_attention_heads=2, attention_head_dim=8, in_channels=16, num_layers=1, norm_num_groups=4,
            cross_attention_dim=16),
        lambda: dict(hidden_states=x(2, 16, 8, 8), timestep=torch.full((2,), 900), **text(16)),
    ),
    "TransformerTemporalModel": (
        dict(num_attention_heads=2, attention_head_dim=8, in_channels=16, num_layers=1, norm_num_groups=4),
        lambda: dict(hidden_states=x(6, 16, 8, 8), timestep=torch.full((6,), 900), num_frames=3),
    ),
}  # fmt: skip
