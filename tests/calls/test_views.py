"""Several steps of a scheduler at one timestep are views of one step; tokens share the timestep, or are given."""

import diffusers
import pytest
import torch

from asyncdiff_fast.calls.clock import Clock
from asyncdiff_fast.calls.timesteps import Timesteps
from asyncdiff_fast.calls.watch import unwatch_schedulers, watch_schedulers

VIEWS = 3


@pytest.fixture
def clock():
    watch_schedulers()
    yield Clock()
    unwatch_schedulers()


def _scheduler(cls=diffusers.DDIMScheduler, steps=4):
    scheduler = cls()
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("kind", ["tensors", "copies", "numbers"])
def test_views_are_calls_of_one_step(clock, kind):
    """As panoramas are drawn: each view is denoised and stepped alone, with a copy of the scheduler's state."""
    scheduler, found = _scheduler(), []
    times = scheduler.timesteps if kind == "tensors" else scheduler.timesteps.tolist()
    for t in times:
        for _ in range(VIEWS):
            tick = clock.tick(t, "a")
            found.append((tick.begins, tick.step, tick.call))
            mine = torch.tensor(t) if kind == "copies" else t
            scheduler.step(torch.ones(1), mine, torch.ones(1))
    assert found == [(step == view == 0, step, view) for step in range(4) for view in range(VIEWS)]


@pytest.mark.parametrize("cls", [diffusers.HeunDiscreteScheduler, diffusers.PNDMScheduler])
@pytest.mark.parametrize("numbers", [False, True])
def test_lists_that_name_a_timestep_twice_step_twice(clock, cls, numbers):
    scheduler = _scheduler(cls)
    times = scheduler.timesteps.tolist() if numbers else scheduler.timesteps
    assert len(set(scheduler.timesteps.tolist())) < len(times)
    for step, t in enumerate(times):
        assert clock.tick(t, "a").step == step
        scheduler.step(torch.ones(1), t if not numbers else scheduler.timesteps[step], torch.ones(1))


def test_given_tokens_keep_their_timestep():
    scheduler = _scheduler()
    found, times = Timesteps(scheduler), scheduler.timesteps.float()
    free = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    found.see(times[0] * free)
    assert torch.equal(found.following(times[0] * free), times[1] * free)


def test_tokens_with_timesteps_of_their_own_are_refused():
    scheduler = _scheduler()
    with pytest.raises(ValueError, match=r"stride=2.*of their own.*use stride=1"):
        Timesteps(scheduler).see(torch.tensor([[float(scheduler.timesteps[0]), 300.0, 0.0]]))
