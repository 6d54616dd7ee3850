"""Networks that mix rows in other ways: refused on every rank with one error, and left as they were."""

import functools

import patch_nets
import pytest
import ranks
import torch
from patch_runs import assert_refused, build, outcome, predictions
from workers import collect

OPTIONS = dict(num_patches=1, num_stages=2, pipeline_patches=2, warmup_steps=1)


@torch.no_grad()
def _all(rank):
    found = {}
    for name in patch_nets.NETS:
        net = build(name)
        found[name] = outcome(net, lambda net=net: predictions(net), **OPTIONS)
    return found


@functools.cache
def results():
    return collect(ranks.start(2, _all), 250)


@pytest.mark.parametrize("name", patch_nets.NETS)
def test_networks_are_right_or_refused(name):
    outcomes = [rank[name] for rank in results()]
    if isinstance(outcomes[0], tuple):
        assert_refused(outcomes)
    else:
        # The first call is compared with the exact one; the others come to all ranks alike.
        assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_some_of_each():
    refused = {name for name in patch_nets.NETS if isinstance(results()[0][name], tuple)}
    assert all("pipeline_patches=2" in results()[0][name][1] for name in refused), results()[0]
    assert 4 < len(refused) < len(patch_nets.NETS) - 4
