"""The tensors and lists within arguments and results, by path: a path begins with the argument's name."""

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

# Stands for a dimension where a list has an item for each picture.
ITEMS = "items"


def fresh(tree):
    """The same tensors in containers of their own: a forward may empty a list that it is given."""
    return tree_map(lambda x: x, tree)


def copied(tree):
    """Copies of tensors and containers: a forward may write into what it is given."""
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)


def places(tree, path=()):
    """(path, tensor or list) of every place where a batch may be, outer ones first."""
    if isinstance(tree, torch.Tensor | list):
        yield path, tree
    children, spec = one_level(tree)
    for key, x in zip(_keys(tree, children), children, strict=True) if spec is not None else ():
        yield from places(x, (*path, key))


def mapped(tree, change, path=()):
    """A copy of the containers in a tree; `change(path, x)` gives what takes the place of x, or None."""
    place = isinstance(tree, torch.Tensor | list)
    changed = change(path, tree) if place else None
    if changed is not None:
        return changed
    children, spec = one_level(tree)
    if spec is None:
        return tree
    pairs = zip(_keys(tree, children), children, strict=True)
    return tree_unflatten([mapped(x, change, (*path, key)) for key, x in pairs], spec)


def half_of(x, dim, half):
    """One half (0 or 1) of a tensor or list, along a dimension or `ITEMS`."""
    if dim == ITEMS:
        size = len(x) // 2
        return x[half * size : (half + 1) * size]
    size = x.shape[dim] // 2
    return x.narrow(dim, half * size, size)


def one_level(tree):
    """(children, spec) of one level; spec None for a leaf."""
    children, spec = tree_flatten(tree, is_leaf=lambda x: x is not tree)
    return (children, None) if len(children) == 1 and children[0] is tree else (children, spec)


def tensors(tree):
    """Its tensors, in order."""
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def label(path):
    """A path for messages: `added_cond_kwargs[time_ids]`."""
    return str(path[0]) + "".join(f"[{key}]" for key in path[1:])


def _keys(tree, children):
    return list(tree) if type(tree) is dict else range(len(children))
