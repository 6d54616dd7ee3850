"""Transformers of clips that attend to what was drawn before, in caches, or sparsely: see `coverage_models`."""

import torch
from coverage_inputs import TEXT, WAN, mask, picture, text, x
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache


def _far():
    """The second chunk of a clip, beside the first in the caches; one of them is of fewer tokens."""
    caches = {i: dict(full_cache=x(2, 2, 2, 3 * 2 * 64, 12, seed=5 + i)) for i in range(2)}
    for i, cache in caches.items():
        cache["compressed_cache"] = x(2, 2, 2, 2 * 16, 12, seed=7 + i)
    times = dict(timestep=torch.full((2, 2), 900.0), r_timestep=torch.full((2, 2), 450.0))
    flags = dict(kv_cache=caches, kv_cache_flag=dict(num_cached_chunks=1, is_cache_step=False), chunk_partition=[1, 2])
    return dict(hidden_states=x(2, 2, 4, 16, 16), **times, **flags, **text(16))


def _animated():
    cache = WanAnimate2KVCache(2)
    for i, layer in enumerate(cache.layer_caches):
        layer.store(x(2, 128, 2, 12, seed=3 + i), x(2, 128, 2, 12, seed=5 + i))
    latents, others = x(2, 4, 2, 16, 16), x(2, 8, 2, 16, 16, seed=1)
    sizes = dict(origin_len=5, origin_area=[128, 128], seq_len=128, reference_grid_sizes=torch.tensor([[2, 8, 8]] * 2))
    given = dict(hidden_states=list(latents), timestep=torch.full((2,), 900.0), condition_latents=list(others))
    given |= dict(encoder_hidden_states=list(x(2, TEXT, 16, seed=2)), kv_cache=cache, kv_cache_mode="cached")
    return given | sizes


def _angles(tokens, seed):
    return tuple(f(x(2, tokens, 24, seed=seed)) for f in (torch.cos, torch.sin))


def _refined():
    """A block of frames behind two frames that stay and one of the latest."""
    cache = SanaWMRefinerKVCache(2)
    cache.sink_pe = _angles(128, 9)
    for i, layer in enumerate(cache.layer_caches):
        layer.store_sink(x(2, 128, 24, seed=3 + i), x(2, 128, 24, seed=5 + i))
        layer.store_history(x(2, 64, 24, seed=7 + i), x(2, 64, 24, seed=9 + i))
    given = dict(hidden_states=x(2, 128, 4), timestep=torch.full((2, 128), 900.0), video_rotary_emb=_angles(128, 2))
    return given | dict(encoder_attention_mask=mask(), kv_cache=cache, kv_cache_mode="inject", **text(16))


def _cameras(frames):
    """Where the camera is in each frame, and how wide it sees."""
    place = torch.eye(4).repeat(2, frames, 1, 1)
    place[:, :, :3, 3] = x(2, frames, 3, seed=4) / 4
    return torch.cat((place.flatten(2), torch.tensor([14.0, 14.0, 8.0, 8.0]).expand(2, frames, 4)), -1)


MODELS = {
    "AnyFlowFARTransformer3DModel": (dict(WAN, chunk_partition=(1, 2)), _far),
    "WanAnimate2Transformer3DModel": (
        dict(in_dim=12, out_dim=4, dim=24, ffn_dim=32, text_dim=16, text_len=TEXT, num_heads=2, num_layers=2,
            use_img_emb=False),
        _animated,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
            audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
            audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False),
        _refined,
    ),
    "SanaWMTransformer3DModel": (
        dict(in_channels=4, num_layers=2, hidden_size=48, num_attention_heads=2, softmax_every_n=2, linear_head_dim=24,
            chunk_plucker_channels=6, caption_channels=16),
        lambda: picture(4, 2, 16, 16, mask=mask(), camera_conditions=_cameras(2),
            chunk_plucker=x(2, 6, 2, 16, 16, seed=3), encoder_hidden_states=x(2, 1, TEXT, 16, seed=1))
            | dict(timestep=torch.full((2, 1, 2), 900.0)),
    ),
    "Kandinsky6SRTransformer3DModel": (
        dict(in_visual_dim=2, out_visual_dim=4, time_dim=16, model_dim=24, ff_dim=48, num_visual_blocks=2,
            axes_dims=(4, 4, 4), nabla_window=(1, 1, 1)),
        lambda: dict(hidden_states=x(2, 2, 16, 16, 5), timestep=torch.full((2,), 900.0)),
    ),
}  # fmt: skip
