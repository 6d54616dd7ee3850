"""What the first micro-step of a call has made for the others."""

import torch
from torch.utils._pytree import tree_flatten, tree_map_only


class First:
    """Results by name, each in a place of its own, where the graphs of later micro-steps read it in every call."""

    def __init__(self):
        self._kept = {}

    def __contains__(self, key):
        return key in self._kept

    def keep(self, key, result):
        """Keep a result, a tree of tensors and plain values."""
        leaves, spec = tree_flatten(result)
        held, known = tree_flatten(self._kept.get(key))
        # Ordinary tensors, whatever mode this call runs in: they are written in later ones too.
        with torch.inference_mode(False), torch.no_grad():
            if known == spec and all(map(_alike, held, leaves)):
                for place, x in zip(held, leaves, strict=True):
                    if isinstance(x, torch.Tensor):
                        place.copy_(x)
            else:
                self._kept[key] = tree_map_only(torch.Tensor, torch.clone, result)

    def copy(self, key):
        """The result in new tensors: what reads it may change it."""
        return tree_map_only(torch.Tensor, torch.clone, self._kept[key])


def _alike(held, x):
    if isinstance(held, torch.Tensor) and isinstance(x, torch.Tensor):
        return (held.shape, held.dtype, held.device) == (x.shape, x.dtype, x.device)
    return type(held) is type(x) and held == x
