"""Containers that torch's trees do not open: dataclasses that hold tensors, and iterators, which can be read only once.

All that looks for tensors in a call, cuts or compares them, finds them by those trees.
"""

import dataclasses
import itertools
import types
from collections.abc import Iterator

import torch
from torch.utils._pytree import (
    SUPPORTED_NODES,
    GetAttrKey,
    MappingKey,
    SequenceKey,
    register_pytree_node,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
)

MOST_ITEMS = 10_000


class _Items(list):
    """What an iterator gives: a node of trees, of which each forward gets an iterator of its own."""


register_pytree_node(
    _Items,
    lambda items: (list(items), None),
    lambda items, _: _Items(items),
    serialized_type_name=f"{__name__}.Items",
    flatten_with_keys_fn=lambda items: ([(SequenceKey(i), x) for i, x in enumerate(items)], None),
)


def opened(tree):
    """`tree`, with the items of each iterator in its place; dataclasses that hold tensors are nodes from now on.

    Raises: ValueError if an iterator has no end.
    """
    if any(isinstance(x, Iterator) for x in tree_leaves(tree)):
        tree = tree_map(_items, tree)
    for x in tree_leaves(tree):
        _open(x)
    return tree


def opening(forward):
    """`forward` of what `opened` gives; its result is opened too."""

    def run(*args, **kwargs):
        if any(map(_holds_items, (*args, *kwargs.values()))):
            args, kwargs = tree_map(
                lambda x: iter(x) if isinstance(x, _Items) else x,
                (args, kwargs),
                is_leaf=lambda x: isinstance(x, _Items),
            )
        result = forward(*args, **kwargs)
        for x in tree_leaves(result):
            _open(x)
        return result

    return run


class Given:
    """What a forward was given by name, so that it shows what it has put there: into containers, or into objects."""

    def __init__(self, named):
        self._leaves = {name: tree_leaves(x) for name, x in named.items()}
        self._objects = {
            name: [(x, dict(vars(x))) for x in leaves if _is_object(x)] for name, leaves in self._leaves.items()
        }

    def written(self, named):
        """Names of those in which there are new items now, or objects that hold new tensors."""
        found = []
        for name, before in self._leaves.items():
            known = {id(x) for x in before}
            new = any(id(x) not in known for x in tree_leaves(named[name]))
            held = [v for x, kept in self._objects[name] for k, v in vars(x).items() if v is not kept.get(k)]
            if new or any(isinstance(x, torch.Tensor) for x in tree_leaves(held)):
                found.append(name)
        return found

    def restore(self):
        """Objects hold again what they held."""
        for x, kept in (pair for objects in self._objects.values() for pair in objects):
            vars(x).clear()
            vars(x).update(kept)


def flattened(named):
    """([(path, leaf)], spec) of a dict, as torch has it; the items of a class without keys are numbered."""
    leaves, spec = tree_flatten(named)
    paths = []
    for name, x in named.items():
        try:
            below = [path for path, _ in tree_flatten_with_path(x)[0]]
        except ValueError:
            below = [(SequenceKey(i),) for i in range(len(tree_leaves(x)))]
        paths += [(MappingKey(name), *path) for path in below]
    return list(zip(paths, leaves, strict=True)), spec


def held(x, depth=2):
    """[(attribute, tensors, what the objects among them hold)] of an object that a caller keeps tensors in; else [].

    Args:
        depth: of objects in objects.
    """
    found = []
    for name, value in vars(x).items() if depth and _is_object(x) else ():
        leaves = tree_leaves(value)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        below = [more for more in (held(leaf, depth - 1) for leaf in leaves) if more]
        if tensors or below:
            found.append((name, tensors, below))
    return found


def _is_object(x):
    """True of what a caller may keep something in beside plain containers."""
    known = torch.Tensor | torch.nn.Module | type | types.ModuleType | types.FunctionType | types.MethodType
    return hasattr(x, "__dict__") and not isinstance(x, known)


def _items(x):
    if not isinstance(x, Iterator):
        return x
    items = _Items(itertools.islice(x, MOST_ITEMS))
    if len(items) == MOST_ITEMS:
        raise ValueError(
            f"an iterator among the denoiser's arguments must end before {MOST_ITEMS} items, since several forwards "
            f"read it: got {type(x).__name__}; pass a list, or what it is made of"
        )
    return opened(items)


def _holds_items(x):
    if isinstance(x, _Items):
        return True
    items = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return any(map(_holds_items, items))


def _open(x):
    """Register the class of `x`, and those of what it holds, if it is a dataclass with a tensor in it: True if so."""
    if not dataclasses.is_dataclass(x) or isinstance(x, type) or type(x) in SUPPORTED_NODES:
        return False
    held = [leaf for _, value in _fields(x) for leaf in tree_leaves(value)]
    holds = any([_open(leaf) for leaf in held]) or any(isinstance(leaf, torch.Tensor) for leaf in held)
    if holds:
        kind = type(x)
        register_pytree_node(
            kind,
            lambda x: ([value for _, value in _fields(x)], [name for name, _ in _fields(x)]),
            lambda values, names: _made(kind, names, values),
            serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
            flatten_with_keys_fn=lambda x: (
                [(GetAttrKey(name), value) for name, value in _fields(x)],
                [name for name, _ in _fields(x)],
            ),
        )
    return holds


def _fields(x):
    """[(name, value)] of those fields that are set."""
    return [(f.name, getattr(x, f.name)) for f in dataclasses.fields(x) if hasattr(x, f.name)]


def _made(kind, names, values):
    """An instance with these fields, whatever its `__init__` takes."""
    made = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    return made
