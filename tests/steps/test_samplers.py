"""Every sampler of diffusers that makes one evaluation a step runs side by side by the rule; the others stay exact."""

import functools
import inspect

import bare
import diffusers
import pytest
import ranks
import steps_oracle
import torch

import asyncdiff_fast

STEPS, TOLERANCE = 12, 0.2
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
# name in the table: class, its options
SIDE_BY_SIDE = {
    "DDIM": ("DDIMScheduler", {}),
    "DDIM, v-prediction": ("DDIMScheduler", dict(prediction_type="v_prediction", clip_sample=False)),
    "DDIMParallel": ("DDIMParallelScheduler", {}),
    "DDIMInverse": ("DDIMInverseScheduler", {}),
    "CogVideoXDDIM": ("CogVideoXDDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "DDPMParallel": ("DDPMParallelScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "LTX Euler ancestral": ("LTXEulerAncestralRFScheduler", {}),
    "EDM Euler": ("EDMEulerScheduler", {}),
    "EDM DPM++ multistep": ("EDMDPMSolverMultistepScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", dict(solver_order=3)),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++")),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True)),
    "DPM++ 2M, flow": ("DPMSolverMultistepScheduler", FLOW),
    "DPM multistep inverse": ("DPMSolverMultistepInverseScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "UniPC, flow": ("UniPCMultistepScheduler", FLOW),
    "DEIS": ("DEISMultistepScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "IPNDM": ("IPNDMScheduler", {}),
    "PNDM": ("PNDMScheduler", dict(skip_prk_steps=True)),
    "PNDM after its Runge-Kutta steps": ("PNDMScheduler", dict(skip_prk_steps=False)),
    "SA-Solver": ("SASolverScheduler", {}),
    "FlowMatchEuler": ("FlowMatchEulerDiscreteScheduler", {}),
    "FlowMatchEuler, stochastic": ("FlowMatchEulerDiscreteScheduler", dict(stochastic_sampling=True)),
    "FlowMatchLCM": ("FlowMatchLCMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
    "UnCLIP": ("UnCLIPScheduler", {}),
}
EXACT = {
    "Heun": ("HeunDiscreteScheduler", {}),
    "FlowMatchHeun": ("FlowMatchHeunDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ singlestep": ("DPMSolverSinglestepScheduler", {}),
}


@torch.no_grad()
def loop(model, scheduler, seed=0):
    """A plain sampling loop."""
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = bare.noise(seed) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = model(scaled, t)
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    return x, generator.get_state()


def _make(kind):
    name, options = (SIDE_BY_SIDE | EXACT)[kind]
    return getattr(diffusers, name)(**options)


def _all(rank, num_ranks):
    """{sampler: (results of two generations, blocks, reasons), (results by the rule, blocks by the rule)}"""
    model, found = bare.Bare(), {}
    for kind in SIDE_BY_SIDE | EXACT:
        plain = loop(model, _make(kind))
        runtime = asyncdiff_fast.patch(model, parallel_steps=num_ranks, tolerance=TOLERANCE, timeout_s=60)
        scheduler = _make(kind)
        drawn = [loop(model, scheduler), loop(model, scheduler)]
        stats = runtime.stats()["steps"]
        asyncdiff_fast.unpatch(model)
        scheduler = _make(kind)
        scheduler.set_timesteps(STEPS)
        length = len(scheduler.timesteps)
        with steps_oracle.Simulation(scheduler, num_ranks, 2, TOLERANCE, length) as rule:
            simulated = loop(model, scheduler) if kind in SIDE_BY_SIDE else plain
        found[kind] = drawn, stats, simulated, rule.lengths, plain
    return found


@functools.cache
def results(num_ranks):
    return ranks.run(num_ranks, _all, num_ranks, timeout=280)


@pytest.mark.parametrize("num_ranks", [3])
@pytest.mark.parametrize("kind", SIDE_BY_SIDE)
def test_side_by_side(kind, num_ranks):
    everyone = [found[kind] for found in results(num_ranks)]
    for drawn, stats, (simulated, state), lengths, plain in everyone:
        (first, drawn_state), (second, _) = drawn
        assert torch.equal(first, everyone[0][0][0][0]), "all ranks hold the same bits"
        assert torch.equal(first, second), "a later generation must not see an earlier one"
        assert torch.allclose(first, simulated, rtol=1e-4, atol=1e-5 * float(plain[0].abs().max()))
        assert torch.equal(drawn_state, state) and torch.equal(drawn_state, plain[1]), "as much was drawn"
        assert stats["blocks"] == 2 * sum(n > 1 for n in lengths) > 0 and not stats["exact_because"]


@pytest.mark.parametrize("num_ranks", [3])
@pytest.mark.parametrize("kind", EXACT)
def test_exact(kind, num_ranks):
    for drawn, stats, _, _, plain in (found[kind] for found in results(num_ranks)):
        assert torch.equal(drawn[0][0], plain[0]) and torch.equal(drawn[1][0], plain[0])
        assert not stats["blocks"]
        assert any("evaluation" in reason for reason in stats["exact_because"])
