"""`patch` and `unpatch`: the whole way from a pipeline to hooks on its denoiser, and back."""

import weakref

import torch

from . import modules
from .agreement import agree, warn_of_idle
from .alike import share_seeds
from .config import Config
from .decoder.calls import Decoder
from .decoder.place import autoencoder, autoencoders
from .denoisers import ATTRIBUTE, allow_copies, denoisers, forbid_copies, is_patched
from .exchange.engine import described
from .exchange.world import World, device, start_process_group, stop_process_group
from .first_call import first_call, plan_call, plan_decode
from .runtime import Runtime
from .steps.calls import StepCalls


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
    return patch_unless(None, target, mesh, scheduler, options)


def patch_unless(problem, target, mesh, scheduler, options):
    """`patch`; on a rank with a `problem` it raises that, where the other ranks learn of it. Collective."""
    config, found, vae, world, made = None, [], None, None, []
    try:
        config = Config.from_options(options)
        found = denoisers(target) if problem is None else []
        vae = autoencoder(target) if config.vae and problem is None else None
    except (ValueError, TypeError) as error:
        # Refused below, where the other ranks learn of it.
        problem = problem or error
    timeout_s = config.timeout_s if config else Config.timeout_s
    start_process_group(timeout_s)
    try:
        world = World(_ranks(mesh, config), timeout_s)
        agree(world, config, found, vae, problem)
        share_seeds(world)
        warn_of_idle(world, config)
        steps = _steps(config, world, target, scheduler)
        for number, denoiser in enumerate(found):
            made.append((denoiser, _patch_one(denoiser, config, world, scheduler, target, steps, number)))
        runtimes = [runtime for _, runtime in made]
        if vae is not None and world.size > 1:
            made.append((vae, _patch_decoder(vae, config, world)))
            for runtime in runtimes:
                runtime.decoder = made[-1][1]
        world.gather(None, "the end of patch()")
    except BaseException as error:
        if world is not None:
            world.leave(described(error))
        for module, _ in made:
            _release(module, "patch() has failed")
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
    others = [m for m in autoencoders(target) if is_patched(m)]
    if not found and not others:
        raise ValueError(
            f"{type(target).__name__} is not patched: call patch() first, or unpatch the object that was patched"
        )
    for denoiser in found:
        # Before anything is undone: where a rank is missing, the others stay patched.
        getattr(modules.own(denoiser), ATTRIBUTE).gather_weights()
    for module in (*found, *others):
        _release(module)


def plan(target, inputs=None, **options):
    """The plan for one call, before anything runs: `print` it to see which rank does what and what travels.

    Args:
        target: as for `patch`; needs no process group. A denoiser may lie on the meta device.
        inputs: dict of arguments: of the pipeline's call (default: a prompt), or of the denoiser's forward.
        options: see `Config`.
    Returns: `StepPlan` of steps side by side, `Plan` of stages, `PatchPlan`, both in a `MeshPlan`, or `PipelinePlan`;
        with `vae=True` in a `DecoderPlan`.
    Raises: ValueError or TypeError for what `patch` would refuse, as far as one process can tell.
    """
    config = Config.from_options(options)
    denoiser = denoisers(target)[0]
    vae = autoencoder(target) if config.vae else None
    if denoiser is target:
        args, kwargs = (), dict(inputs or {})
    else:
        inputs = {"prompt": "a photograph"} if inputs is None else inputs
        args, kwargs = first_call(target, denoiser, inputs)
    guided = getattr(target, "do_classifier_free_guidance", False) is True
    each = plan_call(denoiser, config, args, kwargs, guided)
    return each if vae is None or config.world_size == 1 else plan_decode(target, vae, each, config, inputs)


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
    runtime.route.on_refused = lambda: _release(denoiser)
    setattr(denoiser, ATTRIBUTE, runtime)
    forbid_copies(modules.own(denoiser))
    return runtime


def _patch_decoder(vae, config, world):
    start_process_group(config.timeout_s)
    try:
        decoder = Decoder(vae, config, world)
    except BaseException:
        stop_process_group()
        raise
    decoder.on_refused = lambda: _release(vae)
    setattr(vae, ATTRIBUTE, decoder)
    forbid_copies(vae)
    return decoder


def _release(module, why=None):
    """Undo what was done to a denoiser, or to an autoencoder."""
    try:
        allow_copies(modules.own(module))
        vars(modules.own(module)).pop(ATTRIBUTE).close(why)
    finally:
        stop_process_group()


__all__ = ["denoisers", "device", "is_patched", "patch", "plan", "unpatch"]
