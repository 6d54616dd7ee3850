"""Generations one after another on patched ranks, beside the same ones in the plain simulation and unpatched."""

import diffusers
import numpy as np
import oracle
import pytest
import torch
from PIL import Image

import asyncdiff_fast


class Bare(torch.nn.Module):
    """A denoiser of no library, for sampling loops without a pipeline; its timestep may be anything like a number."""

    def __init__(self, num_blocks=6, width=8):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = torch.nn.Conv2d(4, width, 3, padding=1)
            self.time = torch.nn.Linear(1, width)
            self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(width, width, 3, padding=1) for _ in range(num_blocks))
            self.last = torch.nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x, t, text=None):
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)
        time = self.time(torch.sin(t / 100))[:, :, None, None]
        x = self.first(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x + time))
        x = x if text is None else x + 0.1 * text.mean()
        return self.last(x)


def quick(names, *some):
    """Parameters of a test: all of `names`, those not among `some` marked slow."""
    return [pytest.param(*name, marks=[pytest.mark.slow] * (name not in some)) for name in names]


def noise(seed=0, size=8):
    """A latent."""
    return torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed))


def owner_of(runtime):
    """{unit key: stage} of a runtime's latest plan."""
    return {u.key: s for u, s in zip(runtime.plan.graph.units, runtime.plan.division.owner, strict=True)}


def compare(rank, target, denoiser, generations, simulate=None, calls_per_step=1, **options):
    """Run `generations` patched; on rank 0 then simulated and unpatched.

    Args:
        generations: functions without arguments that return a picture, or None where there is none to compare.
        simulate: (denoiser, owner) -> context manager in which a generation follows the rule; default: stride 1.
        options: of `patch`.
    Returns: list of (patched, simulated, unpatched) tensors, and the runtime's statistics.
    """
    options = {"num_stages": 2, "warmup_steps": 2, "timeout_s": 40} | options
    runtime = asyncdiff_fast.patch(target, **options)
    patched, owners = [], []
    for generate in generations:
        patched.append(generate())
        owners.append(owner_of(runtime) if runtime.plan is not None else {})
    stats = runtime.stats()
    asyncdiff_fast.unpatch(target)
    results = []
    for generate, picture, owner in zip(generations, patched, owners, strict=True):
        if picture is None:
            continue
        simulated = plain = None
        if rank == 0:
            make = simulate or plain_rule(options, calls_per_step)
            with make(denoiser, owner):
                simulated = torch.as_tensor(generate())
            plain = torch.as_tensor(generate())
        results.append((torch.as_tensor(picture), simulated, plain))
    return results, stats


def plain_rule(options, calls_per_step):
    """How `compare` simulates stride 1."""

    def make(denoiser, owner):
        return oracle.Simulation(denoiser, owner, options["num_stages"], options["warmup_steps"], calls_per_step)

    return make


def assert_right(results, tolerance=1e-5, stale=True):
    """Every rank's pictures are equal and follow the rule; with `stale`, the rule differs from the exact result."""
    pictures = [[patched for patched, _, _ in rank] for rank, _ in results]
    for number, (patched, simulated, plain) in enumerate(results[0][0]):
        for rank, theirs in enumerate(pictures):
            assert torch.equal(theirs[number], patched), f"generation {number}: rank {rank} has another picture"
        error = float((patched - simulated).abs().max())
        assert error <= tolerance, f"generation {number} differs from the rule by {error:.1e}"
        if stale:
            assert float((simulated - plain).abs().max()) > 10 * tolerance, "the case cannot tell stale from exact"
    assert (results[0][1]["compute_calls"] > 0) == stale


def image_to_image(pipe):
    """A sibling of a pipeline that begins in the middle: a function of its strength, giving a function that draws."""
    # This class asks for it.
    pipe.unet.register_to_config(sample_size=16)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (32, 32, 3), dtype=np.uint8))

    def strength(value):
        @torch.no_grad()
        def run():
            generator = torch.Generator().manual_seed(3)
            arguments = dict(image=image, strength=value, num_inference_steps=8, output_type="np", generator=generator)
            return other(prompt="a cat", **arguments).images

        return run

    return strength
