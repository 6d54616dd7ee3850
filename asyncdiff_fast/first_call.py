"""The first call of a pipeline's denoiser, and the plan of it that one process makes before anything is patched."""

import inspect
from dataclasses import replace

import torch

from .calls.containers import opened, opening
from .calls.signature import CallSignature
from .decoder.place import Place
from .decoder.plan import DecoderPlan
from .decoder.planning import config_of, planned
from .fused.packed import PackedWeights
from .halves.cuts import guess, size_of
from .hooks import Attachment
from .patches.alone import LonePlanner
from .patches.hooks import Hooks
from .patches.lists import stacked
from .patches.plan import MeshPlan
from .pipelined.planning import MicroPlanner
from .shared import Shared
from .stages.plan import make_plan
from .steps.plan import StepPlan


class _FirstCall(Exception):
    """Carries the first call's arguments out of a pipeline."""


def first_call(pipe, denoiser, inputs):
    """The arguments with which a pipeline calls its denoiser first."""

    def stop(forward, args, kwargs):
        raise _FirstCall(args, kwargs)

    attachment = Attachment(denoiser, stop)
    try:
        with torch.no_grad():
            pipe(**inputs)
    except _FirstCall as first:
        return first.args
    finally:
        attachment.remove()
    raise ValueError(f"{type(pipe).__name__} did not call its denoiser; pass inputs= that make it run")


def plan_decode(pipe, vae, each, config, inputs):
    """The plan of a pipeline's calls with that of its decode, from a run of one step; `each`: of the denoiser's."""
    place = Place.of(vae)

    def stop(forward, args, kwargs):
        raise _FirstCall(args, kwargs)

    few = {"num_inference_steps": 1} if "num_inference_steps" in inspect.signature(pipe.__call__).parameters else {}
    undo = place.attach(stop)
    try:
        with torch.no_grad():
            pipe(**few | inputs)
    except _FirstCall as first:
        args, kwargs = first.args
    else:
        raise ValueError(f"{type(pipe).__name__} did not decode; pass inputs= that make it, without output_type")
    finally:
        undo()
    plan, _ = planned(place, config_of(config.world_size), args, kwargs)
    return DecoderPlan(each, type(vae).__name__, plan)


def plan_call(denoiser, config, args, kwargs, guided=False):
    """The plan of one call, of half its batch if the CFG halves are shared out.

    Args:
        guided: True if a batch of even size has two halves, which the sampler gets as one.
    """
    signature, forward = CallSignature(denoiser), opening(denoiser.forward)
    args, kwargs = opened((args, kwargs))
    if config.parallel_steps > 1:
        latent = signature.latent(args, kwargs)
        halves = 2 if (guided or config.cfg_parallel) and latent.shape[0] % 2 == 0 else 1
        each = None
        if config.inside:
            # What is beneath has no warm-up of its own to end.
            each = plan_call(
                denoiser, replace(config, parallel_steps=1, warmup_steps=config.least_warmup), args, kwargs
            )
        return StepPlan(config, latent.nbytes // halves, each)
    if config.cfg_parallel:
        size, named = size_of(signature.latent(args, kwargs)), signature.named(args, kwargs)
        if size % 2 == 0:
            likely = guess(named, size, signature.latent(args, kwargs))
            args, kwargs = signature.as_call(likely.half(0, named), args, kwargs)
    if config.pipelined:
        return _pipeline_plan(denoiser, forward, config, signature, args, kwargs)
    if config.num_patches == 1:
        return make_plan(denoiser, forward, args, kwargs, config)
    hooks = Hooks(denoiser)
    shared = Shared(denoiser, config, signature, PackedWeights(denoiser, active=False))
    planner = LonePlanner(shared, hooks)
    forward, _, args, kwargs = stacked(signature, forward, None, args, kwargs)
    try:
        patches = planner.plan_alone(forward, args, kwargs)
        if config.num_stages == 1:
            return patches
        # The stages of every patch are those of the first.
        return MeshPlan(patches, planner.on_first_patch(forward, args, kwargs, make_plan))
    finally:
        hooks.remove()


def _pipeline_plan(denoiser, forward, config, signature, args, kwargs):
    hooks = Hooks(denoiser)
    shared = Shared(denoiser, config, signature, PackedWeights(denoiser, active=False))
    try:
        return MicroPlanner(shared, None, hooks).plan(forward, args, kwargs)[0]
    finally:
        hooks.remove()
