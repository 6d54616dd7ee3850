"""Tensors whose memory tells that their values are still those that they were."""

import torch
from torch.utils._pytree import tree_leaves

from ..versions import version


class Constant:
    """A tensor that is held, and `results`: what was made of it, by module and view."""

    def __init__(self, tensor):
        self.tensor, self.version, self.results = tensor, version(tensor), {}

    @property
    def kept_bytes(self):
        return sum(result.tensor.nbytes + result.kept_bytes for result in self.results.values())


class Argument(Constant):
    """An argument: on the CPU all that lies in its memory is compared, too."""

    def __init__(self, tensor):
        super().__init__(tensor)
        self._words = _all_words(tensor).clone() if tensor.device.type == "cpu" else None

    def is_now(self, x):
        """True if an argument lies in this memory, with what was in it."""
        if place(x) != place(self.tensor) or not version(x) == version(self.tensor) == self.version:
            return False
        return self._words is None or torch.equal(_all_words(x), self._words)


def place(x):
    """What tells one piece of memory from all others that are held, on any device."""
    return x.untyped_storage()._cdata


def by_place(tree, latent):
    """{place: tensor} of the ordinary tensors in a tree, where the latent does not lie."""
    apart = {place(x) for x in tree_leaves(latent) if isinstance(x, torch.Tensor)}
    found = {place(x): x for x in tree_leaves(tree) if type(x) is torch.Tensor and not x.is_inference()}
    return {where: x for where, x in found.items() if where not in apart}


def _all_words(x):
    storage = x.untyped_storage()
    return torch.empty(0, dtype=torch.uint8 if storage.nbytes() % 8 else torch.int64).set_(storage)
