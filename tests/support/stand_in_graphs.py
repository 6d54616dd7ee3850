"""Stand-ins for the capture of calls as graphs."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asyncdiff_fast.fused.capture import Capture


class Replays(Capture):
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
        self._memory = _Memory()
        yield
        self._memory.undo()

    def begin(self):
        self._piece = _Taking(self._memory)
        self._piece.__enter__()

    def end(self):
        piece, self._piece = self._piece, None
        piece.__exit__(None, None, None)
        return piece.replay if piece.done else None


class NeverAlone(Tape):
    """What is sent may be under way whenever these calls are captured."""

    def tidy(self):
        raise AssertionError("waits for what another rank sends after its own capture")


class _Memory:
    """What a capture makes, and what it writes over: while it lasts nothing runs, which shows afterwards."""

    def __init__(self):
        self._made, self._written, self._known = [], [], set()

    def make(self, x):
        self._known.add(x.untyped_storage().data_ptr())
        self._made.append(x)

    def write(self, x):
        """`x` is about to be written."""
        if x.untyped_storage().data_ptr() not in self._known:
            self._known.add(x.untyped_storage().data_ptr())
            self._written.append((x.untyped_storage(), x.untyped_storage().clone()))

    def undo(self):
        for storage, before in self._written:
            storage.copy_(before)
        for x in self._made:
            if x.is_floating_point():
                x.fill_(torch.nan)


class _Taking(TorchDispatchMode):
    def __init__(self, memory):
        super().__init__()
        self.done, self._memory = [], memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        writes = [named.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        for x in tree_leaves(writes):
            self._memory.write(x)
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        storages = {x.untyped_storage().data_ptr() for x in given}
        views = [x.untyped_storage().data_ptr() in storages for x in made]
        for x, view in zip(made, views, strict=True):
            if not view:
                self._memory.make(x)
        if writes or not all(views):
            self.done.append((func, args, kwargs, made, views))
        return result

    def replay(self):
        for func, args, kwargs, made, views in self.done:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for held, x, view in zip(made, again, views, strict=True):
                if not view:
                    held.copy_(x)
