"""Projections of what stays the same through a generation, such as the text's keys and values: made once.

Every call makes the same keys and values of the text, and every patch attends to the whole text: the more patches, the
larger their share of a call. The authors of DistriFusion keep them too. Here no module is known by name: what stays the
same is told by its memory. An argument of the denoiser that lies where one of an earlier call lay, unwritten since, is
constant, and so is what linear layers make of it, and linear layers of that. The memory is held meanwhile, so that
nothing else can come to lie there. On the CPU all values of an argument are compared, and some of each weight, which
finds writes that torch does not count too.
"""

import functools

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..hooks import Forwards
from ..versions import version
from .constants import Argument, Constant, by_place, place
from .weights import Stamp

# Constants that are looked for among a call's arguments: those of all calls of a step, and some that prove not to be.
MOST_ARGUMENTS = 8
# What the forwards of these classes compute.
FUNCTIONS = {nn.Linear: nn.functional.linear, nn.GELU: nn.functional.gelu}


class Projections:
    """Keeps what linear layers of a denoiser make of constant arguments. `remove` undoes it all.

    Args:
        taken: ids of modules that are left alone.
        beneath: {module: its forward, if that is not the class's}; a module with any other is left alone too.
    """

    def __init__(self, denoiser, active, taken=(), beneath=None):
        self._known, self._arguments, self._found = [], {}, {}
        self._inside, self._pinned, self._forwards = False, None, Forwards()
        for module in denoiser.modules() if active else ():
            own = vars(module).get("forward")
            if type(module) in FUNCTIONS and id(module) not in taken and own is (beneath or {}).get(module):
                self._forwards.replace(module, self._forward, own)

    def begin(self):
        """A generation begins: everything is made anew."""
        self._known.clear()

    def during(self, forward, latent):
        """`forward` of the denoiser, such that what was kept is used in it; `latent(args, kwargs)` is no constant."""

        def run(*args, **kwargs):
            # A `Pinned` answers before anything is looked up.
            if not self.active or self._pinned is not None:
                return forward(*args, **kwargs)
            self._arguments = by_place((args, kwargs), latent(args, kwargs))
            self._inside = True
            try:
                return forward(*args, **kwargs)
            finally:
                self._inside = False
                self._arguments, self._found = {}, {}

        return run

    def with_pinned(self, pinned, forward):
        """`forward` of the denoiser, such that a `Pinned` answers for linear layers in it."""

        def run(*args, **kwargs):
            self._pinned = pinned
            try:
                return forward(*args, **kwargs)
            finally:
                self._pinned = None

        return run

    @property
    def active(self):
        """Whether there are layers whose results may be kept."""
        return bool(self._forwards.replaced)

    @property
    def nbytes(self):
        """Bytes of the results that are kept."""
        return sum(constant.kept_bytes for constant in self._known)

    def remove(self):
        """Forget everything and restore every forward. One that somebody's hook lies upon stays, without effect."""
        self._known.clear()
        self._forwards.restore()

    def _forward(self, module, own, input):
        own = own or functools.partial(type(module).forward, module)
        if self._pinned is not None and not torch.compiler.is_compiling():
            return self._pinned.forward(module, own, input)
        constant = self._constant(input) if self._inside and not torch.compiler.is_compiling() else None
        if constant is None or torch.is_autocast_enabled(input.device.type):
            return own(input)
        key = (id(module), input.storage_offset(), input.shape, input.stride(), input.dtype)
        kept = constant.results.get(key)
        if kept is None or not kept.is_made_by(module):
            result = own(input)
            if result.requires_grad or result.is_inference():
                return result
            kept = constant.results[key] = _Result(result, module)
        self._found[place(kept.tensor)] = kept
        return kept.tensor

    def _constant(self, x):
        """The constant in whose memory a tensor lies, or None."""
        if type(x) is not torch.Tensor or x.is_inference():
            return None
        where = place(x)
        if where in self._arguments:
            self._found[where] = self._recognised(self._arguments.pop(where))
        constant = self._found.get(where)
        return constant if constant is not None and constant.version == version(x) else None

    def _recognised(self, argument):
        """The constant that an argument is, or None: then it may be one from the next call on."""
        for constant in self._known:
            if constant.is_now(argument):
                # The last used come last.
                self._known.remove(constant)
                self._known.append(constant)
                return constant
        self._known = [c for c in self._known if place(c.tensor) != place(argument)][1 - MOST_ARGUMENTS :]
        self._known.append(Argument(argument))
        return None


class KeptBytes(TorchFunctionMode):
    """Counts in `nbytes` what `Projections` would keep in a forward with constant arguments, but for the latent."""

    def __init__(self, arguments, latent):
        super().__init__()
        self.nbytes, self._constants = 0, by_place(arguments, latent)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        input = args[0] if args else kwargs.get("input")
        if func in FUNCTIONS.values() and type(input) is torch.Tensor and place(input) in self._constants:
            self.nbytes += result.nbytes
            self._constants[place(result)] = result
        return result


class _Result(Constant):
    def __init__(self, tensor, module):
        super().__init__(tensor)
        self._stamps = [Stamp(weight) for weight in module.parameters()]

    def is_made_by(self, module):
        """True if nobody has written into it, and the module would make it again."""
        weights = list(module.parameters())
        same = version(self.tensor) == self.version and len(weights) == len(self._stamps)
        return same and all(stamp.is_of(weight) for stamp, weight in zip(self._stamps, weights, strict=True))
