"""Which tokens of a denoiser's sequences make which row of the picture, by what a change of single rows changes.

How tokens are made (a convolution, a reshape and a linear layer, frame by frame, columns first) need not be known: the
first attention's keys that are other numbers after one row of the latent was changed are that row's tokens.
"""

import contextlib
import itertools
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .sites import ATTENTION, sample_of


@dataclass(frozen=True)
class TokenOrder:
    """Tokens of the picture lie `outer` times after each other, each time `rows` rows of `inner` tokens.

    `starts`: {length of a sequence: place of the picture's first token in it}. `first`: number of the attention that is
    the first to have them among its keys.
    """

    outer: int
    rows: int
    inner: int
    starts: dict = field(default_factory=dict)
    first: int = 0

    @property
    def size(self):
        """Tokens of the picture."""
        return self.outer * self.rows * self.inner


class _Enough(Exception):
    """Ends a forward of which no more need be seen."""


class _Changes(TorchFunctionMode):
    """Collects in `masks` which keys of each attention differ from `samples`, those of the picture as it is.

    Ends the forward after `last` attentions, or once all keys of the first that has any differ.
    """

    def __init__(self, samples, last=None):
        super().__init__()
        self.masks, self._samples, self._last = [], samples, last or len(samples)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            sample = sample_of(args[1] if len(args) > 1 else kwargs["key"])
            known = self._samples[len(self.masks)] if len(self.masks) < len(self._samples) else None
            if known is None or known.shape != sample.shape:
                raise _Enough
            mask = (known != sample).any(-1)
            first = not any(m.any() for m in self.masks)
            self.masks.append(mask)
            if len(self.masks) == self._last or (first and mask.all()):
                raise _Enough
        return func(*args, **(kwargs or {}))


def find(run, recorder, latent, with_latent, dim, denoiser):
    """The `TokenOrder` of a denoiser; None where its first attention's tokens are not each of one row.

    Args:
        run: `run(args, kwargs)` is a forward on the whole picture.
        recorder: of one with these inputs.
        latent: what holds the picture, rows in dimension `dim`.
        with_latent: gives (args, kwargs) with another latent.
        denoiser: whose modules `recorder` names.
    """
    sites = [recorder.sites[key][place] for key, place in recorder.order]
    samples = [s.sample for s in sites if s.kind == ATTENTION]
    size = latent.shape[dim]
    if not samples or size < 2 or latent.is_meta:
        return None

    def another(row):
        other = latent.clone()
        other.narrow(dim, row, 1).mul_(-1).add_(1)
        return with_latent(other)

    def changed(row, last=None):
        seen = _Changes(samples, last)
        with contextlib.suppress(_Enough), seen:
            run(*another(row))
        return [m.nonzero().flatten().tolist() for m in seen.masks]

    masks = changed(0)
    at = next((i for i, found in enumerate(masks) if found), None)
    if at is None or len(masks[at]) == len(samples[at]):
        return None
    bottom = changed(size - 1, at + 1)[at:]
    order = _order(masks[at], bottom[0] if bottom else [], size, at)
    if order is None:
        return None
    # What spreads to neighbouring rows, as a convolution does, spreads to both sides here.
    factor = size // order.rows
    if order.rows < 2 or changed(factor, at + 1)[at:] != [[i + order.inner for i in masks[at]]]:
        return None
    for found, sample in zip(masks[at:], samples[at:], strict=False):
        start = _start(found, len(sample), order)
        if start is not None:
            order.starts.setdefault(len(sample), start)
    order.starts.setdefault(order.size, 0)
    block = recorder.outer.attending(order.first)
    if block is not None and not block.sizes() & order.starts.keys():
        module, number = denoiser.get_submodule(block.key[0]), block.key[1]
        plain, other = (_given(module, number, run, *x) for x in (with_latent(latent), another(0)))
        for length, places in _changed_along(plain, other):
            start = _start(places, length, order)
            if start is not None:
                order.starts.setdefault(length, start)
    return order


def _given(module, number, run, args, kwargs):
    """The tensors that a call of a module is given, by its number, in a forward that ends there."""
    found, calls = [], itertools.count()

    def note(module, args, kwargs):
        if next(calls) == number:
            found.extend(x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
            raise _Enough

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with contextlib.suppress(_Enough):
            run(args, kwargs)
    finally:
        handle.remove()
    return found


def _changed_along(plain, other):
    """(size of a dimension, places in it where tensors differ) of each that is no feature's."""
    for x, y in zip(plain, other, strict=False):
        for dim in range(x.dim() - 1) if x.shape == y.shape else ():
            differ = (x != y).movedim(dim, 0).flatten(1).any(1)
            yield x.shape[dim], differ.nonzero().flatten().tolist()


def _order(top, bottom, size, first):
    """The order by the tokens of the first and of the last row of `size`; None if they are not regular."""
    runs = _runs(top)
    inner, pitches = runs[0][1] - runs[0][0], {b[0] - a[0] for a, b in pairwise(runs)}
    if len({stop - start for start, stop in runs}) > 1 or len(pitches) > 1 or not bottom:
        return None
    total, outer = bottom[-1] + 1 - top[0], len(runs)
    rows, rest = divmod(total, outer * inner)
    if rest or rows < 1 or size % rows or (pitches and pitches != {rows * inner}):
        return None
    return TokenOrder(outer, rows, inner, first=first)


def _start(found, length, order):
    """Where the picture's tokens begin in a sequence, by those that changed with the first row; None: unknown."""
    if not found or length < order.size:
        return None
    one_row = len(found) == order.outer * order.inner
    all_rows = len(found) == order.size == found[-1] + 1 - found[0]
    return found[0] if (one_row or all_rows) and found[0] + order.size <= length else None


def _runs(places):
    """[(first, behind the last)] of neighbouring numbers."""
    runs = []
    for i in places:
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    return runs
