"""What an output says of the picture: as the samplers themselves have it, what is expected, and how outputs move."""

import bare
import diffusers
import pytest
import torch

from asyncdiff_fast.steps.given import Step
from asyncdiff_fast.steps.levels import DATA_SIGMA, Level, level
from asyncdiff_fast.steps.outputs import Evaluated, Outputs, evaluated

VP = dict(clip_sample=False)
KINDS = [
    *[("DDIMScheduler", VP | dict(prediction_type=p)) for p in ("epsilon", "v_prediction", "sample")],
    *[("DDPMScheduler", VP | dict(prediction_type=p)) for p in ("epsilon", "v_prediction", "sample")],
    *[("EulerDiscreteScheduler", dict(prediction_type=p)) for p in ("epsilon", "v_prediction")],
    *[("EulerAncestralDiscreteScheduler", dict(prediction_type=p)) for p in ("epsilon", "v_prediction")],
    ("LMSDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0)),
    *[("DPMSolverMultistepScheduler", dict(prediction_type=p)) for p in ("epsilon", "v_prediction", "sample")],
    ("DPMSolverMultistepScheduler", dict(prediction_type="flow_prediction", use_flow_sigmas=True)),
    *[("UniPCMultistepScheduler", dict(prediction_type=p)) for p in ("epsilon", "v_prediction", "sample")],
    ("SASolverScheduler", {}),
]


def own_picture(scheduler, output, t, x):
    """The picture as the sampler has it, and the next latents."""
    converts = hasattr(scheduler, "convert_model_output")
    picture = (
        scheduler.convert_model_output(output, sample=x) if converts and scheduler.step_index is not None else None
    )
    if "FlowMatch" in type(scheduler).__name__ and scheduler.step_index is not None:
        picture = x - scheduler.sigmas[scheduler.step_index] * output
    result = scheduler.step(output, t, x)
    own = getattr(result, "pred_original_sample", None)
    return (picture if own is None else own), result.prev_sample


@pytest.mark.parametrize("name, options", KINDS)
def test_the_picture_is_the_samplers_own(name, options):
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(10)
    x, output, compared = bare.noise(0), bare.noise(1), 0
    for t in scheduler.timesteps[:6]:
        at = level(scheduler, t)
        before = x
        picture, x = own_picture(scheduler, output, t, x)
        if at is not None and picture is not None:
            compared += 1
            assert torch.allclose(at.of_sample * before + at.of_output * output, picture, rtol=1e-4, atol=1e-5)
    assert compared >= 5


@pytest.mark.parametrize("name, options", KINDS)
def test_a_picture_that_stays_is_expected_exactly(name, options):
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(10)
    x, picture, known = bare.noise(0), bare.noise(1), Outputs()
    for number, t in enumerate(scheduler.timesteps[:6]):
        at = level(scheduler, t)
        output = at.output(x, picture)
        step = Step(type(scheduler).step, scheduler, (), dict(model_output=output, timestep=t, sample=x))
        said = evaluated(scheduler, step)
        if number:
            assert torch.allclose(known.ahead(1, said), output, rtol=1e-3, atol=1e-4)
        known.add(said)
        x = scheduler.step(output, t, x).prev_sample


def test_an_output_moves_with_the_latents():
    at = Level(0.6, 0.8, 0.6, -0.8)
    x, other, v = bare.noise(0), bare.noise(1), bare.noise(2)
    moves = 0.6 * DATA_SIGMA**2 / (0.36 * DATA_SIGMA**2 + 0.64)
    there = Evaluated(v, x, at).at(other).output
    picture, elsewhere = 0.6 * x - 0.8 * v, 0.6 * other - 0.8 * there
    assert torch.allclose(elsewhere - picture, moves * (other - x), atol=1e-6)


def test_samplers_of_no_known_family_leave_outputs_alone():
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(5)
    x, u = bare.noise(0), bare.noise(1)
    step = Step(type(scheduler).step, scheduler, (u, scheduler.timesteps[0], x), {})
    said, known = evaluated(scheduler, step), Outputs()
    assert said.at(x + 1).output is u
    known.add(said)
    assert torch.equal(known.ahead(1, said.at(x + 1)), u)


def test_parts_of_a_batch_at_several_levels_have_none_in_common():
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(10)
    first, second = scheduler.timesteps[:2]
    assert level(scheduler, torch.stack([first, first])) == level(scheduler, first)
    assert level(scheduler, torch.stack([first, second])) is None


@pytest.mark.parametrize("kind, cumulative", [("epsilon", 0.0), ("v_prediction", 1.0)])
def test_where_there_is_no_picture_or_no_noise_outputs_are_taken_as_they_are(kind, cumulative):
    scheduler = diffusers.DDIMScheduler(prediction_type=kind)
    scheduler.alphas_cumprod = torch.full((1000,), cumulative)
    assert level(scheduler, 500) is None
