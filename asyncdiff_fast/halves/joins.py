"""How the results of two halves make the result of the batch."""

import torch
from torch.utils._pytree import tree_unflatten

from .trees import ITEMS, half_of, one_level, tensors


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
        (mine, spec), (other, _) = one_level(whole), one_level(part)
        if len(mine) == len(other):
            return None if spec is None else [_rule(a, b) for a, b in zip(mine, other, strict=True)]
    raise ValueError(f"half a batch gives {_shapes(part)}, the whole {_shapes(whole)}")


def _halved(rule, whole, half):
    if rule is None:
        return whole
    if isinstance(rule, list):
        children, spec = one_level(whole)
        return tree_unflatten([_halved(r, x, half) for r, x in zip(rule, children, strict=True)], spec)
    return half_of(whole, rule, half)


def _joined(rule, first, second):
    if rule is None:
        return first
    if isinstance(rule, list):
        (mine, spec), (other, _) = one_level(first), one_level(second)
        return tree_unflatten([_joined(r, a, b) for r, a, b in zip(rule, mine, other, strict=True)], spec)
    return first + second if rule == ITEMS else torch.cat([first, second], rule)


def difference(a, b):
    """Largest difference of two results, of the largest element; infinite if they have other shapes."""
    worst = 0.0
    left, right = tensors(a), tensors(b)
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


def _shapes(tree):
    found = [tuple(x.shape) for x in tensors(tree)]
    return ", ".join(map(str, found[:4])) + (", ..." if len(found) > 4 else "") or type(tree).__name__
