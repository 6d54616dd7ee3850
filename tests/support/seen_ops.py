"""Which ops of torch run: what a dispatch mode sees."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class SeenOps(TorchDispatchMode):
    """`names` of the ops in order, "aten::cat" say; with `of_activations` of those on tensors of more than two sizes.

    A time embedding has two. Nothing is noted while it is `paused`.
    """

    def __init__(self, of_activations=True, paused=False):
        super().__init__()
        self.names, self.paused, self._of_activations = [], paused, of_activations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        wanted = not self._of_activations or any(isinstance(x, torch.Tensor) and x.ndim > 2 for x in args)
        if wanted and not self.paused:
            self.names.append(func.name().split(".")[0])
        return func(*args, **kwargs or {})
