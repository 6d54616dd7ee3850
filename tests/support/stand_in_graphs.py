"""Stand-ins for the capture of calls as graphs."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asyncdiff_fast.fused.capture import Capture


class Replays:
    """Captures whole calls on the CPU: a replay runs their modules again."""

    device_type = "cpu"

    def capture(self, call):
        result = call()

        def replay():
            for held, made in zip(tree_leaves(result), tree_leaves(call()), strict=True):
                held.copy_(made)

        # Nothing has run yet.
        for held in tree_leaves(result):
            held.fill_(torch.nan)
        return replay, result


class Tape(Capture):
    """Captures what torch does, on the CPU: a replay does it again in the same memory, and nothing of Python's.

    Lists stay as they are, and numbers too: what has changed since is not seen, as in a graph.
    """

    device_type = "cpu"

    @contextlib.contextmanager
    def around(self):
        self._taken = []
        yield
        # Nothing has run yet.
        for x in self._taken:
            x.fill_(torch.nan)

    def begin(self):
        self._piece = _Taking(self._taken)
        self._piece.__enter__()

    def end(self):
        piece, self._piece = self._piece, None
        piece.__exit__(None, None, None)
        return piece.replay if piece.done else None


class _Taking(TorchDispatchMode):
    def __init__(self, taken):
        super().__init__()
        self.done, self._taken = [], taken

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        views = [x.untyped_storage().data_ptr() in given for x in made]
        if not all(views) or any(x.alias_info and x.alias_info.is_write for x in func._schema.arguments):
            self.done.append((func, args, kwargs, made, views))
        self._taken += [x for x, view in zip(made, views, strict=True) if not view and x.is_floating_point()]
        return result

    def replay(self):
        for func, args, kwargs, made, views in self.done:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for held, x, view in zip(made, again, views, strict=True):
                if not view:
                    held.copy_(x)
