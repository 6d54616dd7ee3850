"""Transformers of tokens in one sequence, sounds and pictures: see `coverage_models`."""

import torch
from coverage_inputs import FLUX, TEXT, flux, ids, mask, picture, text, x

UNIT = torch.full((2,), 0.9)


def _ideogram():
    """Text, then the picture, in one sequence."""
    kinds = torch.cat((torch.full((2, TEXT), 3), torch.full((2, 64), 2)), 1)
    places = torch.cat((torch.arange(float(TEXT)).repeat(3, 1).T, ids(8, 8) + 100)).long()
    of_tokens = dict(position_ids=places.repeat(2, 1, 1), segment_ids=torch.ones(2, 72).long(), indicator=kinds)
    return dict(hidden_states=x(2, 72, 16), timestep=UNIT, encoder_hidden_states=x(2, 72, 16, seed=1), **of_tokens)


def _causal():
    """Text sees what is before it, the picture everything."""
    seen = torch.ones(TEXT + 65, TEXT + 65)
    seen[: TEXT + 1] = seen[: TEXT + 1].tril()
    return seen.repeat(2, 1, 1)


MODELS = {
    "AceStepTransformer1DModel": (
        dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, in_channels=24, audio_acoustic_hidden_dim=8, sliding_window=4),
        lambda: dict(hidden_states=x(2, 32, 8), timestep=UNIT, timestep_r=UNIT, context_latents=x(2, 32, 16, seed=2),
            **text(32)),
    ),
    "MiniMaxMusic3Transformer1DModel": (
        dict(in_channels=6, condition_dim=12, num_layers=2, num_attention_heads=2, attention_head_dim=8,
            ff_inner_dim=32, rotary_dim=4, fourier_embedding_dim=16),
        lambda: dict(hidden_states=x(2, 6, 32), timestep=UNIT, encoder_hidden_states=x(2, 32, 12, seed=1)),
    ),
    "Flux3Transformer2DModel": (
        dict(in_channels=16, cond_in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, timestep_channels=32, axes_dims_rope=(4, 4, 4, 4)),
        lambda: picture(64, 16, img_ids=torch.cat((ids(8, 8), torch.zeros(64, 1)), -1), txt_ids=torch.zeros(TEXT, 4),
            **text(32)) | dict(timestep=UNIT),
    ),
    "BriaFiboTransformer2DModel": (
        dict(FLUX, axes_dims_rope=[4, 4, 8], text_encoder_dim=12),
        lambda: flux(text_encoder_layers=[x(2, TEXT, 12, seed=i) for i in (2, 3)]),
    ),
    "BriaFibo2Transformer2DModel": (
        dict(in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=12,
            injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=4,
            gist_min_text_len=4, gist_max_text_len=32, axes_dims=(8, 4, 4), axes_lens=(64, 32, 32)),
        lambda: dict(hidden_states=x(2, 4, 16, 16), timestep=UNIT,
            encoder_hidden_states=x(2, 2, TEXT, 12, seed=1)),
    ),
    "Ideogram4Transformer2DModel": (
        dict(in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=32,
            adaln_dim=16, llm_features_dim=16, rope_theta=10000, mrope_section=(4, 2, 2)),
        _ideogram,
    ),
    "JoyImageEditPlusTransformer3DModel": (
        dict(in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=12, num_layers=2,
            rope_dim_list=[8, 4, 4]),
        lambda: dict(hidden_states=x(2, 64, 4, 1, 2, 2), timestep=torch.full((2,), 900.0),
            encoder_hidden_states_mask=mask(), shape_list=[[(1, 8, 8)]] * 2, **text(12)),
    ),
    "OmniGenTransformer2DModel": (
        dict(in_channels=4, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32,
            num_layers=2, pad_token_id=0, vocab_size=64, max_position_embeddings=256,
            original_max_position_embeddings=128, pos_embed_max_size=16, time_step_dim=32,
            rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8}),
        lambda: dict(hidden_states=x(2, 4, 16, 16), timestep=UNIT, input_ids=torch.arange(TEXT).repeat(2, 1),
            input_img_latents=[], input_image_sizes={}, attention_mask=_causal(),
            position_ids=torch.arange(73).repeat(2, 1)),
    ),
    "MiniMaxH3Transformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=16, hidden_size=32, num_layers=2, num_refiner_layers=1,
            ffn_dim=32, in_channels=4, audio_in_channels=4, text_dim=12, freq_dim=32, time_embed_hidden_dim=32,
            time_embed_dim=16, rope_freq_dim=2),
        lambda: dict(hidden_states=x(2, 64, 16), audio_hidden_states=x(2, 6, 4, seed=2), timestep=torch.tensor([0.9]),
            timestep_indices=torch.zeros(TEXT + 70).long(),
            token_tags=torch.tensor([1] * TEXT + [0] * 64 + [2] * 6),
            position_ids=torch.cat((torch.arange(float(TEXT)).repeat(3, 1).T, ids(8, 8), ids(6, 1))),
            video_indices=torch.arange(TEXT, TEXT + 64), audio_indices=torch.arange(TEXT + 64, TEXT + 70),
            text_indices=torch.arange(TEXT), **text(12)),
    ),
    "QwenImage21Transformer2DModel": (
        dict(in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            context_in_dim=12, axes_dims_rope=(8, 4, 4)),
        lambda: picture(64, 16, img_shapes=[[(1, 8, 8)]] * 2, encoder_hidden_states_mask=mask().bool(),
            img_mask=(torch.arange(TEXT + 16) >= TEXT).repeat(2, 1), **text(12)) | dict(timestep=UNIT),
    ),
}  # fmt: skip
