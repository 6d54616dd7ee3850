"""Parts of a batch: the micro-steps of an exact call."""

import torch
from torch.utils._pytree import tree_map_only

# More parts overlap better and fill each device less.
MOST_PARTS = 4


def size_of(latent):
    """Pictures in a latent; 1 where it does not say."""
    return latent.shape[0] if isinstance(latent, torch.Tensor) and latent.dim() else 1


def parts_of(batch):
    """How many parts of one size a batch is computed in."""
    return next(n for n in range(min(batch, MOST_PARTS), 0, -1) if batch % n == 0)


def cut(part, count, batch, args, kwargs):
    """(args, kwargs) of one part: of every tensor whose first dimension is the batch, or frames of it."""

    def narrow(x):
        frames = x.dim() >= 3 and x.shape[0] % batch == 0
        if x.dim() == 0 or not (x.shape[0] == batch or frames):
            return x
        size = x.shape[0] // count
        return x.narrow(0, part * size, size)

    return tree_map_only(torch.Tensor, narrow, (args, kwargs))
