"""What the networks that are not diffusers' are made of."""

import torch
from torch import nn
from torch.nn import functional

WIDTH = 16


def conv(in_channels=WIDTH, out_channels=WIDTH):
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def embed(t, like):
    """Sines of a timestep, (1, WIDTH, 1, 1)."""
    angles = torch.as_tensor(t, dtype=torch.float32).reshape(-1)[:1, None] * 0.3 * torch.arange(1.0, WIDTH + 1)
    return angles.sin().to(like.dtype)[:, :, None, None]


class Block(nn.Module):
    """silu(conv(x)) with the timestep, if there is one."""

    def __init__(self, in_channels=WIDTH, out_channels=WIDTH):
        super().__init__()
        self.conv = conv(in_channels, out_channels)

    def forward(self, x, emb=None):
        h = self.conv(x)
        return functional.silu(h if emb is None else h + emb)


class Body(nn.Module):
    """conv_in, `num_blocks` of a class of block, conv_out; subclasses say how the blocks are joined."""

    block, num_blocks = Block, 6

    def __init__(self):
        super().__init__()
        self.conv_in = conv(4)
        self.blocks = nn.ModuleList(self.block() for _ in range(self.num_blocks))
        self.conv_out = conv(WIDTH, 4)

    def forward(self, x, t):
        h = self.conv_in(x) + embed(t, x)
        return self.conv_out(self.body(h, embed(t, x)))

    def body(self, h, emb):
        for block in self.blocks:
            h = block(h, emb)
        return h
