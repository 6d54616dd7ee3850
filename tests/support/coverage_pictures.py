"""Transformers of pictures: see `coverage_models`."""

import torch
from coverage_inputs import FLUX, TEXT, T, flux, ids, mask, picture, sizes, text, x
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

MODELS = {
    "SD3Transformer2DModel": (
        dict(sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16,
            pos_embed_max_size=32),
        lambda: picture(pooled_projections=x(2, 16), **text(32)),
    ),
    "FluxTransformer2DModel": (
        dict(FLUX, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8)),
        lambda: flux(pooled_projections=x(2, 32)),
    ),
    "Flux2Transformer2DModel": (
        dict(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4)),
        lambda: picture(64, 16, img_ids=torch.cat((ids(8, 8), torch.zeros(64, 1)), -1),
            txt_ids=torch.zeros(TEXT, 4), guidance=torch.ones(2), **text(32)),
    ),
    "ChromaTransformer2DModel": (
        dict(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32,
            approximator_layers=1, approximator_num_channels=16),
        lambda: flux(attention_mask=mask(64 + TEXT).bool()),
    ),
    "PixArtTransformer2DModel": (
        dict(sample_size=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, caption_channels=32,
            cross_attention_dim=32, norm_num_groups=8),
        lambda: picture(added_cond_kwargs={"resolution": None, "aspect_ratio": None}, **text(32)),
    ),
    "HunyuanDiT2DModel": (
        dict(sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
            cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=4, hidden_size=32, text_len=6,
            text_len_t5=4, activation_fn="gelu-approximate"),
        lambda: picture(text_embedding_mask=torch.ones(2, 6), encoder_hidden_states_t5=x(2, 4, 32),
            text_embedding_mask_t5=torch.ones(2, 4),
            image_meta_size=torch.tensor([[128.0, 128, 128, 128, 0, 0]] * 2), style=torch.zeros(2, dtype=torch.long),
            image_rotary_emb=(x(64, 8), x(64, 8)), **text(32, 6)),
    ),
    "QwenImageTransformer2DModel": (
        dict(patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(8, 4, 4)),
        lambda: picture(64, 16, encoder_hidden_states_mask=mask().long(),
            img_shapes=[[(1, 8, 8)]] * 2, **text(32)),
    ),
    "AuraFlowTransformer2DModel": (
        dict(sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
            attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
            out_channels=4, pos_embed_max_size=256),
        lambda: picture(**text(32)),
    ),
    "CogView3PlusTransformer2DModel": (
        dict(patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=4, out_channels=4,
            text_embed_dim=8, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8),
        lambda: picture(**text(8), **sizes("original_size", "target_size", "crop_coords")),
    ),
    "CogView4Transformer2DModel": (
        dict(patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, out_channels=4,
            text_embed_dim=8, time_embed_dim=8, condition_dim=4),
        lambda: picture(**text(8), **sizes("original_size", "target_size", "crop_coords")),
    ),
    "Lumina2Transformer2DModel": (
        dict(sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
            num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128),
            cap_feat_dim=32),
        lambda: picture(encoder_attention_mask=mask().bool(), **text(32)),
    ),
    "SanaTransformer2DModel": (
        dict(patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
            num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
            sample_size=32),
        lambda: picture(encoder_attention_mask=mask(), **text(8)),
    ),
    "HiDreamImageTransformer2DModel": (
        dict(patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=4, caption_channels=[8, 4], text_emb_dim=8, num_routed_experts=4,
            num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
            force_inference_output=True),
        lambda: dict(hidden_states=x(2, 4, 16, 16), timesteps=T, encoder_hidden_states_t5=x(2, TEXT, 8),
            encoder_hidden_states_llama3=x(2, 2, TEXT, 4), pooled_embeds=x(2, 8)),
    ),
    "DiTTransformer2DModel": (
        dict(sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero", norm_elementwise_affine=False),
        lambda: dict(hidden_states=x(2, 4, 16, 16), timestep=torch.full((2,), 900), class_labels=torch.tensor([1, 2])),
    ),
    "ZImageTransformer2DModel": (
        dict(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1,
            n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32]),
        lambda: dict(x=[x(4, 1, 16, 16), x(4, 1, 16, 16, seed=3)], t=torch.full((2,), 0.5),
            cap_feats=[x(TEXT, 16), x(TEXT, 16, seed=4)]),
    ),
    "LongCatImageTransformer2DModel": (
        dict(FLUX, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8]),
        flux,
    ),
    "HunyuanImageTransformer2DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, rope_axes_dim=(4, 4)),
        lambda: picture(encoder_attention_mask=mask(), **text(16)),
    ),
    "OvisImageTransformer2DModel": (dict(FLUX, out_channels=16, axes_dims_rope=(4, 4, 8)), flux),
    "BriaTransformer2DModel": (dict(FLUX, axes_dims_rope=[4, 4, 8]), flux),
    "PRXTransformer2DModel": (
        dict(in_channels=4, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8]),
        lambda: picture(attention_mask=mask().bool(), **text(16)),
    ),
    "ErnieImageTransformer2DModel": (
        dict(hidden_size=16, num_attention_heads=1, num_layers=2, ffn_hidden_size=16, in_channels=16, out_channels=16,
            text_in_dim=16, rope_axes_dim=(8, 4, 4)),
        lambda: picture(16, 8, 8, text_bth=x(2, TEXT, 16, seed=1), text_lens=torch.tensor([TEXT, TEXT])),
    ),
    "NucleusMoEImageTransformer2DModel": (
        dict(in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4), mlp_ratio=2.0, num_experts=4, moe_intermediate_dim=16,
            dense_moe_strategy="all_moe", capacity_factors=[2.0, 2.0]),
        lambda: picture(64, 16, encoder_hidden_states_mask=mask().long(), img_shapes=[(1, 8, 8)] * 2,
            **text(16)),
    ),
    "GlmImageTransformer2DModel": (
        dict(in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            text_embed_dim=16, time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=32),
        lambda: picture(prior_token_id=torch.arange(64).repeat(2, 1) % 32,
            prior_token_drop=torch.zeros(2, 64, dtype=torch.bool), target_size=torch.tensor([[128.0, 128]] * 2),
            crop_coords=torch.zeros(2, 2), **text(16)),
    ),
    "Krea2Transformer2DModel": (
        dict(in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2,
            text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=16,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(8, 4, 4)),
        lambda: picture(64, 16, encoder_hidden_states=x(2, TEXT, 2, 16, seed=1),
            position_ids=torch.cat((torch.zeros(TEXT, 3), ids(8, 8)))),
    ),
    "LuminaNextDiT2DModel": (
        dict(sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=3,
            num_kv_heads=1, multiple_of=16, cross_attention_dim=8, learn_sigma=False),
        lambda: picture(encoder_mask=mask(), cross_attention_kwargs={},
            image_rotary_emb=get_2d_rotary_pos_embed_lumina(8, 384, 384), **text(8)),
    ),
}  # fmt: skip
