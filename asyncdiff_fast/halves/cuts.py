"""Which arguments of a call have a part for each picture of its batch, and where.

An argument is never taken for one by its first dimension alone. A row of the batch shows in its own picture only: what
the other half's rows are must not change this half's result. So they are overwritten, and the forward is run again.
"""

from dataclasses import dataclass

import torch

from ..versions import version
from .trees import ITEMS, half_of, label, mapped, places, tensors


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
            return half_of(x, self.where[path], half)

        return mapped(named, cut)

    def overwritten(self, half, named):
        """The whole batch, where the other half has the rows of `half` in the arguments that are cut."""

        def overwrite(path, x):
            if path not in self.where:
                return None
            mine = half_of(x, self.where[path], half)
            return mine + mine if self.where[path] == ITEMS else torch.cat([mine, mine], self.where[path])

        return mapped(named, overwrite)

    def __str__(self):
        return ", ".join(f"{label(path)} ({dim})" for path, dim in sorted(self.where.items(), key=str)) or "nothing"


def size_of(latent):
    """Pictures in a latent: its first dimension, or the items of a list; 1 for anything else."""
    if isinstance(latent, torch.Tensor):
        return latent.shape[0] if latent.dim() else 1
    return len(latent) if isinstance(latent, list) else 1


def guess(named, batch, latent):
    """The likely `Cut`: the first dimensions that the batch fits, or frames of it; lists where the latent is one."""
    in_lists, where = isinstance(latent, list), {}
    for path, x in places(named):
        if any(path[: len(p)] == p for p in where):
            continue
        options = _options(x, batch, frames=3)
        if options[:1] == ([0] if isinstance(x, torch.Tensor) else [ITEMS] if in_lists else [None]):
            where[path] = options[0]
    return Cut(where, batch)


def candidates(named, batch):
    """`Cut`s of one argument each: every place that the batch fits."""
    return [Cut({path: dim}, batch) for path, x in places(named) for dim in _options(x, batch, frames=1)]


def silent(named, batch, among=None):
    """Paths of arguments that the batch fits, or of those `among` them, that hold zeros only: they say nothing yet."""
    found = ((path, x) for path, x in places(named) if among is None or path in among)
    return frozenset(path for path, x in found if _options(x, batch, frames=1) and _is_zero(x))


def written(named):
    """Names of arguments that were written in place since they were made."""
    return [label(path) for path, x in places(named) if isinstance(x, torch.Tensor) and version(x)]


def chosen(named, batch, latent_name, guessed, verdicts):
    """The `Cut` after trials.

    Args:
        verdicts: for each of `candidates`, "mixes", "follows", or None where nothing changed.
    """
    where, at = {}, dict(places(named))
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


def _is_zero(x):
    return not any(bool(t.any()) for t in tensors(x))
