"""What units cost where work is counted."""

import pytest
import torch
from torch import nn

import asyncdiff_fast
from asyncdiff_fast.stages.plan import FLOPS_PER_BYTE

TOKENS, FEATURES, LAYERS = 16, 8, 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(LAYERS))

    def forward(self, sample, timestep):
        for layer in self.layers:
            sample = layer(sample)
        return sample


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bytes_of_activations_count_on_the_cpu_alone(device):
    with torch.device(device):
        net, sample = Net(), torch.randn(TOKENS, FEATURES)
    plan = asyncdiff_fast.plan(net, {"sample": sample, "timestep": 0.5}, num_stages=2)
    flops, nbytes = 2 * TOKENS * FEATURES * FEATURES, 2 * TOKENS * FEATURES * sample.element_size()
    each = flops + FLOPS_PER_BYTE * nbytes * (device == "cpu")
    assert sum(u.cost for u in plan.graph.units) == LAYERS * each
