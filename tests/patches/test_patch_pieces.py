"""Displaced calls captured in pieces between their posts: bit for bit what launched ones give."""

import functools

import fused_checks
import pytest
import ranks
import tiny_denoisers
import tiny_parts
import torch
from launched_and_captured import both, equal
from stand_in_graphs import NeverAlone

import asyncdiff_fast
from asyncdiff_fast.fused import capture

STEPS, WARMUP_STEPS = 8, 2
OPTIONS = {
    "predicted": dict(predict="linear"),
    "as published": dict(predict="none", group_norm="stale"),
    "local": dict(predict="none", group_norm="local", warmup_steps=1),
}


def _generations(net, calls=1):
    """Two generations, each with a text of its own; and a latent."""
    found, random = [], torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(2):
            texts = [torch.randn(2, 3, tiny_parts.WIDTH, generator=random) for _ in range(calls)]
            x = torch.randn(2, 4, 16, 8, generator=random)
            for step in range(STEPS):
                for text in texts:
                    made = net(x, 900 - 100 * step, text, return_dict=False)[0]
                    found.append(made)
                x = x - 0.1 * made
    return found


def _flux(net):
    """Tokens: the text's are computed on both ranks."""
    found, given = [], fused_checks.flux_inputs(16)
    with torch.no_grad():
        for step in range(STEPS):
            made = net(**given | {"timestep": torch.tensor([1 - 0.1 * step])})[0]
            given["hidden_states"] = given["hidden_states"] - 0.1 * made
            found.append(made)
    return found


def _all(rank):
    capture.CudaGraphs, found = NeverAlone, {}
    unet = fused_checks.unet()
    for name, options in OPTIONS.items():
        found[name] = both(unet, _generations, num_patches=2, **{"warmup_steps": WARMUP_STEPS} | options)
    found["twice"] = both(unet, functools.partial(_generations, calls=2), num_patches=2, warmup_steps=WARMUP_STEPS)
    flux = tiny_denoisers.flux_transformer()
    found["flux"] = both(flux, _flux, num_patches=2, warmup_steps=WARMUP_STEPS)
    return found


@functools.cache
def pairs():
    return ranks.run(2, _all, timeout=240)


@pytest.mark.parametrize("name", OPTIONS)
def test_pieces_give_what_launched_calls_give(name):
    # Two are launched; the second generation has the first's graphs.
    stale = STEPS - OPTIONS[name].get("warmup_steps", WARMUP_STEPS)
    for rank in pairs():
        assert equal(rank[name]) == {"captured": 1, "replayed": 2 * stale - 2, "refused": []}


def test_calls_of_one_step_have_graphs_of_their_own():
    for rank in pairs():
        stale = STEPS - WARMUP_STEPS
        assert equal(rank["twice"]) == {"captured": 2, "replayed": 2 * (2 * stale - 2), "refused": []}


def test_patches_of_tokens():
    for rank in pairs():
        assert equal(rank["flux"]) == {"captured": 1, "replayed": STEPS - WARMUP_STEPS - 2, "refused": []}


@pytest.mark.parametrize("options", [dict(num_stages=2), dict(exchange="sync"), dict(exchange="none")])
def test_what_is_not_captured_is_refused(options):
    with pytest.raises(ValueError, match=r"captured.*got graphs=True.*num_patches=2.*pass graphs=False"):
        asyncdiff_fast.Config(graphs=True, num_patches=2, **options)
