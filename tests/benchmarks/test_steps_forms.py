"""Forms of expected outputs: one process draws what ranks would, and all forms tell the same of a step."""

import importlib
import pathlib

import numpy as np
import pytest
import steps_oracle
import torch

from asyncdiff_fast.steps.levels import Level

ROOT = pathlib.Path(__file__).parents[2]
STEPS, RANKS, TOLERANCE = 12, 4, 0.046


@pytest.fixture
def forms(monkeypatch):
    """The benchmark, which finds its neighbours on `sys.path`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "shapes"))
    return importlib.import_module("steps_forms")


def test_pictures_are_those_of_the_rule(forms):
    pictures = forms.Pictures(ROOT / "examples" / "shapes" / "unet", 2)
    drawn, calls = pictures.draw(STEPS, "picture", RANKS, TOLERANCE)
    captions, seeds = forms.captions_and_seeds(forms.SimpleNamespace(prompts=2, seeds=1))
    for i, (caption, seed) in enumerate(zip(captions, seeds, strict=True)):
        pipe = pictures.pipe
        with steps_oracle.Simulation(pipe.scheduler, RANKS, 2, TOLERANCE, STEPS) as rule:
            generator = torch.Generator().manual_seed(seed)
            image = pipe(
                str(caption), num_inference_steps=STEPS, guidance_scale=5.0, generator=generator, output_type="np"
            ).images[0]
        assert len(rule.lengths) == calls[i] < STEPS
        assert np.allclose(drawn[i].transpose(1, 2, 0), image, atol=1e-3)


@pytest.mark.parametrize("at", [Level(0.6, 0.8, 0.6, -0.8), Level(1.0, 2.0, 1.0, -2.0), Level(0.3, 0.7, 1.0, -0.7)])
def test_forms_are_of_picture_and_noise(forms, at):
    picture, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = at.alpha * picture + at.sigma * noise
    output = at.output(latents, picture)
    found = {form: forms.compared(form, at) for form in forms.FORMS}
    assert found["output"] is None
    assert torch.allclose(found["noise"].picture(latents, output), noise, atol=1e-5)
    assert torch.allclose(found["picture"].picture(latents, output), picture, atol=1e-5)
    assert torch.allclose(found["noise"].output(latents, noise), output, atol=1e-5)
