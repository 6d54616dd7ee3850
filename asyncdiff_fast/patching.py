"""`patch` and `unpatch`: the whole way from a pipeline to hooks on its denoiser, and back."""

import dataclasses
import weakref

import torch

from . import modules
from .alike import share_seeds
from .config import Config
from .denoisers import allow_copies, denoisers, forbid_copies
from .exchange import fingerprint
from .exchange.engine import described
from .exchange.world import World, device, start_process_group, stop_process_group
from .first_call import first_call, plan_call
from .fused import choice
from .runtime import Runtime
from .steps.calls import StepCalls

_ATTRIBUTE = "_asyncdiff_fast"


def patch(target, *, mesh=None, scheduler=None, **options):
    """Let the ranks of this run share each call of a pipeline's denoiser. Collective: every rank runs the same script.

    On every rank, and with one rank alone, layers are replaced by fused kernels where that pays: see `Config.kernels`.

    Args:
        target: a diffusers pipeline, or its UNet or DiT (any `torch.nn.Module`) for a sampling loop of your own.
        mesh: a `DeviceMesh` with some of the dimensions "step", "cfg", "patch" and "stage" (or one dimension only);
            default: all ranks of torchrun.
        scheduler: the sampling loop's scheduler, if it is not one of diffusers'.
        options: see `Config`.
    Returns: the `Runtime` (a list of them if the pipeline has several denoisers): `.plan`, `.stats()`.
    Raises: ValueError or TypeError on every rank alike, before anything is changed.
    """
    config, found, problem, world, runtimes = None, [], None, None, []
    try:
        config, found = Config.from_options(options), denoisers(target)
    except (ValueError, TypeError) as error:
        # Refused below, where the other ranks learn of it.
        problem = error
    timeout_s = config.timeout_s if config else Config.timeout_s
    start_process_group(timeout_s)
    try:
        world = World(_ranks(mesh, config), timeout_s)
        _agree(world, config, found, problem)
        share_seeds(world)
        steps = _steps(config, world, target, scheduler)
        for number, denoiser in enumerate(found):
            runtimes.append(_patch_one(denoiser, config, world, scheduler, target, steps, number))
        world.gather(None, "the end of patch()")
    except BaseException as error:
        if world is not None:
            world.leave(described(error))
        for runtime in runtimes:
            _release(runtime.denoiser, "patch() has failed")
        raise
    finally:
        # Each runtime has counted itself as a user of the process group.
        stop_process_group()
    return runtimes[0] if len(runtimes) == 1 else runtimes


def unpatch(target):
    """Undo `patch`: forwards, hooks and buffers are as before, and a process group that `patch` started is destroyed.

    With `shard_weights` every rank gets all weights back, so then it is collective.

    Raises: ValueError if the target is not patched; ExchangeError if a rank that holds weights is gone.
    """
    found = [d for d in denoisers(target) if is_patched(d)]
    if not found:
        raise ValueError(
            f"{type(target).__name__} is not patched: call patch() first, or unpatch the object that was patched"
        )
    for denoiser in found:
        # Before anything is undone: where a rank is missing, the others stay patched.
        getattr(modules.own(denoiser), _ATTRIBUTE).gather_weights()
    for denoiser in found:
        _release(denoiser)


def plan(target, inputs=None, **options):
    """The plan for one call, before anything runs: `print` it to see which rank does what and what travels.

    Args:
        target: as for `patch`; needs no process group. A denoiser may lie on the meta device.
        inputs: dict of arguments: of the pipeline's call (default: a prompt), or of the denoiser's forward.
        options: see `Config`.
    Returns: `StepPlan` of steps side by side, `Plan` of stages, `PatchPlan`, both in a `MeshPlan`, or `PipelinePlan`.
    """
    config = Config.from_options(options)
    denoiser = denoisers(target)[0]
    if denoiser is target:
        args, kwargs = (), dict(inputs or {})
    else:
        args, kwargs = first_call(target, denoiser, {"prompt": "a photograph"} if inputs is None else inputs)
    return plan_call(denoiser, config, args, kwargs, getattr(target, "do_classifier_free_guidance", False) is True)


def is_patched(denoiser):
    """True if this denoiser is patched."""
    return _ATTRIBUTE in vars(modules.own(denoiser))


def _ranks(mesh, config):
    """torch.distributed ranks that share a call, in the order of `Config.mesh`."""
    dist = torch.distributed
    if mesh is None:
        return range(dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0,)
    wanted = config.mesh if config else None
    axes = {"step": "steps", "cfg": "halves", "patch": "patches", "stage": "stages"}
    sizes = {name: wanted and getattr(wanted, of) for name, of in axes.items()}
    names = mesh.mesh_dim_names or ()
    known = tuple(name for name in names if name in sizes)
    if known:
        numbers = mesh[known].mesh.permute([known.index(name) for name in sizes if name in known])
        found = dict(zip((name for name in sizes if name in known), numbers.shape, strict=True))
        needed = {name: sizes[name] for name in found}
        if config and len(known) > 1 and found != needed:
            raise ValueError(f"the mesh must have the sizes of the options, {needed}: got {found}; change one of them")
    elif mesh.ndim == 1:
        numbers = mesh.mesh
    else:
        raise ValueError(
            f'a mesh needs one dimension, or some named "step", "cfg", "patch" and "stage": got dimensions '
            f"{names or mesh.ndim}"
        )
    ranks = numbers.flatten().tolist()
    if dist.get_rank() not in ranks:
        raise ValueError(
            f"only the ranks of the mesh call patch(): got rank {dist.get_rank()}, the mesh has ranks {ranks}"
        )
    return ranks


