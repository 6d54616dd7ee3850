"""Convolutions on CPU whose weights stay in oneDNN's own layout.

Otherwise oneDNN rearranges them in every call. On small pictures with many channels, as in a UNet's inner levels and in
patches, that takes longer than the convolution, and it does not become less with more ranks.
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from .weights import Stamp, flat

# Where packing pays: weights of this many elements at least, pixels of a batch at most.
LEAST_WEIGHTS, MOST_PIXELS = 1 << 20, 512


def packs(kernels, device_type):
    """Whether convolutions of a denoiser on that device are packed with that choice of kernels."""
    return kernels != "torch" and device_type == "cpu" and torch.backends.mkldnn.is_available()


class PackedConvs:
    """Packed copies of a denoiser's weights, and with `install` the forwards that use them. `remove` undoes it all."""

    def __init__(self, denoiser, active):
        self.active = active
        self._copies, self._generation, self._installed = {}, 0, []
        for module in filter(_may_pay, denoiser.modules() if self.active else ()):
            module.forward = functools.partial(self._forward, module)
            self._installed.append((module, module.forward))

    def begin(self):
        """A generation begins: weights may have changed since the last; what that did not use is dropped."""
        self._copies = {key: copy for key, copy in self._copies.items() if copy.generation == self._generation}
        self._generation += 1

    def remove(self):
        """Restore every forward. One that somebody's hook lies upon stays, and runs the module's own."""
        self.active = False
        self._copies.clear()
        for module, forward in self._installed:
            if vars(module).get("forward") is forward:
                del module.forward
        self._installed.clear()

    def _forward(self, module, input):
        # Whoever follows torch's functions must see this one; patches come back to `conv2d`.
        if torch._C._len_torch_function_stack() > 0:
            return nn.Conv2d.forward(module, input)
        options = (module.stride, module.padding, module.dilation, module.groups)
        return self.conv2d(input, module.weight, module.bias, *options)

    def conv2d(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        """As `torch.nn.functional.conv2d`, to rounding."""
        if self._pays(input, weight, bias, padding, groups):
            stride, padding, dilation = (
                (x, x) if isinstance(x, int) else tuple(x) for x in (stride, padding, dilation)
            )
            packed = self._packed(weight, input.shape, padding, stride, dilation)
            if packed is not None:
                return torch.ops.mkldnn._convolution_pointwise(
                    input, packed, bias, padding, stride, dilation, groups, "none", [], ""
                )
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)

    def _pays(self, input, weight, bias, padding, groups):
        if not self.active or weight.numel() < LEAST_WEIGHTS or input.dim() != 4 or groups != 1:
            return False
        pixels = input.shape[0] * input.shape[2] * input.shape[3]
        if pixels > MOST_PIXELS or weight.shape[-1] == 1 or isinstance(padding, str):
            return False
        tensors = [x for x in (input, weight, bias) if x is not None]
        usual = all(type(x) in (torch.Tensor, nn.Parameter) and x.dtype == torch.float32 for x in tensors)
        quiet = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        followed = torch._C._len_torch_dispatch_stack() > 0 or torch.compiler.is_compiling()
        return usual and quiet and not followed and all(x.device.type == "cpu" for x in tensors)

    def _packed(self, weight, shape, padding, stride, dilation):
        """The packed copy; None at the first use, and where shapes take turns."""
        options = (shape, padding, stride, dilation)
        known = self._copies.get(id(weight))
        if known is None or known.options != options or not known.is_of(weight, self._generation):
            self._copies[id(weight)] = _Copy(weight, options, self._generation)
            return None
        if known.packed is None:
            known.pack(weight.detach(), padding, stride, dilation, shape)
        return known.packed


def _may_pay(module):
    """True for a convolution of more than one pixel with many weights, whose forward is its own."""
    usual = type(module) is nn.Conv2d and "forward" not in vars(module) and module.padding_mode == "zeros"
    return usual and max(module.kernel_size) > 1 and module.weight.numel() >= LEAST_WEIGHTS


class _Copy:
    """What was packed, such that a change of the weight is noticed, also one that torch does not count."""

    def __init__(self, weight, options, generation):
        self.options, self.generation, self.packed = options, generation, None
        self._stamp, self._sum = Stamp(weight), None

    def pack(self, weight, padding, stride, dilation, shape):
        """Make the copy for inputs of a shape."""
        self._sum = _sum_of_bits(weight)
        self.packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), padding, stride, dilation, 1, shape)

    def is_of(self, weight, generation):
        """True if the weight is the same, with the same values: all are compared once a generation, then some."""
        same = self._stamp.is_of(weight)
        if same and generation != self.generation:
            self.generation = generation
            same = self.packed is not None and _sum_of_bits(weight) == self._sum
        return same


def _sum_of_bits(weight):
    """The values read as integers, two at a time where they lie so, summed: 20 GB/s, a tenth of what packing takes."""
    values = flat(weight)
    first = values.storage_offset() % 2
    last = first + (values.numel() - first) // 2 * 2
    ends = torch.cat([values[:first], values[last:]])
    return int(values[first:last].view(torch.int64).sum()), ends.view(torch.int32).tolist()
