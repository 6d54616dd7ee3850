"""Steps side by side whose calls read what the last call of the same ranks has made: ranks that are threads, of every
way to share such calls, beside a plain simulation in one process.
"""

import contextlib
import copy
import functools

import diffusers
import oracle
import patch_oracle
import pipeline_oracle
import pytest
import steps_oracle
import torch
import virtual
from oracle_models import MODELS

from asyncdiff_fast import parts
from asyncdiff_fast.config import Config
from asyncdiff_fast.runtime import Runtime
from asyncdiff_fast.steps.calls import StepCalls

STEPS, LEFT_AFTER = 12, 3
# Of the largest element: rounding, carried on from step to step.
TOLERANCE = 3e-5
# Name, steps side by side, tolerance, how each call is shared; {what must come up: calls of blocks that are exact since
# their ranks were left out of shorter ones, exact steps after warm-up}.
CASES = [
    ("unet", 2, 0.05, dict(num_stages=2, pipeline_patches=2), {}),
    ("pixart", 2, 0.1, dict(num_stages=2, pipeline_patches=4), {"late"}),
    ("pixart", 2, 0.1, dict(num_stages=2, pipeline_patches=2, cfg_parallel=True, warmup_steps="auto"), {"late"}),
    ("pixart", 3, 0.2, dict(num_stages=2, pipeline_patches=2), {"refreshed"}),
    ("unet", 2, 0.05, dict(num_stages=2), {}),
    ("pixart", 3, 0.2, dict(num_stages=2), {"refreshed"}),
    ("unet", 2, 0.05, dict(num_patches=2), {}),
    ("pixart", 3, 0.2, dict(num_patches=2), {"refreshed"}),
]


def _id(case):
    return "-".join(map(str, [*case[:3], *(f"{name}={x}" for name, x in case[3].items())]))


def sampler():
    return diffusers.FlowMatchEulerDiscreteScheduler()


@torch.no_grad()
def loop(name, call, scheduler, steps=STEPS):
    scheduler.set_timesteps(STEPS)
    x = torch.randn(*MODELS[name][2], generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps[:steps]:
        x = scheduler.step(call(x, int(t)), t, x, return_dict=False)[0]
    return x


def ranks(monkeypatch, name, config):
    """[(result, statistics, the plan)] of all ranks, after a loop that was left in the middle of a block."""
    monkeypatch.setattr(parts, "open_exchange", lambda world, device: virtual.VirtualExchange(world))
    make, call, _, _ = MODELS[name]
    model = make()
    models = [copy.deepcopy(model) for _ in range(config.world_size)]

    def one(world):
        mine = models[world.rank]
        steps = StepCalls(config, world.along(config.mesh.along("step", world.rank)))
        runtime = Runtime(mine, config, world, steps=steps)
        try:
            loop(name, functools.partial(call, mine), sampler(), LEFT_AFTER)
            runtime.clear_stats()
            return loop(name, functools.partial(call, mine), sampler()), runtime.stats(), runtime.plan.each
        finally:
            world.gather(None, "the end")
            runtime.close()

    return virtual.run(config.world_size, one)


def _simulation(model, name, plan, options):
    """One group of ranks, whose calls are exact or not as `Groups` says."""
    sequences = MODELS[name][3]
    if "pipeline_patches" in options:
        return pipeline_oracle.Simulation(model, plan.patches.rows.held, sequences, 0)
    if "num_patches" in options:
        return patch_oracle.Simulation(model, plan.rows.held, sequences, 0)
    owner = {unit.key: stage for unit, stage in zip(plan.graph.units, plan.division.owner, strict=True)}
    return oracle.Simulation(model, owner, options["num_stages"], 0)


class Groups:
    """The groups of ranks that evaluate steps side by side, one `simulation` each, told by the `rule` whose turn it is.

    A group's call is exact if all groups make it, or if its last one was more steps ago than there are groups.
    """

    def __init__(self, rule, models, simulations, call):
        self.rule, self.models, self.simulations, self.call = rule, models, simulations, call
        self.last, self.refreshed, self.stale = [None] * len(models), 0, 0

    def __call__(self, x, t):
        step, place = self.rule.step_idx, self.rule.place()
        if place is None:
            first, *_ = [self._one(group, step, True, x, t) for group in range(len(self.models))]
            return first
        exact = step - self.last[place] > len(self.models)
        self.refreshed, self.stale = self.refreshed + exact, self.stale + (not exact)
        return self._one(place, step, exact, x, t)

    def _one(self, group, step, exact, x, t):
        self.last[group] = step
        self.simulations[group].warmup_steps = 10 * STEPS if exact else -1
        return self.call(self.models[group], x, t)


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_rule(case, monkeypatch):
    name, num_ranks, tolerance, options, comes_up = case
    config = Config(parallel_steps=num_ranks, tolerance=tolerance, kernels="torch", pipeline_text="patch", **options)
    found = ranks(monkeypatch, name, config)
    make, call, _, _ = MODELS[name]

    def rule():
        return steps_oracle.Simulation(sampler(), num_ranks, config.least_warmup, tolerance, STEPS)

    with contextlib.ExitStack() as stack:
        models = [make() for _ in range(num_ranks)]
        simulations = [stack.enter_context(_simulation(m, name, found[0][2], options)) for m in models]
        groups = Groups(stack.enter_context(rule()), models, simulations, call)
        simulated = loop(name, groups, groups.rule.scheduler)
    with rule() as fresh:
        exact = loop(name, functools.partial(call, make()), fresh.scheduler)
    lengths, largest = groups.rule.lengths, simulated.abs().max()
    assert (groups.refreshed > 0) == ("refreshed" in comes_up) and groups.stale > 2
    assert (1 in lengths[config.least_warmup : -1]) == ("late" in comes_up) or not comes_up
    assert (exact - simulated).abs().max() > 5 * TOLERANCE * largest, "the case cannot tell displaced from exact"
    for result, *_ in found:
        assert torch.equal(result, found[0][0])
        assert (result - simulated).abs().max() <= TOLERANCE * largest
    # The ranks of a group carry out its calls; the last group's are fewest.
    calls = [(stats["exact_calls"], stats["compute_calls"]) for _, stats, _ in found]
    everywhere = lengths.count(1)
    assert calls[0] == (everywhere, len(lengths) - everywhere)
    assert sum(sum(c) - everywhere for c in calls) == (groups.stale + groups.refreshed) * len(calls) // num_ranks
