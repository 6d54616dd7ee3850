"""Calls with gradients are exact and differentiable, and the generation after them begins anew."""

import ranks
import torch
from bare import DOWN, Bare, loop, noise

import asyncdiff_fast


def _gradients(rank):
    """With gradients every call is exact and differentiable; the generation after it begins anew."""
    model = Bare()

    def differentiable():
        x = noise(1).requires_grad_()
        y = x
        for t in DOWN:
            y = y - 0.1 * model(y, t)
        y.square().sum().backward()
        return x.grad

    runtime = asyncdiff_fast.patch(model, num_stages=2, warmup_steps=2, timeout_s=30)
    patched = [loop(model), differentiable(), loop(model)]
    asyncdiff_fast.unpatch(model)
    return patched, differentiable(), runtime.stats()["compute_calls"]


def test_gradients():
    for patched, plain, compute_calls in ranks.run(2, _gradients):
        assert torch.equal(patched[1], plain)
        assert torch.equal(patched[0], patched[2])
        assert compute_calls == 8


def _switched(rank):
    """Gradients in the middle of a generation."""
    model = Bare()

    def run():
        x = noise()
        for i, t in enumerate(DOWN):
            with torch.set_grad_enabled(i == 3):
                x = (x - 0.1 * model(x, t)).detach()
        return x

    asyncdiff_fast.patch(model, num_stages=2, warmup_steps=2, timeout_s=30)
    first, second = run(), run()
    asyncdiff_fast.unpatch(model)
    return first, second


def test_gradients_in_the_middle():
    (first, second), (theirs, _) = ranks.run(2, _switched)
    assert torch.equal(first, second) and torch.equal(first, theirs)
