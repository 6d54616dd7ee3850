"""Micro-steps captured in pieces between their posts: bit for bit what launched ones give."""

import functools

import oracle_models
import pytest
import ranks
import tiny_pipelines
import torch
from launched_and_captured import both, equal
from stand_in_graphs import NeverAlone

from asyncdiff_fast.fused import capture

STEPS, WARMUP_STEPS, PATCHES = 7, 2, 3
# Text that the first patch makes for all, with a trend carried on; rows around a patch; weights that are divided; text
# that each patch makes, of a stage that ends within a block.
CASES = {
    "flux": ("flux", dict(predict="linear")),
    "unet": ("tall unet", dict(predict="none")),
    "sharded": ("pixart", dict(shard_weights=True)),
    "within a block": ("sd3", dict(stages=oracle_models.INSIDE_A_BLOCK)),
}


def _generations(name, net):
    """Two generations, the second with another latent."""
    _, call, shape, _ = oracle_models.MODELS[name]
    found, random = [], torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(shape, generator=random)
            for step in range(STEPS):
                found.append(call(net, x, 900 - 100 * step))
                x = x - 0.3 * found[-1]
    return found


def _pictures(pipe):
    """Two pictures; in the calls of the second, those that are begun ahead are replayed too."""
    return [torch.from_numpy(tiny_pipelines.generate(pipe, "sd3", steps=STEPS, output_type="latent")) for _ in range(2)]


def _all(rank):
    capture.CudaGraphs, found = NeverAlone, {}
    for case, (name, options) in CASES.items():
        run = functools.partial(_generations, name)
        shared = dict(num_stages=2, pipeline_patches=PATCHES, warmup_steps=WARMUP_STEPS)
        found[case] = both(oracle_models.MODELS[name][0](), run, **shared | options)
    options = dict(num_stages=2, pipeline_patches=PATCHES, warmup_steps=1, run_ahead=True)
    found["ahead"] = both(tiny_pipelines.build("sd3"), _pictures, **options)
    return found


@functools.cache
def pairs():
    return ranks.run(2, _all, timeout=240)


@pytest.mark.parametrize("case", CASES)
def test_pieces_give_what_launched_micro_steps_give(case):
    for rank in pairs():
        told = equal(rank[case])
        # One of each patch is launched; the second generation has the first's graphs, unless weights were divided.
        again = CASES[case][1].get("shard_weights", False)
        calls = 2 * (STEPS - WARMUP_STEPS) - 1 - again
        assert told == {"captured": PATCHES * (1 + again), "replayed": PATCHES * calls, "refused": []}


def test_micro_steps_of_a_call_that_is_begun_ahead_are_replayed():
    for rank in pairs():
        calls = 2 * (STEPS - 1) - 1
        assert equal(rank["ahead"]) == {"captured": PATCHES, "replayed": PATCHES * calls, "refused": []}
