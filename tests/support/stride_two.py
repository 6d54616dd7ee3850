"""The intended rule of stride 2, computed in one process the plain way.

At a computing step k every stage computes for step k + 1 (with its timestep) from the latent of step k and from what
the other stages gave at the last computing step; the extra rank computes the last stage from the same inputs for step
k, and that is the prediction. Step k + 1 repeats what the last stage made.
"""

import inspect

import oracle
import torch
from torch.utils._pytree import tree_map_only


def recorded_timesteps(denoiser, generate):
    """The timestep argument of every call of one generation."""
    times, forward = [], denoiser.forward
    denoiser.forward = lambda *args, **kwargs: (
        times.append(_timestep(forward, args, kwargs)) or forward(*args, **kwargs)
    )
    try:
        generate()
    finally:
        del denoiser.forward
    return times


def _timestep(forward, args, kwargs, new=None):
    """The argument called `timestep` (of a UNet the second), or the arguments with another one."""
    name = "timestep" if "timestep" in inspect.signature(forward).parameters else "t"
    bound = inspect.signature(forward).bind(*args, **kwargs)
    if new is None:
        t = bound.arguments[name]
        return t.clone() if isinstance(t, torch.Tensor) else t
    bound.arguments[name] = new
    return bound.args, bound.kwargs


class StrideTwo(oracle.Simulation):
    """As `oracle.Simulation`; `times` are the timesteps of all calls, one call a step."""

    def __init__(self, denoiser, owner, num_stages, warmup_steps, times, time_shift=False, stride_phase="warmup"):
        super().__init__(denoiser, owner, num_stages, warmup_steps)
        self.times, self.shift, self.stride_phase = times, int(time_shift), stride_phase

    def _run(self, stage, time, args, kwargs):
        """One stage's prediction from the cache; what its units give goes to `fresh`."""
        self.stage, self.ordinals = stage, {}
        args, kwargs = _timestep(self.forward, args, kwargs, new=time)
        args, kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        return self.forward(*args, **kwargs)

    def _call(self, *args, **kwargs):
        k, self.place, self.fresh = self.calls, 0, {}
        self.calls += 1
        if k < self.warmup_steps:
            result = self.following = self._run(None, self.times[k], args, kwargs)
        elif (k if self.stride_phase == "odd" else k - self.warmup_steps + 1) % 2 == 0:
            return tree_map_only(torch.Tensor, torch.clone, self.following)
        else:
            last = self.num_stages - 1
            result = self._run(last, self.times[k - self.shift], args, kwargs)
            self.fresh = {}
            ahead = k - self.shift + (k + 1 < len(self.times))
            for stage in range(self.num_stages):
                self.following = self._run(stage, self.times[ahead], args, kwargs)
        self.cache.update(self.fresh)
        return result
