"""A denoiser whose blocks sleep as long as they would compute: more ranks than processors then keep their pace."""

import time

import torch

WIDTH, ROWS, BATCH = 8, 32, 2


class SleepingConv(torch.nn.Conv2d):
    """A convolution that takes `seconds` for the whole batch and picture, and its share of them for a part."""

    def __init__(self, seconds):
        super().__init__(WIDTH, WIDTH, 3, padding=1)
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds * x.shape[0] * x.shape[-2] / (BATCH * ROWS))
        return super().forward(x)


class Sleeping(torch.nn.Module):
    """Blocks one after the other, the same on every rank."""

    def __init__(self, num_blocks=12, block_s=0.05):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = (torch.nn.Conv2d(a, b, 3, padding=1) for a, b in ((4, WIDTH), (WIDTH, 4)))
            self.blocks = torch.nn.ModuleList(SleepingConv(block_s) for _ in range(num_blocks))

    def forward(self, sample, timestep):
        x = self.first(sample)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return (self.last(x),)


def sleeping():
    """(denoiser, its inputs)."""
    inputs = {"sample": torch.zeros(BATCH, 4, ROWS, ROWS), "timestep": torch.zeros(BATCH)}
    return Sleeping().eval().requires_grad_(False), inputs
