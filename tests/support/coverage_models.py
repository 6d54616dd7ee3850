"""A tiny model of each of many denoiser classes of diffusers, with inputs of a batch of two: {class: (config, inputs)}.

Configurations and inputs are those that the classes' pipelines use, small; weights are random.
"""

import diffusers
import torch
from tiny_parts import fill


def _x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _ids(height, width):
    grid = torch.meshgrid(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return torch.stack(grid, -1).reshape(-1, 3)


T, TEXT = torch.full((2,), 900.0), 8


def _picture(*shape, **more):
    return dict(hidden_states=_x(2, *(shape or (4, 16, 16))), timestep=T, **more)


def _text(size, length=TEXT):
    return dict(encoder_hidden_states=_x(2, length, size, seed=1))


def _sizes(*names):
    return {name: torch.tensor([[16, 16]] * 2) for name in names}


_UNET = dict(
    block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8
)
MODELS = {
    "UNet2DConditionModel": (
        dict(_UNET, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
        lambda: dict(sample=_x(2, 4, 16, 16), timestep=900, **_text(32)),
    ),
    "UNet2DModel": (
        dict(sample_size=16, block_out_channels=(32, 32), norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")),
        lambda: dict(sample=_x(2, 3, 16, 16), timestep=900),
    ),
    "UNet1DModel": (
        dict(block_out_channels=(8, 8, 16, 16), in_channels=14, out_channels=14, time_embedding_type="positional",
            use_timestep_embedding=True, out_block_type="OutConv1DBlock", flip_sin_to_cos=False, freq_shift=1.0,
            mid_block_type="MidResTemporalBlock1D", act_fn="swish", layers_per_block=1,
            down_block_types=("DownResnetBlock1D",) * 4, up_block_types=("UpResnetBlock1D",) * 3),
        lambda: dict(sample=_x(2, 14, 16), timestep=torch.tensor([10, 10])),
    ),
    "UNet3DConditionModel": (
        dict(_UNET, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), attention_head_dim=4),
        lambda: dict(sample=_x(2, 4, 3, 16, 16), timestep=900, **_text(32)),
    ),
    "StableCascadeUNet": (
        dict(block_out_channels=(16, 32), in_channels=4, out_channels=4, conditioning_dim=16, patch_size=1,
            num_attention_heads=(2, 4), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1),
            down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1),
            block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
            clip_text_in_channels=16, clip_text_pooled_in_channels=16, clip_image_in_channels=16, clip_seq=2,
            kernel_size=3, dropout=(0.0, 0.0), self_attn=True, switch_level=(False,)),
        lambda: dict(sample=_x(2, 4, 16, 16), timestep_ratio=torch.full((2,), 0.5), clip_text_pooled=_x(2, 1, 16),
            clip_text=_x(2, 5, 16), clip_img=_x(2, 1, 16)),
    ),
    "SD3Transformer2DModel": (
        dict(sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16,
            pos_embed_max_size=32),
        lambda: _picture(pooled_projections=_x(2, 16), **_text(32)),
    ),
    "FluxTransformer2DModel": (
        dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8)),
        lambda: _picture(64, 16, pooled_projections=_x(2, 32), img_ids=_ids(8, 8), txt_ids=torch.zeros(TEXT, 3),
            **_text(32)),
    ),
    "Flux2Transformer2DModel": (
        dict(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4,
            4)),
        lambda: _picture(64, 16, img_ids=torch.cat((_ids(8, 8), torch.zeros(64, 1)), -1),
            txt_ids=torch.zeros(TEXT, 4), guidance=torch.ones(2), **_text(32)),
    ),
    "ChromaTransformer2DModel": (
        dict(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32,
            approximator_layers=1, approximator_num_channels=16),
        lambda: _picture(64, 16, img_ids=_ids(8, 8), txt_ids=torch.zeros(TEXT, 3),
            attention_mask=torch.ones(2, 64 + TEXT, dtype=torch.bool), **_text(32)),
    ),
    "PixArtTransformer2DModel": (
        dict(sample_size=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, caption_channels=32,
            cross_attention_dim=32, norm_num_groups=8),
        lambda: _picture(added_cond_kwargs={"resolution": None, "aspect_ratio": None}, **_text(32)),
    ),
    "HunyuanDiT2DModel": (
        dict(sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
            cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=4, hidden_size=32, text_len=6,
            text_len_t5=4, activation_fn="gelu-approximate"),
        lambda: _picture(text_embedding_mask=torch.ones(2, 6), encoder_hidden_states_t5=_x(2, 4, 32),
            text_embedding_mask_t5=torch.ones(2, 4),
            image_meta_size=torch.tensor([[128.0, 128, 128, 128, 0, 0]] * 2), style=torch.zeros(2, dtype=torch.long),
            image_rotary_emb=(_x(64, 8), _x(64, 8)), **_text(32, 6)),
    ),
    "WanTransformer3DModel": (
        dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32),
        lambda: _picture(4, 3, 16, 16, **_text(16)),
    ),
    "QwenImageTransformer2DModel": (
        dict(patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(8, 4, 4)),
        lambda: _picture(64, 16, encoder_hidden_states_mask=torch.ones(2, TEXT, dtype=torch.long),
            img_shapes=[[(1, 8, 8)]] * 2, **_text(32)),
    ),
    "AuraFlowTransformer2DModel": (
        dict(sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
            attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
            out_channels=4, pos_embed_max_size=256),
        lambda: _picture(**_text(32)),
    ),
    "CogView3PlusTransformer2DModel": (
        dict(patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=4, out_channels=4,
            text_embed_dim=8, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8),
        lambda: _picture(**_text(8), **_sizes("original_size", "target_size", "crop_coords")),
    ),
    "CogView4Transformer2DModel": (
        dict(patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, out_channels=4,
            text_embed_dim=8, time_embed_dim=8, condition_dim=4),
        lambda: _picture(**_text(8), **_sizes("original_size", "target_size", "crop_coords")),
    ),
    "Lumina2Transformer2DModel": (
        dict(sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
            num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128),
            cap_feat_dim=32),
        lambda: _picture(encoder_attention_mask=torch.ones(2, TEXT, dtype=torch.bool), **_text(32)),
    ),
    "SanaTransformer2DModel": (
        dict(patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
            num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
            sample_size=32),
        lambda: _picture(encoder_attention_mask=torch.ones(2, TEXT), **_text(8)),
    ),
    "HiDreamImageTransformer2DModel": (
        dict(patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=4, caption_channels=[8, 4], text_emb_dim=8, num_routed_experts=4,
            num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
            force_inference_output=True),
        lambda: dict(hidden_states=_x(2, 4, 16, 16), timesteps=T, encoder_hidden_states_t5=_x(2, TEXT, 8),
            encoder_hidden_states_llama3=_x(2, 2, TEXT, 4), pooled_embeds=_x(2, 8)),
    ),
    "DiTTransformer2DModel": (
        dict(sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero", norm_elementwise_affine=False),
        lambda: dict(hidden_states=_x(2, 4, 16, 16), timestep=torch.full((2,), 900), class_labels=torch.tensor([1, 2])),
    ),
    "CogVideoXTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
            text_embed_dim=8, num_layers=2, sample_width=16, sample_height=16, sample_frames=8, patch_size=2,
            temporal_compression_ratio=4, max_text_seq_length=TEXT),
        lambda: _picture(2, 4, 16, 16, **_text(8)),
    ),
    "HunyuanVideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
            text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4)),
        lambda: _picture(4, 1, 16, 16, pooled_projections=_x(2, 8), encoder_attention_mask=torch.ones(2, TEXT),
            guidance=torch.full((2,), 6000.0), **_text(16)),
    ),
    "LTXVideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
            num_layers=2, caption_channels=16),
        lambda: _picture(2 * 8 * 8, 4, encoder_attention_mask=torch.ones(2, TEXT).bool(), num_frames=2, height=8,
            width=8, **_text(16)),
    ),
    "MochiTransformer3DModel": (
        dict(patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
            in_channels=4, qk_norm="rms_norm", text_embed_dim=16, time_embed_dim=4, activation_fn="swiglu",
            max_sequence_length=16),
        lambda: _picture(4, 2, 16, 16, encoder_attention_mask=torch.ones(2, TEXT).bool(), **_text(16)),
    ),
    "LatteTransformer3DModel": (
        dict(sample_size=16, num_layers=1, patch_size=2, attention_head_dim=4, num_attention_heads=3,
            caption_channels=8, in_channels=4, cross_attention_dim=12, out_channels=8, attention_bias=True,
            activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
            norm_elementwise_affine=False, norm_eps=1e-6),
        lambda: dict(hidden_states=_x(2, 4, 1, 16, 16), timestep=torch.full((2,), 900),
            enable_temporal_attentions=True, **_text(8)),
    ),
    "ZImageTransformer2DModel": (
        dict(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1,
            n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32]),
        lambda: dict(x=[_x(4, 1, 16, 16), _x(4, 1, 16, 16, seed=3)], t=torch.full((2,), 0.5),
            cap_feats=[_x(TEXT, 16), _x(TEXT, 16, seed=4)]),
    ),
    "UNetMotionModel": (
        dict(block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), num_attention_heads=4,
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            motion_num_attention_heads=4),
        lambda: dict(sample=_x(2, 4, 3, 16, 16), timestep=900, encoder_hidden_states=_x(6, TEXT, 32, seed=1)),
    ),
    "UNetSpatioTemporalConditionModel": (
        dict(block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32, num_attention_heads=(2, 4),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=48),
        lambda: dict(sample=_x(2, 3, 8, 16, 16), timestep=900, added_time_ids=torch.ones(2, 3), **_text(32, 1)),
    ),
    "SkyReelsV2Transformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=256,
            ffn_dim=32, num_layers=2, rope_max_seq_len=32),
        lambda: _picture(4, 3, 16, 16, **_text(16)),
    ),
    "WanVACETransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=256,
            ffn_dim=32, num_layers=4, rope_max_seq_len=32, vace_layers=[0, 2], vace_in_channels=8),
        lambda: _picture(4, 3, 16, 16, control_hidden_states=_x(2, 8, 3, 16, 16, seed=5),
            control_hidden_states_scale=torch.ones(2), **_text(16)),
    ),
    "Kandinsky5Transformer3DModel": (
        dict(in_text_dim=16, in_text_dim2=8, time_dim=16, model_dim=24, ff_dim=48, num_text_blocks=1,
            num_visual_blocks=2, axes_dims=(4, 4, 4)),
        lambda: _picture(1, 16, 16, 4, pooled_projections=_x(2, 8),
            visual_rope_pos=[torch.arange(1), torch.arange(8), torch.arange(8)], text_rope_pos=torch.arange(TEXT),
            **_text(16)),
    ),
    "HunyuanVideo15Transformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
            num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=12,
            rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v"),
        lambda: _picture(4, 1, 16, 16, encoder_attention_mask=torch.ones(2, TEXT),
            encoder_hidden_states_2=_x(2, 4, 8), encoder_attention_mask_2=torch.ones(2, 4),
            image_embeds=torch.zeros(2, 3, 12), **_text(16)),
    ),
    "SanaVideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=12,
            num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
            sample_size=16, rope_max_seq_len=32),
        lambda: _picture(4, 2, 16, 16, encoder_attention_mask=torch.ones(2, TEXT), **_text(8)),
    ),
    "LongCatImageTransformer2DModel": (
        dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8]),
        lambda: _picture(64, 16, img_ids=_ids(8, 8), txt_ids=torch.zeros(TEXT, 3), **_text(32)),
    ),
}  # fmt: skip

# Why there is none of a class.
LEFT_OUT = {"CosmosTransformer3DModel": "it needs torchvision"}


def build(name):
    """A model, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fill(getattr(diffusers, name)(**MODELS[name][0])).eval().requires_grad_(False)


def inputs(name):
    """Its keyword arguments, without those that are None."""
    return {k: v for k, v in MODELS[name][1]().items() if v is not None} | {"return_dict": False}
