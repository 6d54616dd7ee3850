"""Cheap digests of every bit, by which ranks see that they hold the same weights and call with the same inputs."""

import math
import zlib

import torch
from torch.utils._pytree import keystr

from ..calls.containers import flattened
from ..versions import version

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# An odd 64-bit number with bits all over: 2^64 over the golden ratio.
_MIX = -7046029254386353131


def _bits(tensor):
    """Digest of a tensor's bits and their places, an int64 scalar on its device; None where there are none to read.

    The sums of all rows and all columns, each times a factor of its own: two values that change places change it.
    """
    if tensor.is_meta or tensor.numel() == 0:
        return None
    try:
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        words = tensor.detach().contiguous().view(_WORDS[tensor.element_size()]).reshape(-1)
        width = math.isqrt(len(words))
        rest = len(words) % width
        rows = words[: len(words) - rest].view(-1, width)
        sums = [rows.sum(0, dtype=torch.int64), rows.sum(1, dtype=torch.int64), words[len(words) - rest :].long()]
        factors = torch.arange(1, sum(map(len, sums)) + 1, device=tensor.device) * _MIX
        return (torch.cat(sums) * (factors ^ (factors >> 29))).sum()
    except (RuntimeError, NotImplementedError, KeyError, TypeError):
        # A wrapper subclass, such as a quantised weight.
        return None


def model_digest(model, buffers=True):
    """One number for names, shapes, dtypes and every bit of a model's parameters, and of its buffers, but for those
    that are elsewhere.
    """
    tensors = list(model.named_parameters()) + (list(model.named_buffers()) if buffers else [])
    layout = [(name, tuple(t.shape), str(t.dtype)) for name, t in tensors]
    sums = [s for s in (_bits(t) for _, t in tensors if not _is_elsewhere(t)) if s is not None]
    by_device = {}
    for s in sums:
        by_device.setdefault(s.device, []).append(s)
    words = [torch.stack(group).cpu().tolist() for group in by_device.values()]
    return zlib.crc32(repr((type(model).__name__, layout, words)).encode())


class Weights:
    """The weights of a model since now: whether they were written, and whether some of each are as on other ranks.

    Its parameters, that is: what a forward keeps in buffers may be of this rank's part of the picture.
    """

    # Numbers looked at in each tensor.
    SAMPLE = 16

    def __init__(self, model):
        self._model = model
        self._seen = self._now = self._versions()

    def _tensors(self):
        return list(self._model.named_parameters())

    def _versions(self):
        return [(name, id(t), version(t)) for name, t in self._tensors()]

    def report(self):
        """(True if one was written, added or taken away; digest of a sample, None where weights are elsewhere)."""
        self._now = self._versions()
        return self._now != self._seen, self._sampled()

    def accept(self):
        """What was reported last is as on other ranks: what is written from then on counts."""
        self._seen = self._now

    def digest(self):
        """See `model_digest`; None where weights are elsewhere."""
        return None if any(_is_elsewhere(t) for _, t in self._tensors()) else model_digest(self._model, buffers=False)

    def _sampled(self):
        tensors = [t.detach() for _, t in self._tensors()]
        if any(map(_is_elsewhere, tensors)):
            return None
        sums = [s for s in (_bits(_some(t, self.SAMPLE)) for t in tensors if t.numel()) if s is not None]
        by_device = {}
        for s in sums:
            by_device.setdefault(s.device, []).append(s)
        return zlib.crc32(repr([torch.stack(group).cpu().tolist() for group in by_device.values()]).encode())


def _is_elsewhere(tensor):
    """True for a meta tensor, and for one number that stands for many: another rank, or the disk, holds the others."""
    return tensor.is_meta or (tensor.numel() > 1 and tensor.layout is torch.strided and not any(tensor.stride()))


def _some(tensor, count):
    """Some numbers of a tensor, in a tensor of one dimension; nothing large is copied."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return tensor
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        return flat[:: max(1, len(flat) // count)][:count]
    # Of the first row or channel: other layouts are not flattened.
    return tensor[(0,) * (tensor.dim() - 1)][:count]


def input_digests(named):
    """{name of the input: (shape, digest)} of every tensor, and the text of every number and string, in a dict."""
    found = {}
    for path, leaf in flattened(named)[0]:
        name = f"{path[0].key}{keystr(path[1:])}"
        if isinstance(leaf, torch.Tensor):
            bits = _bits(leaf)
            found[name] = (tuple(leaf.shape), None if bits is None else int(bits))
        elif isinstance(leaf, int | float | str):
            found[name] = repr(leaf)
    return found
