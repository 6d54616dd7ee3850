"""Which modules of a pipeline are its denoisers; and what a patched one cannot do, to be copied."""

import torch

from .calls.signature import takes_timestep
from .modules import own

# Where a patched module keeps what patched it.
ATTRIBUTE = "_asyncdiff_fast"


def denoisers(target):
    """The UNets and DiTs of a pipeline, or the module itself. Raises: TypeError if there are none.

    They are called so in most pipelines; in others, they are the modules whose forward takes a timestep.
    """
    if isinstance(target, torch.nn.Module):
        return [target]
    components = getattr(target, "components", None)
    if isinstance(components, dict):
        parts = {name: part for name, part in components.items() if isinstance(part, torch.nn.Module)}
        for is_denoiser in (_is_named, _takes_timestep):
            found = [part for name, part in parts.items() if is_denoiser(name, part)]
            if found:
                return found
    raise TypeError(
        f"patch needs a diffusers pipeline with a unet or transformer, or a torch.nn.Module: got "
        f"{type(target).__name__}; pass the denoiser itself"
    )


def _is_named(name, part):
    return name.startswith(("unet", "transformer"))


def _takes_timestep(name, part):
    return "control" not in name and "adapter" not in name and takes_timestep(own(part))


def is_patched(module):
    """True if a denoiser, or an autoencoder, is patched."""
    return ATTRIBUTE in vars(own(module))


def forbid_copies(module):
    """Have copy.deepcopy and pickle of a module raise: hooks, and buffers that ranks share, belong to one model."""

    def refuse(protocol):
        raise ValueError(
            f"{type(module).__name__} is patched, and cannot be copied or pickled: call asyncdiff_fast.unpatch() "
            "first, then patch() the model and its copy"
        )

    module.__reduce_ex__ = refuse


def allow_copies(module):
    """Undo `forbid_copies`."""
    vars(module).pop("__reduce_ex__", None)
