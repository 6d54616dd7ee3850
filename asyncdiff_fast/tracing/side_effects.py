"""What a forward does besides returning tensors: what modules keep, containers they fill, numbers that steer Python.

A rank that replays a module does none of this, so such modules are no units; and a traced forward must leave no trace.
"""

import contextlib

import torch
from torch.utils._pytree import tree_leaves

from ..versions import version

# What every module has: not told apart by `belongings`, but for the buffers.
_COMMON = frozenset(vars(torch.nn.Module())) - {"_buffers"}


def kept_by(module):
    """What a module's own attributes and buffers hold, or a processor's, as a flat list."""
    return tree_leaves({name: x for name, x in vars(module).items() if name not in _COMMON})


def belongings(module, arguments):
    """What a module keeps or was given, each with what shows a change: containers may be filled, buffers written."""
    return [(x, version(x)) for x in kept_by(module)] + [(x, None) for x in tree_leaves(arguments)]


def differ(before, after):
    """True if something was replaced, added, removed or written between two lists of belongings."""
    return len(before) != len(after) or any(a is not b or v != w for (a, v), (b, w) in zip(before, after, strict=True))


@contextlib.contextmanager
def restored(denoiser):
    """Afterwards modules and their processors keep what they kept before; yields [(name, module, what it kept)]."""
    modules = list(denoiser.named_modules())
    attributes = [(m, dict(vars(m)), dict(m._buffers)) for _, m in modules]
    processors = [
        (f"{name}.processor".lstrip("."), vars(m)["processor"]) for name, m in modules if "processor" in vars(m)
    ]
    processors = [(name, p) for name, p in processors if hasattr(p, "__dict__")]
    settings = [(p, dict(vars(p))) for _, p in processors]
    copies = [(b, version(b), b.clone()) for b in denoiser.buffers() if not b.is_inference()]
    try:
        yield [(name, m, [(x, version(x)) for x in kept_by(m)]) for name, m in (*modules, *processors)]
    finally:
        for module, kept, buffers in attributes:
            vars(module).clear()
            vars(module).update(kept)
            module._buffers.clear()
            module._buffers.update(buffers)
        for processor, kept in settings:
            vars(processor).clear()
            vars(processor).update(kept)
        with torch.no_grad():
            for buffer, before, copy in copies:
                if version(buffer) != before:
                    buffer.copy_(copy)


def processors_that_keep(before):
    """Names of attention processors that were given something to keep since `restored` yielded what they had."""
    processors = [(name, p, kept) for name, p, kept in before if not isinstance(p, torch.nn.Module)]
    return [name for name, p, kept in processors if differ(kept, [(x, version(x)) for x in kept_by(p)])]


def watched(number, note):
    """A timestep that is a plain number, such that `note()` is called when it, or what follows from it, is compared."""
    kind, methods = type(number), {}

    def compared(name):
        return lambda self, *other: note() or getattr(kind, name)(self, *other)

    def computed(name):
        def method(self, *other):
            result = getattr(kind, name)(self, *other)
            return watched(result, note) if isinstance(result, int | float) else result

        return method

    for name in ("lt", "le", "gt", "ge", "eq", "ne", "bool"):
        methods[f"__{name}__"] = compared(f"__{name}__")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
        methods |= {f"__{side}{name}__": computed(f"__{side}{name}__") for side in ("", "r")}
    methods |= {f"__{name}__": computed(f"__{name}__") for name in ("neg", "abs", "round")}
    return type(kind.__name__, (kind,), {**methods, "__hash__": kind.__hash__})(number)
