"""Projections of what stays the same through a generation, such as the text's keys and values: made once.

Every patch attends to the whole text, so each would make the same keys and values in every call; the more patches, the
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
from torch.utils._pytree import tree_leaves

from ..modules import Forwards
from ..versions import version
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
        self._inside, self._forwards = False, Forwards()
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
            if not self._forwards.replaced:
                return forward(*args, **kwargs)
            self._arguments = _by_place((args, kwargs), latent(args, kwargs))
            self._inside = True
            try:
                return forward(*args, **kwargs)
            finally:
                self._inside = False
                self._arguments, self._found = {}, {}

        return run

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
        self._found[_place(kept.tensor)] = kept
        return kept.tensor

    def _constant(self, x):
        """The constant in whose memory a tensor lies, or None."""
        if type(x) is not torch.Tensor or x.is_inference():
            return None
        place = _place(x)
        if place in self._arguments:
            self._found[place] = self._recognised(self._arguments.pop(place))
        constant = self._found.get(place)
        return constant if constant is not None and constant.version == version(x) else None

    def _recognised(self, argument):
        """The constant that an argument is, or None: then it may be one from the next call on."""
        for constant in self._known:
            if constant.is_now(argument):
                # The last used come last.
                self._known.remove(constant)
                self._known.append(constant)
                return constant
        self._known = [c for c in self._known if _place(c.tensor) != _place(argument)][1 - MOST_ARGUMENTS :]
        self._known.append(_Argument(argument))
        return None


class KeptBytes(TorchFunctionMode):
    """Counts in `nbytes` what `Projections` would keep in a forward with constant arguments, but for the latent."""

    def __init__(self, arguments, latent):
        super().__init__()
        self.nbytes, self._constants = 0, _by_place(arguments, latent)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        input = args[0] if args else kwargs.get("input")
        if func in FUNCTIONS.values() and type(input) is torch.Tensor and _place(input) in self._constants:
            self.nbytes += result.nbytes
            self._constants[_place(result)] = result
        return result


class _Constant:
    """A tensor that is held, and `results`: what was made of it, by module and view."""

    def __init__(self, tensor):
        self.tensor, self.version, self.results = tensor, version(tensor), {}

    @property
    def kept_bytes(self):
        return sum(result.tensor.nbytes + result.kept_bytes for result in self.results.values())


class _Argument(_Constant):
    def __init__(self, tensor):
        super().__init__(tensor)
        self._words = _all_words(tensor).clone() if tensor.device.type == "cpu" else None

    def is_now(self, x):
        """True if an argument lies in this memory, with what was in it."""
        if _place(x) != _place(self.tensor) or not version(x) == version(self.tensor) == self.version:
            return False
        return self._words is None or torch.equal(_all_words(x), self._words)


class _Result(_Constant):
    def __init__(self, tensor, module):
        super().__init__(tensor)
        self._stamps = [Stamp(weight) for weight in module.parameters()]

    def is_made_by(self, module):
        """True if nobody has written into it, and the module would make it again."""
        weights = list(module.parameters())
        same = version(self.tensor) == self.version and len(weights) == len(self._stamps)
        return same and all(stamp.is_of(weight) for stamp, weight in zip(self._stamps, weights, strict=True))


def _place(x):
    """What tells one piece of memory from all others that are held, on any device."""
    return x.untyped_storage()._cdata


def _by_place(tree, latent):
    """{place: tensor} of the ordinary tensors in a tree, where the latent does not lie."""
    apart = {_place(x) for x in tree_leaves(latent) if isinstance(x, torch.Tensor)}
    found = {_place(x): x for x in tree_leaves(tree) if type(x) is torch.Tensor and not x.is_inference()}
    return {place: x for place, x in found.items() if place not in apart}


def _all_words(x):
    storage = x.untyped_storage()
    return torch.empty(0, dtype=torch.uint8 if storage.nbytes() % 8 else torch.int64).set_(storage)
