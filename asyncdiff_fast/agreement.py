"""What ranks check and agree on before anything is patched."""

import dataclasses
import logging

from . import combinations, modules
from .decoder.calls import Decoder
from .denoisers import is_patched
from .exchange import fingerprint
from .fused import choice

log = logging.getLogger(__name__)


def agree(world, config, found, vae, problem):
    """Check everything that can be checked beforehand, on all ranks together. Raises on all if one refuses."""
    try:
        if problem is None:
            _check(world, config, found)
            _check_decoder(world, vae)
    except (ValueError, TypeError) as error:
        problem = error
    # Alone, there is nobody to differ from: no pass over the weights.
    models = [*found, *([] if vae is None else [vae])]
    digests = [fingerprint.model_digest(m) for m in models] if problem is None and world.size > 1 else []
    reports = world.gather((problem and _text(problem), config and dataclasses.asdict(config), digests), "patch")
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
                f"every rank must hold the same model: rank {world.name} and rank {rank} have different denoisers, "
                "autoencoders or weights; load the same checkpoint, or seed before building the model"
            )


def warn_of_idle(world, config):
    """Say on the first rank which options change nothing."""
    for name, of in combinations.idle(config).items() if world.rank == 0 else ():
        log.warning("%s=%r changes nothing here: it is of %s", name, getattr(config, name), of)


def _text(problem):
    own = isinstance(problem, ValueError | TypeError) and str(problem)
    return own or f"{type(problem).__name__}: {problem}"


def _check(world, config, found):
    choice.check(config.kernels)
    if config.world_size != world.size:
        raise ValueError(
            f"world_size must be parallel_steps * cfg halves * num_patches * (num_stages + stride - 1): got "
            f"{config.parallel_steps} * {config.mesh.halves} * {config.num_patches} * ({config.num_stages} + "
            f"{config.stride} - 1) = {config.world_size}, world_size {world.size}; start {config.world_size} processes "
            f"(torchrun --nproc-per-node {config.world_size}) or {_fitting(world.size, config)}"
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


def _check_decoder(world, vae):
    """Raises: ValueError if an autoencoder's decoder cannot be shared."""
    if vae is None:
        return
    if is_patched(vae):
        raise ValueError(f"{type(vae).__name__} is patched already: call unpatch() first")
    if world.size > 1:
        Decoder.check(vae, world.size)


def _fitting(size, config):
    """What to change, so that the options need as many ranks as there are."""
    if config.world_size == 1:
        return f"pass parallel_steps={size}" + (", or cfg_parallel=True where there is guidance" if size == 2 else "")
    shared = {name: getattr(config, name) for name in ("parallel_steps", "num_patches", "num_stages")}
    given = [name for name, number in shared.items() if number > 1] + ["cfg_parallel"] * config.cfg_parallel
    if size == 1:
        return f"leave out {', '.join(given)}"
    for name in given:
        more, least = (config.stride - 1, config.stride) if name == "num_stages" else (0, 1)
        number = shared.get(name, 2)
        others = config.world_size // (number + more)
        fitting = size // others - more
        if size % others == 0 and fitting >= least and name != "cfg_parallel":
            return f"pass {name}={fitting}"
    return f"pass parallel_steps={size} in place of {', '.join(given)}"
