"""Which arguments of a call have a part for each picture of its batch, and where; and how results are put together.

An argument is never taken for one by its first dimension alone. A row of the batch shows in its own picture only: what
the other half's rows are must not change this half's result. So they are overwritten, and the forward is run again.
"""

from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..versions import version

# Stands for a dimension where a list has an item for each picture.
ITEMS = "items"


@dataclass(frozen=True)
class Cut:
    """Where the arguments of a call are cut: {path: dimension, or `ITEMS`}; a path begins with the argument's name."""

    where: dict
    batch: int

    def half(self, half, named):
        """The arguments of one half (0 or 1), in containers of their own."""

        def cut(path, x):
            if path not in self.where:
                return None
            return _part(x, self.where[path], half)

        return _mapped(named, cut)

    def overwritten(self, half, named):
        """The whole batch, where the other half has the rows of `half` in the arguments that are cut."""

        def overwrite(path, x):
            if path not in self.where:
                return None
            mine = _part(x, self.where[path], half)
            return mine + mine if self.where[path] == ITEMS else torch.cat([mine, mine], self.where[path])

        return _mapped(named, overwrite)

    def __str__(self):
        return ", ".join(f"{_name(path)} ({dim})" for path, dim in sorted(self.where.items(), key=str)) or "nothing"


def size_of(latent):
    """Pictures in a latent: its first dimension, or the items of a list; 1 for anything else."""
    if isinstance(latent, torch.Tensor):
        return latent.shape[0] if latent.dim() else 1
    return len(latent) if isinstance(latent, list) else 1


def fresh(tree):
    """The same tensors in containers of their own: a forward may empty a list that it is given."""
    return tree_map(lambda x: x, tree)


def copied(tree):
    """Copies of tensors and containers: a forward may write into what it is given."""
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)


def guess(named, batch, latent):
    """The likely `Cut`: the first dimensions that the batch fits, or frames of it; lists where the latent is one."""
    in_lists, where = isinstance(latent, list), {}
    for path, x in _places(named):
        if any(path[: len(p)] == p for p in where):
            continue
        options = _options(x, batch, frames=3)
        if options[:1] == ([0] if isinstance(x, torch.Tensor) else [ITEMS] if in_lists else [None]):
            where[path] = options[0]
    return Cut(where, batch)


def candidates(named, batch):
    """`Cut`s of one argument each: every place that the batch fits."""
    return [Cut({path: dim}, batch) for path, x in _places(named) for dim in _options(x, batch, frames=1)]


def silent(named, batch, among=None):
    """Paths of arguments that the batch fits, or of those `among` them, that hold zeros only: they say nothing yet."""
    places = ((path, x) for path, x in _places(named) if among is None or path in among)
    return frozenset(path for path, x in places if _options(x, batch, frames=1) and _is_zero(x))


def written(named):
    """Names of arguments that were written in place since they were made."""
    return [_name(path) for path, x in _places(named) if isinstance(x, torch.Tensor) and version(x)]


def chosen(named, batch, latent_name, guessed, verdicts):
    """The `Cut` after trials.

    Args:
        verdicts: for each of `candidates`, "mixes", "follows", or None where nothing changed.
    """
    where, at = {}, dict(_places(named))
    for (path, dim), verdict in verdicts:
        inside = any(path[: len(p)] == p for p in where)
        likely = guessed.where.get(path) == dim
        exact = dim == ITEMS or at[path].shape[dim] == batch
        wanted = verdict == "follows" or (verdict is None and likely and exact) or (path == (latent_name,) and likely)
        if wanted and not inside:
            where[path] = dim
    return Cut(where, batch)


def wholes(cut, silent, latent_name):
    """`Cut`s that leave whole what changed nothing in trials: each such argument alone, then all of them."""
    doubtful = sorted((path for path in cut.where if path in silent and path != (latent_name,)), key=str)
    for left in (*([path] for path in doubtful), doubtful if len(doubtful) > 1 else []):
        if left:
            yield Cut({path: dim for path, dim in cut.where.items() if path not in left}, cut.batch)


def difference(a, b):
    """Largest difference of two results, of the largest element; infinite if they have other shapes."""
    worst = 0.0
    left, right = _tensors(a), _tensors(b)
    if len(left) != len(right):
        return torch.inf
    for x, y in zip(left, right, strict=True):
        if x.shape != y.shape:
            return torch.inf
        if x.numel():
            x, y = ((torch.view_as_real(z) if z.is_complex() else z).float() for z in (x, y))
            worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp(min=1e-12)))
    # Not a number is as far as can be.
    return worst if worst == worst else torch.inf


