"""A tiny model of each of many denoiser classes of diffusers, with inputs of a batch of two: {class: (config, inputs)}.

Configurations and inputs are those that the classes' pipelines use, small; weights are random.
"""

import coverage_clips
import coverage_nets
import coverage_pictures
import coverage_sequences
import coverage_windows
import diffusers
import torch
from tiny_parts import fill

MODELS = coverage_nets.MODELS | coverage_pictures.MODELS | coverage_sequences.MODELS | coverage_clips.MODELS
MODELS |= coverage_windows.MODELS
# Why there is none of a class.
LEFT_OUT = {
    "CosmosTransformer3DModel": "it needs torchvision",
    "UVit2DModel": "it takes numbers of a codebook, and no latent",
}


def build(name):
    """A model, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fill(getattr(diffusers, name)(**MODELS[name][0])).eval().requires_grad_(False)


def inputs(name):
    """Its keyword arguments, without those that are None."""
    return {k: v for k, v in MODELS[name][1]().items() if v is not None} | {"return_dict": False}
