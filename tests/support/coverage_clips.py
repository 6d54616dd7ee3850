"""Transformers of clips: see `coverage_models`."""

import torch
from coverage_inputs import TEXT, WAN, mask, picture, text, x

MODELS = {
    "WanTransformer3DModel": (
        dict(WAN, cross_attn_norm=True),
        lambda: picture(4, 3, 16, 16, **text(16)),
    ),
    "CogVideoXTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
            text_embed_dim=8, num_layers=2, sample_width=16, sample_height=16, sample_frames=8, patch_size=2,
            temporal_compression_ratio=4, max_text_seq_length=TEXT),
        lambda: picture(2, 4, 16, 16, **text(8)),
    ),
    "HunyuanVideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
            text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4)),
        lambda: picture(4, 1, 16, 16, pooled_projections=x(2, 8), encoder_attention_mask=mask(),
            guidance=torch.full((2,), 6000.0), **text(16)),
    ),
    "LTXVideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
            num_layers=2, caption_channels=16),
        lambda: picture(2 * 8 * 8, 4, encoder_attention_mask=mask().bool(), num_frames=2, height=8,
            width=8, **text(16)),
    ),
    "MochiTransformer3DModel": (
        dict(patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
            in_channels=4, qk_norm="rms_norm", text_embed_dim=16, time_embed_dim=4, activation_fn="swiglu",
            max_sequence_length=16),
        lambda: picture(4, 2, 16, 16, encoder_attention_mask=mask().bool(), **text(16)),
    ),
    "LatteTransformer3DModel": (
        dict(sample_size=16, num_layers=1, patch_size=2, attention_head_dim=4, num_attention_heads=3,
            caption_channels=8, in_channels=4, cross_attention_dim=12, out_channels=8, attention_bias=True,
            activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
            norm_elementwise_affine=False, norm_eps=1e-6),
        lambda: dict(hidden_states=x(2, 4, 1, 16, 16), timestep=torch.full((2,), 900),
            enable_temporal_attentions=True, **text(8)),
    ),
    "SkyReelsV2Transformer3DModel": (
        dict(WAN),
        lambda: picture(4, 3, 16, 16, **text(16)),
    ),
    "WanVACETransformer3DModel": (
        dict(WAN, num_layers=4, vace_layers=[0, 2], vace_in_channels=8),
        lambda: picture(4, 3, 16, 16, control_hidden_states=x(2, 8, 3, 16, 16, seed=5),
            control_hidden_states_scale=torch.ones(2), **text(16)),
    ),
    "Kandinsky5Transformer3DModel": (
        dict(in_text_dim=16, in_text_dim2=8, time_dim=16, model_dim=24, ff_dim=48, num_text_blocks=1,
            num_visual_blocks=2, axes_dims=(4, 4, 4)),
        lambda: picture(1, 16, 16, 4, pooled_projections=x(2, 8),
            visual_rope_pos=[torch.arange(1), torch.arange(8), torch.arange(8)], text_rope_pos=torch.arange(TEXT),
            **text(16)),
    ),
    "HunyuanVideo15Transformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
            num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=12,
            rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v"),
        lambda: picture(4, 1, 16, 16, encoder_attention_mask=mask(),
            encoder_hidden_states_2=x(2, 4, 8), encoder_attention_mask_2=torch.ones(2, 4),
            image_embeds=torch.zeros(2, 3, 12), **text(16)),
    ),
    "SanaVideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=12,
            num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
            sample_size=16, rope_max_seq_len=32),
        lambda: picture(4, 2, 16, 16, encoder_attention_mask=mask(), **text(8)),
    ),
    "LTX2VideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
            audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False),
        lambda: picture(2 * 8 * 8, 4, audio_hidden_states=x(2, 9, 4, seed=2), num_frames=2, height=8, width=8,
            audio_encoder_hidden_states=x(2, TEXT, 16, seed=3), encoder_attention_mask=mask().bool(),
            audio_num_frames=9, **text(16)),
    ),
    "ChronoEditTransformer3DModel": (dict(WAN), lambda: picture(4, 2, 16, 16, **text(16))),
    "AnyFlowTransformer3DModel": (
        dict(WAN),
        lambda: dict(hidden_states=x(2, 3, 4, 16, 16), timestep=torch.full((2, 3), 900.0),
            r_timestep=torch.full((2, 3), 450.0), **text(16)),
    ),
    "ConsisIDTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
            text_embed_dim=8, num_layers=2, sample_width=16, sample_height=16, sample_frames=8,
            temporal_compression_ratio=4, max_text_seq_length=TEXT, cross_attn_dim_head=8, cross_attn_num_heads=2),
        lambda: picture(2, 4, 16, 16, **text(8)),
    ),
    "EasyAnimateTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, sample_width=16,
            sample_height=16, num_layers=2, mmdit_layers=2, time_embed_dim=2, text_embed_dim=16),
        lambda: picture(4, 2, 16, 16, **text(16)),
    ),
    "MotifVideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
            num_single_layers=1, num_decoder_layers=1, text_embed_dim=16, rope_axes_dim=(4, 4, 4)),
        lambda: picture(4, 2, 16, 16, encoder_attention_mask=mask(), **text(16)),
    ),
    "AllegroTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24,
            sample_width=16, sample_height=16, sample_frames=2, caption_channels=16),
        lambda: picture(4, 2, 16, 16, attention_mask=torch.ones(2, 2, 16, 16), encoder_attention_mask=mask(),
            **text(16)),
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4), image_condition_type=None, has_image_proj=True, image_proj_dim=16,
            has_clean_x_embedder=True),
        lambda: picture(4, 3, 16, 16, pooled_projections=x(2, 8), encoder_attention_mask=mask(),
            guidance=torch.full((2,), 6000.0), image_embeds=x(2, 3, 16, seed=2), indices_latents=torch.arange(9, 12),
            latents_clean=x(2, 4, 2, 16, 16, seed=3), indices_latents_clean=torch.tensor([0, 8]),
            latents_history_2x=x(2, 4, 2, 16, 16, seed=4), indices_latents_history_2x=torch.arange(6, 8),
            latents_history_4x=x(2, 4, 4, 16, 16, seed=5), indices_latents_history_4x=torch.arange(2, 6),
            **text(16)),
    ),
    "HeliosTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=256,
            ffn_dim=32, num_layers=2, rope_dim=(4, 4, 4), has_multi_term_memory_patch=False),
        lambda: picture(4, 3, 16, 16, **text(16)),
    ),
    "JoyImageEditTransformer3DModel": (
        dict(in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=12, num_layers=2,
            rope_dim_list=[8, 4, 4]),
        lambda: picture(4, 2, 16, 16, **text(12)),
    ),
    "Kandinsky6Transformer3DModel": (
        dict(in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, model_dim=24, ff_dim=48,
            num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 4), visual_cond=False, in_audio_dim=4,
            out_audio_dim=4),
        lambda: picture(1, 16, 16, 4, pooled_projections=x(2, 8), **text(16)),
    ),
    "WanAnimateTransformer3DModel": (
        dict(WAN, in_channels=12, latent_channels=4, image_dim=4, num_layers=2, motion_encoder_size=16,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_style_dim=8, motion_dim=4,
            motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
            inject_face_latents_blocks=2),
        lambda: picture(12, 3, 16, 16, encoder_hidden_states_image=x(2, 2, 4, seed=2),
            pose_hidden_states=x(2, 4, 2, 16, 16, seed=3), face_pixel_values=x(2, 3, 5, 16, 16, seed=4), **text(16)),
    ),
}  # fmt: skip