class Join:
    """How the results of two halves make that of the batch, learned from one of each."""

    def __init__(self, whole, part):
        """Raises: ValueError if the part is no half of the whole."""
        self._rule = _rule(whole, part)

    def half(self, whole, half):
        """The part of a result of the whole batch that belongs to one half."""
        return _halved(self._rule, whole, half)

    def together(self, first, second):
        """The result of the batch."""
        return _joined(self._rule, first, second)


def _rule(whole, part):
    """A dimension, `ITEMS`, None for what both halves have alike, or a list of rules for what is inside."""
    if isinstance(whole, torch.Tensor) and isinstance(part, torch.Tensor) and whole.dim() == part.dim():
        different = [d for d in range(whole.dim()) if whole.shape[d] != part.shape[d]]
        if not different:
            return None
        if len(different) == 1 and whole.shape[different[0]] == 2 * part.shape[different[0]]:
            return different[0]
    elif isinstance(whole, list) and isinstance(part, list) and len(whole) == 2 * len(part) > 0:
        return ITEMS
    elif not isinstance(whole, torch.Tensor) and type(part) is type(whole):
        (mine, spec), (other, _) = _children(whole), _children(part)
        if len(mine) == len(other):
            return None if spec is None else [_rule(a, b) for a, b in zip(mine, other, strict=True)]
    raise ValueError(f"half a batch gives {_shapes(part)}, the whole {_shapes(whole)}")


def _halved(rule, whole, half):
    if rule is None:
        return whole
    if isinstance(rule, list):
        children, spec = _children(whole)
        return tree_unflatten([_halved(r, x, half) for r, x in zip(rule, children, strict=True)], spec)
    return _part(whole, rule, half)


def _joined(rule, first, second):
    if rule is None:
        return first
    if isinstance(rule, list):
        (mine, spec), (other, _) = _children(first), _children(second)
        return tree_unflatten([_joined(r, a, b) for r, a, b in zip(rule, mine, other, strict=True)], spec)
    return first + second if rule == ITEMS else torch.cat([first, second], rule)


def _children(tree):
    """(children, spec) of one level; spec None for a leaf."""
    children, spec = tree_flatten(tree, is_leaf=lambda x: x is not tree)
    return (children, None) if len(children) == 1 and children[0] is tree else (children, spec)


def _part(x, dim, half):
    if dim == ITEMS:
        size = len(x) // 2
        return x[half * size : (half + 1) * size]
    size = x.shape[dim] // 2
    return x.narrow(dim, half * size, size)


def _options(x, batch, frames):
    """Dimensions of a tensor that the batch fits, likely ones first; `ITEMS` of a list.

    Args:
        frames: least number of dimensions of a tensor whose first may be a multiple of the batch.
    """
    if not isinstance(x, torch.Tensor):
        return [ITEMS] if len(x) == batch else []
    found = [d for d in range(x.dim()) if x.shape[d] == batch]
    if x.dim() >= frames and x.shape[:1] and x.shape[0] > batch and x.shape[0] % batch == 0:
        found.append(0)
    return found


def _places(tree, path=()):
    """(path, tensor or list) of every place where a batch may be, outer ones first."""
    if isinstance(tree, torch.Tensor | list):
        yield path, tree
    children, spec = _children(tree)
    for key, x in zip(_keys(tree, children), children, strict=True) if spec is not None else ():
        yield from _places(x, (*path, key))


def _mapped(tree, change, path=()):
    """A copy of the containers in a tree; `change(path, x)` gives what takes the place of x, or None."""
    place = isinstance(tree, torch.Tensor | list)
    changed = change(path, tree) if place else None
    if changed is not None:
        return changed
    children, spec = _children(tree)
    if spec is None:
        return tree
    pairs = zip(_keys(tree, children), children, strict=True)
    return tree_unflatten([_mapped(x, change, (*path, key)) for key, x in pairs], spec)


def _keys(tree, children):
    return list(tree) if type(tree) is dict else range(len(children))


def _is_zero(x):
    return not any(bool(t.any()) for t in _tensors(x))


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _name(path):
    return str(path[0]) + "".join(f"[{key}]" for key in path[1:])


def _shapes(tree):
    found = [tuple(x.shape) for x in _tensors(tree)]
    return ", ".join(map(str, found[:4])) + (", ..." if len(found) > 4 else "") or type(tree).__name__
