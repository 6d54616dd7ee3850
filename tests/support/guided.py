"""Sampling loops with diffusers' guiders, as modular pipelines run them: one call for each kind of prediction."""

import diffusers
import torch
from diffusers.hooks import LayerSkipConfig

SKIP = LayerSkipConfig(indices=[2], fqn="blocks")


@torch.no_grad()
def sample(model, guider, steps=4):
    """The last latent of a Wan transformer's loop: (1, 16, 1, 8, 8)."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for step, t in enumerate(scheduler.timesteps):
        guider.set_state(step=step, num_inference_steps=steps, timestep=t)
        batches = guider.prepare_inputs({"text": (torch.ones(1, 7, 32), torch.zeros(1, 7, 32))})
        for batch in batches:
            guider.prepare_models(model)
            batch.noise_pred = model(x, t.expand(1), batch.text, return_dict=False)[0]
            guider.cleanup_models(model)
        x = scheduler.step(guider(batches)[0], t, x, return_dict=False)[0]
    return x


def interval():
    """Guidance that begins late and ends early: steps before and after have one call."""
    return diffusers.guiders.ClassifierFreeGuidance(guidance_scale=4.0, start=0.3, stop=0.8)


def auto_guidance():
    """The second call's model skips a layer."""
    return diffusers.guiders.AutoGuidance(guidance_scale=4.0, auto_guidance_config=SKIP)


def late_auto_guidance():
    """The same, from the third of six steps on."""
    return diffusers.guiders.AutoGuidance(guidance_scale=4.0, auto_guidance_config=SKIP, start=0.4)


def skip_layers():
    """A third call whose model skips a layer."""
    whole = dict(skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    return diffusers.guiders.SkipLayerGuidance(guidance_scale=4.0, skip_layer_config=SKIP, **whole)
