"""Sampling loops without a pipeline: whatever their timesteps look like, each generation follows the rule."""

from functools import partial

import diffusers
import pytest
import ranks
import torch
from bare import DOWN, Bare, loop, noise
from sequences import assert_right, compare


def _filled(values):
    """The same tensor for every step, filled in place."""

    def times():
        t = torch.empty(1)
        for value in values:
            yield t.fill_(value)

    return times


UP = [0.05, 0.2, 0.4, 0.6, 0.8, 1.0]
LOOPS = {
    "descending": lambda m: [partial(loop, m, DOWN), partial(loop, m, DOWN, seed=1), partial(loop, m, DOWN)],
    "ascending": lambda m: [partial(loop, m, UP), partial(loop, m, UP, seed=1), partial(loop, m, UP)],
    "float": lambda m: [partial(loop, m, [t / 1000 for t in DOWN]), partial(loop, m, [float(t) for t in DOWN], seed=1)],
    "tensors": lambda m: [partial(loop, m, torch.tensor(DOWN)), partial(loop, m, torch.tensor(DOWN)[:, None], seed=1)],
    "filled": lambda m: [partial(loop, m, _filled(DOWN)), partial(loop, m, _filled(DOWN), seed=1)],
    "sizes": lambda m: [partial(loop, m, DOWN, size=s) for s in (8, 12, 8, 6, 12)],
    "two_calls": lambda m: [partial(loop, m, DOWN, calls=2), partial(loop, m, DOWN, calls=2, seed=1)],
    "lengths": lambda m: [partial(loop, m, DOWN), partial(loop, m, DOWN[:4]), partial(loop, m, DOWN, seed=2)],
}


def _bare(rank, name):
    model = Bare()
    stages = [["first", "blocks.0", "blocks.1", "blocks.2"], ["blocks.3", "blocks.4", "blocks.5", "last"]]
    calls = 2 if name == "two_calls" else 1
    return compare(rank, model, model, LOOPS[name](model), calls_per_step=calls, stages=stages)


@pytest.mark.parametrize("name", LOOPS)
def test_bare(name):
    assert_right(ranks.run(2, _bare, name), tolerance=1e-6)


def _many_sizes(rank):
    model = Bare()
    sizes = [*range(4, 16), 4, 15, 5]
    stages = [["first", "blocks.0", "blocks.1", "blocks.2"], ["blocks.3", "blocks.4", "blocks.5", "last"]]
    return compare(rank, model, model, [partial(loop, model, DOWN, size=s) for s in sizes], stages=stages)


def test_more_sizes_than_plans_are_kept():
    assert_right(ranks.run(2, _many_sizes), tolerance=1e-6)


class OwnScheduler:
    """Knows nothing of diffusers."""

    def loop(self, model, seed):
        @torch.no_grad()
        def run():
            x = noise(seed)
            for t in DOWN:
                x = self.step(model(x, t), x)
            return x

        return run

    def step(self, prediction, x):
        return x - 0.1 * prediction


def _own_scheduler(rank):
    model, scheduler = Bare(), OwnScheduler()
    return compare(rank, model, model, [scheduler.loop(model, seed) for seed in (0, 1, 0)])


def test_own_scheduler():
    assert_right(ranks.run(2, _own_scheduler), tolerance=1e-6)


def _set_once(rank, steps):
    """DDIM has no state of its own, so a loop may set its timesteps once and use them for every picture."""
    model, scheduler = Bare(), diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    scheduler.set_timesteps(6)

    def generation(seed):
        @torch.no_grad()
        def run():
            x = noise(seed)
            for t in scheduler.timesteps[:steps]:
                x = scheduler.step(model(x, t), t, x).prev_sample
            return x

        return run

    return compare(rank, model, model, [generation(seed) for seed in (0, 1, 2)])


@pytest.mark.parametrize("steps", [6, 4])
def test_timesteps_set_once_for_several_generations(steps):
    assert_right(ranks.run(2, _set_once, steps), tolerance=1e-6)
