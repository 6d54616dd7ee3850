"""Convolutions' weights with channels together in memory, as tensor cores read them, while a denoiser is patched.

Torch's own norms move channels apart again, so that this gains with kernels only that do not.
"""

import torch
from torch import nn


class ChannelsLast:
    """The weights of a UNet's convolutions in channels_last. `remove` restores those that were not replaced since."""

    def __init__(self, denoiser, active):
        self._weights = []
        for module in denoiser.modules() if active and fits(denoiser) else ():
            weight = getattr(module, "weight", None)
            if type(module) is nn.Conv2d and type(weight) is nn.Parameter and _converts(weight):
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
                self._weights.append(weight)

    @property
    def count(self):
        """How many weights were converted."""
        return len(self._weights)

    def remove(self):
        """Restore the memory format of every weight."""
        for weight in self._weights:
            if weight.is_contiguous(memory_format=torch.channels_last):
                weight.data = weight.data.contiguous()
        self._weights = []


def fits(denoiser):
    """True for UNets of pictures: with frames, as their 3-d convolutions show, nobody has measured a gain."""
    kinds = {type(module) for module in denoiser.modules()}
    return nn.Conv2d in kinds and nn.GroupNorm in kinds and nn.Conv3d not in kinds


def _converts(weight):
    if weight.is_meta or weight.is_inference() or not weight.is_contiguous():
        return False
    return not weight.is_contiguous(memory_format=torch.channels_last)
