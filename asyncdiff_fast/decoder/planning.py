"""Plans a decoder's patches on the meta device: nothing is computed, and no rank need ever have memory for it all."""

import torch
from torch.utils._pytree import tree_map_only

from ..config import Config
from ..fused.packed import PackedWeights
from ..patches.alone import LonePlanner
from ..patches.hooks import Hooks
from ..shared import Shared
from ..tracing import side_effects
from ..versions import version

WAY_OUT = "pass vae=False, so that every rank decodes the whole picture"
# The call with which patches are compared with the whole: rows for each patch, columns, and frames.
_ROWS, _COLUMNS, _FRAMES = 3, 8, 5


class _Planner(LonePlanner):
    # `planned` tells it.
    way_out = way_out_of_mixing = ""


def config_of(num_patches, timeout_s=Config.timeout_s):
    """`Config` of a decoder's patches."""
    return Config(num_patches=num_patches, exchange="sync", kernels="torch", timeout_s=timeout_s)


def planned(place, config, args, kwargs):
    """(`PatchPlan`, patches without slots, on the meta device) of one call. Collective in nothing: all plan alike.

    Args:
        place: `Place`; args, kwargs: of its function.
    Raises: ValueError that names the autoencoder if its rows cannot be shared.
    """
    ghost = place.ghost()
    hooks = Hooks(ghost.module)
    shared = Shared(ghost.module, config, ghost.signature, PackedWeights(ghost.module, active=False))
    args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs))
    _refuse_kept(place, ghost, args, kwargs)
    try:
        plan, patches, *_ = _Planner(shared, hooks).planned(ghost.forward, args, kwargs)
    except ValueError as error:
        raise ValueError(f"the decoder of {type(place.vae).__name__} cannot be shared: {error}; {WAY_OUT}") from error
    finally:
        hooks.remove()
    positions = patches[0].positions
    names = sorted({*positions.constant_modules, *positions.joining_modules})
    if names:
        raise ValueError(f"{type(place.vae).__name__} has positions for every row, in {', '.join(names)}: {WAY_OUT}")
    return plan, patches


def _refuse_kept(place, ghost, args, kwargs):
    """Raises: ValueError if modules keep what a call leaves: the next one would find that of a part of the rows."""
    with side_effects.restored(ghost.module) as before, torch.no_grad():
        ghost.forward(*args, **kwargs)
        now = {name: [(x, version(x)) for x in side_effects.kept_by(module)] for name, module, _ in before}
    # What the autoencoder itself keeps it begins anew in each call.
    names = [name for name, _, kept in before if name and side_effects.differ(kept, now[name])]
    if names:
        raise ValueError(
            f"the decoder of {type(place.vae).__name__} cannot be shared: {names[0]} keeps what frames leave for the "
            f"next call; {WAY_OUT}"
        )


def small(signature, config, args, kwargs):
    """(args, kwargs) of the same call on a corner of its latent, and on its first frames."""
    like = signature.latent(args, kwargs).shape[2:]

    def corner(x):
        if x.shape[2:] != like:
            return x
        x = x[..., : max(_ROWS * config.num_patches, _COLUMNS), :_COLUMNS]
        return (x[:, :, :_FRAMES] if x.dim() == 5 else x).clone()

    return tree_map_only(torch.Tensor, corner, (args, kwargs))