def _agree(world, config, found, problem):
    """Check everything that can be checked beforehand, on all ranks together. Raises on all if one refuses."""
    try:
        if problem is None:
            _check(world, config, found)
    except (ValueError, TypeError) as error:
        problem = error
    # Alone, there is nobody to differ from: no pass over the weights.
    digests = [fingerprint.model_digest(d) for d in found] if problem is None and world.size > 1 else []
    reports = world.gather((problem and str(problem), config and dataclasses.asdict(config), digests), "patch")
    if problem is not None:
        raise problem
    mine = dataclasses.asdict(config)
    for rank, (refusal, theirs, digest) in zip(world.ranks, reports, strict=True):
        if theirs != mine and theirs is not None:
            here, there = ({n: options.get(n) for n in mine if theirs.get(n) != mine[n]} for options in (mine, theirs))
            raise ValueError(
                f"every rank must pass the same options: rank {world.name} has {here}, rank {rank} has {there}"
            )
        if refusal:
            raise ValueError(f"rank {rank} refused to patch: {refusal}")
        if digest != digests:
            raise ValueError(
                f"every rank must hold the same model: rank {world.name} and rank {rank} have different denoisers or "
                "weights; load the same checkpoint, or seed before building the model"
            )


def _check(world, config, found):
    choice.check(config.kernels)
    if config.world_size != world.size:
        raise ValueError(
            f"world_size must be parallel_steps * cfg halves * num_patches * (num_stages + stride - 1): got "
            f"{config.parallel_steps} * {config.mesh.halves} * {config.num_patches} * ({config.num_stages} + "
            f"{config.stride} - 1) = {config.world_size}, world_size {world.size}; start {config.world_size} processes "
            f"(torchrun --nproc-per-node {config.world_size}) or pass {_fitting(world.size, config)}"
        )
    for denoiser in found:
        kind = type(denoiser).__name__
        if is_patched(denoiser):
            raise ValueError(f"{kind} is patched already: call unpatch() first")
        if modules.is_compiled(denoiser) and config.inside:
            raise ValueError(
                f"{kind} is compiled as a whole, so its parts cannot be shared out: patch it uncompiled, or pass "
                "parallel_steps or cfg_parallel, which leave it whole"
            )
        if modules.step_cache(denoiser) and world.size > 1:
            raise ValueError(
                f"{kind} has a step cache of diffusers enabled: both reuse activations; call disable_cache(), or use "
                "the cache with one process"
            )
        known = dict(denoiser.named_modules())
        unknown = [name for names in config.stages or () for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"stages names modules that {kind} does not have: {', '.join(unknown)}; see named_modules()"
            )
        leaves = sum(1 for m in known.values() if not any(True for _ in m.children()))
        if leaves < config.num_stages:
            raise ValueError(
                f"num_stages must not exceed the number of units: got num_stages={config.num_stages}, {kind} has "
                f"{leaves} modules; use fewer stages"
            )


def _fitting(size, config):
    """Options that a number of ranks fits."""
    if config.parallel_steps > 1:
        return f"parallel_steps={max(size * config.parallel_steps // config.world_size, 1)}"
    others = size // config.mesh.halves
    if config.num_patches > 1:
        return f"num_patches={max(others // config.stage_ranks, 1)}"
    return f"num_stages={max(others - config.stride + 1, 1)}"


def _steps(config, world, target, scheduler):
    """The steps side by side that a pipeline's denoisers share, or None."""
    if config.parallel_steps == 1:
        return None
    ranks = [world.ranks[r] for r in config.mesh.along("step", world.rank)]
    pipe = weakref.ref(target)
    return StepCalls(config, world.along(ranks), lambda: getattr(pipe(), "_num_timesteps", None), scheduler)


def _patch_one(denoiser, config, world, scheduler, target, steps, number):
    start_process_group(config.timeout_s)
    pipeline = weakref.ref(target) if target is not denoiser else lambda: None
    try:
        runtime = Runtime(denoiser, config, world, scheduler, steps, number, pipeline)
    except BaseException:
        stop_process_group()
        raise
    runtime.on_refused = lambda: _release(denoiser)
    setattr(denoiser, _ATTRIBUTE, runtime)
    forbid_copies(modules.own(denoiser))
    return runtime


def _release(denoiser, why=None):
    try:
        allow_copies(modules.own(denoiser))
        vars(modules.own(denoiser)).pop(_ATTRIBUTE).close(why)
    finally:
        stop_process_group()


__all__ = ["device", "patch", "plan", "unpatch"]
