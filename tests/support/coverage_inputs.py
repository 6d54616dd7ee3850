"""What inputs and configurations of several denoiser classes have in common."""

import torch

T, TEXT = torch.full((2,), 900.0), 8
UNET = dict(
    block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8
)
FLUX = dict(
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
)
WAN = dict(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=256,
    ffn_dim=32,
    num_layers=2,
    rope_max_seq_len=32,
)


def x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(height, width):
    grid = torch.meshgrid(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return torch.stack(grid, -1).reshape(-1, 3)


def picture(*shape, **more):
    return dict(hidden_states=x(2, *(shape or (4, 16, 16))), timestep=T, **more)


def text(size, length=TEXT):
    return dict(encoder_hidden_states=x(2, length, size, seed=1))


def mask(length=TEXT):
    return torch.ones(2, length)


def sizes(*names):
    return {name: torch.tensor([[16, 16]] * 2) for name in names}


def flux(**more):
    return picture(64, 16, img_ids=ids(8, 8), txt_ids=torch.zeros(TEXT, 3), **text(32), **more)
