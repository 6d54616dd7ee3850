"""Convolutions and linear layers on CPU whose weights stay in oneDNN's own layout.

Otherwise weights are rearranged in every call. On small pictures with many channels, as in a UNet's inner levels and in
patches, that takes about as long as the work itself, and it does not become less with more ranks.
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from ..hooks import Forwards, Watch
from .weights import Stamp, flat

# Where packing pays: weights of this many elements at least; pixels or tokens of a batch, at most.
LEAST_WEIGHTS, MOST_PIXELS = 1 << 20, 512
KINDS = {nn.Conv2d: F.conv2d, nn.Linear: F.linear}


def packs(kernels, device_type):
    """Whether weights of a denoiser on that device are packed with that choice of kernels."""
    return kernels != "torch" and device_type == "cpu" and torch.backends.mkldnn.is_available()


class PackedWeights:
    """Packed copies of a denoiser's weights, and the forwards that use them. `remove` undoes it all."""

    def __init__(self, denoiser, active):
        self.active = active
        self._copies, self._generation, self._forwards = {}, 0, Forwards()
        for module in filter(_may_pay, denoiser.modules() if self.active else ()):
            self._forwards.replace(module, self._forward)

    @property
    def forwards(self):
        """{module: its forward that uses packed weights}."""
        return self._forwards.replaced

    def summary(self):
        """Dict, fit for JSON: how many weights have a packed copy, and how large all are; empty where none has."""
        packed = [copy.weight_bytes for copy in self._copies.values() if copy.packed is not None]
        return {"packed": {"weights": len(packed), "mb": sum(packed) / 1e6}} if packed else {}

    def begin(self):
        """A generation begins: weights may have changed since the last; what that did not use is dropped."""
        self._copies = {key: copy for key, copy in self._copies.items() if copy.generation == self._generation}
        self._generation += 1

    def remove(self):
        """Restore every forward. One that somebody's hook lies upon stays, and runs the module's own."""
        self.active = False
        self._copies.clear()
        self._forwards.restore()

    def _forward(self, module, input):
        # Whoever follows this function must see it; patches come back to `conv2d`.
        if _is_followed(KINDS[type(module)]):
            return type(module).forward(module, input)
        if type(module) is nn.Linear:
            return self.linear(input, module.weight, module.bias)
        options = (module.stride, module.padding, module.dilation, module.groups)
        return self.conv2d(input, module.weight, module.bias, *options)

    def conv2d(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        """As `torch.nn.functional.conv2d`, to rounding."""
        pixels = input.shape[0] * input.shape[-2] * input.shape[-1]
        usual = input.dim() == 4 and groups == 1 and not isinstance(padding, str)
        if usual and self._pays(input, weight, bias, pixels):
            stride, padding, dilation = (
                (x, x) if isinstance(x, int) else tuple(x) for x in (stride, padding, dilation)
            )

            def pack(weight):
                dense = weight.to_mkldnn()
                return torch._C._nn.mkldnn_reorder_conv2d_weight(dense, padding, stride, dilation, 1, input.shape)

            packed = self._packed(weight, (input.shape, padding, stride, dilation), pack)
            if packed is not None:
                return torch.ops.mkldnn._convolution_pointwise(
                    input, packed, bias, padding, stride, dilation, groups, "none", [], ""
                )
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)

    def linear(self, input, weight, bias=None):
        """As `torch.nn.functional.linear`, to rounding."""
        rows = input.numel() // max(1, input.shape[-1])
        if weight.is_contiguous() and self._pays(input, weight, bias, rows):
            pack = functools.partial(torch.ops.mkldnn._reorder_linear_weight, batch_size=rows)
            packed = self._packed(weight, rows, pack)
            if packed is not None:
                return torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")
        return F.linear(input, weight, bias)

    def _pays(self, input, weight, bias, pixels):
        if not self.active or weight.numel() < LEAST_WEIGHTS or not 0 < pixels <= MOST_PIXELS:
            return False
        tensors = [x for x in (input, weight, bias) if x is not None]
        usual = all(type(x) in (torch.Tensor, nn.Parameter) and x.dtype == torch.float32 for x in tensors)
        quiet = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        followed = torch._C._len_torch_dispatch_stack() > 0 or torch.compiler.is_compiling()
        return usual and quiet and not followed and all(x.device.type == "cpu" for x in tensors)

    def _packed(self, weight, options, pack):
        """The packed copy; None at the first use, and where shapes take turns."""
        known = self._copies.get(id(weight))
        if known is None or known.options != options or not known.is_of(weight, self._generation):
            self._copies[id(weight)] = _Copy(weight, options, self._generation)
            return None
        if known.packed is None:
            known.pack(weight.detach(), pack)
        return known.packed


def _may_pay(module):
    """True for a convolution or linear layer with many weights, whose forward is its own."""
    if type(module) not in KINDS or "forward" in vars(module) or module.weight.numel() < LEAST_WEIGHTS:
        return False
    return type(module) is nn.Linear or module.padding_mode == "zeros"


def _is_followed(function):
    """True if somebody but patches looks at torch's functions, or patches at this one."""
    modes = _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else ()
    return any(not isinstance(mode, Watch) or function in mode.watched for mode in modes)


class _Copy:
    """What was packed, such that a change of the weight is noticed, also one that torch does not count."""

    def __init__(self, weight, options, generation):
        self.options, self.generation, self.packed = options, generation, None
        self._stamp, self._sum, self.weight_bytes = Stamp(weight), None, 0

    def pack(self, weight, pack):
        """Make the copy, `pack(weight)`."""
        self._sum, self.weight_bytes = _sum_of_bits(weight), weight.nbytes
        self.packed = pack(weight)

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
