"""Follows which tensors of a forward are made of the picture, and with what shapes functions are called on them."""

import contextlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Their results depend on the shape of a tensor only.
SHAPE_ONLY = {
    torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like,
    torch.Tensor.new_empty, torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_full,
}  # fmt: skip
# Their results depend on the values of the first argument only.
_FIRST_ONLY = {
    torch.Tensor.type_as, torch.Tensor.expand_as, torch.Tensor.view_as, torch.Tensor.reshape_as, torch.Tensor.to,
}  # fmt: skip
_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"}


class Followed:
    """Tensors that follow from some others, known by identity while they live."""

    def __init__(self, tensors):
        self._known = {}
        self.add(tensors)

    def add(self, tree):
        """Follow the tensors of a tree too."""
        for x in tree_leaves(tree):
            if isinstance(x, torch.Tensor):
                self._known[id(x)] = weakref.ref(x)

    def __contains__(self, x):
        found = self._known.get(id(x))
        return found is not None and found() is x

    def any(self, tensors):
        """True if one of them is followed."""
        return any(x in self for x in tensors)

    def given(self, func, leaves):
        """Those of a function's tensors that are followed and whose values it reads."""
        return [x for x in _read(func, leaves) if x in self]

    def pass_on(self, func, args, leaves, result):
        """Follow what a function makes of followed tensors, or writes them into. True if it was given such."""
        if not self.given(func, leaves):
            return False
        self.add((result, _written(func, args)))
        return True


def _read(func, leaves):
    """Those of a function's tensors whose values it reads."""
    return () if func in SHAPE_ONLY else leaves[:1] if func in _FIRST_ONLY else leaves


def _written(func, args):
    """Those of a function's arguments that it writes into."""
    name = getattr(func, "__name__", "")
    return args[:1] if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) else ()


class Sources:
    """Which of some inputs tensors follow from, as `Followed` of each of them; `inputs`: {its name: tensor}."""

    def __init__(self, inputs):
        self._known = {}
        for name, x in inputs.items():
            self._add((x,), {name})

    def of(self, tensors):
        """Names of the inputs that one of some tensors follows from."""
        found = (self._known.get(id(x)) for x in tensors)
        pairs = zip(tensors, found, strict=True)
        return frozenset().union(*(names for x, known in pairs if known and known[0]() is x for names in known[1:]))

    def pass_on(self, func, args, leaves, result):
        """As `Followed.pass_on`."""
        names = self.of(_read(func, leaves))
        if names:
            self._add((result, _written(func, args)), names)

    def _add(self, tree, names):
        for x in tree_leaves(tree):
            if isinstance(x, torch.Tensor):
                self._known[id(x)] = weakref.ref(x), self.of((x,)) | names


@dataclass(frozen=True)
class Called:
    """One function call on tensors made of the picture.

    `given`, `made`: shapes of those among its arguments, and of its results. `args`, `kwargs`: None for what is neither
    number nor text. `site`: (module, call, place) if it is a watched one. `dtype`: of its first result. `whole`: all of
    `given` are whole numbers.
    """

    func: Any
    module: str
    given: tuple[tuple[int, ...], ...]
    made: tuple[tuple[int, ...], ...]
    args: tuple
    kwargs: dict
    site: tuple | None = None
    dtype: torch.dtype | None = None
    whole: bool = False

    @classmethod
    def of(cls, picture, func, args, kwargs, leaves, result, module="", site=None):
        """The `Called` of a call whose `leaves` are its tensors; `picture` is `Followed`."""
        followed = picture.given(func, leaves)
        given = tuple(tuple(x.shape) for x in followed)
        whole = not any(x.is_floating_point() or x.is_complex() for x in followed)
        results = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        made, dtype = tuple(tuple(x.shape) for x in results), results[0].dtype if results else None
        named = {name: _plain(x) for name, x in kwargs.items()}
        return cls(func, module, given, made, tuple(map(_plain, args)), named, site, dtype, whole)


def _plain(x):
    """An argument that holds no tensor, else None."""
    several = isinstance(x, list | tuple)
    return x if all(isinstance(i, int | str | torch.dtype) for i in (x if several else (x,))) else None


class Following(TorchFunctionMode):
    """Notes in `calls` every function call on tensors made of a patch's latent, as `Recorder` does on the whole's."""

    def __init__(self, latent):
        super().__init__()
        self.calls, self._picture, self._paused = [], Followed(latent), False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self._paused:
            self.note(func, args, kwargs or {}, result)
        return result

    @contextlib.contextmanager
    def paused(self):
        """Within it a site runs in its own way; `note` tells what the denoiser called."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def instead(self, pairs):
        """Of each pair, the second tensor takes the first's place."""
        self._picture.add([new for old, new in pairs if old in self._picture])

    def note(self, func, args, kwargs, result):
        """One function call of the denoiser's."""
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        given = Called.of(self._picture, func, args, kwargs, leaves, result)
        if self._picture.pass_on(func, args, leaves, result) and given.made:
            self.calls.append(given)
