"""Weights of an attention's queries, keys and values in one piece of memory, so that one product can make all three.

No weight is copied: each layer's becomes a view of its rows, and whoever loads, fuses or saves weights finds them where
they were. A layer whose weight was replaced or moved since, or that is wrapped, as adapters do, runs for itself.
"""

import itertools

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional as F

from .layers import plain

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Joined:
    """The joined weights of one denoiser's attention modules. `remove` gives each layer memory of its own again."""

    def __init__(self, denoiser, active):
        self._of = {}
        for module in denoiser.modules() if active else ():
            if type(module) is Attention and not module.is_cross_attention and _fits(_layers(module)):
                self._of[module] = _Weights(_layers(module))

    @property
    def layers(self):
        """Ids of the layers whose weights are joined."""
        return {id(layer) for module in self._of for layer in _layers(module)}

    def of(self, module):
        """The `_Weights` of an attention module; None if its layers must be called."""
        weights = self._of.get(module)
        return weights if weights is not None and weights.are_of(_layers(module)) else None

    def remove(self):
        """Take every layer's weights apart."""
        for module, weights in self._of.items():
            if weights.are_of(_layers(module)):
                for layer in _layers(module):
                    for parameter in layer.parameters():
                        parameter.data = parameter.data.clone()
        self._of = {}


class _Weights:
    """One weight and one bias, or None, of several linear layers with the same input."""

    def __init__(self, layers):
        self.sizes = [layer.out_features for layer in layers]
        self.weight = _joined([layer.weight for layer in layers])
        self.bias = _joined([layer.bias for layer in layers]) if layers[0].bias is not None else None
        self._ends = [0, *itertools.accumulate(self.sizes)]

    def are_of(self, layers):
        """True if these layers still are plain, and lie where they did."""
        if not all(plain(layer, nn.Linear) and _usual(layer.weight) for layer in layers):
            return False
        return self._lie([layer.weight for layer in layers], self.weight) and self._lie(
            [layer.bias for layer in layers], self.bias
        )

    def _lie(self, parts, whole):
        if whole is None:
            return all(part is None for part in parts)
        step = whole.stride(0) * whole.element_size()
        return all(
            part is not None
            and part.data_ptr() == whole.data_ptr() + begin * step
            and part.dtype == whole.dtype
            and part.shape == (end - begin, *whole.shape[1:])
            for part, (begin, end) in zip(parts, itertools.pairwise(self._ends), strict=True)
        )

    def __call__(self, x, kernel):
        """What the layers make of x (…, c), one by one for "torch", by one product for "joined"."""
        if kernel == "joined":
            return F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)
        biases = [None] * len(self.sizes) if self.bias is None else self.bias.split(self.sizes)
        return [F.linear(x, w, b) for w, b in zip(self.weight.split(self.sizes), biases, strict=True)]


def _layers(module):
    return module.to_q, module.to_k, module.to_v


def _fits(layers):
    if not all(plain(layer, nn.Linear) and _usual(layer.weight) for layer in layers):
        return False
    first = layers[0]
    if len({id(layer.weight) for layer in layers}) < len(layers):
        return False
    return (
        first.weight.dtype in _DTYPES
        and first.weight.device.type != "meta"
        and all(
            layer.in_features == first.in_features
            and layer.weight.dtype == first.weight.dtype
            and layer.weight.device == first.weight.device
            and (layer.bias is None) == (first.bias is None)
            for layer in layers
        )
    )


def _usual(weight):
    return type(weight) is nn.Parameter and weight.is_contiguous() and not weight.is_inference()


def _joined(parts):
    whole = torch.cat([part.data for part in parts])
    for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = rows
    return whole
