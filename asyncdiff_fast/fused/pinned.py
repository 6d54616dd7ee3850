"""What linear layers make of arguments that stay in place, for calls that are replayed: made anew only as those change.

A replayed call reads its arguments from tensors that stay. What depends on them alone, such as the text's keys and
values, need not be in the replay: the first call of a kind, which is launched, shows which linear layers see nothing
else; their results get tensors that stay too, and a graph of their own fills these, before the first replay of a
generation and wherever an argument or a weight was written.
"""

import contextlib
import functools

import torch

from ..versions import version
from .constants import Argument, by_place, place
from .weights import Stamp


class Pinned:
    """The results of linear layers for one kind of call.

    Args:
        tree: the arguments that stay, in any structure; latent: the one among them that is another in every call.
    """

    def __init__(self, tree, latent):
        self._roots = by_place(tree, latent)
        # {place: root, version at which its memory holds what was made, or was given}.
        self._known, self._pins = {}, {}
        self._recording, self._given = False, {}

    @property
    def nbytes(self):
        """Bytes of the results."""
        return sum(pin.result.nbytes for pin in self._pins.values())

    def look(self):
        """A call begins: all that stays holds what it is to hold in it."""
        self._known = {where: (where, version(x)) for where, x in self._roots.items()}
        for pin in self._pins.values():
            self._known[place(pin.result)] = pin.root, version(pin.result)

    @contextlib.contextmanager
    def recording(self):
        """While a call runs in it, `forward` finds out what there is to keep; nothing, if somebody writes into that."""
        self._recording = True
        try:
            yield self
        finally:
            self._recording = False
            if not all(map(self._is_whole, self._pins.values())):
                self._pins.clear()

    def forward(self, module, own, input):
        """What a linear layer returns, whose own forward is `own`."""
        if type(input) is not torch.Tensor or torch.is_autocast_enabled(input.device.type):
            return own(input)
        root, made = self._known.get(place(input), (None, None))
        if root is None or version(input) != made:
            return own(input)
        key = (id(module), place(input), input.storage_offset(), input.shape, input.stride(), input.dtype)
        pin = self._pins.get(key)
        if pin is None:
            if not self._recording:
                return own(input)
            # Ordinary tensors, whatever mode this call runs in: they are written in later ones too.
            with torch.inference_mode(False), torch.no_grad():
                pin = self._pins[key] = _Pin(module, functools.partial(own, input), own(input), root)
            self._known[place(pin.result)] = root, version(pin.result)
        return pin.result if self._is_whole(pin) else own(input)

    def _is_whole(self, pin):
        """True if nobody has written into a result in this call."""
        return version(pin.result) == self._known[place(pin.result)][1]

    def make(self):
        """Fill the results from the arguments that stay. Returns them."""
        with torch.inference_mode(False), torch.no_grad():
            return [pin.result.copy_(pin.run()) for pin in self._pins.values()]

    def is_of(self, held, given):
        """True if the results are of these arguments, and of the weights as they are.

        Args:
            held, given: lists of the tensors that stay, and of those whose values are copied into them.
        """
        roots = {pin.root for pin in self._pins.values()}
        pairs = {place(h): g for h, g in zip(held, given, strict=True) if place(h) in roots}
        # Writes into tensors of inference mode are not counted.
        told = all(version(x) is not None for x in pairs.values())
        known = (
            told
            and pairs.keys() == self._given.keys()
            and all(
                argument.is_now(pairs[root]) and offset == pairs[root].storage_offset()
                for root, (argument, offset) in self._given.items()
            )
        )
        if known and all(pin.is_current() for pin in self._pins.values()):
            return True
        self._given = {root: (Argument(x), x.storage_offset()) for root, x in pairs.items()}
        for pin in self._pins.values():
            pin.stamp()
        return False

    def forget(self):
        """Hold no longer what was given: the results are to be made anew."""
        self._given = {}


class _Pin:
    """One result: of which module, `run` that makes it, and the place of the argument that it comes from."""

    def __init__(self, module, run, result, root):
        self._module, self.run, self.result, self.root = module, run, result, root
        self.stamp()

    def stamp(self):
        owners = list(self._module.modules())
        self._sizes = [(held, len(held)) for owner in owners for held in (owner._modules, owner._parameters)]
        self._stamps = [
            (owner._parameters, name, None if weight is None else Stamp(weight))
            for owner in owners
            for name, weight in owner._parameters.items()
        ]

    def is_current(self):
        """True if the weights are as they were. Asked in every call, so nothing is searched for."""
        for held, size in self._sizes:
            if len(held) != size:
                return False
        for held, name, stamp in self._stamps:
            weight = held.get(name)
            if weight is not None if stamp is None else not stamp.is_of(weight):
                return False
        return True
