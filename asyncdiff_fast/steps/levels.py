"""How noisy latents are at a step, and what an output says of the picture: read off a scheduler of a known family.

Latents are alpha · picture + sigma · noise. The picture that an output stands for is of_sample · latents + of_output ·
output; what the output is (noise, velocity, picture, flow) says the scheduler.
"""

from dataclasses import dataclass

import torch

# Deviation of the latents' features that predictions miss: between 0 (the picture stays where latents move) and 1.
# Found by comparing pictures, see docs/steps.md.
DATA_SIGMA = 0.3
# Shares of picture or of noise that are none.
LEAST = 1e-6
_CUMULATIVE = {
    "DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler", "DDPMScheduler", "DDPMParallelScheduler",
    "LCMScheduler", "TCDScheduler", "PNDMScheduler",
}  # fmt: skip
_EXPLODING = {"EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler"}
_PRESERVING = {"DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler"}
_FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "LTXEulerAncestralRFScheduler"}


@dataclass(frozen=True)
class Level:
    """One step of a sampler: see the file."""

    alpha: float
    sigma: float
    of_sample: float
    of_output: float

    def picture(self, sample, output):
        """What an output at these latents says the picture is: fp32, of their shape."""
        return self.of_sample * sample.float() + self.of_output * output.float()

    def output(self, sample, picture):
        """What says so at these latents: fp32, of their shape."""
        return (picture - self.of_sample * sample.float()) / self.of_output

    @property
    def slope(self):
        """How much an output changes with the latents that it was predicted at, as far as that is known beforehand.

        The best linear guess of the picture moves by alpha · d² / (alpha² · d² + sigma²) of what latents move, where d
        is the deviation of the data (Wiener); the output is what says so.
        """
        variance = DATA_SIGMA**2
        moves = self.alpha * variance / (self.alpha**2 * variance + self.sigma**2)
        return (moves - self.of_sample) / self.of_output


def level(scheduler, timestep):
    """The `Level` of the step that a scheduler is about to make; None where its outputs say nothing of a picture.

    That is so for schedulers of no known family, without noise, and where the parts of a batch are at several levels.

    Args:
        timestep: what the step is given, a number or a tensor.
    """
    if isinstance(timestep, torch.Tensor) and timestep.numel() > 1:
        if not (timestep == timestep.flatten()[0]).all():
            return None
        timestep = timestep.flatten()[0]
    found = _read(scheduler, timestep)
    return None if found is None or abs(found.of_output) < LEAST else found


def _read(scheduler, timestep):
    kinds = {cls.__name__ for cls in type(scheduler).__mro__}
    kind = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    if kinds & _CUMULATIVE:
        cumulative = float(scheduler.alphas_cumprod[int(timestep)])
        return _preserving(cumulative**0.5, (1 - cumulative) ** 0.5, kind)
    if not kinds & (_EXPLODING | _PRESERVING | _FLOW):
        return None
    listed = scheduler.sigmas[_place(scheduler, timestep)]
    sigma = float(listed)
    if kinds & _EXPLODING:
        return _exploding(sigma, kind)
    if kinds & _FLOW or kind == "flow_prediction":
        return Level(1 - sigma, sigma, 1.0, -sigma)
    return _preserving(*(float(x) for x in scheduler._sigma_to_alpha_sigma_t(listed)), kind)


def _place(scheduler, timestep):
    """Of the step in the scheduler's lists, which many count from their first step on."""
    for place in (scheduler.step_index, scheduler.begin_index):
        if place is not None:
            return place
    return scheduler.index_for_timestep(timestep)


def _preserving(alpha, sigma, kind):
    """Where alpha² + sigma² = 1."""
    if kind == "epsilon":
        return Level(alpha, sigma, 1 / alpha, -sigma / alpha) if alpha > LEAST else None
    if kind == "v_prediction":
        return Level(alpha, sigma, alpha, -sigma)
    return Level(alpha, sigma, 0.0, 1.0) if kind == "sample" else None


def _exploding(sigma, kind):
    """Where alpha is 1; the denoiser sees latents divided by sqrt(sigma² + 1)."""
    if kind == "epsilon":
        return Level(1.0, sigma, 1.0, -sigma)
    if kind == "v_prediction":
        return Level(1.0, sigma, 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1) ** 0.5)
    return Level(1.0, sigma, 0.0, 1.0) if kind in ("sample", "original_sample") else None
