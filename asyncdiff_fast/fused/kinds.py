"""Kinds of calls: two are of one kind if only the numbers in their tensors differ, and the timestep."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map, tree_unflatten

from ..hooks import ForwardHook

NUMBERS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass
class Kind:
    """One kind of call: `inputs` are the tensors that stay, `replay` is None until it was captured.

    `launches`: how many calls of it were launched; `make` fills what is `pinned`, if there is anything.
    """

    inputs: list
    pinned: Any = None
    launches: int = 0
    make: Any = None
    replay: Any = None
    result: Any = None
    refused: bool = False

    def arguments(self, leaves, tree):
        """(args, kwargs) with the tensors that stay in the places of those given."""
        tensors = iter(self.inputs)
        return tree_unflatten([next(tensors) if isinstance(x, torch.Tensor) else x for x in leaves], tree)

    def refuse(self):
        """It is launched from now on; what was held is freed."""
        vars(self).update(vars(Kind([], refused=True)))


def key_of(tree, leaves, device_type):
    """What calls of one kind have in common: hashable."""
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return str(tree), tuple(map(_described, leaves)), autocast


def _described(x):
    if isinstance(x, torch.Tensor):
        return x.shape, _strides(x), x.dtype, x.device
    return type(x), x


def place_for(x):
    """A tensor like x, each of whose elements has a place of its own: a timestep may be one for the whole batch."""
    return torch.empty_strided(x.shape, _strides(x), dtype=x.dtype, device=x.device)


def _strides(x):
    return torch.empty_like(x, device="meta").stride() if 0 in x.stride() else x.stride()


@contextlib.contextmanager
def uncached_casts():
    """Inside, autocast casts weights wherever they are read: what it has cast before is freed when its context ends."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def copied(result):
    """A result in new tensors."""
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, result)


def foreign_hook(denoiser):
    """Why a replay would leave out what somebody's hooks do; None if there are none."""
    for name, module in denoiser.named_modules():
        registered = getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
        others = not all(isinstance(hook, ForwardHook) for hook in registered)
        if others or module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return f"a hook is on {name or 'the denoiser'}"
    return None
