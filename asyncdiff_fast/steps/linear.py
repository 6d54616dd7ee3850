"""A deterministic sampler as a linear map of its latents and the denoiser's outputs, read off a scheduler.

The coefficients are found by giving a copy of the scheduler latents and outputs of 0 and 1, and held to others at
random: a step that clips, draws or remembers does not pass. The copy counts in fp64 as far as its class does.
The variance of a step is DDPM's: of the latents after it, given those before it and the picture. With latents
x = α · picture + σ · noise before and α', σ' after it is σ'² (1 - (σ' α / σ α')²).
Source: DDIM (arXiv 2010.02502), equation 16 with η = 1.
"""

import copy
from dataclasses import dataclass

import torch

from .unable import why_not

_DDIM = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler")
# Latents that are picture + σ noise.
_EXPLODING = ("EulerDiscreteScheduler", "EDMEulerScheduler")
_FLOW = ("FlowMatchEulerDiscreteScheduler",)
LINEAR = (*_DDIM, *_EXPLODING, *_FLOW)
# Latents and outputs that a step is held to; of its result, since some classes count in fp32.
_PROBES, _CLOSE = 8, 1e-4


@dataclass(frozen=True)
class Linear:
    """x[k + 1] = a[k] x[k] + b[k] u[k], where step k counts from 0 and x[0] is noise.

    Args:
        timesteps: (num_steps,), as the scheduler has them.
        scales: what latents are multiplied by to be the denoiser's input.
        variances: of DDPM's step to the same noise level.
    """

    timesteps: torch.Tensor
    scales: tuple[float, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]
    variances: tuple[float, ...]

    @property
    def num_steps(self):
        """Steps from noise to picture."""
        return len(self.a)


def linear(scheduler, end_at_one=False):
    """The `Linear` of a scheduler whose timesteps are set; the scheduler stays as it is.

    Args:
        end_at_one: the last step goes to α = 1, whatever `set_alpha_to_one` says; DDIM only.
    Raises: ValueError that names a scheduler whose steps are no such map, and those that will do.
    """
    name = type(scheduler).__name__
    kinds = {cls.__name__ for cls in type(scheduler).__mro__}
    if not kinds & {*LINEAR}:
        raise ValueError(
            f"a window of steps needs a deterministic one-step sampler: got {name}; "
            f"make one of {', '.join(LINEAR)} with from_config(scheduler.config)"
        )
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError(f"the scheduler needs its timesteps: call {name}.set_timesteps(num_steps) first")
    if not len(_timesteps(scheduler)):
        raise ValueError(
            f"a window needs a step at least: got {name} with {len(scheduler.timesteps)} timesteps, of which the loop "
            f"begins at number {getattr(scheduler, 'begin_index', None) or 0}; call set_timesteps() for more steps, or "
            "set_begin_index() for an earlier one"
        )
    if end_at_one and not kinds & {*_DDIM}:
        raise ValueError(f"end_at_one is for {', '.join(_DDIM)}: got {name}; leave it out")
    reason = why_not(scheduler)
    if reason is not None:
        raise ValueError(f"a window of steps needs one evaluation a step: {reason}")
    found = _copied(scheduler)
    variances = _of_alphas(found) if kinds & {*_DDIM} else _of_sigmas(found, flow=bool(kinds & {*_FLOW}))
    if end_at_one:
        found.final_alpha_cumprod = torch.ones_like(found.final_alpha_cumprod)
    scales, a, b = _probed(found)
    return Linear(_timesteps(scheduler), scales, a, b, tuple(variances.clamp(min=0).tolist()))


def _copied(scheduler):
    """A copy at its first step, on the CPU, in fp64."""
    found = copy.deepcopy(scheduler)
    for name, x in vars(found).items():
        if isinstance(x, torch.Tensor):
            setattr(found, name, x.cpu().double() if x.is_floating_point() else x.cpu())
    if hasattr(found, "_step_index"):
        found._step_index = None
    return found


def _timesteps(scheduler):
    """Those of the loop: it may begin in the middle of the list."""
    return scheduler.timesteps[getattr(scheduler, "begin_index", None) or 0 :]


def _probed(scheduler):
    """(scales, a, b) of all steps. Advances the scheduler. Raises: ValueError if a step is not linear."""
    random = torch.randn(2, _PROBES, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    random[:, 0, 0, 0, 0] = torch.tensor([1.0, 0.0])
    random[:, 1, 0, 0, 0] = torch.tensor([0.0, 1.0])
    x, found = random[0], []
    # A step that draws must not change what the caller draws next.
    with torch.random.fork_rng(devices=[]):
        for k, t in enumerate(_timesteps(scheduler)):
            # What a multistep sampler remembers is another output than this one.
            u = random[1].clone()
            u[2:] = u[2:].roll(k, 0)
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            y = scheduler.step(u, t, x, return_dict=False)[0].double()
            scale, a, b = scaled.flatten()[0], y.flatten()[0], y.flatten()[1]
            size = (a * x).abs() + (b * u).abs() + 1
            if not ((y - a * x - b * u).abs() <= _CLOSE * size).all():
                raise ValueError(
                    f"{type(scheduler).__name__}'s step is not linear in latents and outputs: it clips, thresholds, "
                    "draws or remembers; pass clip_sample=False, thresholding=False, stochastic_sampling=False"
                )
            found.append((float(scale), float(a), float(b)))
    return tuple(zip(*found, strict=True))


def _of_alphas(scheduler):
    """Variances of DDIM's kind, (num_steps,)."""
    ahead = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return torch.stack([scheduler._get_variance(t, t - ahead) for t in _timesteps(scheduler)])


def _of_sigmas(scheduler, flow):
    """Variances where the scheduler has a list of σ, (num_steps,)."""
    sigmas = scheduler.sigmas[-1 - len(_timesteps(scheduler)) :]
    alphas = 1 - sigmas if flow else torch.ones_like(sigmas)
    share = sigmas[1:] * alphas[:-1] / (sigmas[:-1] * alphas[1:])
    return sigmas[1:].square() * (1 - share.square())
