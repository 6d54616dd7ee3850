"""Two patched denoisers in one process do not see each other."""

import numpy as np
import ranks
import tiny_pipelines
import torch
import torch.distributed as dist
from bare import DOWN, Bare, loop, noise

import asyncdiff_fast


def _two_pipelines(rank):
    """Two pipelines patched at once, with generations in turns, unpatched in the other order."""
    pipes = {name: tiny_pipelines.build(name) for name in ("sd15", "wan")}
    options = dict(num_stages=2, warmup_steps=2, timeout_s=40)
    alone = {}
    for name, pipe in pipes.items():
        asyncdiff_fast.patch(pipe, **options)
        alone[name] = tiny_pipelines.generate(pipe, name)
        asyncdiff_fast.unpatch(pipe)
    for pipe in pipes.values():
        asyncdiff_fast.patch(pipe, **options)
    same = [np.array_equal(tiny_pipelines.generate(pipes[n], n), alone[n]) for n in ("sd15", "wan", "sd15", "wan")]
    asyncdiff_fast.unpatch(pipes["sd15"])
    same.append(np.array_equal(tiny_pipelines.generate(pipes["wan"], "wan"), alone["wan"]))
    asyncdiff_fast.unpatch(pipes["wan"])
    return [*same, not dist.is_initialized()]


def test_two_pipelines_at_once():
    assert all(all(same) for same in ranks.run(2, _two_pipelines))


def _interleaved(rank):
    """Two bare models that take turns within their loops."""
    models = Bare(), Bare(5)
    options = dict(num_stages=2, warmup_steps=2, timeout_s=40)
    alone = []
    for model in models:
        asyncdiff_fast.patch(model, **options)
        alone.append(loop(model))
    x = [noise(), noise()]
    with torch.no_grad():
        for t in DOWN:
            for i, model in enumerate(models):
                x[i] = x[i] - 0.1 * model(x[i], t)
    for model in models:
        asyncdiff_fast.unpatch(model)
    return [torch.equal(a, b) for a, b in zip(x, alone, strict=True)]


def test_two_models_take_turns():
    assert ranks.run(2, _interleaved) == [[True, True]] * 2
