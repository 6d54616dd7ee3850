"""Stages of models whose sizes follow from values, as a mixture of experts, and of higher-order operators."""

import pytest
import ranks
import torch
from patch_runs import difference, outcome
from token_nets import Experts, TokenNet, build, steps
from torch.nn.attention.flex_attention import flex_attention

import asyncdiff_fast


class Flexible(TokenNet):
    """Attention by `flex_attention`, over 128 tokens."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 48) for _ in range(4))

    def forward(self, x, t):
        for block in self.blocks:
            q, k, v = block(x).unsqueeze(1).chunk(3, -1)
            x = x + flex_attention(q, k, v)[:, 0]
        return x


def test_a_mixture_is_one_unit():
    inputs = dict(x=torch.randn(1, 4, 12, 8), t=900.0)
    plan = asyncdiff_fast.plan(build(Experts), inputs, num_stages=2)
    names = {unit.name for unit in plan.graph.units}
    assert {f"blocks.{i}" for i in range(4)} <= names, names
    assert not any("experts" in name or "router" in name for name in names), names


@torch.no_grad()
def _stages(rank):
    mixture, found = build(Experts), {}
    plain = steps(mixture)
    for name, options in (("exact", dict(warmup_steps=9)), ("asynchronous", dict(warmup_steps=1))):
        result = outcome(mixture, lambda: steps(mixture), num_patches=1, num_stages=2, **options)
        found[name] = difference(result, plain) if isinstance(result, list) else result
    flexible = build(Flexible)
    x = torch.randn(1, 128, 16, generator=torch.Generator().manual_seed(0))
    plain = [flexible(x, 5.0)]
    result = outcome(flexible, lambda: [flexible(x, 5.0)], num_patches=1, num_stages=2)
    found["flexible"] = difference(result, plain) if isinstance(result, list) else result
    refused = outcome(flexible, lambda: [flexible(x, 5.0)], exchange="sync")
    return found, refused


@pytest.mark.filterwarnings("ignore")
def test_asynchronous_steps_of_a_mixture_run():
    for found, refused in ranks.run(2, _stages):
        assert found["exact"] <= 1e-6 and found["flexible"] <= 1e-5, found
        assert isinstance(found["asynchronous"], float) and found["asynchronous"] < 2, found
        assert refused[0] == "ValueError" and "not while it is looked at for patches" in refused[1], refused
