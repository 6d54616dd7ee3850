"""How the arguments of a batch are cut in two halves, found by what a denoiser's forward shows."""

import torch
from torch.utils._pytree import tree_leaves

from ..tracing.side_effects import processors_that_keep, restored
from .cuts import candidates, chosen, guess, wholes, written
from .joins import Join, difference
from .trees import copied

# How far half a batch may be from the same rows of the whole, of the largest element: other kernels for other sizes.
CLOSE = 2e-2
# By how much a half's result may change with the other half's rows. The shapes are the same, so by nothing; but lengths
# of masks choose kernels.
MIXES, HALF_PRECISION = 2e-5, {torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Trials:
    """Runs one call of a denoiser, whole and in parts. Collective over the two halves.

    Args:
        world: the two ranks.
        denoiser: what it keeps of a call is as before after each trial.
        forward: `forward(named)` is the denoiser's own, on arguments by name.
        named: the arguments, for a batch of `size`.
        latent_name: the name of one that is cut in any case.
    """

    def __init__(self, world, denoiser, forward, named, size, latent_name):
        self._world, self._denoiser, self._forward = world, denoiser, forward
        self._named, self._size, self._latent_name, self._half = named, size, latent_name, world.rank
        with torch.no_grad(), restored(denoiser) as before:
            given = copied(named)
            self._whole = forward(given)
            keeping = processors_that_keep(before)
        if keeping:
            raise ValueError(
                f"{', '.join(keeping)} of {type(denoiser).__name__} keeps something of the batch, of which each half "
                "would have its own part only. Pass cfg_parallel=False; parallel_steps=2 leaves batches whole"
            )
        if changed := written(given):
            raise ValueError(
                f"{type(denoiser).__name__} writes into its arguments ({', '.join(changed)}), of which each half would "
                "write its own part only. Pass cfg_parallel=False"
            )
        self._result = guess({"result": self._whole}, size, named[latent_name])

    def decide(self):
        """(`Cut` of the arguments, `Join` of the results). Raises: ValueError if a half gives another result."""
        cut = guess(self._named, self._size, self._named[self._latent_name])
        join, problem = self._check(cut)
        if problem:
            cut, silent = self._by_argument(cut)
            join, problem = self._check(cut)
            # A weight for each layer, say, of as many layers as pictures, all of them 1.
            for other in wholes(cut, silent, self._latent_name) if problem else ():
                found = self._check(other)
                if not found[1]:
                    cut, (join, problem) = other, found
                    break
        if problem:
            raise ValueError(
                f"{type(self._denoiser).__name__} does not give on half of its batch what it gives on the whole: "
                f"{problem}; of its arguments these were cut (along dimension): {cut}. Pass cfg_parallel=False; "
                "parallel_steps=2 leaves batches whole"
            )
        return cut, join

    def _check(self, cut):
        """(`Join`, what is wrong with a cut or None), the same on both ranks."""
        mixed = self._changes(cut)[0]
        join, text = None, None
        if mixed > self._rounding:
            text = f"its result changes by {mixed:.1e} of the largest element with the other half's rows"
        else:
            part = self._run(cut.half(self._half, self._named))
            try:
                if isinstance(part, Exception):
                    raise part
                join = Join(self._whole, part)
                error = difference(part, join.half(self._whole, self._half))
                text = None if error <= CLOSE else f"they differ by {error:.1e} of the largest element"
            except Exception as problem:
                text = f"{type(problem).__name__}: {problem}"
        texts = self._world.gather(text, "the first result of the CFG halves")
        return join, next((t for t in texts if t), None)

    def _by_argument(self, guessed):
        """(`Cut` of what a half's result does not need of the other half's rows, each argument for itself; paths of
        those whose rows changed nothing).
        """
        tried = candidates(self._named, self._size)
        mine = [[change > self._rounding for change in self._changes(cut)] for cut in tried]
        verdicts = []
        for cut, changes in zip(tried, zip(*self._world.gather(mine, "trials of arguments"), strict=True), strict=True):
            (place,) = cut.where.items()
            mixes, follows = any(own for own, _ in changes), any(other for _, other in changes)
            verdicts.append((place, "mixes" if mixes else "follows" if follows else None))
        silent = {path for (path, _), verdict in verdicts if verdict is None}
        return chosen(self._named, self._size, self._latent_name, guessed, verdicts), silent

    def _changes(self, cut):
        """By how much this half's result, and the other's, change where the other half has this one's rows."""
        result = self._run(cut.overwritten(self._half, self._named))
        if isinstance(result, Exception):
            return torch.inf, 0.0
        found = []
        for half in (self._half, 1 - self._half):
            after, before = (self._result.half(half, {"result": x}) for x in (result, self._whole))
            found.append(difference(after, before))
        return tuple(found)

    @property
    def _rounding(self):
        kinds = {x.dtype for x in tree_leaves((self._whole, self._named)) if isinstance(x, torch.Tensor)}
        return max([MIXES, *(HALF_PRECISION[kind] for kind in kinds if kind in HALF_PRECISION)])

    def _run(self, named):
        """The result, or the exception: another half's arguments may do where these do not."""
        try:
            with torch.no_grad(), restored(self._denoiser):
                return self._forward(copied(named))
        except Exception as error:
            return error
