"""Which modules become units again once the stages are known."""

import torch
from torch import nn

import asyncdiff_fast

FEATURES, TOKENS = 32, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.ff = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.ff(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, sample, timestep):
        for block in self.blocks:
            sample = block(sample)
        return sample


def test_of_a_residual_block_its_sum_travels():
    inputs = {"sample": torch.randn(TOKENS, FEATURES), "timestep": 0.5}
    stages = asyncdiff_fast.plan(Net(), inputs, num_stages=2, predict="none")
    assert stages.cut_bytes == TOKENS * FEATURES * 4
