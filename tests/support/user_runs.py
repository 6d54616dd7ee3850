"""Runs of the networks that are not diffusers': built with the same weights each time, sampled for a few steps."""

import torch
import user_nets
import user_nets_inplace
import user_nets_results
import user_nets_state
import user_nets_steered
from diffusers.schedulers.scheduling_utils import SchedulerMixin

_FILES = (user_nets, user_nets_results, user_nets_inplace, user_nets_state, user_nets_steered)
NETS = {name: net for file in _FILES for name, net in file.NETS.items()}
CALLS = {name: call for file in _FILES for name, call in getattr(file, "CALLS", {}).items()}
STEPS = 7


def build(name):
    """The net, seeded weights of unit gain."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NETS[name]().eval().requires_grad_(False)
        for p in net.parameters():
            p.mul_(1.5)
    return net


class Scheduler(SchedulerMixin):
    """Steps and restarts are seen; nothing else."""

    def set_timesteps(self):
        pass

    def step(self):
        pass


@torch.no_grad()
def sample(net, name, seed=0):
    """All predictions of one generation: (STEPS, 3, 4, 8, 8). A scheduler is seen only where there is no timestep."""
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    call, predictions, scheduler = CALLS.get(name, lambda net, x, t: net(x, t)), [], Scheduler()
    if name == "sequential":
        scheduler.set_timesteps()
    for t in torch.arange(STEPS, 0, -1, dtype=torch.float32):
        prediction = call(net, x, t)
        predictions.append(prediction.clone())
        x = x - 0.2 * prediction / (1e-3 + prediction.abs().max())
        if name == "sequential":
            scheduler.step()
    return torch.stack(predictions)


def generations(net, name):
    """Two generations without anything in between."""
    return torch.cat([sample(net, name, seed) for seed in (1, 0)])
