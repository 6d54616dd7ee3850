"""How noisy latents are at a step, and what an output says of the picture: read off a scheduler of a known family.

Latents are alpha · picture + sigma · noise. The picture that an output stands for is of_sample · latents + of_output ·
output; what the output is (noise, velocity, picture, flow) says the scheduler.
"""

from dataclasses import dataclass

# Deviation of the latents' features that predictions miss: between 0 (the picture stays where latents move) and 1.
# Found by comparing pictures, see docs/steps.md.
DATA_SIGMA = 0.3
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

    @property
    def slope(self):
        """How much an output changes with the latents that it was predicted at, as far as that is known beforehand.

        The best linear guess of the picture moves by alpha · d² / (alpha² · d² + sigma²) of what latents move, where d
        is the deviation of the data (Wiener); the output is what says so.
        """
        if abs(self.of_output) < 1e-6:
            return 0.0
        variance = DATA_SIGMA**2
        moves = self.alpha * variance / (self.alpha**2 * variance + self.sigma**2)
        return (moves - self.of_sample) / self.of_output


def level(scheduler, timestep):
    """The `Level` of the step that a scheduler is about to make; None for one of no known family.

    Args:
        timestep: what the step is given, a number or a tensor with one.
    """
    kinds = {cls.__name__ for cls in type(scheduler).__mro__}
    kind = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    if kinds & _CUMULATIVE:
        cumulative = float(scheduler.alphas_cumprod[int(timestep)])
        return _preserving(cumulative**0.5, (1 - cumulative) ** 0.5, kind)
    if not kinds & (_EXPLODING | _PRESERVING | _FLOW) or scheduler.step_index is None:
        return None
    sigma = float(scheduler.sigmas[scheduler.step_index])
    if kinds & _EXPLODING:
        return _exploding(sigma, kind)
    if kinds & _FLOW or kind == "flow_prediction":
        return Level(1 - sigma, sigma, 1.0, -sigma)
    alpha, sigma = (float(x) for x in scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[scheduler.step_index]))
    return _preserving(alpha, sigma, kind)


def _preserving(alpha, sigma, kind):
    """Where alpha² + sigma² = 1."""
    if kind == "epsilon":
        return Level(alpha, sigma, 1 / alpha, -sigma / alpha)
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


def moved(output, scheduler, timestep, seen, latents):
    """An output that was predicted at latents `seen`, as it would probably be at other latents of the same step.

    Of the shapes and dtype of `output`; the output itself where nothing is known of the sampler.
    """
    found = level(scheduler, timestep) if output.shape == latents.shape and timestep is not None else None
    if found is None or not found.slope:
        return output
    return (output.float() + found.slope * (latents.float() - seen.float())).to(output)
